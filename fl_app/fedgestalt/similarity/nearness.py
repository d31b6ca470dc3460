"""Is any known syndrome near at all? A query's distance against the gallery's own distances.

The distance of a query is that to its k-th nearest *subject* of the gallery (a subject counts once,
as its nearest photograph), 1 - cosine. The gallery gives the yardstick: the same distance of each
of its images when its own subject is left out. The p-value is conformal (Vovk, Gammerman and Shafer
2005, "Algorithmic Learning in a Random World"): under the assumption that the query is one more
subject of the gallery's population, a p-value of at most a comes up with probability a. Images that
the ensemble was trained on do not belong to that population.

A small p-value says that the query is farther from everybody than diagnosed patients are from each
other: that its ranked syndromes deserve little trust. A large one does not say that the person is
affected, nor by what: unaffected faces have near neighbours, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import DataError
from fedgestalt.similarity.ranking import Floats

NEIGHBOURS: Final = 3
ENOUGH_SUBJECTS: Final = 20
"""With as many, a yardstick of images apart (``validation``) is taken; level 0.05 needs 19."""
LEVEL: Final = 0.05


@dataclass(frozen=True)
class Nearness:
    """The yardstick of one gallery.

    Attributes:
        neighbours: the k of the k-th nearest subject.
        distances: (images,) ascending, each with its own subject left out.
        weights: (images,) that add up to the number of subjects: each subject counts once.
    """

    neighbours: int
    distances: Floats
    weights: Floats

    def p_values(self, distances: Floats) -> Floats:
        """(queries,) share of the gallery that lies at least as far out; from 1 / (subjects + 1).

        Args:
            distances: (queries,) of :func:`kth_distances` with the same ``neighbours``.
        """
        beyond = np.concatenate([np.cumsum(self.weights[::-1])[::-1], [0.0]])
        place = np.searchsorted(self.distances, distances, side="left")
        p_values: Floats = (1 + beyond[place]) / (1 + beyond[0])
        return p_values

    def threshold(self, level: float) -> float:
        """The distance from which on the p-value is at most ``level``; infinite if none is."""
        beyond = np.cumsum(self.weights[::-1])[::-1]
        p_values = (1 + np.append(beyond[1:], 0.0)) / (1 + beyond[0])
        far = np.flatnonzero(p_values <= level)
        return float(np.nextafter(self.distances[far[0]], np.inf)) if len(far) else np.inf


def calibrate(
    similarities: Floats,
    subjects: NDArray[np.generic],
    gallery_subjects: NDArray[np.generic],
    neighbours: int = NEIGHBOURS,
) -> Nearness:
    """Measure how far images of the gallery are from its other subjects.

    Args:
        similarities: (images, gallery) of some or all gallery images with the whole gallery. Those
            that the ensemble trained on lie closer together than any new one: where there are
            enough others (``validation``), give their rows only.
        subjects: (images,) names or numbers.
        gallery_subjects: (gallery,).
        neighbours: see :class:`Nearness`.

    Raises:
        DataError: there is no image, or the gallery has no more than ``neighbours`` subjects.
    """
    if not len(subjects):
        raise DataError("there is no image to measure the gallery with")
    distances = kth_distances(similarities, gallery_subjects, neighbours, own_subjects=subjects)
    _, member, photographs = np.unique(subjects, return_inverse=True, return_counts=True)
    order = np.argsort(distances, kind="stable")
    return Nearness(neighbours, distances[order], (1 / photographs[member])[order])


def kth_distances(
    similarities: Floats,
    gallery_subjects: NDArray[np.generic],
    neighbours: int = NEIGHBOURS,
    own_subjects: NDArray[np.generic] | None = None,
) -> Floats:
    """Distance of each query to its k-th nearest subject.

    Args:
        similarities: (queries, images); -inf where a score was not released.
        gallery_subjects: (images,).
        neighbours: k.
        own_subjects: (queries,) subjects to leave out, each for its own query.

    Returns:
        (queries,) 1 - cosine, 0..2; infinite where fewer subjects were released.

    Raises:
        DataError: the gallery has too few subjects.
    """
    order = np.argsort(gallery_subjects, kind="stable")
    names, starts = np.unique(gallery_subjects[order], return_index=True)
    if len(names) < neighbours + (own_subjects is not None):
        raise DataError(
            f"the gallery has {len(names)} subjects, too few for the distance to the"
            f" {neighbours}. nearest one",
            remedy="add diagnosed subjects, or ask for a nearer neighbour",
        )
    best = np.maximum.reduceat(similarities[:, order], starts, axis=1)
    if own_subjects is not None:
        best = np.where(own_subjects[:, None] == names, -np.inf, best)
    distances: Floats = 1 - np.partition(best, -neighbours, axis=1)[:, -neighbours]
    return distances


@dataclass(frozen=True)
class Separation:
    """How well the p-value tells queries of known syndromes from others.

    Attributes:
        auroc: probability that a random other query is farther out than a known one; 0.5 says
            nothing.
        level: queries with a p-value of at most this count as far from everything.
        false_alarms: share of known ones that do.
        misses: share of others that do not.
        known, others: how many of each.
    """

    auroc: float
    level: float
    false_alarms: float
    misses: float
    known: int
    others: int


def measure_separation(known: Floats, others: Floats, level: float = LEVEL) -> Separation:
    """Compare the p-values of queries with known syndromes and of others.

    Args:
        known: (n,) p-values of queries whose syndrome is in the gallery.
        others: (m,) p-values of held-out syndromes, or of controls.
        level: of the decision.

    Raises:
        DataError: there is none of one kind.
    """
    if not len(known) or not len(others):
        raise DataError("a separation needs queries of both kinds")
    ordered = np.sort(known)
    above = len(known) - np.searchsorted(ordered, others, side="right")
    ties = np.searchsorted(ordered, others, side="right") - np.searchsorted(ordered, others)
    return Separation(
        auroc=float((above + ties / 2).mean() / len(known)),
        level=level,
        false_alarms=float((known <= level).mean()),
        misses=float((others > level).mean()),
        known=len(known),
        others=len(others),
    )
