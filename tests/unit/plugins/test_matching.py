"""The isometry: exact, orthogonal, secret."""

from __future__ import annotations

import numpy as np
import pytest

from fedgestalt.errors import DataError
from fedgestalt.hooks import get_registry
from fedgestalt_plugins.matching.isometry import _gaussian, haar_isometry

SEED = bytes(range(32))


def unit_rows(count: int, size: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    rows += 0.5  # encodings are not centred
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_masking_keeps_every_inner_product() -> None:
    strategy = get_registry().matching.get("isometry")
    rows = unit_rows(40, 96)
    masked = strategy.mask(rows, SEED)
    plain = rows.astype(np.float64) @ rows.T.astype(np.float64)
    assert np.abs(strategy.similarities(masked, masked) - plain).max() < 1e-12


def test_the_matrix_is_orthogonal_and_a_function_of_the_seed() -> None:
    q = haar_isometry(64, SEED)
    assert np.abs(q @ q.T - np.eye(64)).max() < 1e-12
    assert np.array_equal(q, haar_isometry(64, SEED))
    assert np.abs(q - haar_isometry(64, SEED[::-1])).max() > 0.1


def test_the_sum_of_the_coordinates_does_not_survive_masking() -> None:
    rows = unit_rows(500, 128, 3)
    masked = get_registry().matching.get("isometry").mask(rows, SEED)
    assert abs(np.corrcoef(rows.sum(1), masked.sum(1))[0, 1]) < 0.6


def test_matrices_are_haar_distributed_in_their_first_moments() -> None:
    draws = np.stack([haar_isometry(4, i.to_bytes(32, "big")) for i in range(1500)])
    error = 5 / np.sqrt(1500)
    assert np.abs(draws.mean(0)).max() < error
    assert np.abs((draws**2).mean(0) - 0.25).max() < error
    assert abs(np.mean(np.linalg.det(draws))) < error


def test_the_draws_are_standard_normal() -> None:
    sample = _gaussian(200_001, SEED)
    assert len(sample) == 200_001
    assert abs(sample.mean()) < 0.02
    assert abs(sample.std() - 1) < 0.02
    assert abs((sample**4).mean() - 3) < 0.2


@pytest.mark.parametrize("bad", [np.nan, 3.0])
def test_encodings_that_are_not_finite_or_not_of_length_one_are_refused(bad: float) -> None:
    rows = unit_rows(3, 8)
    rows[1] *= bad
    with pytest.raises(DataError, match="not finite or not of length 1"):
        get_registry().matching.get("isometry").mask(rows, SEED)


def test_the_disclosure_says_something_for_every_party() -> None:
    for entry in get_registry().matching:
        said = entry.plugin.disclosure
        for sentence in (said.server_learns, said.sites_learn, said.asking_site_learns):
            assert len(sentence) > 30
            assert sentence.endswith(".")
