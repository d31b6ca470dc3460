"""The global model: one vector, the same bits at every party."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedgestalt.federation.training.model import GlobalModel
from fedgestalt.learning.ensemble import SharedState, shared_state_digest

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
finite = st.floats(-1e6, 1e6, width=32)
tensors = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=finite))
states = st.dictionaries(st.text("abc/.", min_size=1, max_size=4), tensors, max_size=5)


def small() -> SharedState:
    return {
        "b/weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a/scalar": np.array(7, np.float32),
        "c/bias": np.array([-1, -2], np.float32),
    }


def same_bits(one: SharedState, other: SharedState) -> bool:
    return one.keys() == other.keys() and all(
        values.shape == other[name].shape and values.tobytes() == other[name].tobytes()
        for name, values in one.items()
    )


def test_tensors_lie_in_one_vector_in_the_order_of_their_names() -> None:
    model = GlobalModel(small())
    assert model.flat.tolist() == [7, 0, 1, 2, 3, 4, 5, -1, -2]
    assert model.flat.dtype == np.float32
    assert list(model.state) == ["a/scalar", "b/weight", "c/bias"]


@given(state=states)
def test_a_model_holds_what_it_was_made_of(state: SharedState) -> None:
    model = GlobalModel(state)
    assert same_bits(model.state, state)
    assert model.flat.size == sum(values.size for values in state.values())
    assert model.digest == shared_state_digest(state)


def test_a_model_is_a_copy() -> None:
    state = small()
    model = GlobalModel(state)
    state["b/weight"][0, 0] = 99
    assert model.state["b/weight"][0, 0] == 0
    assert model.digest == shared_state_digest(small())


def test_tensors_are_views_into_the_vector() -> None:
    model = GlobalModel(small())
    model.flat[0], model.flat[1] = 8, 9
    assert model.state["a/scalar"] == 8
    assert model.state["b/weight"][0, 0] == 9
    assert all(np.shares_memory(values, model.flat) for values in model.state.values())


def test_a_tensor_in_another_order_in_memory_is_laid_out_as_it_reads() -> None:
    turned = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    assert GlobalModel(turned).flat.tolist() == [0, 3, 1, 4, 2, 5]


@given(state=states, data=st.data())
def test_a_step_adds_the_mean_tensor_by_tensor(state: SharedState, data: st.DataObject) -> None:
    mean = {
        name: data.draw(hnp.arrays(np.float32, values.shape, elements=finite))
        for name, values in state.items()
    }
    model = GlobalModel(state)
    assert model.digest == shared_state_digest(state)
    model.step(mean)
    moved = {name: values + mean[name] for name, values in state.items()}
    assert same_bits(model.state, moved)
    assert model.digest == shared_state_digest(moved)


def test_a_step_takes_no_notice_of_what_is_no_tensor_of_the_model() -> None:
    model = GlobalModel(small())
    still = {name: np.zeros_like(values) for name, values in small().items()}
    model.step({**still, "metrics": np.ones(4, np.float32)})
    assert same_bits(model.state, small())


def test_a_step_that_lacks_a_tensor_is_no_step() -> None:
    with pytest.raises(KeyError):
        GlobalModel(small()).step({"a/scalar": np.array(1, np.float32)})


def test_the_vector_of_another_model_can_be_taken_over() -> None:
    other = GlobalModel({name: values * 2 for name, values in small().items()})
    model = GlobalModel(small())
    assert model.digest != other.digest
    model.load(other.flat)
    assert model.digest == other.digest
    assert same_bits(model.state, other.state)
    assert not np.shares_memory(model.flat, other.flat)


@pytest.mark.parametrize("flat", [np.zeros(3, np.float32), np.zeros((2, 9), np.float32)])
def test_a_vector_of_another_size_is_not_taken_over(flat: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        GlobalModel(small()).load(flat)


def test_a_model_without_tensors_has_a_digest_as_well() -> None:
    assert GlobalModel({}).digest == shared_state_digest({})
    assert GlobalModel({}).flat.size == 0
