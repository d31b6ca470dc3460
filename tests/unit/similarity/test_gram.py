"""Streaming over a gallery gives what the dense matrix gives, in any blocks and with ties."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import ConfigError, DataError
from fedgestalt.hooks import get_registry
from fedgestalt.similarity import gram
from fedgestalt.similarity.gram import best_per_class, dense_gram, similarities_of, top_rows
from fedgestalt.similarity.ranking import score_syndromes

SIZES = {
    "q": st.integers(1, 7),
    "g": st.integers(1, 60),
    "block": st.integers(1, 200),
    "seed": st.integers(0, 2**32),
}


def tied_rows(q: int, g: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Small integers: many scores are the same, and sums are exact in any order."""
    rng = np.random.default_rng(seed)
    return tuple(rng.integers(-2, 3, size=(n, 4)).astype(np.float32) for n in (q, g))  # type: ignore[return-value]


@settings(deadline=None)
@given(count=st.integers(1, 70), double=st.booleans(), **SIZES)
def test_the_best_rows_are_those_of_the_dense_matrix(
    q: int, g: int, block: int, seed: int, count: int, double: bool
) -> None:
    queries, gallery = tied_rows(q, g, seed)
    if double:
        queries, gallery = queries.astype(np.float64), gallery.astype(np.float64)
    dense = dense_gram(queries, gallery)
    order = np.argsort(-dense, axis=1, kind="stable")[:, :count]  # ties: the lower row first
    found = top_rows(queries, gallery, count, block_scores=block)
    assert np.array_equal(found.rows, order)
    assert np.array_equal(found.scores, np.take_along_axis(dense, order, 1))
    assert found.scores.dtype == np.float32


@settings(deadline=None)
@given(classes=st.integers(1, 9), **SIZES)
def test_the_best_of_each_class_is_that_of_the_dense_matrix(
    q: int, g: int, block: int, seed: int, classes: int
) -> None:
    queries, gallery = tied_rows(q, g, seed)
    labels = np.random.default_rng(seed).integers(0, classes, g)
    expected = score_syndromes(dense_gram(queries, gallery), labels)
    found = best_per_class(queries, gallery, labels, block_scores=block)
    assert np.array_equal(found.syndromes, expected.syndromes)
    assert np.array_equal(found.scores, expected.scores)


def test_many_queries_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_QUERIES_AT_A_TIME", 3)
    queries, gallery = tied_rows(10, 20, 1)
    labels = np.arange(20) % 4
    dense = dense_gram(queries, gallery)
    assert np.array_equal(
        top_rows(queries, gallery, 5).rows, np.argsort(-dense, 1, kind="stable")[:, :5]
    )
    assert np.array_equal(
        best_per_class(queries, gallery, labels).scores, score_syndromes(dense, labels).scores
    )


def test_rows_that_score_alike_come_by_number_even_for_zeros_of_both_signs() -> None:
    found = top_rows(np.ones((1, 1)), np.array([[-0.0], [0.0], [-0.0], [1.0]]), 4)
    assert found.rows.tolist() == [[3, 0, 1, 2]]


@pytest.mark.parametrize("name", ["isometry", "isometry-blocks", "flake"])
def test_through_a_mask_the_same_rows_come_first(name: str) -> None:
    strategy = get_registry().matching.get(name)
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(90, 64))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    (part,) = strategy.enrol(rows, bytes(32))
    masked = top_rows(part.words[:20], part.words, 10, similarities_of(strategy))
    assert np.array_equal(masked.rows, top_rows(rows[:20], rows, 10).rows)


def test_a_strategy_of_several_parties_is_not_the_servers_alone() -> None:
    with pytest.raises(ConfigError, match="'secret-shared' needs 3 computing parties"):
        similarities_of(get_registry().matching.get("secret-shared"))


def test_the_whole_matrix_is_never_held() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = (rng.normal(size=(n, 8)).astype(np.float32) for n in (500, 20_000))
    labels = rng.integers(0, 50, len(gallery))
    whole = 4 * len(queries) * len(gallery)
    for work in (
        lambda: top_rows(queries, gallery, 20, block_scores=1 << 17),
        lambda: best_per_class(queries, gallery, labels, block_scores=1 << 17),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < whole / 8


ROWS = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [1, 100])
def test_rows_that_are_not_finite_are_refused_with_their_number(value: float, block: int) -> None:
    broken = np.ones((6, 4), np.float32)
    broken[4, 1] = value
    sound = np.ones((2, 4), np.float32)
    with pytest.raises(DataError, match="row 4 of the gallery is not finite"):
        top_rows(sound, broken, 1, block_scores=block)
    with pytest.raises(DataError, match="row 4 of the gallery is not finite"):
        best_per_class(sound, broken, np.zeros(6, np.int64), block_scores=block)
    with pytest.raises(DataError, match="a query is not finite"):
        top_rows(broken, sound, 1, block_scores=block)


def test_what_does_not_go_together_is_refused_in_a_sentence() -> None:
    with pytest.raises(DataError, match="do not go with a gallery"):
        top_rows(ROWS[:, :3], ROWS, 1)
    with pytest.raises(DataError, match="do not go with a gallery"):
        top_rows(ROWS[0], ROWS, 1)
    for queries, gallery in ((ROWS[:0], ROWS), (ROWS, ROWS[:0])):
        with pytest.raises(DataError, match="nothing to compare"):
            best_per_class(queries, gallery, np.zeros(len(gallery), np.int64))
    with pytest.raises(DataError, match="one is the least"):
        top_rows(ROWS, ROWS, 0)
    with pytest.raises(DataError, match="4 rows do not go with classes"):
        best_per_class(ROWS, ROWS, np.zeros(3, np.int64))
