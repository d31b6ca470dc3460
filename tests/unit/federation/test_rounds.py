"""What server and sites compute alike for a round: its size, metrics, ranges and number plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from fedgestalt.errors import PlanError, ServerError, SiteError
from fedgestalt.federation.training.rounds import (
    METRIC_NAMES,
    METRICS,
    OWN_UPDATE,
    UNKNOWN,
    Aggregation,
    Rule,
    Scope,
    agreements,
    can_judge_labels,
    check_update_norm,
    exponents_of,
    first_ranges,
    metric_names,
    next_ranges,
    number_plan,
    read_metrics,
    row_weights,
    shapes_of,
    training_facts,
    with_metrics,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    build_ensemble,
    is_classifier,
    read_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import MemberMetrics
from fedgestalt.secagg import Aggregate, NumberPlan, Recipient, ThreatModel

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
    told = with_metrics(MODEL, metrics)
    assert told.keys() - MODEL.keys() == {f"{METRICS}a", f"{METRICS}b"}
    assert read_metrics(told) == {
        "a": {"loss": 0.5, "accuracy": 0.25, "agreement": 0.125},
        "b": {"loss": 2.0, "accuracy": 1.0, "agreement": 0.75},
    }


def test_metrics_have_the_names_of_their_fields() -> None:
    assert [*METRIC_NAMES] == [*MemberMetrics.__dataclass_fields__, "measured"]


def mean_of(*sites: tuple[float, float | None]) -> dict[str, float]:
    """Mean metrics of sites, each with its share of all images and its agreement, through a sum."""
    metrics = [with_metrics({}, {"a": MemberMetrics(1.0, 0.5, found)}) for _, found in sites]
    shares = [share for share, _ in sites]
    mean = sum(share * said[f"{METRICS}a"] for share, said in zip(shares, metrics, strict=True))
    found = read_metrics({f"{METRICS}a": np.array(mean, np.float32)})
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
    mean = {f"{METRICS}a": np.array([1.0, 0.5, 3e-7, 2e-7], np.float32)}
    assert read_metrics(mean)["a"]["agreement"] == UNKNOWN


def test_an_aggregate_without_metrics_has_none() -> None:
    assert read_metrics(MODEL) == {}
    assert agreements({}).shape == (0,)


def test_agreements_stand_in_the_order_of_the_members_names() -> None:
    metrics = {
        "scratch": {"loss": 1.0, "accuracy": 0.5, "agreement": 0.25},
        "fine-tuned": {"loss": 2.0, "accuracy": 0.125, "agreement": UNKNOWN},
    }
    found = agreements(metrics)
    assert found.tolist() == [UNKNOWN, 0.25]
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("found", "judges"),
    [([], False), ([0.5], True), ([0.4], False), ([0.9, UNKNOWN], False), ([0.3, 0.6], True)],
)
def test_labels_are_judged_by_a_model_twice_as_good_as_chance(
    found: list[float], judges: bool
) -> None:
    assert can_judge_labels(np.array(found), 0.2) is judges


@pytest.mark.parametrize("name", ["metrics", "head", "metrics-"])
def test_no_name_of_a_member_is_taken_for_metrics_or_for_a_classifier(name: str) -> None:
    built = ensemble(name=name)
    start = read_shared_state(built)
    assert not [tensor for tensor in start if tensor.startswith(METRICS)]
    assert read_metrics(with_metrics(start, {name: MemberMetrics(1.0, 0.5, 0.25)})) == {
        name: {"loss": 1.0, "accuracy": 0.5, "agreement": 0.25}
    }
    weighted = [t for t in plan_of(built, rule=Rule.CLASS_WEIGHTED).tensors if t.row_weights]
    assert [t.name for t in weighted] == [f"{name}/head/1.bias", f"{name}/head/1.weight"]


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


@pytest.mark.parametrize("told", [(0.9, 0.3, 0.6), (0.9, None, 0.6), (None, None, None)])
def test_the_mean_agreement_survives_the_fixed_point_sum(told: tuple[float | None, ...]) -> None:
    built = ensemble()
    plan = plan_of(built)
    still = {name: np.zeros_like(values) for name, values in read_shared_state(built).items()}
    metrics = [{"scratch": MemberMetrics(1.0, 0.5, found)} for found in told]
    aggregate = summed(plan, [with_metrics(still, said) for said in metrics], (200, 30, 100))
    found = read_metrics(aggregate.mean)["scratch"]["agreement"]
    known = [(a, w) for a, w in zip(told, (200, 30, 100), strict=True) if a is not None]
    if known:
        usual = sum(a * w for a, w in known) / sum(w for _, w in known)
        assert found == pytest.approx(usual, abs=2e-3)
    else:
        assert found == UNKNOWN


# --- the plan of a round -------------------------------------------------------------------------

TINY = {"depth": 18, "width": 2, "embedding_size": 8, "input_size": 32}
ROSTER = ("berlin", "bonn", "leuven")


def ensemble(seed: int = 1, classes: int = 3, name: str = "scratch") -> Ensemble:
    member = MemberSpec(name=name, backbone="iresnet", options=TINY, trainable="all")
    return build_ensemble(EnsembleSpec(members=(member,), seed=seed), classes, get_registry())


def plan_of(built: Ensemble, sites: int = 3, **chosen: Any) -> NumberPlan:
    """The plan of the first round."""
    aggregation = Aggregation(**chosen)
    shared = aggregation.shared(read_shared_state(built), built.spec)
    exponents = exponents_of(first_ranges(shared, built.spec))
    return number_plan(shapes_of(shared), exponents, sites, aggregation, built.spec, built.classes)


def summed(
    plan: NumberPlan,
    updates: Sequence[SharedState],
    weights: Sequence[int],
    counts: Sequence[dict[str, NDArray[np.int64]]] | None = None,
) -> Aggregate:
    """What the sum of the sites' encoded updates says."""
    told = counts or [{}] * len(updates)
    words = [plan.encode(*site) for site in zip(updates, weights, told, strict=True)]
    return plan.decode(np.add.reduce(words, dtype=np.uint32))


