"""Server side of the training job.

Per round: every site trains from the global model; then the sites open the sum of their updates
under secure aggregation (:mod:`.secure_round`), check it and move the model by its mean. Training
comes first, so that a site that is lost in the hours of training costs nothing but its update. At
the end every site stores the published ensemble.

A site that was lost takes part again as soon as it is back. After each round the server keeps a
checkpoint, from which another job can go on (``resume_from``).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo

from fedgestalt.errors import (
    ConfigError,
    FedgestaltError,
    PeerError,
    RoundFailedError,
    ServerError,
    SiteError,
)
from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.job.memory import give_back, keep_no_large_blocks
from fedgestalt.federation.job.transfer import DownloadDesk, UploadDesk
from fedgestalt.federation.job.workflow import OnReply, PhasedWorkflow
from fedgestalt.federation.tasks import APPLY, JOIN, PUBLISH, TRAIN
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.checkpoints import (
    CHECKPOINTS_FOLDER,
    Checkpoint,
    ServerCheckpoints,
)
from fedgestalt.federation.training.messages import (
    Apply,
    Join,
    Publish,
    Published,
    Receipt,
    Trained,
    TrainRound,
)
from fedgestalt.federation.training.model import GlobalModel
from fedgestalt.federation.training.rounds import (
    Aggregation,
    agreements,
    can_judge_labels,
    check_update_norm,
    clipping_warning,
    exponents_of,
    first_ranges,
    next_ranges,
    number_plan,
    read_metrics,
    shapes_of,
    training_facts,
)
from fedgestalt.federation.training.secure_round import Member, Opened, SecureRounds
from fedgestalt.federation.training.transcript import (
    TRANSCRIPT_FILE,
    Transcript,
    record_digest,
    round_record,
)
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.ensemble import (
    Outline,
    SharedState,
    build_ensemble,
    read_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.messages import Message, from_site
from fedgestalt.secagg import AES, CHACHA20, MINIMUM_SITES, Recipient, SessionFacts, Words

MAXIMUM_CLASSES = 1_000_000
WEIGHTS_FOLDER = Path("fedgestalt") / "weights"
"""In the server's workspace: files that jobs name to begin from."""
_TRIES = 3
"""How often one round may fail before the job does."""


