"""The attacks that documents quote find what they should, at a tiny size."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedgestalt.hooks import get_registry

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "similarity_attacks.py"


@pytest.fixture(scope="module")
def attacks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("similarity_attacks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.normal(size=(40, 24)), 3, axis=0) + 0.3 * rng.normal(size=(120, 24))
    rows += 0.3
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_tables_are_made_whole(attacks: ModuleType, rows: np.ndarray) -> None:
    people = np.repeat(np.arange(40), 3)
    photos = attacks.Photographs(rows, people, people < 30)
    lines = {(who, what): (cosine, found) for who, what, cosine, found in attacks.table(photos)}
    assert len(lines) > 25
    assert lines["server, `isometry`", "one site's seed"] == ("1.000", "100%")
    assert lines["server, `isometry`", "90 known photographs (Procrustes)"][0] == "1.000"
    assert lines["two computing parties, `secret-shared`", "their shares"] == ("1.000", "100%")
    for role in ("server", "first computing site", "second computing site"):
        what = "90 known photographs (Procrustes)"
        assert abs(float(lines[f"{role}, `secret-shared`", what][0])) < 0.2
    others = dict(attacks.other_measurements(photos))
    assert others["sessions linked, same kernel"] == "100%"
    assert others["sessions linked, new kernel, by similarities, same images"] == "100%"
    assert float(others["correlation of the sum of coordinates through `flake`"]) > 0.9


def test_procrustes_needs_as_many_photographs_as_dimensions(
    attacks: ModuleType, rows: np.ndarray
) -> None:
    sent = attacks.masked(get_registry().matching.get("isometry"), rows)
    errors = [
        np.abs(attacks.procrustes(sent[40:], sent[:known], rows[:known]) - rows[40:]).max()
        for known in (12, 24)
    ]
    assert errors[0] > 0.1
    assert errors[1] < 1e-9


def test_trilateration_needs_no_masked_row_at_all(attacks: ModuleType, rows: np.ndarray) -> None:
    guesses = attacks.trilateration(rows[40:] @ rows[:40].T, rows[:40])
    assert np.abs(guesses - rows[40:]).max() < 1e-9
    scores = rows[40:] @ rows[:40].T
    scores[:, 30:] = np.nan
    assert np.abs(attacks.trilateration(scores, rows[:40]) - rows[40:]).max() < 1e-9
    scores[:] = np.nan
    assert np.allclose(attacks.trilateration(scores, rows[:40]), rows[:40].mean(0))


def test_a_release_cap_hides_all_other_scores(attacks: ModuleType, rows: np.ndarray) -> None:
    released = attacks.released_scores(rows[:5], rows[10:], 4)
    assert released.shape == (110, 5)
    assert (np.isfinite(released).sum(0) == 4).all()
    exact = rows[10:] @ rows[:5].T
    shown = np.isfinite(released)
    assert np.allclose(released[shown], exact[shown], atol=1e-6)


def test_the_area_under_the_curve_is_one_if_a_person_is_always_nearer(attacks: ModuleType) -> None:
    gram = np.array([[1, 0.9, 0.1], [0.9, 1, 0.2], [0.1, 0.2, 1]])
    assert attacks.same_person_auc(gram, np.array([0, 0, 1])) == 1
    assert attacks.same_person_auc(gram, np.array([0, 1, 0])) == 0
