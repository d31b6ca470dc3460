"""One round at the server, from trained updates to the opened sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from fedgestalt.errors import FedgestaltError, PeerError, RoundFailedError, ServerError
from fedgestalt.federation.job.identity import PublicIdentity
from fedgestalt.federation.job.memory import give_back
from fedgestalt.federation.job.transfer import UploadDesk
from fedgestalt.federation.tasks import ANSWERS, KEYS, SHARES, SURVIVORS, UNMASK, VECTOR
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.messages import SendVector, SessionStart, Uploaded
from fedgestalt.messages import Message, from_site
from fedgestalt.secagg import SessionFacts, Words

OnReply = Callable[[str, object], None]
Messages = Message | Mapping[str, Message]
Gather = Callable[[str, Messages, OnReply, Collection[str], Callable[[], bool]], Collection[str]]
"""Asks sites (task, messages, on reply, sites, enough) and returns those that were lost."""
FactsOf = Callable[[tuple[str, ...], int], SessionFacts]
"""The facts of a session, from its roster and its attempt."""


@dataclass(frozen=True)
class Member:
    """A site that has joined.

    Attributes:
        certificate: PEM.
        identity: what it says.
        cipher: which mask stream the site makes fastest.
    """

    certificate: bytes
    identity: PublicIdentity
    cipher: str


@dataclass(frozen=True)
class Opened:
    """The sum of a session.

    Attributes:
        facts: of the session.
        agreement: digest of its keys and share headers.
        survivors: whose updates it holds.
    """

    facts: SessionFacts
    agreement: bytes
    survivors: tuple[str, ...]
    _words: list[Words] = field(repr=False)

    def take_words(self) -> Words:
        """The sum, (plan.words,) uint32; only once, so that its memory goes with its user."""
        return self._words.pop()


class SecureRounds:
    """Runs the sessions of a job.

    A site that is lost before any vector was sent costs a new session with fresh keys among the
    others. One that is lost later is left out of the sum, as long as a threshold remains.

    Args:
        aggregator: holds the session.
        gather: see :data:`Gather`.
        uploads: where the masked vectors arrive.
        members: all sites that have joined; may grow.
        minimum_sites: fewest sites with which a session is begun.
        threads: for the sum.
        warn: takes a sentence for the administrator.
    """

    def __init__(
        self,
        aggregator: ZeroSumMaskAggregator,
        gather: Gather,
        uploads: UploadDesk,
        members: Mapping[str, Member],
        minimum_sites: int,
        threads: int,
        warn: Callable[[str], None],
    ) -> None:
        self._aggregator, self._gather, self._uploads = aggregator, gather, uploads
        self._members, self._minimum = members, minimum_sites
        self._threads, self._warn = threads, warn
        self._attempt = 0

    def open_sum(self, sites: Collection[str], facts_of: FactsOf) -> Opened:
        """Sum the updates of ``sites``, all of which have trained.

        Raises:
            RoundFailedError: too few sites are left; the sum stays closed.
            FedgestaltError: a site sent something wrong, or refused.
        """
        facts = self._agree(set(sites), facts_of)
        session = self._aggregator.session
        size = facts.plan.words
        tickets = self._uploads.expect(facts.digest.hex(), size, facts.sites)

        def add(site: str, fields: object) -> None:
            if Uploaded.from_fields(fields, from_site(site)).session != facts.digest:
                raise PeerError("its upload is of another session", site=site)
            session.accept_vector(site, self._uploads.vector(site), size)

        try:
            boxes = {s: SendVector(tickets[s], session.delivery(s)) for s in facts.sites}
            self._ask(VECTOR, boxes, add, facts.sites)
            survivors = session.close()
            lost = self._ask(SURVIVORS, survivors, self._taking(SURVIVORS), survivors.sites)
            endorsements = session.endorsements()
            helpers = set(survivors.sites) - set(lost)
            given: set[str] = set()
            take_shares = self._taking(UNMASK)

            def take(site: str, fields: object) -> None:
                try:
                    take_shares(site, fields)
                except FedgestaltError as error:  # any threshold of right answers will do
                    self._warn(str(error))
                else:
                    given.add(site)

            self._ask(UNMASK, endorsements, take, helpers, lambda: len(given) >= facts.threshold)
            give_back()  # what the uploads went through
            words = session.total(threads=self._threads)
        except ServerError as error:
            raise RoundFailedError(error.what, where=error.where, remedy=error.remedy) from None
        finally:
            self._uploads.close()
        return Opened(facts, session.agreement, survivors.sites, [words])

    def _agree(self, sites: set[str], facts_of: FactsOf) -> SessionFacts:
        """Keys and shares, again with those who are left until nobody is lost meanwhile."""
        while True:
            if len(sites) < self._minimum:
                raise RoundFailedError(
                    f"{len(sites)} sites are left, the job asks for {self._minimum}",
                    where="session",
                    remedy="bring the lost sites back",
                )
            self._attempt += 1
            facts = facts_of(tuple(sorted(sites)), self._attempt)
            peers = {site: self._members[site].identity for site in sites}
            session = self._aggregator.begin(facts, peers)
            certificates = {site: self._members[site].certificate for site in sites}
            start = SessionStart(
                facts.round, facts.attempt, facts.threshold, facts.cipher, certificates
            )
            lost = self._ask(KEYS, start, self._taking(KEYS), sites)
            if not lost:
                lost = self._ask(SHARES, session.key_list(), self._taking(SHARES), sites)
            if not lost:
                return facts
            sites -= set(lost)

    def _taking(self, task: str) -> OnReply:
        """Give the session the answers to a task, and no other of its messages."""

        def take(site: str, fields: object) -> None:
            ANSWERS[task].from_fields(fields, from_site(site))
            self._aggregator.take(site, fields)

        return take

    def _ask(
        self,
        task: str,
        messages: Messages,
        on_reply: OnReply,
        sites: Collection[str],
        enough: Callable[[], bool] = lambda: False,
    ) -> Collection[str]:
        return self._gather(task, messages, on_reply, sites, enough)
