"""What server and sites compute alike for a round, and the check of an update's size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgestalt.errors import ServerError, SiteError
from fedgestalt.federation.training.rounds import (
    METRIC_NAMES,
    OWN_UPDATE,
    UNKNOWN,
    check_update_norm,
    exponents_of,
    first_ranges,
    next_ranges,
    round_facts,
    split_metrics,
    training_facts,
    with_metrics,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.ensemble import Ensemble, build_ensemble, read_shared_state
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.training import MemberMetrics
from fedgestalt.secagg import Aggregate

MEAN = "the mean of all updates"


def state(**tensors: list[float]) -> dict[str, NDArray[np.float32]]:
    return {name: np.array(values, np.float32) for name, values in tensors.items()}


MODEL = state(weight=[3.0, 0.0], bias=[4.0])
"""Of norm 5."""


def refusal(update: dict[str, NDArray[np.float32]], bound: float = 2.0, whose: str = MEAN) -> str:
    with pytest.raises(SiteError) as fault:
        check_update_norm(update, MODEL, bound, whose)
    return str(fault.value)


# --- size of an update ---------------------------------------------------------------------------


def test_a_small_update_passes() -> None:
    check_update_norm(state(weight=[0.1, 0.1], bias=[-0.1]), MODEL, 2.0, MEAN)


def test_no_change_passes() -> None:
    check_update_norm(state(weight=[0, 0], bias=[0]), MODEL, 1e-9, MEAN)


def test_an_update_of_exactly_the_bound_passes() -> None:
    check_update_norm(state(weight=[0.0, 6.0], bias=[8.0]), MODEL, 2.0, MEAN)


def test_a_little_more_than_the_bound_is_refused() -> None:
    assert "is 2 times as large" in refusal(state(weight=[0.0, 6.001], bias=[8.0]))


def test_the_norm_is_over_all_tensors_together() -> None:
    check_update_norm(state(weight=[9.9, 0], bias=[0]), MODEL, 2.0, MEAN)
    refusal(state(weight=[9.9, 0], bias=[9.9]))


def test_a_refusal_names_the_ratio_the_bound_and_whose_update_it_is() -> None:
    said = refusal(state(weight=[500.0, 0.0], bias=[0.0]), bound=10.0)
    assert said.startswith(f"{MEAN} is 100 times as large as the model, at most 10 is allowed; ")


def test_a_refused_mean_says_that_no_site_can_be_named_and_how_to_find_it() -> None:
    said = refusal(state(weight=[500.0, 0.0], bias=[0.0]))
    assert "under the masks nobody can tell which" in said
    assert "without one site at a time" in said


def test_a_site_that_refuses_its_own_update_looks_for_no_other_site() -> None:
    said = refusal(state(weight=[500.0, 0.0], bias=[0.0]), whose=OWN_UPDATE)
    assert "its training has diverged: lower the learning rate" in said
    assert "one site at a time" not in said


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["weight", "norm.running_mean"])
def test_what_is_not_finite_is_refused_and_its_tensor_named(value: float, name: str) -> None:
    model = {**MODEL, "norm.running_mean": np.zeros(1, np.float32)}
    update = {key: np.zeros_like(values) for key, values in model.items()}
    update[name][0] = value
    with pytest.raises(SiteError) as fault:
        check_update_norm(update, model, 1e9, OWN_UPDATE)
    assert fault.value.what == "this site's update holds NaN or infinity"
    assert fault.value.where == f"tensor {name}"


def test_an_update_whose_square_overflows_is_refused() -> None:
    assert "times as large" in refusal(state(weight=[3e38, 3e38], bias=[3e38]))


@pytest.mark.parametrize("name", ["running_mean", "running_second_moment"])
def test_running_statistics_are_left_out_on_both_sides(name: str) -> None:
    model = {**MODEL, f"norm.{name}": np.array([1e6], np.float32)}
    check_update_norm(
        {**state(weight=[1, 0], bias=[0]), f"norm.{name}": np.array([1e9], np.float32)},
        model,
        1.0,
        MEAN,
    )
    with pytest.raises(SiteError, match="is 20 times as large"):
        check_update_norm(
            {**state(weight=[100, 0], bias=[0]), f"norm.{name}": np.zeros(1, np.float32)},
            model,
            1.0,
            MEAN,
        )


def test_a_parameter_with_a_name_like_a_statistic_is_not_left_out() -> None:
    model = state(**{"running_mean.weight": [1.0]})
    with pytest.raises(SiteError, match="times as large"):
        check_update_norm(state(**{"running_mean.weight": [100.0]}), model, 10.0, MEAN)


def test_a_model_of_zeros_may_not_change() -> None:
    zeros = state(weight=[0.0])
    check_update_norm(zeros, zeros, 10.0, MEAN)
    with pytest.raises(SiteError, match="times as large"):
        check_update_norm(state(weight=[1e-3]), zeros, 10.0, MEAN)


@given(
    factor=st.floats(1e-3, 1e3).filter(lambda f: abs(f - 1) > 1e-3),
    bound=st.floats(0.01, 100),
)
def test_the_ratio_alone_decides(factor: float, bound: float) -> None:
    update = {name: values * np.float32(bound * factor) for name, values in MODEL.items()}
    if factor > 1:
        refusal(update, bound)
    else:
        check_update_norm(update, MODEL, bound, MEAN)


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_come_back_from_the_mean_by_name() -> None:
    metrics = {"a": MemberMetrics(0.5, 0.25, 0.125), "b": MemberMetrics(2.0, 1.0, 0.75)}
    update, found = split_metrics(with_metrics(MODEL, metrics))
    assert update.keys() == MODEL.keys()
    assert found == {
        "a": {"loss": 0.5, "accuracy": 0.25, "agreement": 0.125},
        "b": {"loss": 2.0, "accuracy": 1.0, "agreement": 0.75},
    }


def test_metrics_have_the_names_of_their_fields() -> None:
    assert [*METRIC_NAMES] == [*MemberMetrics.__dataclass_fields__, "measured"]


def mean_of(*sites: tuple[float, float | None]) -> dict[str, float]:
    """Mean metrics of sites, each with its share of all images and its agreement, through a sum."""
    metrics = [with_metrics({}, {"a": MemberMetrics(1.0, 0.5, found)}) for _, found in sites]
    shares = [share for share, _ in sites]
    mean = sum(share * said["metrics/a"] for share, said in zip(shares, metrics, strict=True))
    _, found = split_metrics({"metrics/a": np.array(mean, np.float32)})
    assert found["a"].keys() == {"loss", "accuracy", "agreement"}
    return found["a"]


def test_the_mean_agreement_weighs_sites_by_their_images() -> None:
    assert mean_of((0.25, 1.0), (0.75, 0.0))["agreement"] == pytest.approx(0.25)


def test_a_site_that_measured_nothing_does_not_spoil_the_mean() -> None:
    found = mean_of((0.25, 0.9), (0.25, 0.5), (0.5, None))
    assert found["agreement"] == pytest.approx(0.7)
    assert (found["loss"], found["accuracy"]) == (1.0, 0.5)


def test_no_agreement_at_all_is_not_the_same_as_none_measured() -> None:
    assert mean_of((0.5, 0.0), (0.5, None))["agreement"] == 0
    assert mean_of((0.5, None), (0.5, None))["agreement"] == UNKNOWN


def test_a_few_images_of_very_many_are_enough_to_measure() -> None:
    assert mean_of((0.001, 0.75), (0.999, None))["agreement"] == pytest.approx(0.75)


def test_what_fixed_point_leaves_of_nothing_is_unknown() -> None:
    mean = {"metrics/a": np.array([1.0, 0.5, 3e-7, 2e-7], np.float32)}
    assert split_metrics(mean)[1]["a"]["agreement"] == UNKNOWN


@given(
    sites=st.lists(
        st.tuples(st.integers(1, 1000), st.none() | st.floats(0, 1)), min_size=1, max_size=8
    )
)
def test_the_mean_agreement_is_that_of_the_sites_that_measured(
    sites: list[tuple[int, float | None]],
) -> None:
    total = sum(images for images, _ in sites)
    known = [(images, found) for images, found in sites if found is not None]
    found = mean_of(*((images / total, found) for images, found in sites))["agreement"]
    if sum(images for images, _ in known) / total > 2e-4:
        usual = sum(images * said for images, said in known) / sum(images for images, _ in known)
        assert found == pytest.approx(usual, abs=1e-4)
    elif not known:
        assert found == UNKNOWN


@pytest.mark.parametrize("agreements", [(0.9, 0.3, 0.6), (0.9, None, 0.6), (None, None, None)])
def test_the_mean_agreement_survives_the_fixed_point_sum(
    agreements: tuple[float | None, ...],
) -> None:
    built = ensemble()
    start = read_shared_state(built)
    plan = round_facts(
        job="j",
        attempt=1,
        round_number=1,
        state=start,
        exponents=exponents_of(first_ranges(start, built.spec)),
        max_weight=4096,
        roster=ROSTER,
        spec=built.spec,
    ).plan
    still = {name: np.zeros_like(values) for name, values in start.items()}
    words = [
        plan.encode(with_metrics(still, {"scratch": MemberMetrics(1.0, 0.5, found)}), weight)
        for found, weight in zip(agreements, (200, 30, 100), strict=True)
    ]
    aggregate = plan.decode(np.add.reduce(words, dtype=np.uint32))
    found = split_metrics(aggregate.mean)[1]["scratch"]["agreement"]
    known = [(a, w) for a, w in zip(agreements, (200, 30, 100), strict=True) if a is not None]
    if known:
        usual = sum(a * w for a, w in known) / sum(w for _, w in known)
        assert found == pytest.approx(usual, abs=2e-3)
    else:
        assert found == UNKNOWN


# --- the plan of a round -------------------------------------------------------------------------

TINY = {"depth": 18, "width": 2, "embedding_size": 8, "input_size": 32}
ROSTER = ("berlin", "bonn", "leuven")


def ensemble(seed: int = 1, classes: int = 3) -> Ensemble:
    member = MemberSpec(name="scratch", backbone="iresnet", options=TINY, trainable="all")
    return build_ensemble(EnsembleSpec(members=(member,), seed=seed), classes, get_registry())


def facts(built: Ensemble, roster: tuple[str, ...] = ROSTER, weight: int = 64) -> dict[str, str]:
    return training_facts(built, roster, weight, get_registry())


def test_everybody_states_the_same_facts_from_the_same_job() -> None:
    assert facts(ensemble()) == facts(ensemble())
    assert "plugin backbone iresnet" in facts(ensemble())


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda: facts(ensemble(seed=2)), {"start model", "number plan"}),
        (lambda: facts(ensemble(classes=4)), {"classes", "start model", "number plan"}),
        (lambda: facts(ensemble(), roster=("bonn", "leuven", "ulm", "kiel")), {"number plan"}),
        (lambda: facts(ensemble(), weight=65), {"number plan"}),
    ],
    ids=["seed", "classes", "roster", "weight"],
)
def test_a_difference_shows_in_the_facts_that_it_concerns(
    other: Callable[[], dict[str, str]], differs: set[str]
) -> None:
    own, others = facts(ensemble()), other()
    assert own.keys() == others.keys()
    assert {name for name in own if own[name] != others[name]} == differs


def test_a_range_that_clipped_becomes_wider_and_others_follow_the_update() -> None:
    ranges = {"clipped": 1.0, "large": 1.0, "still": 1.0, "metrics/a": 16.0}
    mean = {
        "clipped": np.array([1.0]),
        "large": np.array([-0.25, 0.125]),
        "still": np.zeros(3),
        "metrics/a": np.array([2.0]),
    }
    clipped = {"clipped": 1, "large": 0, "still": 0, "metrics/a": 0}
    assert next_ranges(ranges, Aggregate(mean, 10, clipped)) == {
        "clipped": 4.0,
        "large": 0.5,
        "still": 2.0**-10,
        "metrics/a": 16.0,
    }


def test_exponents_hold_their_ranges() -> None:
    found = exponents_of({"b": 1.0, "a": 5.0, "c": 0.3})
    assert found.tolist() == [3, 0, -1]
    assert found.dtype == np.int32


@pytest.mark.parametrize("change", [[0], [0, 0]])
def test_a_plan_for_another_model_is_the_servers_fault(change: list[int]) -> None:
    built = ensemble()
    start = read_shared_state(built)
    exponents = exponents_of(first_ranges(start, built.spec))
    with pytest.raises(ServerError, match=r"ranges for .* tensors"):
        round_facts(
            job="j",
            attempt=1,
            round_number=1,
            state=start,
            exponents=np.append(exponents, change).astype(np.int32),
            max_weight=64,
            roster=ROSTER,
            spec=built.spec,
        )


@pytest.mark.parametrize("exponent", [-127, 128])
def test_a_range_that_no_float_has_is_the_servers_fault(exponent: int) -> None:
    built = ensemble()
    start = read_shared_state(built)
    exponents = exponents_of(first_ranges(start, built.spec))
    exponents[0] = exponent
    with pytest.raises(ServerError, match="outside that of float32"):
        round_facts(
            job="j",
            attempt=1,
            round_number=1,
            state=start,
            exponents=exponents,
            max_weight=64,
            roster=ROSTER,
            spec=built.spec,
        )
