"""A site's side of a kernel's life: agreed on with others, handed over, taken over, looked up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ServerError
from fedgestalt.federation import tasks
from fedgestalt.federation.matching.messages import (
    EnsembleSent,
    ExchangeStart,
    HandedOver,
    HandOver,
    KernelReady,
    SendEnsemble,
    TakeOver,
)
from fedgestalt.federation.matching.site import Line, MatchingSite
from fedgestalt.federation.site.outgoing import record_sent
from fedgestalt.learning.encoding import layout_of
from fedgestalt.learning.store import ensemble_from_words, ensemble_to_words
from fedgestalt.messages import from_server
from fedgestalt.similarity.kernel import (
    Kernel,
    KernelExchange,
    KernelFacts,
    KernelKey,
    KernelKeys,
    SealedContributions,
)


class KernelSite:
    """The kernel of one job at one site, and the exchange in which sites meet for it.

    Args:
        own: the site.
        line: for an ensemble that a newcomer lacks.
    """

    def __init__(self, own: MatchingSite, line: Line) -> None:
        self._own, self._line = own, line
        self._exchange: KernelExchange | None = None
        self._meeting: KernelExchange | None = None
        self._attempt = 0
        self._kernel: Kernel | None = None
        self._sealed: NDArray[np.uint32] | None = None

    @property
    def current(self) -> Kernel:
        """The kernel that the job uses.

        Raises:
            ServerError: none was agreed on or named yet.
        """
        if self._kernel is None:
            raise ServerError(
                "a matching phase came before a kernel was agreed", where=self._own.site
            )
        return self._kernel

    @property
    def exchange(self) -> KernelExchange:
        """The exchange under way.

        Raises:
            ServerError: none was begun.
        """
        if self._exchange is None:
            raise ServerError("a kernel exchange came before its start", where=self._own.site)
        return self._exchange

    def use(self, kernel_id: str) -> Kernel:
        """The kernel of this id, which the job uses from now on.

        Raises:
            ServerError: this site does not hold it, or holds a newer one.
        """
        kernel, start = self._named(kernel_id), self._own.start
        layout = layout_of(self._own.ensemble())
        kernel.check(start.ensemble, layout, start.strategy, from_server)
        self._kernel = kernel
        return kernel

    def meet(self, keys: KernelKeys) -> KernelExchange:
        """Meet the others under a kernel that all hold, to seal for each other.

        Raises:
            ServerError: no such meeting was begun, or the keys are not those of its roster.
            PeerError: a key is not signed by its site.
        """
        if self._meeting is None:
            raise ServerError("a meeting of sites came before its start", where=self._own.site)
        self._meeting.meet(keys)
        return self._meeting

    # agreed on by all

    def offer(self, said: ExchangeStart) -> KernelKey:
        """Begin an exchange; returns this site's signed key for it."""
        own, start = self._own, self._own.start
        sponsor, held = "".join(said.sponsor), "".join(said.held)
        if said.attempt <= self._attempt:
            raise ServerError("a kernel exchange came for the second time", where=own.site)
        if not said.certificates.keys() <= set(start.roster):
            raise ServerError("a site takes part that is not in the job's roster", where=own.site)
        newest = max((k.version for k in self._held.values()), default=0)
        if held and self.use(held).version != said.version:
            raise ServerError("it names a kernel by another version", where=own.site)
        if not held and sponsor != own.site and said.version <= newest:
            raise ServerError(
                f"it asks for kernel version {said.version}, this site has version {newest}",
                where=own.site,
                remedy="ask the server's administrator whether an old state was restored",
            )
        peers = own.peers(said.certificates)
        facts = KernelFacts(
            own.job,
            said.attempt,
            said.version,
            start.ensemble,
            said.layout,
            start.strategy,
            {site: peer.fingerprint for site, peer in peers.items()},
            sponsor,
            held,
        )
        self._attempt = said.attempt
        exchange = KernelExchange(
            own.site,
            facts,
            own.identity,
            {site: peer for site, peer in peers.items() if site != own.site},
            minimum_sites=own.settings.minimum_sites,
        )
        if held:
            self._meeting = exchange
        else:
            self._exchange = exchange
        return exchange.offer()

    def contribute(self, keys: KernelKeys) -> SealedContributions:
        """Meet the others and seal this site's part of the secret for each."""
        self.exchange.meet(keys)
        return self.exchange.contribute()

    def agree(self, boxes: SealedContributions) -> KernelReady:
        """Derive the kernel from everybody's part."""
        return self._take(self.exchange.agree(boxes))

    # handed over to newcomers

    def hand_over(self, message: HandOver) -> HandedOver:
        """Seal a kernel, and the ensemble, for newcomers."""
        kernel = self._named(message.kernel)
        self.exchange.meet(message.keys)
        kernels = self.exchange.hand_over(kernel)
        key = kernel.transfer_key(self._own.job)
        self._sealed = ensemble_to_words(self._own.ensemble_folder, key)
        return HandedOver(kernels, self._sealed.size)

    def send_ensemble(self, message: SendEnsemble) -> EnsembleSent:
        """Upload the sealed ensemble."""
        own, words = self._own, self._sealed
        if words is None:
            raise ServerError("no ensemble was sealed to be sent", where=own.site)
        record_sent(own.store, own.job, tasks.SEND_ENSEMBLE, "sealed ensemble", words.nbytes)
        self._line.send(message.name, message.ticket, words)
        self._sealed = None
        return EnsembleSent(message.name)

    def take_over(self, message: TakeOver) -> KernelReady:
        """Take the kernel, and the ensemble if this site lacks it, from the sponsor."""
        self.exchange.meet(message.keys)
        kernel = self.exchange.take_over(message.kernels)
        if message.words and not self._own.has_ensemble:
            words = np.empty(message.words, np.uint32)
            self._line.fetch(message.name, words)
            key = kernel.transfer_key(self._own.job)
            ensemble_from_words(words, key, self._own.ensemble_folder, self._own.registry)
        return self._take(kernel)

    def _take(self, kernel: Kernel) -> KernelReady:
        start = self._own.start
        layout = layout_of(self._own.ensemble())
        kernel.check(start.ensemble, layout, start.strategy, from_server)
        self._kernel = kernel
        if start.standing:
            self._own.kernels.keep(kernel)
        return KernelReady(kernel.id)

    # what is at hand

    @property
    def _held(self) -> dict[str, Kernel]:
        start = self._own.start
        return self._own.kernels.held(start.ensemble, start.strategy) if start.standing else {}

    def _named(self, kernel: str) -> Kernel:
        if self._kernel is not None and self._kernel.id == kernel:
            return self._kernel
        held, site = self._held, self._own.site
        if kernel not in held:
            raise ServerError("it names a kernel that this site does not hold", where=site)
        newest = max(k.version for k in held.values())
        if held[kernel].version < newest:
            raise ServerError(
                f"it names kernel version {held[kernel].version}, this site has version {newest}",
                where=site,
                remedy="ask the server's administrator whether an old state was restored",
            )
        return held[kernel]
