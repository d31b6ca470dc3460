"""Secret sharing: every set of enough shares gives the secret, and no smaller one says anything."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.secagg.shamir import PRIME, SECRET_BYTES, SHARE_BYTES, combine, split

relaxed = settings(deadline=None)
SECRETS = (bytes(32), b"\xff" * 32, bytes(31) + b"\1", bytes(range(32)))


def numbered(shares: Sequence[bytes]) -> dict[int, bytes]:
    return dict(enumerate(shares, start=1))


def some_of(shares: Sequence[bytes], holders: Sequence[int]) -> dict[int, bytes]:
    return {holder: shares[holder - 1] for holder in holders}


def feeding(elements: Sequence[int]) -> Callable[[int], bytes]:
    """An entropy that gives these field elements, one after the other."""
    left = iter(elements)
    return lambda size: next(left).to_bytes(size, "big")


@pytest.mark.parametrize("holders", range(1, 8))
def test_any_set_of_enough_shares_gives_the_secret(holders: int) -> None:
    for threshold in range(1, holders + 1):
        for secret in SECRETS:
            shares = split(secret, threshold, holders, secrets.token_bytes)
            assert [len(share) for share in shares] == holders * [SHARE_BYTES]
            for count in range(threshold, holders + 1):
                for some in combinations(range(1, holders + 1), count):
                    assert combine(some_of(shares, some)) == secret


@relaxed
@given(st.data())
def test_large_consortia_share_alike(data: st.DataObject) -> None:
    holders = data.draw(st.integers(8, 64))
    threshold = data.draw(st.integers(1, holders))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    some = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    shares = split(secret, threshold, holders, secrets.token_bytes)
    assert combine(some_of(shares, some)) == secret


def interpolated(points: dict[int, int]) -> list[int]:
    """Coefficients, lowest first, of the polynomial through these points."""
    total = [0] * len(points)
    for x, y in points.items():
        basis, below = [1], 1
        for other in points:
            if other != x:
                shifted, scaled = [0, *basis], [-other * c for c in basis] + [0]
                basis = [(a + b) % PRIME for a, b in zip(shifted, scaled, strict=True)]
                below = below * (x - other) % PRIME
        scale = y * pow(below, -1, PRIME)
        total = [(a + scale * b) % PRIME for a, b in zip(total, basis, strict=True)]
    return total


@pytest.mark.parametrize("threshold", range(2, 7))
def test_fewer_shares_than_the_threshold_fit_every_secret_equally(threshold: int) -> None:
    holders = 6
    shares = split(SECRETS[3], threshold, holders, secrets.token_bytes)
    for some in combinations(range(1, holders + 1), threshold - 1):
        seen = {x: int.from_bytes(shares[x - 1], "big") for x in some}
        for other in (*SECRETS, secrets.token_bytes(32)):
            points = {0: int.from_bytes(other, "big")} | seen
            constant, *rising = interpolated(points)
            assert constant == points[0]
            dealt = split(other, threshold, holders, feeding(rising[::-1]))
            assert some_of(dealt, some) == some_of(shares, some)
            assert combine(numbered(dealt)) == other


@pytest.mark.parametrize("threshold", range(2, 7))
def test_fewer_shares_than_the_threshold_do_not_combine_to_the_secret(threshold: int) -> None:
    shares = split(SECRETS[3], threshold, 6, secrets.token_bytes)
    for some in combinations(range(1, 7), threshold - 1):
        assert outcome(some_of(shares, some)) != SECRETS[3]


def outcome(shares: dict[int, bytes]) -> bytes:
    """What shares combine to; nothing if that is no secret."""
    try:
        return combine(shares)
    except ValueError:
        return b""


def test_a_wrong_share_never_gives_the_secret() -> None:
    shares = split(SECRETS[3], 3, 5, secrets.token_bytes)
    for holder in range(1, 4):
        for bit in range(521):
            value = int.from_bytes(shares[holder - 1], "big") ^ 1 << bit
            some = some_of(shares, (1, 2, 3)) | {holder: value.to_bytes(SHARE_BYTES, "big")}
            assert outcome(some) != SECRETS[3]


def test_shares_of_another_holder_or_secret_never_give_the_secret() -> None:
    shares = split(SECRETS[3], 3, 5, secrets.token_bytes)
    others = split(SECRETS[2], 3, 5, secrets.token_bytes)
    assert outcome({1: shares[1], 2: shares[0], 3: shares[2]}) != SECRETS[3]
    assert outcome({1: shares[0], 2: shares[1], 3: others[2]}) not in SECRETS


def test_shares_of_two_splits_of_one_secret_have_nothing_in_common() -> None:
    one, other = (split(SECRETS[0], 2, 4, secrets.token_bytes) for _ in range(2))
    assert not set(one) & set(other)


@pytest.mark.parametrize(
    ("secret", "threshold", "holders"),
    [(bytes(31), 2, 3), (bytes(33), 2, 3), (b"", 2, 3), (bytes(32), 0, 3), (bytes(32), 4, 3)],
)
def test_no_secret_is_split_that_could_not_be_combined(
    secret: bytes, threshold: int, holders: int
) -> None:
    with pytest.raises(ValueError, match="32 bytes, a threshold lies between 1 and the holders"):
        split(secret, threshold, holders, secrets.token_bytes)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {1: b""},
        {1: bytes(65)},
        {1: bytes(67)},
        {1: bytes(66), 2: bytes(65)},
        {0: bytes(66)},
        {-1: bytes(66)},
        {1: PRIME.to_bytes(66, "big")},
        {1: (PRIME + 1).to_bytes(66, "big")},
        {1: b"\xff" * 66},
    ],
)
def test_what_is_no_share_is_refused(wrong: dict[int, bytes]) -> None:
    with pytest.raises(ValueError, match="not a field element of 66 bytes"):
        combine(wrong)


def test_shares_of_something_longer_than_a_secret_do_not_belong_together() -> None:
    for value in (1 << 8 * SECRET_BYTES, PRIME - 1):
        with pytest.raises(ValueError, match="do not belong together"):
            combine({1: value.to_bytes(SHARE_BYTES, "big")})
    assert combine({1: ((1 << 256) - 1).to_bytes(SHARE_BYTES, "big")}) == b"\xff" * 32


def test_coefficients_are_drawn_from_the_whole_field_and_from_nothing_else() -> None:
    drawn = iter([b"\xff" * 66, PRIME.to_bytes(66, "big"), b"\xfe" + bytes(65), bytes(66)])
    with_zero = split(SECRETS[3], 2, 3, lambda size: next(drawn))
    assert [int.from_bytes(share, "big") for share in with_zero] == 3 * [
        int.from_bytes(SECRETS[3], "big")
    ]
    assert next(drawn) == bytes(66)
    largest = split(bytes(32), 2, 3, feeding([PRIME - 1]))
    assert [PRIME - int.from_bytes(share, "big") for share in largest] == [1, 2, 3]
