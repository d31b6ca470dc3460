"""The aggregator as FLARE calls it: it takes messages of a session, and gives a mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from session_trial import (
    IDENTITIES,
    LENIENT,
    PEERS,
    SITES,
    facts_of,
    sum_of,
    update_of,
    weight_of,
)

from fedgestalt.errors import ConfigError, PeerError, ServerError
from fedgestalt.federation.job.wire import BODY, to_shareable
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.messages import Trained, Uploaded
from fedgestalt.federation.training.rounds import Aggregation, Rule, Scope
from fedgestalt.messages import Message, from_site
from fedgestalt.secagg import KeyOffer, Recipient, SessionFacts, SiteSession, ThreatModel


class Round:
    """A session whose messages go through FLARE's interface of the aggregator."""

    def __init__(self, facts: SessionFacts) -> None:
        self.facts, self.aggregator = facts, ZeroSumMaskAggregator()
        self.server = self.aggregator.begin(facts, PEERS)
        self.sites = {
            site: SiteSession(
                site,
                facts,
                IDENTITIES[site],
                {other: peer for other, peer in PEERS.items() if other != site},
                policy=LENIENT,
            )
            for site in SITES
        }

    def accept(self, site: str, message: Message) -> None:
        assert self.aggregator.accept(to_shareable(message), peer(site)) is True

    def keys(self) -> None:
        for site, session in self.sites.items():
            self.accept(site, session.offer_keys())

    def shares(self) -> None:
        keys = self.server.key_list()
        for site, session in self.sites.items():
            self.accept(site, session.share(keys))

    def vectors(self) -> None:
        for site, session in self.sites.items():
            session.receive(self.server.delivery(site))
            words = self.facts.plan.encode(update_of(site), weight_of(site))
            session.mask(words)
            self.server.accept_vector(site, lambda a, b, words=words: words[a:b], words.size)

    def survivors(self) -> None:
        survivors = self.server.close()
        for site, session in self.sites.items():
            self.accept(site, session.endorse(survivors))

    def unmask(self) -> None:
        endorsements = self.server.endorsements()
        for site, session in self.sites.items():
            self.accept(site, session.unmask(endorsements))

    def all(self) -> None:
        for step in (self.keys, self.shares, self.vectors, self.survivors, self.unmask):
            step()


def peer(site: str) -> FLContext:
    """The context of a message from a site."""
    context, other = FLContext(), FLContext()
    other.set_prop(ReservedKey.IDENTITY_NAME, site, private=False, sticky=False)
    context.set_peer_context(other)
    return context


@pytest.fixture
def opened() -> Round:
    made = Round(facts_of(SITES, 1))
    made.all()
    return made


# --- a round -------------------------------------------------------------------------------------


def test_it_is_an_aggregator_of_flare() -> None:
    assert isinstance(ZeroSumMaskAggregator(), Aggregator)


def test_a_whole_session_goes_through_flares_interface(opened: Round) -> None:
    mean = opened.aggregator.aggregate(FLContext())
    assert isinstance(mean, Shareable)
    weights = np.array([weight_of(site) for site in SITES])
    updates = np.stack([update_of(site)["a/neck/weight"] for site in SITES])
    right = np.tensordot(weights / weights.sum(), updates, 1)
    assert mean["a/neck/weight"].dtype == np.float32
    np.testing.assert_allclose(mean["a/neck/weight"], right, atol=1e-6)


def test_the_sum_has_the_bits_of_the_sum_of_the_plain_words(opened: Round) -> None:
    assert np.array_equal(opened.aggregator.session.total(), sum_of(opened.facts, SITES))


def test_a_sum_is_opened_once(opened: Round) -> None:
    opened.aggregator.aggregate(FLContext())
    with pytest.raises(ServerError, match="the sum was opened before"):
        opened.aggregator.aggregate(FLContext())


@pytest.mark.parametrize("done", range(5))
def test_before_the_end_there_is_no_sum(done: int) -> None:
    begun = Round(facts_of(SITES, 1))
    for step in (begun.keys, begun.shares, begun.vectors, begun.survivors)[:done]:
        step()
    with pytest.raises(ServerError):
        begun.aggregator.aggregate(FLContext())


# --- sessions ------------------------------------------------------------------------------------


def test_without_a_session_nothing_is_taken_and_nothing_given() -> None:
    aggregator, keys = ZeroSumMaskAggregator(), Round(facts_of(SITES, 1)).sites["bonn"].offer_keys()
    for act in (
        lambda: aggregator.accept(to_shareable(keys), peer("bonn")),
        lambda: aggregator.aggregate(FLContext()),
        lambda: aggregator.session,
    ):
        with pytest.raises(ServerError, match="aggregator: no session is open"):
            act()


def test_a_reset_closes_the_session(opened: Round) -> None:
    opened.aggregator.reset(FLContext())
    with pytest.raises(ServerError, match="no session is open"):
        opened.aggregator.aggregate(FLContext())
    opened.aggregator.reset(FLContext())


def test_the_next_session_knows_nothing_of_the_last(opened: Round) -> None:
    before = opened.aggregator.session
    after = opened.aggregator.begin(facts_of(SITES, 2), PEERS)
    assert opened.aggregator.session is after is not before
    with pytest.raises(ServerError):
        opened.aggregator.aggregate(FLContext())


