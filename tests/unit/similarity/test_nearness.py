"""Distances to the k-th nearest subject, their p-values, and how well these separate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import DataError
from fedgestalt.similarity.nearness import calibrate, kth_distances, measure_separation


def unit(rng: np.random.Generator, count: int, size: int = 8) -> np.ndarray:
    rows = rng.normal(size=(count, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_the_distance_is_to_the_kth_subject_by_its_nearest_photograph(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    subjects = np.concatenate([np.arange(6), rng.integers(0, 6, 9)])
    similarities = rng.uniform(-1, 1, (3, 15))
    expected = [
        sorted(min(1 - row[subjects == s]) for s in range(6))[k - 1] for row in similarities
    ]
    np.testing.assert_allclose(kth_distances(similarities, subjects, k), expected)


def test_the_own_subject_is_no_neighbour() -> None:
    subjects = np.array(["a", "a", "b", "c"])
    similarities = np.array([[1.0, 0.9, 0.5, 0.2]])
    left_out = kth_distances(similarities, subjects, 1, own_subjects=np.array(["a"]))
    assert left_out == pytest.approx([0.5])


def test_a_distance_is_infinite_where_too_few_subjects_were_released() -> None:
    row = np.array([[0.9, 0.8, -np.inf, -np.inf]])
    distances = kth_distances(row, np.array([1, 1, 2, 3]), 2)
    assert np.isposinf(distances).all()


def test_p_values_are_uniform_for_new_subjects_of_the_same_population() -> None:
    rng, p_values = np.random.default_rng(0), []
    for _ in range(30):
        rows = unit(rng, 200)
        gallery, queries = rows[:160], rows[160:]
        names = np.arange(160)
        yardstick = calibrate(gallery @ gallery.T, names, names, 2)
        p_values.append(yardstick.p_values(kth_distances(queries @ gallery.T, names, 2)))
    pooled = np.concatenate(p_values)
    for level in (0.05, 0.2, 0.5, 0.8):
        assert (pooled <= level).mean() == pytest.approx(level, abs=0.05)


def test_a_subject_with_many_photographs_counts_once() -> None:
    rng = np.random.default_rng(1)
    rows, names = unit(rng, 12), np.arange(12)
    once = calibrate(rows @ rows.T, names, names, 1)
    more = np.concatenate([rows, np.repeat(rows[:1], 9, axis=0)])
    many = np.concatenate([names, np.zeros(9, np.int64)])
    often = calibrate(more @ more.T, many, many, 1)
    distances = np.linspace(0, 2, 50)
    np.testing.assert_allclose(once.p_values(distances), often.p_values(distances))


def test_p_values_fall_with_the_distance_and_never_reach_zero() -> None:
    rows, names = unit(np.random.default_rng(2), 19), np.arange(19)
    yardstick = calibrate(rows @ rows.T, names, names)
    p_values = yardstick.p_values(np.array([0.0, 0.3, 0.6, 2.1, np.inf]))
    assert (np.diff(p_values) <= 0).all()
    assert (p_values[0], p_values[-1]) == (1, 1 / 20)


@pytest.mark.parametrize("level", [0.05, 0.1, 0.37])
def test_the_threshold_is_where_the_p_value_reaches_the_level(level: float) -> None:
    rows, names = unit(np.random.default_rng(3), 50), np.arange(50)
    yardstick = calibrate(rows @ rows.T, names, names)
    threshold = yardstick.threshold(level)
    around = np.array([np.nextafter(threshold, 0), threshold])
    below, at = yardstick.p_values(around)
    assert at <= level < below
    assert np.isposinf(yardstick.threshold(0.01)), "50 subjects cannot say so little"


def test_a_gallery_that_is_too_small_is_refused() -> None:
    names = np.array([1, 2, 3])
    with pytest.raises(DataError, match="3 subjects, too few"):
        calibrate(np.eye(3), names, names, 3)
    with pytest.raises(DataError, match="no image"):
        calibrate(np.zeros((0, 3)), names[:0], names, 1)


@given(st.integers(0, 2**32))
def test_the_auroc_counts_pairs_and_half_of_the_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known, others = (np.round(rng.random(n), 1) for n in (7, 9))
    pairs = [(k > o) + (k == o) / 2 for k in known for o in others]
    found = measure_separation(known, others, 0.3)
    assert found.auroc == pytest.approx(np.mean(pairs))
    assert found.false_alarms == pytest.approx((known <= 0.3).mean())
    assert found.misses == pytest.approx((others > 0.3).mean())


def test_a_separation_needs_both_kinds() -> None:
    with pytest.raises(DataError, match="both kinds"):
        measure_separation(np.array([0.5]), np.array([]))