def facts(
    built: Ensemble, roster: tuple[str, ...] = ROSTER, weight: int = 64, **chosen: Any
) -> dict[str, str]:
    aggregation = Aggregation(max_weight=weight, **chosen)
    state = read_shared_state(built)
    return training_facts(built, state, roster, aggregation, get_registry())


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
        (lambda: facts(ensemble(), scope=Scope.ENCODER), {"number plan"}),
        (lambda: facts(ensemble(), rule=Rule.CLASS_WEIGHTED), {"number plan"}),
    ],
    ids=["seed", "classes", "roster", "weight", "scope", "rule"],
)
def test_a_difference_shows_in_the_facts_that_it_concerns(
    other: Callable[[], dict[str, str]], differs: set[str]
) -> None:
    own, others = facts(ensemble()), other()
    assert own.keys() == others.keys()
    assert {name for name in own if own[name] != others[name]} == differs


def test_a_sum_that_could_overflow_is_found_before_anything_is_trained() -> None:
    with pytest.raises(PlanError, match="lower max_images_per_site"):
        facts(ensemble(), weight=2**31)


def test_a_range_that_clipped_becomes_wider_and_others_follow_the_update() -> None:
    ranges = {"clipped": 1.0, "large": 1.0, "still": 1.0, f"{METRICS}a": 16.0}
    mean = {
        "clipped": np.array([1.0]),
        "large": np.array([-0.25, 0.125]),
        "still": np.zeros(3),
        f"{METRICS}a": np.array([2.0]),
    }
    clipped = {"clipped": 1, "large": 0, "still": 0, f"{METRICS}a": 0}
    for number in (1, 2, 3, 100):
        assert next_ranges(ranges, Aggregate(mean, 10, clipped), number) == {
            "clipped": 4.0,
            "large": 4.0,
            "still": 2.0**-10 if number <= 2 else 0.97,
            f"{METRICS}a": 16.0,
        }


