"""Ranking strategies, against plain definitions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.contracts import Gallery
from fedgestalt.errors import PluginError
from fedgestalt.hooks import get_registry
from fedgestalt.similarity.evaluation import FREQUENT_GALLERY, FREQUENT_TEST, rank_tables
from fedgestalt.similarity.ranking import pool_queries, score_syndromes
from fedgestalt_plugins.ranking import NearestImage, NeighbourVote, Patient

NAMES = ("class-mean", "nearest-image", "neighbour-vote", "patient")
RANKINGS = get_registry().rankings


def mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else -np.inf


def plain_nearest(row: np.ndarray, own: np.ndarray, subjects: np.ndarray) -> float:
    return float(row[own].max())


def plain_class_mean(row: np.ndarray, own: np.ndarray, subjects: np.ndarray) -> float:
    return mean(row[own])


def plain_patient(row: np.ndarray, own: np.ndarray, subjects: np.ndarray) -> float:
    return max(mean(row[own & (subjects == subject)]) for subject in set(subjects[own]))


def plain_vote(row: np.ndarray, own: np.ndarray, subjects: np.ndarray) -> float:
    voters = np.argsort(-row)[:10]
    votes = sum(own[v] and np.isfinite(row[v]) for v in voters)
    return float(votes + (1 + row[own].max()) / 4)


PLAIN: dict[str, Callable[..., float]] = {
    "nearest-image": plain_nearest,
    "class-mean": plain_class_mean,
    "patient": plain_patient,
    "neighbour-vote": plain_vote,
}


def drawn(seed: int, queries: int = 4, images: int = 30) -> tuple[np.ndarray, ...]:
    """Similarities with unreleased ones, syndromes and subjects in no order."""
    rng = np.random.default_rng(seed)
    similarities = rng.uniform(-1, 1, (queries, images))
    similarities[rng.random(similarities.shape) < 0.3] = -np.inf
    return similarities, rng.integers(0, 6, images) * 7, rng.integers(0, 5, images)


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), images=st.integers(1, 40))
def test_scores_equal_the_plain_definition(name: str, seed: int, images: int) -> None:
    similarities, syndromes, subjects = drawn(seed, images=images)
    scored = score_syndromes(similarities, syndromes, RANKINGS.get(name), subjects)
    assert scored.syndromes.tolist() == sorted(set(syndromes.tolist()))
    expected = [
        [PLAIN[name](row, syndromes == s, subjects) for s in scored.syndromes]
        for row in similarities
    ]
    np.testing.assert_allclose(scored.scores, expected, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_images_does_not_matter(name: str) -> None:
    similarities, syndromes, subjects = drawn(3)
    turn = np.random.default_rng(1).permutation(len(syndromes))
    here, there = (
        score_syndromes(similarities[:, o], syndromes[o], RANKINGS.get(name), subjects[o]).scores
        for o in (slice(None), turn)
    )
    np.testing.assert_allclose(here, there, atol=1e-12)


def test_without_a_strategy_syndromes_score_as_their_nearest_image() -> None:
    similarities, syndromes, _ = drawn(5)
    default = score_syndromes(similarities, syndromes)
    assert np.array_equal(
        default.scores, score_syndromes(similarities, syndromes, NearestImage()).scores
    )


def test_a_strategy_sees_columns_sorted_by_syndrome_and_then_by_subject() -> None:
    class Probe:
        name, summary, licence, pools_subjects = "probe", "looks", "MIT", False

        def scores(self, similarities: np.ndarray, gallery: Gallery) -> np.ndarray:
            self.seen = gallery
            return np.maximum.reduceat(similarities, gallery.syndrome_starts, axis=1)

    probe = Probe()
    syndromes, subjects = np.array([9, 4, 9, 4, 9]), np.array(["b", "b", "a", "b", "b"])
    score_syndromes(np.zeros((1, 5)), syndromes, probe, subjects)
    assert probe.seen.syndromes.tolist() == [0, 0, 1, 1, 1]
    assert probe.seen.subjects.tolist() == [0, 0, 1, 2, 2], "b of 4 is not b of 9"
    assert probe.seen.syndrome_starts.tolist() == [0, 2]
    assert probe.seen.subject_starts.tolist() == [0, 2, 3]


def test_three_votes_beat_one_nearer_image() -> None:
    similarities = np.array([[0.9, 0.8, 0.7, 0.6, -0.5]])
    syndromes = np.array([1, 2, 2, 2, 3])
    top = score_syndromes(similarities, syndromes, NeighbourVote(neighbours=4)).top(0, 3)
    assert [syndrome for syndrome, _ in top] == [2, 1, 3]


def test_one_lucky_photograph_does_not_make_a_patient_near() -> None:
    similarities = np.array([[0.9, 0.1, 0.6, 0.6]])
    syndromes, subjects = np.array([1, 1, 2, 2]), np.array([1, 1, 2, 2])
    nearest, patient = (
        score_syndromes(similarities, syndromes, ranking, subjects).top(0, 1)[0][0]
        for ranking in (NearestImage(), Patient())
    )
    assert (nearest, patient) == (1, 2)


def test_an_image_without_a_known_subject_is_a_subject_of_its_own() -> None:
    similarities, syndromes, _ = drawn(8)
    alone = score_syndromes(similarities, syndromes, Patient(), np.arange(len(syndromes)))
    assert np.array_equal(score_syndromes(similarities, syndromes, Patient()).scores, alone.scores)


def test_pooled_queries_are_the_means_of_what_was_released() -> None:
    rows = np.array([[1.0, -np.inf, -np.inf], [3.0, 5.0, -np.inf], [7.0, 7.0, 7.0]])
    pooled, first = pool_queries(rows, np.array(["b", "b", "a"]))
    assert pooled.tolist() == [[7, 7, 7], [2, 5, -np.inf]]
    assert first.tolist() == [2, 0]


@pytest.mark.parametrize(("name", "rows"), [("patient", [1, 0]), ("class-mean", [0, 1, 2])])
def test_only_a_strategy_that_pools_makes_a_subject_one_query(name: str, rows: list[int]) -> None:
    roles = np.array([FREQUENT_TEST] * 3 + [FREQUENT_GALLERY] * 2, np.uint32)
    syndromes = np.array([5, 6, 5, 5, 6])
    subjects = np.array(["z", "a", "z", "g", "h"])
    scores = np.array([[0.0] * 3 + [0.9, 0.5], [0.0] * 3 + [0.1, 0.4], [0.0] * 3 + [0.2, 0.5]])
    (table,) = rank_tables(
        scores,
        syndromes[:3],
        roles[:3],
        syndromes,
        roles,
        None,
        RANKINGS.get(name),
        subjects[:3],
        subjects,
    )
    assert table.rows.tolist() == rows
    ranks = dict(zip(table.rows.tolist(), table.ranks.tolist(), strict=True))
    assert ranks[0] == 1, "0.55 on average against 0.5"
    assert ranks.get(2, 2) == 2


@pytest.mark.parametrize("scores", [np.zeros((1, 9)), np.full((1, 2), np.nan)])
def test_a_strategy_that_does_not_score_every_syndrome_is_named(scores: np.ndarray) -> None:
    class Broken:
        name, summary, licence, pools_subjects = "broken", "is", "MIT", False

        def scores(self, similarities: Any, gallery: Gallery) -> np.ndarray:
            return scores

    with pytest.raises(PluginError, match="'broken' returned scores"):
        score_syndromes(np.zeros((1, 2)), np.array([1, 2]), Broken())


def test_the_example_of_the_guide_ranks() -> None:
    guide = Path(__file__).parents[3] / "docs/how-to/write-a-plugin.md"
    (code,) = re.findall(r"```python\n([^`]*class SecondNearest.*?)```", guide.read_text(), re.S)
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102
    scores = score_syndromes(
        np.array([[0.1, 0.9, 0.5, 0.7]]), np.array([3, 1, 3, 3]), names["SecondNearest"]()
    ).scores
    assert scores.tolist() == [[0.9, 0.5]]
