"""``fedgestalt evaluate``: the four tables of one cohort from a file of its encodings."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.cohort import Cohort, read_cohort, read_encodings
from fedgestalt.console import Steps
from fedgestalt.contracts import MatchingStrategy
from fedgestalt.errors import DataError
from fedgestalt.hooks import get_registry
from fedgestalt.similarity.evaluation import TOP_K, Outcome, evaluate_tables, rank_tables
from fedgestalt.similarity.gram import (
    Similarities,
    dense_gram,
    inner_products,
    similarities_of,
)
from fedgestalt.similarity.nearness import (
    ENOUGH_SUBJECTS,
    NEIGHBOURS,
    Separation,
    calibrate,
    kth_distances,
    measure_separation,
)
from fedgestalt.similarity.order import ImageOrder, image_order
from fedgestalt.similarity.phenotype import case_similarities, fuse
from fedgestalt.similarity.ranking import Floats

SCHEMA: Final = "fedgestalt.evaluation/1"
CONTROL_NAMES: Final = frozenset({"control", "controls", "unaffected"})
NOT_AFFECTED: Final = (
    "A similarity says how near known patients are; it does not say whether a person is affected."
)


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        encodings: a file that :func:`fedgestalt.cohort.read_encodings` reads.
        cohort: folder in GMDB layout; the encodings are of all its images.
        strategy: name of a matching strategy; None compares in the clear.
        ranking: name of a ranking strategy.
        hpo_weight: weight of HPO terms beside the face, 0..1.
        seed: of the bootstrap intervals.
    """

    encodings: Path
    cohort: Path
    strategy: str | None = None
    ranking: str = "nearest-image"
    hpo_weight: float = 0.0
    seed: int = 1


def _through(
    strategy: MatchingStrategy, vectors: NDArray[np.float32], seed: bytes
) -> tuple[NDArray[np.floating], Similarities]:
    """Rows, and how a strategy compares them, with all its computing parties in this process."""
    if len(strategy.roles) == 1:
        (part,) = strategy.enrol(vectors, seed)
        return part.words, similarities_of(strategy)

    def compare(queries: Floats, gallery: Floats) -> Floats:
        parts, question = strategy.enrol(gallery, seed), strategy.ask(queries, seed)
        answers = [
            strategy.compare(party, strategy.receive(party, part), question.parts[party])
            for party, part in enumerate(parts)
        ]
        return strategy.open(question, answers)

    return vectors, compare


def evaluate_encodings(request: Request, steps: Steps) -> dict[str, Any]:
    """Rank the test images of a cohort and sum up; returns what ``--json`` prints.

    Raises:
        DataError: cohort and encodings are damaged or do not belong together.
        PluginError: there is no such strategy.
        ConfigError: the weight is out of range, or HPO terms are asked for without hpo3.
    """
    registry = get_registry()
    ranking = registry.rankings.get(request.ranking)
    strategy = registry.matching.get(request.strategy) if request.strategy else None
    with steps.step("read", "Reading cohort and encodings"):
        cohort = read_cohort(request.cohort)
        table = read_encodings(request.encodings)
        order = image_order(cohort)
        vectors = table.of_images(order.image_ids)
    if not order.queries:
        raise DataError(
            "the cohort has no test image", where=str(request.cohort), remedy="name some to rank"
        )
    subjects = np.array([record.subject for record in cohort.records(order.image_ids)])
    with steps.step("compare", f"Comparing {order.queries} with {len(vectors)} images"):
        masked: NDArray[np.floating] = vectors.astype(np.float64)
        compare: Similarities = inner_products
        if strategy:
            masked, compare = _through(strategy, vectors, secrets.token_bytes(32))
        faces = dense_gram(masked[: order.queries], masked, compare)
        nearness = _nearness(cohort, order, subjects, faces, masked, compare)
    queries = slice(0, order.queries)
    with steps.step("rank", "Ranking syndromes"):
        similarities, terms = _with_terms(cohort, order, faces, request.hpo_weight)
        ranked = rank_tables(
            similarities,
            order.syndromes[queries],
            order.roles[queries],
            order.syndromes,
            order.roles,
            None,
            ranking,
            subjects[queries],
            subjects,
        )
        outcomes = [
            Outcome(part.table, part.split, subjects[row], int(order.syndromes[row]), int(rank))
            for part in ranked
            for row, rank in zip(part.rows, part.ranks, strict=True)
        ]
        sizes = {(part.table, part.split): part.gallery for part in ranked}
        tables = evaluate_tables(outcomes, sizes, np.random.default_rng(request.seed))
    known = {part.table: part.syndromes for part in ranked if len(part.rows)}
    for name, row in tables.items():
        row["syndromes"] = known[name]
        row["chance"] = {f"top{k}": min(1.0, k / max(known[name], 1)) for k in TOP_K}
    return {
        "schema": SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "fedgestalt": __version__,
        "cohort": {
            "name": cohort.name,
            "version": cohort.version,
            "digest": cohort.digest,
            "images": len(cohort.images),
            "subjects": len(cohort.subjects),
            "syndromes": len(cohort.images_per_syndrome()),
        },
        "encodings": {"model": table.model, "size": vectors.shape[1]},
        "strategy": request.strategy,
        "ranking": {"name": ranking.name, "one_query_per_subject": ranking.pools_subjects},
        "hpo": {"weight": request.hpo_weight, **terms},
        "seed": request.seed,
        "evaluation": tables,
        "nearness": nearness,
        "not_affected": NOT_AFFECTED,
    }


