"""What can be seen: masked words are uniform, and stay so for whoever is not in the sum."""

from __future__ import annotations

import numpy as np
import pytest
from parties import (
    NAMES,
    Parties,
    facts_for,
    looks_uniform,
    pair_streams_of,
    plan_for,
    refused,
)

from fedgestalt.errors import ServerError
from fedgestalt.secagg import AES, CHACHA20, Recipient, Words, binding
from fedgestalt.secagg.shamir import combine
from fedgestalt.secagg.stream import Stream, add_streams

WORDS = 30_000
A, B, C, D, E = NAMES[:5]


def masked(n: int = 4, threshold: int = 0, **changes: object) -> Parties:
    facts = facts_for(n, threshold, plan=plan_for(n, WORDS), **changes)
    return Parties(facts).until(Parties.upload)


def bits_are_even(words: Words) -> bool:
    """Each of the 32 bits is set in half of the words, up to six standard deviations."""
    set_in = ((words[:, None] >> np.arange(32, dtype=np.uint32)) & 1).mean(axis=0)
    return bool((np.abs(set_in - 0.5) < 3 / np.sqrt(words.size)).all())


def rebuilt_root(parties: Parties, lost: str) -> bytes:
    """What the server learns of a site that is not among the survivors."""
    given = parties.server._shares
    return combine({parties.facts.sites.index(s) + 1: given[s][lost] for s in given})


@pytest.mark.parametrize("recipient", Recipient)
@pytest.mark.parametrize("cipher", [AES, CHACHA20])
def test_a_masked_vector_is_uniform_and_a_plain_one_is_not(
    cipher: str, recipient: Recipient
) -> None:
    parties = masked(cipher=cipher, recipient=recipient)
    for site, words in parties.masked.items():
        plain = parties.plain[site]
        assert not looks_uniform(plain)
        assert not bits_are_even(plain)
        for seen in (words, words - plain, words ^ plain):
            assert looks_uniform(seen)
            assert bits_are_even(seen)


def test_a_masked_vector_of_zeros_is_uniform() -> None:
    parties = Parties(facts_for(3, plan=plan_for(3, WORDS))).until(Parties.mask)
    parties.plain = {site: np.zeros(WORDS, np.uint32) for site in parties.plain}
    parties.mask()
    for words in parties.masked.values():
        assert looks_uniform(words)
        assert len(np.unique(words)) > 0.999 * WORDS


def test_any_but_all_vectors_add_up_to_something_uniform() -> None:
    parties = masked()
    vectors = list(parties.masked.values())
    for sign in (1, -1):
        for count in range(2, 5):
            total = vectors[0].copy()
            for vector in vectors[1:count]:
                total += vector if sign > 0 else -vector
            assert looks_uniform(total)


def test_a_site_that_is_lost_in_mid_upload_keeps_its_self_mask() -> None:
    parties = masked()
    parties.upload(without=[C])
    parties.endorse()
    parties.unmask()
    assert np.array_equal(parties.server.total(), parties.sum_of((A, B, D)))
    words = parties.masked[C].copy()
    assert looks_uniform(words)
    add_streams(words, pair_streams_of(parties, C, rebuilt_root(parties, C), (A, B, D)))
    assert looks_uniform(words)
    assert looks_uniform(words - parties.plain[C])


def test_two_lost_sites_keep_their_self_masks_even_from_each_other() -> None:
    parties = masked(5, 3)
    parties.upload(without=[B, E])
    parties.endorse()
    parties.unmask()
    parties.server.total()
    together = np.zeros(WORDS, np.uint32)
    for lost in (B, E):
        words = parties.masked[lost].copy()
        others = tuple(site for site in NAMES[:5] if site != lost)
        add_streams(words, pair_streams_of(parties, lost, rebuilt_root(parties, lost), others))
        assert looks_uniform(words)
        together += words
    assert looks_uniform(together)


def test_colluding_sites_do_not_see_through_the_masks_of_the_honest() -> None:
    """All but two sites collude: each honest vector keeps its self mask and one pair's."""
    facts = facts_for(5, plan=plan_for(5, WORDS))
    parties = Parties(facts).until(Parties.mask)
    streams = {
        site: dict(zip(session._public, session._streams[1:], strict=True))
        for site, session in parties.sites.items()
    }
    parties.mask()
    seen = {site: parties.masked[site].copy() for site in (A, B)}
    for site, words in seen.items():
        add_streams(words, [streams[colluder][site] for colluder in (C, D, E)])
        assert looks_uniform(words)
    assert looks_uniform(seen[A] + seen[B])


def test_a_server_that_opened_the_sum_sees_the_survivors_through_one_sum_only() -> None:
    """Without the self masks that it rebuilt, single vectors keep the masks of the pairs."""
    parties = masked()
    parties.upload()
    parties.endorse()
    parties.unmask()
    server, helpers = parties.server, sorted(parties.server._shares)[:3]
    total = server.total()
    assert not looks_uniform(total)
    for site, words in parties.masked.items():
        seed = server._seed_of(site, helpers)
        own = words.copy()
        key = binding.self_stream(seed, server.agreement, site)
        add_streams(own, [Stream(key, subtract=True)])
        assert looks_uniform(own)


@pytest.mark.parametrize("lost", [(), (A,), (C,)])
def test_the_sum_that_only_sites_learn_is_uniform_for_the_server(lost: tuple[str, ...]) -> None:
    parties = masked(recipient=Recipient.SITES)
    parties.upload(without=lost)
    parties.endorse()
    parties.unmask()
    total = parties.server.total()
    survivors = tuple(site for site in NAMES[:4] if site not in lost)
    exact = parties.sum_of(survivors)
    assert looks_uniform(total)
    assert looks_uniform(total - exact)
    assert not looks_uniform(exact)
    for site in NAMES[:4]:
        opened = total.copy()
        parties.sites[site].unveil(opened, survivors)
        assert np.array_equal(opened, exact)


def test_a_sum_that_is_unveiled_for_other_sites_is_noise() -> None:
    parties = masked(recipient=Recipient.SITES)
    parties.upload(without=[D])
    parties.endorse()
    parties.unmask()
    total = parties.server.total()
    with refused(ServerError, "the sum is of other sites than this one signed."):
        parties.sites[A].unveil(total.copy(), NAMES[:4])
    parties.sites[D].unveil(total, NAMES[:4])
    assert looks_uniform(total)


def test_two_sums_of_one_round_would_give_a_site_away() -> None:
    """Why a site signs one set per session, and must not give one update to two opened sessions."""
    first, second = masked(), masked(attempt=2)
    first.upload()
    second.upload(without=[D])
    for parties in (first, second):
        parties.endorse()
        parties.unmask()
    difference = first.server.total() - second.server.total()
    assert np.array_equal(difference, first.plain[D])
