"""A site's side of the training job."""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.federation import tasks
from fedgestalt.federation.job.executor import Handler, SiteExecutor
from fedgestalt.federation.job.handshake import Present, present
from fedgestalt.federation.site.features import CACHE_FOLDER, compute_ahead
from fedgestalt.federation.site.outgoing import record_sent
from fedgestalt.federation.training.checkpoints import MODELS_FOLDER, SiteCheckpoints
from fedgestalt.federation.training.messages import (
    Apply,
    Join,
    Publish,
    Published,
    Receipt,
    SendVector,
    SessionStart,
    Trained,
    TrainRound,
    Uploaded,
)
from fedgestalt.federation.training.model import GlobalModel
from fedgestalt.federation.training.rounds import (
    OWN_UPDATE,
    Aggregation,
    agreements,
    can_judge_labels,
    check_update_norm,
    number_plan,
    read_metrics,
    row_weights,
    shapes_of,
    training_facts,
    with_metrics,
)
from fedgestalt.federation.training.transcript import record_digest, round_record
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.data import held_out_set, local_seed, training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import (
    SharedState,
    build_ensemble,
    read_shared_state,
    weight_licences,
)
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.learning.training import LocalTrainer
from fedgestalt.messages import from_server
from fedgestalt.secagg import (
    AES,
    CHACHA20,
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    Recipient,
    SessionFacts,
    ShareOffer,
    SitePolicy,
    SiteSession,
    Survivors,
    ThreatModel,
    UnmaskShares,
)
from fedgestalt.secagg.stream import calibrate

log = logging.getLogger(__name__)
_RARELY = 0.01


