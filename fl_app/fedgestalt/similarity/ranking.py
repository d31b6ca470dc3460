"""From similarities to ranked syndromes.

How a syndrome scores is a plugin (:class:`fedgestalt.contracts.RankingStrategy`); without one it
scores as its nearest gallery image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Gallery, RankingStrategy
from fedgestalt.errors import PluginError

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SyndromeScores:
    """Scores of queries by syndrome, larger is nearer.

    Attributes:
        scores: (queries, syndromes).
        syndromes: (syndromes,) ids, ascending: the syndromes that the gallery has.
    """

    scores: Floats
    syndromes: Integers

    def ranks(self, truth: Integers) -> Integers:
        """Rank of each query's true syndrome, from 1; 0 where the gallery lacks the syndrome.

        Ties count against the query: a syndrome that scores the same comes first.
        """
        ranks = np.zeros(len(truth), np.int64)
        column = np.searchsorted(self.syndromes, truth)
        column = np.minimum(column, len(self.syndromes) - 1)
        known = np.flatnonzero(self.syndromes[column] == truth)
        own = self.scores[known, column[known]]
        ranks[known] = (self.scores[known] >= own[:, None]).sum(1)
        return ranks

    def top(self, query: int, count: int) -> list[tuple[int, float]]:
        """The ``count`` best (syndrome, score) of one query, best first."""
        order = np.argsort(-self.scores[query], kind="stable")[:count]
        return [(int(self.syndromes[i]), float(self.scores[query, i])) for i in order]


def score_syndromes(
    similarities: Floats,
    gallery_syndromes: Integers,
    ranking: RankingStrategy | None = None,
    gallery_subjects: NDArray[np.generic] | None = None,
) -> SyndromeScores:
    """Score every syndrome of the gallery.

    Args:
        similarities: (queries, gallery).
        gallery_syndromes: (gallery,) ids; at least one.
        ranking: how; by default a syndrome scores as its nearest image.
        gallery_subjects: (gallery,) names or numbers of subjects; by default each image has its
            own.

    Raises:
        PluginError: the strategy returned something else than a score for each syndrome.
    """
    order = gallery_order(gallery_syndromes, gallery_subjects)
    subjects = None if gallery_subjects is None else gallery_subjects[order]
    return score_sorted(similarities[:, order], gallery_syndromes[order], ranking, subjects)


def gallery_order(syndromes: Integers, subjects: NDArray[np.generic] | None = None) -> Integers:
    """The order of columns that :class:`~fedgestalt.contracts.Gallery` asks for; stable."""
    keys = (syndromes,) if subjects is None else (subjects, syndromes)
    return np.lexsort(keys)


def score_sorted(
    similarities: Floats,
    syndromes: Integers,
    ranking: RankingStrategy | None = None,
    subjects: NDArray[np.generic] | None = None,
) -> SyndromeScores:
    """Like :func:`score_syndromes`, for columns in :func:`gallery_order`."""
    new_syndrome = _changes(syndromes)
    starts = np.flatnonzero(new_syndrome)
    if ranking is None:
        scores = np.maximum.reduceat(similarities, starts, axis=1)
        return SyndromeScores(scores, syndromes[starts])
    new_subject = np.ones(len(syndromes), bool) if subjects is None else _changes(subjects)
    gallery = Gallery(np.cumsum(new_syndrome) - 1, np.cumsum(new_subject | new_syndrome) - 1)
    scores = np.asarray(ranking.scores(similarities, gallery))
    expected = (len(similarities), len(starts))
    if scores.shape != expected or np.isnan(scores).any():
        raise PluginError(
            f"ranking strategy {ranking.name!r} returned scores of shape {scores.shape} or not a"
            f" number, where {expected} are due"
        )
    return SyndromeScores(scores, syndromes[starts])


def pool_queries(similarities: Floats, subjects: NDArray[np.generic]) -> tuple[Floats, Integers]:
    """Average the rows of each subject.

    Args:
        similarities: (queries, gallery); -inf, where nothing was released, is left out.
        subjects: (queries,).

    Returns:
        Means (subjects, gallery) and the row of each subject's first query, in order of subjects.
    """
    order = np.argsort(subjects, kind="stable")
    starts = np.flatnonzero(_changes(subjects[order]))
    rows = similarities[order]
    released = np.isfinite(rows)
    counts = np.add.reduceat(released, starts, axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.where(released, rows, 0), starts, axis=0, dtype=np.float64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf), order[starts]


def _changes(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Whether each value differs from the one before."""
    result = np.ones(len(values), bool)
    result[1:] = values[1:] != values[:-1]
    return result
