"""Four ways to score a syndrome by the similarities of a query with the gallery's images.

None of them trains. An image that was not released (similarity -inf) has no say: it is neither a
neighbour nor part of a mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Gallery

Floats = NDArray[np.floating]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class NearestImage:
    """A syndrome scores as its nearest image: the field's standard (Hsieh et al. 2022)."""

    name: str = "nearest-image"
    summary: str = "a syndrome scores as its nearest image"
    licence: str = "Apache-2.0"
    pools_subjects: bool = False

    def scores(self, similarities: Floats, gallery: Gallery) -> Floats:
        """Largest similarity by syndrome."""
        return _largest(similarities, gallery.syndrome_starts)


@dataclass(frozen=True)
class Patient:
    """A syndrome scores as its nearest subject, all photographs of both sides taken together.

    The score of two subjects is the mean over all pairs of their photographs, which is the inner
    product of their mean encodings.
    """

    name: str = "patient"
    summary: str = "a syndrome scores as its nearest subject; photographs of a subject are pooled"
    licence: str = "Apache-2.0"
    pools_subjects: bool = True

    def scores(self, similarities: Floats, gallery: Gallery) -> Floats:
        """Largest mean similarity of a subject, by syndrome."""
        starts = gallery.subject_starts
        syndromes = gallery.syndromes[starts]
        subjects = _means(similarities, starts)
        return _largest(subjects, np.flatnonzero(np.diff(syndromes, prepend=-1)))


@dataclass(frozen=True)
class ClassMean:
    """A syndrome scores as the mean of its images: the inner product with its mean encoding."""

    name: str = "class-mean"
    summary: str = "a syndrome scores as the mean similarity of its images"
    licence: str = "Apache-2.0"
    pools_subjects: bool = False

    def scores(self, similarities: Floats, gallery: Gallery) -> Floats:
        """Mean similarity by syndrome."""
        return _means(similarities, gallery.syndrome_starts)


@dataclass(frozen=True)
class NeighbourVote:
    """A syndrome scores as its number of images among the nearest ones, then as its nearest image.

    The score is the number of votes plus (1 + s) / 4 for the nearest image's cosine s, so that
    syndromes with equally many votes, or none, keep the order of their nearest images. Frequent
    syndromes have more images that can vote.

    Attributes:
        neighbours: how many images vote.
    """

    neighbours: int = 10
    name: str = "neighbour-vote"
    summary: str = "a syndrome scores as its number of images among the ten nearest"
    licence: str = "Apache-2.0"
    pools_subjects: bool = False

    def scores(self, similarities: Floats, gallery: Gallery) -> Floats:
        """Votes by syndrome; the fraction breaks ties."""
        result = (1 + _largest(similarities, gallery.syndrome_starts).astype(np.float64)) / 4
        count = min(self.neighbours, similarities.shape[1])
        voters = np.argpartition(similarities, -count, axis=1)[:, -count:]
        released = np.isfinite(np.take_along_axis(similarities, voters, 1))
        rows = np.broadcast_to(np.arange(len(voters))[:, None], voters.shape)
        np.add.at(result, (rows[released], gallery.syndromes[voters[released]]), 1)
        return result


def _largest(similarities: Floats, starts: Integers) -> Floats:
    result: Floats = np.maximum.reduceat(similarities, starts, axis=1)
    return result


def _means(similarities: Floats, starts: Integers) -> Floats:
    """Means over runs of columns, of what was released; -inf where nothing was."""
    released = np.isfinite(similarities)
    counts = np.add.reduceat(released, starts, axis=1, dtype=np.int64)
    sums = np.add.reduceat(np.where(released, similarities, 0), starts, axis=1, dtype=np.float64)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
