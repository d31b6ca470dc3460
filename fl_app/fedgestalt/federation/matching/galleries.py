"""The server's standing galleries: masked rows, opaque handles and sealed labels, by kernel.

A gallery is a folder with one file for each site, replaced as a whole, so that a server that dies
and starts again has the rows of every site as they were before or after its last enrolment.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import PeerError, ServerError
from fedgestalt.federation.matching.messages import Enrolment, Handles
from fedgestalt.similarity.labels import HANDLE_BYTES, SEALED_BYTES

GALLERIES_FOLDER: Final = Path("fedgestalt") / "galleries"
_ABOUT: Final = "gallery.json"
_SCHEMA: Final = "fedgestalt.gallery/1"


@dataclass(frozen=True)
class Rows:
    """Rows of one or of all sites.

    Attributes:
        rows: (n, k) masked encodings.
        handles, labels: (n, bytes).
    """

    rows: NDArray[np.float32]
    handles: Handles
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, handles: Handles) -> NDArray[np.int64]:
        """Numbers of the rows with these handles; -1 where there is none."""
        numbers = {handle.tobytes(): number for number, handle in enumerate(self.handles)}
        return np.array([numbers.get(handle.tobytes(), -1) for handle in handles], np.int64)


def no_rows(dimensions: int = 0) -> Rows:
    """Of a site that has sent none yet."""
    return Rows(
        np.empty((0, dimensions), np.float32),
        np.empty((0, HANDLE_BYTES), np.uint8),
        np.empty((0, SEALED_BYTES), np.uint8),
    )


def joined(parts: Mapping[str, Rows]) -> Rows:
    """The rows of several sites, in the order of their names."""
    some = [part for _, part in sorted(parts.items()) if len(part)]
    if not some:
        return no_rows()
    return Rows(
        np.concatenate([part.rows for part in some]),
        np.concatenate([part.handles for part in some]),
        np.concatenate([part.labels for part in some]),
    )


class Gallery:
    """The rows of all sites under one kernel.

    Args:
        folder: where it is kept; None keeps it in memory, for one job.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: dict[str, Rows] = {}

    def open(self) -> Gallery:
        """Read what was kept; returns itself.

        Raises:
            ServerError: a file is damaged.
        """
        for path in sorted(self._folder.glob("*.npz")) if self._folder else ():
            try:
                with np.load(path, allow_pickle=False) as kept:
                    rows = Rows(kept["rows"], kept["handles"], kept["labels"])
                    site = str(kept["site"])
            except (OSError, KeyError, ValueError, BadZipFile):
                raise ServerError(
                    f"a file of the standing gallery is damaged ({path.name})",
                    where="server",
                    remedy="remove it; the next matching job enrols that site's images again",
                ) from None
            self._parts[site] = rows
        return self

    def part(self, site: str) -> Rows:
        """A site's rows."""
        return self._parts.get(site, no_rows())

    @property
    def rows(self) -> Rows:
        """Everybody's."""
        return joined(self._parts)

    def enrol(self, site: str, new: Enrolment) -> None:
        """Take a site's new rows and drop those that it removes.

        Raises:
            PeerError: what it removes is not its own, what it adds is there already, or has other
                dimensions than everybody's.
            ServerError: it cannot be kept.
        """
        own = self.part(site)
        removed = own.at(new.removed)
        if (removed < 0).any():
            raise PeerError("it removes rows that it does not have in the gallery", site=site)
        everybody = joined(self._parts)
        sent = {handle.tobytes() for handle in new.handles}
        if len(sent) != len(new.handles) or (everybody.at(new.handles) >= 0).any():
            raise PeerError("it sent a row twice", site=site)
        if len(everybody) and len(new.rows) and everybody.rows.shape[1] != new.rows.shape[1]:
            raise PeerError(
                f"its rows have {new.rows.shape[1]} dimensions, the gallery"
                f" {everybody.rows.shape[1]}",
                site=site,
            )
        kept = np.setdiff1d(np.arange(len(own)), removed)
        left = Rows(own.rows[kept], own.handles[kept], own.labels[kept])
        added = Rows(new.rows, new.handles, new.labels)
        part = joined({"1": left, "2": added})
        if len(removed) or len(added):
            self._keep(site, part)
        self._parts[site] = part

    def _keep(self, site: str, part: Rows) -> None:
        if self._folder is None:
            return
        target = self._folder / f"{site.encode().hex()}.npz"
        try:
            if len(part):
                with _replacing(target) as file:
                    np.savez(
                        file, rows=part.rows, handles=part.handles, labels=part.labels, site=site
                    )
            else:
                target.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_keep(error) from None


class Galleries:
    """All standing galleries of a server.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def gallery(self, kernel: str) -> Gallery:
        """The gallery under a kernel, as it was left; empty if there is none."""
        return Gallery(self._folder / kernel).open()

    def begin(self, kernel: str, purpose: Mapping[str, str], version: int) -> None:
        """Make room for the gallery of a kernel, and note what it is for.

        Raises:
            ServerError: it cannot be kept.
        """
        about = {"schema": _SCHEMA, "kernel": kernel, "version": version, "for": dict(purpose)}
        try:
            (self._folder / kernel).mkdir(parents=True, exist_ok=True, mode=0o700)
            with _replacing(self._folder / kernel / _ABOUT) as file:
                file.write(json.dumps(about, indent=1).encode())
        except OSError as error:
            raise _cannot_keep(error) from None

    def known(self, purpose: Mapping[str, str]) -> dict[str, int]:
        """Versions by kernel id, of the galleries for these encodings."""
        found = {}
        for path in self._folder.glob(f"*/{_ABOUT}"):
            try:
                about: Any = json.loads(path.read_text(encoding="utf-8"))
                if about["schema"] == _SCHEMA and about["for"] == dict(purpose):
                    found[str(about["kernel"])] = int(about["version"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def drop(self, kernel: str) -> None:
        """Remove a gallery."""
        shutil.rmtree(self._folder / kernel, ignore_errors=True)

    def withdraw(self, site: str, handles: Handles, kernel: str) -> None:
        """Nothing of a withdrawn row stays under another kernel: its site's rows go there."""
        for path in self._folder.glob(f"*/{site.encode().hex()}.npz"):
            if path.parent.name != kernel and len(handles):
                path.unlink(missing_ok=True)


class _replacing:  # noqa: N801  used as a statement
    """Write a file that takes its place only when it is complete, and readable by us alone."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Any:
        number, name = tempfile.mkstemp(dir=self._target.parent, prefix=".partial-")
        self._temporary = Path(name)
        self._file = os.fdopen(number, "wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._file.close()
            if kind is None:
                self._temporary.replace(self._target)
        finally:
            self._temporary.unlink(missing_ok=True)


def _cannot_keep(error: OSError) -> ServerError:
    return ServerError(
        f"the standing gallery cannot be kept ({error.strerror})",
        where="server",
        remedy="free disk space there; what was enrolled before is untouched",
    )
