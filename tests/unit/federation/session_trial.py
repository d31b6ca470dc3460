"""Sites that answer a server's messages of secure aggregation, until they are lost or lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import numpy as np

from fedgestalt.errors import PeerError
from fedgestalt.federation.job.identity import Trust, ephemeral_identity
from fedgestalt.federation.tasks import KEYS, SHARES, SURVIVORS, UNMASK, VECTOR
from fedgestalt.federation.training.messages import SendVector, SessionStart, Uploaded
from fedgestalt.federation.training.secure_round import Member
from fedgestalt.messages import Message, from_server
from fedgestalt.secagg import (
    AES,
    Endorsements,
    KeyList,
    NumberPlan,
    SessionFacts,
    SitePolicy,
    SiteSession,
    Survivors,
    TensorPlan,
    ThreatModel,
    Words,
)

SITES: Final = ("berlin", "bonn", "kiel", "leuven", "ulm")
TASKS: Final = (KEYS, SHARES, VECTOR, SURVIVORS, UNMASK)
IDENTITIES: Final = {site: ephemeral_identity(site) for site in SITES}
PEERS: Final = {
    site: Trust.of_anybody().check(site, own.certificate, None) for site, own in IDENTITIES.items()
}
MEMBERS: Final = {
    site: Member(own.certificate, PEERS[site], AES) for site, own in IDENTITIES.items()
}
ASKED: Final[Mapping[str, type[Message]]] = {
    KEYS: SessionStart,
    SHARES: KeyList,
    VECTOR: SendVector,
    SURVIVORS: Survivors,
    UNMASK: Endorsements,
}
LENIENT: Final = SitePolicy(minimum_survivors=2, threat_model=ThreatModel.HONEST_BUT_CURIOUS)

Lie = Callable[[dict[str, Any]], object]
"""Makes of a site's answer what it sends instead."""


def facts_of(
    roster: tuple[str, ...], attempt: int, threat: ThreatModel = ThreatModel.MALICIOUS
) -> SessionFacts:
    """A session about a vector of ten values."""
    return SessionFacts(
        job="job",
        round=1,
        attempt=attempt,
        model_digest=bytes(32),
        plan=NumberPlan(len(roster), 100, (TensorPlan("a/neck/weight", (2, 5), 0),)),
        roster={site: PEERS[site].fingerprint for site in roster},
        threshold=threat.threshold(len(roster)),
    )


def update_of(site: str) -> dict[str, np.ndarray[Any, Any]]:
    """A site's update; its weight is in :func:`weight_of`."""
    values = np.linspace(-0.5, 0.5, 10, dtype=np.float32).reshape(2, 5)
    return {"a/neck/weight": values * np.float32(1 + SITES.index(site)) / 5}


def weight_of(site: str) -> int:
    """How many images it has."""
    return 10 * (1 + SITES.index(site))


class Site:
    """One site's side of one session after another."""

    def __init__(self, site: str, desk: Desk) -> None:
        self.site, self.desk = site, desk
        self.starts: list[SessionStart] = []

    def answer(self, task: str, message: Any) -> Message:
        match task:
            case "fgm_keys":
                return self._begin(message)
            case "fgm_shares":
                return self.session.share(message)
            case "fgm_vector":
                self.session.receive(message.delivery)
                words = self.facts.plan.encode(update_of(self.site), weight_of(self.site))
                self.session.mask(words)
                self.desk.put(self.site, message.ticket, words)
                return Uploaded(self.facts.digest)
            case "fgm_survivors":
                return self.session.endorse(message)
            case _:
                return self.session.unmask(message)

    def _begin(self, start: SessionStart) -> Message:
        self.starts.append(start)
        trust, sites = Trust.of_anybody(), tuple(sorted(start.certificates))
        peers = {site: trust.check(site, start.certificates[site], None) for site in sites}
        threat = next(t for t in ThreatModel if t.threshold(len(sites)) == start.threshold)
        self.facts = facts_of(sites, start.attempt, threat)
        others = {site: peer for site, peer in peers.items() if site != self.site}
        self.session = SiteSession(
            self.site, self.facts, IDENTITIES[self.site], others, policy=LENIENT
        )
        return self.session.offer_keys()


class Desk:
    """Where the masked vectors arrive: as :class:`~.transfer.UploadDesk`, without the way there."""

    def __init__(self) -> None:
        self.tickets: dict[str, str] = {}
        self.expected: list[tuple[str, int, tuple[str, ...]]] = []
        self.arrived: dict[str, Words] = {}
        self.closed = 0

    def expect(self, name: str, size: int, sites: Collection[str]) -> dict[str, str]:
        self.expected.append((name, size, tuple(sites)))
        self.arrived.clear()
        self.tickets = {site: f"{len(self.expected)}{i}".zfill(32) for i, site in enumerate(sites)}
        return self.tickets

    def put(self, site: str, ticket: str, words: Words) -> None:
        assert ticket == self.tickets[site]
        self.arrived[site] = words

    def vector(self, site: str) -> Callable[[int, int], Words]:
        if site not in self.arrived:
            raise PeerError("its upload has 0 of 1 chunks", site=site)
        words = self.arrived[site]
        return lambda first, end: words[first:end]

    def close(self) -> None:
        self.arrived.clear()
        self.closed += 1


class Hospitals:
    """All sites, and the way there and back.

    Attributes:
        lost: sites that are lost from a task of an attempt on, by (task, attempt).
        lies: what becomes of an answer, by (site, task).
        asked: all (task, site) in their order.
    """

    def __init__(self) -> None:
        self.desk = Desk()
        self.sites = {site: Site(site, self.desk) for site in SITES}
        self.lost: dict[tuple[str, int], set[str]] = {}
        self.lies: dict[tuple[str, str], Lie] = {}
        self.asked: list[tuple[str, str]] = []
        self._gone: set[str] = set()
        self._attempt = 0

    def gather(
        self,
        task: str,
        messages: Message | Mapping[str, Message],
        on_reply: Callable[[str, object], None],
        sites: Collection[str],
        enough: Callable[[], bool],
    ) -> set[str]:
        """As the workflow's; sites answer one after another."""
        self._attempt += task == KEYS
        self._gone |= self.lost.get((task, self._attempt), set())
        for site in sorted(set(sites) - self._gone):
            message = messages if isinstance(messages, Message) else messages[site]
            read = ASKED[task].from_fields(message.to_fields(), from_server)
            self.asked.append((task, site))
            answer: object = self.sites[site].answer(task, read).to_fields()
            if lie := self.lies.get((site, task)):
                answer = lie(answer)  # type: ignore[arg-type]
            on_reply(site, answer)
            if enough():
                break
        return self._gone & set(sites)

    def come_back(self) -> None:
        """All sites are there again."""
        self._gone.clear()


def sum_of(facts: SessionFacts, sites: Collection[str]) -> Words:
    """What the sum over these sites must be."""
    words = [facts.plan.encode(update_of(site), weight_of(site)) for site in sites]
    return np.add.reduce(words, dtype=np.uint32)