class EnsembleTrainer(SiteExecutor):
    """Trains every member on the site's images and gives the update away under masks alone.

    Args:
        ensemble: the same specification as the workflow's.
        phase_limit_seconds: how long a transfer may take.
    """

    template: ClassVar[str] = "train_ensemble"

    def __init__(self, ensemble: dict[str, Any], phase_limit_seconds: float = 3600.0) -> None:
        super().__init__(phase_limit_seconds)
        self._spec_fields = ensemble
        self._trainer: LocalTrainer | None = None
        self._round: TrainRound | None = None
        self._update: SharedState | None = None
        self._session: SiteSession | None = None
        self._attempt = 0
        self._metrics: dict[str, dict[str, float]] = {}
        self._agreement: dict[str, float] = {}
        self._last_record = b""

    def handlers(self) -> Mapping[str, Handler]:
        """Tasks of the training job."""
        return {
            tasks.JOIN: self._join,
            tasks.TRAIN: self._train,
            tasks.KEYS: self._offer_keys,
            tasks.SHARES: self._share,
            tasks.VECTOR: self._send_vector,
            tasks.SURVIVORS: self._endorse,
            tasks.UNMASK: self._unmask,
            tasks.APPLY: self._apply,
            tasks.PUBLISH: self._store,
        }

    def _join(self, fields: object) -> Present:
        join = Join.from_fields(fields, from_server)
        self.settings.check_roster(self.site, join.roster)
        chosen = self._aggregation = Aggregation.named(
            scope=join.scope,
            rule=join.rule,
            recipient=join.recipient,
            threat_model=join.threat_model,
            max_weight=join.max_weight,
            optimiser=join.optimiser,
            learning_rate=join.learning_rate,
            momentum=join.momentum,
        )
        self.settings.check_aggregation(chosen.recipient, chosen.threat_model)
        self._spec = read_options(
            EnsembleSpec, self._spec_fields, where="ensemble of the training job"
        )
        registry = self.registry
        self.settings.check_licences(weight_licences(self._spec, registry))
        self._roster = join.roster
        data = training_set(self.cohort)
        ensemble = build_ensemble(self._spec, data.classes, registry)
        self.settings.check_licences(ensemble.licences)
        self._outline = ensemble.outline()
        state = read_shared_state(ensemble)
        self._model = GlobalModel(chosen.shared(state, self._spec), chosen.step)
        self._rest = {n: v for n, v in state.items() if n not in self._model.state}
        self._own = self._trained_own = dict(self._rest)
        self._checkpoints = SiteCheckpoints(self.store / MODELS_FOLDER)
        if join.model and chosen.recipient is Recipient.SITES and not self._recall(join.model):
            raise SiteError(
                f"it does not hold the model of round {join.round}, and where the server does not"
                " learn the sum nobody can give it",
                remedy="leave it out, or begin a new job",
            )
        device = choose_device(self.settings.device)
        seed, cache = local_seed(self._spec.seed, self.site), self.store / CACHE_FOLDER
        held_out = held_out_set(self.cohort)
        self._trainer = LocalTrainer(ensemble, data, device, seed, cache, held_out=held_out)
        facts = training_facts(ensemble, state, join.roster, chosen, registry)
        facts["label map"] = self.cohort.label_map_digest
        cipher = AES if _calibrated().aes_is_fast else CHACHA20
        return present(facts, self.identity.certificate, cipher)

    def _train(self, fields: object) -> Trained:
        message = TrainRound.from_fields(fields, from_server)
        trainer, model = self._joined, self._model
        self._session = self._update = None
        if model.digest != message.model:
            self._last_record = b""  # it has missed a round, and the record of it
        self._reach(message.model)

        def progress(member: str, done: int, total: int) -> None:
            self.counter(member)(done, total)

        if not trainer.features:
            records = self.cohort.records(self.cohort.train)
            compute_ahead(self.settings, self.site, self._spec, records, trainer.seed, progress)
        repeat = self._checkpoints.times_sent(message.model)
        start = {**self._own, **model.state}
        new, metrics = trainer.run_round(start, message.round, progress, repeat)
        self._trained_own = {name: new[name] for name in self._own}
        for name, values in model.state.items():
            if new[name].shape != values.shape:
                raise SiteError(f"its training changed the shape of tensor {name}")
            np.subtract(new[name], values, out=new[name])
        update = {name: new[name] for name in model.state}
        check_update_norm(update, model.state, self.settings.max_update_norm, OWN_UPDATE)
        self._agreement = {
            name: m.agreement for name, m in metrics.items() if m.agreement is not None
        }
        self._round, self._update = message, with_metrics(update, metrics)
        return Trained(message.round)

    def _reach(self, digest: bytes) -> None:
        """Have the model with this digest: it is here, kept from before, or at the server."""
        model = self._model
        if model.digest == digest or self._recall(digest):
            return
        if self._aggregation.recipient is Recipient.SITES:
            raise SiteError(
                "it has missed a round, and where the server does not learn the sum nobody can give"
                " it the model",
                remedy="the others can go on without it",
            )
        flat = np.empty_like(model.flat)
        self.fetch(digest.hex(), flat)
        if not np.isfinite(flat).all():
            raise ServerError("the model holds NaN or infinity", where=self.site)
        model.load(flat)
        if model.digest != digest:
            raise ServerError("the model does not have the digest it names", where=self.site)
        if not model.moves_by(self._aggregation.step):
            raise ServerError("the model moves in another way than the job says", where=self.site)

    def _recall(self, digest: bytes) -> bool:
        kept = self._checkpoints.find(digest)
        if kept is None or not self._model.take(kept):
            return False
        own = self._checkpoints.find_own(digest)
        if own is not None and shapes_of(own) == shapes_of(self._own):
            self._own = own
        return True

    # one session of secure aggregation

    def _offer_keys(self, fields: object) -> KeyOffer:
        start = SessionStart.from_fields(fields, from_server)
        trained = self._round
        if trained is None or self._update is None or start.round != trained.round:
            raise ServerError("a session came without an update to sum", where=self.site)
        if start.attempt <= self._attempt:
            raise ServerError("a session came for the second time", where=self.site)
        if start.certificates.get(self.site) != self.identity.certificate:
            raise ServerError("this site's own certificate came back altered", where=self.site)
        if not start.certificates.keys() <= set(self._roster):
            raise ServerError("a site takes part that is not in the job's roster", where=self.site)
        now = dt.datetime.now(dt.UTC)
        peers = {
            site: self.trust.check(site, certificate, now)
            for site, certificate in start.certificates.items()
        }
        plan = number_plan(
            shapes_of(self._model.state),
            trained.exponents,
            len(peers),
            self._aggregation,
            self._spec,
            self._joined.data.classes,
        )
        facts = SessionFacts(
            job=self.job,
            round=start.round,
            attempt=start.attempt,
            model_digest=self._model.digest,
            plan=plan,
            roster={site: peer.fingerprint for site, peer in peers.items()},
            threshold=start.threshold,
            recipient=self._aggregation.recipient,
            cipher=start.cipher,
        )
        policy = SitePolicy(
            self.settings.minimum_sites,
            self.settings.minimum_survivors,
            ThreatModel(self.settings.threat_model),
        )
        others = {site: peer for site, peer in peers.items() if site != self.site}
        self._attempt, self._facts = start.attempt, facts
        self._session = SiteSession(self.site, facts, self.identity, others, policy=policy)
        return self._session.offer_keys()

    def _share(self, fields: object) -> ShareOffer:
        return self._open_session.share(KeyList.from_fields(fields, from_server))

    def _send_vector(self, fields: object) -> Uploaded:
        session, plan, update = self._open_session, self._facts.plan, self._update
        message = SendVector.from_fields(fields, from_server)
        session.receive(message.delivery)
        if update is None:
            raise ServerError("a session came without an update to sum", where=self.site)
        targets = self._joined.data.targets
        words = plan.encode(update, len(targets), row_weights(plan, targets))
        self._update = None
        session.mask(words, threads=torch.get_num_threads())
        self._checkpoints.note_sent(self._facts.model_digest)
        record_sent(self.store, self.job, tasks.VECTOR, "masked vector", words.nbytes)
        self.send(self._facts.digest.hex(), message.ticket, words)
        return Uploaded(self._facts.digest)

    def _endorse(self, fields: object) -> Endorsement:
        return self._open_session.endorse(Survivors.from_fields(fields, from_server))

    def _unmask(self, fields: object) -> UnmaskShares:
        return self._open_session.unmask(Endorsements.from_fields(fields, from_server))

    # after the session

    def _apply(self, fields: object) -> Receipt:
        message = Apply.from_fields(fields, from_server)
        session, facts, model = self._open_session, self._facts, self._model
        survivors, signed = message.survivors, session.survivors
        # A site that was silent when the survivors were named has signed none.
        fits = survivors == signed if signed else self._can_survive(survivors)
        if message.session != facts.digest or not fits:
            raise ServerError(
                "the sum is not the one that this site helped to open", where=self.site
            )
        if self._last_record and message.previous != self._last_record:
            raise ServerError("the record before is not the one this site signed", where=self.site)
        words = np.empty(facts.plan.words, np.uint32)
        self.fetch(message.session.hex(), words)
        sum_digest = hashlib.sha256(words.data).digest()
        if facts.recipient is Recipient.SITES:
            session.unveil(words, survivors, threads=torch.get_num_threads())
        aggregate = facts.plan.decode(words)
        whose = "the consortium's last update"
        change = model.change(aggregate.mean)
        check_update_norm(change, model.state, self.settings.max_update_norm, whose)
        self._metrics = read_metrics(aggregate.mean)
        model.step(aggregate.mean)
        record = round_record(
            facts,
            agreement=session.agreement,
            survivors=survivors,
            sum_digest=sum_digest,
            weight=aggregate.weight,
            clipped=sum(aggregate.clipped.values()),
            model_after=model.digest,
            previous=message.previous,
        )
        self._own = self._trained_own
        self._checkpoints.keep(model.digest, model.tensors, self._own)
        self._session = None
        self._last_record = record_digest(record)
        return Receipt(record, self.identity.sign(self._last_record))

    def _can_survive(self, sites: Sequence[str]) -> bool:
        """Whether a sum over ``sites`` could have been opened."""
        roster, threshold = self._facts.roster.keys(), self._facts.threshold
        return {self.site, *sites} <= roster and len(set(sites)) >= threshold

    def _store(self, fields: object) -> Published:
        publish = Publish.from_fields(fields, from_server)
        self._reach(publish.model)
        state = {**self._rest, **self._model.state}
        digest = self._outline.digest(state)
        save_ensemble(self.store / "ensembles" / digest, self._outline, state)
        own = np.array([self._agreement[name] for name in sorted(self._agreement)])
        everybody = agreements(self._metrics)
        held_out, chance = self._joined.held_out, 1 / self._joined.data.classes
        count = len(held_out.targets) if held_out else 0
        doubtful = labels_are_doubtful(own, everybody, count, chance)
        if doubtful:
            log.warning(
                "the consortium's model agrees with %.0f %% of this site's held-out labels and"
                " %.0f %% of all sites': check the lookup table and the diagnoses",
                *(100 * own.mean(), 100 * everybody.mean()),
            )
        return Published(digest, int(doubtful))

    @property
    def _joined(self) -> LocalTrainer:
        if self._trainer is None:
            raise ServerError("a round came before the site had joined", where=self.site)
        return self._trainer

    @property
    def _open_session(self) -> SiteSession:
        if self._session is None:
            raise ServerError("a message came without a session", where=self.site)
        return self._session


@functools.cache
def _calibrated() -> Any:
    return calibrate(time.perf_counter)


def labels_are_doubtful(
    own: NDArray[np.floating], everybody: NDArray[np.floating], images: int, chance: float
) -> bool:
    """Whether the consortium's model agrees with far fewer of one site's labels than with all.

    That is: with less than half as many, and so few that it would come about once in a hundred
    times at a site like the others (binomial test).

    Args:
        own: (members,) share of the site's held-out images that each member of the model that came
            into the last round classified as labelled.
        everybody: the same over all sites; negative where nobody could measure it.
        images: how many held-out images the site has.
        chance: agreement of a model that knows nothing; nothing is doubtful before the consortium's
            is twice as good.
    """
    if own.shape != everybody.shape or not own.size or not images:
        return False
    usual, here = float(everybody.mean()), float(own.mean())
    if not can_judge_labels(everybody, chance) or here >= usual / 2:
        return False
    usual = min(usual, 1.0)
    right = math.floor(here * images + 1e-6)  # 3 / 47 * 47 is less than 3
    so_few = sum(
        math.comb(images, k) * usual**k * (1 - usual) ** (images - k) for k in range(right + 1)
    )
    return so_few < _RARELY
