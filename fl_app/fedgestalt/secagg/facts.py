"""What all parties of a session must agree on, and how many sites it takes to open a sum."""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedgestalt.errors import ServerError, SiteError, nearest
from fedgestalt.keys import digest
from fedgestalt.messages import MAXIMUM_SITES
from fedgestalt.secagg.plan import NumberPlan
from fedgestalt.secagg.stream import AES, CHACHA20

MINIMUM_SITES: Final = 3
"""With two sites each could subtract its own update from the sum and see the other's."""

CIPHERS: Final = (AES, CHACHA20)


class ThreatModel(enum.StrEnum):
    """What the server may do without learning more than the sum."""

    MALICIOUS = "malicious"
    """Anything, with fewer than ``2 * threshold - sites`` sites on its side.

    With as many, two sets of survivors can each get a threshold of signatures: colluders sign both.
    """

    HONEST_BUT_CURIOUS = "honest-but-curious"
    """Look at everything it gets, with up to ``threshold - 1`` sites on its side, while all of them
    follow the protocol. More sites may be lost.
    """

    def threshold(self, sites: int) -> int:
        """How many sites must agree before a sum of ``sites`` is opened."""
        return (2 * sites // 3 if self is ThreatModel.MALICIOUS else sites // 2) + 1


class Recipient(enum.StrEnum):
    """Who learns the aggregate."""

    SERVER = "server"
    """The server and all sites."""

    SITES = "sites"
    """All sites, but not the server: one more mask stays on the sum, known to the sites alone."""


@dataclass(frozen=True)
class SessionFacts:
    """What all parties of a session agree on.

    Attributes:
        job: the job's id.
        round: counted from 1.
        attempt: session of the round, from 1; a round begins anew if a site is lost early.
        model_digest: of the global model that the updates are deltas to, 32 bytes.
        plan: the number plan.
        roster: site names with the fingerprints of their certificates (SHA-256, 32 bytes each).
        threshold: sites that must agree before the sum is opened.
        recipient: who learns the sum.
        cipher: of the mask stream.
    """

    job: str
    round: int
    attempt: int
    model_digest: bytes
    plan: NumberPlan
    roster: Mapping[str, bytes]
    threshold: int
    recipient: Recipient = Recipient.SERVER
    cipher: str = AES

    @functools.cached_property
    def sites(self) -> tuple[str, ...]:
        """The sites in the order in which they are numbered."""
        return tuple(sorted(self.roster))

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 over the facts, 32 bytes; every party computes it for itself."""
        return session_digest(
            job=self.job,
            round=self.round,
            attempt=self.attempt,
            model_digest=self.model_digest,
            plan_digest=self.plan.digest,
            roster=self.roster,
            threshold=self.threshold,
            recipient=self.recipient,
            cipher=self.cipher,
        )

    def check(self) -> None:
        """Raise ServerError or PlanError if no honest server could have proposed this."""
        count = len(self.roster)
        if count != self.plan.sites:
            raise ServerError(
                f"the number plan is for {self.plan.sites} sites, the roster has {count}",
                where="session",
            )
        if count > MAXIMUM_SITES:
            raise ServerError(f"{count} sites, at most {MAXIMUM_SITES} can mask", where="session")
        if len(set(self.roster.values())) != count:
            raise ServerError("two sites of the roster have one certificate", where="session")
        least = ThreatModel.HONEST_BUT_CURIOUS.threshold(count)
        if not least <= self.threshold <= count:
            raise ServerError(
                f"a threshold of {self.threshold} for {count} sites, not {least}..{count}",
                where="session",
            )
        if self.cipher not in CIPHERS:
            raise ServerError(
                f"unknown cipher {self.cipher!r}",
                where="session",
                remedy=nearest(self.cipher, CIPHERS),
            )
        self.plan.check()


def session_digest(
    *,
    job: str,
    round: int,  # noqa: A002  the field's word
    attempt: int,
    model_digest: bytes,
    plan_digest: bytes,
    roster: Mapping[str, bytes],
    threshold: int,
    recipient: str,
    cipher: str,
) -> bytes:
    """SHA-256 over the facts of a session; see :class:`SessionFacts`."""
    return digest(
        "session",
        job.encode(),
        *(number.to_bytes(8, "big") for number in (round, attempt, threshold, len(roster))),
        model_digest,
        plan_digest,
        recipient.encode(),
        cipher.encode(),
        *(part for site in sorted(roster) for part in (site.encode(), roster[site])),
    )


@dataclass(frozen=True)
class SitePolicy:
    """What one site asks for before it masks anything; no job can lower it.

    Attributes:
        minimum_sites: fewest sites in a session.
        minimum_survivors: fewest sites in a sum that is opened.
        threat_model: sets the lowest threshold.
    """

    minimum_sites: int = MINIMUM_SITES
    minimum_survivors: int = MINIMUM_SITES
    threat_model: ThreatModel = ThreatModel.MALICIOUS

    def check(self, site: str, facts: SessionFacts) -> None:
        """Raise SiteError if the session is less than this site asks for."""
        count, least = len(facts.roster), self.threat_model.threshold(len(facts.roster))
        if count < (needed := max(self.minimum_sites, self.minimum_survivors)):
            raise SiteError(
                f"{count} sites take part, this site's policy asks for {needed}",
                where=site,
                remedy="wait for more sites: with fewer, single updates could be told from the sum",
            )
        if facts.threshold < least:
            raise SiteError(
                f"{facts.threshold} of {count} sites could open the sum, this site's policy"
                f" ({self.threat_model}) asks for {least}",
                where=site,
                remedy="raise the job's threat_model, or ask the site to change its own",
            )
