"""The Gram matrix of masked rows, a block at a time, and what is wanted of it.

Nothing but :func:`dense_gram` ever holds a score for every query and row. The others walk over
blocks of at most ``BLOCK_SCORES`` scores and keep, per query, the best rows or the best score of
each class. Beside their arguments and results they hold a few such blocks, some 100 MB, whatever
the size of the gallery.

Scores are computed in the precision of the rows and kept as float32. Rows that score the same rank
by their number, the lower first, so results do not depend on the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import MatchingStrategy, Part
from fedgestalt.errors import ConfigError, DataError
from fedgestalt.similarity.ranking import Floats, Integers, SyndromeScores

Similarities = Callable[[Floats, Floats], Floats]

BLOCK_SCORES: Final = 1 << 22
_QUERIES_AT_A_TIME: Final = 1024
_SIGN: Final = np.uint32(1 << 31)
_ROW_BITS: Final = np.uint64(32)
_LAST_ROW: Final = np.uint64((1 << 32) - 1)

_Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class TopRows:
    """The best rows of each query, best first.

    Attributes:
        rows: (queries, m) row numbers.
        scores: (queries, m) float32.
    """

    rows: Integers
    scores: NDArray[np.float32]


def check_one_party(strategy: MatchingStrategy) -> None:
    """Raise ConfigError if the server alone cannot compare."""
    if len(strategy.roles) != 1:
        raise ConfigError(
            f"strategy {strategy.name!r} needs {len(strategy.roles)} computing parties; here the"
            " server compares alone",
            remedy="choose a strategy that has one",
        )


def similarities_of(strategy: MatchingStrategy) -> Similarities:
    """How the server compares masked rows (q, k) and (g, k).

    Raises:
        ConfigError: the strategy needs other computing parties.
    """
    check_one_party(strategy)

    def compare(queries: Floats, gallery: Floats) -> Floats:
        scores: Floats = strategy.compare(0, _part(gallery), _part(queries))
        return scores

    return compare


def inner_products(queries: Floats, gallery: Floats) -> Floats:
    """Cosine similarities (q, g) of rows of length 1."""
    scores: Floats = queries @ gallery.T
    return scores


def gram_blocks(
    queries: Floats, gallery: Floats, similarities: Similarities = inner_products, block: int = 2048
) -> Iterator[tuple[slice, slice, Floats]]:
    """Yield (query rows, gallery rows, similarities) in blocks of at most ``block`` squared.

    Args:
        queries: (q, k) masked rows.
        gallery: (g, k) masked rows.
        similarities: of the matching strategy.
        block: rows at a time; bounds the working memory.
    """
    for top in range(0, len(queries), block):
        rows = slice(top, min(top + block, len(queries)))
        for left in range(0, len(gallery), block):
            columns = slice(left, min(left + block, len(gallery)))
            yield rows, columns, similarities(queries[rows], gallery[columns])


def dense_gram(
    queries: Floats, gallery: Floats, similarities: Similarities = inner_products
) -> NDArray[np.float32]:
    """All similarities at once, float32 (q, g): for an evaluation release, and nothing larger."""
    result = np.empty((len(queries), len(gallery)), np.float32)
    for rows, columns, values in gram_blocks(queries, gallery, similarities):
        result[rows, columns] = values
    return result


def top_rows(
    queries: Floats,
    gallery: Floats,
    count: int,
    similarities: Similarities = inner_products,
    block_scores: int = BLOCK_SCORES,
) -> TopRows:
    """The ``count`` best rows of a standing gallery for each query; all if it has fewer.

    Args:
        queries: (q, k) masked rows.
        gallery: (g, k) masked rows.
        count: m, at least 1.
        similarities: of the matching strategy.
        block_scores: scores computed at a time; bounds the working memory.

    Raises:
        DataError: queries or gallery are empty or do not go together, ``count`` is less than 1, or
            a row is not finite.
    """
    _check(queries, gallery)
    if count < 1:
        raise DataError(f"{count} best rows were asked for; one is the least")
    count = min(count, len(gallery))
    found = np.empty((len(queries), count), np.uint64)
    for top in range(0, len(queries), _QUERIES_AT_A_TIME):
        rows = slice(top, min(top + _QUERIES_AT_A_TIME, len(queries)))
        best = np.empty((rows.stop - top, 0), np.uint64)
        for columns, scores in _column_blocks(queries[rows], gallery, similarities, block_scores):
            best = _keep_best(best, scores, columns.start, count)
        found[rows] = np.sort(best, axis=1)[:, ::-1]
    return TopRows(_row_of(found), _score_of(found))


def best_per_class(
    queries: Floats,
    gallery: Floats,
    classes: Integers,
    similarities: Similarities = inner_products,
    block_scores: int = BLOCK_SCORES,
) -> SyndromeScores:
    """Each query's best score in each class; like ``score_syndromes`` of the dense matrix.

    Args:
        queries: (q, k) masked rows.
        gallery: (g, k) masked rows, in any order.
        classes: (g,) ids.
        similarities: of the matching strategy.
        block_scores: scores computed at a time; bounds the working memory.

    Raises:
        DataError: queries, gallery or classes are empty or do not go together, or a row is not
            finite.
    """
    _check(queries, gallery)
    if np.shape(classes) != (len(gallery),):
        raise DataError(f"{len(gallery)} rows do not go with classes {np.shape(classes)}")
    ids, numbers = np.unique(classes, return_inverse=True)
    best = np.full((len(queries), len(ids)), -np.inf, np.float32)
    for top in range(0, len(queries), _QUERIES_AT_A_TIME):
        target = best[top : top + _QUERIES_AT_A_TIME]
        some = queries[top : top + _QUERIES_AT_A_TIME]
        for columns, scores in _column_blocks(some, gallery, similarities, block_scores):
            order = np.argsort(numbers[columns], kind="stable")
            present, starts = np.unique(numbers[columns][order], return_index=True)
            here = np.maximum.reduceat(scores[:, order], starts, axis=1)
            target[:, present] = np.maximum(target[:, present], here)
    return SyndromeScores(best, ids)


def _part(rows: Floats) -> Part:
    return Part((len(rows), rows.shape[1]), rows)


def _check(queries: Floats, gallery: Floats) -> None:
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise DataError(f"queries {queries.shape} do not go with a gallery {gallery.shape}")
    if not queries.size or not gallery.size:
        raise DataError(f"{len(queries)} queries and {len(gallery)} rows leave nothing to compare")


def _column_blocks(
    queries: Floats, gallery: Floats, similarities: Similarities, block_scores: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Scores of some queries with all rows, a block of rows at a time.

    A row that is not finite shows in its scores; to look for it there reads far less than the
    gallery.
    """
    step = max(1, block_scores // len(queries))
    for left in range(0, len(gallery), step):
        columns = slice(left, min(left + step, len(gallery)))
        with np.errstate(invalid="ignore", over="ignore"):  # found below, with a sentence
            scores = similarities(queries, gallery[columns]).astype(np.float32, copy=False)
        finite = np.isfinite(scores)
        if not finite.all():
            row = int(np.argwhere(~finite)[0, 1])
            fault = f"row {left + row} of the gallery"
            if np.isfinite(gallery[left + row]).all():
                fault = "a query"
            raise DataError(f"{fault} is not finite")
        yield columns, scores


def _keep_best(best: _Keys, scores: NDArray[np.float32], first_row: int, count: int) -> _Keys:
    """The ``count`` largest keys per query, of those kept so far and those of a new block.

    Only scores that can still be among the best become keys.
    """
    if best.shape[1] == count:
        floor = _score_of(best.min(1))
    elif scores.shape[1] > count:
        floor = np.partition(scores, -count, axis=1)[:, -count]
    else:
        floor = np.full(len(scores), -np.inf, np.float32)
    query, column = np.nonzero(scores >= floor[:, None])
    hits = np.bincount(query, minlength=len(scores))
    place = np.arange(len(query)) - np.repeat(np.cumsum(hits) - hits, hits)
    kept = best.shape[1]
    merged = np.zeros((len(scores), kept + hits.max(initial=0)), np.uint64)  # 0: below any score
    merged[:, :kept] = best
    merged[query, kept + place] = _keys(scores[query, column], column + first_row)
    if merged.shape[1] <= count:
        return merged
    return np.partition(merged, -count, axis=1)[:, -count:]


def _keys(scores: NDArray[np.float32], rows: Integers) -> _Keys:
    """Score and row in one word, which sorts by score, then by falling row number.

    The bits of a float32, with the sign flipped, or all flipped if it is negative, sort like it.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0: they are the same score
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN).astype(np.uint64)
    result: _Keys = (ordered << _ROW_BITS) | (_LAST_ROW - rows.astype(np.uint64))
    return result


def _score_of(keys: _Keys) -> NDArray[np.float32]:
    ordered = (keys >> _ROW_BITS).astype(np.uint32)
    return np.where(ordered & _SIGN, ordered ^ _SIGN, ~ordered).view(np.float32)


def _row_of(keys: _Keys) -> Integers:
    return (_LAST_ROW - (keys & _LAST_ROW)).astype(np.int64)
