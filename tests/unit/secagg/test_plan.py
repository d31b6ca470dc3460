"""The number plan against float64: values, row weights, counts, and what cannot be summed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedgestalt.errors import PlanError, SiteError
from fedgestalt.secagg import Aggregate, CountPlan, NumberPlan, TensorPlan, Words

SHAPE = (3, 4)
relaxed = settings(deadline=None)


def plan_for(sites: int, exponent: int = 0, max_weight: int = 100) -> NumberPlan:
    return NumberPlan(
        sites, max_weight, (TensorPlan("a", SHAPE, exponent), TensorPlan("b", (), exponent))
    )


def values(bound: float) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return arrays(np.float32, SHAPE, elements=elements)


@relaxed
@given(
    st.lists(st.tuples(values(1.0), st.integers(1, 100)), min_size=3, max_size=6),
    st.integers(-20, 20),
)
def test_the_decoded_sum_is_the_weighted_mean_up_to_rounding(sites, exponent: int) -> None:
    plan = plan_for(len(sites), exponent)
    scale = np.float32(2.0**exponent)
    total = np.zeros(plan.words, np.uint32)
    for tensor, weight in sites:
        total += plan.encode({"a": tensor * scale, "b": np.float32(0)}, weight)
    aggregate = plan.decode(total)
    weights = np.array([weight for _, weight in sites], float)
    exact = sum((t * scale).astype(float) * w for t, w in sites) / weights.sum()
    rounding = 0.5 * len(sites) * 2.0**exponent / plan.level * plan.max_weight / weights.sum()
    tolerance = rounding + np.abs(exact) * 2.0**-23
    assert (np.abs(aggregate.mean["a"] - exact) <= tolerance + 1e-30).all()
    assert aggregate.weight == weights.sum()
    assert aggregate.clipped == {"a": 0, "b": 0}


@relaxed
@given(st.integers(1, 64), st.floats(1.0, 2.0**100, width=32))
def test_the_sum_of_extreme_values_never_overflows(sites: int, huge: float) -> None:
    plan = plan_for(sites)
    extreme = {"a": np.full(SHAPE, huge, np.float32), "b": np.float32(-huge)}
    total = np.zeros(plan.words, np.uint32)
    for _ in range(sites):
        total += plan.encode(extreme, plan.max_weight)
    aggregate = plan.decode(total)
    assert np.allclose(aggregate.mean["a"], 1.0, rtol=1e-6)
    assert np.isclose(aggregate.mean["b"], -1.0, rtol=1e-6)


def test_clipped_values_are_counted_in_sum_over_sites() -> None:
    plan = plan_for(3)
    tensor = np.zeros(SHAPE, np.float32)
    tensor[0, :2] = 5.0
    words = plan.encode({"a": tensor, "b": np.float32(-9)}, 1)
    total = (3 * words.astype(np.uint64)).astype(np.uint32)
    assert plan.decode(total).clipped == {"a": 6, "b": 3}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_update_is_refused_before_masking(bad: float) -> None:
    with pytest.raises(SiteError, match="'b' is not finite"):
        plan_for(3).encode({"a": np.zeros(SHAPE, np.float32), "b": np.float32(bad)}, 1)


@pytest.mark.parametrize("weight", [0, -1, 101])
def test_a_weight_outside_the_public_bound_is_refused(weight: int) -> None:
    with pytest.raises(SiteError, match="allows 1 to 100"):
        plan_for(3).encode({"a": np.zeros(SHAPE, np.float32), "b": np.float32(0)}, weight)


def test_a_missing_tensor_or_another_shape_is_refused() -> None:
    with pytest.raises(SiteError, match="tensor 'b'"):
        plan_for(3).encode({"a": np.zeros(SHAPE, np.float32)}, 1)
    with pytest.raises(SiteError, match=r"shape \(4, 3\)"):
        plan_for(3).encode({"a": np.zeros((4, 3), np.float32), "b": np.float32(0)}, 1)


# --- a sum of fewer sites than the plan is for --------------------------------------------------


@relaxed
@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_fewer_survivors_than_the_plan_is_for_have_their_own_mean(n: int, seed: int) -> None:
    rng, plan = np.random.default_rng(seed), plan_for(5)
    tensors = rng.uniform(-1, 1, (n, *SHAPE)).astype(np.float32)
    weights = rng.integers(1, 101, n)
    encoded = [
        plan.encode({"a": tensor, "b": tensor[0, 0]}, int(weight))
        for tensor, weight in zip(tensors, weights, strict=True)
    ]
    aggregate = plan.decode(summed(encoded))
    exact = np.average(tensors.astype(float), axis=0, weights=weights)
    step = 1.0 / plan.level * plan.max_weight
    tolerance = 0.5 * n * step / weights.sum() + np.abs(exact) * 2.0**-23
    assert (np.abs(aggregate.mean["a"] - exact) <= tolerance + 1e-30).all()
    assert aggregate.weight == weights.sum()


def summed(vectors: list[Words]) -> Words:
    return np.add.reduce(vectors, dtype=np.uint32)


# --- tensors weighted by row, and counts ---------------------------------------------------------

ROWS = 4


def plan_by_row(sites: int, exponent: int = 0, max_weight: int = 50) -> NumberPlan:
    tensors = (
        TensorPlan("body", (3,), exponent),
        TensorPlan("head", (ROWS, 2, 3), exponent, "classes"),
        TensorPlan("bias", (ROWS,), exponent - 2, "classes"),
    )
    counts = CountPlan("classes", ROWS, max_weight), CountPlan("images", 2, 2**20)
    return NumberPlan(sites, max_weight, tensors, counts)


@st.composite
def sites_by_row(draw: st.DrawFn) -> tuple[NumberPlan, list[dict[str, Any]]]:
    plan = plan_by_row(draw(st.integers(1, 6)), draw(st.integers(-20, 20)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sites = [
        {
            "update": {
                t.name: np.asarray(
                    rng.uniform(-1, 1, t.shape)
                    * 2.0**t.exponent
                    * draw(st.sampled_from([1e-6, 1])),
                    np.float32,
                )
                for t in plan.tensors
            },
            "weight": draw(st.integers(1, plan.max_weight)),
            "counts": {
                "classes": np.array(draw(st.lists(st.integers(0, 50), min_size=4, max_size=4))),
                "images": rng.integers(0, 2**20 + 1, 2),
            },
        }
        for _ in range(draw(st.integers(1, plan.sites)))
    ]
    return plan, sites


@relaxed
@given(sites_by_row())
def test_rows_have_the_mean_of_the_sites_that_speak_of_them(
    given_to: tuple[NumberPlan, list[dict[str, Any]]],
) -> None:
    plan, sites = given_to
    aggregate = plan.decode(summed([plan.encode(**site) for site in sites]))
    weights = np.array([site["counts"]["classes"] for site in sites])
    for tensor in plan.tensors:
        values = np.array([site["update"][tensor.name] for site in sites], float)
        by_site = np.array([[site["weight"]] for site in sites])
        share = weights if tensor.row_weights else by_site
        share = share.reshape(share.shape + (1,) * (values.ndim - 2)) * np.ones(values.shape)
        total = share.sum(axis=0)
        exact = (values * share).sum(axis=0) / np.maximum(total, 1)
        step = 2.0**tensor.exponent / plan.level * plan.max_weight
        tolerance = 0.5 * len(sites) * step / np.maximum(total, 1) + np.abs(exact) * 2.0**-23
        off = np.abs(aggregate.mean[tensor.name] - exact)
        assert (off <= tolerance + 1e-30).all(), tensor.name
        assert (aggregate.mean[tensor.name][total == 0] == 0).all()
        assert aggregate.mean[tensor.name].dtype == np.float32


@relaxed
@given(sites_by_row())
def test_counts_are_summed_exactly(given_to: tuple[NumberPlan, list[dict[str, Any]]]) -> None:
    plan, sites = given_to
    aggregate = plan.decode(summed([plan.encode(**site) for site in sites]))
    for name in ("classes", "images"):
        exact = sum(site["counts"][name].astype(object) for site in sites)
        assert aggregate.counts[name].dtype == np.int64
        assert aggregate.counts[name].tolist() == exact.tolist()
    assert aggregate.weight == sum(site["weight"] for site in sites)


def test_counts_are_exact_up_to_the_last_bit_of_a_word() -> None:
    bound = (2**32 - 1) // 3
    plan = NumberPlan(3, 1, (), (CountPlan("many", 2, bound),))
    plan.check()
    words = plan.encode({}, 1, {"many": np.array([bound, 0], np.uint64)})
    assert plan.decode(summed(3 * [words])).counts["many"].tolist() == [3 * bound, 0]


def test_a_row_that_a_site_does_not_speak_of_is_not_counted_as_clipped() -> None:
    plan = plan_by_row(2)
    far = {t.name: np.full(t.shape, 9.0, np.float32) for t in plan.tensors}
    counts = {"classes": np.array([50, 0, 1, 0]), "images": np.zeros(2, int)}
    aggregate = plan.decode(plan.encode(far, 50, counts))
    assert aggregate.clipped == {"body": 3, "head": 12, "bias": 2}
    assert aggregate.mean["head"][:, 0, 0].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert aggregate.mean["bias"].tolist() == [0.25, 0.0, 0.25, 0.0]


def test_a_row_that_nobody_speaks_of_has_a_mean_of_nothing() -> None:
    plan = plan_by_row(1)
    update = {t.name: np.ones(t.shape, np.float32) for t in plan.tensors}
    counts = {"classes": np.zeros(ROWS, int), "images": np.zeros(2, int)}
    mean = plan.decode(plan.encode(update, 50, counts)).mean
    assert not mean["head"].any()
    assert mean["body"].all()


def test_tensors_larger_than_a_block_are_encoded_alike() -> None:
    size = (1 << 16) + 3
    plan = NumberPlan(1, 1, (TensorPlan("long", (2, size), 0, "rows"),), (CountPlan("rows", 2, 1),))
    values = np.linspace(-1, 1, 2 * size, dtype=np.float32).reshape(2, size)
    mean = plan.decode(plan.encode({"long": values}, 1, {"rows": np.ones(2, int)})).mean["long"]
    assert np.abs(mean - values).max() <= 2.0**-23


def test_means_are_looked_up_by_the_names_of_the_tensors() -> None:
    plan = plan_by_row(1)
    update = {t.name: np.ones(t.shape, np.float32) for t in plan.tensors}
    counts = {"classes": np.ones(ROWS, int), "images": np.zeros(2, int)}
    aggregate: Aggregate = plan.decode(plan.encode(update, 50, counts))
    assert (list(aggregate.mean), len(aggregate.mean)) == (["body", "head", "bias"], 3)
    assert {name: mean.shape for name, mean in aggregate.mean.items()} == {
        tensor.name: tensor.shape for tensor in plan.tensors
    }
    with pytest.raises(KeyError):
        aggregate.mean["classes"]


# --- what a site may not send --------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "update": {t.name: np.zeros(t.shape, np.float32) for t in plan_by_row(3).tensors},
    "weight": 1,
    "counts": {"classes": np.zeros(ROWS, int), "images": np.zeros(2, int)},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": 0}, "0 training images, but the job allows 1 to 50 per site; raise max_images"),
        ({"weight": 51}, "51 training images, but the job allows 1 to 50 per site; raise max_im"),
        ({"update": {"body": None}}, "the update and the number plan differ in tensor 'body'."),
        ({"update": {"tail": 0}}, "the update and the number plan differ in tensor 'tail'."),
        ({"counts": {"images": None}}, "the update and the number plan differ in tensor 'images'."),
        ({"counts": None}, "the update and the number plan differ in tensor 'classes'."),
        ({"update": {"bias": np.zeros(3)}}, "tensor 'bias' has shape (3,), not (4,)."),
        ({"update": {"bias": np.zeros((4, 1))}}, "tensor 'bias' has shape (4, 1), not (4,)."),
        ({"counts": {"classes": np.zeros(3, int)}}, "classes is no vector of 4 integers."),
        ({"counts": {"classes": np.zeros((4, 1), int)}}, "classes is no vector of 4 integers."),
        ({"counts": {"classes": np.zeros(4)}}, "classes is no vector of 4 integers."),
        ({"counts": {"classes": np.zeros(4, bool)}}, "classes is no vector of 4 integers."),
        ({"counts": {"classes": np.arange(4) - 1}}, "classes holds a number outside 0..50."),
        ({"counts": {"classes": np.arange(4) + 48}}, "classes holds a number outside 0..50."),
        (
            {"counts": {"images": np.array([0, 2**63], np.uint64)}},
            "images holds a number outside 0..1048576.",
        ),
        (
            {"update": {"head": np.full((4, 2, 3), np.nan)}},
            "the update of tensor 'head' is not finite: training diverged; lower the learning rate"
            " or check the images.",
        ),
    ],
)
def test_what_does_not_fit_the_plan_is_refused_before_masking(
    changes: dict[str, Any], says: str
) -> None:
    arguments = dict(GOOD)
    for name, change in changes.items():
        if isinstance(change, dict):
            merged = {**GOOD[name], **change}
            change = {key: value for key, value in merged.items() if value is not None}
        arguments[name] = change
    with pytest.raises(SiteError) as caught:
        plan_by_row(3).encode(**arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("place", "word", "says"),
    [
        (-1, 0, "the weights sum to 0; a site sent a wrong vector."),
        (-1, 151, "the weights sum to 151; a site sent a wrong vector."),
        (-1, 2**32 - 1, "the weights sum to 4294967295; a site sent a wrong vector."),
        (-2, 13, "13 values of tensor 'bias' were clipped; a site sent a wrong vector."),
        (-4, 2**31, "2147483648 values of tensor 'body' were clipped; a site sent a wrong vector."),
        (31, 151, "classes sums to 151; a site sent nonsense."),
        (36, 2**32 - 1, "images sums to 4294967295; a site sent nonsense."),
    ],
)
def test_a_sum_that_no_sites_could_have_is_refused(place: int, word: int, says: str) -> None:
    plan = plan_by_row(3)
    total = summed(3 * [plan.encode(**GOOD)])
    plan.decode(total)
    total[place] = word
    with pytest.raises(PlanError) as caught:
        plan.decode(total)
    assert str(caught.value) == says


@pytest.mark.parametrize(
    ("place", "word"), [(-1, 150), (-1, 1), (-2, 12), (-4, 9), (31, 150), (36, 3 * 2**20)]
)
def test_sums_at_the_edge_pass(place: int, word: int) -> None:
    plan = plan_by_row(3)
    total = summed(3 * [plan.encode(**GOOD)])
    total[place] = word
    plan.decode(total)


# --- plans that cannot be summed -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            NumberPlan(4, 2**30, ()),
            "the sum of the weights: 31 + 2 bits needed, 32 available; lower max_images_per_site.",
        ),
        (
            NumberPlan(5, 1, (TensorPlan("huge", (2**15, 2**15), 0),)),
            "the clip count of the largest tensor: 31 + 3 bits needed, 32 available; split the"
            " tensor.",
        ),
        (
            NumberPlan(2**24, 1, ()),
            "8 bits of precision: 9 + 24 bits needed, 32 available; run with fewer sites.",
        ),
        (
            NumberPlan(3, 1, (), (CountPlan("images", 1, 2**31),)),
            "the sum of images: 32 + 2 bits needed, 32 available; lower its bound.",
        ),
        (NumberPlan(0, 1, ()), "0 sites and a largest weight of 1."),
        (NumberPlan(3, 0, ()), "3 sites and a largest weight of 0."),
        (
            NumberPlan(3, 1, (TensorPlan("a", (2,), 0), TensorPlan("a", (3,), 0))),
            "two tensors or counts of the number plan have the same name.",
        ),
        (
            NumberPlan(3, 1, (TensorPlan("a", (2,), 0),), (CountPlan("a", 2, 1),)),
            "two tensors or counts of the number plan have the same name.",
        ),
        (
            NumberPlan(3, 1, (TensorPlan("a", (0, 4), 0),)),
            "tensor 'a' has no values or no range of float32.",
        ),
        (
            NumberPlan(3, 1, (TensorPlan("a", (-2, -2), 0),)),
            "tensor 'a' has no values or no range of float32.",
        ),
        (
            NumberPlan(3, 1, (TensorPlan("a", (2,), 128),)),
            "tensor 'a' has no values or no range of float32.",
        ),
        (
            NumberPlan(3, 1, (TensorPlan("a", (2,), -127),)),
            "tensor 'a' has no values or no range of float32.",
        ),
        (
            replace(plan_by_row(3), counts=(CountPlan("images", 4, 50),)),
            "tensor 'head' has no fitting row weights.",
        ),
        (
            replace(plan_by_row(3), counts=(CountPlan("classes", 5, 50),)),
            "tensor 'head' has no fitting row weights.",
        ),
        (
            replace(plan_by_row(3), counts=(CountPlan("classes", 4, 49),)),
            "tensor 'head' has no fitting row weights.",
        ),
        (
            NumberPlan(3, 50, (TensorPlan("a", (), 0, "rows"),), (CountPlan("rows", 1, 50),)),
            "tensor 'a' has no fitting row weights.",
        ),
    ],
)
def test_a_plan_whose_sum_cannot_be_held_says_why(plan: NumberPlan, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan.check()
    assert str(caught.value) == says


@pytest.mark.parametrize(
    "plan",
    [
        plan_by_row(3),
        plan_for(64, 127),
        plan_for(64, -126),
        NumberPlan(4, 2**30 - 1, ()),
        NumberPlan(3, 1, (), (CountPlan("images", 1, (2**32 - 1) // 3),)),
        NumberPlan(2**24 - 1, 1, ()),
        NumberPlan(4, 1, (TensorPlan("huge", (2**15, 2**15 - 1), 0),)),
    ],
)
def test_a_plan_at_the_edge_passes(plan: NumberPlan) -> None:
    plan.check()


@relaxed
@given(st.integers(1, 64), st.integers(1, 2**32), st.integers(1, 2**32))
def test_a_plan_that_passes_cannot_overflow(sites: int, max_weight: int, bound: int) -> None:
    plan = NumberPlan(sites, max_weight, plan_for(3).tensors, (CountPlan("n", 1, bound),))
    held = max(max_weight, bound) * sites < 2**32
    assert plan.level * sites < 2**31
    if held:
        plan.check()
        return
    with pytest.raises(PlanError, match="bits needed, 32 available"):
        plan.check()


@relaxed
@given(st.sampled_from([-126, -20, 0, 127]), st.integers(1, 64))
def test_the_smallest_and_the_largest_ranges_can_be_used(exponent: int, sites: int) -> None:
    plan = NumberPlan(sites, 1, (TensorPlan("a", (3,), exponent),))
    bound = np.float32(2.0**exponent)
    words = plan.encode({"a": np.array([bound, -bound, 0], np.float32)}, 1)
    mean = plan.decode(summed(sites * [words])).mean["a"]
    assert np.allclose(mean / bound, [1, -1, 0], rtol=1e-6)


# --- the digest ----------------------------------------------------------------------------------


def test_plans_that_differ_in_anything_have_different_digests() -> None:
    base = plan_by_row(3)
    body, head, bias = base.tensors
    classes, images = base.counts
    others = [
        replace(base, sites=4),
        replace(base, max_weight=49),
        replace(base, tensors=(body, head)),
        replace(base, tensors=(head, body, bias)),
        replace(base, tensors=(replace(body, name="torso"), head, bias)),
        replace(base, tensors=(replace(body, shape=(3, 1)), head, bias)),
        replace(base, tensors=(replace(body, exponent=1), head, bias)),
        replace(base, tensors=(body, replace(head, row_weights=""), bias)),
        replace(base, tensors=(body, replace(head, row_weights="images"), bias)),
        replace(base, counts=(classes,)),
        replace(base, counts=(images, classes)),
        replace(base, counts=(replace(classes, name="class"), images)),
        replace(base, counts=(replace(classes, size=5), images)),
        replace(base, counts=(replace(classes, bound=49), images)),
    ]
    assert len({plan.digest for plan in (base, *others)}) == 1 + len(others)
    assert plan_by_row(3).digest == base.digest


def test_a_name_cannot_make_one_plan_look_like_another() -> None:
    counted = NumberPlan(3, 1, (TensorPlan("a", (2,), 0),), (CountPlan("n", 2, 5),))
    weighted = NumberPlan(3, 1, (TensorPlan("a", (2,), 0, "\nn|2|5"),))
    assert counted.digest != weighted.digest


def test_a_plan_has_the_same_digest_whatever_its_numbers_are_made_of() -> None:
    plain = NumberPlan(3, 1, (TensorPlan("a", (2, 3), 4),))
    shape = tuple(np.array([2, 3]))
    counted = NumberPlan(3, 1, (TensorPlan("a", shape, int(np.int32(4))),))
    assert plain.digest == counted.digest
