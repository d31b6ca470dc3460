"""Shamir's secret sharing of 32-byte secrets over the prime field of 2^521 - 1.

Any ``threshold`` shares give the secret, fewer say nothing about it. A wrong share gives a wrong
secret without a word: whoever combines must hold a commitment to compare with. Source: Shamir
1979, "How to share a secret".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

PRIME: Final = 2**521 - 1
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 66

Entropy = Callable[[int], bytes]
"""Returns that many random bytes."""


def split(secret: bytes, threshold: int, holders: int, entropy: Entropy) -> list[bytes]:
    """Share a secret among ``holders``; share *i* belongs to the holder with number *i* + 1.

    Args:
        secret: 32 bytes.
        threshold: shares that give the secret back, 1..``holders``.
        holders: how many shares to make.
        entropy: of the operating system; only tests replace it.

    Returns:
        ``holders`` shares of 66 bytes.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders:
        raise ValueError("a secret has 32 bytes, a threshold lies between 1 and the holders")
    coefficients = [_random_element(entropy) for _ in range(threshold - 1)]
    shares = []
    for x in range(1, holders + 1):
        y = 0
        for coefficient in coefficients:
            y = (y + coefficient) * x % PRIME
        y = (y + int.from_bytes(secret, "big")) % PRIME
        shares.append(y.to_bytes(SHARE_BYTES, "big"))
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind at least ``threshold`` shares, by their holders' numbers (from 1).

    Raises:
        ValueError: a share is no field element, or the shares are of no 32-byte secret. Other
            wrong shares give a wrong secret.
    """
    values = {x: int.from_bytes(share, "big") for x, share in shares.items()}
    sizes = {len(share) for share in shares.values()}
    if sizes != {SHARE_BYTES} or min(values) < 1 or max(values.values()) >= PRIME:
        raise ValueError("a share is not a field element of 66 bytes")
    total = 0
    for x, y in values.items():
        above = below = 1
        for other in values:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        total += y * above * pow(below, -1, PRIME)
    secret = total % PRIME
    if secret >> 8 * SECRET_BYTES:
        raise ValueError("the shares do not belong together")
    return secret.to_bytes(SECRET_BYTES, "big")


def _random_element(entropy: Entropy) -> int:
    while True:
        element = int.from_bytes(entropy(SHARE_BYTES), "big") & PRIME
        if element != PRIME:
            return element
