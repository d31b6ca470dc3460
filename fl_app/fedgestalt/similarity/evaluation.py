"""The four tables of the field: mean per-syndrome top-k accuracy.

============== ======================= ===================================
table          queries                 gallery
============== ======================= ===================================
frequent       frequent test           frequent gallery
rare           rare test of a split    rare gallery of the split
frequent-in-all frequent test          frequent gallery + rare gallery
rare-in-all    rare test of a split    frequent gallery + rare gallery
============== ======================= ===================================

Tables that involve rare syndromes are averaged over the splits of the metadata. A *role set* says
in one integer which parts an image plays; it travels with its sealed label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.similarity.ranking import Floats, Integers, score_syndromes

TABLES: Final = ("frequent", "rare", "frequent-in-all", "rare-in-all")
TOP_K: Final = (1, 5, 10, 30)
MAXIMUM_SPLITS: Final = 12

FREQUENT_GALLERY: Final = 1
FREQUENT_TEST: Final = 2


def rare_gallery(split: int) -> int:
    """Role bit: in the gallery of this rare split."""
    return 4 << split


def rare_test(split: int) -> int:
    """Role bit: a query of this rare split."""
    return 4 << (MAXIMUM_SPLITS + split)


QUERY_ROLES: Final = FREQUENT_TEST | sum(rare_test(split) for split in range(MAXIMUM_SPLITS))


@dataclass(frozen=True)
class Ranked:
    """Ranks of one site's queries in one table (and split).

    Attributes:
        table: one of :data:`TABLES`.
        split: of the rare syndromes; 0 for ``frequent``.
        rows: (queries,) which rows of the input they are.
        ranks: (queries,) rank of the true syndrome from 1, 0 where the gallery lacks it.
        gallery: number of gallery images.
        syndromes: number of syndromes in the gallery.
    """

    table: str
    split: int
    rows: Integers
    ranks: Integers
    gallery: int
    syndromes: int


def rank_tables(
    similarities: Floats,
    query_syndromes: Integers,
    query_roles: NDArray[np.uint32],
    gallery_syndromes: Integers,
    gallery_roles: NDArray[np.uint32],
    splits: Sequence[int] | None = None,
) -> list[Ranked]:
    """Rank the queries of one site in all tables.

    Args:
        similarities: (queries, images) of this site's rows with everybody's.
        query_syndromes, query_roles: (queries,).
        gallery_syndromes, gallery_roles: (images,).
        splits: which rare splits to rank; by default those that the gallery names. A query whose
            split has no gallery here is a miss.
    """
    if splits is None:
        splits = [s for s in range(MAXIMUM_SPLITS) if (gallery_roles & rare_gallery(s)).any()]

    by_syndrome = np.argsort(gallery_syndromes, kind="stable")  # once: no table is sorted again

    def ranked(table: str, split: int, query_role: int, gallery_role: int) -> Ranked:
        rows = np.flatnonzero(query_roles & query_role)
        columns = by_syndrome[(gallery_roles[by_syndrome] & gallery_role) > 0]
        if not len(columns):
            return Ranked(table, split, rows, np.zeros(len(rows), np.int64), 0, 0)
        scored = score_syndromes(similarities[np.ix_(rows, columns)], gallery_syndromes[columns])
        ranks = scored.ranks(query_syndromes[rows])
        return Ranked(table, split, rows, ranks, len(columns), len(scored.syndromes))

    results = [ranked("frequent", 0, FREQUENT_TEST, FREQUENT_GALLERY)]
    for split in splits:
        gallery, test = rare_gallery(split), rare_test(split)
        results.append(ranked("rare", split, test, gallery))
        results.append(ranked("frequent-in-all", split, FREQUENT_TEST, gallery | FREQUENT_GALLERY))
        results.append(ranked("rare-in-all", split, test, gallery | FREQUENT_GALLERY))
    return results


@dataclass(frozen=True)
class Outcome:
    """One query's rank in one table, with what is needed to average it."""

    table: str
    split: int
    subject: str
    syndrome: int
    rank: int


