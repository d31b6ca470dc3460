"""The number plan against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedgestalt.errors import PlanError, SiteError
from fedgestalt.secagg import NumberPlan, TensorPlan

SHAPE = (3, 4)


def plan_for(sites: int, exponent: int = 0, max_weight: int = 100) -> NumberPlan:
    return NumberPlan(
        sites, max_weight, (TensorPlan("a", SHAPE, exponent), TensorPlan("b", (), exponent))
    )


def values(bound: float) -> st.SearchStrategy[np.ndarray]:
    elements = st.floats(-bound, bound, width=32, allow_subnormal=False)
    return arrays(np.float32, SHAPE, elements=elements)


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


def test_a_plan_that_could_overflow_says_how_many_bits_it_needs() -> None:
    with pytest.raises(PlanError, match=r"31 \+ 2 bits needed, 32 available; lower max_images"):
        NumberPlan(4, 2**30, ()).check()
    with pytest.raises(PlanError, match="precision"):
        NumberPlan(2**25, 1, ()).check()


def test_plans_that_differ_in_anything_have_different_digests() -> None:
    base = plan_for(3)
    others = [plan_for(4), plan_for(3, 1), plan_for(3, 0, 99), NumberPlan(3, 100, base.tensors[:1])]
    assert len({p.digest for p in (base, *others)}) == 5
    assert plan_for(3).digest == base.digest
