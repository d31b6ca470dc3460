"""A site's side of the matching jobs."""

from __future__ import annotations

import datetime as dt
import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import MatchingStrategy, RankingStrategy
from fedgestalt.errors import ConfigError, ServerError, SiteError
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler, SiteExecutor
from fedgestalt.federation.job.handshake import Present, present, versions
from fedgestalt.federation.job.identity import PublicIdentity
from fedgestalt.federation.job.transfer import download, upload
from fedgestalt.federation.matching.holdings import Enrolled, KernelStore
from fedgestalt.federation.matching.messages import (
    MATCH,
    ONBOARD,
    PURPOSES,
    Agree,
    Answers,
    Ask,
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
    Handles,
    HandOver,
    Holdings,
    KernelReady,
    MatchStart,
    Query,
    Ranked,
    ReleasedRows,
    SendEnsemble,
    SharedEnrolment,
    TakeOver,
    handles_digest,
    query_statement,
    withdrawal_statement,
)
from fedgestalt.federation.matching.results import (
    Queries,
    QueryLedger,
    forget,
    write_matches,
    write_receipt,
)
from fedgestalt.federation.matching.shares import SharingSite
from fedgestalt.federation.site.outgoing import record_sent
from fedgestalt.federation.site.settings import ALL_ROWS
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import Encodings, encode, layout_of
from fedgestalt.learning.ensemble import Ensemble
from fedgestalt.learning.images import FaceFiles
from fedgestalt.learning.store import ensemble_from_words, ensemble_to_words, load_ensemble
from fedgestalt.messages import from_server
from fedgestalt.similarity.kernel import (
    Kernel,
    KernelExchange,
    KernelFacts,
    KernelKey,
    KernelKeys,
    SealedContributions,
)
from fedgestalt.similarity.labels import (
    HANDLE_BYTES,
    PLANTED,
    SEALED_BYTES,
    Label,
    new_handle,
    open_label,
    seal_label,
)
from fedgestalt.similarity.order import ImageOrder, image_order

_PLANTED_ROWS: Final = 2
_PLANTED_WEIGHT: Final = 0.25
_TOLERANCE: Final = 1e-4
"""Of a score whose value a site knows; float32 rows give 1e-6."""


