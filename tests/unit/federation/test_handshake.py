"""Whether everybody is about to do the same: one message names all differences and refusals."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedgestalt
from fedgestalt.errors import ConfigError, PeerError
from fedgestalt.federation.job.handshake import (
    Present,
    check_agreement,
    clock_warnings,
    present,
    versions,
)
from fedgestalt.federation.job.identity import CERTIFICATE_LIMIT
from fedgestalt.hooks import get_registry
from fedgestalt.messages import from_site
from fedgestalt.secagg import AES
from fedgestalt.secagg.facts import CIPHERS

FACTS = {"fedgestalt": "0.1.0", "nvflare": "2.9.0", "start model": "a" * 64}
MAP = {"label map": "b" * 64}
SITES = ("berlin", "bonn", "leuven")


def says(facts: Mapping[str, str], clock: int = 0) -> Present:
    """What a site states in a job without certificates."""
    return Present(facts, clock, b"", "")


def stated(**changes: Mapping[str, str | None]) -> dict[str, Present]:
    """What the sites state; a site may say something else, or nothing (None), of a fact."""
    found = {}
    for site in SITES:
        facts = {**FACTS, **MAP, **changes.get(site, {})}
        found[site] = says({k: v for k, v in facts.items() if v is not None})
    return found


def complaint(
    own: Mapping[str, str],
    said: Mapping[str, Present],
    refusals: Mapping[str, str] | None = None,
) -> str:
    with pytest.raises(ConfigError) as fault:
        check_agreement(own, said, refusals or {})
    return str(fault.value)


# --- agreement -----------------------------------------------------------------------------------


def test_nobody_complains_if_all_say_the_same() -> None:
    check_agreement(FACTS, stated(), {})


def test_facts_that_the_server_does_not_know_are_compared_between_sites_alone() -> None:
    check_agreement({}, stated(), {})
    assert "server" not in complaint({}, stated(bonn={"label map": "c" * 64}))


def test_a_difference_names_site_fact_both_values_who_has_them_and_what_to_do() -> None:
    said = complaint(FACTS, stated(bonn={"fedgestalt": "0.0.9"}))
    assert said == (
        "the job cannot start. bonn: fedgestalt is 0.0.9, with berlin, leuven, the server 0.1.0"
        " (install the same version of fedgestalt everywhere); nothing was trained or compared."
    )


def test_all_differences_of_all_sites_stand_in_one_message() -> None:
    said = complaint(
        FACTS,
        stated(
            bonn={"fedgestalt": "0.0.9", "start model": "c" * 64},
            leuven={"label map": "d" * 64},
        ),
    )
    assert said.count("the job cannot start") == 1
    bonn, leuven = said.split(" | ")
    assert "bonn: " in bonn
    assert "fedgestalt is 0.0.9" in bonn
    assert f"; start model is {'c' * 12}, with berlin, leuven, the server {'a' * 12} (" in bonn
    assert leuven.startswith(f"leuven: label map is {'d' * 12}, with berlin, bonn {'b' * 12} (")
    assert "berlin: " not in said


def test_a_missing_fact_is_a_difference() -> None:
    said = complaint(FACTS, stated(bonn={"start model": None}))
    assert f"bonn: start model is missing, with berlin, leuven, the server {'a' * 12}" in said


def test_a_fact_that_only_one_site_states_is_a_difference() -> None:
    said = complaint(FACTS, stated(bonn={"plugin backbone other": "theirs 1 abc"}))
    assert "bonn: plugin backbone other is theirs 1 abc, with berlin, leuven missing" in said
    assert "(install the same version of this plugin everywhere)" in said
    assert "the server:" not in said


def test_a_fact_that_the_server_knows_and_no_site_states_is_every_sites_difference() -> None:
    said = complaint({**FACTS, "number plan": "e" * 64}, stated())
    for site in SITES:
        assert f"{site}: number plan is missing, with the server {'e' * 12}" in said


def test_the_server_is_right_against_all_sites() -> None:
    said = complaint({**FACTS, "fedgestalt": "0.2.0"}, stated())
    for site in SITES:
        assert f"{site}: fedgestalt is 0.1.0, with the server 0.2.0" in said


def test_where_the_server_knows_nothing_the_majority_is_right() -> None:
    said = complaint(FACTS, stated(berlin={"label map": "c" * 64}))
    assert f"berlin: label map is {'c' * 12}, with bonn, leuven {'b' * 12}" in said
    assert "bonn: " not in said
    assert "leuven: " not in said


def test_without_a_majority_all_but_one_site_are_named() -> None:
    said = complaint(FACTS, stated(bonn={"label map": "c"}, leuven={"label map": "d"}))
    assert "bonn: label map is c, with berlin" in said
    assert "leuven: label map is d, with berlin" in said


def test_many_sites_that_agree_are_not_all_listed() -> None:
    many = {f"site-{number}": says({"classes": "3"}) for number in range(9)}
    many["bonn"] = says({"classes": "4"})
    said = complaint({}, many)
    assert "bonn: classes is 4, with site-0, site-1, site-2 and others 3" in said


def test_versions_of_a_plugin_are_shown_with_all_their_words_cut() -> None:
    name = "plugin backbone sface"
    plugins = {site: {name: f"fedgestalt 0.1.0 {'a' * 64}"} for site in SITES}
    plugins["bonn"] = {name: f"fedgestalt 0.1.0 {'f' * 64}"}
    said = complaint({}, stated(**plugins))
    assert f"is fedgestalt 0.1.0 {'f' * 12}, with" in said
    assert f" fedgestalt 0.1.0 {'a' * 12} (" in said


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("d" * 64, "d" * 12),
        ("d" * 63, "d" * 63),
        ("d" * 65, "d" * 65),
        ("w" * 80, "w" * 80),
        ("w" * 81, "w" * 80),
        ("", "missing"),
        ("   ", "missing"),
        ("not-a-digest-but-long-enough-to-be-cut", "not-a-digest-but-long-enough-to-be-cut"),
        (
            f"some-distribution-with-a-name 0.1.0.dev20+g0123456 {'e' * 64}",
            f"some-distribution-with-a-name 0.1.0.dev20+g0123456 {'e' * 12}",
        ),
    ],
)
def test_digests_alone_are_cut_short(value: str, shown: str) -> None:
    said = complaint({}, stated(bonn={"label map": value}))
    assert f"bonn: label map is {shown}, with berlin, leuven {'b' * 12} (" in said


def test_versions_that_differ_in_their_last_letters_look_different() -> None:
    usual, other = "0.1.0.dev20+g0123456.a", "0.1.0.dev20+g0123456.b"
    said = complaint(
        {"fedgestalt": usual},
        {site: says({"fedgestalt": other if site == "bonn" else usual}) for site in SITES},
    )
    assert f"fedgestalt is {other}, with berlin, leuven, the server {usual} (" in said


# --- refusals ------------------------------------------------------------------------------------


def test_a_refusal_is_shown_as_it_was_said() -> None:
    said = complaint(FACTS, stated(), {"mainz": "this site does not work with bonn; ask it"})
    assert "mainz: this site does not work with bonn; ask it; nothing was trained" in said


def test_refusals_and_differences_stand_in_one_message() -> None:
    said = complaint(
        FACTS,
        stated(bonn={"nvflare": "2.8.0"}),
        {"mainz": "its store cannot be written", "aachen": "no photographs today"},
    )
    parts = said.removeprefix("the job cannot start. ").split(" | ")
    assert [part.partition(":")[0] for part in parts] == ["aachen", "bonn", "mainz"]


def test_if_all_refuse_all_are_named() -> None:
    said = complaint({}, {}, dict.fromkeys(SITES, "not today"))
    assert [f"{site}: not today" in said for site in SITES] == [True] * 3


@given(st.dictionaries(st.sampled_from(SITES), st.sampled_from(["0.0.1", "0.0.2"]), max_size=3))
def test_every_site_that_differs_from_the_server_is_named_and_no_other(
    other: dict[str, str],
) -> None:
    said = stated(**{site: {"fedgestalt": version} for site, version in other.items()})
    if other:
        message = complaint(FACTS, said)
        assert {site for site in SITES if f"{site}: " in message} == other.keys()
    else:
        check_agreement(FACTS, said, {})


# --- clocks --------------------------------------------------------------------------------------


def at(seconds: float) -> Present:
    return says({}, int(seconds * 1000))


def test_clocks_that_are_a_little_off_are_nobodys_business() -> None:
    said = {"bonn": at(1000 - 119), "leuven": at(1000 + 119)}
    assert clock_warnings(said, dict.fromkeys(said, 1000.0)) == []


def test_a_clock_that_is_far_off_is_reported_with_its_side() -> None:
    said = {"leuven": at(1000 + 3600), "bonn": at(1000 - 300), "berlin": at(1000)}
    behind, ahead = clock_warnings(said, dict.fromkeys(said, 1000.0))
    assert behind.startswith("site 'bonn': its clock is 300 seconds behind the server's")
    assert ahead.startswith("site 'leuven': its clock is 3600 seconds ahead of the server's")
    assert "synchronise it (NTP)" in ahead


def test_every_clock_is_compared_with_the_time_at_which_its_site_answered() -> None:
    said = {"bonn": at(1000), "leuven": at(5000)}
    assert clock_warnings(said, {"bonn": 1001.0, "leuven": 5001.0}) == []


# --- what a site says ----------------------------------------------------------------------------


def test_a_site_states_its_facts_and_the_time() -> None:
    said = present(FACTS)
    assert said.facts == FACTS
    assert abs(said.clock / 1000 - time.time()) < 60
    assert (said.certificate, said.cipher) == (b"", "")
    assert Present.from_fields(said.to_fields(), from_site("bonn")) == said


def test_a_site_states_its_certificate_and_its_fastest_cipher_where_the_job_asks_for_them() -> None:
    said = present(FACTS, b"-----BEGIN CERTIFICATE-----", AES)
    assert said.certificate == b"-----BEGIN CERTIFICATE-----"
    assert said.cipher == AES
    assert Present.from_fields(said.to_fields(), from_site("bonn")) == said


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_cipher_that_there_is_can_be_stated(cipher: str) -> None:
    said = present({}, b"", cipher)
    assert Present.from_fields(said.to_fields(), from_site("bonn")).cipher == cipher


def test_certificates_and_ciphers_are_nobodys_difference() -> None:
    said = {site: present(FACTS, site.encode(), CIPHERS[site > "bonn"]) for site in SITES}
    check_agreement(FACTS, said, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("facts", {"a": "x" * 201}),
        ("facts", {"a": 1}),
        ("clock", -1),
        ("certificate", "PEM"),
        ("certificate", bytes(CERTIFICATE_LIMIT + 1)),
        ("cipher", "AES 256"),
        ("cipher", "a" * 41),
        ("cipher", None),
    ],
)
def test_a_malformed_statement_names_its_site(key: str, value: object) -> None:
    fields = {**present(FACTS).to_fields(), key: value}
    with pytest.raises(PeerError, match=f"'bonn'.*field '{key}'"):
        Present.from_fields(fields, from_site("bonn"))


def test_the_longest_certificate_that_is_read_can_be_stated() -> None:
    said = present({}, bytes(CERTIFICATE_LIMIT))
    assert Present.from_fields(said.to_fields(), from_site("bonn")) == said


def test_the_software_is_stated_with_versions_and_digests() -> None:
    entry = get_registry().backbones.entry("iresnet")
    facts = versions([entry])
    assert facts["fedgestalt"] == fedgestalt.__version__
    assert facts["nvflare"] == importlib.metadata.version("nvflare")
    assert len(facts["fedgestalt code"]) == 64
    assert facts["plugin backbone iresnet"] == (
        f"{entry.distribution} {entry.version} {entry.digest}"
    )
    assert facts.keys() == {"fedgestalt", "nvflare", "fedgestalt code", "plugin backbone iresnet"}


def test_every_installed_plugin_can_be_stated() -> None:
    facts = versions(get_registry().entries())
    said = Present.from_fields(present(facts).to_fields(), from_site("bonn"))
    assert len(said.facts) == 3 + len(get_registry().entries())
