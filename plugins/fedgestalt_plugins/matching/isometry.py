"""FLAKE masking with one Haar-random isometry that all sites share and the server never sees.

FLAKE multiplies encodings by ``L (N N^T)^(1/2)`` with a common random N and a left inverse L of N.
For any left inverse that equals ``(N^T N)^(-1/2) N^T``: an isometry. It is drawn here directly, and
uniformly: the Q of a Gaussian matrix, with the signs of R's diagonal fixed (Mezzadri 2007, "How to
generate random matrices from the classical compact groups"). Inner products, and so cosine
similarities, are unchanged; error of the Gram matrix about 2e-15.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure
from fedgestalt.errors import DataError


@dataclass(frozen=True)
class Isometry:
    """Matching strategy ``isometry``."""

    name: str = "isometry"
    summary: str = "FLAKE kernel with a Haar-random isometry (exact)"
    licence: str = "Apache-2.0"
    disclosure: Disclosure = Disclosure(
        server_learns=(
            "The similarity of every pair of images sent (so duplicates, clusters and the same"
            " patient at two sites show) and opaque handles. No photo, embedding or label. A"
            " server that also holds one site's seed, or plaintext embeddings of about as many"
            " known images as an encoding has dimensions, can recover all embeddings."
        ),
        sites_learn="The kernel seed and the label key that all sites share.",
        asking_site_learns=(
            "For its own queries: score, syndrome and opaque handle of the released images of other"
            " sites."
        ),
    )

    def mask(self, encodings: NDArray[np.float32], seed: bytes) -> NDArray[np.float64]:
        """Rotate (n, f) encodings; returns (n, f) float64.

        Raises:
            DataError: an encoding is not finite or not of length 1.
        """
        rows = np.asarray(encodings, np.float64)
        if not np.isfinite(rows).all() or np.abs((rows**2).sum(1) - 1).max(initial=0) > 1e-3:
            raise DataError("an encoding is not finite or not of length 1")
        return rows @ haar_isometry(rows.shape[1], seed)

    def similarities(
        self, queries: NDArray[np.floating], gallery: NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Inner products of masked rows."""
        product: NDArray[np.floating] = queries @ gallery.T
        return product


def haar_isometry(size: int, seed: bytes) -> NDArray[np.float64]:
    """Draw an orthogonal matrix (size, size) from a 32-byte secret seed, the same at every site."""
    gaussian = _gaussian(size * size, seed).reshape(size, size)
    orthogonal, triangular = np.linalg.qr(gaussian)
    result: NDArray[np.float64] = orthogonal * np.sign(np.diagonal(triangular))
    return result


def _gaussian(count: int, seed: bytes) -> NDArray[np.float64]:
    """Standard normal draws from an AES-256-CTR keystream (Box and Muller 1958)."""
    pairs = (count + 1) // 2
    cipher = Cipher(algorithms.AES256(seed), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(cipher.update(bytes(16 * pairs)), "<u8").reshape(2, pairs)
    radius, angle = ((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    radius = np.sqrt(-2 * np.log(radius))
    angle *= 2 * np.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
