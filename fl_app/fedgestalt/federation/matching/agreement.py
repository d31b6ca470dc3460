"""The server's side of a kernel's life: which one a job uses, agreed on anew or handed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from fedgestalt.errors import PeerError, ServerError
from fedgestalt.federation.job.identity import PublicIdentity
from fedgestalt.federation.job.transfer import DownloadDesk, UploadDesk
from fedgestalt.federation.matching.messages import (
    Agree,
    EnsembleSent,
    ExchangeStart,
    HandedOver,
    HandOver,
    Holdings,
    KernelReady,
    SendEnsemble,
    TakeOver,
)
from fedgestalt.federation.tasks import (
    AGREE,
    HAND_OVER,
    KERNEL_KEYS,
    SEAL,
    SEND_ENSEMBLE,
    TAKE_OVER,
)
from fedgestalt.messages import Message, from_site
from fedgestalt.similarity.kernel import (
    KernelFacts,
    KernelKey,
    KernelKeys,
    SealedContributions,
    SealedKernels,
    check_key,
)

OnReply = Callable[[str, object], None]
Gather = Callable[[str, Message | Mapping[str, Message], OnReply, Collection[str]], Collection[str]]
"""Asks sites (task, messages, on reply, sites) and returns those that were lost."""

_NO_NAME = "0" * 64


@dataclass(frozen=True)
class Member:
    """A site that has joined.

    Attributes:
        certificate: PEM.
        identity: what it says.
    """

    certificate: bytes
    identity: PublicIdentity


@dataclass(frozen=True)
class Choice:
    """The kernel of a job.

    Attributes:
        kernel: id; empty if the sites must agree on a new one.
        version: of it.
        holders: sites that have it.
    """

    kernel: str
    version: int
    holders: tuple[str, ...]


def choose(holdings: Mapping[str, Holdings], galleries: Mapping[str, int], rotate: bool) -> Choice:
    """Which kernel to use: the newest that a site holds, or a new one.

    Args:
        holdings: by site.
        galleries: versions by kernel id, as the server knows them.
        rotate: a new version is wanted.
    """
    versions = dict(galleries)
    holders: dict[str, list[str]] = {}
    for site, said in sorted(holdings.items()):
        for kernel, version in said.kernels.items():
            if not version.isdecimal():
                raise PeerError("it names a kernel without a version", site=site)
            versions[kernel] = max(versions.get(kernel, 0), int(version))
            holders.setdefault(kernel, []).append(site)
    newest = max(versions.values(), default=0)
    if rotate or not holders:
        return Choice("", newest + 1, ())
    kernel = max(holders, key=lambda k: (versions[k], len(holders[k]), k))
    return Choice(kernel, versions[kernel], tuple(holders[kernel]))


class KernelExchanges:
    """Runs the exchanges of a job; the server relays what it cannot open.

    Args:
        job: its id.
        ensemble, strategy: what the kernel is for.
        gather: see :data:`Gather`.
        members: all sites that have joined.
        uploads, downloads: for an ensemble that a newcomer lacks.
    """

    def __init__(
        self,
        job: str,
        ensemble: str,
        strategy: str,
        gather: Gather,
        members: Mapping[str, Member],
        uploads: UploadDesk,
        downloads: DownloadDesk,
    ) -> None:
        self._job, self._ensemble, self._strategy = job, ensemble, strategy
        self._gather, self._members = gather, members
        self._uploads, self._downloads = uploads, downloads
        self._attempt = 0

    def agree(self, sites: set[str], version: int, layout: str, least: int) -> str:
        """All of ``sites`` agree on a new kernel; whoever is lost meanwhile leaves ``sites``.

        Returns:
            the kernel's id.

        Raises:
            ServerError: fewer than ``least`` are left.
            PeerError: a site sent something wrong, or has another kernel.
        """
        while True:
            _check_enough(sites, least, "agree on a kernel")
            facts, keys, lost = self._meet(sites, version, layout, "")
            ready: dict[str, str] = {}
            lost = lost or self._relay(keys, sites, ready)
            if not lost:
                return self._one_kernel(ready, facts)
            sites -= set(lost)

    def meet(
        self, sites: set[str], kernel: str, version: int, layout: str, least: int
    ) -> KernelKeys:
        """All of ``sites``, which hold a kernel, meet to seal for each other; returns their keys.

        Whoever is lost meanwhile leaves ``sites``.

        Raises:
            ServerError: fewer than ``least`` are left.
            PeerError: a site sent something wrong.
        """
        while True:
            _check_enough(sites, least, "meet")
            _, keys, lost = self._meet(sites, version, layout, "", kernel)
            if not lost:
                return keys
            sites -= set(lost)

    def _relay(
        self, keys: KernelKeys, sites: Collection[str], ready: dict[str, str]
    ) -> Collection[str]:
        """Everybody's box to everybody; returns who was lost."""
        boxes: dict[str, dict[str, bytes]] = {site: {} for site in sites}

        def on_boxes(site: str, fields: object) -> None:
            sealed = SealedContributions.from_fields(fields, from_site(site)).boxes
            if sealed.keys() != boxes.keys() - {site}:
                raise PeerError("its boxes are not for the agreed roster", site=site)
            for receiver, box in sealed.items():
                boxes[receiver][site] = box

        lost = self._gather(SEAL, keys, on_boxes, sites)
        if lost:
            return lost
        messages = {site: Agree(SealedContributions(boxes[site])) for site in sites}
        return self._gather(AGREE, messages, self._ready(ready), sites)

    def hand_over(
        self,
        choice: Choice,
        newcomers: set[str],
        sponsor: str,
        layout: str,
        lacking: Collection[str],
    ) -> None:
        """``sponsor`` passes the kernel on, and the ensemble to those ``lacking`` it.

        Whoever is lost meanwhile leaves ``newcomers``.

        Raises:
            ServerError: the sponsor was lost.
            PeerError: a site sent something wrong.
        """
        facts, keys, lost = self._meet({*newcomers, sponsor}, choice.version, layout, sponsor)
        while lost:
            newcomers -= set(lost)
            if sponsor in lost or not newcomers:
                raise _sponsor_lost(sponsor)
            facts, keys, lost = self._meet({*newcomers, sponsor}, choice.version, layout, sponsor)
        handed: list[HandedOver] = []

        def on_handed(site: str, fields: object) -> None:
            message = HandedOver.from_fields(fields, from_site(site))
            if message.kernels.boxes.keys() != newcomers:
                raise PeerError("its boxes are not for the newcomers", site=site)
            handed.append(message)

        if self._gather(HAND_OVER, HandOver(keys, choice.kernel), on_handed, {sponsor}):
            raise _sponsor_lost(sponsor)
        name, words = _NO_NAME, 0
        if lacking:
            name, words = facts.digest.hex(), handed[0].words
            ticket = self._uploads.expect(name, words, (sponsor,))[sponsor]

            def on_sent(site: str, fields: object) -> None:
                EnsembleSent.from_fields(fields, from_site(site))

            if self._gather(SEND_ENSEMBLE, SendEnsemble(name, ticket), on_sent, {sponsor}):
                raise _sponsor_lost(sponsor)
            self._downloads.offer(name, self._uploads.vector(sponsor)(0, words), lacking)
        boxes = handed[0].kernels.boxes
        messages = {
            site: TakeOver(
                keys,
                SealedKernels({sponsor: boxes[site]}),
                name if site in lacking else _NO_NAME,
                words if site in lacking else 0,
            )
            for site in newcomers
        }
        ready: dict[str, str] = {}
        try:
            newcomers -= set(self._gather(TAKE_OVER, messages, self._ready(ready), set(newcomers)))
        finally:
            self._downloads.withdraw()
            self._uploads.close()
        for site, kernel in ready.items():
            if kernel != choice.kernel:
                raise PeerError(f"it took over another kernel than {choice.kernel}", site=site)

    def _meet(
        self, sites: Collection[str], version: int, layout: str, sponsor: str, held: str = ""
    ) -> tuple[KernelFacts, KernelKeys, Collection[str]]:
        """Everybody's signed keys for one attempt, and who was lost meanwhile."""
        self._attempt += 1
        facts = KernelFacts(
            self._job,
            self._attempt,
            version,
            self._ensemble,
            layout,
            self._strategy,
            {site: self._members[site].identity.fingerprint for site in sites},
            sponsor,
            held,
        )
        offered: dict[str, KernelKey] = {}

        def on_key(site: str, fields: object) -> None:
            key = KernelKey.from_fields(fields, from_site(site))
            check_key(facts, site, key, self._members[site].identity)
            offered[site] = key

        certificates = {site: self._members[site].certificate for site in sites}
        by, under = (tuple(name for name in (some,) if name) for some in (sponsor, held))
        start = ExchangeStart(self._attempt, version, layout, by, under, certificates)
        lost = self._gather(KERNEL_KEYS, start, on_key, set(sites))
        return facts, KernelKeys(offered), lost

    @staticmethod
    def _ready(ready: dict[str, str]) -> OnReply:
        def on_ready(site: str, fields: object) -> None:
            ready[site] = KernelReady.from_fields(fields, from_site(site)).kernel

        return on_ready

    @staticmethod
    def _one_kernel(ready: Mapping[str, str], facts: KernelFacts) -> str:
        first = facts.sites[0]
        for site, kernel in ready.items():
            if kernel != ready[first]:
                raise PeerError(f"its kernel differs from that of {first}", site=site)
        return ready[first]


def _check_enough(sites: Collection[str], least: int, what: str) -> None:
    if len(sites) < least:
        raise ServerError(
            f"{len(sites)} sites are left to {what}, {least} are needed",
            where="kernel",
            remedy="bring the lost sites back",
        )


def _sponsor_lost(sponsor: str) -> ServerError:
    return ServerError(
        f"site {sponsor!r} was lost while it handed the kernel over",
        where="kernel",
        remedy="submit the job again, with another sponsor if need be",
    )
