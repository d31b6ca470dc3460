"""Mask streams: keystream words, added to or subtracted from a vector in place.

The bytes are the specification. A stream is cut into segments of 4 MiB; segment *s* is, read as
little-endian 32-bit words:

- ``aes-256-ctr``: the AES-256-CTR keystream from counter block ``s`` (12 bytes, little-endian) ||
  ``00000002`` on.
- ``chacha20``: the ChaCha20 keystream (RFC 8439) for nonce ``s`` (12 bytes, little-endian), from
  block counter 0 on.

A segment depends on nothing before it, so any part can be made alone.

OpenSSL makes the AES bytes in two ways. AES-GCM with a nonce of 12 bytes encrypts by CTR from
``nonce || 00000002`` on, so its encryptor gives the same bytes, at 2.5 times the rate on a server
CPU with AVX-512. GCM ends at 2^36 - 32 bytes per nonce, far above a segment. It is a source of
keystream here and nothing else: no tag is made, nothing is authenticated. With every cipher, a key
used for a second vector gives the difference of the two away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

AES: Final = "aes-256-ctr"
CHACHA20: Final = "chacha20"
KEY_BYTES: Final = 32
SEGMENT_BYTES: Final = 4 << 20

_SEGMENT_WORDS = SEGMENT_BYTES // 4
_END = _SEGMENT_WORDS << 96  # segments are counted in 12 bytes
_CHUNK_BYTES = 256 << 10  # vector, keystream and zeros stay in the second-level cache together
_CHUNK_WORDS = _CHUNK_BYTES // 4
_BLOCK_WORDS = _SEGMENT_WORDS // 2
_ZEROS = memoryview(bytes(_CHUNK_BYTES))
_AES_BLOCK, _CHACHA20_BLOCK = 16, 64
_ROUNDS = 8


Words = NDArray[np.uint32]
Vector = Callable[[int, int], Words]
"""A vector that lies elsewhere: gives its words from the first number to before the second."""


@dataclass(frozen=True)
class Stream:
    """One mask stream.

    Attributes:
        key: 32 bytes, used for one vector only; not shown.
        subtract: the stream is subtracted, not added.

    Raises:
        ValueError: the key has another length.
    """

    key: bytes = field(repr=False)
    subtract: bool = False

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a stream's key has {KEY_BYTES} bytes, not {len(self.key)}")


@dataclass(frozen=True)
class Calibration:
    """How fast this process makes keystream, in bytes per second on one thread.

    Attributes:
        ctr: AES-256 by OpenSSL's CTR.
        gcm: AES-256 by OpenSSL's GCM.
        chacha20: ChaCha20.
    """

    ctr: float
    gcm: float
    chacha20: float

    @property
    def aes_is_fast(self) -> bool:
        """The better way to the AES bytes is at least as fast as ChaCha20."""
        return max(self.ctr, self.gcm) >= self.chacha20


def add_streams(
    vector: Words,
    streams: Iterable[Stream],
    *,
    vectors: Sequence[Vector] = (),
    cipher: str = AES,
    first_word: int = 0,
    threads: int = 1,
) -> None:
    """Add words ``first_word`` to ``first_word + len(vector)`` of all streams to ``vector``.

    In place, modulo 2^32. Everything is applied to a piece of the vector while it is in the cache.

    Args:
        vector: contiguous, one axis; changed.
        streams: in any order; the result does not depend on it.
        vectors: added as well; each as long as ``vector``, whose places count from 0 for them. They
            are asked for at most 2 MiB at a time, by several threads.
        cipher: :data:`AES` or :data:`CHACHA20`.
        first_word: where in the streams the vector begins, in words of 4 bytes.
        threads: how many threads share the work, by whole segments.

    Raises:
        ValueError: the vector is not of this kind or cannot be written to, the cipher is unknown,
            or a number is out of range. The vector is unchanged then.
        Exception: what one of ``vectors`` raises. The vector is of no use then.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError("the vector is not a contiguous uint32 array of one axis")
    if not vector.flags.writeable:
        raise ValueError("the vector cannot be written to")
    if cipher not in _KEYSTREAMS:
        raise ValueError(f"unknown cipher {cipher!r}; there are {', '.join(_KEYSTREAMS)}")
    end = first_word + vector.size
    if first_word < 0 or end > _END or threads < 1:
        raise ValueError(f"words {first_word} to {end}, {threads} threads")
    keystream, streams = _KEYSTREAMS[cipher], tuple(streams)
    segments = range(first_word // _SEGMENT_WORDS, -(-end // _SEGMENT_WORDS))
    threads = min(threads, len(segments))
    scratches = deque(_scratch() for _ in range(threads))

    def mask(segment: int) -> None:
        base = segment * _SEGMENT_WORDS
        low, high = max(first_word, base), min(end, base + _SEGMENT_WORDS)
        part = vector[low - first_word : high - first_word]
        steps = [
            (
                keystream(stream.key, segment, 4 * (low - base)),
                np.subtract if stream.subtract else np.add,
            )
            for stream in streams
        ]
        for start in range(0, part.size, _BLOCK_WORDS):
            block = part[start : start + _BLOCK_WORDS]
            first = low - first_word + start
            for read in vectors:
                np.add(block, read(first, first + block.size), out=block)
        scratch = scratches.pop()
        _apply(part, steps, scratch)
        scratches.append(scratch)

    if threads <= 1:
        for segment in segments:
            mask(segment)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(mask, segments))


