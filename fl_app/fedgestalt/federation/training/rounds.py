"""What server and sites compute alike for one round: the number plan and its session."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.federation.job.handshake import versions
from fedgestalt.hooks.registry import Registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    read_shared_state,
    shared_state_digest,
)
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.training import MemberMetrics
from fedgestalt.secagg import Aggregate, NumberPlan, SessionFacts, TensorPlan

METRICS = "metrics/"
"""Prefix of the tensors of metrics that are summed under the masks with the update."""

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
_STATISTICS = ("running_mean", "running_second_moment")
_METRICS_RANGE = 16.0
_SOME_SITE = 1e-4
_MARGIN = 2.0


def training_facts(
    ensemble: Ensemble, roster: tuple[str, ...], max_weight: int, registry: Registry
) -> dict[str, str]:
    """What everybody in a training job must have alike; compared in the handshake.

    Raises:
        PlanError: the sum could overflow.
    """
    state, spec = read_shared_state(ensemble), ensemble.spec
    facts = round_facts(
        job="",
        attempt=1,
        round_number=1,
        state=state,
        exponents=exponents_of(first_ranges(state, spec)),
        max_weight=max_weight,
        roster=roster,
        spec=spec,
    )
    return {
        **versions(map(registry.backbones.entry, ensemble.backbones)),
        "classes": str(ensemble.classes),
        "start model": ensemble.start_digest,
        "number plan": facts.plan.digest.hex(),
    }


def check_update_norm(update: SharedState, state: SharedState, bound: float, whose: str) -> None:
    """Refuse a change of the model that is not finite, or many times as large as the model.

    Running statistics of normalisation layers are left out: they follow the data.

    Raises:
        SiteError: names the largest change allowed and what came.
    """
    squares = {"update": 0.0, "model": 0.0}
    for name, change in update.items():
        if not np.isfinite(change).all():
            raise SiteError(
                f"{whose} holds NaN or infinity",
                where=f"tensor {name}",
                remedy="lower the learning rate in the job, and check the images of the site",
            )
        if not name.endswith(_STATISTICS):
            squares["update"] += float((change.astype(np.float64) ** 2).sum())
            squares["model"] += float((state[name].astype(np.float64) ** 2).sum())
    if squares["update"] > bound**2 * squares["model"]:
        ratio = math.sqrt(squares["update"] / max(squares["model"], 1e-30))
        raise SiteError(
            f"{whose} is {ratio:.3g} times as large as the model, at most {bound:.3g} is allowed",
            remedy=_ITS_OWN if whose == OWN_UPDATE else _SOMEBODYS,
        )


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


def split_metrics(
    mean: Mapping[str, NDArray[np.float32]],
) -> tuple[SharedState, dict[str, dict[str, float]]]:
    """Take an aggregate apart: mean update, and mean metrics by member."""
    update = {name: values for name, values in mean.items() if not name.startswith(METRICS)}
    metrics = {}
    for name, values in mean.items():
        if name.startswith(METRICS):
            found = dict(zip(METRIC_NAMES, map(float, values), strict=True))
            measured = found.pop("measured")
            known = measured > _SOME_SITE
            found["agreement"] = found["agreement"] / measured if known else UNKNOWN
            metrics[name.removeprefix(METRICS)] = found
    return update, metrics


def first_ranges(state: SharedState, spec: EnsembleSpec) -> dict[str, float]:
    """Ranges of the first round's deltas, from the start model; wide, for nothing is known yet."""
    ranges = {}
    for name, values in state.items():
        floor = 64.0 if name.endswith(_STATISTICS) else 1.0
        ranges[name] = max(floor, 2 * float(np.abs(values).max(initial=0)))
    return ranges | dict.fromkeys(metric_names(spec), _METRICS_RANGE)


def next_ranges(ranges: Mapping[str, float], aggregate: Aggregate) -> dict[str, float]:
    """Ranges of the next round: twice the last mean update; four times wider where values clipped.

    A function of what all parties know, so that every site can follow it.
    """
    result = {}
    for name, bound in ranges.items():
        largest = float(np.abs(aggregate.mean[name]).max(initial=0))
        wanted = max(_MARGIN * largest, bound * 2.0**-10)
        result[name] = bound * 4 if aggregate.clipped[name] else wanted
    return result | {n: _METRICS_RANGE for n in ranges if n.startswith(METRICS)}


def exponents_of(ranges: Mapping[str, float]) -> NDArray[np.int32]:
    """Powers of two that hold the ranges, in the order of sorted names."""
    return np.array([math.ceil(math.log2(ranges[name])) for name in sorted(ranges)], np.int32)


def round_facts(
    *,
    job: str,
    attempt: int,
    round_number: int,
    state: SharedState,
    exponents: NDArray[np.int32],
    max_weight: int,
    roster: tuple[str, ...],
    spec: EnsembleSpec,
) -> SessionFacts:
    """The facts of a round, from which every party computes the session digest itself.

    Raises:
        ServerError: the number of exponents does not fit the model.
        PlanError: the sum could overflow.
    """
    shapes = {name: values.shape for name, values in state.items()}
    shapes |= dict.fromkeys(metric_names(spec), (len(METRIC_NAMES),))
    names = sorted(shapes)
    if len(names) != len(exponents):
        raise ServerError(f"{len(exponents)} ranges for {len(names)} tensors", where="round start")
    if len(exponents) and not -126 <= int(exponents.min()) <= int(exponents.max()) <= 127:
        raise ServerError("a range is outside that of float32", where="round start")
    tensors = tuple(
        TensorPlan(name, shapes[name], int(exponent))
        for name, exponent in zip(names, exponents, strict=True)
    )
    plan = NumberPlan(len(roster), max_weight, tensors)
    plan.check()
    return SessionFacts(job, attempt, round_number, shared_state_digest(state), plan, roster)
