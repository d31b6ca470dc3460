"""When a site should look at its labels again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.federation.trainer import labels_are_doubtful


def doubtful(own: list[float], everybody: list[float], chance: float = 0.1) -> bool:
    return labels_are_doubtful(np.array(own), np.array(everybody, np.float32), chance)


def test_a_site_like_all_others_has_no_doubtful_labels() -> None:
    assert not doubtful([0.8, 0.7], [0.8, 0.7])


def test_a_site_far_below_all_has_doubtful_labels() -> None:
    assert doubtful([0.1, 0.05], [0.8, 0.7])


def test_half_as_much_agreement_is_enough() -> None:
    assert not doubtful([0.5], [1.0])
    assert doubtful([0.4999], [1.0])


def test_the_mean_over_the_members_counts() -> None:
    assert not doubtful([0.0, 0.8], [0.7, 0.8])
    assert doubtful([0.0, 0.7], [0.7, 0.8])


@pytest.mark.parametrize("usual", [0.05, 0.1, 0.2])
def test_nothing_is_doubtful_before_the_model_is_twice_as_good_as_chance(usual: float) -> None:
    assert not doubtful([0.0], [np.float64(np.float32(usual))], chance=np.float32(0.1))


def test_with_few_classes_only_a_good_model_raises_doubts() -> None:
    assert not doubtful([0.0], [0.66], chance=1 / 3)
    assert doubtful([0.0], [0.68], chance=1 / 3)
    assert not doubtful([0.0], [1.0], chance=1 / 2)


@pytest.mark.parametrize(
    ("own", "everybody"), [([], []), ([0.0], []), ([], [1.0]), ([0.0], [1.0, 1.0])]
)
def test_agreements_that_do_not_belong_together_raise_no_doubt(
    own: list[float], everybody: list[float]
) -> None:
    assert not doubtful(own, everybody)


@given(
    own=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    better=st.floats(0, 1),
    chance=st.floats(0.001, 0.5),
)
def test_a_site_at_least_as_good_as_all_is_never_doubted(
    own: list[float], better: float, chance: float
) -> None:
    assert not doubtful(own, [value * better for value in own], chance)
