"""Recorded features beside faces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import ConfigError, DataError
from fedgestalt.similarity.phenotype import case_similarities, fuse


def plain(terms: np.ndarray, here: list[int], there: list[int]) -> float:
    if not here or not there:
        return np.nan
    forth = np.mean([max(terms[a, b] for b in there) for a in set(here)])
    back = np.mean([max(terms[a, b] for a in here) for b in set(there)])
    return float(forth + back) / 2


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=4),
)
def test_cases_compare_by_their_best_matches(here: list[list[int]], there: list[list[int]]) -> None:
    terms = np.random.default_rng(0).random((7, 7))
    terms = (terms + terms.T) / 2
    expected = [[plain(terms, a, b) for b in there] for a in here]
    np.testing.assert_allclose(case_similarities(terms, here, there), expected)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 0.6, (3, 20)), rng.random((3, 20))


def order(row: np.ndarray) -> list[int]:
    return np.argsort(-row, kind="stable").tolist()


@given(st.integers(0, 2**32))
def test_without_weight_the_face_alone_counts_exactly(seed: int) -> None:
    faces, phenotypes = drawn(seed)
    assert np.array_equal(fuse(faces, phenotypes, 0.0), faces)


def test_with_all_weight_the_phenotype_alone_orders() -> None:
    faces, phenotypes = drawn(1)
    fused = fuse(faces, phenotypes, 1.0)
    assert [order(row) for row in fused] == [order(row) for row in phenotypes]
    np.testing.assert_allclose(fused.mean(1), faces.mean(1))
    np.testing.assert_allclose(fused.std(1), faces.std(1))


def test_the_scale_of_the_phenotype_does_not_matter() -> None:
    faces, phenotypes = drawn(2)
    np.testing.assert_allclose(
        fuse(faces, 40 * phenotypes - 3, 0.4), fuse(faces, phenotypes, 0.4), atol=1e-12
    )


def test_a_query_without_terms_keeps_its_face_and_an_image_without_terms_gets_the_mean() -> None:
    faces, phenotypes = drawn(3)
    phenotypes[0] = np.nan
    phenotypes[:, 4] = np.nan
    fused = fuse(faces, phenotypes, 0.5)
    assert np.array_equal(fused[0], faces[0])
    others = np.delete(faces[1], 4)
    assert fused[1, 4] == pytest.approx((faces[1, 4] + others.mean()) / 2)


def test_what_was_not_released_stays_so_and_changes_nothing_else() -> None:
    faces, phenotypes = drawn(4)
    short = fuse(faces[:, :-1], phenotypes[:, :-1], 0.5)
    faces[:, -1] = -np.inf
    fused = fuse(faces, phenotypes, 0.5)
    assert np.isneginf(fused[:, -1]).all()
    np.testing.assert_allclose(fused[:, :-1], short)


def test_terms_that_are_alike_in_all_images_change_no_rank() -> None:
    faces, _ = drawn(5)
    fused = fuse(faces, np.full(faces.shape, 0.25), 0.7)
    assert [order(row) for row in fused] == [order(row) for row in faces]


@pytest.mark.parametrize("weight", [-0.1, 1.1, np.nan])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        fuse(*drawn(6), weight)


def test_faces_and_phenotypes_of_different_images_are_refused() -> None:
    with pytest.raises(DataError, match="not of the same images"):
        fuse(np.zeros((1, 2)), np.zeros((1, 3)), 0.5)
