"""What server and sites compute alike for one round: ranges, number plan, metrics, norms."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.federation.job.handshake import versions
from fedgestalt.federation.training.model import MEAN_ITSELF, Optimiser, ServerStep
from fedgestalt.hooks.registry import Registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    is_classifier,
    is_statistic,
    local_norms,
)
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.training import MemberMetrics
from fedgestalt.learning.weights import weights_digest
from fedgestalt.secagg import (
    Aggregate,
    CountPlan,
    NumberPlan,
    Recipient,
    TensorPlan,
    ThreatModel,
    blocks_of,
)

METRICS = ".metrics/"
"""Prefix of the tensors of metrics that are summed under the masks with the update; no member can
have such a name."""

METRIC_NAMES = ("loss", "accuracy", "agreement", "measured")
"""``agreement`` counts where ``measured`` is 1: a site may have no held-out image."""
UNKNOWN = -1.0
"""As the mean agreement: no site could measure it."""
OWN_UPDATE = "this site's update"
"""For :func:`check_update_norm`, before the site masks it."""

_ITS_OWN = "its training has diverged: lower the learning rate, and check the site's images"
_SOMEBODYS = (
    "a site's training has diverged or a site is faulty, and under the masks nobody can tell which:"
    " lower the learning rate, or run the job without one site at a time to find it"
)
_MANY_CLIPPED = 0.1
"""Of one site's values; honest training clips a thousandth at most, even of tiny networks."""
_METRICS_RANGE = 16.0
_SOME_SITE = 1e-4
_MARGIN = 16.0
"""A site may move a value much further than all do on average: what only it has a syndrome for."""
_SEARCHED_ROUNDS, _SEARCH, _SHRINK = 2, 2.0**-10, 0.97
"""In the first rounds a range comes down to where it belongs; then it shrinks by at most 3 % a
round. Were it to follow the mean at once, it would clip again soon after every clip."""
_LEAST_RANGE, _MOST_RANGE = 2.0**-126, 2.0**127
"""Of float32; a tensor that never moves comes down to the first after a dozen rounds."""
_BLOCK = 1 << 16
_CLASSES = "classes"
"""Name of the counts that weight a classifier's rows."""


class Scope(enum.StrEnum):
    """What sites aggregate."""

    ALL = "all"
    """Everything that they train."""

    ENCODER = "encoder"
    """All but the classifiers: what a hospital alone knows of a syndrome stays there."""


class Rule(enum.StrEnum):
    """How updates are averaged."""

    MEAN = "mean"
    """By the number of each site's training images."""

    CLASS_WEIGHTED = "class-weighted"
    """The same, but a classifier's row over those sites alone that have images of the class."""


@dataclass(frozen=True)
class Aggregation:
    """How a job aggregates; the same everywhere.

    Attributes:
        scope: what.
        rule: how.
        recipient: who learns the sum.
        threat_model: what the server may do; sets the threshold.
        max_weight: public bound on a site's training images.
        step: how the model moves by a mean update.
    """

    scope: Scope = Scope.ALL
    rule: Rule = Rule.MEAN
    recipient: Recipient = Recipient.SERVER
    threat_model: ThreatModel = ThreatModel.MALICIOUS
    max_weight: int = 4096
    step: ServerStep = MEAN_ITSELF

    @classmethod
    def named(
        cls,
        *,
        scope: str,
        rule: str,
        recipient: str,
        threat_model: str,
        max_weight: int,
        optimiser: str,
        learning_rate: float,
        momentum: float,
    ) -> Aggregation:
        """From the words and numbers of a message; raises ServerError for one that is none."""
        try:
            chosen = Scope(scope), Rule(rule), Recipient(recipient), ThreatModel(threat_model)
            moving = Optimiser(optimiser)
        except ValueError as error:
            raise ServerError(f"the job asks for an aggregation of which {error}") from None
        if not 0 <= momentum < 1:
            raise ServerError(f"the job asks for a server momentum of {momentum}, not 0 to below 1")
        if not 0 < learning_rate < math.inf:
            raise ServerError(
                f"the job asks for a server learning rate of {learning_rate}, not one above 0"
            )
        return cls(*chosen, max_weight, ServerStep(moving, learning_rate, momentum))

    def shared(self, state: SharedState, spec: EnsembleSpec) -> SharedState:
        """The part of an ensemble's state that is aggregated; the rest never leaves the sites."""
        kept = set(local_norms(spec, state))
        if self.scope is Scope.ENCODER:
            kept |= {name for name in state if is_classifier(name)}
        return {name: values for name, values in state.items() if name not in kept}