class EnsembleTrainingWorkflow(PhasedWorkflow):
    """Trains the global ensemble.

    Args:
        ensemble: an :class:`~fedgestalt.learning.spec.EnsembleSpec` as a mapping.
        rounds: how many in all, those of a resumed job included.
        max_images_per_site: public bound on the sample weights.
        aggregator_id: component id of a :class:`ZeroSumMaskAggregator`.
        minimum_sites: fewest sites with which a round is summed.
        resume_from: id of a training job that ended early; empty to begin anew.
        sites: see :class:`PhasedWorkflow`.
        phase_limit_seconds: see :class:`PhasedWorkflow`.
        start_limit_seconds: see :class:`PhasedWorkflow`.
        silence_limit_seconds: see :class:`PhasedWorkflow`.
        max_update_norm: largest change of the model in one round, in norms of the model.
    """

    template: ClassVar[str] = "train_ensemble"

    def __init__(
        self,
        ensemble: dict[str, Any],
        rounds: int = 5,
        max_images_per_site: int = 4096,
        aggregator_id: str = "aggregator",
        minimum_sites: int = MINIMUM_SITES,
        resume_from: str = "",
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
        max_update_norm: float = 1.0,
    ) -> None:
        super().__init__(
            sites, phase_limit_seconds, start_limit_seconds, silence_limit_seconds, rounds
        )
        self._max_update_norm, self._minimum = max_update_norm, minimum_sites
        self._spec_fields, self._rounds = ensemble, rounds
        self._max_weight, self._aggregator_id = max_images_per_site, aggregator_id
        self._resume_from = self._kept_by = resume_from
        self._members: dict[str, Member] = {}
        self._current: set[str] = set()
        self._left_out: set[str] = set()
        self._agreed: Mapping[str, str] = {}
        self._round = 0
        self._records: list[dict[str, Any]] = []
        self._metrics: dict[str, dict[str, float]] = {}
        self._transcript = Transcript()
        self._outline: Outline | None = None
        self._start_state: SharedState = {}

    # FLARE's life cycle

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the folders, and whom to believe; open the desks for vectors."""
        super().start_controller(fl_ctx)
        keep_no_large_blocks()
        workspace = fl_ctx.get_engine().get_workspace()
        self._checkpoints = ServerCheckpoints(Path(workspace.get_root_dir()) / CHECKPOINTS_FOLDER)
        self._weights = Path(workspace.get_root_dir()) / WEIGHTS_FOLDER
        startup = Path(workspace.get_startup_kit_dir())
        # Sites prove themselves to each other; here it only tells whose fault a message is. The
        # simulator's server has no kit.
        provisioned = (startup / "rootCA.pem").exists()
        self._trust = Trust.from_kit(startup) if provisioned else Trust.of_anybody()
        self._uploads = UploadDesk(self.folder / "uploads")
        self._downloads = DownloadDesk()
        self._uploads.register(fl_ctx.get_engine())  # FLARE's START_RUN comes before this
        self._downloads.register(fl_ctx.get_engine())

    def goes_on_without(self, lost: Collection[str]) -> bool:
        """As long as there are enough sites for a round."""
        return len(self.roster) - len(lost) >= self._minimum

    # the job

    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Train; see the module docstring."""
        self._job, self._engine = fl_ctx.get_job_id(), fl_ctx.get_engine()
        self._spec = read_options(
            EnsembleSpec, self._spec_fields, where="ensemble of the training job"
        )
        aggregator = self._engine.get_component(self._aggregator_id)
        if not isinstance(aggregator, ZeroSumMaskAggregator):
            raise ConfigError(
                f"component {self._aggregator_id!r} is no ZeroSumMaskAggregator",
                where="config_fed_server.json",
            )
        self._aggregation = aggregator.aggregation(self._max_weight)
        self._reveals = self._aggregation.recipient is Recipient.SERVER

        def gather(
            task: str,
            messages: Message | Mapping[str, Message],
            on_reply: OnReply,
            sites: Collection[str],
            enough: Callable[[], bool],
        ) -> Collection[str]:
            return self.gather_present(
                task, messages, on_reply, abort_signal, fl_ctx, sites, enough
            )

        self._gather_from = gather
        rounds = SecureRounds(
            aggregator,
            gather,
            self._uploads,
            self._members,
            self._minimum,
            os.cpu_count() or 1,
            self.status.warn,
        )
        self._start(abort_signal, fl_ctx)
        try:
            while self._round < self._rounds:
                self._next_round(rounds, abort_signal, fl_ctx)
            digest = self._publish()
        except FedgestaltError as error:
            if self._kept_by:
                remedy = f"{error.remedy}; " if error.remedy else ""
                error.remedy = f"{remedy}round {self._round} is kept: to go on from it, submit the"
                error.remedy += f" job again with resume_from={self._kept_by}"
            raise
        finally:
            self._leave_transcript()
        self._checkpoints.drop(self._job)
        if self._resume_from:
            self._checkpoints.drop(self._resume_from)
        found = agreements(self._metrics)
        judged = self._reveals and can_judge_labels(found, 1 / self._classes)
        return {
            "rounds": self._records,
            "ensemble": digest,
            "classes": self._classes,
            "labels_judged": judged,
            "aggregation": {
                "scope": self._aggregation.scope,
                "rule": self._aggregation.rule,
                "reveal_aggregate_to": self._aggregation.recipient,
                "threat_model": self._aggregation.threat_model,
                "server_optimiser": self._aggregation.step.optimiser,
                "server_learning_rate": self._aggregation.step.learning_rate,
                "server_momentum": self._aggregation.step.momentum,
            },
            **({"resumed_from": self._resume_from} if self._resume_from else {}),
        }

    def _start(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The handshake, and the model to begin with."""
        checkpoint, kept = self._load_checkpoint()
        self._handshake(checkpoint, self.roster, abort_signal, fl_ctx)
        give_back()  # the network is gone, its parameters are in the start state
        model = GlobalModel(self._start_state, self._aggregation.step)
        self._shapes = shapes_of(model.state)
        self._model_digest = model.digest
        self._ranges = first_ranges(model.state, self._spec)
        if checkpoint is not None:
            self._round, self._records = checkpoint.round, list(checkpoint.records)
            self._ranges = dict(checkpoint.ranges)
            self._transcript = Transcript.of(dict(checkpoint.transcript))
            self._model_digest = bytes.fromhex(checkpoint.model)
            if kept is not None:
                model.take(kept)  # that of the same ensemble and aggregation
        self._model = model if self._reveals else None
        self._start_state = {}
        give_back()

    def _load_checkpoint(self) -> tuple[Checkpoint | None, SharedState | None]:
        if not self._resume_from:
            return None, None
        checkpoint, kept = self._checkpoints.load(self._resume_from)
        for what, here, there in (
            ("ensemble", self._spec.digest, checkpoint.spec),
            ("aggregation", _settings(self._aggregation), dict(checkpoint.aggregation)),
        ):
            if here != there:
                raise ConfigError(
                    f"the {what} of this job is not that of job {self._resume_from}",
                    where="resume_from",
                    remedy="submit it with the same settings",
                )
        if self._rounds < checkpoint.round:
            raise ConfigError(
                f"job {self._resume_from} has completed {checkpoint.round} rounds, this job asks"
                f" for {self._rounds} in all",
                where="resume_from",
                remedy="raise rounds",
            )
        return checkpoint, kept

    def _handshake(
        self,
        checkpoint: Checkpoint | None,
        sites: Collection[str],
        abort_signal: Signal,
        fl_ctx: FLContext,
    ) -> None:
        """Compare what the sites would start from, with the same built here."""
        registry, chosen = get_registry().with_weights(self._weights), self._aggregation

        def own_facts(stated: Mapping[str, Present]) -> Mapping[str, str]:
            if self._agreed:  # by those who were there; whoever comes late must fit
                return self._agreed
            counted = Counter(said.facts.get("classes", "") for said in stated.values())
            count = counted.most_common(1)[0][0]
            if not count.isdecimal() or not 2 <= int(count) <= MAXIMUM_CLASSES:
                return {}
            try:
                ensemble = build_ensemble(self._spec, int(count), registry)
            except (ConfigError, SiteError) as error:
                error.where = f"server, {error.where}"
                raise
            state = read_shared_state(ensemble)
            facts = training_facts(ensemble, state, self.roster, chosen, registry)
            self._outline = ensemble.outline()
            self._start_state = chosen.shared(state, self._spec)
            self._rest = {n: v for n, v in state.items() if n not in self._start_state}
            return facts

        message = Join(
            self.roster,
            chosen.max_weight,
            chosen.scope,
            chosen.rule,
            chosen.recipient,
            chosen.threat_model,
            chosen.step.optimiser,
            chosen.step.learning_rate,
            chosen.step.momentum,
            checkpoint.round if checkpoint else self._round,
            bytes.fromhex(checkpoint.model) if checkpoint else b"",
        )
        stated = self.join(JOIN, message, own_facts, abort_signal, fl_ctx, sites)
        self._agreed = self._agreed or next((said.facts for said in stated.values()), {})
        self._classes = self._outlined.classes
        self._admit(stated)

    @property
    def _outlined(self) -> Outline:
        if self._outline is None:
            raise ServerError("the sites do not say how many classes there are", where="handshake")
        return self._outline

    def _admit(self, stated: Mapping[str, Present]) -> None:
        now = dt.datetime.now(dt.UTC)
        for site, said in stated.items():
            identity = self._trust.check(site, said.certificate, now)
            self._members[site] = Member(said.certificate, identity, said.cipher)
            self._current.add(site)

    # rounds

    def _next_round(self, rounds: SecureRounds, abort_signal: Signal, fl_ctx: FLContext) -> None:
        number, started = self._round + 1, time.monotonic()
        self.status.begin_round(number)
        for attempt in range(1, _TRIES + 1):
            sites = self._sites_of_round(abort_signal, fl_ctx)
            try:
                opened = self._open_sum(rounds, number, sites)
                break
            except RoundFailedError as error:
                if attempt == _TRIES or abort_signal.triggered:
                    raise
                self.status.warn(f"round {number} begins anew: {error}")
        for site in opened.survivors:
            self.status.uploaded(site, 4 * opened.facts.plan.words)
        record = self._apply(number, opened)
        record["seconds"] = round(time.monotonic() - started, 2)
        self._records.append(record)
        self._keep_checkpoint(number)
        self._round, self._kept_by = number, self._job
        self.progress.write("round", **record, rounds=self._rounds)
        self.status.end_round(self._metrics)
        self._send_metrics(number, record, fl_ctx)

    def _sites_of_round(self, abort_signal: Signal, fl_ctx: FLContext) -> set[str]:
        """Whoever is there now; sites that come late, or come back, are let in."""
        lost = self.lost_sites(self.roster)
        for site in self.roster:
            known = site in self._members or site in self._left_out
            if known or site in lost or not self.is_up(site):
                continue
            if not self._reveals and self._round:
                continue  # nobody could give it the model
            try:
                self._handshake(None, [site], abort_signal, fl_ctx)
            except FedgestaltError as error:
                self._left_out.add(site)
                self.status.warn(f"site {site!r} came late and is left out: {error}")
        able = self._members.keys() if self._reveals else self._current
        sites = set(able) - lost.keys()
        if len(sites) < self._minimum:
            names = ", ".join(sorted(set(self.roster) - sites))
            raise RoundFailedError(
                f"{len(sites)} sites are there, the job asks for {self._minimum} (lost: {names})",
                where=f"round {self._round + 1}",
                remedy="bring the lost sites back",
            )
        return sites

    def _open_sum(self, rounds: SecureRounds, number: int, sites: set[str]) -> Opened:
        exponents = exponents_of(self._ranges)
        if self._model is not None:
            self._downloads.offer(self._model_digest.hex(), self._model.flat, self.roster)

        def on_trained(site: str, fields: object) -> None:
            if Trained.from_fields(fields, from_site(site)).round != number:
                raise PeerError("it trained another round", site=site)

        message = TrainRound(number, self._model_digest, exponents)
        lost = self._gather_from(TRAIN, message, on_trained, sites, lambda: False)
        self._downloads.withdraw()
        trained = sites - set(lost)

        def facts_of(roster: tuple[str, ...], attempt: int) -> SessionFacts:
            ciphers = {self._members[site].cipher for site in roster}
            return SessionFacts(
                job=self._job,
                round=number,
                attempt=attempt,
                model_digest=self._model_digest,
                plan=number_plan(
                    self._shapes,
                    exponents,
                    len(roster),
                    self._aggregation,
                    self._spec,
                    self._classes,
                ),
                roster={site: self._members[site].identity.fingerprint for site in roster},
                threshold=self._aggregation.threat_model.threshold(len(roster)),
                recipient=self._aggregation.recipient,
                cipher=AES if ciphers == {AES} else CHACHA20,
            )

        return rounds.open_sum(trained, facts_of)

    def _apply(self, number: int, opened: Opened) -> dict[str, Any]:
        """Let server and sites check the sum and move their models; returns what to record."""
        facts = opened.facts
        record: dict[str, Any] = {
            "round": number,
            "sites": list(opened.survivors),
            "uploaded_bytes_per_site": 4 * facts.plan.words,
        }
        words = opened.take_words()
        expected = b"" if self._model is None else self._step(self._model, opened, words, record)
        # From disk: in memory it would lie beside the model while FLARE sends it.
        self._downloads.offer_from_disk(facts.digest.hex(), words, facts.roster, self.folder)
        del words
        signed = self._collect_receipts(opened, expected)
        self._current = set(signed)
        return record

    def _step(
        self, model: GlobalModel, opened: Opened, words: Words, record: dict[str, Any]
    ) -> bytes:
        """Check the sum and move the server's model; returns the record that sites will sign."""
        facts = opened.facts
        aggregate = facts.plan.decode(words)
        if warning := clipping_warning(facts.round, aggregate, facts.plan):
            self.status.warn(warning)
        bound = self._max_update_norm
        change = model.change(aggregate.mean)
        check_update_norm(change, model.state, bound, "the mean of all updates")
        self._metrics = read_metrics(aggregate.mean)
        self._ranges = next_ranges(self._ranges, aggregate, facts.round)
        model.step(aggregate.mean)
        clipped = sum(aggregate.clipped.values())
        record |= {"images": aggregate.weight, "members": self._metrics, "clipped": clipped}
        return round_record(
            facts,
            agreement=opened.agreement,
            survivors=opened.survivors,
            sum_digest=hashlib.sha256(words.data).digest(),
            weight=aggregate.weight,
            clipped=clipped,
            model_after=model.digest,
            previous=self._transcript.last,
        )

    def _collect_receipts(self, opened: Opened, expected: bytes) -> dict[str, bytes]:
        """Have the sites apply the sum; all of them must sign one record."""
        records: dict[str, bytes] = {}
        signed: dict[str, bytes] = {}

        def on_receipt(site: str, fields: object) -> None:
            receipt = Receipt.from_fields(fields, from_site(site))
            told = expected or next(iter(records.values()), receipt.record)
            if receipt.record != told:
                raise PeerError(
                    "its record of the round differs from that of the others", site=site
                )
            self._members[site].identity.verify(record_digest(receipt.record), receipt.signature)
            records[site], signed[site] = receipt.record, receipt.signature
            self.status.sent(site, 4 * opened.facts.plan.words)

        message = Apply(opened.facts.digest, opened.survivors, self._transcript.last)
        there = set(opened.survivors) - self.lost_sites(opened.survivors).keys()
        self._gather_from(APPLY, message, on_receipt, there, lambda: False)
        self._downloads.withdraw()
        if len(signed) < opened.facts.threshold:
            raise RoundFailedError(
                f"{len(signed)} sites have applied the sum, {opened.facts.threshold} are needed",
                where=f"round {opened.facts.round}",
            )
        record = next(iter(records.values()))
        certificates = {site: self._members[site].certificate for site in signed}
        self._transcript.add(record, signed, certificates)
        self._model_digest = self._transcript.model_after
        return signed

    def _keep_checkpoint(self, number: int) -> None:
        checkpoint = Checkpoint(
            job=self._job,
            round=number,
            spec=self._spec.digest,
            aggregation=_settings(self._aggregation),
            model=self._model_digest.hex(),
            ranges=self._ranges,
            records=self._records,
            transcript=self._transcript.document(),
        )
        self._checkpoints.save(checkpoint, self._model.tensors if self._model else None)

    def _leave_transcript(self) -> None:
        """Write the transcript; a full disk must not hide why the job ended."""
        try:
            self._transcript.write(self.folder)
        except OSError as error:
            self.status.warn(f"{TRANSCRIPT_FILE} cannot be written ({error.strerror}).")

    def _send_metrics(self, number: int, record: Mapping[str, Any], fl_ctx: FLContext) -> None:
        """Offer the round's means to FLARE's metric receivers (TensorBoard, MLflow and others)."""
        values = {name: record[name] for name in ("images", "seconds") if name in record}
        for member, metrics in record.get("members", {}).items():
            values |= {f"{member}/{name}": value for name, value in metrics.items()}
        for tag, value in values.items():
            metric = create_analytic_dxo(
                tag, float(value), AnalyticsDataType.SCALAR, global_step=number
            )
            send_analytic_dxo(self, metric, fl_ctx)

    def _publish(self) -> str:
        """Have the sites keep the model; returns the digest of the ensemble."""
        digests: dict[str, str] = {}
        if self._model is not None:
            state = {**self._rest, **self._model.state}
            digests[""] = save_ensemble(self.folder / "ensemble", self._outlined, state)
            self._downloads.offer(self._model_digest.hex(), self._model.flat, self.roster)

        def on_reply(site: str, fields: object) -> None:
            published = Published.from_fields(fields, from_site(site))
            if published.digest != next(iter(digests.values()), published.digest):
                raise PeerError("it stored another model than was published", site=site)
            digests[site] = published.digest
            if published.doubtful_labels:
                self.status.warn(
                    f"site {site!r}: the consortium's model agrees with far fewer of its labels"
                    " than with those of all sites; ask it to check its lookup table and"
                    " diagnoses. It was not left out."
                )

        able = self._members.keys() if self._reveals else self._current
        there = set(able) - self.lost_sites(able).keys()
        self._gather_from(PUBLISH, Publish(self._model_digest), on_reply, there, lambda: False)
        if missing := sorted(set(self.roster) - digests.keys()):
            names = ", ".join(missing)
            self.status.warn(f"{names} did not store the model: run a job with them, or copy it.")
        if not digests:
            raise ServerError("no site has stored the model", where="publication")
        return next(iter(digests.values()))


def _settings(aggregation: Aggregation) -> dict[str, Any]:
    return dataclasses.asdict(aggregation)
