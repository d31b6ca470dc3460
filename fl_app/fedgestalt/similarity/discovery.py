"""Groups of alike subjects among the unsolved cases of all sites, from their similarities alone.

The steps:

- All photographs of a subject are pooled: two subjects are as similar as their photographs are on
  average. The similarities are centred, so that ordinary faces are not everybody's neighbours.
- Candidates are a subject and its nearest mutual neighbours: each of the two is among the nearest
  of the other.
- The closeness of a group is the mean over its pairs. Groups are taken greedily, the most
  surprising for its size first, and share no subject.

Each group has two p-values, and they answer different questions:

- ``p_random``: how often does a random group of that size, with as many subjects of each site, sit
  as close? With ``q_random``, the Benjamini-Hochberg correction over all groups taken. It says that
  the group is close, not that it is more than a search brings up: among many subjects some group
  always is much closer than a random one.
- ``p_search``: how often does the same search, over as many subjects without groups, find anything
  as surprising? Compared is the largest value of a whole search, as in a scan statistic (Kulldorff
  1997, "A spatial scan statistic"), so no further correction is needed; for all groups but the
  first it is conservative.

Subjects without groups are, best of all, real ones who share no syndrome: controls, or one
diagnosed subject of each syndrome. Where there are too few of them, they are made by shuffling each
principal coordinate of the unsolved cases by itself, which keeps its spread and shape and breaks
what joins them. In an even cloud that p-value is too large; where ancestry or age make lumps, it
can be too small.

Neither says that a group shares a syndrome: ancestry, age or a camera can make a group as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import DataError
from fedgestalt.similarity.ranking import Floats, Integers, pool_queries

SMALLEST: Final = 3
LARGEST: Final = 8


@dataclass(frozen=True)
class Group:
    """Subjects that are alike.

    Attributes:
        subjects: their handles, as they came in.
        sites: the site of each.
        closeness: mean centred similarity of its pairs.
        p_random, q_random: against random groups, and corrected for the number of groups.
        p_search: against the best that the search finds where there are no groups.
    """

    subjects: tuple[object, ...]
    sites: tuple[object, ...]
    closeness: float
    p_random: float
    q_random: float
    p_search: float


def find_groups(
    similarities: Floats,
    subjects: NDArray[np.generic],
    sites: NDArray[np.generic],
    rng: np.random.Generator,
    *,
    sizes: tuple[int, int] = (SMALLEST, LARGEST),
    level: float = 0.05,
    resamples: int = 999,
    searches: int = 199,
    unrelated: tuple[Floats, NDArray[np.generic]] | None = None,
) -> list[Group]:
    """Find groups of alike subjects.

    Args:
        similarities: (n, n) of images with each other, symmetric, cosines: 1 on the diagonal.
        subjects: (n,) opaque handles, as text or numbers (NumPy cuts zeros off the end of bytes);
            a handle belongs to one site.
        sites: (n,).
        rng: for both p-values.
        sizes: smallest and largest size of a group.
        level: groups with ``q_random`` above it are left out.
        resamples: random groups for each ``p_random``.
        searches: repetitions of the search for ``p_search``.
        unrelated: similarities (m, m) and subjects (m,) of images of people who share no syndrome,
            at least twice as many people as ``subjects`` has; by default they are made up.

    Returns:
        The groups, by ``p_search``, the closest first where that is equal. Fewer subjects than
        twice the largest size form no group.

    Raises:
        DataError: the similarities are not finite and symmetric, the shapes do not fit, or there
            are too few unrelated people.
    """
    if len(sites) != len(subjects):
        raise DataError("subjects and sites are not of the same images")
    smallest, largest = sizes
    pooled, first = _pool(similarities, subjects)
    if len(pooled) < 2 * largest:
        return []
    handles, homes = subjects[first], sites[first]
    centred = _centre(pooled)
    if unrelated is None:
        without_groups = _shuffled(centred, searches, rng)
    else:
        without_groups = _drawn(_pool(*unrelated)[0], len(centred), searches, rng)
    order, closeness = _neighbourhoods(centred, smallest, largest)
    best = np.array([_neighbourhoods(made, smallest, largest)[1].max(0) for made in without_groups])
    surprise, by_chance = _surprise(closeness, best)
    chosen = _disjoint(order, surprise, smallest)
    p_random = np.array(
        [_share(centred, homes, group, closeness[cell], resamples, rng) for group, cell in chosen]
    )
    groups = [
        Group(
            tuple(handles[group].tolist()),
            tuple(homes[group].tolist()),
            float(closeness[cell]),
            float(p),
            float(q),
            float((1 + (by_chance >= surprise[cell]).sum()) / (1 + searches)),
        )
        for (group, cell), p, q in zip(chosen, p_random, benjamini_hochberg(p_random), strict=True)
        if q <= level
    ]
    return sorted(groups, key=lambda group: (group.p_search, -group.closeness))


def benjamini_hochberg(p_values: Floats) -> Floats:
    """Adjusted p-values: the false discovery rate at which each would be accepted.

    Benjamini and Hochberg 1995, "Controlling the false discovery rate".
    """
    count = len(p_values)
    order = np.argsort(p_values)
    scaled = p_values[order] * count / np.arange(1, count + 1)
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return adjusted


def _pool(similarities: Floats, subjects: NDArray[np.generic]) -> tuple[Floats, Integers]:
    """Mean similarities of subjects, and the row of each one's first image."""
    count = len(subjects)
    if similarities.shape != (count, count):
        raise DataError("similarities and subjects are not of the same images")
    gap = np.abs(similarities - similarities.T).max(initial=0)
    if not np.isfinite(similarities).all() or gap > 1e-5:
        raise DataError(
            "the similarities are not finite and symmetric",
            remedy="discovery needs the similarity of every pair of images",
        )
    pooled, first = pool_queries(similarities, subjects)
    return pool_queries(pooled.T, subjects)[0], first


