"""Galleries: masked rows or shares, opaque handles and sealed labels, by kernel.

The server keeps one, and so does each computing site of a strategy with several parties. A standing
gallery is a folder with one file for each owner of rows, replaced as a whole, so that a party that
dies and starts again has the rows of every owner as they were before or after the last enrolment.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import FedgestaltError, PeerError, ServerError, SiteError
from fedgestalt.federation.matching.messages import UPLOAD_BYTES, Handles
from fedgestalt.similarity.labels import HANDLE_BYTES, SEALED_BYTES

GALLERIES_FOLDER: Final = Path("fedgestalt") / "galleries"
"""In the server's workspace."""

SITE_GALLERIES_FOLDER: Final = "galleries"
"""In a computing site's folder."""

SERVER: Final = "server"
_ABOUT: Final = "gallery.json"
_SCHEMA: Final = "fedgestalt.gallery/1"


@dataclass(frozen=True)
class Rows:
    """Rows of one or of all sites.

    Attributes:
        rows: (n, k) masked encodings, or one party's shares of encodings.
        handles, labels: (n, bytes).
        keys: (n, bytes), of shares: the name of the upload with which a row came, and this party's
            secret keys for that upload. Of masked rows, and of a computing site's labels, no bytes.
    """

    rows: NDArray[Any]
    handles: Handles
    labels: NDArray[np.uint8]
    keys: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def uploads(self) -> NDArray[np.uint8]:
        """Names of the uploads with which the rows came, (n, ``UPLOAD_BYTES``)."""
        return self.keys[:, :UPLOAD_BYTES]

    def chosen(self, numbers: NDArray[np.int64] | slice) -> Rows:
        """The rows with these numbers."""
        return Rows(*(part[numbers] for part in self._columns))

    @property
    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.rows, self.handles, self.labels, self.keys

    def at(self, handles: Handles) -> NDArray[np.int64]:
        """Numbers of the rows with these handles; -1 where there is none."""
        numbers = {handle.tobytes(): number for number, handle in enumerate(self.handles)}
        return np.array([numbers.get(handle.tobytes(), -1) for handle in handles], np.int64)


def masked_rows(rows: NDArray[np.float32], handles: Handles, labels: NDArray[np.uint8]) -> Rows:
    """Rows that the server alone compares."""
    return Rows(rows, handles, labels, np.empty((len(rows), 0), np.uint8))


def no_rows() -> Rows:
    """Of a site that has sent none yet."""
    return masked_rows(
        np.empty((0, 0), np.float32),
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
        np.concatenate([part.keys for part in some]),
    )


class Gallery:
    """The rows of all sites under one kernel.

    Args:
        folder: where it is kept; None keeps it in memory, for one job.
        holder: the server or the computing site that keeps it.
    """

    def __init__(self, folder: Path | None = None, holder: str = SERVER) -> None:
        self._folder, self._holder = folder, holder
        self._parts: dict[str, Rows] = {}

    def open(self) -> Gallery:
        """Read what was kept; returns itself.

        Raises:
            ServerError, SiteError: a file is damaged.
        """
        for path in sorted(self._folder.glob("*.npz")) if self._folder else ():
            try:
                with np.load(path, allow_pickle=False) as kept:
                    rows = Rows(kept["rows"], kept["handles"], kept["labels"], kept["keys"])
                    site = str(kept["site"])
            except (OSError, KeyError, ValueError, BadZipFile):
                raise _fault(
                    self._holder,
                    f"a file of the standing gallery is damaged ({path.name})",
                    "remove it; the next matching job enrols that site's images again",
                ) from None
            self._parts[site] = rows
        return self

    def part(self, site: str) -> Rows:
        """A site's rows."""
        return self._parts.get(site, no_rows())

    @property
    def sites(self) -> list[str]:
        """Whose rows there are, in order."""
        return sorted(site for site, part in self._parts.items() if len(part))

    @property
    def rows(self) -> Rows:
        """Everybody's."""
        return joined(self._parts)

    def enrol(self, site: str, removed: Handles, added: Rows) -> None:
        """Take a site's new rows and drop those that it removes.

        Raises:
            PeerError: what it removes is not its own, what it adds is there already, or has other
                dimensions than everybody's.
            ServerError, SiteError: it cannot be kept.
        """
        own = self.part(site)
        gone = own.at(removed)
        if (gone < 0).any():
            raise PeerError("it removes rows that it does not have in the gallery", site=site)
        left = own.chosen(np.setdiff1d(np.arange(len(own)), gone)) if len(gone) else own
        others = [part for part in {**self._parts, site: left}.values() if len(part)]
        known = {handle.tobytes() for part in others for handle in part.handles}
        sent = {handle.tobytes() for handle in added.handles}
        if len(sent) != len(added) or sent & known:
            raise PeerError("it sent a row twice", site=site)
        dimensions = {part.rows.shape[1] for part in others}
        if len(added) and dimensions - {added.rows.shape[1]}:
            raise PeerError(
                f"its rows have {added.rows.shape[1]} dimensions, the gallery {max(dimensions)}",
                site=site,
            )
        if len(gone) or len(added):
            part = joined({"1": left, "2": added})
            self._keep(site, part)
            self._parts[site] = part

    def forget(self, handles: Handles) -> None:
        """Drop the rows with these handles, whosever they are."""
        for site, part in list(self._parts.items()):
            kept = part.at(absent(part.handles, handles))
            if len(kept) < len(part):
                self._parts[site] = part.chosen(kept)
                self._keep(site, self._parts[site])

    def _keep(self, site: str, part: Rows) -> None:
        if self._folder is None:
            return
        target = self._folder / f"{site.encode().hex()}.npz"
        try:
            if len(part):
                with _replacing(target) as file:
                    np.savez(
                        file,
                        rows=part.rows,
                        handles=part.handles,
                        labels=part.labels,
                        keys=part.keys,
                        site=site,
                    )
            else:
                target.unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_keep(self._holder, error) from None


