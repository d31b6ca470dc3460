"""Thousands of wrong messages for each phase: the right error, in the right name, or no harm.

Every example takes the state machine as it stood in an honest session and gives it one message with
one random change. ``FUZZ_EXAMPLES`` says how many there are of each kind of message::

    FUZZ_EXAMPLES=20000 python -m pytest tests/unit/secagg/test_fuzz.py
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pytest
from mutations import mutated
from parties import (
    NAMES,
    STEPS,
    Parties,
    QuickIdentity,
    accept,
    copied,
    facts_for,
    refused,
    signed_header,
    signed_keys,
    vector_of,
)

from fedgestalt.errors import FedgestaltError, PeerError, PlanError, ServerError
from fedgestalt.messages import Message, from_server, from_site
from fedgestalt.secagg import (
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    Recipient,
    ShareDelivery,
    ShareOffer,
    Survivors,
    UnmaskShares,
    Words,
    binding,
)

EXAMPLES: Final = int(os.environ.get("FUZZ_EXAMPLES", "20000"))
A, B, C = NAMES[:3]


@functools.cache
def honest() -> tuple[dict[Callable[..., None], Parties], dict[type[Message], dict[str, Any]]]:
    """A session before each step, and the fields of the second site's messages."""
    parties = Parties(facts_for(3, 2, recipient=Recipient.SITES), identity=QuickIdentity)
    direct, sent = parties.wire, {}

    def wire(kind: type[Message], site: str, fields: dict[str, Any]) -> object:
        if site == B:
            sent[kind] = fields
        return fields

    states = {}
    for step in STEPS:
        parties.wire = direct
        states[step] = parties.copy()
        if step is Parties.endorse:
            states[step].server.close()
        parties.wire = wire
        step(parties)
    return states, sent


def examples(
    kind: type[Message],
) -> tuple[Parties, dict[str, Any], Callable[[], object]]:
    """The parties before a kind of message, its fields, and a source of wrong ones."""
    states, sent = honest()
    step = {
        KeyOffer: Parties.offer_keys,
        KeyList: Parties.share,
        ShareOffer: Parties.share,
        ShareDelivery: Parties.receive,
        Survivors: Parties.endorse,
        Endorsement: Parties.endorse,
        Endorsements: Parties.unmask,
        UnmaskShares: Parties.unmask,
    }[kind]
    chance = random.Random(kind.schema)  # noqa: S311  not for secrets
    others = [fields for other, fields in sent.items() if other is not kind]
    return states[step].copy(), sent[kind], lambda: mutated(chance, sent[kind], others)


def tally(kind: type[Message], refuses: Callable[[object], str]) -> Counter[str]:
    """Try wrong messages until there have been enough; counts what came of them.

    A change that decodes to the same message is none, and does not count.
    """
    _, fields, wrong = examples(kind)
    right = kind.from_fields(fields, from_server)
    seen: Counter[str] = Counter()
    while seen.total() < EXAMPLES:
        came = wrong()
        try:
            if kind.from_fields(came, from_server) == right:
                continue
        except ServerError:
            pass
        seen[refuses(came)] += 1
    return seen


@pytest.mark.parametrize("kind", [KeyOffer, ShareOffer, Endorsement, UnmaskShares])
def test_the_server_refuses_every_wrong_message_in_its_senders_name(kind: type[Message]) -> None:
    parties, fields, _ = examples(kind)
    if kind is KeyOffer:
        parties.up(A, parties.sites[A].offer_keys())

    def refuses(came: object) -> str:
        server = copied(parties.server)
        with pytest.raises(PeerError) as caught:
            accept(server, B, kind.from_fields(came, from_site(B)))
        assert type(caught.value) is PeerError
        assert caught.value.site == B
        assert str(caught.value).startswith("site 'site-01': ")
        return _words(caught.value)

    seen = tally(kind, refuses)
    assert seen.total() == EXAMPLES
    assert len(seen) >= 5
    accept(copied(parties.server), B, kind.from_fields(fields, from_site(B)))