class FlakeMatcher(SiteExecutor):
    """Encodes the site's patients, masks them, and ranks the site's own queries.

    Args:
        phase_limit_seconds: for a transfer.
    """

    template: ClassVar[str] = MATCH

    def __init__(self, phase_limit_seconds: float = 3600.0) -> None:
        super().__init__()
        self._limit = phase_limit_seconds
        self._start: MatchStart | None = None
        self._ensemble: Ensemble | None = None
        self._exchange: KernelExchange | None = None
        self._attempt = 0
        self._kernel: Kernel | None = None
        self._sealed: NDArray[np.uint32] | None = None
        self._enrolled = Enrolled()
        self._own: dict[str, int] = {}
        self._queries: Handles = np.empty((0, HANDLE_BYTES), np.uint8)
        self._withdrawn: dict[str, str] = {}
        self._announced: dict[str, int] = {}
        self._shares: SharingSite | None = None

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
            tasks.ENROL_SHARES: self._enrol_shares,
            tasks.COMPUTE: self._compute,
            tasks.RANK_SHARES: self._rank_shares,
        }

    # the handshake

    def _join(self, fields: object) -> Present:
        start = MatchStart.from_fields(fields, from_server)
        if start.purpose not in PURPOSES:
            raise ServerError(f"it asks for {start.purpose!r}, which is no job", where=self.site)
        self.settings.check_job(start.purpose)
        self.settings.check_roster(self.site, start.roster)
        self.settings.check_strategy(start.strategy)
        self.settings.check_release(start.released_rows)
        registry = self.registry
        strategy = registry.matching.entry(start.strategy)
        self._strategy: MatchingStrategy = strategy.plugin
        if len(self._strategy.roles) > 1:
            self.settings.check_release(ALL_ROWS)  # an asking site gets the scores of all rows
            if start.standing:
                raise SiteError(
                    f"strategy {start.strategy!r} has no standing gallery",
                    remedy="submit the job with kernel=session",
                )
        self._ranked_by: RankingStrategy = registry.rankings.get(start.ranking)
        self._start = start
        facts = versions([strategy])
        if start.purpose != ONBOARD or self._has_ensemble:
            ensemble = self._load()
            if start.purpose != ONBOARD:
                facts |= versions(map(registry.backbones.entry, ensemble.backbones))
        facts["label map"] = self.cohort.label_map_digest
        self._order: ImageOrder = image_order(self.cohort)
        return present(facts, certificate=self.identity.certificate)

    def _hold(self, fields: object) -> Holdings:
        Ask.from_fields(fields, from_server)
        held = self._kernels.held(self._started.ensemble, self._started.strategy)
        ensemble = self._load() if self._has_ensemble else None
        return Holdings(
            {kernel.id: str(kernel.version) for kernel in held.values()},
            int(ensemble is not None),
            layout_of(ensemble) if ensemble else "",
        )

    # the kernel

    def _offer_key(self, fields: object) -> KernelKey:
        said, start = ExchangeStart.from_fields(fields, from_server), self._started
        sponsor = "".join(said.sponsor)
        if said.attempt <= self._attempt:
            raise ServerError("a kernel exchange came for the second time", where=self.site)
        if not said.certificates.keys() <= set(start.roster):
            raise ServerError("a site takes part that is not in the job's roster", where=self.site)
        newest = max((k.version for k in self._held.values()), default=0)
        if sponsor != self.site and said.version <= newest:
            raise ServerError(
                f"it asks for kernel version {said.version}, this site has version {newest}",
                where=self.site,
                remedy="ask the server's administrator whether an old state was restored",
            )
        peers = self._peers(said.certificates)
        facts = KernelFacts(
            self.job,
            said.attempt,
            said.version,
            start.ensemble,
            said.layout,
            start.strategy,
            {site: peer.fingerprint for site, peer in peers.items()},
            sponsor,
        )
        self._attempt = said.attempt
        self._exchange = KernelExchange(
            self.site,
            facts,
            self.identity,
            {site: peer for site, peer in peers.items() if site != self.site},
            minimum_sites=self.settings.minimum_sites,
        )
        return self._exchange.offer()

    def _contribute(self, fields: object) -> SealedContributions:
        self._open_exchange.meet(KernelKeys.from_fields(fields, from_server))
        return self._open_exchange.contribute()

    def _agree(self, fields: object) -> KernelReady:
        boxes = Agree.from_fields(fields, from_server).contributions
        return self._take(self._open_exchange.agree(boxes))

    def _hand_over(self, fields: object) -> HandedOver:
        message = HandOver.from_fields(fields, from_server)
        exchange, kernel = self._open_exchange, self._named(message.kernel)
        exchange.meet(message.keys)
        kernels = exchange.hand_over(kernel)
        folder = self.store / "ensembles" / self._started.ensemble
        self._sealed = ensemble_to_words(folder, kernel.transfer_key(self.job))
        return HandedOver(kernels, self._sealed.size)

    def _send_ensemble(self, fields: object) -> EnsembleSent:
        message, words = SendEnsemble.from_fields(fields, from_server), self._sealed
        if words is None:
            raise ServerError("no ensemble was sealed to be sent", where=self.site)
        record_sent(self.store, self.job, tasks.SEND_ENSEMBLE, "sealed ensemble", words.nbytes)
        context, abort = self.call
        upload(
            context.get_engine(),
            context,
            message.name,
            [words],
            words.size,
            ticket=message.ticket,
            limit_seconds=self._limit,
            should_stop=lambda: bool(abort.triggered),
            progress=self.counter("upload"),
        )
        self._sealed = None
        return EnsembleSent(message.name)

    def _take_over(self, fields: object) -> KernelReady:
        message = TakeOver.from_fields(fields, from_server)
        self._open_exchange.meet(message.keys)
        kernel = self._open_exchange.take_over(message.kernels)
        if message.words and not self._has_ensemble:
            words = np.empty(message.words, np.uint32)
            context, abort = self.call
            download(
                context.get_engine(),
                context,
                message.name,
                words.size,
                words,
                limit_seconds=self._limit,
                should_stop=lambda: bool(abort.triggered),
                progress=self.counter("download"),
            )
            folder = self.store / "ensembles" / self._started.ensemble
            ensemble_from_words(words, kernel.transfer_key(self.job), folder, self.registry)
        return self._take(kernel)

    def _take(self, kernel: Kernel) -> KernelReady:
        start = self._started
        layout = layout_of(self._load())
        kernel.check(start.ensemble, layout, start.strategy, from_server)
        self._kernel = kernel
        if start.standing:
            self._kernels.keep(kernel)
        return KernelReady(kernel.id)

    # the gallery

    def _enrol(self, fields: object) -> Enrolment:
        message, start = Enrol.from_fields(fields, from_server), self._started
        kernel, ensemble = self._named(message.kernel), self._load()
        kernel.check(start.ensemble, layout_of(ensemble), start.strategy, from_server)
        self._kernel = kernel
        self._enrolled = self._kernels.enrolled(kernel) if start.standing else Enrolled()
        wanted = self._wanted()
        order = [n for n, image in enumerate(self._order.image_ids) if image in wanted]
        if not order:
            raise SiteError("this site has no image that its policy lets it enrol")
        place_of = {self._order.image_ids[number]: place for place, number in enumerate(order)}
        known = {handle.tobytes().hex() for handle in message.handles}
        kept = self._enrolled.keep(known, wanted)
        removed = sorted(known - kept.images.keys() - kept.planted.keys())
        images = self._enrolled.images
        self._withdrawn = {h: images[h][0] for h in removed if h in images}
        own = {image: handle for handle, (image, _) in kept.images.items()}
        added = [image for image in place_of if image not in own]
        own |= {image: new_handle().hex() for image in added}
        planted = {
            new_handle().hex(): self._pair(list(place_of))
            for _ in range(_PLANTED_ROWS - len(kept.planted))
        }
        self._enrolled.images = {own[image]: (image, wanted[image]) for image in place_of}
        self._enrolled.planted = {**kept.planted, **planted}
        encodings = self._encode(place_of)
        near, other = (
            [place_of[pair[side]] for pair in self._enrolled.planted.values()] for side in (0, 1)
        )
        rows = encodings[near] + _PLANTED_WEIGHT * encodings[other]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self._encodings = np.concatenate([encodings, rows])
        self._own = {own[image]: place for image, place in place_of.items()}
        self._own |= {h: len(order) + n for n, h in enumerate(self._enrolled.planted)}
        new = [own[image] for image in added] + list(planted)
        labels = [
            *(self._label(image, bytes.fromhex(own[image]), kernel) for image in added),
            *(seal_label(Label(-1, PLANTED), kernel, bytes.fromhex(h)) for h in planted),
        ]
        if start.standing:
            self._kernels.keep_enrolled(kernel, self._enrolled)
        asking = [n for n in order if n < self._order.queries] if message.ask else []
        self._asked = np.array(asking, np.int64)
        self._queries = _stack([own[self._order.image_ids[number]] for number in asking])
        masked = np.empty((0, 0), np.float32)
        if new:
            rows = self._encodings[[self._own[handle] for handle in new]]
            (part,) = self._strategy.enrol(rows, kernel.masking_seed)
            masked = part.words.astype(np.float32)
        return Enrolment(
            kernel.id,
            _stack(removed),
            masked,
            _stack(new),
            np.frombuffer(b"".join(labels), np.uint8).reshape(-1, SEALED_BYTES),
            self._queries,
            self.identity.sign(self._query_statement(kernel.id)),
        )

    def _wanted(self) -> dict[str, str]:
        """Digest of each image's file, of the images that this site's policy lets it enrol."""
        least = self.settings.minimum_images_per_syndrome
        common = {s for s, n in self.cohort.images_per_syndrome().items() if n >= least}
        return {
            image: hashlib.sha256(record.path.read_bytes()).hexdigest()
            for image, record in self.cohort.images.items()
            if record.syndrome in common
        }

    def _encode(self, images: Iterable[str]) -> Encodings:
        return encode(
            self._load(),
            FaceFiles(tuple(self.cohort.records(images))),
            choose_device(self.settings.device),
            self.store / "cache",
            self.counter("encoding"),
        )

    def _label(self, image: str, handle: bytes, kernel: Kernel) -> bytes:
        (record,), number = self.cohort.records([image]), self._order.image_ids.index(image)
        label = Label(
            record.syndrome,
            int(self._order.roles[number]),
            self._enrolled.case(record.subject),
            self.site if self.settings.reveal_hospital else "",
        )
        return seal_label(label, kernel, handle)

    def _pair(self, images: Sequence[str]) -> tuple[str, str]:
        """Two images for a row between them, whose similarities this site knows beforehand.

        It lies near the first, a query if there is one: the server cannot tell it from a patient's,
        and it comes back among that query's neighbours.
        """
        queries = [i for i in self._order.image_ids[: self._order.queries] if i in images]
        return secrets.choice(queries or images), secrets.choice(images)

    # shares, where several parties compute

    def _enrol_shares(self, fields: object) -> SharedEnrolment:
        message, kernel = EnrolShares.from_fields(fields, from_server), self._current
        if message.kernel != kernel.id or not set(message.computing) <= set(self._started.roster):
            raise ServerError("shares were asked for another kernel or roster", where=self.site)
        self._shares = SharingSite(
            self.site, self._strategy, self._open_exchange, message.computing
        )
        wanted = self._wanted()
        order = [n for n, image in enumerate(self._order.image_ids) if image in wanted]
        if not order:
            raise SiteError("this site has no image that its policy lets it enrol")
        images = [self._order.image_ids[number] for number in order]
        handles = {image: new_handle().hex() for image in images}
        self._enrolled = Enrolled({handles[image]: (image, wanted[image]) for image in images})
        self._encodings = self._encode(images)
        self._own = {handles[image]: place for place, image in enumerate(images)}
        asking = [n for n in order if n < self._order.queries] if message.ask else []
        self._asked = np.array(asking, np.int64)
        self._queries = _stack([handles[self._order.image_ids[number]] for number in asking])
        labels = [self._label(i, bytes.fromhex(handles[i]), kernel) for i in images]
        queries = self._encodings[[self._own[h.tobytes().hex()] for h in self._queries]]
        parts, boxes = self._shares.enrol(self._encodings, queries, kernel.masking_seed)
        return SharedEnrolment(
            kernel.id,
            _stack(list(handles.values())),
            np.frombuffer(b"".join(labels), np.uint8).reshape(-1, SEALED_BYTES),
            self._queries,
            self.identity.sign(self._query_statement(kernel.id)),
            parts,
            boxes,
        )

    def _compute(self, fields: object) -> Computed:
        message = Compute.from_fields(fields, from_server)
        return Computed(self._open_shares.compute(message, self._announced))

    def _rank_shares(self, fields: object) -> Ranked:
        message = Answers.from_fields(fields, from_server)
        scores = self._open_shares.open(message)
        columns = np.argsort(-scores, axis=1, kind="stable")
        released = ReleasedRows(
            message.handles,
            message.labels,
            columns.astype(np.int32),
            np.take_along_axis(scores, columns, 1),
            np.empty((0, HANDLE_BYTES), np.uint8),
            {},
            {},
        )
        return self._keep_ranks(released)

    # what the others ask, and what they take back

    def _consider(self, fields: object) -> Consent:
        message, kernel = Consider.from_fields(fields, from_server), self._current
        if message.kernel != kernel.id:
            raise ServerError("the queries are about another kernel", where=self.site)
        peers = self._peers(message.certificates)
        ledger = QueryLedger(self.store)
        for site, query in sorted(message.queries.items()):
            if site not in peers:
                raise ServerError(f"no certificate came for {site}", where=self.site)
            statement = query_statement(self.job, kernel.id, site, query.count, query.digest)
            peers[site].verify(statement, query.signature)
            self.settings.check_queries(site, query.count, ledger.today(site, self.job))
        own = message.queries.get(self.site, Query(0, handles_digest(self._queries[:0]), b"-"))
        if (own.count, own.digest) != (len(self._queries), handles_digest(self._queries)):
            raise ServerError("this site's queries came back altered", where=self.site)
        self._announced = {site: query.count for site, query in message.queries.items()}
        for site, query in sorted(message.queries.items()):
            if query.count:
                ledger.note(site, self.job, query.count)
        forget(self.store, message.withdrawn)
        statement = withdrawal_statement(
            self.job, kernel.id, self.site, handles_digest(message.withdrawn)
        )
        return Consent(kernel.id, self.identity.sign(statement))

    def _rank(self, fields: object) -> Ranked:
        return self._keep_ranks(ReleasedRows.from_fields(fields, from_server))

    def _keep_ranks(self, released: ReleasedRows) -> Ranked:
        kernel, start = self._current, self._started
        released.check(len(self._queries), from_server)
        self._check_planted(released)
        if self._withdrawn:
            self._check_receipt(released, kernel)
        if len(self._queries):
            write_matches(
                self.store,
                self.job,
                kernel.id,
                self.site,
                Queries(
                    images := [self._order.image_ids[number] for number in self._asked],
                    [record.subject for record in self.cohort.records(images)],
                    self._order.syndromes[self._asked],
                    self._order.roles[self._asked],
                ),
                {handle: image for handle, (image, _) in self._enrolled.images.items()},
                released,
                open_labels(released, kernel),
                self._ranked_by,
            )
        if start.standing:
            self._kernels.retire_older_than(kernel)
        return Ranked(kernel.id)

    def _check_planted(self, released: ReleasedRows) -> None:
        """Every released score between two of this site's own rows must be the one it knows.

        Raises:
            ServerError: one is not, or a row that must be among the nearest is missing.
        """
        own = [self._own.get(handle.tobytes().hex(), -1) for handle in released.handles]
        places = np.array(own, np.int64)
        for query, handle in enumerate(self._queries):
            mine = self._own[handle.tobytes().hex()]
            found = places[released.columns[query]]
            known = np.flatnonzero(found >= 0)
            right = self._encodings[found[known]] @ self._encodings[mine]
            scores = released.scores[query]
            missing = mine not in found and (not len(scores) or scores.min() < 1 - _TOLERANCE)
            if missing or np.abs(scores[known] - right).max(initial=0) > _TOLERANCE:
                raise ServerError(
                    "scores came that are not those of this site's own rows: rows were swapped or"
                    " scores made up",
                    where="server",
                    remedy="trust no result of this job; tell the consortium's lead",
                )

    def _check_receipt(self, released: ReleasedRows, kernel: Kernel) -> None:
        listed = {handle.tobytes().hex() for handle in released.withdrawn}
        if not self._withdrawn.keys() <= listed:
            raise ServerError(
                "the others were not told of all rows that this site has withdrawn",
                where=self.site,
                remedy="tell the consortium's lead; the rows may still be in others' results",
            )
        peers = self._peers(released.certificates)
        digest = handles_digest(released.withdrawn)
        for site, signature in released.consents.items():
            if site not in peers:
                raise ServerError(f"no certificate came for {site}", where=self.site)
            statement = withdrawal_statement(self.job, kernel.id, site, digest)
            peers[site].verify(statement, signature)
        write_receipt(
            self.store,
            self.job,
            kernel.id,
            released.withdrawn,
            sorted(set(self._withdrawn.values())),
            released.consents,
            released.certificates,
        )

    # what is at hand

    @property
    def _started(self) -> MatchStart:
        if self._start is None:
            raise ServerError("a matching phase came before its start", where=self.site)
        return self._start

    @property
    def _open_exchange(self) -> KernelExchange:
        if self._exchange is None:
            raise ServerError("a kernel exchange came before its start", where=self.site)
        return self._exchange

    @property
    def _open_shares(self) -> SharingSite:
        if self._shares is None:
            raise ServerError("shares came before they were asked for", where=self.site)
        return self._shares

    @property
    def _current(self) -> Kernel:
        if self._kernel is None:
            raise ServerError("a matching phase came before a kernel was agreed", where=self.site)
        return self._kernel

    @property
    def _kernels(self) -> KernelStore:
        return KernelStore(self.store)

    @property
    def _held(self) -> dict[str, Kernel]:
        start = self._started
        return self._kernels.held(start.ensemble, start.strategy) if start.standing else {}

    def _named(self, kernel: str) -> Kernel:
        if self._kernel is not None and self._kernel.id == kernel:
            return self._kernel
        held = self._held
        if kernel not in held:
            raise ServerError("it names a kernel that this site does not hold", where=self.site)
        newest = max(k.version for k in held.values())
        if held[kernel].version < newest:
            raise ServerError(
                f"it names kernel version {held[kernel].version}, this site has version {newest}",
                where=self.site,
                remedy="ask the server's administrator whether an old state was restored",
            )
        return held[kernel]

    @property
    def _has_ensemble(self) -> bool:
        return (self.store / "ensembles" / self._started.ensemble).is_dir()

    def _load(self) -> Ensemble:
        if self._ensemble is None:
            folder = self.store / "ensembles" / self._started.ensemble
            ensemble, digest = load_ensemble(folder, self.registry)
            if digest != self._started.ensemble:
                raise ConfigError("the stored ensemble has another digest", where=str(folder))
            self.settings.check_licences(ensemble.licences)
            self._ensemble = ensemble
        return self._ensemble

    def _peers(self, certificates: Mapping[str, bytes]) -> dict[str, PublicIdentity]:
        """Identities behind certificates, checked; this site's own must be its own."""
        if certificates.get(self.site, self.identity.certificate) != self.identity.certificate:
            raise ServerError("this site's own certificate came back altered", where=self.site)
        now = dt.datetime.now(dt.UTC)
        return {site: self.trust.check(site, pem, now) for site, pem in certificates.items()}

    def _query_statement(self, kernel: str) -> bytes:
        digest = handles_digest(self._queries)
        return query_statement(self.job, kernel, self.site, len(self._queries), digest)


def open_labels(released: ReleasedRows, kernel: Kernel) -> dict[int, Label]:
    """Open the labels of all released rows, by row number.

    Raises:
        ServerError: one was altered or moved.
    """
    return {
        row: open_label(released.labels[row].tobytes(), kernel, released.handles[row].tobytes())
        for row in range(len(released.handles))
    }


def _stack(handles: Sequence[str]) -> Handles:
    """Handles (n, ``HANDLE_BYTES``) from their hexadecimal digits."""
    return np.frombuffer(bytes.fromhex("".join(handles)), np.uint8).reshape(-1, HANDLE_BYTES)
