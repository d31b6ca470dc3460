"""The global model: one vector, the same bits at every party."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedgestalt.federation.training.model import GlobalModel, Optimiser, ServerStep
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


# --- the server's optimiser ----------------------------------------------------------------------

HALF = ServerStep(momentum=0.5)


def norm_state() -> SharedState:
    return {
        "a/neck/weight": np.array([1, 2, 3], np.float32),
        "a/neck/running_mean": np.array([4], np.float32),
        "a/neck/running_second_moment": np.array([17], np.float32),
    }


means = hnp.arrays(np.float32, 3, elements=st.floats(-10, 10, width=32))


@given(steps=st.lists(means, min_size=1, max_size=5), momentum=st.floats(0.01, 0.99))
def test_with_a_momentum_every_step_takes_a_share_of_the_last_again(
    steps: list[NDArray[np.float32]], momentum: float
) -> None:
    model, right = GlobalModel(norm_state(), ServerStep(momentum=momentum)), norm_state()
    velocity, beta = np.zeros(3, np.float32), np.float32(momentum)
    for step in steps:
        mean = {name: np.ones_like(values) for name, values in right.items()}
        mean["a/neck/weight"] = step
        change = model.change(mean)["a/neck/weight"]
        model.step(mean)
        velocity = beta * velocity + step
        right["a/neck/weight"] = right["a/neck/weight"] + velocity
        assert change.tobytes() == velocity.tobytes(), "what the norm check looks at"
    assert model.state["a/neck/weight"].tobytes() == right["a/neck/weight"].tobytes()


def test_running_statistics_have_no_momentum() -> None:
    model = GlobalModel(norm_state(), ServerStep(momentum=0.9))
    ones = {name: np.ones_like(values) for name, values in norm_state().items()}
    for _ in range(3):
        assert model.change(ones)["a/neck/running_mean"] == 1
        model.step(ones)
    assert model.state["a/neck/running_mean"] == 7
    assert model.state["a/neck/running_second_moment"] == 20
    assert model.state["a/neck/weight"][0] == np.float32(1 + 1 + 1.9 + 2.71)


@given(
    steps=st.lists(means, min_size=1, max_size=5),
    rate=st.floats(1e-3, 1),
    momentum=st.floats(0, 0.99),
)
def test_adam_follows_the_publication(
    steps: list[NDArray[np.float32]], rate: float, momentum: float
) -> None:
    """Reddi et al. 2021, algorithm 2, in double precision."""
    model = GlobalModel(norm_state(), ServerStep(Optimiser.ADAM, rate, momentum))
    right = norm_state()["a/neck/weight"].astype(np.float64)
    velocity, squares = np.zeros(3), np.full(3, 1e-12)
    for step in steps:
        mean = {name: np.ones_like(values) for name, values in norm_state().items()}
        mean["a/neck/weight"] = step
        before = model.state["a/neck/weight"].copy()
        change = model.change(mean)["a/neck/weight"]
        model.step(mean)
        velocity = momentum * velocity + (1 - momentum) * step
        squares = 0.99 * squares + 0.01 * np.float64(step) ** 2
        right += rate * velocity / (np.sqrt(squares) + 1e-6)
        assert model.state["a/neck/weight"].tobytes() == (before + change).tobytes()
    np.testing.assert_allclose(model.state["a/neck/weight"], right, rtol=1e-3, atol=1e-3)
    assert model.state["a/neck/running_mean"] == 4 + len(steps), "statistics follow the mean"


def test_a_learning_rate_makes_steps_shorter_but_not_those_of_statistics() -> None:
    model = GlobalModel(norm_state(), ServerStep(learning_rate=0.25))
    model.step({name: np.ones_like(values) for name, values in norm_state().items()})
    assert model.state["a/neck/weight"].tolist() == [1.25, 2.25, 3.25]
    assert model.state["a/neck/running_mean"] == 5


def test_without_a_momentum_nothing_but_the_model_is_held() -> None:
    model = GlobalModel(norm_state())
    assert model.tensors.keys() == model.state.keys() == norm_state().keys()
    mean = norm_state()
    assert model.change(mean) is mean


def test_the_settings_are_part_of_the_digest_from_the_start() -> None:
    steps = [
        ServerStep(kind, rate, beta) for kind in Optimiser for rate in (1, 2) for beta in (0, 0.5)
    ]
    digests = {GlobalModel(norm_state(), step).digest for step in steps}
    assert len(digests) == len(steps)
    for step in steps:
        model = GlobalModel(norm_state(), step)
        assert [other for other in steps if model.moves_by(other)] == [step]


def test_velocity_and_momentum_travel_with_the_model() -> None:
    model = GlobalModel(norm_state(), HALF)
    ones = {name: np.ones_like(values) for name, values in norm_state().items()}
    model.step(ones)
    fetched, recalled = (GlobalModel(norm_state(), HALF) for _ in range(2))
    fetched.load(model.flat)
    assert recalled.take({name: values.copy() for name, values in model.tensors.items()})
    for other in (fetched, recalled):
        assert other.digest == model.digest
        other.step(ones)
    model.step(ones)
    assert fetched.digest == recalled.digest == model.digest
    assert fetched.state.keys() == norm_state().keys()


def test_a_model_of_other_tensors_is_not_taken_over() -> None:
    model = GlobalModel(norm_state(), HALF)
    before = model.digest
    assert not model.take(GlobalModel(norm_state()).tensors)
    assert not model.take({**model.tensors, "a/neck/weight": np.zeros(4, np.float32)})
    assert model.digest == before


def test_a_model_without_tensors_has_a_digest_as_well() -> None:
    assert GlobalModel({}).digest == shared_state_digest({})
    assert GlobalModel({}).flat.size == 0