class Galleries:
    """All standing galleries of a server or a computing site.

    Args:
        folder: where they are.
        holder: whose they are.
    """

    def __init__(self, folder: Path, holder: str = SERVER) -> None:
        self._folder, self._holder = folder, holder

    def gallery(self, kernel: str) -> Gallery:
        """The gallery under a kernel, as it was left; empty if there is none."""
        return Gallery(self._folder / kernel, self._holder).open()

    def begin(
        self,
        kernel: str,
        purpose: Mapping[str, str],
        version: int,
        computing: Sequence[str] = (),
    ) -> None:
        """Make room for the gallery of a kernel; note what it is for, and who computes beside us.

        Raises:
            ServerError, SiteError: it cannot be kept.
        """
        about = {"schema": _SCHEMA, "kernel": kernel, "version": version, "for": dict(purpose)}
        about["computing"] = list(computing)
        try:
            (self._folder / kernel).mkdir(parents=True, exist_ok=True, mode=0o700)
            with _replacing(self._folder / kernel / _ABOUT) as file:
                file.write(json.dumps(about, indent=1).encode())
        except OSError as error:
            raise _cannot_keep(self._holder, error) from None

    def computing(self, kernel: str) -> tuple[str, ...]:
        """The computing sites that hold shares of the gallery of a kernel."""
        path = self._folder / kernel / _ABOUT
        try:
            about: Any = json.loads(path.read_text(encoding="utf-8"))
            return tuple(str(site) for site in about["computing"])
        except (OSError, ValueError, KeyError, TypeError):
            return ()

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

    def keep_only(self, kernel: str, purpose: Mapping[str, str]) -> None:
        """Remove all other galleries for these encodings."""
        for other in self.known(purpose):
            if other != kernel:
                shutil.rmtree(self._folder / other, ignore_errors=True)

    def forget(self, handles: Handles) -> None:
        """Drop the rows with these handles from every gallery."""
        for folder in (
            {path.parent for path in self._folder.glob("*/*.npz")} if len(handles) else ()
        ):
            self.gallery(folder.name).forget(handles)

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


def absent(some: Handles, others: Handles) -> Handles:
    """Those of some handles that are not among others, in their order."""
    gone = {handle.tobytes() for handle in others}
    return some[[number for number, handle in enumerate(some) if handle.tobytes() not in gone]]


def _cannot_keep(holder: str, error: OSError) -> FedgestaltError:
    return _fault(
        holder,
        f"the standing gallery cannot be kept ({error.strerror})",
        "free disk space there; what was enrolled before is untouched",
    )


def _fault(holder: str, what: str, remedy: str) -> FedgestaltError:
    kind = ServerError if holder == SERVER else SiteError
    return kind(what, where=holder, remedy=remedy)
