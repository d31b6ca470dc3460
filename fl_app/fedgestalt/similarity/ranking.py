"""From similarities to ranked syndromes: the score of a syndrome is its nearest gallery image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SyndromeScores:
    """Best similarity per syndrome.

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
        """The ``count`` best (syndrome, similarity) of one query, best first."""
        order = np.argsort(-self.scores[query], kind="stable")[:count]
        return [(int(self.syndromes[i]), float(self.scores[query, i])) for i in order]


def score_syndromes(similarities: Floats, gallery_syndromes: Integers) -> SyndromeScores:
    """Score every syndrome of the gallery by its nearest image.

    Args:
        similarities: (queries, gallery).
        gallery_syndromes: (gallery,) ids; at least one.
    """
    if (np.diff(gallery_syndromes) < 0).any():
        order = np.argsort(gallery_syndromes, kind="stable")
        similarities, gallery_syndromes = similarities[:, order], gallery_syndromes[order]
    syndromes, starts = np.unique(gallery_syndromes, return_index=True)
    best = np.maximum.reduceat(similarities, starts, axis=1)
    return SyndromeScores(best, syndromes)
