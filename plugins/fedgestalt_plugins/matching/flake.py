"""FLAKE as published: a common uniform matrix N, a left inverse of it, a matrix square root.

A site sends ``A L (N N^T)^(1/2)`` with N (k, f) uniform on (0, 1), k > f, and ``L N = 1``
(Hannemann et al. 2023; arXiv 2509.10635). The thin singular value decomposition ``N = U S V^T``
gives ``(N N^T)^(1/2) = U S U^T`` and, for the pseudo-inverse ``L = V S^-1 U^T``, the product
``V U^T``. So it is computed: no inverse, no root, and orthonormal to rounding, however badly
conditioned N is. Any other left inverse of N gives the same product.

It is here for comparison and interoperability. Entries of N are positive, so the direction
``(1, ..., 1)`` goes to ``(1, ..., 1)``: the sum of an encoding's coordinates survives almost
unchanged, correlation above .99. The Haar-random isometry has no such direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure
from fedgestalt_plugins.matching.isometry import ASKING_SITE_LEARNS, SERVER_LEARNS, SITES_LEARN
from fedgestalt_plugins.matching.keystream import derive, uniform
from fedgestalt_plugins.matching.one_party import BLOCK, OneParty, blocks_of, checked

_EXCESS: Final = 8  # k = f + f / 8, rounded up


@dataclass(frozen=True)
class Flake(OneParty):
    """Matching strategy ``flake``."""

    name: str = "flake"
    summary: str = "FLAKE kernel as published (exact; the sum of coordinates survives masking)"
    licence: str = "Apache-2.0"
    disclosure: Disclosure = Disclosure(
        server_learns=(
            f"{SERVER_LEARNS} Because the common matrix is uniform, the sum of the coordinates of"
            f" each block of {BLOCK} dimensions survives masking almost unchanged. Because each"
            " block is masked on its own, it can compare images block by block, and at most"
            f" {BLOCK} known images are enough."
        ),
        sites_learn=SITES_LEARN,
        asking_site_learns=ASKING_SITE_LEARNS,
    )

    def mask(self, encodings: NDArray[np.floating], seed: bytes) -> NDArray[np.float64]:
        """Mask (n, f) encodings, each block of 512 dimensions with its own N; returns (n, k).

        Raises:
            DataError: there is none, or one is not finite or not of length 1.
        """
        rows = checked(encodings).astype(np.float64)
        masked = []
        for number, part in enumerate(blocks_of(rows.shape[1], BLOCK)):
            own = derive(seed, "flake block/1", number.to_bytes(4, "big"))
            masked.append(rows[:, part] @ flake_mask(common_matrix(part.stop - part.start, own)))
        return np.concatenate(masked, axis=1)


def common_matrix(size: int, seed: bytes) -> NDArray[np.float64]:
    """Draw N (k, size), uniform on (0, 1), from a 32-byte secret seed."""
    return uniform(seed, size + -(-size // _EXCESS), size)


def flake_mask(common: NDArray[np.float64]) -> NDArray[np.float64]:
    """``L (N N^T)^(1/2)`` of N (k, f): an isometry (f, k); see the module docstring."""
    left, _, right = np.linalg.svd(common, full_matrices=False)
    mask: NDArray[np.float64] = right.T @ left.T
    return mask
