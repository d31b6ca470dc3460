"""What a site has taken back, and who has signed that it keeps nothing of it.

A receipt is begun when the rows are taken back, before anybody is told, and extended by every job
until all have signed: what a job that fails, or a site that is not there, leaves undone is on disk.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.errors import ConfigError
from fedgestalt.federation.matching.holdings import write_json_privately
from fedgestalt.similarity.labels import HANDLE_BYTES

RECEIPTS_FOLDER: Final = "withdrawals"
_SCHEMA: Final = "fedgestalt.withdrawal/2"


@dataclass(frozen=True)
class Receipt:
    """Of what a site took back in one job.

    Attributes:
        name: of its file.
        job: in which.
        day: when (UTC).
        images: ids of the site's own that were withdrawn.
        rows: handles (hexadecimal) of the same, and of planted rows that went with them.
        handles: (hexadecimal) that sites sign together: these rows and those of other owners.
        sites: who has signed; by site, signature and certificate (PEM), checked.
        not_signed: who has not signed yet.
    """

    name: str
    job: str
    day: str
    images: tuple[str, ...]
    rows: tuple[str, ...]
    handles: tuple[str, ...]
    sites: Mapping[str, tuple[bytes, bytes]]
    not_signed: tuple[str, ...]

    def extended(
        self,
        handles: Collection[str],
        signed: Mapping[str, tuple[bytes, bytes]],
        awaited: Collection[str],
    ) -> Receipt:
        """With the signatures of ``signed`` over ``handles``, and who has not, by the server."""
        listed = tuple(sorted(handles))
        sites = {**(self.sites if listed == self.handles else {}), **signed}
        missing = {*self.not_signed, *awaited, *self.sites} - sites.keys()
        return dataclasses.replace(
            self, handles=listed, sites=sites, not_signed=tuple(sorted(missing))
        )


class Receipts:
    """All receipts of a site.

    Args:
        store: the site's folder.
    """

    def __init__(self, store: Path) -> None:
        self._folder = store / RECEIPTS_FOLDER

    def begin(self, job: str, images: Mapping[str, str], roster: Collection[str]) -> None:
        """Begin a receipt, before anybody is told what is withdrawn.

        Args:
            job: in which it is.
            images: by handle; empty for a row that stood for none.
            roster: who should sign.
        """
        names = itertools.chain([job], (f"{job}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if not self._path(name).exists())
        day = dt.datetime.now(dt.UTC).date().isoformat()
        rows, ids = tuple(sorted(images)), tuple(sorted({*images.values()} - {""}))
        self.keep(Receipt(name, job, day, ids, rows, rows, {}, tuple(sorted(roster))))

    def keep(self, receipt: Receipt) -> None:
        """Store a receipt, in the place of its earlier state."""
        content = {
            "schema": _SCHEMA,
            "notice": RESEARCH_USE_ONLY,
            "job": receipt.job,
            "day": receipt.day,
            "images": list(receipt.images),
            "rows": list(receipt.rows),
            "handles": list(receipt.handles),
            "sites": {
                site: {"signature": signature.hex(), "certificate": certificate.decode()}
                for site, (signature, certificate) in sorted(receipt.sites.items())
            },
            "not_signed": list(receipt.not_signed),
        }
        write_json_privately(self._path(receipt.name), content)

    def all(self) -> list[Receipt]:
        """Every receipt, by name of the job.

        Raises:
            ConfigError: one is damaged.
        """
        return [_read(path) for path in sorted(self._folder.glob("*.json"))]

    def open(self) -> list[Receipt]:
        """Those that somebody has not signed yet; raises as :meth:`all`."""
        return [receipt for receipt in self.all() if receipt.not_signed]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def _read(path: Path) -> Receipt:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != _SCHEMA:
            raise ValueError
        receipt = Receipt(
            path.stem,
            str(content["job"]),
            str(content["day"]),
            tuple(map(str, content["images"])),
            tuple(map(str, content["rows"])),
            tuple(map(str, content["handles"])),
            {
                str(site): (bytes.fromhex(said["signature"]), said["certificate"].encode())
                for site, said in content["sites"].items()
            },
            tuple(map(str, content["not_signed"])),
        )
        if not receipt.rows or not {*receipt.rows} <= {*receipt.handles}:
            raise ValueError
        if any(len(bytes.fromhex(handle)) != HANDLE_BYTES for handle in receipt.handles):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            "the receipt of a withdrawal is damaged",
            where=str(path),
            remedy="bring it back from a backup; if there is none, remove it, and know that who had"
            " not signed may keep the rows",
        ) from None
    return receipt