def _words(error: FedgestaltError) -> str:
    """A sentence without what differs from case to case."""
    return " ".join(word for word in error.what.split() if word.isalpha())


@pytest.mark.parametrize("kind", [KeyList, ShareDelivery, Survivors, Endorsements])
def test_a_site_refuses_every_wrong_message_in_the_servers_name(kind: type[Message]) -> None:
    parties, fields, _ = examples(kind)
    does = {KeyList: "share", ShareDelivery: "receive", Survivors: "endorse"}.get(kind, "unmask")
    harmless = {
        Survivors: functools.partial(_is_not_counted, parties),
        Endorsements: functools.partial(_opens_the_same, parties, fields),
    }

    def refuses(came: object) -> str:
        session = copied(parties.sites[B])
        try:
            message = kind.from_fields(came, from_server)
            done = getattr(session, does)(message)
        except ServerError as error:
            assert str(error).startswith(("site-01: ", "server: "))  # noqa: PT017  or no harm
            return _words(error)
        harmless[kind](message, done)
        return "harmless"

    seen = tally(kind, refuses)
    assert seen.total() == EXAMPLES
    assert len(seen) >= 5
    assert (seen["harmless"] > 0) is (kind in harmless)


def _is_not_counted(parties: Parties, shown: Survivors, endorsement: Endorsement) -> None:
    """What a site signed that saw other survivors is no signature on the real ones."""
    assert B in shown.sites
    assert set(shown.sites) < {A, B, C}
    with pytest.raises(PeerError):
        copied(parties.server).accept_endorsement(B, endorsement)


def _opens_the_same(
    parties: Parties, right: dict[str, Any], shown: Endorsements, given: UnmaskShares
) -> None:
    """Fewer signatures than came are still enough, for the same survivors and the same shares."""
    assert shown.sites == (A, B, C)
    assert len(shown.signatures) >= 2
    assert shown.signatures.items() <= right["signatures"].items()
    assert given == copied(parties.sites[B]).unmask(parties.server.endorsements())


def test_a_wrong_vector_is_refused_or_leaves_the_sum_closed_or_is_right() -> None:
    states, _ = honest()
    chance, seen = random.Random(0), Counter[str]()  # noqa: S311  not for secrets
    words = states[Parties.upload].masked[B]
    early, ready = states[Parties.upload].server, states[Parties.unmask].copy()
    ready.unmask()
    exact = copied(ready.server).total()
    for _ in range(EXAMPLES):
        vector, size = _wrong_vector(chance, words)
        if size != words.size:
            server = copied(early)
            with pytest.raises(PeerError, match="its vector has") as refused:
                server.accept_vector(B, vector_of(words), size)
            assert refused.value.site == B
            assert not server.arrived
            seen["size"] += 1
            continue
        server = copied(ready.server)
        server._vectors[B] = lambda first, end, vector=vector: vector
        try:
            total = server.total()
        except ServerError as error:
            assert "the vector of site 'site-01' does not have" in str(error)  # noqa: PT017
            with pytest.raises(ServerError, match="opened before"):
                server.total()
            seen["words"] += 1
        else:  # as many words, so nobody can tell: the sum holds what came
            assert np.array_equal(total, exact + vector - words)
            seen["taken"] += 1
    assert seen.total() == EXAMPLES
    assert min(seen.values()) > EXAMPLES / 50


def _wrong_vector(chance: random.Random, words: Words) -> tuple[Any, int]:
    at, by = chance.randrange(words.size), chance.randrange(1, 40)
    match chance.randrange(8):
        case 0:
            sizes = (0, -1, words.size - 1, words.size + 1, 2**62, 80 + chance.randrange(200))
            return words, chance.choice(sizes)
        case 1:
            return words[:-by], words.size
        case 2:
            return np.concatenate([words, words[:by]]), words.size
        case 3:
            return np.delete(words, at), words.size
        case 4:
            kind = chance.choice(("<i4", ">u4", "<u8", "<i8", "u1"))
            return words.astype(kind), words.size
        case 5:
            return words.reshape(chance.choice(((1, -1), (-1, 1), (1, 1, -1)))), words.size
        case 6:
            return words.view(np.uint8), words.size
        case _:
            other = words.copy()
            other[at] ^= np.uint32(1 << chance.randrange(32))
            return other, words.size


