"""Attacks beyond the table: degenerate keys, reflections, replays between sites, equivocation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from parties import (
    NAMES,
    Parties,
    deal_with_lies,
    facts_for,
    flipped,
    looks_uniform,
    open_sum,
    plan_for,
    refused,
    signed_header,
    signed_keys,
    some_keys,
    vector_of,
)

from fedgestalt.errors import PeerError, ServerError
from fedgestalt.keys import seal
from fedgestalt.secagg import (
    Endorsements,
    KeyList,
    Recipient,
    ShareDelivery,
    ShareOffer,
    Survivors,
    Words,
    binding,
)

A, B, C, D = NAMES[:4]

# --- degenerate and borrowed keys ----------------------------------------------------------------

SMALL_ORDER = {
    "0": 0,
    "1": 1,
    "of order 8": 325606250916557431795983626356110631294008115727848805560023387167927233504,
    "of order 8 too": 39382357235489614581723060781553021112529911719440698176882885853963445705823,
    "p - 1": 2**255 - 20,
    "p": 2**255 - 19,
    "p + 1": 2**255 - 18,
}
"""Points of the Montgomery curve with which every exchange gives zero (RFC 7748, section 7)."""


@pytest.mark.parametrize("which", ["mask_key", "channel_key"])
@pytest.mark.parametrize("high_bit", [0, 1])
@pytest.mark.parametrize("point", SMALL_ORDER)
def test_points_that_give_no_secret_are_their_signers_fault(
    point: str, high_bit: int, which: str
) -> None:
    x25519 = (SMALL_ORDER[point] | high_bit << 255).to_bytes(32, "little")
    mask_key, channel_key = some_keys()
    keys = {"mask_key": mask_key, "channel_key": channel_key}
    keys |= {which: x25519 + keys[which][32:]}
    parties = Parties(facts_for(3))
    bad = signed_keys(parties, B, **keys)
    says = "site 'site-01': it signed keys that are none."
    with refused(PeerError, says, by=B):
        parties.up(B, bad)
    parties.until(Parties.share)
    with refused(PeerError, says, by=B):
        parties.sites[A].share(KeyList({**parties.server.key_list().offers, B: bad}))


def test_bytes_that_are_no_ml_kem_key_are_their_signers_fault() -> None:
    parties = Parties(facts_for(3)).until(Parties.share)
    mask_key, channel_key = some_keys()
    bad = signed_keys(parties, B, mask_key[:32] + b"\xff" * 1184, channel_key)
    with refused(PeerError, "it signed keys that are none.", by=B):
        Parties(facts_for(3)).up(B, bad)
    with refused(PeerError, "it signed keys that are none.", by=B):
        parties.sites[A].share(KeyList({**parties.server.key_list().offers, B: bad}))


def test_another_sites_keys_are_nobodys_own() -> None:
    parties = Parties(facts_for(3))
    offer = parties.sites[A].offer_keys()
    parties.up(A, offer)
    mask_key, channel_key = some_keys()
    for keys in (
        (offer.mask_key, channel_key),
        (offer.channel_key, channel_key),
        (mask_key, offer.mask_key),
        (mask_key, offer.channel_key),
        (mask_key, mask_key),
    ):
        with refused(PeerError, "site 'site-01': its keys are not its own and distinct.", by=B):
            parties.up(B, signed_keys(parties, B, *keys))


def test_a_site_does_not_take_its_own_keys_for_a_peers() -> None:
    parties = Parties(facts_for(3)).until(Parties.share)
    offers = parties.server.key_list().offers
    own = offers[A]
    for keys in ((own.mask_key, own.channel_key), (own.channel_key, own.mask_key)):
        reflected = signed_keys(parties, B, *keys)
        with refused(ServerError, "site-00: a key occurs twice in the list."):
            parties.copy().sites[A].share(KeyList({**offers, B: reflected}))


# --- boxes and headers of somebody else ----------------------------------------------------------


def test_a_site_does_not_take_its_own_box_for_a_peers() -> None:
    parties = Parties(facts_for(3)).until(Parties.receive)
    delivery, own = parties.server.delivery(B), parties.server._boxes[B]
    boxes = {**delivery.boxes, A: own[A] + bytes(1088)}
    with refused(ServerError, "site-01: the box of site 'site-00' is not the one that it signed."):
        parties.sites[B].receive(replace(delivery, boxes=boxes))


def test_a_header_of_another_site_does_not_carry_the_right_signature() -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offers = {site: parties.sites[site].share(parties.server.key_list()) for site in (A, B)}
    with refused(PeerError, "its share header does not speak of the sites of the roster.", by=B):
        parties.up(B, offers[A])
    roster = replace(offers[A].header, boxes=offers[B].header.boxes)
    stolen = replace(roster, pair_secrets=offers[B].header.pair_secrets)
    with refused(PeerError, "its signature is wrong.", by=B):
        parties.up(B, replace(offers[A], header=stolen))


def rebox(parties: Parties, offer: ShareOffer, sender: str, box: bytes) -> ShareOffer:
    """The sender puts another box for the first site under its own signature."""
    digest = binding.box_digest(parties.keys, sender, A, box)
    header = signed_header(parties, sender, offer.header, boxes={**offer.header.boxes, A: digest})
    return replace(offer, header=header, boxes={**offer.boxes, A: box})


@pytest.mark.parametrize("of", ["an earlier session", "another sender", "another receiver"])
def test_a_box_that_was_sealed_for_something_else_cannot_be_opened(of: str) -> None:
    earlier = Parties(facts_for(4)).until(Parties.receive)
    parties = Parties(facts_for(4, round=2)).until(Parties.share)
    for site in (A, B, D):
        parties.up(site, parties.sites[site].share(parties.server.key_list()))
    offer = parties.sites[C].share(parties.server.key_list())
    box = {
        "an earlier session": earlier.server.delivery(A).boxes[C],
        "another sender": parties.server._boxes[B][A],
        "another receiver": offer.boxes[B],
    }[of]
    parties.up(C, rebox(parties, offer, C, box))
    with refused(PeerError, "site 'site-02': its box cannot be opened.", by=C):
        parties.sites[A].receive(parties.server.delivery(A))


def test_an_altered_box_that_its_sender_signs_cannot_be_opened() -> None:
    for position in (0, 1087, 1088, 1200, -1):
        parties = Parties(facts_for(3)).until(Parties.share)
        offer = parties.sites[C].share(parties.server.key_list())
        parties.up(C, rebox(parties, offer, C, flipped(offer.boxes[A], position % 1236)))
        parties.share(without=[C])
        with refused(PeerError, "site 'site-02': its box cannot be opened.", by=C):
            parties.sites[A].receive(parties.server.delivery(A))


@pytest.mark.parametrize(
    "makes", [lambda plain: plain[:-1], lambda plain: plain[:66], lambda plain: plain + bytes(32)]
)
def test_a_box_with_more_or_less_than_two_shares_cannot_be_opened(
    makes: Callable[[bytes], bytes],
) -> None:
    """Even where the server lets it pass."""
    parties = Parties(facts_for(3)).until(Parties.share)
    offers = {
        A: parties.sites[A].share(parties.server.key_list()),
        B: deal_with_lies(
            parties, B, seal=lambda key, plain, context: seal(key, makes(plain), context)
        ),
        C: parties.sites[C].share(parties.server.key_list()),
    }
    headers = {site: offer.header for site, offer in offers.items()}
    boxes = {site: offers[site].boxes[A] for site in (B, C)}
    with refused(PeerError, "site 'site-01': its box cannot be opened.", by=B):
        parties.sites[A].receive(ShareDelivery(headers, boxes))


# --- signatures and shares of somebody else ------------------------------------------------------


def test_a_signature_counts_for_its_signer_only() -> None:
    parties = Parties(facts_for(4)).until(Parties.endorse)
    survivors = parties.server.close()
    of_a, of_b = (parties.sites[site].endorse(survivors) for site in (A, B))
    with refused(PeerError, "site 'site-01': its signature is wrong.", by=B):
        parties.up(B, of_a)
    twice = {A: of_a.signature, B: of_b.signature, C: of_b.signature}
    says = (
        "site-00: the signature of site 'site-02' is not for the survivors that this site signed;"
    )
    with refused(ServerError, says):
        parties.sites[A].unmask(Endorsements(survivors.session, survivors.sites, twice))


def test_signatures_of_sites_that_are_lost_or_unknown_do_not_count() -> None:
    start = Parties(facts_for(4)).until(Parties.upload)
    start.upload(without=[D])
    start.endorse()
    endorsements = start.server.endorsements()
    for stranger in (D, "site-99"):
        signatures = {**endorsements.signatures, stranger: bytes(64)}
        del signatures[C]
        with refused(ServerError, "site-00: a signature is not of a survivor."):
            start.copy().sites[A].unmask(replace(endorsements, signatures=signatures))


def test_shares_of_another_site_are_wrong_ones() -> None:
    parties = Parties(facts_for(4)).until(Parties.unmask)
    of_a = parties.sites[A].unmask(parties.server.endorsements())
    with refused(PeerError, "is a wrong one.", by=B):
        parties.up(B, of_a)
    parties.up(A, of_a)
    parties.unmask(without=[A])
    assert np.array_equal(parties.server.total(), parties.sum_of(NAMES[:4]))


# --- equivocation --------------------------------------------------------------------------------


def test_a_first_site_that_deals_two_common_secrets_is_named() -> None:
    parties = Parties(facts_for(4, recipient=Recipient.SITES)).until(Parties.share)
    dealt: list[bytes] = []

    def seal_two(key: bytes, plain: bytes, context: bytes) -> bytes:
        dealt.append(plain)
        return seal(key, flipped(plain, 140) if len(dealt) == 2 else plain, context)

    parties.up(A, deal_with_lies(parties, A, seal=seal_two))
    parties.share(without=[A])
    says = "site 'site-00': its common secret is not the one that it committed to."
    with refused(PeerError, says, by=A):
        parties.sites[C].receive(parties.server.delivery(C))
    parties.sites[B].receive(parties.server.delivery(B))


def test_sites_that_saw_two_headers_of_one_dealer_do_not_open_a_sum_together() -> None:
    parties = Parties(facts_for(4)).until(Parties.receive)
    honest = parties.server.delivery(A).headers[D]
    other = signed_header(parties, D, honest, seed_commitment=bytes(32))
    for site in (A, B, C):
        delivery = parties.server.delivery(site)
        shown = other if site == A else honest
        headers = {**delivery.headers, D: shown}
        parties.sites[site].receive(replace(delivery, headers=headers))
    parties.sites[D].receive(parties.server.delivery(D))
    parties.mask()
    parties.upload()
    survivors = parties.server.close()
    signatures = {s: parties.sites[s].endorse(survivors).signature for s in survivors.sites}
    endorsements = Endorsements(survivors.session, survivors.sites, signatures)
    with refused(ServerError, "site-01: the signature of site 'site-00' is not for the survivors"):
        parties.sites[B].unmask(endorsements)
    with refused(ServerError, "site-00: the signature of site 'site-01' is not for the survivors"):
        parties.sites[A].unmask(endorsements)


def test_survivors_that_never_sent_a_vector_leave_a_masked_sum() -> None:
    facts = facts_for(4, plan=plan_for(4, 20_000))
    parties = Parties(facts).until(Parties.upload)
    parties.upload(without=[D])
    words = np.zeros_like(parties.masked[D])
    parties.server.accept_vector(D, vector_of(words), words.size)
    parties.endorse()
    parties.unmask()
    total = parties.server.total()
    assert looks_uniform(total)
    for sites in (NAMES[:3], NAMES[:4]):
        assert (total == parties.sum_of(sites)).mean() < 0.001


# --- one update, one session, one vector ---------------------------------------------------------


def test_a_session_masks_one_vector() -> None:
    parties = Parties(facts_for(3)).until(Parties.upload)
    again = parties.plain[A].copy()
    with refused(ServerError, "site-00: a message of the session came twice or out of order;"):
        parties.sites[A].mask(again)
    assert np.array_equal(again, parties.plain[A])


def test_the_same_update_in_two_sessions_has_unrelated_masks() -> None:
    facts = facts_for(3, plan=plan_for(3, 20_000))
    first = Parties(facts).until(Parties.upload)
    second = Parties(replace(facts, attempt=2)).until(Parties.upload)
    alike = Parties(facts).until(Parties.upload)
    for other in (second, alike):
        assert np.array_equal(first.plain[A], other.plain[A])
        assert looks_uniform(first.masked[A] - other.masked[A])
        assert looks_uniform(first.masked[A] + other.masked[A])


# --- the sum that only sites learn ---------------------------------------------------------------


def opened_for_sites() -> tuple[Parties, Words]:
    parties = Parties(facts_for(4, recipient=Recipient.SITES)).until(Parties.upload)
    parties.upload(without=[D])
    parties.endorse()
    parties.unmask()
    return parties, parties.server.total()


@pytest.mark.parametrize("sites", [NAMES[:4], (A, B), (B, C, D), (C, B, A), ()])
def test_a_site_unveils_no_other_sum_than_that_of_the_survivors(sites: tuple[str, ...]) -> None:
    parties, total = opened_for_sites()
    with refused(ServerError, "site-00: the sum is of other sites than this one signed."):
        parties.sites[A].unveil(total.copy(), sites)
    parties.sites[A].unveil(total, NAMES[:3])
    assert np.array_equal(total, parties.sum_of(NAMES[:3]))


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ((A, B), "site-03: 2 sites survive, the threshold is 3."),
        ((A, B, "site-99"), "site-03: the survivors are no subset of the roster."),
        ((A, B, B, C), "site-03: the survivors are no subset of the roster."),
    ],
)
def test_a_site_that_signed_none_unveils_no_impossible_survivors(
    sites: tuple[str, ...], says: str
) -> None:
    parties, total = opened_for_sites()
    with refused(ServerError, says):
        parties.sites[D].unveil(total.copy(), sites)
    parties.sites[D].unveil(total, NAMES[:3])
    assert np.array_equal(total, parties.sum_of(NAMES[:3]))


@pytest.mark.parametrize("bad", [np.zeros(78, np.uint32), np.zeros(79, np.int32)])
def test_a_sum_that_does_not_fit_the_plan_is_not_unveiled(bad: Any) -> None:
    parties, _ = opened_for_sites()
    with refused(ServerError, "site-00: the sum does not fit the number plan."):
        parties.sites[A].unveil(bad, NAMES[:3])


def test_a_sum_is_unveiled_once() -> None:
    parties, total = opened_for_sites()
    parties.sites[A].unveil(total, NAMES[:3])
    with refused(ServerError, "site-00: a message of the session came twice or out of order;"):
        parties.sites[A].unveil(total, NAMES[:3])


def test_where_the_server_learns_the_sum_nothing_is_unveiled() -> None:
    opened = open_sum(Parties(facts_for(3)).until(Parties.receive))
    total = opened.total.copy()
    with refused(ServerError, "came twice or out of order"):
        opened.parties.sites[A].unveil(total, NAMES[:3])
    assert opened.is_exact


def test_a_survivors_message_is_bound_to_its_session() -> None:
    parties = Parties(facts_for(3)).until(Parties.endorse)
    with refused(ServerError, "site-00: the survivors are those of another session."):
        parties.sites[A].endorse(Survivors(bytes(32), NAMES[:3]))
