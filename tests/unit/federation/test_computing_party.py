"""A computing party keeps its part of every row, and takes no part that does not fit."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import pytest

from fedgestalt.errors import PeerError
from fedgestalt.federation.matching.galleries import Gallery
from fedgestalt.federation.matching.messages import Handles
from fedgestalt.federation.matching.shares import (
    Delivery,
    Party,
    bundled,
    holdings,
    opened,
    packed,
)
from fedgestalt.hooks import get_registry
from fedgestalt.messages import from_site
from fedgestalt.similarity.labels import SEALED_BYTES, new_handle

STRATEGY = get_registry().matching.get("secret-shared")
PARTIES = range(len(STRATEGY.roles))
SEED = bytes(32)
FAULT = from_site("leuven")


def unit_rows(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def new_handles(count: int) -> Handles:
    content = b"".join(new_handle() for _ in range(count))
    return np.frombuffer(content, np.uint8).reshape(-1, 16)


def deliveries(
    new: np.ndarray, listed: Handles, question: Sequence[bytes] = (b"",) * 3
) -> list[Delivery]:
    rows = [packed(p) for p in STRATEGY.enrol(new, SEED)] if len(new) else [b""] * 3
    upload = secrets.token_bytes(16)
    return [Delivery(upload, listed, r, q) for r, q in zip(rows, question, strict=True)]


class Three:
    """All three parties, and their galleries of rows of one owner."""

    def __init__(self) -> None:
        self.galleries = [Gallery() for _ in PARTIES]

    def take(self, came: Sequence[Delivery], site: str = "leuven") -> None:
        for number in PARTIES:
            Party(STRATEGY, number, self.galleries[number]).take(site, came[number], FAULT)

    def scores(self, query: np.ndarray) -> np.ndarray:
        question = STRATEGY.ask(query, SEED)
        answers = []
        for number in PARTIES:
            listed = self.galleries[number].part("leuven").handles
            party = Party(STRATEGY, number, self.galleries[number])
            part = packed(question.parts[number])
            party.take("leuven", Delivery(bytes(16), listed, b"", part), FAULT)
            answers.append(party.answers(["leuven"], {"leuven": FAULT})["leuven"])
        count = len(self.galleries[0].part("leuven"))
        return opened(STRATEGY, question, [count], answers, FAULT)


def test_rows_of_several_uploads_are_compared_in_their_order() -> None:
    three, rows, names = Three(), unit_rows(6), new_handles(6)
    three.take(deliveries(rows[:3], names[:3]))
    three.take(deliveries(rows[3:5], names[:5]))
    three.take(deliveries(rows[5:], names[[0, 2, 3, 4, 5]]))  # the second row goes
    assert np.abs(three.scores(rows[:2]) - rows[:2] @ rows[[0, 2, 3, 4, 5]].T).max() < 1e-6
    three.take(deliveries(rows[:0], names[[4, 5]]))
    assert np.abs(three.scores(rows[:2]) - rows[:2] @ rows[[4, 5]].T).max() < 1e-6


def test_rows_shared_again_under_the_same_handles_are_compared() -> None:
    three, rows, names = Three(), unit_rows(3), new_handles(3)
    three.take(deliveries(rows, names))
    before = [holdings(gallery) for gallery in three.galleries]
    three.take(deliveries(rows[::-1].copy(), names[::-1].copy()))
    assert np.abs(three.scores(rows[:1]) - rows[:1] @ rows[::-1].T).max() < 1e-6
    after = [holdings(gallery) for gallery in three.galleries]
    assert before[0] == before[1] == before[2] != after[0] == after[1] == after[2]


def test_a_digest_tells_uploads_handles_their_order_and_owners_apart() -> None:
    rows, names = unit_rows(2), new_handles(2)
    came = deliveries(rows, names)[1]
    others = [
        deliveries(rows, names)[1],  # another upload of the same rows
        Delivery(came.upload, names[::-1].copy(), came.rows, b""),
        Delivery(came.upload, new_handles(2), came.rows, b""),
    ]
    seen = set()
    for some in (came, *others):
        gallery = Gallery()
        Party(STRATEGY, 1, gallery).take("leuven", some, FAULT)
        seen.add(holdings(gallery)["leuven"])
    gallery = Gallery()
    Party(STRATEGY, 1, gallery).take("ulm", came, FAULT)
    seen.add(holdings(gallery)["ulm"])
    assert len(seen) == 5


def test_new_shares_that_do_not_complete_those_that_are_held_are_refused() -> None:
    gallery, rows, names = Gallery(), unit_rows(3), new_handles(3)
    party = Party(STRATEGY, 1, gallery)
    party.take("leuven", deliveries(rows[:2], names[:2])[1], FAULT)
    for listed in (names[[1, 0, 2]], new_handles(3)):
        with pytest.raises(PeerError, match="do not complete those that are held"):
            Party(STRATEGY, 1, gallery).take("leuven", deliveries(rows[2:], listed)[1], FAULT)


def test_more_shares_than_are_listed_are_refused() -> None:
    came = deliveries(unit_rows(3), new_handles(2))[1]
    with pytest.raises(PeerError, match="sent shares of 3 rows and lists 2"):
        Party(STRATEGY, 1, Gallery()).take("leuven", came, FAULT)


def test_labels_of_other_rows_than_the_shares_are_refused_and_nothing_is_kept() -> None:
    gallery, rows, names = Gallery(), unit_rows(3), new_handles(3)
    came, labels = deliveries(rows, names)[0], np.zeros((2, SEALED_BYTES), np.uint8)
    with pytest.raises(PeerError, match="shares of 3 rows and labels of 2"):
        Party(STRATEGY, 0, gallery).take("leuven", came, FAULT, labels)
    assert not gallery.sites


def test_a_part_of_another_party_is_refused() -> None:
    came = deliveries(unit_rows(2), new_handles(2))[0]
    with pytest.raises(PeerError, match="not what computing party 1 gets"):
        Party(STRATEGY, 1, Gallery()).take("leuven", came, FAULT)


def test_a_delivery_survives_its_way() -> None:
    came = deliveries(unit_rows(2), new_handles(2), (b"", b"question", b""))[1]
    back = Delivery.unpacked(came.packed(), FAULT)
    assert (back.upload, back.rows, back.question) == (came.upload, came.rows, b"question")
    assert np.array_equal(back.listed, came.listed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        bundled((bytes(16), b"", b"")),
        bundled((bytes(15), b"", b"", b"")),
        bundled((bytes(16), bytes(17), b"", b"")),
        bundled((bytes(16), b"", b"", b""))[:-1],
    ],
)
def test_what_is_no_delivery_is_refused(content: bytes) -> None:
    with pytest.raises(PeerError, match=r"not those of rows and a question|cut short"):
        Delivery.unpacked(content, FAULT)
