"""A site's side of the matching jobs: which task goes to which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import ServerError
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler, SiteExecutor
from fedgestalt.federation.job.handshake import Present, present, versions
from fedgestalt.federation.matching.answers import consider, keep_ranks, opened_shares
from fedgestalt.federation.matching.enrolling import OwnRows, enrol_rows, enrol_shares
from fedgestalt.federation.matching.exchange import KernelSite
from fedgestalt.federation.matching.messages import (
    GALLERY,
    MATCH,
    ONBOARD,
    Agree,
    Answers,
    Ask,
    AskShares,
    Compute,
    Computed,
    Consent,
    Consider,
    Enrol,
    Enrolment,
    EnrolShares,
    EnsembleSent,
    ExchangeStart,
    HandedOver,
    HandOver,
    Holdings,
    KernelReady,
    MatchStart,
    Ranked,
    ReleasedRows,
    SendEnsemble,
    SharedEnrolment,
    ShareHoldings,
    TakeOver,
)
from fedgestalt.federation.matching.shares import SharingSite, holdings
from fedgestalt.federation.matching.site import MatchingSite
from fedgestalt.federation.site.settings import ALL_ROWS
from fedgestalt.learning.encoding import layout_of
from fedgestalt.messages import from_server
from fedgestalt.similarity.kernel import KernelKey, KernelKeys, SealedContributions


class FlakeMatcher(SiteExecutor):
    """Encodes the site's patients, masks them, and ranks the site's own queries.

    Args:
        phase_limit_seconds: for a transfer.
    """

    template: ClassVar[str] = MATCH
    purposes: ClassVar[tuple[str, ...]] = (MATCH, ONBOARD, GALLERY)

    def __init__(self, phase_limit_seconds: float = 3600.0) -> None:
        super().__init__(phase_limit_seconds)
        self._matching: MatchingSite | None = None
        self._kernel_site: KernelSite | None = None
        self._own_rows: OwnRows | None = None
        self._sharing: SharingSite | None = None
        self._announced: dict[str, int] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the matching jobs."""
        return {
            tasks.START: self._join,
            tasks.HOLDINGS: self._hold,
            tasks.KERNEL_KEYS: self._offer_key,
            tasks.SEAL: self._contribute,
            tasks.AGREE: self._agree,
            tasks.HAND_OVER: self._hand_over,
            tasks.SEND_ENSEMBLE: self._send_ensemble,
            tasks.TAKE_OVER: self._take_over,
            tasks.ENROL: self._enrol,
            tasks.CONSIDER: self._consider,
            tasks.RANK: self._rank,
            tasks.SHARES_HELD: self._say_shares,
            tasks.ENROL_SHARES: self._enrol_shares,
            tasks.COMPUTE: self._compute,
            tasks.RANK_SHARES: self._rank_shares,
        }

    # the handshake

    def _join(self, fields: object) -> Present:
        start = MatchStart.from_fields(fields, from_server)
        if start.purpose not in self.purposes:
            raise ServerError(f"it asks for {start.purpose!r}, which is no job", where=self.site)
        self.settings.check_job(start.purpose)
        self.settings.check_roster(self.site, start.roster)
        self.settings.check_strategy(start.strategy)
        registry = self.registry
        strategy = registry.matching.entry(start.strategy)
        self.check_start(start, strategy.plugin)
        own = MatchingSite(
            self.site,
            self.job,
            start,
            self.settings,
            self.store,
            lambda: self.cohort,
            self.identity,
            self.trust,
            strategy.plugin,
            registry.rankings.get(start.ranking),
            self.counter,
        )
        facts = versions([strategy])
        if start.purpose != ONBOARD or own.has_ensemble:
            ensemble = own.ensemble()
            if start.purpose != ONBOARD:
                facts |= versions(map(registry.backbones.entry, ensemble.backbones))
        facts["label map"] = own.cohort.label_map_digest
        own.check_patients()
        own.check_terms()
        self._matching, self._kernel_site = own, KernelSite(own, self)
        return present(facts, certificate=self.identity.certificate)

    def check_start(self, start: MatchStart, strategy: MatchingStrategy) -> None:
        """Raise FedgestaltError if this site does not release what the job asks for."""
        self.settings.check_release(start.released_rows)
        if len(strategy.roles) > 1:
            self.settings.check_release(ALL_ROWS)  # an asking site gets the scores of all rows

    def _hold(self, fields: object) -> Holdings:
        Ask.from_fields(fields, from_server)
        own = self._own
        held = own.kernels.held(own.start.ensemble, own.start.strategy)
        return Holdings(
            {kernel.id: str(kernel.version) for kernel in held.values()},
            int(own.has_ensemble),
            layout_of(own.ensemble()) if own.has_ensemble else "",
        )

    # the kernel

    def _offer_key(self, fields: object) -> KernelKey:
        return self._kernel.offer(ExchangeStart.from_fields(fields, from_server))

    def _contribute(self, fields: object) -> SealedContributions:
        return self._kernel.contribute(KernelKeys.from_fields(fields, from_server))

    def _agree(self, fields: object) -> KernelReady:
        return self._kernel.agree(Agree.from_fields(fields, from_server).contributions)

    def _hand_over(self, fields: object) -> HandedOver:
        return self._kernel.hand_over(HandOver.from_fields(fields, from_server))

    def _send_ensemble(self, fields: object) -> EnsembleSent:
        return self._kernel.send_ensemble(SendEnsemble.from_fields(fields, from_server))

    def _take_over(self, fields: object) -> KernelReady:
        return self._kernel.take_over(TakeOver.from_fields(fields, from_server))

    # the gallery

    def _enrol(self, fields: object) -> Enrolment:
        message = Enrol.from_fields(fields, from_server)
        kernel = self._kernel.use(message.kernel)
        self._own_rows, enrolment = enrol_rows(self._own, kernel, message)
        return enrolment

    def _say_shares(self, fields: object) -> ShareHoldings:
        message = AskShares.from_fields(fields, from_server)
        kernel = self._kernel.use(message.kernel)
        return ShareHoldings(holdings(self._own.open_gallery(kernel)))

    def _enrol_shares(self, fields: object) -> SharedEnrolment:
        message, own = EnrolShares.from_fields(fields, from_server), self._own
        kernel, exchange = self._kernel.current, self._kernel.meet(message.keys)
        self._sharing = SharingSite(
            self.site,
            own.strategy,
            exchange,
            message.computing,
            lambda: own.open_gallery(kernel),
        )
        self._own_rows, enrolment = enrol_shares(own, kernel, self._sharing, message)
        return enrolment

    # what is asked, and what comes back

    def _consider(self, fields: object) -> Consent:
        message = Consider.from_fields(fields, from_server)
        consent, self._announced = consider(self._own, self._kernel.current, self._rows, message)
        return consent

    def _rank(self, fields: object) -> Ranked:
        released = ReleasedRows.from_fields(fields, from_server)
        return keep_ranks(self._own, self._kernel.current, self._rows, released)

    def _compute(self, fields: object) -> Computed:
        message = Compute.from_fields(fields, from_server)
        return Computed(self._shares.compute(message, self._announced))

    def _rank_shares(self, fields: object) -> Ranked:
        message = Answers.from_fields(fields, from_server)
        released = opened_shares(self._shares, self._rows, message)
        return keep_ranks(self._own, self._kernel.current, self._rows, released)

    # what is at hand

    @property
    def _own(self) -> MatchingSite:
        if self._matching is None:
            raise ServerError("a matching phase came before its start", where=self.site)
        return self._matching

    @property
    def _kernel(self) -> KernelSite:
        if self._kernel_site is None:
            raise ServerError("a matching phase came before its start", where=self.site)
        return self._kernel_site

    @property
    def _rows(self) -> OwnRows:
        if self._own_rows is None:
            raise ServerError("a matching phase came before the enrolment", where=self.site)
        return self._own_rows

    @property
    def _shares(self) -> SharingSite:
        if self._sharing is None:
            raise ServerError("shares came before they were asked for", where=self.site)
        return self._sharing
