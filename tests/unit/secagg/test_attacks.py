"""The table of attacks in the documentation, row by row: who tries what, and what stops it.

A *colluding* server relays what an honest one would refuse; a *lying* site deals what an honest one
would not. Each test names the class, the culprit and the sentence that a person reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from parties import (
    LENIENT,
    NAMES,
    STEPS,
    Parties,
    QuickIdentity,
    accept,
    altering,
    deal_with_lies,
    facts_for,
    fingerprint,
    flipped,
    looks_uniform,
    open_sum,
    pair_streams_of,
    plan_for,
    refused,
    signed_header,
    signed_keys,
    some_keys,
)

from fedgestalt.errors import PeerError, PlanError, ServerError, SiteError
from fedgestalt.keys import PublicKey, seal
from fedgestalt.messages import Message, from_server
from fedgestalt.secagg import (
    CHACHA20,
    Endorsement,
    Endorsements,
    KeyList,
    KeyOffer,
    Recipient,
    ServerSession,
    SessionFacts,
    ShareDelivery,
    ShareOffer,
    SitePolicy,
    SiteSession,
    Survivors,
    ThreatModel,
    UnmaskShares,
    binding,
)
from fedgestalt.secagg.binding import seal_escrow
from fedgestalt.secagg.shamir import SHARE_BYTES, combine, split
from fedgestalt.secagg.stream import Stream, add_streams

A, B, C, D, E = NAMES[:5]

# --- swapped public keys -------------------------------------------------------------------------


def test_swapped_keys_do_not_carry_the_sites_signature() -> None:
    def swap(fields: dict[str, Any]) -> object:
        offers = fields["offers"]
        return fields | {"offers": offers | {B: offers[C], C: offers[B]}}

    parties = Parties(facts_for(4), wire=altering(KeyList, A, swap))
    with refused(
        ServerError,
        "site-00: the keys of site 'site-01' do not carry its signature for this session; somebody"
        " between the sites altered it, or sees another job.",
    ):
        parties.until(Parties.receive)


def test_keys_that_the_server_made_do_not_carry_the_sites_signature() -> None:
    def put_in(fields: dict[str, Any]) -> object:
        mask_key, channel_key = some_keys()
        offer = fields["offers"][B] | {"mask_key": mask_key, "channel_key": channel_key}
        return fields | {"offers": fields["offers"] | {B: offer}}

    parties = Parties(facts_for(4), wire=altering(KeyList, A, put_in))
    with refused(ServerError, "the keys of site 'site-01' do not carry its signature"):
        parties.until(Parties.receive)


def test_a_site_knows_its_own_keys_again() -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offers = {**parties.server.key_list().offers, A: signed_keys(parties, A, *some_keys())}
    with refused(ServerError, "site-00: this site's own keys came back altered."):
        parties.sites[A].share(KeyList(offers))


def test_keys_that_their_sender_did_not_sign_are_its_own_fault() -> None:
    parties = Parties(
        facts_for(4), wire=altering(KeyOffer, B, lambda fields: fields | {"mask_key": bytes(1216)})
    )
    with refused(PeerError, "site 'site-01': its signature is wrong.", by=B):
        parties.offer_keys()


@pytest.mark.parametrize("sites", [NAMES[:3], NAMES[:5], NAMES[1:5], ()])
def test_a_list_of_more_or_fewer_keys_than_the_rosters_is_refused(sites: tuple[str, ...]) -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offers = parties.server.key_list().offers
    came = KeyList({site: offers.get(site, offers[B]) for site in sites})
    with refused(ServerError, "site-00: the keys are not those of the agreed roster."):
        parties.sites[A].share(came)


# --- a different model, roster, plan or threshold for some sites ---------------------------------

OTHERWISE: dict[str, dict[str, Any]] = {
    "job": {"job": "another"},
    "round": {"round": 2},
    "attempt": {"attempt": 2},
    "model": {"model_digest": b"\1" * 32},
    "plan": {"plan": replace(plan_for(4), max_weight=101, tensors=(), counts=())},
    "roster": {"roster": {site: fingerprint(2 * site) for site in NAMES[:4]}},
    "threshold": {"threshold": 4},
    "recipient": {"recipient": Recipient.SITES},
    "cipher": {"cipher": CHACHA20},
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_a_site_that_was_told_something_else_cannot_take_part(what: str) -> None:
    facts = facts_for(4)
    parties = Parties(facts, told={B: replace(facts, **OTHERWISE[what])})
    with refused(
        PeerError,
        "site 'site-01': it sees another session (job, round, model, number plan, roster or"
        " threshold differ).",
        by=B,
    ):
        parties.offer_keys()


@pytest.mark.parametrize("what", OTHERWISE)
def test_sites_that_were_told_different_things_refuse_each_others_keys(what: str) -> None:
    facts = facts_for(4)
    parties = Parties(facts, told={B: replace(facts, **OTHERWISE[what])})
    offers = {site: session.offer_keys() for site, session in parties.sites.items()}
    as_if_alike = {site: replace(offer, session=facts.digest) for site, offer in offers.items()}
    with refused(ServerError, "site-00: the keys of site 'site-01' are of another session."):
        parties.sites[A].share(KeyList(offers))
    with refused(ServerError, "the keys of site 'site-01' do not carry its signature for this"):
        parties.sites[C].share(KeyList(as_if_alike))


def server_of(facts: SessionFacts) -> None:
    ServerSession(facts, {site: QuickIdentity(site) for site in facts.roster})


def site_of(facts: SessionFacts) -> None:
    peers = {site: QuickIdentity(site) for site in facts.roster if site != A}
    SiteSession(A, facts, QuickIdentity(A), peers, policy=LENIENT)


both_sides = pytest.mark.parametrize("session_of", [server_of, site_of])
Begins = Callable[[SessionFacts], None]


@both_sides
def test_a_plan_for_another_number_of_sites_is_refused(session_of: Begins) -> None:
    with refused(ServerError, "session: the number plan is for 4 sites, the roster has 5."):
        session_of(facts_for(5, plan=plan_for(4)))


@both_sides
@pytest.mark.parametrize("threshold", [1, 2, 6])
def test_a_threshold_that_two_groups_could_reach_apart_is_refused(
    threshold: int, session_of: Begins
) -> None:
    with refused(ServerError, f"session: a threshold of {threshold} for 5 sites, not 3..5."):
        session_of(facts_for(5, threshold))


def test_a_lower_threshold_than_a_sites_policy_asks_for_is_refused() -> None:
    says = (
        "site-00: 3 of 5 sites could open the sum, this site's policy (malicious) asks for 4;"
        " raise the job's threat_model, or ask the site to change its own."
    )
    with refused(SiteError, says):
        Parties(facts_for(5, 3), policy=SitePolicy())
    Parties(facts_for(5, 4), policy=SitePolicy())


@pytest.mark.parametrize(
    ("policy", "least"), [(SitePolicy(5), 5), (SitePolicy(3, 6), 6), (SitePolicy(7, 4), 7)]
)
def test_fewer_sites_than_a_sites_policy_asks_for_are_refused(
    policy: SitePolicy, least: int
) -> None:
    says = (
        f"site-00: 4 sites take part, this site's policy asks for {least}; wait for more sites:"
        " with fewer, single updates could be told from the sum."
    )
    with refused(SiteError, says):
        Parties(facts_for(4), policy=policy)


@both_sides
def test_an_unknown_cipher_is_refused(session_of: Begins) -> None:
    with refused(ServerError, "session: unknown cipher 'chacha2'; did you mean 'chacha20'?"):
        session_of(facts_for(4, cipher="chacha2"))


@both_sides
def test_a_plan_whose_sum_could_overflow_is_refused(session_of: Begins) -> None:
    plan = replace(plan_for(4), max_weight=2**30, tensors=(), counts=())
    with refused(PlanError, "the sum of the weights: 31 + 2 bits needed, 32 available"):
        session_of(facts_for(4, plan=plan))


# --- an altered box or share ---------------------------------------------------------------------


def test_an_altered_box_is_not_the_one_that_its_sender_signed() -> None:
    def alter(fields: dict[str, Any]) -> object:
        return fields | {"boxes": fields["boxes"] | {B: flipped(fields["boxes"][B], 1100)}}

    parties = Parties(facts_for(4), wire=altering(ShareDelivery, A, alter))
    with refused(ServerError, "site-00: the box of site 'site-01' is not the one that it signed."):
        parties.until(Parties.mask)
    parties = Parties(facts_for(4), wire=altering(ShareOffer, A, alter))
    with refused(PeerError, "its box for site-01 is not the one that it signed.", by=A):
        parties.until(Parties.mask)


def test_a_box_for_another_site_is_not_the_one_that_its_sender_signed() -> None:
    def swap(fields: dict[str, Any]) -> object:
        boxes = fields["boxes"]
        return fields | {"boxes": boxes | {B: boxes[C], C: boxes[B]}}

    parties = Parties(facts_for(4), wire=altering(ShareOffer, A, swap))
    with refused(PeerError, "its box for site-01 is not the one that it signed.", by=A):
        parties.until(Parties.mask)
    parties = Parties(facts_for(4), wire=altering(ShareDelivery, D, swap))
    with refused(ServerError, "site-03: the box of site 'site-01' is not the one that it signed."):
        parties.until(Parties.mask)


@pytest.mark.parametrize("change", [{B: b""}, {"site-99": bytes(1300)}])
def test_more_or_fewer_boxes_than_those_of_the_others_are_refused(change: dict[str, Any]) -> None:
    def wire(fields: dict[str, Any]) -> object:
        boxes = fields["boxes"] | change
        return fields | {"boxes": {site: box for site, box in boxes.items() if box}}

    parties = Parties(facts_for(4), wire=altering(ShareDelivery, A, wire))
    with refused(ServerError, "site-00: the boxes are not those of all other sites."):
        parties.until(Parties.mask)
    parties = Parties(facts_for(4), wire=altering(ShareOffer, A, wire))
    with refused(PeerError, "its boxes are not for all other sites.", by=A):
        parties.until(Parties.mask)


HEADER_FIELDS = ("seed_commitment", "seed_shares", "root_shares", "pair_secrets", "escrow", "boxes")


@pytest.mark.parametrize("field", [*HEADER_FIELDS, "signature"])
def test_an_altered_header_does_not_carry_its_senders_signature(field: str) -> None:
    def altered(header: dict[str, Any]) -> dict[str, Any]:
        value = header[field]
        if isinstance(value, bytes):
            return header | {field: flipped(value)}
        return header | {field: value | {D: flipped(value[D])}}

    def in_delivery(fields: dict[str, Any]) -> object:
        headers = fields["headers"]
        return fields | {"headers": headers | {B: altered(headers[B])}}

    def in_offer(fields: dict[str, Any]) -> object:
        return fields | {"header": altered(fields["header"])}

    parties = Parties(facts_for(4), wire=altering(ShareDelivery, A, in_delivery))
    with refused(
        ServerError,
        "site-00: the share header of site 'site-01' does not carry its signature for these keys;",
    ):
        parties.until(Parties.mask)
    parties = Parties(facts_for(4), wire=altering(ShareOffer, B, in_offer))
    with refused(PeerError, "its signature is wrong.", by=B):
        parties.until(Parties.mask)


def test_the_server_cannot_blame_a_site_for_a_header_that_it_made_up() -> None:
    def shorten(fields: dict[str, Any]) -> object:
        headers = fields["headers"]
        return fields | {"headers": headers | {B: headers[B] | {"boxes": {}}}}

    parties = Parties(facts_for(4), wire=altering(ShareDelivery, A, shorten))
    with refused(ServerError, "the share header of site 'site-01' does not carry its signature"):
        parties.until(Parties.mask)


def test_a_site_knows_its_own_header_again() -> None:
    parties = Parties(facts_for(4)).until(Parties.receive)
    delivery = parties.server.delivery(A)
    header = signed_header(parties, A, delivery.headers[A], seed_commitment=bytes(32))
    with refused(ServerError, "site-00: this site's own share header came back altered."):
        parties.sites[A].receive(replace(delivery, headers={**delivery.headers, A: header}))


@pytest.mark.parametrize("without", [A, B])
def test_headers_of_more_or_fewer_sites_than_the_rosters_are_refused(without: str) -> None:
    parties = Parties(facts_for(4)).until(Parties.receive)
    delivery = parties.server.delivery(A)
    headers = {site: header for site, header in delivery.headers.items() if site != without}
    with refused(ServerError, "site-00: the share headers are not those of the agreed roster."):
        parties.sites[A].receive(replace(delivery, headers=headers))


@pytest.mark.parametrize(
    ("field", "sites"),
    [
        ("seed_shares", NAMES[:3]),
        ("root_shares", NAMES[:5]),
        ("boxes", NAMES[:4]),
        ("pair_secrets", NAMES[1:4]),
        ("common_secret", None),
    ],
)
def test_a_header_that_speaks_of_other_sites_is_its_senders_fault(
    field: str, sites: tuple[str, ...] | None
) -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offer = parties.sites[B].share(parties.server.key_list())
    value = dict.fromkeys(sites, bytes(32)) if sites else bytes(32)
    header = signed_header(parties, B, offer.header, **{field: value})
    says = "site 'site-01': its share header does not speak of the sites of the roster."
    with refused(PeerError, says, by=B):
        parties.up(B, replace(offer, header=header))
    parties.up(B, offer)
    parties.share(without=[B])
    delivery = parties.server.delivery(A)
    with refused(PeerError, says, by=B):
        parties.sites[A].receive(replace(delivery, headers={**delivery.headers, B: header}))


@pytest.mark.parametrize(("position", "what"), [(0, "seed share"), (SHARE_BYTES, "root share")])
def test_an_altered_share_in_a_box_is_its_dealers_fault(position: int, what: str) -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offer = deal_with_lies(
        parties, B, seal=lambda key, plain, context: seal(key, flipped(plain, position), context)
    )
    parties.up(B, offer)
    parties.share(without=[B])
    says = f"site 'site-01': its {what} is not the one that it committed to."
    with refused(PeerError, says, by=B):
        parties.receive(without=[B])


@pytest.mark.parametrize("makes", [lambda plain: plain[:-1], lambda plain: plain + bytes(32)])
def test_a_box_of_another_length_is_its_senders_fault(makes: Callable[[bytes], bytes]) -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offer = deal_with_lies(
        parties, A, seal=lambda key, plain, context: seal(key, makes(plain), context)
    )
    with refused(PeerError, "its box for site-01 has another length.", by=A):
        parties.up(A, offer)


# --- two survivor sets, or unmasking twice -------------------------------------------------------


def uploaded(n: int = 4, threshold: int = 0, **options: Any) -> Parties:
    """A session in which all vectors have arrived."""
    return Parties(facts_for(n, threshold), **options).until(Parties.endorse)


def say(parties: Parties, sites: tuple[str, ...]) -> Survivors:
    return Survivors(parties.facts.digest, sites)


def test_no_site_signs_two_sets_of_survivors() -> None:
    parties = uploaded()
    parties.sites[A].endorse(say(parties, NAMES[:4]))
    with refused(
        ServerError,
        "site-00: a message of the session came twice or out of order; nothing more was sent;"
        " the job must begin a new round.",
    ):
        parties.sites[A].endorse(say(parties, NAMES[:3]))


def test_no_site_signs_the_same_survivors_twice() -> None:
    parties = uploaded()
    parties.sites[A].endorse(say(parties, NAMES[:4]))
    with refused(ServerError, "came twice or out of order"):
        parties.sites[A].endorse(say(parties, NAMES[:4]))


def test_no_site_unmasks_twice() -> None:
    parties = uploaded().until(Parties.unmask)
    endorsements = parties.server.endorsements()
    parties.sites[A].unmask(endorsements)
    with refused(ServerError, "came twice or out of order"):
        parties.sites[A].unmask(endorsements)


def test_no_site_unmasks_another_set_than_it_signed() -> None:
    parties = uploaded().until(Parties.unmask)
    endorsements = replace(parties.server.endorsements(), sites=NAMES[:3])
    with refused(ServerError, "site-00: the survivors are not those that this site signed."):
        parties.sites[A].unmask(endorsements)


def test_of_two_sets_at_most_one_gets_enough_signatures() -> None:
    start = uploaded(identity=QuickIdentity)
    sets = NAMES[:4], (A, B, C)
    for shown in product(range(2), repeat=4):
        parties = start.copy()
        signatures: tuple[dict[str, bytes], ...] = {}, {}
        for site, which in zip(NAMES, shown, strict=False):
            if site in sets[which]:
                signed = parties.sites[site].endorse(say(parties, sets[which]))
                signatures[which][site] = signed.signature
        gave = set()
        for which, sites in enumerate(sets):
            endorsements = Endorsements(parties.facts.digest, sites, signatures[which])
            for site in signatures[which]:
                if len(signatures[which]) >= 3:
                    parties.sites[site].unmask(endorsements)
                    gave.add(which)
                    continue
                says = f"{len(signatures[which])} survivors have signed, the threshold is 3."
                with refused(ServerError, f"{site}: {says}"):
                    parties.sites[site].unmask(endorsements)
        assert len(gave) <= 1


def test_signatures_on_another_set_do_not_count() -> None:
    parties = uploaded()
    signatures = {
        site: parties.sites[site].endorse(say(parties, sites)).signature
        for site, sites in {A: NAMES[:4], B: NAMES[:4], C: (B, C, D), D: (B, C, D)}.items()
    }
    with refused(
        ServerError,
        "site-00: the signature of site 'site-02' is not for the survivors that this site signed;"
        " somebody between the sites altered it, or sees another job.",
    ):
        parties.sites[A].unmask(Endorsements(parties.facts.digest, NAMES[:4], signatures))


@pytest.mark.parametrize(
    ("sites", "says"),
    [
        ((A, B), "site-00: 2 sites survive, the threshold is 3."),
        ((), "site-00: 0 sites survive, the threshold is 3."),
        ((A, B, C, "site-99"), "site-00: the survivors are no subset of the roster."),
        ((A, B, C, C), "site-00: the survivors are no subset of the roster."),
        ((C, B, A), "site-00: the survivors are no subset of the roster."),
        ((B, C, D), "site-00: this site has sent its vector and is not among the survivors."),
    ],
)
def test_survivors_that_cannot_be_right_are_not_signed(sites: tuple[str, ...], says: str) -> None:
    parties = uploaded()
    with refused(ServerError, says):
        parties.sites[A].endorse(say(parties, sites))


def split_view(parties: Parties, target: str, witnesses: tuple[str, str]) -> list[UnmaskShares]:
    """Show two sites two sets, of which one lacks ``target``; everybody else signs both."""
    others = set(NAMES[:4]) - set(witnesses)
    sets = tuple(sorted(others | {target, witnesses[0]})), tuple(sorted(others | {witnesses[1]}))
    given = []
    for witness, sites in zip(witnesses, sets, strict=True):
        signature = parties.sites[witness].endorse(say(parties, sites)).signature
        statement = binding.survivors_statement(parties.server.agreement, sites)
        colluders = others - {target}
        signatures = {site: parties.identities[site].sign(statement) for site in colluders}
        signatures[witness] = signature
        endorsements = Endorsements(parties.facts.digest, sites, signatures)
        given.append(parties.sites[witness].unmask(endorsements))
    return given


def test_one_colluder_of_four_does_not_get_two_sets_signed() -> None:
    parties = uploaded()
    with refused(ServerError, "site-01: 2 survivors have signed, the threshold is 3."):
        split_view(parties, D, (B, C))


def test_two_colluders_of_four_are_more_than_the_threshold_stands() -> None:
    """2 t - n is 2 for n = 4: the limit that the documentation states is the real one."""
    parties = uploaded()
    with_target, without = split_view(parties, B, (B, A))
    colluders = {site: parties.sites[site]._held[B] for site in (C, D)}
    of_seed = {2: with_target.shares[B]} | {3: colluders[C][0], 4: colluders[D][0]}
    of_root = {1: without.shares[B]} | {3: colluders[C][1], 4: colluders[D][1]}
    seed, root = combine(of_seed), combine(of_root)
    words, server = parties.masked[B].copy(), parties.server
    own = Stream(binding.self_stream(seed, server.agreement, B), subtract=True)
    add_streams(words, [own, *pair_streams_of(parties, B, root, (A, C, D))])
    assert np.array_equal(words, parties.plain[B])


@pytest.mark.parametrize("n", range(3, 17))
def test_the_thresholds_stand_as_many_colluders_as_the_documentation_says(n: int) -> None:
    malicious, curious = (model.threshold(n) for model in ThreatModel)
    for threshold in (malicious, curious):
        most = 2 * threshold - n - 1
        smaller_half = [(n - colluders) // 2 for colluders in (most, most + 1)]
        assert smaller_half[0] + most < threshold <= smaller_half[1] + most + 1
    assert 2 * malicious - n - 1 >= n // 3
    assert 2 * curious - n - 1 >= 0


# --- calling an arrived site lost ----------------------------------------------------------------


def test_the_self_mask_of_a_site_that_is_called_lost_stays_on_its_vector() -> None:
    facts = facts_for(4, plan=plan_for(4, 20_000))
    parties = Parties(facts).until(Parties.upload)
    parties.upload(without=[D])
    parties.endorse()
    parties.unmask()
    header, keys = parties.server._headers[D], parties.keys
    for site, shares in parties.server._shares.items():
        share = shares[D]
        told = binding.commitment("root share", keys, D, site, share)
        assert told == header.root_shares[site]
        assert binding.commitment("seed share", keys, D, site, share) != header.seed_shares[site]
    assert np.array_equal(parties.server.total(), parties.sum_of(NAMES[:3]))
    root = combine({i + 1: parties.server._shares[NAMES[i]][D] for i in range(3)})
    words = parties.masked[D].copy()
    add_streams(words, pair_streams_of(parties, D, root, (A, B, C)))
    assert not np.array_equal(words, parties.plain[D])
    assert looks_uniform(words)
    assert not looks_uniform(parties.plain[D])


@pytest.mark.parametrize("count", [3, 4, 5])
def test_no_site_ever_gives_both_shares_of_one_dealer(count: int) -> None:
    start = Parties(facts_for(5, 3), identity=QuickIdentity).until(Parties.endorse)
    for sites in combinations(NAMES[:5], count):
        parties = start.copy()
        held = {site: dict(session._held) for site, session in parties.sites.items()}
        signatures = {s: parties.sites[s].endorse(say(parties, sites)).signature for s in sites}
        endorsements = Endorsements(parties.facts.digest, sites, signatures)
        for site in sites:
            given = parties.sites[site].unmask(endorsements).shares
            assert given == {peer: both[peer not in sites] for peer, both in held[site].items()}
            assert not parties.sites[site]._held


# --- a corrupted share at reconstruction ---------------------------------------------------------


@pytest.mark.parametrize(("dealer", "what"), [(B, "seed share"), (C, "root share")])
def test_a_corrupted_share_names_its_sender_and_the_others_are_enough(
    dealer: str, what: str
) -> None:
    parties = Parties(facts_for(5, 3)).until(Parties.upload)
    parties.upload(without=[C])
    parties.endorse()
    endorsements = parties.server.endorsements()
    unmask = parties.sites[A].unmask(endorsements)
    shares = {**unmask.shares, dealer: flipped(unmask.shares[dealer], 65)}
    says = f"site 'site-00': its {what} of site '{dealer}' is a wrong one."
    with refused(PeerError, says, by=A):
        parties.up(A, replace(unmask, shares=shares))
    parties.unmask(without=[A])
    assert np.array_equal(parties.server.total(), parties.sum_of((A, B, D, E)))


def test_a_share_of_the_other_kind_is_a_corrupted_one() -> None:
    parties = Parties(facts_for(4)).until(Parties.endorse)
    parties.endorse()
    held = parties.sites[A]._held[B]
    unmask = parties.sites[A].unmask(parties.server.endorsements())
    assert unmask.shares[B] == held[0]
    with refused(PeerError, "its seed share of site 'site-01' is a wrong one.", by=A):
        parties.up(A, replace(unmask, shares={**unmask.shares, B: held[1]}))


@pytest.mark.parametrize("change", [{B: b""}, {"site-99": bytes(66)}])
def test_more_or_fewer_shares_than_one_of_each_dealer_are_refused(change: dict[str, bytes]) -> None:
    def wire(fields: dict[str, Any]) -> object:
        shares = fields["shares"] | change
        return fields | {"shares": {site: share for site, share in shares.items() if share}}

    parties = Parties(facts_for(4), wire=altering(UnmaskShares, A, wire)).until(Parties.unmask)
    with refused(PeerError, "its shares are not those of the roster.", by=A):
        parties.unmask()


# --- an inconsistent dealer ----------------------------------------------------------------------


def with_liar(liar: str, lost: bool = False, n: int = 4, **instead: Any) -> Parties:
    """A session with a lying dealer, up to the sum, which must stay closed."""
    parties = Parties(facts_for(n)).until(Parties.share)
    parties.up(liar, deal_with_lies(parties, liar, **instead))
    parties.share(without=[liar])
    parties.receive()
    parties.mask()
    parties.upload(without=[liar] if lost else [])
    parties.endorse()
    parties.unmask()
    return parties


Split = Callable[[bytes, int, int, Any], list[bytes]]


def off_the_polynomial(secret: bytes, threshold: int, holders: int, entropy: Any) -> list[bytes]:
    return [bytes([0]) + entropy(65), *split(secret, threshold, holders, entropy)[1:]]


def beyond_the_field(secret: bytes, threshold: int, holders: int, entropy: Any) -> list[bytes]:
    return [b"\xff" * 66, *split(secret, threshold, holders, entropy)[1:]]


def of_another_secret(secret: bytes, threshold: int, holders: int, entropy: Any) -> list[bytes]:
    return split(flipped(secret), threshold, holders, entropy)


@pytest.mark.parametrize(
    ("lie", "lost", "says"),
    [
        (off_the_polynomial, False, "its shares do not belong together."),
        (off_the_polynomial, True, "its shares do not belong together."),
        (beyond_the_field, False, "its shares do not belong together."),
        (beyond_the_field, True, "its shares do not belong together."),
        (of_another_secret, False, "its shares do not give the self seed it committed to."),
        (of_another_secret, True, "its shares do not give the key that it offered."),
    ],
)
def test_a_dealer_of_shares_that_do_not_fit_is_named(lie: Split, lost: bool, says: str) -> None:
    parties = with_liar(B, lost, split=lie)
    for _ in range(2):
        with refused(PeerError, f"site 'site-01': {says}", by=B):
            parties.server.total()


@pytest.mark.parametrize(
    "escrow",
    [
        lambda root, keys, secrets: seal_escrow(
            root, keys, {site: flipped(secret) for site, secret in secrets.items()}
        ),
        lambda root, keys, secrets: seal_escrow(root, keys, dict(list(secrets.items())[1:])),
        lambda root, keys, secrets: seal_escrow(flipped(root), keys, secrets),
        lambda root, keys, secrets: bytes(16),
    ],
    ids=["of other secrets", "of fewer secrets", "under another key", "empty"],
)
def test_a_lying_escrow_names_its_dealer(escrow: Callable[..., bytes]) -> None:
    parties = with_liar(B, lost=True, binding__seal_escrow=escrow)
    for _ in range(2):
        with refused(PeerError, "site 'site-01': its escrow is not what it committed to.", by=B):
            parties.server.total()


def test_an_escrow_that_nobody_needs_harms_nobody() -> None:
    parties = with_liar(B, binding__seal_escrow=lambda *_: bytes(16))
    assert np.array_equal(parties.server.total(), parties.sum_of(NAMES[:4]))


def deals_a_wrong_pair_secret(parties: Parties, liar: str) -> ShareOffer:
    """The liar commits to other secrets than those behind its ciphertexts for the mask keys."""
    masks = {offer.mask_key for offer in parties.server.key_list().offers.values()}
    encapsulate = PublicKey.encapsulate

    def lie(key: PublicKey) -> tuple[bytes, bytes]:
        secret, ciphertext = encapsulate(key)
        return (flipped(secret) if key.encoded in masks else secret), ciphertext

    return deal_with_lies(parties, liar, PublicKey__encapsulate=lie)


def test_a_wrong_pair_secret_names_its_dealer() -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    parties.up(B, deals_a_wrong_pair_secret(parties, B))
    parties.share(without=[B])
    parties.sites[A].receive(parties.server.delivery(A))
    for later in (C, D):
        with refused(
            PeerError,
            "site 'site-01': its pair secret is not the one that it committed to.",
            by=B,
        ):
            parties.sites[later].receive(parties.server.delivery(later))


def test_a_wrong_pair_secret_with_a_lost_site_names_its_dealer() -> None:
    parties = Parties(facts_for(4)).until(Parties.share)
    offer = deals_a_wrong_pair_secret(parties, C)
    assert offer.header.pair_secrets.keys() == {D}
    parties.up(C, offer)
    parties.share(without=[C])
    parties.receive(without=[D])
    parties.mask(without=[D])
    parties.upload()
    parties.endorse()
    parties.unmask()
    says = "site 'site-02': its pair secret with site-03 is not the one that it committed to."
    for _ in range(2):
        with refused(PeerError, says, by=C):
            parties.server.total()


# --- sybils --------------------------------------------------------------------------------------


def test_a_site_whose_certificate_did_not_come_is_not_taken_for_a_peer() -> None:
    facts, everybody = facts_for(4), {site: QuickIdentity(site) for site in (*NAMES, "sybil")}
    for site, others in (
        (A, (B, C)),
        (A, (B, C, D, E)),
        (A, (A, B, C, D)),
        (A, (B, C, "sybil")),
        ("sybil", (A, B, C, D)),
        ("sybil", (B, C, D)),
    ):
        peers = {other: everybody[other] for other in others}
        with refused(ServerError, f"{site}: the roster is not the one whose certificates came."):
            SiteSession(site, facts, everybody[site], peers)
        if others != (A, B, C, D):
            with refused(ServerError, "session: a certificate of the roster is missing."):
                ServerSession(facts, peers)


@both_sides
def test_one_certificate_does_not_stand_for_two_sites(session_of: Begins) -> None:
    facts = facts_for(4)
    facts = replace(facts, roster={**facts.roster, D: facts.roster[C]})
    with refused(ServerError, "session: two sites of the roster have one certificate."):
        session_of(facts)


@both_sides
def test_more_sites_than_can_mask_are_refused(session_of: Begins) -> None:
    with refused(ServerError, "session: 65 sites, at most 64 can mask."):
        session_of(facts_for([f"site-{i:02d}" for i in range(65)]))


def test_a_stranger_can_say_nothing_to_the_server() -> None:
    parties = Parties(facts_for(3))
    sent = recorded(parties)
    fresh = Parties(facts_for(3))
    says = "site 'sybil': it is not in the roster of this session."
    with refused(PeerError, says, by="sybil"):
        fresh.server.accept_keys("sybil", sent[KeyOffer, A])
    for kind in (ShareOffer, Endorsement, UnmaskShares):
        with refused(PeerError, says, by="sybil"):
            accept(parties.server, "sybil", sent[kind, A])
    with refused(PeerError, says, by="sybil"):
        parties.server.accept_vector("sybil", [parties.masked[A]], 79)
    with refused(PeerError, says, by="sybil"):
        parties.server.delivery("sybil")


# --- replays of an earlier round or job ----------------------------------------------------------


def recorded(parties: Parties) -> dict[tuple[type[Message], str], Any]:
    """Run a session to its end; returns all its messages."""
    messages: dict[tuple[type[Message], str], Any] = {}

    def wire(kind: type[Message], site: str, fields: dict[str, Any]) -> object:
        messages[kind, site] = kind.from_fields(fields, from_server)
        return fields

    parties.wire = wire
    for step in STEPS:
        step(parties)
    return messages


EARLIER = [{"round": 2}, {"job": "the next"}, {"attempt": 2}]


@pytest.mark.parametrize("now", EARLIER)
def test_no_message_of_an_earlier_session_is_taken_by_the_server(now: dict[str, Any]) -> None:
    old = recorded(Parties(facts_for(3)))
    new = Parties(replace(facts_for(3), **now))
    for kind, step, says in (
        (KeyOffer, Parties.offer_keys, "its signature is wrong."),
        (ShareOffer, Parties.share, "its signature is wrong."),
        (Endorsement, Parties.endorse, "its signature is wrong."),
        (UnmaskShares, Parties.unmask, "its seed share of site 'site-01' is a wrong one."),
    ):
        new.until(step)
        if kind is Endorsement:
            new.server.close()
        with refused(
            PeerError, "site 'site-01': it sees another session (job, round, model,", by=B
        ):
            accept(new.server, B, old[kind, B])
        with refused(PeerError, f"site 'site-01': {says}", by=B):
            accept(new.server, B, replace(old[kind, B], session=new.facts.digest))
    new.unmask()
    assert np.array_equal(new.server.total(), new.sum_of(NAMES[:3]))


@pytest.mark.parametrize("now", EARLIER)
def test_no_message_of_an_earlier_session_is_taken_by_a_site(now: dict[str, Any]) -> None:
    old = recorded(Parties(facts_for(3)))
    new = Parties(replace(facts_for(3), **now)).until(Parties.share)
    session, mine = new.facts.digest, new.server.key_list().offers[A]

    def refuses(does: str, message: Message, says: str) -> None:
        with refused(ServerError, f"site-00: {says}"):
            getattr(new.copy().sites[A], does)(message)

    key_list = old[KeyList, A]
    refuses("share", key_list, "this site's own keys came back altered.")
    key_list = KeyList({**key_list.offers, A: mine})
    refuses("share", key_list, "the keys of site 'site-01' are of another session.")
    offers = {site: replace(offer, session=session) for site, offer in key_list.offers.items()}
    says = "the keys of site 'site-01' do not carry its signature for this session;"
    refuses("share", KeyList(offers), says)

    new.until(Parties.receive)
    delivery, now_said = old[ShareDelivery, A], new.server.delivery(A)
    refuses("receive", delivery, "this site's own share header came back altered.")
    headers = {**delivery.headers, A: now_said.headers[A]}
    says = "the share header of site 'site-01' does not carry its signature for these keys;"
    refuses("receive", replace(delivery, headers=headers), says)
    says = "the box of site 'site-01' is not the one that it signed."
    refuses("receive", replace(delivery, headers=now_said.headers), says)

    new.until(Parties.endorse)
    refuses("endorse", old[Survivors, A], "the survivors are those of another session.")

    new.until(Parties.unmask)
    endorsements, signatures = old[Endorsements, A], new.server.endorsements().signatures
    refuses("unmask", endorsements, "the survivors are not those that this site signed.")
    endorsements = replace(endorsements, session=session)
    refuses("unmask", endorsements, "this site's own signature came back altered.")
    old_but_mine = {**endorsements.signatures, A: signatures[A]}
    says = "the signature of site 'site-01' is not for the survivors that this site signed;"
    refuses("unmask", replace(endorsements, signatures=old_but_mine), says)


# --- an out-of-range or non-finite update --------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_never_masked(bad: float) -> None:
    plan = plan_for(3)
    update = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in plan.tensors}
    update["classes"][5, 4] = bad
    says = (
        "the update of tensor 'classes' is not finite: training diverged;"
        " lower the learning rate or check the images."
    )
    with refused(SiteError, says):
        plan.encode(update, 1, {"images": np.zeros(6, int)})


def test_an_update_out_of_range_is_clipped_and_its_count_shows_in_the_sum() -> None:
    facts = facts_for(3)
    parties = Parties(facts)
    update = {t.name: np.full(t.shape, 1e30, np.float32) for t in facts.plan.tensors}
    parties.plain[B] = facts.plan.encode(update, 1, {"images": np.ones(6, int)})
    total = open_sum(parties.until(Parties.receive)).total
    others = facts.plan.decode(parties.sum_of((A, C))).clipped
    clipped = facts.plan.decode(total).clipped
    assert clipped == {"encoder": others["encoder"] + 40, "classes": others["classes"] + 30}
    assert np.abs(facts.plan.decode(total).mean["encoder"]).max() <= 1.0
