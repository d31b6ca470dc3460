"""FLAKE masking with one Haar-random isometry that all sites share and the server never sees.

FLAKE multiplies encodings by ``L (N N^T)^(1/2)`` with a common random N and a left inverse L of N.
For any left inverse that equals ``(N^T N)^(-1/2) N^T``: an isometry. It is drawn here directly, and
uniformly: the Q of a Gaussian matrix, with the signs of R's diagonal fixed (Mezzadri 2007, "How to
generate random matrices from the classical compact groups"). Inner products, and so cosine
similarities, are unchanged; error of the Gram matrix about 2e-15, in float32 about 5e-7.

One isometry of f dimensions takes f^2 float64 numbers, four times that while it is drawn, and f^3
work. Cut into blocks it takes a twelfth of a twelfth, but the server can compare block by block.
Which of the two is part of the strategy's name, because all sites must do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure
from fedgestalt_plugins.matching.keystream import derive, gaussian
from fedgestalt_plugins.matching.one_party import BLOCK, OneParty, blocks_of, checked

SERVER_LEARNS: Final = (
    "The similarity of every pair of images sent (so duplicates, clusters and the same"
    " patient at two sites show) and opaque handles. No photo, embedding or label. A"
    " server that also holds one site's seed can recover all embeddings; one that knows the"
    " plaintext embeddings of a few hundred images can recover the others nearly, of as many as"
    " an encoding has dimensions exactly."
)
SITES_LEARN: Final = "The kernel seed and the label key that all sites share."
ASKING_SITE_LEARNS: Final = (
    "For its own queries: score, syndrome and opaque handle of the released images of other sites."
)


@dataclass(frozen=True)
class Isometry(OneParty):
    """Matching strategy ``isometry``.

    Attributes:
        block: dimensions masked together; 0 masks the whole encoding with one matrix.
        single_precision: masked rows are float32, not float64.
    """

    name: str = "isometry"
    summary: str = "FLAKE kernel with a Haar-random isometry (exact)"
    licence: str = "Apache-2.0"
    disclosure: Disclosure = Disclosure(
        server_learns=SERVER_LEARNS,
        sites_learn=SITES_LEARN,
        asking_site_learns=ASKING_SITE_LEARNS,
    )
    block: int = 0
    single_precision: bool = False

    def mask(self, encodings: NDArray[np.floating], seed: bytes) -> NDArray[np.floating]:
        """Rotate (n, f) encodings; returns (n, f).

        Raises:
            DataError: there is none, or one is not finite or not of length 1.
        """
        precision = np.dtype(np.float32 if self.single_precision else np.float64)
        rows: NDArray[np.floating] = checked(encodings).astype(precision, copy=False)
        size = rows.shape[1]
        if not self.block:
            rotated: NDArray[np.floating] = rows @ haar_isometry(size, seed).astype(precision)
            return rotated
        masked = np.empty_like(rows)
        for number, part in enumerate(blocks_of(size, self.block)):
            own = derive(seed, "isometry block/1", number.to_bytes(4, "big"))
            isometry = haar_isometry(part.stop - part.start, own).astype(precision)
            np.matmul(rows[:, part], isometry, out=masked[:, part])
        return masked


def isometry_by_blocks() -> Isometry:
    """Matching strategy ``isometry-blocks``: cheap, and less private."""
    return Isometry(
        name="isometry-blocks",
        summary=f"FLAKE kernel, a Haar-random matrix per {BLOCK} dimensions, in float32",
        disclosure=Disclosure(
            server_learns=(
                f"{SERVER_LEARNS} Because each block of {BLOCK} dimensions is masked on its own,"
                " it can compare images block by block, and at most"
                f" {BLOCK} known images are enough."
            ),
            sites_learn=SITES_LEARN,
            asking_site_learns=ASKING_SITE_LEARNS,
        ),
        block=BLOCK,
        single_precision=True,
    )


def haar_isometry(size: int, seed: bytes) -> NDArray[np.float64]:
    """Draw an orthogonal matrix (size, size) from a 32-byte secret seed, the same at every site."""
    orthogonal, triangular = np.linalg.qr(gaussian(seed, size * size).reshape(size, size))
    orthogonal *= np.sign(np.diagonal(triangular))
    result: NDArray[np.float64] = orthogonal
    return result
