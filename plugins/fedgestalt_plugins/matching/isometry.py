"""FLAKE masking with one Haar-random isometry that all sites share and the server never sees.

FLAKE multiplies encodings by ``L (N N^T)^(1/2)`` with a common random N and a left inverse L of N.
For any left inverse that equals ``(N^T N)^(-1/2) N^T``: an isometry. It is drawn here directly, and
uniformly (see :mod:`fedgestalt_plugins.matching.haar`). Inner products, and so cosine similarities,
are unchanged; error of the Gram matrix about 1e-15, in float32 about 5e-7.

To mask n rows of f dimensions with one isometry takes n f^2 work and f^2 / 2 draws. Cut into twelve
blocks it takes a twelfth of both, but the server can compare block by block. Which of the two is
part of the strategy's name, because all sites must do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure
from fedgestalt_plugins.matching.haar import rotated, rotation
from fedgestalt_plugins.matching.keystream import derive
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
        rows = checked(encodings)
        size = rows.shape[1]
        if not self.block:
            return self._masked(rows, seed)
        masked = np.empty(rows.shape, np.float32 if self.single_precision else np.float64)
        for number, part in enumerate(blocks_of(size, self.block)):
            own = derive(seed, "isometry block/1", number.to_bytes(4, "big"))
            masked[:, part] = self._masked(rows[:, part], own)
        return masked

    def _masked(self, rows: NDArray[np.floating], seed: bytes) -> NDArray[np.floating]:
        if self.single_precision:
            isometry = rotation(rows.shape[1], seed).astype(np.float32)
            return rows.astype(np.float32, copy=False) @ isometry
        return rotated(rows.astype(np.float64), seed)


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
