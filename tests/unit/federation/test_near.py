"""Near or not, from what is released to a site."""

from __future__ import annotations

import numpy as np

from fedgestalt.federation.matching.near import near_or_not
from fedgestalt.similarity.nearness import NEIGHBOURS, calibrate, kth_distances


def unit(rng: np.random.Generator, count: int, size: int = 8) -> np.ndarray:
    rows = rng.normal(size=(count, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def best_only(scores: np.ndarray, count: int) -> np.ndarray:
    """As they are released: the best ``count`` of each row, -inf elsewhere."""
    floor = np.sort(scores, axis=1)[:, [-count]]
    return np.where(scores >= floor, scores, -np.inf)


class Gallery:
    def __init__(self, subjects: int, own: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.rows = unit(rng, subjects)
        self.cases = np.array([f"case-{n:03d}" for n in range(subjects)])
        self.all = np.ones(subjects, bool)
        self.own = self.rows[:own]
        self.own_cases = list(self.cases[:own])
        self.rng = rng


def test_what_is_released_gives_the_p_values_of_the_whole_gallery() -> None:
    gallery = Gallery(80, 40)
    queries = unit(gallery.rng, 12)
    found = near_or_not(
        best_only(queries @ gallery.rows.T, 20),
        best_only(gallery.own @ gallery.rows.T, 8),
        gallery.all,
        gallery.cases,
        gallery.own_cases,
        trained=False,
    )
    scale = calibrate(gallery.own @ gallery.rows.T, gallery.cases[:40], gallery.cases)
    expected = scale.p_values(kth_distances(queries @ gallery.rows.T, gallery.cases))
    np.testing.assert_allclose(found.p_values, expected)
    assert found.about is not None
    assert found.about["calibrated_on"] == "validation"
    for row, p_value in enumerate(expected):
        assert found.of(row) == {"near": bool(p_value > 0.05), "p_value": round(p_value, 6)}


def test_few_of_the_patients_like_those_of_the_gallery_are_called_far() -> None:
    called = []
    for seed in range(30):
        gallery = Gallery(60, 40, seed)
        scores = unit(gallery.rng, 50) @ gallery.rows.T
        own = gallery.own @ gallery.rows.T
        found = near_or_not(scores, own, gallery.all, gallery.cases, gallery.own_cases, True)
        called += [found.of(row)["near"] is False for row in range(50)]
    assert 0.01 < np.mean(called) < 0.08, "the level is 0.05"


def test_a_stranger_is_called_far() -> None:
    gallery = Gallery(60, 40)
    found = near_or_not(
        np.full((1, 60), -0.9),
        gallery.own @ gallery.rows.T,
        gallery.all,
        gallery.cases,
        gallery.own_cases,
        True,
    )
    assert found.of(0)["near"] is False


def test_with_too_few_own_patients_nothing_is_called_near_or_far() -> None:
    gallery = Gallery(60, 18)
    scores = unit(gallery.rng, 3) @ gallery.rows.T
    own = gallery.own @ gallery.rows.T
    found = near_or_not(scores, own, gallery.all, gallery.cases, gallery.own_cases, True)
    assert [found.of(row)["near"] for row in range(3)] == [None] * 3
    assert found.of(0)["p_value"] is not None


def test_where_too_few_subjects_were_released_nothing_is_said() -> None:
    gallery = Gallery(60, 40)
    scores = best_only(unit(gallery.rng, 2) @ gallery.rows.T, NEIGHBOURS - 1)
    own = gallery.own @ gallery.rows.T
    found = near_or_not(scores, own, gallery.all, gallery.cases, gallery.own_cases, True)
    assert found.of(0) == found.of(1) == {"near": None, "p_value": None}


def test_rows_that_are_no_reference_do_not_make_anything_near() -> None:
    gallery = Gallery(60, 40)
    scores = np.full((1, 60), -0.9)
    scores[0, 50:] = 0.99
    reference = gallery.all.copy()
    reference[50:] = False
    own = gallery.own @ gallery.rows.T
    found = near_or_not(scores, own, reference, gallery.cases, gallery.own_cases, True)
    assert found.of(0)["near"] is False


def test_without_own_patients_or_gallery_nothing_is_said() -> None:
    gallery = Gallery(60, 40)
    scores = unit(gallery.rng, 1) @ gallery.rows.T
    none = near_or_not(scores, np.empty((0, 60)), gallery.all, gallery.cases, [], True)
    own = gallery.own @ gallery.rows.T
    small = near_or_not(scores, own, ~gallery.all, gallery.cases, gallery.own_cases, True)
    assert none.about is small.about is None
    assert none.of(0) == small.of(0) == {"near": None, "p_value": None}
