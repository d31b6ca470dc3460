"""The Gram matrix of masked rows, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fedgestalt.similarity.ranking import Floats

Similarities = Callable[[Floats, Floats], Floats]


def gram_blocks(
    queries: Floats, gallery: Floats, similarities: Similarities, block: int = 2048
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


def dense_gram(queries: Floats, gallery: Floats, similarities: Similarities) -> Floats:
    """All similarities at once, float32 (q, g): for an evaluation release, and nothing larger."""
    result = np.empty((len(queries), len(gallery)), np.float32)
    for rows, columns, values in gram_blocks(queries, gallery, similarities):
        result[rows, columns] = values
    return result