def _centre(similarities: Floats) -> Floats:
    rows, columns = similarities.mean(1, keepdims=True), similarities.mean(0)
    centred: Floats = similarities - rows - columns + similarities.mean()
    return centred


def _neighbourhoods(similarities: Floats, smallest: int, largest: int) -> tuple[Integers, Floats]:
    """Each subject with its nearest mutual neighbours.

    Returns:
        Neighbours (n, largest) of each subject, itself first, and the mean similarity of the pairs
        of the first ``smallest`` ... ``largest`` of them; -inf where so many are not mutual.
    """
    ranked = similarities.copy()
    np.fill_diagonal(ranked, np.inf)
    order = np.argpartition(-ranked, largest, axis=1)[:, : largest + 1]
    near = np.zeros(ranked.shape, bool)
    np.put_along_axis(near, order, True, 1)
    mutual = near[order, np.arange(len(order))[:, None]]
    values = np.where(mutual, np.take_along_axis(ranked, order, 1), -np.inf)
    turn = np.argsort(-values, axis=1, kind="stable")[:, :largest]
    order, values = np.take_along_axis(order, turn, 1), np.take_along_axis(values, turn, 1)
    pairs = np.tril(similarities[order[:, :, None], order[:, None, :]], -1).sum(2).cumsum(1)
    size = np.arange(1, largest + 1)
    means = pairs[:, 1:] / (size[1:] * size[:-1] / 2)
    means[~np.isfinite(values[:, 1:])] = -np.inf
    return order, means[:, smallest - 2 :]


def _drawn(unrelated: Floats, count: int, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield centred similarities of ``count`` of the unrelated subjects, drawn anew each time."""
    if len(unrelated) < 2 * count:
        raise DataError(
            f"{len(unrelated)} unrelated people are too few for {count} unsolved cases",
            remedy="give twice as many, or none",
        )
    for _ in range(draws):
        some = rng.choice(len(unrelated), count, replace=False)
        yield _centre(unrelated[np.ix_(some, some)])


def _shuffled(centred: Floats, draws: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Yield similarities of made-up subjects without groups.

    Principal coordinates of a sample hold its noise as well, in too few dimensions. So their
    variances are lowered by one amount, such that similarities spread as much as the real ones do
    (soft thresholding of the spectrum).
    """
    count = len(centred)
    values, vectors = np.linalg.eigh(centred)
    target = (centred**2).sum() - (np.diagonal(centred) ** 2).sum()
    target *= count / (count - 1)
    low, high = 0.0, float(values[-1])
    for _ in range(60):
        middle = (low + high) / 2
        too_wide = (np.maximum(values - middle, 0) ** 2).sum() > target
        low, high = (middle, high) if too_wide else (low, middle)
    kept = values > high
    coordinates = vectors[:, kept] * np.sqrt(values[kept] - high)
    for _ in range(draws):
        shuffled = rng.permuted(coordinates, axis=0)
        yield shuffled @ shuffled.T


def _surprise(closeness: Floats, best: Floats) -> tuple[Floats, Floats]:
    """How far each candidate is above the closest of its size in searches that find no group.

    Args:
        closeness: (n, sizes) of the candidates.
        best: (searches, sizes) of the closest ones where there are no groups; -inf where there was
            no candidate. A size that most of them lack is not considered.

    Returns:
        (n, sizes) in standard deviations, and (searches,) the largest of each search.
    """
    there = np.isfinite(best)
    considered = there.mean(0) > 0.5
    count = np.maximum(there.sum(0), 1)
    typical = np.where(there, best, 0).sum(0) / count
    spread = np.sqrt((np.where(there, best - typical, 0) ** 2).sum(0) / count) + 1e-12
    surprise, chance = ((x - typical) / spread for x in (closeness, best))
    surprise[:, ~considered] = chance[:, ~considered] = -np.inf
    return surprise, chance.max(1)


def _disjoint(
    order: Integers, surprise: Floats, smallest: int
) -> list[tuple[Integers, tuple[int, int]]]:
    """Groups that share no subject, the most surprising first, with their cell of ``surprise``."""
    taken = np.zeros(len(order), bool)
    chosen = []
    for flat in np.argsort(-surprise, axis=None, kind="stable"):
        row, column = divmod(int(flat), surprise.shape[1])
        if not np.isfinite(surprise[row, column]):
            break
        group = order[row, : column + smallest]
        if not taken[group].any():
            taken[group] = True
            chosen.append((group, (row, column)))
    return chosen


def _share(
    similarities: Floats,
    sites: NDArray[np.generic],
    group: Integers,
    closeness: float,
    draws: int,
    rng: np.random.Generator,
) -> float:
    """How many random groups with as many subjects of each site are as close; never 0."""
    parts = []
    for site, wanted in zip(*np.unique(sites[group], return_counts=True), strict=True):
        members = np.flatnonzero(sites == site)
        parts.append(members[rng.random((draws, len(members))).argsort(axis=1)[:, :wanted]])
    drawn = np.concatenate(parts, axis=1)
    blocks = similarities[drawn[:, :, None], drawn[:, None, :]]
    size = len(group)
    means = (blocks.sum((1, 2)) - np.trace(blocks, axis1=1, axis2=2)) / (size * (size - 1))
    return float((1 + (means >= closeness - 1e-12).sum()) / (1 + draws))
