"""The two state machines: masks cancel exactly, and one test per broken rule."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import FedgestaltError, PeerError, ServerError, SiteError
from fedgestalt.messages import from_site
from fedgestalt.secagg import (
    KeyOffer,
    KeyRoster,
    MaskedVector,
    NumberPlan,
    ServerSession,
    SessionFacts,
    SiteSession,
    TensorPlan,
)

NAMES = tuple(f"site-{i:02d}" for i in range(16))


def facts_for(sites: int = 3, size: int = 1000, **changes) -> SessionFacts:
    plan = NumberPlan(sites, 50, (TensorPlan("w", (size,), 0),))
    facts = SessionFacts("job", 1, 1, bytes(32), plan, NAMES[:sites])
    return dataclasses.replace(facts, **changes)


def vectors_for(facts: SessionFacts, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        site: facts.plan.encode(
            {"w": rng.uniform(-1, 1, facts.plan.tensors[0].shape).astype(np.float32)},
            int(rng.integers(1, 51)),
        )
        for site in facts.roster
    }


def opened(facts: SessionFacts) -> tuple[ServerSession, dict[str, SiteSession], KeyRoster]:
    server, sites = ServerSession(facts), {s: SiteSession(s, facts) for s in facts.roster}
    for site, session in sites.items():
        server.accept_key(site, session.offer_key())
    return server, sites, server.key_roster()


@pytest.mark.parametrize("count", [3, 4, 8, 16])
def test_masks_cancel_and_the_aggregate_is_that_of_the_plain_words(count: int) -> None:
    facts = facts_for(count)
    server, sites, keys = opened(facts)
    vectors = vectors_for(facts)
    for site, session in sites.items():
        masked = session.mask(keys, vectors[site])
        assert not np.array_equal(masked.words, vectors[site])
        server.accept_vector(site, masked)
    total = np.add.reduce(list(vectors.values()), dtype=np.uint32)
    plain, summed = facts.plan.decode(total), server.aggregate()
    assert np.array_equal(plain.mean["w"], summed.mean["w"])
    assert (plain.weight, plain.clipped) == (summed.weight, summed.clipped)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.integers(1, 400), st.integers(0, 2**32))
def test_masking_and_summing_is_the_identity_on_the_sum(n: int, size: int, seed: int) -> None:
    facts = facts_for(n, size)
    _, sites, keys = opened(facts)
    vectors = vectors_for(facts, seed)
    total = np.zeros(facts.plan.words, np.uint32)
    for site, session in sites.items():
        total += session.mask(keys, vectors[site]).words
    assert np.array_equal(total, np.add.reduce(list(vectors.values()), dtype=np.uint32))


def test_masked_vectors_of_zeros_look_random_and_differ_between_sessions() -> None:
    facts = facts_for(3, 100_000)
    zeros = np.zeros(facts.plan.words, np.uint32)
    seen = []
    for _ in range(2):
        _, sites, keys = opened(facts)
        seen.append(sites[NAMES[0]].mask(keys, zeros).words)
    for words in seen:
        bits = np.unpackbits(words.view(np.uint8)).mean()
        assert abs(bits - 0.5) < 6 * 0.5 / np.sqrt(32 * words.size)
        assert len(np.unique(words)) > 0.99 * words.size
    assert (seen[0] == seen[1]).sum() < 10


def test_a_sum_without_one_site_is_not_the_others_sum() -> None:
    facts = facts_for(4)
    _, sites, keys = opened(facts)
    vectors = vectors_for(facts)
    masked = [sites[s].mask(keys, vectors[s]).words for s in facts.roster[:3]]
    partial = np.add.reduce(masked, dtype=np.uint32)
    plain = np.add.reduce([vectors[s] for s in facts.roster[:3]], dtype=np.uint32)
    assert (partial == plain).mean() < 0.01


def test_a_site_refuses_a_roster_that_is_smaller_than_its_policy_allows() -> None:
    facts = facts_for(2)
    with pytest.raises(SiteError, match="2 sites take part, this site's policy asks for 3"):
        SiteSession(NAMES[0], facts)
    with pytest.raises(SiteError, match="asks for 5"):
        SiteSession(NAMES[0], facts_for(4), minimum_sites=5)


@pytest.mark.parametrize(
    "roster", [("site-00", "site-00", "site-01"), ("site-02", "site-01", "site-00"), NAMES[1:4]]
)
def test_a_site_refuses_a_roster_that_repeats_is_unsorted_or_lacks_it(roster) -> None:
    with pytest.raises(ServerError, match="roster"):
        SiteSession(NAMES[0], facts_for(3, roster=roster))


def test_a_site_refuses_a_plan_for_another_number_of_sites() -> None:
    with pytest.raises(ServerError, match="plan is for 3 sites, the roster has 4"):
        SiteSession(NAMES[0], facts_for(3, roster=NAMES[:4]))


def test_a_session_masks_one_vector_only() -> None:
    facts = facts_for()
    _, sites, keys = opened(facts)
    vector = vectors_for(facts)[NAMES[0]]
    sites[NAMES[0]].mask(keys, vector)
    with pytest.raises(SiteError, match="already masked"):
        sites[NAMES[0]].mask(keys, vector)


def test_a_site_refuses_keys_of_another_roster_its_own_altered_key_and_twin_keys() -> None:
    facts = facts_for()
    _, sites, keys = opened(facts)
    vector = vectors_for(facts)[NAMES[0]]
    given = dict(keys.public_keys)
    for changed, match in (
        ({**given, "intruder": bytes(32)}, "not those of the agreed roster"),
        ({k: v for k, v in given.items() if k != NAMES[1]}, "not those of the agreed roster"),
        ({**given, NAMES[0]: bytes(range(32))}, "came back altered"),
        ({**given, NAMES[1]: given[NAMES[2]]}, "same key"),
    ):
        with pytest.raises(ServerError, match=match):
            sites[NAMES[0]].mask(KeyRoster(changed), vector)


def test_a_degenerate_key_is_the_peers_fault() -> None:
    facts = facts_for()
    _, sites, keys = opened(facts)
    weak = KeyRoster({**keys.public_keys, NAMES[1]: bytes(32)})
    with pytest.raises(PeerError, match="degenerate") as caught:
        sites[NAMES[0]].mask(weak, vectors_for(facts)[NAMES[0]])
    assert caught.value.site == NAMES[1]


def test_a_vector_that_does_not_fit_the_plan_is_not_masked() -> None:
    facts = facts_for()
    _, sites, keys = opened(facts)
    with pytest.raises(SiteError, match="does not fit"):
        sites[NAMES[0]].mask(keys, np.zeros(3, np.uint32))


def test_the_server_gives_no_roster_or_sum_before_everybody_has_sent() -> None:
    facts = facts_for()
    server = ServerSession(facts)
    server.accept_key(NAMES[0], SiteSession(NAMES[0], facts).offer_key())
    with pytest.raises(ServerError, match="no key from site-01, site-02"):
        server.key_roster()
    with pytest.raises(ServerError, match="no vector from site-00, site-01, site-02"):
        server.aggregate()


def test_the_server_refuses_strangers_repeats_other_sessions_and_copied_keys() -> None:
    facts = facts_for()
    server = ServerSession(facts)
    offer = SiteSession(NAMES[0], facts).offer_key()
    with pytest.raises(PeerError, match="not in the roster"):
        server.accept_key("stranger", offer)
    server.accept_key(NAMES[0], offer)
    with pytest.raises(PeerError, match="already sent"):
        server.accept_key(NAMES[0], offer)
    with pytest.raises(PeerError, match="equals another site's"):
        server.accept_key(NAMES[1], offer)
    with pytest.raises(PeerError, match="another session"):
        server.accept_key(NAMES[1], KeyOffer(bytes(32), bytes(range(32))))


def test_a_refused_vector_leaves_the_sum_as_it_was() -> None:
    facts = facts_for()
    server, sites, keys = opened(facts)
    vectors = vectors_for(facts)
    masked = {s: sites[s].mask(keys, vectors[s]) for s in facts.roster}
    server.accept_vector(NAMES[0], masked[NAMES[0]])
    for site, vector in (
        (NAMES[0], masked[NAMES[0]]),
        (NAMES[1], dataclasses.replace(masked[NAMES[1]], session=bytes(32))),
        (NAMES[1], dataclasses.replace(masked[NAMES[1]], words=masked[NAMES[1]].words[:-1])),
        ("stranger", masked[NAMES[1]]),
    ):
        with pytest.raises(PeerError) as caught:
            server.accept_vector(site, vector)
        assert caught.value.site == site
    for site in facts.roster[1:]:
        server.accept_vector(site, masked[site])
    total = np.add.reduce(list(vectors.values()), dtype=np.uint32)
    assert np.array_equal(server.aggregate().mean["w"], facts.plan.decode(total).mean["w"])


@pytest.mark.parametrize(
    "change",
    [
        {"job": "other"},
        {"attempt": 2},
        {"round": 2},
        {"model_digest": b"\1" * 32},
        {"roster": NAMES[1:4]},
        {"plan": NumberPlan(3, 51, (TensorPlan("w", (1000,), 0),))},
    ],
)
def test_sites_that_were_told_different_things_have_different_sessions(change) -> None:
    assert facts_for().digest != facts_for(**change).digest


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_messages_are_refused_in_their_senders_name(data) -> None:
    facts = facts_for(3, 4)
    server, sites, keys = opened(facts)
    message = sites[NAMES[0]].mask(keys, vectors_for(facts)[NAMES[0]])
    fields = message.to_fields()
    junk = st.one_of(
        st.none(),
        st.integers(),
        st.binary(max_size=40),
        st.text(max_size=5),
        st.just(np.zeros(2, np.float64)),
        st.just(np.zeros((2, 2), np.uint32)),
    )
    key = data.draw(st.sampled_from([*fields, "extra"]))
    if data.draw(st.booleans()) and key in fields:
        del fields[key]
    else:
        fields[key] = data.draw(junk)
    with pytest.raises(FedgestaltError) as caught:
        vector = MaskedVector.from_fields(fields, from_site(NAMES[0]))
        server.accept_vector(NAMES[0], vector)
    assert isinstance(caught.value, PeerError)
    assert caught.value.site == NAMES[0]
