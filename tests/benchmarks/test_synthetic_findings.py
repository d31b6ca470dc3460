"""Ranking, discovery and nearness on synthetic cohorts: the numbers of the documents.

The unsolved cases are the subjects of the six rare syndromes, dealt to three sites: the ensemble
never saw them, and no syndrome is told to the search. Beside them, and alone, stand controls.
The first run trains and encodes for minutes; ``-s`` shows the numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_encodings import Encoded, encode_synthetic

from fedgestalt.cohort import EncodingTable, write_encodings
from fedgestalt.console import Steps
from fedgestalt.evaluate import Request, evaluate_encodings
from fedgestalt.hooks import get_registry
from fedgestalt.similarity.discovery import Group, find_groups
from fedgestalt.similarity.nearness import calibrate, kth_distances, measure_separation
from fedgestalt_plugins.cohorts.synthetic import Parameters

SITES = 3
LEVEL = 0.05

pytestmark = pytest.mark.timeout(1200)

Rows = tuple[NDArray[np.float32], list[str], list[int]]


@pytest.fixture(scope="module", params=["default", "fresh"])
def encoded(request: pytest.FixtureRequest) -> tuple[Encoded, list[Encoded]]:
    """The cohort on which settings were chosen, and one that played no part in that."""
    if request.param == "default":
        return encode_synthetic()
    return encode_synthetic(Parameters(seed=31), range(20, 28), seed=2)


def rows(source: Encoded, image_ids: Iterable[str], prefix: str = "") -> Rows:
    """Encodings, subjects and syndromes of some images; a prefix marks controls, syndrome 0."""
    wanted = sorted(image_ids)
    place = {image_id: row for row, image_id in enumerate(source.image_ids)}
    records = list(source.cohort.records(wanted))
    syndromes = [0 if prefix else record.syndrome for record in records]
    vectors = source.trained[[place[image_id] for image_id in wanted]]
    return vectors, [prefix + record.subject for record in records], syndromes


def rare_images(whole: Encoded) -> set[str]:
    common = set(whole.cohort.classes)
    return {i for i, record in whole.cohort.images.items() if record.syndrome not in common}


def joined(parts: Sequence[Rows]) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Similarities and subjects."""
    vectors = np.concatenate([part[0] for part in parts])
    return vectors @ vectors.T, np.array([subject for part in parts for subject in part[1]])


def search(parts: Sequence[Rows], unrelated: Sequence[Rows] = ()) -> list[Group]:
    similarities, subjects = joined(parts)
    _, number = np.unique(subjects, return_inverse=True)
    return find_groups(
        similarities,
        subjects,
        number % SITES,
        np.random.default_rng(0),
        unrelated=joined(unrelated) if unrelated else None,
    )


def of_controls(controls: Sequence[Encoded]) -> list[Rows]:
    return [rows(c, c.cohort.images, f"control-{i}-") for i, c in enumerate(controls)]


def quality(groups: Sequence[Group], parts: Sequence[Rows]) -> dict[str, object]:
    """How pure the groups are, and how many hidden subjects they reach.

    A subject is right where its group's most common syndrome is its own and has two or more.
    """
    syndrome = {s: d for part in parts for s, d in zip(part[1], part[2], strict=True)}
    hidden = sum(d > 0 for d in syndrome.values())
    right = pairs = alike = 0
    for group in groups:
        shown = [syndrome[subject] for subject in map(str, group.subjects)]
        most = max(Counter(d for d in shown if d).values(), default=0)
        right += most if most > 1 else 0
        pairs += len(shown) * (len(shown) - 1) // 2
        alike += sum(a == b != 0 for a, b in itertools.combinations(shown, 2))
    members = sum(len(group.subjects) for group in groups)
    return {
        "subjects": len(syndrome),
        "groups": len(groups),
        "of more than one site": sum(len(set(group.sites)) > 1 for group in groups),
        "precision": round(right / members, 2) if members else None,
        "recall": round(right / hidden, 2) if hidden else None,
        "pair precision": round(alike / pairs, 2) if pairs else None,
    }


def told(benchmark: Any, name: str, facts: object) -> None:
    benchmark.extra_info[name] = facts
    print(f"{name}: {facts}")  # noqa: T201


