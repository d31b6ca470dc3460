"""Messages gone wrong: one random change to the fields of a message, anywhere in it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

JUNK: tuple[object, ...] = (
    *(None, True, 0, -1, 2**31, 2**64, 1.5, float("nan"), "", "x", "site-01", b"", b"\0"),
    *(bytes(32), bytes(64), bytearray(32), memoryview(bytes(32)), [], (), {}, set(), range(10**9)),
    *({1: 2}, {b"site-00": b""}, {"site-00": None}, [b""], ("site-00", 1), (("site-00",),)),
    *(np.zeros(3, np.uint32), np.float32(1), np.array(["site-00"]), object(), len, ValueError()),
)
NAMES = ("site-00", "site-01", "site-02", "site-03", "SITE-00", "site-00 ", "sité", "x" * 200)
TEXTS = (*NAMES, "", "x" * 201, "a\nb", "\x1b[31m", "\ud800", "fedgestalt.secagg/2", "x" * 100_000)

Place = tuple[dict[Any, Any], Any]
"""A mapping and a key in it."""


def mutated(chance: random.Random, fields: dict[str, Any], others: Sequence[object]) -> object:
    """A copy of a message with one change.

    Args:
        chance: decides where and how.
        fields: of the message.
        others: what may come instead of it, such as other messages.
    """
    if chance.random() < 0.02:
        return chance.choice((*others, *JUNK))
    changed = _copied(fields)
    places = list(_places(changed))
    place = chance.choice(places)
    _change(chance, *place, places)
    return changed


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _places(fields: dict[str, Any]) -> Iterator[Place]:
    for key, value in fields.items():
        yield fields, key
        if isinstance(value, dict):
            yield from _places(value)


def _change(
    chance: random.Random, inside: dict[Any, Any], key: Any, places: Sequence[Place]
) -> None:
    value = inside[key]
    ways: list[Callable[[], object]] = [
        lambda: inside.pop(key),
        lambda: inside.update({key: chance.choice(JUNK)}),
        lambda: inside.update({chance.choice(TEXTS): value}),
        lambda: inside.update({chance.choice((1, None, b"site-00", ("site-00",), "extra")): value}),
        lambda: inside.update({chance.choice(TEXTS): inside.pop(key)}),
        lambda: _swap((inside, key), chance.choice(places)),
    ]
    if isinstance(value, bytes):
        ways += 3 * [lambda: inside.update({key: _other_bytes(chance, value)})]
    elif isinstance(value, str):
        ways += 3 * [lambda: inside.update({key: chance.choice(TEXTS)})]
    elif isinstance(value, dict):
        ways += 2 * [lambda: inside.update({key: _other_mapping(chance, value)})]
    elif isinstance(value, tuple):
        ways += 9 * [lambda: inside.update({key: _other_members(chance, value)})]
    chance.choice(ways)()


def _swap(one: Place, other: Place) -> None:
    if one[1] in one[0] and other[1] in other[0]:
        one[0][one[1]], other[0][other[1]] = other[0][other[1]], one[0][one[1]]


def _other_bytes(chance: random.Random, value: bytes) -> bytes:
    at = chance.randrange(len(value) + 1)
    return chance.choice(
        (
            lambda: (
                value[:at] + bytes([value[at] ^ 1 << chance.randrange(8)]) + value[at + 1 :]
                if at < len(value)
                else value[::-1]
            ),
            lambda: value[:at],
            lambda: value[at:],
            lambda: value + chance.randbytes(chance.choice((1, 16, 32, 1088))),
            lambda: value[:-1],
            lambda: b"",
            lambda: bytes(len(value)),
            lambda: b"\xff" * len(value),
            lambda: chance.randbytes(len(value)),
            lambda: value[at:] + value[:at],
            lambda: bytes(1 << 20) if chance.random() < 0.05 else value * 2,
        )
    )()


def _other_mapping(chance: random.Random, value: dict[Any, Any]) -> dict[Any, Any]:
    some = next(iter(value.values()), b"")
    return chance.choice(
        (
            dict,
            lambda: {f"site-{i:02d}": some for i in range(chance.choice((1, 2, 64, 65, 1000)))},
            lambda: dict.fromkeys(value, some),
            lambda: dict(zip(value, reversed(value.values()), strict=True)),
            lambda: {key: value[key] for key in list(value)[1:]},
            lambda: value | {"site-99": some},
            lambda: {str(key).upper(): inner for key, inner in value.items()},
        )
    )()


def _other_members(chance: random.Random, value: tuple[Any, ...]) -> tuple[Any, ...]:
    at = chance.randrange(len(value)) if value else 0
    return chance.choice(
        (
            lambda: value[:at] + value[at + 1 :],
            lambda: (*value, *value[at : at + 1]),
            lambda: value[::-1],
            lambda: (*value, chance.choice(TEXTS)),
            lambda: (*value[:at], chance.choice(TEXTS), *value[at + 1 :]),
            lambda: (*value[:at], chance.choice(JUNK), *value[at + 1 :]),
            lambda: tuple(chance.sample(NAMES, chance.randrange(len(NAMES)))),
            tuple,
            lambda: value * 5000 if chance.random() < 0.05 else value * 2,
        )
    )()
