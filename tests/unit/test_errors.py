"""Errors say in one sentence what is wrong, where, and what to do."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt import errors
from fedgestalt.errors import (
    DataError,
    FedgestaltError,
    PeerError,
    RoundFailedError,
    ServerError,
    SiteLostError,
    nearest,
)

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FedgestaltError)
]
NARROWER = {SiteLostError: PeerError, RoundFailedError: ServerError}
"""Whose faults they are, too."""
words = st.text(st.characters(codec="ascii", categories=("Ll",)), min_size=1, max_size=8)


def test_the_sentence_holds_place_fault_and_remedy() -> None:
    error = DataError("no column 'subject'", where="train.csv", remedy="add it")
    assert str(error) == "train.csv: no column 'subject'; add it."


def test_place_and_remedy_may_be_left_out() -> None:
    assert str(DataError("no image is listed")) == "no image is listed."
    assert str(DataError("it is empty", where="a.csv")) == "a.csv: it is empty."
    assert str(DataError("it is empty", remedy="fill it")) == "it is empty; fill it."


@pytest.mark.parametrize("what", ["broken", "broken.", "broken..."])
def test_there_is_one_full_stop_at_the_end(what: str) -> None:
    assert str(DataError(what)) == "broken."
    assert str(DataError("odd", remedy=what)) == "odd; broken."


def test_a_question_keeps_its_question_mark_and_gets_no_full_stop() -> None:
    error = DataError("no split is called 'x'", remedy="did you mean 'y'?")
    assert str(error) == "no split is called 'x'; did you mean 'y'?"


def test_a_peer_error_names_the_site_at_fault() -> None:
    error = PeerError("sent no key", site="bonn", remedy="restart it")
    assert error.site == "bonn"
    assert str(error) == "site 'bonn': sent no key; restart it."


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_caught_as_the_base_and_as_itself_alone(kind: type[FedgestaltError]) -> None:
    place = {"site": "bonn"} if issubclass(kind, PeerError) else {"where": "here"}
    with pytest.raises(FedgestaltError) as caught:
        raise kind("broken", remedy="mend it", **place)
    assert type(caught.value) is kind
    right = {FedgestaltError, kind, NARROWER.get(kind, kind)}
    assert {k for k in KINDS if isinstance(caught.value, k)} == right


def test_a_lost_site_is_named_like_any_site_at_fault() -> None:
    error = SiteLostError("no answer", site="bonn")
    assert error.site == "bonn"
    assert str(error) == "site 'bonn': no answer."


@pytest.mark.parametrize(
    "error",
    [
        DataError("broken", where="here", remedy="mend it"),
        PeerError("late", site="bonn"),
        SiteLostError("silent", site="bonn", remedy="look at its log"),
    ],
    ids=["data", "peer", "lost"],
)
def test_errors_cross_a_process_boundary_unchanged(error: FedgestaltError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):  # noqa: S301  our own bytes
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_the_nearest_known_word_is_named() -> None:
    assert nearest("isometri", ["isometry", "polynomial"]) == "did you mean 'isometry'?"


def test_all_known_words_are_listed_if_none_is_near() -> None:
    assert nearest("zzz", ["orl", "alpha"]) == "known: alpha, orl"


def test_an_empty_catalogue_is_said_to_be_empty() -> None:
    assert nearest("anything", []) == "none is installed"


@given(name=words, known=st.lists(words, min_size=1, max_size=5, unique=True))
def test_advice_names_known_words_and_a_known_word_names_itself(
    name: str, known: list[str]
) -> None:
    advice = nearest(name, iter(known))
    named = [word for word in known if word in advice]
    assert named
    if name in known:
        assert advice == f"did you mean {name!r}?"
