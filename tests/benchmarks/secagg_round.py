"""One session of secure aggregation, every step of it timed; shared by the benchmarks."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from fedgestalt.secagg import (
    NumberPlan,
    Recipient,
    ServerSession,
    SessionFacts,
    SiteSession,
    TensorPlan,
    ThreatModel,
    Vector,
    Words,
)

WEIGHT: Final = 100
"""Of every site; the largest that the plans allow."""

Rounds = Sequence[Mapping[str, Sequence[float]]]


class Stopwatch:
    """Seconds by step, of one round.

    Args:
        clock: this process's CPU time, which other work on the machine disturbs least; elapsed time
            where threads share the work.
    """

    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self._clock = clock

    def __call__(self, step: str, work: Callable[..., Any], *args: Any) -> Any:
        started = self._clock()
        result = work(*args)
        self.steps[step].append(self._clock() - started)
        return result


def typical(rounds: Rounds, step: str) -> float:
    """Median of all times that a step was done."""
    return statistics.median(seconds for steps in rounds for seconds in steps[step])


def altogether(rounds: Rounds, step: str) -> float:
    """Sum over the times that a step is done in a round, of medians over the rounds."""
    return float(np.median([steps[step] for steps in rounds], axis=0).sum())


class Certificate:
    """A site's key, of the kind that FLARE's provisioning makes."""

    padding = padding.PSS(padding.MGF1(hashes.SHA256()), hashes.SHA256().digest_size)

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)
        self._public = self._key.public_key()

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement, self.padding, hashes.SHA256())

    def verify(self, statement: bytes, signature: bytes) -> None:
        self._public.verify(signature, statement, self.padding, hashes.SHA256())


def plan_for(sites: int, words: int) -> NumberPlan:
    """One tensor; with its clip count and the weight it has ``words`` words."""
    return NumberPlan(sites, WEIGHT, (TensorPlan("w", (words - 2,), 0),))


class Round:
    """A session whose messages up to the masks are through; every step is timed."""

    def __init__(
        self,
        certificates: Sequence[Certificate],
        words: int,
        recipient: Recipient = Recipient.SERVER,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.watch = watch = Stopwatch(clock)
        peers = {f"site-{i:02d}": one for i, one in enumerate(certificates)}
        facts = SessionFacts(
            "benchmark",
            1,
            1,
            bytes(32),
            plan_for(len(peers), words),
            {site: site.encode().ljust(32) for site in peers},
            ThreatModel.MALICIOUS.threshold(len(peers)),
            recipient,
        )
        self.server = server = watch("server", ServerSession, facts, peers)
        self.sites = {
            site: watch("messages", self._session, site, facts, peers) for site in facts.sites
        }
        for site, session in self.sites.items():
            watch("server", server.accept_keys, site, watch("messages", session.offer_keys))
        keys = watch("server", server.key_list)
        for site, session in self.sites.items():
            watch("server", server.accept_shares, site, watch("messages", session.share, keys))
        for site, session in self.sites.items():
            watch("messages", session.receive, watch("server", server.delivery, site))

    @staticmethod
    def _session(site: str, facts: SessionFacts, peers: Mapping[str, Certificate]) -> SiteSession:
        others = {name: peer for name, peer in peers.items() if name != site}
        return SiteSession(site, facts, peers[site], others)

    def finish(self, threads: int = 1) -> Words:
        """Survivors, endorsements, unmask shares, and the sum."""
        watch, server = self.watch, self.server
        survivors = watch("server", server.close)
        for site in survivors.sites:
            endorsement = watch("messages", self.sites[site].endorse, survivors)
            watch("server", server.accept_endorsement, site, endorsement)
        endorsements = watch("server", server.endorsements)
        for site in survivors.sites:
            shares = watch("messages", self.sites[site].unmask, endorsements)
            watch("server", server.accept_unmask, site, shares)
        return watch("total", functools.partial(server.total, threads=threads))


def words_of(words: Words) -> Vector:
    """A vector as the server reads it, without a file."""
    return lambda first, end: words[first:end]


def messages_only(
    certificates: Sequence[Certificate],
    recipient: Recipient = Recipient.SERVER,
    clock: Callable[[], float] = time.process_time,
) -> Mapping[str, Sequence[float]]:
    """The steps of a round with a vector of three words: what does not grow with the vector."""
    session = Round(certificates, 3, recipient, clock)
    for site, one in session.sites.items():
        words = np.ones(3, np.uint32)
        one.mask(words)
        session.server.accept_vector(site, words_of(words), 3)
    session.finish()
    return session.watch.steps