def _with_terms(
    cohort: Cohort, order: ImageOrder, faces: Floats, weight: float
) -> tuple[Floats, dict[str, int]]:
    """The fused similarities, and how many queries, and images in all, have HPO terms."""
    cases = [record.hpo for record in cohort.records(order.image_ids)]
    having = {
        "queries_with_terms": sum(map(bool, cases[: order.queries])),
        "images_with_terms": sum(map(bool, cases)),
    }
    if weight == 0:
        return faces, having
    from fedgestalt.cohort.phenotype import term_similarities

    names = sorted({term for case in cases for term in case})
    number = {name: place for place, name in enumerate(names)}
    sets = [[number[term] for term in case] for case in cases]
    phenotypes = case_similarities(term_similarities(names), sets[: order.queries], sets)
    return fuse(faces, phenotypes, weight), having


def _nearness(
    cohort: Cohort,
    order: ImageOrder,
    subjects: NDArray[np.str_],
    faces: Floats,
    masked: NDArray[np.floating],
    compare: Any,
) -> dict[str, Any] | None:
    """How well "is any known syndrome near?" tells test images from syndromes held out.

    The gallery is that of the frequent syndromes. The yardstick is its validation images, or, with
    too few of them, all of it. None if there is nothing to compare.
    """
    names = [cohort.syndromes[i].name.lower() for i in order.syndromes.tolist()]
    control = np.array([name in CONTROL_NAMES for name in names])
    place = {image_id: row for row, image_id in enumerate(order.image_ids)}

    def rows(image_ids: tuple[str, ...], controls: bool = False) -> NDArray[np.int64]:
        found = np.array([place[image_id] for image_id in image_ids], np.int64)
        kept: NDArray[np.int64] = found[control[found] == controls]
        return kept

    rare = tuple({i: None for s in cohort.rare_splits for i in s.gallery + s.test})
    gallery = rows(cohort.frequent_gallery)
    yardstick = rows(cohort.validation)
    enough = len(np.unique(subjects[yardstick])) >= ENOUGH_SUBJECTS
    yardstick = yardstick if enough else gallery
    tests = rows(cohort.frequent_test)
    others = {
        "held_out": rows(rare),
        "controls": np.union1d(rows(rare, True), rows(cohort.frequent_test, True)),
    }
    others = {name: found for name, found in others.items() if len(found)}
    if not others or not len(tests) or len(np.unique(subjects[gallery])) <= NEIGHBOURS:
        return None

    def similarities(wanted: NDArray[np.int64]) -> Floats:
        if wanted.max() < len(faces):
            return faces[np.ix_(wanted, gallery)]
        return dense_gram(masked[wanted], masked[gallery], compare)

    scale = calibrate(similarities(yardstick), subjects[yardstick], subjects[gallery])

    def p_values(wanted: NDArray[np.int64]) -> Floats:
        return scale.p_values(kth_distances(similarities(wanted), subjects[gallery]))

    known = p_values(tests)
    found: dict[str, Separation] = {
        name: measure_separation(known, p_values(wanted)) for name, wanted in others.items()
    }
    level = next(iter(found.values())).level
    far = scale.threshold(level)
    return {
        "neighbours": NEIGHBOURS,
        "threshold_distance": far if np.isfinite(far) else None,
        "calibrated_on": "validation" if enough else "gallery",
        **{name: dataclasses.asdict(separation) for name, separation in found.items()},
    }


def show(document: dict[str, Any], console: Console) -> None:
    """Print what :func:`evaluate_encodings` found."""
    facts, hpo = document["cohort"], document["hpo"]
    console.print(
        f"[bold]{facts['name']}[/bold] {facts['version']}: {facts['images']} images of"
        f" {facts['subjects']} subjects, {facts['syndromes']} syndromes",
        soft_wrap=True,
    )
    how = f"through {document['strategy']}" if document["strategy"] else "in the clear"
    console.print(
        f"compared {how}, ranked by {document['ranking']['name']}, HPO weight {hpo['weight']:g}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for title in ("top-1", "95 %", "top-5", "top-10", "top-30", "chance", "gallery", "test"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in document["evaluation"].items():
        low, high = row["interval"]["top1"]
        shares = [f"{100 * row[f'top{k}']:.1f}" for k in TOP_K]
        interval = f"{100 * low:.0f}-{100 * high:.0f}"
        chance = f"{100 * row['chance']['top1']:.1f}"
        table.add_row(
            name, shares[0], interval, *shares[1:], chance, str(row["gallery"]), str(row["test"])
        )
    console.print(table)
    console.print("Mean per-syndrome accuracy in %; intervals by bootstrap over subjects.")
    for name in ("held_out", "controls"):
        part = (document["nearness"] or {}).get(name)
        if part:
            console.print(
                f"Is any known syndrome near? {name.replace('_', ' ')}: AUROC {part['auroc']:.2f};"
                f" at p <= {part['level']:g}, {part['false_alarms']:.0%} false alarms,"
                f" {part['misses']:.0%} missed.",
                soft_wrap=True,
            )
    console.print(f"{NOT_AFFECTED} {RESEARCH_USE_ONLY}", soft_wrap=True)