def calibrate(clock: Callable[[], float]) -> Calibration:
    """Measure the ciphers; from then on this process makes AES bytes the faster way.

    Before the first call it makes them by CTR. Takes about 10 ms, more without AES hardware.

    Args:
        clock: in seconds, fine enough to time a millisecond, such as ``time.perf_counter``.

    Returns:
        the best rates of several rounds.

    Raises:
        ValueError: the clock did not advance. Nothing has changed then.
    """
    rounds = [
        [_seconds(keystream, clock) for keystream in (_by_ctr, _by_gcm, _by_chacha20)]
        for _ in range(_ROUNDS)
    ]
    best = np.min(rounds, axis=0).tolist()
    if min(best) <= 0:
        raise ValueError("the clock did not advance")
    found = Calibration(*(SEGMENT_BYTES / seconds for seconds in best))
    _KEYSTREAMS[AES] = _by_gcm if found.gcm > found.ctr else _by_ctr
    return found


def _by_ctr(key: bytes, segment: int, offset: int) -> CipherContext:
    """What turns zeros into the keystream of a segment from byte ``offset`` on."""
    block, surplus = divmod(offset, _AES_BLOCK)
    counter = segment.to_bytes(12, "little") + (2 + block).to_bytes(4, "big")
    encryptor = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
    encryptor.update(bytes(surplus))
    return encryptor


def _by_gcm(key: bytes, segment: int, offset: int) -> CipherContext:
    """Like :func:`_by_ctr`; GCM can begin only where the segment does."""
    if offset:
        return _by_ctr(key, segment, offset)
    nonce = segment.to_bytes(12, "little")
    return Cipher(algorithms.AES256(key), modes.GCM(nonce)).encryptor()


def _by_chacha20(key: bytes, segment: int, offset: int) -> CipherContext:
    """Like :func:`_by_ctr`, for ChaCha20."""
    block, surplus = divmod(offset, _CHACHA20_BLOCK)
    nonce = block.to_bytes(4, "little") + segment.to_bytes(12, "little")
    encryptor = Cipher(algorithms.ChaCha20(key, nonce), None).encryptor()
    encryptor.update(bytes(surplus))
    return encryptor


_Keystream = Callable[[bytes, int, int], CipherContext]
_KEYSTREAMS: dict[str, _Keystream] = {AES: _by_ctr, CHACHA20: _by_chacha20}


def _scratch() -> Words:
    """Room for a chunk of keystream and the block that ``update_into`` asks for beyond it."""
    return np.empty((_CHUNK_BYTES + _AES_BLOCK) // 4, np.dtype("<u4"))


def _apply(
    part: Words,
    steps: Sequence[tuple[CipherContext, np.ufunc]],
    scratch: Words,
) -> None:
    target = scratch.view(np.uint8).data
    for start in range(0, part.size, _CHUNK_WORDS):
        chunk = part[start : start + _CHUNK_WORDS]
        zeros, words = _ZEROS[: chunk.nbytes], scratch[: chunk.size]
        for encryptor, combine in steps:
            encryptor.update_into(zeros, target)
            combine(chunk, words, out=chunk)


def _seconds(keystream: _Keystream, clock: Callable[[], float]) -> float:
    """How long one segment takes, without adding it to anything."""
    target = _scratch().view(np.uint8).data
    started = clock()
    encryptor = keystream(bytes(KEY_BYTES), 0, 0)
    for _ in range(SEGMENT_BYTES // _CHUNK_BYTES):
        encryptor.update_into(_ZEROS, target)
    return clock() - started
