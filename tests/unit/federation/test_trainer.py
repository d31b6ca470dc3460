"""When a site should look at its labels again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.federation.training.executor import labels_are_doubtful
from fedgestalt.federation.training.rounds import UNKNOWN
from fedgestalt.learning.data import HELD_OUT_IMAGES

MANY = HELD_OUT_IMAGES
"""So many held-out images that half of the usual agreement is never bad luck."""


def doubtful(
    own: list[float], everybody: list[float], images: int = MANY, chance: float = 0.1
) -> bool:
    return labels_are_doubtful(np.array(own), np.array(everybody, np.float32), images, chance)


def test_a_site_like_all_others_has_no_doubtful_labels() -> None:
    assert not doubtful([0.8, 0.7], [0.8, 0.7])


def test_a_site_far_below_all_has_doubtful_labels() -> None:
    assert doubtful([0.1, 0.05], [0.8, 0.7])


def test_half_as_much_agreement_is_enough() -> None:
    assert not doubtful([0.5], [1.0])
    assert doubtful([0.495], [1.0])


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
    images=st.integers(0, MANY),
    chance=st.floats(0.001, 0.5),
)
def test_a_site_at_least_as_good_as_all_is_never_doubted(
    own: list[float], better: float, images: int, chance: float
) -> None:
    assert not doubtful(own, [value * better for value in own], images, chance)


# --- where nothing was measured ------------------------------------------------------------------


def test_a_site_without_held_out_images_is_not_doubted() -> None:
    assert not doubtful([0.0], [1.0], images=0)
    assert not doubtful([], [1.0], images=0)


@pytest.mark.parametrize("everybody", [[UNKNOWN], [0.9, UNKNOWN], [UNKNOWN, 0.9]])
def test_what_nobody_measured_raises_no_doubt(everybody: list[float]) -> None:
    assert not doubtful([0.0] * len(everybody), everybody, chance=0.01)


# --- bad luck ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "doubts"), [(1, False), (3, False), (6, False), (7, True), (20, True)]
)
def test_no_right_answer_of_few_is_bad_luck(images: int, doubts: bool) -> None:
    """Of a model that is right half of the time: 0.5**6 is more than 0.01, 0.5**7 less."""
    assert doubtful([0.0], [0.5], images) == doubts


@pytest.mark.parametrize(
    ("right", "images", "doubts"),
    # P(k <= right), k of Binomial(images, 0.5): 0.0107, 0.0037, 0.0059, 0.0207
    [(1, 10, False), (1, 12, True), (4, 20, True), (5, 20, False)],
)
def test_a_few_right_answers_are_doubtful_if_that_is_rarer_than_once_in_a_hundred(
    right: int, images: int, doubts: bool
) -> None:
    assert doubtful([right / images], [0.5], images) == doubts


def test_bad_luck_is_judged_by_how_good_the_model_is_elsewhere() -> None:
    assert not doubtful([0.0], [0.6], images=5)  # 0.4**5 = 0.0102
    assert doubtful([0.0], [0.61], images=5)  # 0.39**5 = 0.0090


def test_with_a_perfect_model_a_single_image_tells() -> None:
    assert doubtful([0.0], [1.0], images=1)


def test_a_mean_that_rounding_has_lifted_above_one_counts_as_one() -> None:
    assert doubtful([0.0], [1.0001], images=1)
    assert not doubtful([1.0], [1.0001], images=1)


def test_no_right_answer_is_lost_to_rounding() -> None:
    """3 / 47 * 47 is a little less than 3; of 0.19, 3 are bad luck and 2 too few."""
    assert math.floor(3 / 47 * 47) == 2
    assert not doubtful([3 / 47], [0.19], images=47, chance=0.05)
    assert doubtful([2 / 47], [0.19], images=47, chance=0.05)


@given(images=st.integers(1, MANY), usual=st.floats(0.21, 1), seed=st.integers(0, 2**32))
def test_more_agreement_never_raises_a_doubt(images: int, usual: float, seed: int) -> None:
    less, more = sorted(np.random.default_rng(seed).integers(0, images + 1, 2) / images)
    assert doubtful([less], [usual], images) or not doubtful([more], [usual], images)


def test_a_site_like_all_others_is_rarely_blamed_however_few_its_images() -> None:
    """The promise of the test, over all that can come about: at most once in a hundred."""
    for images in (1, 2, 5, 8, 12, 30, 80):
        for usual in (0.25, 0.5, 0.75, 0.95):
            blamed = sum(
                math.comb(images, right) * usual**right * (1 - usual) ** (images - right)
                for right in range(images + 1)
                if doubtful([right / images], [usual], images)
            )
            assert blamed < 0.01, (images, usual)