def training_facts(
    ensemble: Ensemble,
    state: SharedState,
    roster: tuple[str, ...],
    aggregation: Aggregation,
    registry: Registry,
) -> dict[str, str]:
    """What everybody in a training job must have alike; compared in the handshake.

    Args:
        ensemble: the start model.
        state: its shared state.
        roster: all sites.
        aggregation: the job's.
        registry: of the plugins.

    Raises:
        PlanError: the sum could overflow.
    """
    spec = ensemble.spec
    shared = aggregation.shared(state, spec)
    exponents = exponents_of(first_ranges(shared, spec))
    shapes = shapes_of(shared)
    plan = number_plan(shapes, exponents, len(roster), aggregation, spec, ensemble.classes)
    return {
        **versions(map(registry.backbones.entry, ensemble.backbones)),
        "classes": str(ensemble.classes),
        "start model": ensemble.start_digest,
        "number plan": plan.digest.hex(),
        **{f"weights {name}": weights_digest(path) for name, path in ensemble.weights.items()},
    }


def check_update_norm(
    update: Mapping[str, NDArray[np.float32]], state: SharedState, bound: float, whose: str
) -> None:
    """Refuse a change of the model that is not finite, or many times as large as the model.

    Running statistics of normalisation layers are left out: they follow the data.

    Raises:
        SiteError: names the largest change allowed and what came.
    """
    squares = {"update": 0.0, "model": 0.0}
    for name, values in state.items():
        counts = not is_statistic(name)
        for _, change in blocks_of(update, name):
            if not np.isfinite(change).all():
                raise SiteError(
                    f"{whose} holds NaN or infinity",
                    where=f"tensor {name}",
                    remedy="lower the learning rate in the job, and check the images of the site",
                )
            if counts:
                squares["update"] += _square(change)
        if counts:
            squares["model"] += _square(values)
    if squares["update"] > bound**2 * squares["model"]:
        ratio = math.sqrt(squares["update"] / max(squares["model"], 1e-30))
        raise SiteError(
            f"{whose} is {ratio:.3g} times as large as the model, at most {bound:.3g} is allowed",
            remedy=_ITS_OWN if whose == OWN_UPDATE else _SOMEBODYS,
        )


def _square(values: NDArray[np.float32]) -> float:
    """Sum of squares, in blocks whose sums are added in float64."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))
    return math.fsum(float(np.dot(block, block)) for block in map(np.float64, blocks))


def clipping_warning(round_number: int, aggregate: Aggregate, plan: NumberPlan) -> str:
    """A sentence if so many values were clipped that a site's update cannot have been sound."""
    clipped = sum(aggregate.clipped.values())
    if clipped <= _MANY_CLIPPED * plan.words:
        return ""
    share = clipped / (plan.words * plan.sites)
    return (
        f"round {round_number}: {share:.0%} of all values that the sites sent were larger than the"
        f" round allows and were cut; {_SOMEBODYS}."
    )


def can_judge_labels(agreement: NDArray[np.floating], chance: float) -> bool:
    """Whether the consortium's model is good enough to doubt a site's labels by it.

    Args:
        agreement: (members,) of the model with all sites' held-out images; negative if unknown.
        chance: agreement of a model that knows nothing.
    """
    return bool(agreement.size and (agreement >= 0).all() and agreement.mean() > 2 * chance)


def metric_names(spec: EnsembleSpec) -> list[str]:
    """Tensor names of the metrics of all trained members."""
    return [METRICS + member.name for member in spec.members if member.trainable != "none"]


def with_metrics(
    update: Mapping[str, NDArray[np.float32]], metrics: Mapping[str, MemberMetrics]
) -> SharedState:
    """An update together with its metrics."""
    values = {
        METRICS + name: (m.loss, m.accuracy, m.agreement or 0.0, float(m.agreement is not None))
        for name, m in metrics.items()
    }
    return {**update, **{name: np.array(four, np.float32) for name, four in values.items()}}


def read_metrics(mean: Mapping[str, NDArray[np.float32]]) -> dict[str, dict[str, float]]:
    """The mean metrics in an aggregate, by member."""
    metrics = {}
    for name in mean:
        if name.startswith(METRICS):
            found = dict(zip(METRIC_NAMES, map(float, mean[name]), strict=True))
            measured = found.pop("measured")
            known = measured > _SOME_SITE
            found["agreement"] = found["agreement"] / measured if known else UNKNOWN
            metrics[name.removeprefix(METRICS)] = found
    return metrics


