"""A mask is a Haar-random orthogonal matrix, the same for everybody who has the seed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fedgestalt_plugins.matching.haar import rotated, rotation
from fedgestalt_plugins.matching.isometry import Isometry
from fedgestalt_plugins.matching.keystream import derive, gaussian

SEED = bytes(range(32))
SIZES = (1, 2, 3, 63, 64, 65, 200)  # about the width of a panel, which is 64
DRAWS = 1500

Matrix = NDArray[np.float64]


def unit_rows(count: int, size: int) -> Matrix:
    rows = np.random.default_rng(count).normal(size=(count, size)) + 0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_reflections(size: int, seed: bytes) -> Matrix:
    """Stewart's product, one reflection after the other."""
    matrix, signs = np.eye(size), np.ones(size)
    for start in range(0, size, 64):
        left = size - start
        key = derive(seed, "haar panel/1", (start // 64).to_bytes(4, "big"))
        draws = gaussian(key, min(64, left) * left).reshape(-1, left)
        for number, draw in enumerate(draws):
            vector = np.zeros(size)
            vector[start + number :] = draw[number:]
            sign = -np.sign(vector[start + number])
            signs[start + number] = sign
            vector[start + number] -= sign * np.linalg.norm(vector)
            vector /= np.linalg.norm(vector)
            matrix -= 2 * np.outer(matrix @ vector, vector)
    return matrix * signs


def by_qr(size: int, rng: np.random.Generator) -> Matrix:
    """The Q of a Gaussian matrix, with the signs of R's diagonal fixed (Mezzadri 2007)."""
    orthogonal, triangular = np.linalg.qr(rng.normal(size=(size, size)))
    return orthogonal * np.sign(np.diagonal(triangular))


def samples(size: int, draws: int = DRAWS) -> tuple[Matrix, Matrix]:
    """Independent draws (draws, size, size) of ours and of numpy's QR."""
    rng = np.random.default_rng(size)
    ours = [rotation(size, number.to_bytes(32, "big")) for number in range(draws)]
    return np.stack(ours), np.stack([by_qr(size, rng) for _ in range(draws)])


def farthest(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Kolmogorov-Smirnov statistic of two samples, in units of its scale: above 1.95 in 0.1 %."""
    one, other = np.sort(one.ravel()), np.sort(other.ravel())
    everything = np.concatenate([one, other])
    first = np.searchsorted(one, everything, "right") / len(one)
    second = np.searchsorted(other, everything, "right") / len(other)
    scale = np.sqrt(1 / len(one) + 1 / len(other))
    return float(np.abs(first - second).max() / scale)


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_stewarts_product_of_reflections(size: int) -> None:
    assert np.abs(rotation(size, SEED) - by_reflections(size, SEED)).max() < 1e-12


@pytest.mark.parametrize("size", [*SIZES, 512])
def test_the_matrix_is_orthogonal(size: int) -> None:
    matrix = rotation(size, SEED)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-12
    assert np.abs(matrix.T @ matrix - np.eye(size)).max() < 1e-12


@pytest.mark.parametrize("count", [1, 511, 512, 513, 1100])  # rows are taken 512 at a time
@pytest.mark.parametrize("size", [7, 64, 200])
def test_rows_are_rotated_as_by_the_matrix(count: int, size: int) -> None:
    rows = unit_rows(count, size)
    before = rows.copy()
    assert np.abs(rotated(rows, SEED) - rows @ rotation(size, SEED)).max() < 1e-12
    assert np.array_equal(rows, before)


def test_inner_products_of_whole_encodings_stay() -> None:
    rows = unit_rows(40, 6144)
    gram = rows @ rows.T
    masked = rotated(rows, SEED)
    assert np.abs(masked @ masked.T - gram).max() < 1e-12
    single = Isometry(block=512, single_precision=True).mask(rows.astype(np.float32), SEED)
    assert np.abs(single @ single.T - gram).max() < 1e-6


@pytest.mark.parametrize("single", [False, True])
def test_a_basis_stays_one_in_either_precision(single: bool) -> None:
    masked = Isometry(block=512, single_precision=single).mask(np.eye(1024), SEED)
    assert masked.dtype == (np.float32 if single else np.float64)
    assert np.abs(masked @ masked.T - np.eye(1024)).max() < (1e-6 if single else 1e-12)


def test_the_matrix_is_a_function_of_the_seed() -> None:
    assert np.array_equal(rotation(200, SEED), rotation(200, SEED))
    other = rotation(200, SEED[::-1])
    assert np.abs(rotation(200, SEED) - other).max() > 0.1
    assert abs(np.corrcoef(rotation(200, SEED).ravel(), other.ravel())[0, 1]) < 0.03


def test_another_process_draws_the_same_matrix_to_the_bit() -> None:
    code = (
        "import hashlib, sys; from fedgestalt_plugins.matching.haar import rotation;"
        "sys.stdout.write(hashlib.sha256(rotation(200, bytes(range(32))).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout == hashlib.sha256(rotation(200, SEED).tobytes()).hexdigest()


def test_the_first_moments_are_those_of_the_haar_measure() -> None:
    size, error = 4, 5 / np.sqrt(DRAWS)
    draws, _ = samples(size)
    assert np.abs(draws.mean(0)).max() < error
    assert np.abs((draws**2).mean(0) - 1 / size).max() < error
    assert np.abs((draws**4).mean(0) - 3 / (size * (size + 2))).max() < error
    assert abs(np.linalg.det(draws).mean()) < error
    pairs = np.einsum("dij,dkl->ijkl", draws, draws) / DRAWS
    expected = np.einsum("ik,jl->ijkl", np.eye(size), np.eye(size)) / size
    assert np.abs(pairs - expected).max() < error


ASPECTS: dict[str, Callable[[Matrix], NDArray[np.float64]]] = {
    "traces": lambda draws: np.trace(draws, axis1=1, axis2=2),
    "the first entry": lambda draws: draws[:, 0, 0],
    "the last entry": lambda draws: draws[:, -1, -1],
    "the first of the last row": lambda draws: draws[:, -1, 0],
    "the last of the first row": lambda draws: draws[:, 0, -1],
    "the largest entry": lambda draws: np.abs(draws).max((1, 2)),
    "a minor": lambda draws: np.linalg.det(draws[:, :2, -2:]),
    "traces of squares": lambda draws: np.trace(draws @ draws, axis1=1, axis2=2),
    "the least eigenangle": lambda draws: np.array(
        [np.sort(np.abs(np.angle(np.linalg.eigvals(draw))))[1] for draw in draws]
    ),
}


@pytest.mark.parametrize(("size", "draws"), [(3, DRAWS), (6, DRAWS), (65, 300)])
def test_the_distribution_is_that_of_numpys_qr_with_fixed_signs(size: int, draws: int) -> None:
    ours, theirs = samples(size, draws)
    found = {name: farthest(aspect(ours), aspect(theirs)) for name, aspect in ASPECTS.items()}
    assert max(found.values()) < 1.95, found


def test_a_matrix_without_the_signs_would_be_found() -> None:
    ours, theirs = samples(6)
    skewed = ours * np.sign(ours[:, :1])  # every first row positive
    assert farthest(skewed[:, 0, 0], theirs[:, 0, 0]) > 5
    assert farthest(skewed[:, 0, -1], theirs[:, 0, -1]) > 5
