"""The withdrawals that not every site has signed yet, as the server keeps them.

One file for all standing galleries, replaced as a whole, for sites forget rows by handle, under
whatever kernel. It outlives jobs, kernels and the server's process, and is read again before every
change: jobs over other galleries write to it, too. The rules:

- an owner says in every job what it has taken back and has no whole receipt of;
- what is new in a job makes one list, of all owners' rows: who signs it cannot tell whose they are;
- a list waits for every site that a job over a standing gallery has named until then;
- a site is shown the lists that it has not signed yet, and signs each once;
- an owner is done with a list when all have signed and it has stored the receipt; the list goes
  when all its owners are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedgestalt.errors import ServerError
from fedgestalt.federation.matching.holdings import write_json_privately
from fedgestalt.federation.matching.messages import Handles, Signed, handles_digest
from fedgestalt.similarity.labels import HANDLE_BYTES

WITHDRAWALS_FILE: Final = Path("fedgestalt") / "withdrawals.json"
"""In the server's workspace."""

_SCHEMA: Final = "fedgestalt.withdrawals/1"


@dataclass
class Withdrawal:
    """Rows that were withdrawn in one job.

    Attributes:
        job: in which.
        owners: handles (hexadecimal) by owner, of those who have no whole receipt yet.
        handles: (hexadecimal) of all.
        sites: who is to sign.
        signed: by site, signature and certificate (PEM).
    """

    job: str
    owners: dict[str, set[str]]
    handles: set[str]
    sites: set[str]
    signed: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)

    @property
    def awaited(self) -> set[str]:
        """Who has not signed yet."""
        return self.sites - self.signed.keys()

    @property
    def rows(self) -> Handles:
        """All handles, in order: it does not say whose they are."""
        joined = bytes.fromhex("".join(sorted(self.handles)))
        return np.frombuffer(joined, np.uint8).reshape(-1, HANDLE_BYTES)

    @property
    def name(self) -> str:
        """Digest of the list."""
        return handles_digest(self.rows).hex()


class Withdrawals:
    """Those from all standing galleries of a server.

    Args:
        path: of the file; None keeps them in memory, for one job.
        job: that works with them.
    """

    def __init__(self, path: Path | None, job: str) -> None:
        self._path, self._job, self._complete = path, job, False
        self._sites: set[str] = set()
        self._open: list[Withdrawal] = []

    def open(self) -> Withdrawals:
        """Read what was kept; returns itself.

        Raises:
            ServerError: the file is damaged.
        """
        if self._path is None or not self._path.exists():
            return self
        try:
            content: Any = json.loads(self._path.read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError
            self._sites = set(map(str, content["sites"]))
            self._open = [_read(said) for said in content["open"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ServerError(
                f"the list of open withdrawals is damaged ({self._path.name})",
                where="server",
                remedy="remove it; in the next job owners say again what lacks a signature",
            ) from None
        return self

    def take_part(self, sites: Collection[str]) -> None:
        """Sites may get rows from now on: later withdrawals wait for them, too."""
        self.open()
        if not self._sites.issuperset(sites):
            self._sites.update(sites)
            self._keep()

    def add(self, owner: str, handles: Handles) -> Handles:
        """Take what an owner has taken back; returns what is new of it.

        All that is new in one job, until somebody is to sign it, is one list.
        """
        self.open()
        said = {handle.tobytes().hex() for handle in handles}
        new = said - {row for each in self._open for row in each.owners.get(owner, ())}
        if new:
            growing = [e for e in self._open if e.job == self._job and not e.signed]
            growing = [] if self._complete else growing
            if not growing:
                growing = [Withdrawal(self._job, {}, set(), set(self._sites))]
                self._open += growing
            growing[-1].owners.setdefault(owner, set()).update(new)
            growing[-1].handles |= new
            self._keep()
        return handles[[handle.tobytes().hex() in new for handle in handles]]

    def unsigned(self, site: str) -> dict[str, Handles]:
        """Lists that a site is to sign, by digest; they do not grow any more."""
        self._complete = True
        return {each.name: each.rows for each in self._open if site in each.awaited}

    def sign(self, site: str, signatures: Mapping[str, bytes], certificate: bytes) -> None:
        """Keep a site's checked signatures, by digest of the list."""
        self.open()
        for each in self._open:
            if each.name in signatures:
                each.signed[site] = signatures[each.name], certificate
        if signatures:
            self._keep()

    def receipts(self, owner: str) -> dict[str, Signed]:
        """Who has signed the lists with an owner's rows, by digest."""
        return {
            each.name: Signed(
                each.rows,
                {site: signature for site, (signature, _) in each.signed.items()},
                {site: certificate for site, (_, certificate) in each.signed.items()},
                tuple(sorted(each.awaited)),
            )
            for each in self._open
            if owner in each.owners
        }

    def close(self, owner: str) -> None:
        """An owner has stored its receipts: of what all have signed, they are whole."""
        self.open()
        done = [each for each in self._open if not each.awaited and owner in each.owners]
        for each in done:
            del each.owners[owner]
        if done:
            self._open = [each for each in self._open if each.owners]
            self._keep()

    @property
    def awaited(self) -> list[str]:
        """Sites that have not signed something yet, in order."""
        return sorted({site for each in self._open for site in each.awaited})

    def _keep(self) -> None:
        if self._path is None:
            return
        content = {
            "schema": _SCHEMA,
            "sites": sorted(self._sites),
            "open": [_written(each) for each in self._open],
        }
        try:
            write_json_privately(self._path, content)
        except OSError as error:
            raise ServerError(
                f"the list of open withdrawals cannot be kept ({error.strerror})",
                where="server",
                remedy="free disk space there; the next job goes on from what was kept",
            ) from None


def _written(each: Withdrawal) -> dict[str, object]:
    return {
        "job": each.job,
        "owners": {owner: sorted(rows) for owner, rows in sorted(each.owners.items())},
        "handles": sorted(each.handles),
        "sites": sorted(each.sites),
        "signed": {
            site: {"signature": signature.hex(), "certificate": certificate.decode()}
            for site, (signature, certificate) in sorted(each.signed.items())
        },
    }


def _read(said: Any) -> Withdrawal:
    each = Withdrawal(
        str(said["job"]),
        {str(owner): set(map(str, rows)) for owner, rows in said["owners"].items()},
        set(map(str, said["handles"])),
        set(map(str, said["sites"])),
        {
            str(site): (bytes.fromhex(one["signature"]), one["certificate"].encode())
            for site, one in said["signed"].items()
        },
    )
    if len(each.rows) != len(each.handles):
        raise ValueError
    return each