def test_sites_that_pull_apart_are_clipped_now_and_then_not_every_few_rounds() -> None:
    """Each of 16 sites alone moves a value far, and the mean of all hardly moves."""
    ranges, clips = {"a": 64.0}, 0
    for number in range(1, 101):
        clipped = int(ranges["a"] < 1.0)
        clips += clipped
        ranges = next_ranges(ranges, Aggregate({"a": np.array([1e-4])}, 10, {"a": clipped}), number)
    assert ranges["a"] < 8, "it has come down from where it began"
    assert clips <= 8


@pytest.mark.parametrize("clips", [True, False])
def test_ranges_stay_those_of_float32_however_many_rounds_there_are(clips: bool) -> None:
    built = ensemble()
    shapes = shapes_of(read_shared_state(built))
    ranges = first_ranges(read_shared_state(built), built.spec)
    still = {name: np.zeros(1, np.float32) for name in ranges}
    for number in range(1, 5000):
        aggregate = Aggregate(still, 10, dict.fromkeys(ranges, int(clips)))
        ranges = next_ranges(ranges, aggregate, number)
    exponents = exponents_of(ranges)
    number_plan(shapes, exponents, 3, Aggregation(), built.spec, built.classes).check()
    free = [name for name in sorted(ranges) if not name.startswith(METRICS)]
    assert {ranges[name] for name in free} == {2.0**127 if clips else 2.0**-126}


@given(bound=st.floats(1e-30, 1e30))
def test_the_range_of_an_exponent_holds_the_range_and_is_no_more_than_twice_as_wide(
    bound: float,
) -> None:
    (exponent,) = exponents_of({"a": bound}).tolist()
    assert bound <= 2.0**exponent < 2 * bound


def test_the_first_ranges_hold_the_model_itself_twice() -> None:
    built = ensemble()
    start = read_shared_state(built)
    ranges = first_ranges(start, built.spec)
    assert ranges.keys() == start.keys() | set(metric_names(built.spec))
    for name, values in start.items():
        assert ranges[name] >= max(1.0, 2 * float(np.abs(values).max())), name
        if "running_" in name:
            assert ranges[name] >= 64, name


def test_members_that_do_not_train_have_no_metrics() -> None:
    member = ensemble().spec.members[0]
    still = member.model_copy(update={"name": "original", "trainable": "none"})
    spec = ensemble().spec.model_copy(update={"members": (member, still)})
    assert metric_names(spec) == [f"{METRICS}scratch"]


def test_exponents_hold_their_ranges() -> None:
    found = exponents_of({"b": 1.0, "a": 5.0, "c": 0.3})
    assert found.tolist() == [3, 0, -1]
    assert found.dtype == np.int32


@pytest.mark.parametrize("change", [1, 2, -1])
def test_ranges_for_another_model_are_the_servers_fault(change: int) -> None:
    built = ensemble()
    start = read_shared_state(built)
    exponents = exponents_of(first_ranges(start, built.spec))
    wrong = np.resize(exponents, len(exponents) + change)
    with pytest.raises(ServerError, match=rf"{len(wrong)} ranges for {len(exponents)} tensors"):
        number_plan(shapes_of(start), wrong, 3, Aggregation(), built.spec, 3)


@pytest.mark.parametrize("exponent", [-127, 128])
def test_a_range_that_no_float_has_is_the_servers_fault(exponent: int) -> None:
    built = ensemble()
    start = read_shared_state(built)
    exponents = exponents_of(first_ranges(start, built.spec))
    exponents[0] = exponent
    with pytest.raises(ServerError, match="outside that of float32"):
        number_plan(shapes_of(start), exponents, 3, Aggregation(), built.spec, 3)


