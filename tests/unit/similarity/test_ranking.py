"""Ranking, the four tables and Gram blocks, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.similarity.evaluation import (
    FREQUENT_GALLERY,
    FREQUENT_TEST,
    MAXIMUM_SPLITS,
    Outcome,
    evaluate_tables,
    rank_tables,
    rare_gallery,
    rare_test,
    roles_of,
)
from fedgestalt.similarity.gram import dense_gram
from fedgestalt.similarity.ranking import score_syndromes


def plain_rank(row: np.ndarray, gallery: np.ndarray, truth: int) -> int:
    """Rank of ``truth`` when every syndrome scores as its best image, ties against the query."""
    best = {int(s): row[gallery == s].max() for s in set(gallery.tolist())}
    return sum(score >= best[truth] for score in best.values()) if truth in best else 0


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32))
def test_ranks_equal_the_plain_definition(q: int, g: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarities = np.round(rng.normal(size=(q, g)), 1)
    gallery = rng.integers(0, classes, g)
    truth = rng.integers(0, classes + 2, q)
    ranks = score_syndromes(similarities, gallery).ranks(truth)
    assert ranks.tolist() == [
        plain_rank(r, gallery, t) for r, t in zip(similarities, truth, strict=True)
    ]


def test_top_lists_syndromes_best_first() -> None:
    scored = score_syndromes(np.array([[0.1, 0.9, 0.5, 0.7]]), np.array([3, 1, 2, 3]))
    assert scored.top(0, 2) == [(1, 0.9), (3, 0.7)]


def test_gram_blocks_equal_the_product_for_any_block_size() -> None:
    rng = np.random.default_rng(0)
    queries, gallery = rng.normal(size=(7, 5)), rng.normal(size=(11, 5))
    dense = dense_gram(queries, gallery, lambda a, b: a @ b.T)
    assert np.allclose(dense, queries @ gallery.T, atol=1e-6)


def test_role_bits_are_all_different_and_fit_32_bits() -> None:
    bits = [FREQUENT_GALLERY, FREQUENT_TEST]
    bits += [f(s) for f in (rare_gallery, rare_test) for s in range(MAXIMUM_SPLITS)]
    assert len(set(bits)) == len(bits) == 2 + 2 * MAXIMUM_SPLITS
    assert sum(bits) == np.bitwise_or.reduce(bits) < 2**32


def test_tables_use_the_gallery_and_queries_of_their_definition() -> None:
    ids = list("abcdef")
    roles = roles_of(ids, "ab", "c", [("d", "e"), ("e", "d")])
    syndromes = np.array([1, 2, 1, 8, 9, 9])
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 6))
    tables = {
        (t.table, t.split): t for t in rank_tables(scores, syndromes, roles, syndromes, roles)
    }
    assert tables.keys() == {
        ("frequent", 0),
        *((t, s) for t in ("rare", "frequent-in-all", "rare-in-all") for s in (0, 1)),
    }
    assert tables["frequent", 0].rows.tolist() == [2]
    assert tables["frequent", 0].gallery == 2
    assert tables["rare", 0].rows.tolist() == [4]
    assert tables["rare", 1].rows.tolist() == [3]
    assert tables["rare", 0].ranks.tolist() == [0], "syndrome 9 is not in this gallery"
    assert tables["frequent-in-all", 1].gallery == 3
    assert tables["rare-in-all", 0].syndromes == 3


def test_mean_per_syndrome_accuracy_weighs_syndromes_not_images() -> None:
    outcomes = [Outcome("frequent", 0, f"s{i}", 1, 1) for i in range(9)]
    outcomes += [Outcome("frequent", 0, "t", 2, 7)]
    row = evaluate_tables(outcomes, {("frequent", 0): 40}, np.random.default_rng(0), 200)[
        "frequent"
    ]
    assert row["top1"] == pytest.approx(0.5)
    assert row["top10"] == pytest.approx(1.0)
    assert (row["gallery"], row["test"]) == (40, 10)


def test_rare_tables_are_means_over_splits() -> None:
    outcomes = [Outcome("rare", 0, "s", 1, 1), Outcome("rare", 1, "s", 1, 2)]
    sizes = {("rare", 0): 10, ("rare", 1): 20}
    row = evaluate_tables(outcomes, sizes, np.random.default_rng(0), 100)["rare"]
    assert row["top1"] == pytest.approx(0.5)
    assert row["gallery"] == 15


def test_a_query_whose_syndrome_the_gallery_lacks_is_a_miss_at_every_k() -> None:
    row = evaluate_tables(
        [Outcome("frequent", 0, "s", 1, 0)], {("frequent", 0): 5}, np.random.default_rng(0), 50
    )["frequent"]
    assert [row[f"top{k}"] for k in (1, 5, 10, 30)] == [0, 0, 0, 0]


def test_bootstrap_intervals_hold_the_estimate_and_shrink_with_more_subjects() -> None:
    rng = np.random.default_rng(3)

    def interval(subjects: int) -> tuple[float, float, float]:
        outcomes = [
            Outcome("frequent", 0, f"s{i}", i % 4, int(rng.integers(1, 4))) for i in range(subjects)
        ]
        row = evaluate_tables(outcomes, {("frequent", 0): 9}, np.random.default_rng(0), 400)
        low, high = row["frequent"]["interval"]["top1"]
        return low, row["frequent"]["top1"], high

    few, many = interval(20), interval(800)
    for low, point, high in (few, many):
        assert low <= point <= high
    assert many[2] - many[0] < (few[2] - few[0]) / 2


def test_a_query_whose_split_has_no_gallery_is_ranked_as_a_miss_when_the_split_is_asked_for() -> (
    None
):
    roles = np.array([FREQUENT_GALLERY, FREQUENT_TEST, rare_test(1)], np.uint32)
    syndromes = np.array([1, 1, 9])
    scores = np.eye(3)
    asked = rank_tables(scores, syndromes, roles, syndromes, roles, range(2))
    ranks = {(t.table, t.split): t.ranks.tolist() for t in asked}
    assert ranks["rare", 1] == ranks["rare-in-all", 1] == [0]
    assert ranks["frequent-in-all", 1] == ranks["frequent", 0] == [1]
    by_default = rank_tables(scores, syndromes, roles, syndromes, roles)
    assert [t.table for t in by_default] == ["frequent"]
