"""The order of a session: each method once, on both sides, and nothing after a failure."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parties import (
    LENIENT,
    NAMES,
    STEPS,
    Identity,
    Parties,
    QuickIdentity,
    accept,
    copied,
    facts_for,
    plan_for,
    refused,
    vector_of,
)

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.secagg import (
    AES,
    CHACHA20,
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    Recipient,
    ShareOffer,
    SiteSession,
    Survivors,
    UnmaskShares,
    Words,
)

A, B, C = NAMES[:3]
OUT_OF_ORDER = (
    "site-00: a message of the session came twice or out of order; nothing more was sent;"
    " the job must begin a new round."
)

# --- a site --------------------------------------------------------------------------------------

METHODS = ("offer_keys", "share", "receive", "mask", "endorse", "unmask", "unveil")


@functools.cache
def history() -> tuple[list[SiteSession], list[tuple[Any, ...]]]:
    """The first site's session before each of its methods and at the end, and what they are given.

    Whoever uses these must copy them.
    """
    parties = Parties(facts_for(3, recipient=Recipient.SITES), identity=QuickIdentity)
    given: list[tuple[Any, ...]] = []
    states = []
    for method, step in zip(METHODS, STEPS[:4] + STEPS[5:], strict=False):
        states.append(copied(parties.sites[A]))
        given.append(
            {
                "offer_keys": lambda: (),
                "share": lambda: (parties.server.key_list(),),
                "receive": lambda: (parties.server.delivery(A),),
                "mask": lambda: (parties.plain[A],),
                "endorse": lambda: (Survivors(parties.facts.digest, NAMES[:3]),),
                "unmask": lambda: (parties.server.endorsements(),),
            }[method]()
        )
        step(parties)
        if method == "mask":
            parties.upload()
    states.append(copied(parties.sites[A]))
    given.append((parties.server.total(), NAMES[:3]))
    parties.sites[A].unveil(*copied_arrays(given[-1]))
    return [*states, parties.sites[A]], given


def copied_arrays(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.copy() if isinstance(a, np.ndarray) else a for a in arguments)


def call(session: SiteSession, method: str) -> object:
    """Call a method with what it is given in an honest session."""
    return getattr(session, method)(*copied_arrays(history()[1][METHODS.index(method)]))


def reached(done: int) -> SiteSession:
    """The session after its first ``done`` methods."""
    return copied(history()[0][done])


def may_follow(done: int, method: str) -> bool:
    unveils = method == "unveil" and METHODS.index("mask") < done < len(METHODS)
    return unveils or METHODS[done : done + 1] == (method,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", range(len(METHODS) + 1))
def test_a_sites_methods_follow_each_other_in_one_order(done: int, method: str) -> None:
    session = reached(done)
    if may_follow(done, method):
        call(session, method)
        return
    with refused(ServerError, OUT_OF_ORDER):
        call(session, method)


@pytest.mark.parametrize("method", METHODS[:-1])
@pytest.mark.parametrize("done", range(len(METHODS)))
def test_a_site_does_nothing_more_after_a_call_out_of_order(done: int, method: str) -> None:
    session = reached(done)
    if may_follow(done, method):
        return
    with refused(ServerError, OUT_OF_ORDER):
        call(session, method)
    for every in METHODS:
        with refused(ServerError, OUT_OF_ORDER):
            call(session, every)


class Unsteady(Identity):
    """A certificate whose key cannot be used."""

    def sign(self, statement: bytes) -> bytes:
        raise SiteError("the key is gone")


def wrong_keys(session: SiteSession) -> None:
    session.share(KeyList({}))


def wrong_delivery(session: SiteSession) -> None:
    delivery = history()[1][METHODS.index("receive")][0]
    session.receive(replace(delivery, boxes={**delivery.boxes, B: bytes(1300)}))


def read_only(session: SiteSession) -> None:
    words = history()[1][METHODS.index("mask")][0].copy()
    words.flags.writeable = False
    session.mask(words)


def wrong_survivors(session: SiteSession) -> None:
    session.endorse(Survivors(bytes(32), NAMES[:3]))


def wrong_endorsements(session: SiteSession) -> None:
    digest = history()[1][METHODS.index("endorse")][0].session
    session.unmask(Endorsements(digest, NAMES[:3], {}))


def no_signature(session: SiteSession) -> None:
    session._signer = Unsteady(A)
    session.offer_keys()


@pytest.mark.parametrize(
    ("done", "fails"),
    list(
        enumerate(
            [
                no_signature,
                wrong_keys,
                wrong_delivery,
                read_only,
                wrong_survivors,
                wrong_endorsements,
            ]
        )
    ),
    ids=METHODS[:-1],
)
def test_a_site_does_nothing_more_after_a_failure(
    done: int, fails: Callable[[SiteSession], None]
) -> None:
    session = reached(done)
    with pytest.raises((ServerError, SiteError, ValueError)):
        fails(session)
    for method in METHODS:
        with refused(ServerError, OUT_OF_ORDER):
            call(session, method)


def test_a_site_that_signed_no_survivors_unmasks_none() -> None:
    session = reached(METHODS.index("endorse"))
    digest = session._facts.digest
    with refused(ServerError, OUT_OF_ORDER):
        session.unmask(Endorsements(digest, (), {}))


@pytest.mark.parametrize(
    "words", [np.zeros(78, np.uint32), np.zeros((79, 1), np.uint32), np.zeros(79, np.int32)]
)
def test_a_vector_that_does_not_fit_the_plan_costs_nothing(words: Words) -> None:
    session = reached(METHODS.index("mask"))
    with refused(SiteError, "site-00: the vector does not fit the number plan."):
        session.mask(words)
    assert not words.any()
    call(session, "mask")


def test_a_site_forgets_its_secrets_when_it_needs_them_no_more() -> None:
    session = reached(METHODS.index("mask"))
    assert not session._root
    assert not session._seed
    assert not session._kem_secrets
    call(session, "mask")
    assert not session._streams
    session = reached(len(METHODS))
    assert not session._held
    assert not session._common


# --- the server ----------------------------------------------------------------------------------


@functools.cache
def honest() -> tuple[list[Parties], dict[type, Any]]:
    """A session before each of its steps and at its end, and what the first site sends in it."""
    sent: dict[type, Any] = {}
    parties = Parties(facts_for(3, 2), identity=QuickIdentity)

    def wire(kind: type, site: str, fields: dict[str, Any]) -> object:
        if site == A:
            sent[kind] = kind.from_fields(fields, ServerError)
        return fields

    parties.wire, direct = wire, parties.wire
    states = [parties.copy()]
    for step in STEPS:
        step(parties)
        states.append(parties.copy())
    for state in states:
        state.wire = direct
    return states, sent


def before(step: Callable[..., None]) -> Parties:
    return honest()[0][STEPS.index(step)].copy()


def calls(parties: Parties) -> dict[str, Callable[[], object]]:
    """Everything that can be asked of the server, as the first site would send it."""
    server, sent = parties.server, honest()[1]
    words = honest()[0][-1].masked[A]
    return {
        **{
            f"accept {kind.__name__}": functools.partial(accept, server, A, sent[kind])
            for kind in (KeyOffer, ShareOffer, Endorsement, UnmaskShares)
        },
        "accept vector": lambda: server.accept_vector(A, vector_of(words), words.size),
        "key_list": server.key_list,
        "delivery": lambda: server.delivery(A),
        "close": server.close,
        "endorsements": server.endorsements,
        "total": server.total,
    }


NO_KEYS, NO_SHARES = "no keys from site-00, site-01, site-02.", "no shares from site-00, site-01, "
SIGNED, SENT = "0 of 3 sites have signed the survivors, 2 are", "0 of 3 sites have sent their sha"
NOT_CLOSED = "it is not among the survivors of this session."
NONE_CAME = "0 of 3 sites have sent their vectors, 2 are needed: the sum stays closed; begin a new"
AGAIN = "it has already sent this message."

EARLY_OR_TWICE: dict[Callable[..., None], dict[str, str]] = {
    Parties.offer_keys: {
        "key_list": NO_KEYS,
        "accept ShareOffer": NO_KEYS,
        "delivery": NO_SHARES,
        "accept vector": NO_SHARES,
        "close": NONE_CAME,
        "accept Endorsement": NOT_CLOSED,
        "endorsements": SIGNED,
        "accept UnmaskShares": NOT_CLOSED,
        "total": SENT,
    },
    Parties.share: {
        "accept KeyOffer": AGAIN,
        "delivery": NO_SHARES,
        "accept vector": NO_SHARES,
        "close": NONE_CAME,
        "accept Endorsement": NOT_CLOSED,
        "endorsements": SIGNED,
        "accept UnmaskShares": NOT_CLOSED,
        "total": SENT,
    },
    Parties.upload: {
        "accept KeyOffer": AGAIN,
        "accept ShareOffer": AGAIN,
        "close": NONE_CAME,
        "accept Endorsement": NOT_CLOSED,
        "endorsements": SIGNED,
        "accept UnmaskShares": NOT_CLOSED,
        "total": SENT,
    },
    Parties.endorse: {
        "accept KeyOffer": AGAIN,
        "accept ShareOffer": AGAIN,
        "accept vector": AGAIN,
        "accept Endorsement": NOT_CLOSED,
        "endorsements": SIGNED,
        "accept UnmaskShares": NOT_CLOSED,
        "total": SENT,
    },
    Parties.unmask: {
        "accept KeyOffer": AGAIN,
        "accept ShareOffer": AGAIN,
        "accept vector": AGAIN,
        "accept Endorsement": AGAIN,
        "total": SENT,
    },
}


def rows() -> Iterator[Any]:
    for step, refusals in EARLY_OR_TWICE.items():
        for what, says in refusals.items():
            yield pytest.param(step, what, says, id=f"{what} before {step.__name__}")


@pytest.mark.parametrize(("step", "what", "says"), list(rows()))
def test_the_server_refuses_what_comes_too_early_or_twice(
    step: Callable[..., None], what: str, says: str
) -> None:
    parties = before(step)
    by_site = says in (AGAIN, NOT_CLOSED)
    kind, culprit = (PeerError, A) if by_site else (ServerError, "")
    with refused(kind, says, by=culprit):
        calls(parties)[what]()
    if what != "close":
        assert np.array_equal(finished(parties, step), parties.sum_of(NAMES[:3]))


def finished(parties: Parties, step: Callable[..., None]) -> Words:
    """Go on to the sum from before a step."""
    for each in STEPS[STEPS.index(step) :]:
        each(parties)
    return parties.server.total()


@pytest.mark.parametrize("step", EARLY_OR_TWICE)
def test_everything_else_is_in_order(step: Callable[..., None]) -> None:
    for what in calls(before(step)).keys() - EARLY_OR_TWICE[step].keys():
        calls(before(step))[what]()


def test_after_the_sum_the_server_takes_nothing_more() -> None:
    parties = honest()[0][-1].copy()
    opened = parties.server.total().copy()
    assert np.array_equal(opened, parties.sum_of(NAMES[:3]))
    for kind in (KeyOffer, ShareOffer, Endorsement, UnmaskShares):
        with refused(PeerError, AGAIN, by=A):
            calls(parties)[f"accept {kind.__name__}"]()
    with refused(PeerError, AGAIN, by=A):
        calls(parties)["accept vector"]()
    for what in ("total", "close"):
        with refused(ServerError, "session: the sum was opened before; begin a new round."):
            calls(parties)[what]()


def test_survivors_stay_who_they_are() -> None:
    parties = before(Parties.endorse)
    assert parties.server.arrived == set(NAMES[:3])
    assert parties.server.close() == parties.server.close()


def test_a_vector_that_comes_after_the_sum_was_closed_is_not_in_it() -> None:
    parties = before(Parties.upload)
    parties.upload(without=[C])
    parties.server.close()
    words = parties.masked[C]
    with refused(PeerError, "site 'site-02': its vector came after the sum was closed.", by=C):
        parties.server.accept_vector(C, vector_of(words), words.size)
    parties.endorse()
    parties.unmask()
    assert np.array_equal(parties.server.total(), parties.sum_of((A, B)))


def test_a_site_that_is_lost_signs_and_opens_nothing() -> None:
    parties = before(Parties.upload)
    parties.upload(without=[A])
    parties.endorse()
    for kind in (Endorsement, UnmaskShares):
        with refused(PeerError, NOT_CLOSED, by=A):
            calls(parties)[f"accept {kind.__name__}"]()


@pytest.mark.parametrize("kind", [KeyOffer, ShareOffer, Endorsement, UnmaskShares])
def test_a_wrong_message_does_not_keep_the_right_one_out(kind: type) -> None:
    step = {
        KeyOffer: Parties.offer_keys,
        ShareOffer: Parties.share,
        Endorsement: Parties.endorse,
        UnmaskShares: Parties.unmask,
    }[kind]
    parties = before(step)
    right = honest()[1][kind]
    if kind is Endorsement:
        parties.server.close()
    with refused(PeerError, "it sees another session", by=A):
        accept(parties.server, A, replace(right, session=bytes(32)))
    accept(parties.server, A, right)


# --- the pieces of a vector ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 78, 80, 2**40])
def test_a_vector_of_another_size_leaves_the_sum_as_it_was(size: int) -> None:
    parties = before(Parties.upload)
    with refused(PeerError, f"its vector has {size} words, the plan 79.", by=A):
        parties.server.accept_vector(A, vector_of(parties.masked[A]), size)
    assert np.array_equal(finished(parties, Parties.upload), parties.sum_of(NAMES[:3]))


def broken_off(first: int, end: int) -> Words:
    raise ConnectionError


VECTORS: dict[str, Callable[[int, int], Any]] = {
    "nothing": lambda first, end: np.zeros(0, np.uint32),
    "too few": lambda first, end: np.ones(end - first - 1, np.uint32),
    "one too many": lambda first, end: np.ones(end - first + 1, np.uint32),
    "signed": lambda first, end: np.ones(end - first, np.int32),
    "floats": lambda first, end: np.ones(end - first, np.float32),
    "of the other byte order": lambda first, end: np.ones(
        end - first, np.dtype(np.uint32).newbyteorder()
    ),
    "of two axes": lambda first, end: np.ones((1, end - first), np.uint32),
    "standing": lambda first, end: np.ones((end - first, 1), np.uint32),
    "a number": lambda first, end: np.ones((), np.uint32),
    "broken off": broken_off,
}


@pytest.mark.parametrize("vector", VECTORS)
def test_a_vector_that_cannot_be_read_any_more_leaves_the_sum_closed(vector: str) -> None:
    parties = before(Parties.upload)
    parties.upload(without=[B])
    parties.server.accept_vector(B, VECTORS[vector], 79)
    parties.endorse()
    parties.unmask()
    with pytest.raises((ServerError, ConnectionError)) as caught:
        parties.server.total()
    says = (
        "session: the vector of site 'site-01' does not have its words 0 to 79; begin a new round."
    )
    assert str(caught.value) in (says, "")
    for again in (parties.server.close, parties.server.total):
        with refused(ServerError, "session: the sum was opened before; begin a new round."):
            again()


def test_of_a_vector_nothing_is_read_before_the_sum_is_opened() -> None:
    parties = before(Parties.upload)
    asked = []

    def vector(first: int, end: int) -> Words:
        asked.append((first, end))
        return parties.masked[B][first:end]

    parties.upload(without=[B])
    parties.server.accept_vector(B, vector, 79)
    parties.endorse()
    parties.unmask()
    assert not asked
    assert np.array_equal(parties.server.total(), parties.sum_of(NAMES[:3]))
    assert asked == [(0, 79)]


# --- what all agree on ---------------------------------------------------------------------------


def test_all_parties_agree_on_one_digest_of_what_was_said() -> None:
    parties = honest()[0][-1]
    assert len(parties.server.agreement) == 32
    assert {session.agreement for session in parties.sites.values()} == {parties.server.agreement}


def test_facts_that_differ_in_anything_have_different_digests() -> None:
    facts = facts_for(4)
    names = dict(zip(("a", "b", "c", "de"), facts.roster.values(), strict=True))
    others = [
        replace(facts, job="jo"),
        replace(facts, round=2),
        replace(facts, attempt=2),
        replace(facts, round=2, attempt=2),
        replace(facts, model_digest=b"\1" * 32),
        replace(facts, plan=plan_for(4, 80)),
        replace(facts, threshold=4),
        replace(facts, recipient=Recipient.SITES),
        replace(facts, cipher=CHACHA20),
        replace(facts, roster=dict(list(facts.roster.items())[:3])),
        replace(facts, roster={**facts.roster, A: bytes(32)}),
        replace(facts, roster=names),
    ]
    assert len({each.digest for each in (facts, *others)}) == 1 + len(others)
    backwards = dict(reversed(facts.roster.items()))
    assert replace(facts, roster=backwards).digest == facts.digest
    assert facts.cipher == AES


def test_sites_are_numbered_by_their_names() -> None:
    facts = facts_for(("zürich", "bonn", "ulm"))
    assert facts.sites == ("bonn", "ulm", "zürich")
    parties = Parties(facts, policy=LENIENT).until(Parties.endorse)
    parties.endorse()
    parties.unmask()
    assert np.array_equal(parties.server.total(), parties.sum_of(facts.sites))