def test_a_plan_has_every_tensor_of_the_model_and_the_metrics_in_the_order_of_their_names() -> None:
    built = ensemble()
    start, plan = read_shared_state(built), plan_of(built)
    assert [tensor.name for tensor in plan.tensors] == sorted([*start, f"{METRICS}scratch"])
    assert {t.name: t.shape for t in plan.tensors} == {
        **shapes_of(start),
        f"{METRICS}scratch": (len(METRIC_NAMES),),
    }
    assert plan.counts == ()
    assert not any(tensor.row_weights for tensor in plan.tensors)


def test_every_exponent_belongs_to_the_tensor_whose_range_it_holds() -> None:
    built = ensemble()
    start = read_shared_state(built)
    names = first_ranges(start, built.spec)
    ranges = {name: 2.0 ** (17 * index % 50 - 25) for index, name in enumerate(names)}
    plan = number_plan(
        shapes_of(start), exponents_of(ranges), 3, Aggregation(), built.spec, built.classes
    )
    assert {tensor.name: 2.0**tensor.exponent for tensor in plan.tensors} == ranges


def test_shapes_are_those_of_the_tensors() -> None:
    assert shapes_of({"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}) == {
        "a": (2, 3),
        "b": (),
    }


# --- what a job aggregates, and how --------------------------------------------------------------


WORDS = {
    "scope": "encoder",
    "rule": "class-weighted",
    "recipient": "sites",
    "threat_model": "honest-but-curious",
    "optimiser": "sgd",
}
NUMBERS = {"max_weight": 7, "learning_rate": 1.0, "momentum": 0.0}


def test_an_aggregation_is_named_by_words() -> None:
    assert Aggregation.named(**WORDS, **NUMBERS) == Aggregation(
        Scope.ENCODER, Rule.CLASS_WEIGHTED, Recipient.SITES, ThreatModel.HONEST_BUT_CURIOUS, 7
    )


def test_by_default_everything_is_averaged_for_the_server_which_nobody_trusts() -> None:
    assert Aggregation() == Aggregation.named(
        scope="all",
        rule="mean",
        recipient="server",
        threat_model="malicious",
        max_weight=4096,
        optimiser="sgd",
        learning_rate=1.0,
        momentum=0.0,
    )


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("said", ["", "Server", "median", "all "])
def test_an_unknown_word_is_the_servers_fault_and_named(word: str, said: str) -> None:
    with pytest.raises(ServerError) as fault:
        Aggregation.named(**{**WORDS, word: said}, **NUMBERS)
    assert repr(said) in str(fault.value)


@pytest.mark.parametrize("momentum", [-0.1, 1.0, 7.0, float("nan")])
def test_a_momentum_that_never_ends_is_the_servers_fault_and_named(momentum: float) -> None:
    with pytest.raises(ServerError, match=f"a server momentum of {momentum}, not 0 to below 1"):
        Aggregation.named(**WORDS, **NUMBERS | {"momentum": momentum})


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_that_goes_nowhere_is_the_servers_fault_and_named(rate: float) -> None:
    with pytest.raises(ServerError, match=f"a server learning rate of {rate}, not one above 0"):
        Aggregation.named(**WORDS, **NUMBERS | {"learning_rate": rate})


def test_an_encoder_is_all_but_the_classifiers() -> None:
    built = ensemble()
    start, spec = read_shared_state(built), built.spec
    kept = Aggregation(Scope.ENCODER).shared(start, spec)
    assert start.keys() - kept.keys() == {"scratch/head/1.weight", "scratch/head/1.bias"}
    assert all(kept[name] is start[name] for name in kept)
    assert Aggregation(Scope.ALL).shared(start, spec) == start


def test_normalisation_that_stays_at_the_sites_is_not_shared() -> None:
    built = ensemble()
    start = read_shared_state(built)
    local = TrainingSpec(batch_norm="local")
    member = built.spec.members[0].model_copy(update={"training": local})
    shared = Aggregation().shared(start, EnsembleSpec(members=(member,)))
    norms = {
        f"scratch/{part}/{path}.{name}"
        for part, root in built.members[0].trained_parts.items()
        for path, module in root.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        for name in ("weight", "bias", "running_mean", "running_second_moment")
    }
    assert len(norms) > 50
    assert start.keys() - shared.keys() == norms
    encoder = Aggregation(Scope.ENCODER).shared(start, EnsembleSpec(members=(member,)))
    assert shared.keys() - encoder.keys() == {"scratch/head/1.weight", "scratch/head/1.bias"}


@pytest.mark.parametrize("rule", Rule)
def test_a_classifier_that_stays_at_the_sites_has_no_place_in_the_plan(rule: Rule) -> None:
    plan = plan_of(ensemble(), scope=Scope.ENCODER, rule=rule)
    assert not [tensor for tensor in plan.tensors if "/head/" in tensor.name]
    assert plan.counts == ()


def test_the_rows_of_classifiers_alone_are_weighted_by_class() -> None:
    built = ensemble(classes=4)
    plan = plan_of(built, rule=Rule.CLASS_WEIGHTED, max_weight=50)
    weighted = {tensor.name for tensor in plan.tensors if tensor.row_weights}
    assert weighted == {name for name in read_shared_state(built) if is_classifier(name)}
    (count,) = plan.counts
    assert (count.size, count.bound) == (4, 50)
    assert {tensor.row_weights for tensor in plan.tensors} == {"", count.name}


def test_a_site_has_its_weight_for_every_class_of_which_it_has_images() -> None:
    plan = plan_of(ensemble(classes=5), rule=Rule.CLASS_WEIGHTED)
    (found,) = row_weights(plan, np.array([3, 0, 3, 3])).values()
    assert found.tolist() == [4, 0, 0, 4, 0]


def test_without_row_weights_a_site_says_nothing_of_its_classes() -> None:
    assert row_weights(plan_of(ensemble()), np.array([0, 1])) == {}


def test_a_class_that_the_plan_does_not_know_does_not_leave_the_site() -> None:
    built = ensemble()
    plan = plan_of(built, rule=Rule.CLASS_WEIGHTED)
    update = with_metrics(read_shared_state(built), {"scratch": MemberMetrics(1.0, 0.5, None)})
    with pytest.raises(SiteError, match="no vector of 3 integers"):
        plan.encode(update, 2, row_weights(plan, np.array([0, 3])))


def test_a_row_is_the_mean_of_the_sites_that_have_its_class() -> None:
    built = ensemble(classes=3)
    plan = plan_of(built, rule=Rule.CLASS_WEIGHTED)
    targets = np.array([0, 0, 1]), np.array([1]), np.array([0, 1])  # nobody has class 2
    rng = np.random.default_rng(0)
    updates = [
        {name: rng.uniform(-0.5, 0.5, v.shape).astype(np.float32) for name, v in start.items()}
        for start in [read_shared_state(built)] * 3
    ]
    told = [with_metrics(u, {"scratch": MemberMetrics(1.0, 0.5, None)}) for u in updates]
    weights = [len(site) for site in targets]
    aggregate = summed(plan, told, weights, [row_weights(plan, site) for site in targets])
    of_site = np.array([[3, 3, 3], [1, 1, 1], [2, 2, 2]])
    of_class = np.array([[3, 3, 0], [0, 1, 0], [2, 2, 0]])
    for name in read_shared_state(built):
        rows = np.stack([update[name] for update in updates])
        shares = of_class if "/head/" in name else of_site[:, :1]
        shares = shares.reshape(*shares.shape, *[1] * (rows.ndim - 2))
        right = (shares * rows).sum(0) / np.maximum(shares.sum(0), 1)
        np.testing.assert_allclose(aggregate.mean[name], right, atol=1e-4, err_msg=name)
