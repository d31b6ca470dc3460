"""Random words from secret keys: AES-256 in counter mode, one key per purpose."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

KEY_BYTES: Final = 32
_CHUNK_BYTES: Final = 1 << 18  # zeros and keystream stay in the second-level cache
_ZEROS: Final = bytes(_CHUNK_BYTES)
_SLACK: Final = 2  # words; ``update_into`` wants room for a block beyond what it writes


def derive(key: bytes, purpose: str, context: bytes = b"") -> bytes:
    """Derive the key of one purpose, 32 bytes (HKDF-SHA256, RFC 5869)."""
    info = b"fedgestalt " + purpose.encode() + b"|" + context
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(key)


def random_words(key: bytes, *shape: int) -> NDArray[np.uint64]:
    """Uniform 64-bit words: the AES-256-CTR keystream of ``key`` from counter 0, little-endian."""
    count = math.prod(shape)
    words = np.empty(count + _SLACK, "<u8")
    octets = words.view(np.uint8).data
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    for start in range(0, 8 * count, _CHUNK_BYTES):
        length = min(_CHUNK_BYTES, 8 * count - start)
        encryptor.update_into(_ZEROS[:length], octets[start:])
    return words[:count].reshape(shape)


def uniform(key: bytes, *shape: int) -> NDArray[np.float64]:
    """Uniform draws from the open interval (0, 1), with 53 bits."""
    return ((random_words(key, *shape) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def gaussian(key: bytes, count: int) -> NDArray[np.float64]:
    """Standard normal draws (Box and Muller 1958)."""
    pairs = (count + 1) // 2
    radius, angle = uniform(key, 2, pairs)
    radius = np.sqrt(-2 * np.log(radius))
    angle *= 2 * np.pi
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