def test_rankings_compared(
    benchmark: Any, encoded: tuple[Encoded, list[Encoded]], tmp_path: Path
) -> None:
    whole, _ = encoded
    file = tmp_path / "encodings.npz"
    write_encodings(file, EncodingTable(tuple(whole.image_ids), whole.trained))

    def evaluate(ranking: str, weight: float = 0.0) -> dict[str, Any]:
        request = Request(file, whole.cohort.root, None, ranking, weight)
        tables: dict[str, Any] = evaluate_encodings(request, Steps())["evaluation"]
        return tables

    benchmark.pedantic(evaluate, ("nearest-image",), rounds=1)
    cases = [(name, 0.0) for name in get_registry().rankings.names()] + [("nearest-image", 0.2)]
    for name, weight in cases:
        tables = evaluate(name, weight)
        top1 = {table: round(100 * row["top1"], 1) for table, row in tables.items()}
        told(benchmark, f"{name}, HPO weight {weight}", top1)
        assert all(row["top1"] > row["chance"]["top1"] for row in tables.values())


def test_groups_of_hidden_syndromes(benchmark: Any, encoded: tuple[Encoded, list[Encoded]]) -> None:
    whole, controls = encoded
    hidden = [rows(whole, rare_images(whole))]
    first, *others = of_controls(controls)
    beside = [*hidden, first]
    found = benchmark.pedantic(search, (hidden,), rounds=1)
    told(benchmark, f"hidden, q_random <= {LEVEL}", quality(found, hidden))
    told(benchmark, f"hidden and controls, q_random <= {LEVEL}", quality(search(beside), beside))
    for null, unrelated in (("made up", []), ("controls", others)):
        for name, parts in (("hidden", hidden), ("hidden and controls", beside)):
            sure = [g for g in search(parts, unrelated) if g.p_search <= LEVEL]
            told(benchmark, f"{name}, p_search <= {LEVEL} by {null}", quality(sure, parts))
    precision = quality(found, hidden)["pair precision"]
    assert isinstance(precision, float)
    assert precision > 2 * 9 / 59, "9 of the 59 other subjects share a subject's syndrome"


def test_groups_of_controls(benchmark: Any, encoded: tuple[Encoded, list[Encoded]]) -> None:
    parts = of_controls(encoded[1])
    found = benchmark.pedantic(lambda: [search([part]) for part in parts], rounds=1)
    others = [[p for p in parts if p is not part] for part in parts]
    against = [search([part], rest) for part, rest in zip(parts, others, strict=True)]

    def sure(runs: list[list[Group]]) -> list[int]:
        return [sum(group.p_search <= LEVEL for group in groups) for groups in runs]

    told(benchmark, f"groups, q_random <= {LEVEL}", [len(groups) for groups in found])
    told(benchmark, f"groups, p_search <= {LEVEL} by made up", sure(found))
    told(benchmark, f"groups, p_search <= {LEVEL} by other controls", sure(against))
    assert np.mean(np.array(sure(against)) > 0) <= 0.25


def test_is_any_known_syndrome_near(benchmark: Any, encoded: tuple[Encoded, list[Encoded]]) -> None:
    whole, controls = encoded
    cohort = whole.cohort
    gallery, subjects, _ = rows(whole, cohort.frequent_gallery)
    names = np.array(subjects)

    def yardstick(image_ids: Iterable[str]) -> Any:
        vectors, own, _ = rows(whole, image_ids)
        return calibrate(vectors @ gallery.T, np.array(own), names)

    fair = benchmark.pedantic(yardstick, (cohort.validation,), rounds=1)
    for name, scale in (
        ("yardstick: validation", fair),
        ("yardstick: whole gallery", yardstick(cohort.frequent_gallery)),
    ):

        def p_values(part: Rows, scale: Any = scale) -> Any:
            return scale.p_values(kth_distances(part[0] @ gallery.T, names))

        known = p_values(rows(whole, cohort.frequent_test))
        for other, part in (
            ("held-out syndromes", rows(whole, rare_images(whole))),
            ("controls", of_controls(controls)[0]),
        ):
            found = measure_separation(known, p_values(part), LEVEL)
            told(benchmark, f"{name}, {other}", found)
            if scale is fair:
                assert found.false_alarms <= 2 * LEVEL
