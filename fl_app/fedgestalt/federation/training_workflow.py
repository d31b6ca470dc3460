"""Server side of the training job.

Per round: every site gets the global model and offers a mask key; every site gets all keys, trains
and returns its update under masks; the server adds up and moves the global model by the mean. At
the end every site stores the published ensemble.
"""

from __future__ import annotations

import time
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal

import fedgestalt
from fedgestalt.errors import ConfigError, PeerError
from fedgestalt.federation.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.rounds import (
    exponents_of,
    first_ranges,
    next_ranges,
    round_facts,
    split_metrics,
)
from fedgestalt.federation.training_messages import (
    Join,
    Joined,
    Publish,
    Published,
    RoundStart,
)
from fedgestalt.federation.workflow import PhasedWorkflow
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.ensemble import Ensemble, SharedState, build_ensemble, read_shared_state
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt.messages import from_site

JOIN, ROUND, UPDATE, PUBLISH = "fgm_join", "fgm_round", "fgm_update", "fgm_publish"


class EnsembleTrainingWorkflow(PhasedWorkflow):
    """Trains the global ensemble.

    Args:
        ensemble: an :class:`~fedgestalt.learning.spec.EnsembleSpec` as a mapping.
        rounds: how many.
        max_images_per_site: public bound on the sample weights.
        aggregator_id: component id of a :class:`ZeroSumMaskAggregator`.
        sites: see :class:`PhasedWorkflow`.
        phase_limit_seconds: see :class:`PhasedWorkflow`.
    """

    def __init__(
        self,
        ensemble: dict[str, Any],
        rounds: int = 5,
        max_images_per_site: int = 4096,
        aggregator_id: str = "aggregator",
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
    ) -> None:
        super().__init__(sites, phase_limit_seconds)
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
        records = []
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
            aggregator.begin(facts)
            start = RoundStart(number, 1, self._max_weight, exponents, state)
            self.gather(ROUND, start, aggregator.accept_key, abort_signal, fl_ctx)
            keys = aggregator.key_roster()
            self.gather(UPDATE, keys, aggregator.accept_vector, abort_signal, fl_ctx)
            aggregate = aggregator.mean()
            update, metrics = split_metrics(aggregate.mean)
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
        digest = self._publish(ensemble, state, abort_signal, fl_ctx)
        return {"rounds": records, "ensemble": digest, "classes": ensemble.classes}

    def _join(self, spec: EnsembleSpec, abort_signal: Signal, fl_ctx: FLContext) -> Ensemble:
        """Compare what the sites would start from, then build the same here."""
        joined: dict[str, Joined] = {}

        def on_reply(site: str, fields: object) -> None:
            joined[site] = Joined.from_fields(fields, from_site(site))

        self.gather(JOIN, Join(self.roster), on_reply, abort_signal, fl_ctx)
        first = self.roster[0]
        for site in self.roster:
            for what, remedy in (
                ("version", "install the same version of fedgestalt everywhere"),
                ("label_map", "use the consortium's syndrome table and class list at every site"),
                ("classes", "use the consortium's class list at every site"),
                ("start_model", "install the same versions of backbone plugins and weights"),
            ):
                ours, theirs = getattr(joined[first], what), getattr(joined[site], what)
                if ours != theirs:
                    difference = f"its {what.replace('_', ' ')} differs from that of {first}"
                    raise PeerError(difference, site=site, remedy=remedy)
        ensemble = build_ensemble(spec, joined[first].classes, get_registry())
        if joined[first].version != fedgestalt.__version__:
            raise ConfigError(
                f"the sites run version {joined[first].version}, the server"
                f" {fedgestalt.__version__}"
            )
        if joined[first].start_model != ensemble.start_digest:
            raise ConfigError(
                "the start model of the sites differs from the server's",
                remedy="install the same versions of backbone plugins and weights at the server",
            )
        return ensemble

    def _publish(
        self, ensemble: Ensemble, state: SharedState, abort_signal: Signal, fl_ctx: FLContext
    ) -> str:
        digest = save_ensemble(self.folder / "ensemble", ensemble, state)

        def on_reply(site: str, fields: object) -> None:
            stored = Published.from_fields(fields, from_site(site)).digest
            if stored != digest:
                raise PeerError("it stored another model than was published", site=site)

        self.gather(PUBLISH, Publish(digest, state), on_reply, abort_signal, fl_ctx)
        return digest