def agreements(metrics: Mapping[str, Mapping[str, float]]) -> NDArray[np.float32]:
    """The mean agreement of each trained member, in the order of their names."""
    return np.array([metrics[name]["agreement"] for name in sorted(metrics)], np.float32)


def first_ranges(state: SharedState, spec: EnsembleSpec) -> dict[str, float]:
    """Ranges of the first round's deltas, from the start model; wide, for nothing is known yet."""
    ranges = {}
    for name, values in state.items():
        floor = 64.0 if is_statistic(name) else 1.0
        ranges[name] = max(floor, 2 * _largest(values))
    return ranges | dict.fromkeys(metric_names(spec), _METRICS_RANGE)


def _largest(values: NDArray[np.float32]) -> float:
    """The largest absolute value, without a copy of all of them."""
    return max(float(values.max(initial=0)), -float(values.min(initial=0)))


def next_ranges(
    ranges: Mapping[str, float], aggregate: Aggregate, round_number: int
) -> dict[str, float]:
    """Ranges of the round after ``round_number``.

    Sixteen times the last mean update, after the first rounds at least 0.97 of the last range; four
    times the last one where values clipped. A function of what all parties know, so that every
    site can follow it.
    """
    slowest = _SEARCH if round_number <= _SEARCHED_ROUNDS else _SHRINK
    result = {}
    for name, bound in ranges.items():
        parts = (_largest(part) for _, part in blocks_of(aggregate.mean, name))
        largest = max(parts, default=0.0)
        wanted = max(_MARGIN * largest, bound * slowest)
        wanted = bound * 4 if aggregate.clipped[name] else wanted
        result[name] = min(_MOST_RANGE, max(_LEAST_RANGE, wanted))
    return result | {n: _METRICS_RANGE for n in ranges if n.startswith(METRICS)}


def exponents_of(ranges: Mapping[str, float]) -> NDArray[np.int32]:
    """Powers of two that hold the ranges, in the order of sorted names."""
    return np.array([math.ceil(math.log2(ranges[name])) for name in sorted(ranges)], np.int32)


def shapes_of(state: SharedState) -> dict[str, tuple[int, ...]]:
    """Shapes by tensor."""
    return {name: values.shape for name, values in state.items()}


def number_plan(
    aggregated: Mapping[str, tuple[int, ...]],
    exponents: NDArray[np.int32],
    sites: int,
    aggregation: Aggregation,
    spec: EnsembleSpec,
    classes: int,
) -> NumberPlan:
    """The number plan of a round, which every party makes for itself.

    Args:
        aggregated: shapes of the model's tensors that are aggregated.
        exponents: see :func:`exponents_of`.
        sites: of the session.
        aggregation: of the job.
        spec: of the ensemble.
        classes: of its classifiers.

    Raises:
        ServerError: the exponents do not fit the model.
        PlanError: the sum could overflow.
    """
    shapes = dict(aggregated)
    shapes |= dict.fromkeys(metric_names(spec), (len(METRIC_NAMES),))
    names = sorted(shapes)
    if len(names) != len(exponents):
        raise ServerError(f"{len(exponents)} ranges for {len(names)} tensors", where="round start")
    if len(exponents) and not -126 <= int(exponents.min()) <= int(exponents.max()) <= 127:
        raise ServerError("a range is outside that of float32", where="round start")
    by_row = aggregation.rule is Rule.CLASS_WEIGHTED and aggregation.scope is Scope.ALL
    tensors = tuple(
        TensorPlan(
            name,
            shapes[name],
            int(exponent),
            _CLASSES if by_row and name in aggregated and is_classifier(name) else "",
        )
        for name, exponent in zip(names, exponents, strict=True)
    )
    counts = (CountPlan(_CLASSES, classes, aggregation.max_weight),) if by_row else ()
    plan = NumberPlan(sites, aggregation.max_weight, tensors, counts)
    plan.check()
    return plan


def row_weights(plan: NumberPlan, targets: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """A site's counts for ``plan``: its weight for each class of which it has images, or 0.

    Args:
        plan: of the round.
        targets: (n,) class indices of the site's training images.
    """
    return {
        count.name: np.where(np.bincount(targets, minlength=count.size) > 0, len(targets), 0)
        for count in plan.counts
    }
