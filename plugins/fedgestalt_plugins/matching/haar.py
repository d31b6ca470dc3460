"""Haar-random rotations from a secret seed, without a matrix and without a factorisation.

A Haar-random orthogonal matrix of f dimensions is the product ``H_1 ... H_f D`` (Stewart 1980, "The
efficient generation of random orthogonal matrices with an application to condition estimators"):
``H_i`` is the Householder reflection that takes a vector ``x_i`` of f - i + 1 independent standard
normal draws to ``D_ii |x_i| e_1``, and ``D`` holds the signs. That is the Q, with a positive
diagonal of R, of the Gaussian matrix whose elimination meets these vectors one after another.

A panel of w reflections is ``1 - V^T T V`` with their unit vectors as the rows of V (w, f) and
``T^-1`` the strict upper triangle of ``V V^T`` with 1/2 on its diagonal (Joffrain et al. 2006,
"Accumulating Householder transformations, revisited"). To multiply rows by one panel after the
other takes the work of one product with the matrix, half of its f^2 draws, and for few rows the
memory of a panel. Many rows in float32 are faster, and more exact, with the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt_plugins.matching.keystream import derive, gaussian

_WIDTH: Final = 64
_ROWS_AT_A_TIME: Final = 512  # of 512 dimensions: they stay in the second-level cache

Table = NDArray[np.float64]


@dataclass(frozen=True)
class _Panel:
    """Reflections of neighbouring dimensions; m dimensions are left from the first of them on.

    Attributes:
        columns: V^T (m, w).
        rows: T V (w, m).
        signs: of these dimensions (w,).
    """

    columns: Table
    rows: Table
    signs: Table


def rotated(rows: Table, seed: bytes) -> Table:
    """Rows (n, f) times the matrix of a 32-byte secret seed; returns (n, f).

    Inner products stay to rounding: those of rows of length 1 are off by about 1e-15.
    """
    count, size = rows.shape
    panels: Iterable[_Panel] = _panels(size, seed)
    if count > _ROWS_AT_A_TIME:
        panels = list(panels)
    result = np.empty((count, size))
    for start in range(0, count, _ROWS_AT_A_TIME):
        some = slice(start, start + _ROWS_AT_A_TIME)
        left, done = rows[some], 0
        for panel in panels:
            left = left - (left @ panel.columns) @ panel.rows
            width = len(panel.signs)
            np.multiply(left[:, :width], panel.signs, out=result[some, done : done + width])
            left, done = left[:, width:], done + width
    return result


def rotation(size: int, seed: bytes) -> Table:
    """The matrix itself (size, size), built from its last dimensions to its first."""
    matrix = np.zeros((size, size))
    start = size
    for panel in reversed(list(_panels(size, seed))):
        width = len(panel.signs)
        end, start = start, start - width
        known = np.empty((width, size - start))  # T V diag(signs, what is built)
        np.multiply(panel.rows[:, :width], panel.signs, out=known[:, :width])
        np.matmul(panel.rows[:, width:], matrix[end:, end:], out=known[:, width:])
        np.fill_diagonal(matrix[start:end, start:end], panel.signs)
        matrix[start:, start:] -= panel.columns @ known
    return matrix


def _panels(size: int, seed: bytes) -> Iterator[_Panel]:
    for number, start in enumerate(range(0, size, _WIDTH)):
        left = size - start
        width = min(_WIDTH, left)
        own = derive(seed, "haar panel/1", number.to_bytes(4, "big"))
        vectors: Table = np.triu(gaussian(own, width * left).reshape(width, left))
        first = np.diagonal(vectors).copy()
        signs = np.where(first < 0, 1.0, -1.0)  # of what the reflection makes of it
        lengths = np.sqrt(np.einsum("wf,wf->w", vectors, vectors))
        np.fill_diagonal(vectors, first - signs * lengths)
        vectors /= np.sqrt(2 * lengths * (lengths + np.abs(first)))[:, None]
        inverse: Table = np.triu(vectors @ vectors.T, 1)
        np.fill_diagonal(inverse, 0.5)
        rows = np.linalg.solve(inverse, vectors).astype(np.float64, copy=False)
        yield _Panel(np.ascontiguousarray(vectors.T), rows, signs)