def test_a_session_that_cannot_be_begun_leaves_none_open(opened: Round) -> None:
    with pytest.raises(ServerError, match="a certificate of the roster is missing"):
        opened.aggregator.begin(facts_of(SITES, 2), {})
    with pytest.raises(ServerError, match="no session is open"):
        opened.aggregator.aggregate(FLContext())


def test_messages_of_the_last_session_are_refused() -> None:
    old = Round(facts_of(SITES, 1))
    offer = old.sites["bonn"].offer_keys()
    old.aggregator.begin(facts_of(SITES, 2), PEERS)
    with pytest.raises(PeerError, match="'bonn': it sees another session"):
        old.accept("bonn", offer)


# --- junk ----------------------------------------------------------------------------------------


def refused(begun: Round, site: str, body: object) -> str:
    with pytest.raises(PeerError) as fault:
        begun.aggregator.accept(Shareable({BODY: body}), peer(site))
    assert fault.value.site == site
    return str(fault.value)


@pytest.mark.parametrize(
    "body",
    [
        *(None, 5, "text", [], {}, np.zeros(3), b"bytes"),
        *({"schema": schema} for schema in (None, 5, [], "fedgestalt.secagg.key-offer/1", "")),
        *({"schema": np.array(words)} for words in ([], ["a"], ["a", "b"])),
        Uploaded(bytes(32)).to_fields(),
        Trained(1).to_fields(),
    ],
    ids=str,
)
def test_what_is_no_message_of_a_session_is_refused_and_its_sender_named(body: object) -> None:
    said = refused(Round(facts_of(SITES, 1)), "bonn", body)
    assert said == "site 'bonn': it sent no message of secure aggregation."


def test_a_result_without_a_message_is_refused() -> None:
    with pytest.raises(PeerError, match="no message of secure aggregation"):
        Round(facts_of(SITES, 1)).aggregator.accept(Shareable(), peer("bonn"))


@pytest.mark.parametrize(
    "kind", ["key-offer/2", "share-offer/1", "endorsement/1", "unmask-shares/1"]
)
def test_a_message_with_the_right_name_and_nothing_in_it_is_refused(kind: str) -> None:
    schema = f"fedgestalt.secagg.{kind}"
    said = refused(Round(facts_of(SITES, 1)), "bonn", {"schema": schema})
    assert said.startswith(f"site 'bonn': {schema}: missing or unknown field")


def test_a_site_cannot_speak_for_another() -> None:
    begun = Round(facts_of(SITES, 1))
    offer = begun.sites["bonn"].offer_keys().to_fields()
    assert "signature" in refused(begun, "ulm", offer)
    assert "not in the roster" in refused(begun, "mainz", offer)


def test_what_was_refused_can_be_sent_rightly_afterwards() -> None:
    begun = Round(facts_of(SITES, 1))
    refused(begun, "bonn", {"schema": "fedgestalt.secagg.key-offer/2"})
    begun.all()
    assert np.array_equal(begun.server.total(), sum_of(begun.facts, SITES))


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary()
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(field=st.sampled_from(["schema", "session", "mask_key", "signature", ""]), value=junk)
@settings(deadline=None, max_examples=60)
def test_whatever_a_site_sends_in_place_of_its_keys_is_its_fault(field: str, value: object) -> None:
    begun = Round(facts_of(SITES, 1))
    offer = begun.sites["bonn"].offer_keys().to_fields()
    refused(begun, "bonn", {**offer, field: value} if field else value)
    begun.accept("bonn", KeyOffer.from_fields(offer, from_site("bonn")))


# --- arguments -----------------------------------------------------------------------------------


def test_by_default_the_server_learns_the_mean_of_everything_and_is_not_trusted() -> None:
    assert ZeroSumMaskAggregator().aggregation(7) == Aggregation(max_weight=7)


def test_arguments_are_the_words_of_the_job() -> None:
    made = ZeroSumMaskAggregator("encoder", "class-weighted", "sites", "honest-but-curious")
    assert made.aggregation(9) == Aggregation(
        Scope.ENCODER, Rule.CLASS_WEIGHTED, Recipient.SITES, ThreatModel.HONEST_BUT_CURIOUS, 9
    )


@pytest.mark.parametrize("argument", ["scope", "rule", "reveal_aggregate_to", "threat_model"])
@pytest.mark.parametrize("word", ["", "Mean", "everything", "all\n"])
def test_an_unknown_word_is_named(argument: str, word: str) -> None:
    made = ZeroSumMaskAggregator(**{argument: word})
    with pytest.raises(ConfigError) as fault:
        made.aggregation(7)
    assert fault.value.where == "arguments of the aggregator"
    assert repr(word) in str(fault.value)


@pytest.mark.parametrize("value", [None, 5, True, ["all"], {"all": 1}])
def test_what_is_no_word_is_refused_in_a_sentence(value: Any) -> None:
    with pytest.raises(ConfigError, match="arguments of the aggregator"):
        ZeroSumMaskAggregator(scope=value).aggregation(7)


def test_an_unknown_argument_is_refused_when_flare_makes_the_component() -> None:
    with pytest.raises(TypeError, match="weights"):
        ZeroSumMaskAggregator(weights="mine")  # type: ignore[call-arg]