def evaluate_tables(
    outcomes: Sequence[Outcome],
    gallery_sizes: Mapping[tuple[str, int], int],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> dict[str, dict[str, object]]:
    """Mean per-syndrome top-k accuracy of each table, with 95 % bootstrap intervals over subjects.

    Args:
        outcomes: of all sites.
        gallery_sizes: images in the gallery, by table and split.
        rng: for the bootstrap.
        resamples: number of bootstrap draws.

    Returns:
        By table: ``top1`` ... ``top30`` as fractions, mean ``gallery`` and ``test`` sizes, and
        ``interval`` with [low, high] by the same keys.
    """
    tables: dict[str, dict[str, object]] = {}
    for table in TABLES:
        mine = [o for o in outcomes if o.table == table]
        if not mine:
            continue
        splits = sorted({o.split for o in mine})
        point, draws = _accuracies(mine, splits, rng, resamples)
        sizes = [gallery_sizes[table, split] for split in splits]
        row: dict[str, object] = {f"top{k}": float(v) for k, v in zip(TOP_K, point, strict=True)}
        row |= {"gallery": round(float(np.mean(sizes))), "test": round(len(mine) / len(splits))}
        low, high = np.percentile(draws, (2.5, 97.5), axis=0)
        row["interval"] = {f"top{k}": [float(low[i]), float(high[i])] for i, k in enumerate(TOP_K)}
        tables[table] = row
    return tables


def _accuracies(
    outcomes: Sequence[Outcome], splits: Sequence[int], rng: np.random.Generator, resamples: int
) -> tuple[Floats, Floats]:
    """Point estimate (k,) and bootstrap draws (resamples, k), averaged over splits.

    A subject keeps its weight across splits: subjects are drawn once per resample.
    """
    subjects = {name: i for i, name in enumerate(sorted({o.subject for o in outcomes}))}
    weights = np.ones((resamples + 1, len(subjects)), np.float32)
    picks = rng.integers(0, len(subjects), (resamples, len(subjects)))
    for draw in range(resamples):
        weights[draw + 1] = np.bincount(picks[draw], minlength=len(subjects))
    totals = np.zeros((resamples + 1, len(TOP_K)))
    for split in splits:
        mine = [o for o in outcomes if o.split == split]
        rank = np.array([o.rank for o in mine])
        hit = np.stack([(rank > 0) & (rank <= k) for k in TOP_K], 1).astype(np.float32)
        subject = np.array([subjects[o.subject] for o in mine])
        weight = weights[:, subject]
        syndrome = np.array([o.syndrome for o in mine])
        sums = np.zeros((resamples + 1, len(TOP_K)))
        present = np.zeros((resamples + 1, 1))
        for label in np.unique(syndrome):
            rows = syndrome == label
            count = weight[:, rows].sum(1, keepdims=True)
            sums += (weight[:, rows] @ hit[rows]) / np.maximum(count, 1)
            present += count > 0
        totals += sums / np.maximum(present, 1)
    totals /= len(splits)
    return totals[0], totals[1:]


def roles_of(
    image_ids: Iterable[str],
    gallery: Iterable[str],
    test: Iterable[str],
    rare: Sequence[tuple[Iterable[str], Iterable[str]]],
) -> NDArray[np.uint32]:
    """Role sets of ``image_ids`` from the partitions of a cohort; ``rare`` as (gallery, test)."""
    roles: dict[str, int] = {}
    parts = [(gallery, FREQUENT_GALLERY), (test, FREQUENT_TEST)]
    for split, (rare_reference, rare_query) in enumerate(rare):
        parts += [(rare_reference, rare_gallery(split)), (rare_query, rare_test(split))]
    for members, bit in parts:
        for image_id in members:
            roles[image_id] = roles.get(image_id, 0) | bit
    return np.array([roles.get(image_id, 0) for image_id in image_ids], np.uint32)
