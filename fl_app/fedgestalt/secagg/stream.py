"""The mask stream: AES-256-CTR words, added to or subtracted from a vector in place.

The bytes are the specification: segment *s* of 4 MiB is the AES-256-CTR keystream that starts at
counter block ``s`` (12 bytes, little-endian) || ``00000002``, read as little-endian 32-bit words. A
segment's keystream depends on nothing before it, so any part can be made alone.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

SEGMENT_BYTES = 4 << 20
_CHUNK_BYTES = 256 << 10  # stays in the second-level cache between keystream and addition
_ZEROS = bytes(_CHUNK_BYTES)
_BLOCK = 16


def add_stream(vector: NDArray[np.uint32], key: bytes, *, subtract: bool = False) -> None:
    """Add the stream of ``key`` to ``vector`` modulo 2^32, in place.

    Args:
        vector: contiguous, one axis.
        key: 32 bytes, used for one vector only.
        subtract: remove the stream instead.
    """
    combine = np.subtract if subtract else np.add
    scratch = np.empty((_CHUNK_BYTES + _BLOCK) // 4, np.dtype("<u4"))
    view = scratch.view(np.uint8).data
    cipher = algorithms.AES256(key)
    words_per_segment, words_per_chunk = SEGMENT_BYTES // 4, _CHUNK_BYTES // 4
    for segment, start in enumerate(range(0, vector.size, words_per_segment)):
        counter = segment.to_bytes(12, "little") + b"\x00\x00\x00\x02"
        stream = Cipher(cipher, modes.CTR(counter)).encryptor()
        end = min(start + words_per_segment, vector.size)
        for low in range(start, end, words_per_chunk):
            part = vector[low : min(low + words_per_chunk, end)]
            stream.update_into(_ZEROS[: part.nbytes], view)
            combine(part, scratch[: part.size], out=part)
