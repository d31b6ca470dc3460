"""What a site keeps for matching: its kernels, and which image stands behind which handle.

Everything is readable by the site's user alone. A kernel's secret gives away everybody's encodings
to whoever has the gallery: these files deserve the care that photographs get.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedgestalt.errors import ConfigError
from fedgestalt.similarity.kernel import Kernel, decoded, encoded
from fedgestalt.similarity.labels import CASE_BYTES

KERNELS_FOLDER: Final = "kernels"
_RECORD: Final = ".enrolled.json"
_SCHEMA: Final = "fedgestalt.enrolled/2"


@dataclass
class Enrolled:
    """Which image stands behind which handle, under one kernel.

    Attributes:
        images: by handle (hexadecimal), the image's id and a digest of its file.
        planted: by handle, the two images that a planted row lies between.
        cases: by subject, the case handle that other hospitals see.
        former: by handle under which it no longer stands, the image's id: others may have stored
            results that name it.
    """

    images: dict[str, tuple[str, str]] = field(default_factory=dict)
    planted: dict[str, tuple[str, str]] = field(default_factory=dict)
    cases: dict[str, bytes] = field(default_factory=dict)
    former: dict[str, str] = field(default_factory=dict)

    def keep(self, known: Collection[str], wanted: Mapping[str, str]) -> Enrolled:
        """What of it still holds.

        Args:
            known: handles that the gallery has.
            wanted: digest of the file, by image that is to be enrolled.
        """
        images: dict[str, tuple[str, str]] = {}
        seen: set[str] = set()
        for handle, (image, content) in self.images.items():
            if handle in known and wanted.get(image) == content and image not in seen:
                images[handle] = image, content
                seen.add(image)
        planted = {h: p for h, p in self.planted.items() if h in known and seen.issuperset(p)}
        return Enrolled(images, planted, self.cases, self.former)

    def case(self, subject: str) -> bytes:
        """The case handle of a subject."""
        return self.cases.setdefault(subject, secrets.token_bytes(CASE_BYTES))


class KernelStore:
    """The kernels of a site.

    Args:
        store: the site's folder.
    """

    def __init__(self, store: Path) -> None:
        self._folder = store / KERNELS_FOLDER

    def held(self, ensemble: str, strategy: str) -> dict[str, Kernel]:
        """By id, the kernels for an ensemble and a strategy.

        Raises:
            ConfigError: a file is damaged.
        """
        found = {}
        for path in sorted(self._folder.glob("*.kernel")):

            def fault(what: str, path: Path = path) -> ConfigError:
                remedy = "remove it; the next matching job fetches the kernel from another site"
                return ConfigError(what, where=str(path), remedy=remedy)

            kernel = decoded(path.read_bytes(), fault)
            if kernel.id != path.stem:
                raise fault("it holds another kernel than its name says")
            if (kernel.ensemble, kernel.strategy) == (ensemble, strategy):
                found[kernel.id] = kernel
        return found

    def keep(self, kernel: Kernel) -> None:
        """Store a kernel."""
        self._write(f"{kernel.id}.kernel", encoded(kernel))

    def retire_older_than(self, kernel: Kernel) -> list[str]:
        """Forget earlier versions for the same encodings; returns their ids."""
        gone = []
        for other in self.held(kernel.ensemble, kernel.strategy).values():
            if other.version < kernel.version:
                for path in self._folder.glob(f"{other.id}.*"):
                    path.unlink(missing_ok=True)
                gone.append(other.id)
        return gone

    def enrolled(self, kernel: Kernel) -> Enrolled:
        """What was enrolled under a kernel.

        Raises:
            ConfigError: the record is damaged.
        """
        path = self._folder / f"{kernel.id}{_RECORD}"
        return self._read(path) if path.exists() else Enrolled()

    def handles_under_others(self, kernel: Kernel) -> dict[str, str]:
        """Image by handle, of all records but that of a kernel; raises as :meth:`enrolled`."""
        found: dict[str, str] = {}
        for path in self._folder.glob(f"*{_RECORD}"):
            if path.name != f"{kernel.id}{_RECORD}":
                other = self._read(path)
                found |= {**other.former, **{h: image for h, (image, _) in other.images.items()}}
        return found

    def _read(self, path: Path) -> Enrolled:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError
            images = {str(handle): (str(i), str(d)) for handle, (i, d) in content["images"].items()}
            planted = {str(h): (str(a), str(b)) for h, (a, b) in content["planted"].items()}
            cases = {str(s): bytes.fromhex(case) for s, case in content["cases"].items()}
            former = {str(handle): str(image) for handle, image in content["former"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                "the record of enrolled images is damaged",
                where=str(path),
                remedy="remove it; the next matching job enrols this site's images again",
            ) from None
        return Enrolled(images, planted, cases, former)

    def keep_enrolled(self, kernel: Kernel, enrolled: Enrolled) -> None:
        """Store the record."""
        content: Mapping[str, object] = {
            "schema": _SCHEMA,
            "images": enrolled.images,
            "planted": enrolled.planted,
            "cases": {subject: case.hex() for subject, case in enrolled.cases.items()},
            "former": enrolled.former,
        }
        self._write(f"{kernel.id}{_RECORD}", json.dumps(content).encode())

    def _write(self, name: str, content: bytes) -> None:
        write_privately(self._folder / name, content)


def write_json_privately(target: Path, content: Mapping[str, object]) -> None:
    """Replace a JSON file by one that only the site's user reads."""
    write_privately(target, json.dumps(content, indent=1).encode())


def write_privately(target: Path, content: bytes) -> None:
    """Replace a file by one that only the site's user reads."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = target.with_name(f".{target.name}.partial")
    temporary.touch(mode=0o600)
    temporary.chmod(0o600)
    temporary.write_bytes(content)
    temporary.replace(target)
