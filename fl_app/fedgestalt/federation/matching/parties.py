"""The server's side of matching on shares: one of several parties, of which none sees a score."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import PeerError, ServerError
from fedgestalt.federation.matching.agreement import Gather
from fedgestalt.federation.matching.galleries import Gallery, absent, no_rows
from fedgestalt.federation.matching.messages import (
    Answers,
    AskShares,
    Compute,
    Computed,
    EnrolShares,
    SharedEnrolment,
    ShareHoldings,
    Signed,
)
from fedgestalt.federation.matching.shares import Delivery, Party, holdings
from fedgestalt.federation.tasks import COMPUTE, ENROL_SHARES, SHARES_HELD
from fedgestalt.messages import from_site
from fedgestalt.similarity.kernel import KernelKeys

Accept = Callable[[str, SharedEnrolment], None]
"""Raises PeerError if a site may not ask or take back what it does; notes what it takes back."""


class Parties:
    """The computing parties of one job, as the server leads them.

    Args:
        strategy: with several roles.
        kernel: whose label key seals the labels.
        computing: the computing sites, parties 1 and on.
        gallery: the server's own shares.
        gather: see :data:`fedgestalt.federation.matching.agreement.Gather`.
    """

    def __init__(
        self,
        strategy: MatchingStrategy,
        kernel: str,
        computing: Sequence[str],
        gallery: Gallery,
        gather: Gather,
    ) -> None:
        self._kernel, self._computing = kernel, tuple(computing)
        self._gallery, self._gather = gallery, gather
        self._party = Party(strategy, 0, gallery)
        self._stale: set[str] = set()
        self._enrolled: dict[str, SharedEnrolment] = {}

    def compare_holdings(self) -> None:
        """Find the owners of whose rows a party holds something else than the server.

        Raises:
            ServerError: a computing site was lost.
        """
        own = holdings(self._gallery)

        def on_reply(site: str, fields: object) -> None:
            said = ShareHoldings.from_fields(fields, from_site(site)).digests
            self._stale |= {owner for owner in own if said.get(owner) != own[owner]}

        if self._gather(SHARES_HELD, AskShares(self._kernel), on_reply, self._computing):
            raise _lost()

    def enrol(
        self, keys: KernelKeys, sites: Collection[str], ask: bool, accept: Accept
    ) -> Mapping[str, SharedEnrolment]:
        """Every site's part of the gallery is up to date; returns what came, by site.

        Raises:
            PeerError: a site sent something wrong.
            ServerError: there is no row to compare, or a computing site is lost.
        """
        if not set(self._computing) <= set(sites):
            raise _lost()

        def on_reply(site: str, fields: object) -> None:
            fault = from_site(site)
            new = SharedEnrolment.from_fields(fields, fault)
            new.check(fault)
            if new.kernel != self._kernel or new.boxes.keys() != set(self._computing) - {site}:
                raise PeerError("its shares are not for the job's computing sites", site=site)
            accept(site, new)
            own = self._gallery.part(site)
            staying = own.handles[:0] if site in self._stale else absent(own.handles, new.removed)
            delivery = Delivery(new.upload, np.concatenate([staying, new.handles]), *new.parts)
            self._party.take(site, delivery, fault, new.labels)
            if (self._gallery.part(site).at(new.asked) < 0).any():
                raise PeerError("it asks about a row that it has not enrolled", site=site)
            if self._party.queries.get(site, 0) != len(new.asked):
                raise PeerError("its question is not about the rows that it names", site=site)
            self._enrolled[site] = new

        messages = {
            site: EnrolShares(
                self._kernel,
                self._computing,
                self._gallery.part(site).handles,
                int(site not in self._stale),
                int(ask),
                keys,
            )
            for site in sorted(sites)
        }
        self._gather(ENROL_SHARES, messages, on_reply, set(sites))
        if not self._owners:
            raise ServerError("the gallery is empty: no site has enrolled an image", where="job")
        return self._enrolled

    @property
    def re_enrolled(self) -> list[str]:
        """Sites that have shared all their rows again."""
        return sorted(self._stale & self._enrolled.keys())

    @property
    def left_out(self) -> list[str]:
        """Owners that should have shared all their rows again, and were not there."""
        return sorted(self._stale & set(self._gallery.sites) - self._enrolled.keys())

    @property
    def rows(self) -> int:
        """How many rows are compared."""
        return sum(len(self._gallery.part(owner)) for owner in self._owners)

    @property
    def _owners(self) -> list[str]:
        return [site for site in self._gallery.sites if site not in self.left_out]

    def compute(self) -> Callable[[str, Mapping[str, Signed]], Answers]:
        """All parties compute; returns what makes a site's answers (see :class:`Answers`).

        Raises:
            ServerError: a computing site was lost, or holds other shares.
            PeerError: a site sent something wrong.
        """
        order = self._owners
        secrets.SystemRandom().shuffle(order)
        sealed: dict[str, dict[str, bytes]] = {site: {} for site in self._enrolled}

        def on_reply(site: str, fields: object) -> None:
            answers = Computed.from_fields(fields, from_site(site)).answers
            if answers.keys() != {s for s in self._party.queries if s != site}:
                raise PeerError("its answers are not for the sites that ask", site=site)
            for asking, box in answers.items():
                sealed[asking][site] = box

        held = holdings(self._gallery)
        messages = {
            site: Compute(
                {s: new.boxes[site] for s, new in self._enrolled.items() if s != site},
                tuple(order),
                tuple(held[owner] for owner in order),
            )
            for site in self._computing
        }
        if self._gather(COMPUTE, messages, on_reply, self._computing):
            raise _lost()
        own = self._party.answers(order, {site: from_site(site) for site in self._enrolled})

        def answers(site: str, receipts: Mapping[str, Signed]) -> Answers:
            owners = order if site in own else []
            parts = [no_rows(), *(self._gallery.part(owner) for owner in owners)]
            return Answers(
                np.concatenate([part.handles for part in parts]),
                np.concatenate([part.labels for part in parts]),
                tuple(map(len, parts[1:])),
                own.get(site, b""),
                sealed.get(site, {}),
                receipts,
            )

        return answers


def _lost() -> ServerError:
    return ServerError(
        "a computing site was lost",
        where="job",
        remedy="submit the job again when it is back; to go on without it, with rotate=true and"
        " other computing_sites, so that all sites enrol again",
    )
