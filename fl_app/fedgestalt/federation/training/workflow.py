"""Server side of the training job.

Per round: every site gets the global model and offers a mask key; every site gets all keys, trains
and returns its update under masks; the server adds up and moves the global model by the mean. At
the end every site stores the published ensemble.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from nvflare.apis.analytix import AnalyticsDataType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.apis.utils.analytix_utils import create_analytic_dxo, send_analytic_dxo

from fedgestalt.errors import ConfigError, PeerError, ServerError
from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.job.workflow import PhasedWorkflow
from fedgestalt.federation.tasks import JOIN, PUBLISH, ROUND, UPDATE
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.messages import (
    Join,
    Publish,
    Published,
    RoundStart,
)
from fedgestalt.federation.training.rounds import (
    can_judge_labels,
    check_update_norm,
    clipping_warning,
    exponents_of,
    first_ranges,
    next_ranges,
    round_facts,
    split_metrics,
    training_facts,
)
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.ensemble import Ensemble, SharedState, build_ensemble, read_shared_state
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.messages import from_site

MAXIMUM_CLASSES = 1_000_000


class EnsembleTrainingWorkflow(PhasedWorkflow):
    """Trains the global ensemble.

    Args:
        ensemble: an :class:`~fedgestalt.learning.spec.EnsembleSpec` as a mapping.
        rounds: how many.
        max_images_per_site: public bound on the sample weights.
        aggregator_id: component id of a :class:`ZeroSumMaskAggregator`.
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
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
        max_update_norm: float = 1.0,
    ) -> None:
        super().__init__(
            sites, phase_limit_seconds, start_limit_seconds, silence_limit_seconds, rounds
        )
        self._max_update_norm = max_update_norm
        self._spec_fields, self._rounds = ensemble, rounds
        self._max_weight, self._aggregator_id = max_images_per_site, aggregator_id

    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Train; see the module docstring."""
        spec = read_options(EnsembleSpec, self._spec_fields, where="ensemble of the training job")
        aggregator = fl_ctx.get_engine().get_component(self._aggregator_id)
        if not isinstance(aggregator, ZeroSumMaskAggregator):
            raise ConfigError(
                f"component {self._aggregator_id!r} is no ZeroSumMaskAggregator",
                where="config_fed_server.json",
            )
        ensemble = self._join(spec, abort_signal, fl_ctx)
        state = read_shared_state(ensemble)
        ranges = first_ranges(state, spec)
        records, metrics = [], dict[str, dict[str, float]]()
        for number in range(1, self._rounds + 1):
            started = time.monotonic()
            exponents = exponents_of(ranges)
            facts = round_facts(
                job=fl_ctx.get_job_id(),
                attempt=1,
                round_number=number,
                state=state,
                exponents=exponents,
                max_weight=self._max_weight,
                roster=self.roster,
                spec=spec,
            )
            self.status.begin_round(number)
            aggregator.begin(facts)
            start = RoundStart(number, 1, self._max_weight, exponents, state)
            self.gather(ROUND, start, aggregator.accept_key, abort_signal, fl_ctx)
            keys = aggregator.key_roster()
            self.gather(UPDATE, keys, aggregator.accept_vector, abort_signal, fl_ctx)
            aggregate = aggregator.mean()
            if warning := clipping_warning(number, aggregate, facts.plan):
                self.status.warn(warning)
            update, metrics = split_metrics(aggregate.mean)
            check_update_norm(update, state, self._max_update_norm, "the mean of all updates")
            state = {name: values + update[name] for name, values in state.items()}
            ranges = next_ranges(ranges, aggregate)
            record = {
                "round": number,
                "images": aggregate.weight,
                "members": metrics,
                "clipped": sum(aggregate.clipped.values()),
                "uploaded_bytes_per_site": 4 * facts.plan.words,
                "seconds": round(time.monotonic() - started, 2),
            }
            records.append(record)
            self.progress.write("round", **record, rounds=self._rounds)
            self.status.end_round(metrics)
            self._send_metrics(number, record, fl_ctx)
        digest = self._publish(ensemble, state, metrics, abort_signal, fl_ctx)
        return {
            "rounds": records,
            "ensemble": digest,
            "classes": ensemble.classes,
            "labels_judged": can_judge_labels(_agreements(metrics), 1 / ensemble.classes),
        }

    def _send_metrics(self, number: int, record: Mapping[str, Any], fl_ctx: FLContext) -> None:
        """Offer the round's means to FLARE's metric receivers (TensorBoard, MLflow and others)."""
        values = {"images": record["images"], "seconds": record["seconds"]}
        for member, metrics in record["members"].items():
            values |= {f"{member}/{name}": value for name, value in metrics.items()}
        for tag, value in values.items():
            metric = create_analytic_dxo(
                tag, float(value), AnalyticsDataType.SCALAR, global_step=number
            )
            send_analytic_dxo(self, metric, fl_ctx)

    def _join(self, spec: EnsembleSpec, abort_signal: Signal, fl_ctx: FLContext) -> Ensemble:
        """Compare what the sites would start from, then build the same here."""
        registry = get_registry()
        built: list[Ensemble] = []

        def own_facts(stated: Mapping[str, Present]) -> dict[str, str]:
            classes = Counter(said.facts.get("classes", "") for said in stated.values())
            count = classes.most_common(1)[0][0]
            if not count.isdecimal() or not 2 <= int(count) <= MAXIMUM_CLASSES:
                return {}
            ensemble = build_ensemble(spec, int(count), registry)
            built.append(ensemble)
            return training_facts(ensemble, self.roster, self._max_weight, registry)

        self.join(JOIN, Join(self.roster, self._max_weight), own_facts, abort_signal, fl_ctx)
        if not built:
            raise ServerError("the sites do not say how many classes there are", where="handshake")
        return built[0]

    def _publish(
        self,
        ensemble: Ensemble,
        state: SharedState,
        metrics: Mapping[str, Mapping[str, float]],
        abort_signal: Signal,
        fl_ctx: FLContext,
    ) -> str:
        digest = save_ensemble(self.folder / "ensemble", ensemble, state)

        def on_reply(site: str, fields: object) -> None:
            published = Published.from_fields(fields, from_site(site))
            if published.digest != digest:
                raise PeerError("it stored another model than was published", site=site)
            if published.doubtful_labels:
                self.status.warn(
                    f"site {site!r}: the consortium's model agrees with far fewer of its labels"
                    " than with those of all sites; ask it to check its lookup table and"
                    " diagnoses. It was not left out."
                )

        message = Publish(digest, state, _agreements(metrics))
        self.gather(PUBLISH, message, on_reply, abort_signal, fl_ctx)
        return digest


def _agreements(metrics: Mapping[str, Mapping[str, float]]) -> NDArray[np.float32]:
    """The mean agreement of each trained member, in the order of their names."""
    return np.array([metrics[name]["agreement"] for name in sorted(metrics)], np.float32)