# --- lies under one's own signature --------------------------------------------------------------


@pytest.mark.parametrize("lost", [False, True], ids=["survives", "is lost"])
@pytest.mark.parametrize("kind", [KeyOffer, ShareOffer])
def test_a_site_that_signs_what_is_wrong_is_named_or_harms_nobody(
    kind: type[Message], lost: bool
) -> None:
    states, _ = honest()
    chance, seen = random.Random(f"{kind.schema} {lost}"), Counter[str]()  # noqa: S311
    while seen.total() < max(100, EXAMPLES // 100):
        parties = states[Parties.offer_keys if kind is KeyOffer else Parties.share].copy()
        try:
            if kind is KeyOffer:
                _offer_wrong_keys(chance, parties)
                parties.share()
            else:
                _deal_wrong_shares(chance, parties)
            total, survivors = _sum_with_liar(parties, lost)
        except PeerError as error:
            assert error.site == B  # noqa: PT017  the others' right sum is right as well
            seen[_words(error)] += 1
            continue
        if np.array_equal(total, parties.sum_of(survivors)):
            seen["harmless"] += 1
            continue
        assert kind is KeyOffer, "a vector masked with other keys than all believe is noise"
        assert B in survivors
        with refused(PlanError, "a site sent a wrong vector"):
            parties.facts.plan.decode(total)
        seen["noise"] += 1
    assert len(seen) >= 2
    assert seen["harmless"] > 0


def _offer_wrong_keys(chance: random.Random, parties: Parties) -> None:
    """The liar takes half of a key from somewhere else, and signs it."""
    parties.offer_keys(without=[B])
    own, donor = parties.sites[B].offer_keys(), parties.sites[chance.choice((A, C))]._offer
    keys = {"mask_key": own.mask_key, "channel_key": own.channel_key}
    which = chance.choice(tuple(keys))
    other = chance.choice((donor.mask_key, donor.channel_key, *keys.values()))
    x25519 = chance.choice((other[:32], chance.randbytes(32), bytes(32)))
    keys[which] = chance.choice((x25519 + keys[which][32:], keys[which][:32] + other[32:]))
    parties.sites[B]._offer = signed_keys(parties, B, **keys)
    parties.up(B, parties.sites[B]._offer)


def _deal_wrong_shares(chance: random.Random, parties: Parties) -> None:
    """The liar changes anything in its shares, and mostly makes its header agree and signs it."""
    parties.share(without=[B])
    fields = parties.sites[B].share(parties.server.key_list()).to_fields()
    came = mutated(chance, fields, [])
    offer = ShareOffer.from_fields(came, from_site(B))
    boxes = {
        site: binding.box_digest(parties.keys, B, site, box) for site, box in offer.boxes.items()
    }
    header = offer.header if chance.random() < 0.1 else replace(offer.header, boxes=boxes)
    parties.sites[B]._header = signed_header(parties, B, header)
    parties.up(B, replace(offer, header=parties.sites[B]._header))


def _sum_with_liar(parties: Parties, lost: bool) -> tuple[Words, list[str]]:
    """Go on to the sum; the liar is in it if it gets that far."""
    gone = [B] if lost else []
    parties.receive(without=[B])
    if not lost:
        try:
            parties.receive(without=[A, C])
        except FedgestaltError:
            gone = [B]
    parties.mask(without=gone)
    parties.upload()
    parties.endorse()
    parties.unmask()
    total, survivors = parties.server.total(), sorted(parties.server.arrived)
    parties.sites[A].unveil(total, survivors)
    return total, survivors
