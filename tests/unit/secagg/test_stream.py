"""The mask stream: its bytes are the specification."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.secagg.stream import SEGMENT_BYTES, add_stream

KEY = bytes(range(32))


def specified_words(key: bytes, count: int) -> np.ndarray:
    """The stream written out from its definition, segment by segment."""
    raw = b""
    for segment in range(-(-4 * count // SEGMENT_BYTES)):
        counter = segment.to_bytes(12, "little") + (2).to_bytes(4, "big")
        encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
        raw += encryptor.update(bytes(SEGMENT_BYTES))
    return np.frombuffer(raw, "<u4")[:count]


def test_the_stream_is_what_the_specification_says_across_segments() -> None:
    count = SEGMENT_BYTES // 4 + 70_001
    vector = np.zeros(count, np.uint32)
    add_stream(vector, KEY)
    assert np.array_equal(vector, specified_words(KEY, count))


def test_the_keystream_is_that_of_gcm_with_the_segment_as_nonce() -> None:
    vector = np.zeros(1024, np.uint32)
    add_stream(vector, KEY)
    gcm = Cipher(algorithms.AES(KEY), modes.GCM(bytes(12))).encryptor().update(bytes(4096))
    assert vector.tobytes() == gcm


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200_000), st.binary(min_size=32, max_size=32))
def test_subtracting_undoes_adding(count: int, key: bytes) -> None:
    original = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
    vector = original.copy()
    add_stream(vector, key)
    assert not np.array_equal(vector, original)
    add_stream(vector, key, subtract=True)
    assert np.array_equal(vector, original)


def test_different_keys_give_unrelated_streams() -> None:
    first, second = np.zeros(50_000, np.uint32), np.zeros(50_000, np.uint32)
    add_stream(first, KEY)
    add_stream(second, KEY[::-1])
    assert (first == second).sum() < 5
