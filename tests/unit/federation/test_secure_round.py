"""Sessions of a job at the server: whoever is lost or lies, the sum is right or stays closed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from session_trial import (
    IDENTITIES,
    MEMBERS,
    SITES,
    TASKS,
    Hospitals,
    facts_of,
    sum_of,
)

from fedgestalt.errors import PeerError, RoundFailedError, ServerError
from fedgestalt.federation.tasks import KEYS, SHARES, SURVIVORS, UNMASK, VECTOR
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.secure_round import Opened, SecureRounds
from fedgestalt.secagg import SessionFacts, ThreatModel

CURIOUS = functools.partial(facts_of, threat=ThreatModel.HONEST_BUT_CURIOUS)
"""Three of five sites are enough; else it takes four."""


class Server:
    """The server's side, for one job."""

    def __init__(self, minimum_sites: int = 3, members: Any = MEMBERS) -> None:
        self.hospitals, self.warnings = Hospitals(), list[str]()
        self.aggregator = ZeroSumMaskAggregator()
        self.rounds = SecureRounds(
            self.aggregator,
            self.hospitals.gather,
            self.hospitals.desk,  # type: ignore[arg-type]
            members,
            minimum_sites,
            2,
            self.warnings.append,
        )

    def lose(self, task: str, *sites: str, attempt: int = 1) -> None:
        self.hospitals.lost[task, attempt] = set(sites)

    def lie(self, task: str, site: str, lie: Callable[[dict[str, Any]], object]) -> None:
        self.hospitals.lies[site, task] = lie

    def open_sum(self, sites: tuple[str, ...] = SITES, facts: Any = facts_of) -> Opened:
        return self.rounds.open_sum(sites, facts)

    def fails(self, says: str, facts: Any = facts_of) -> None:
        """The round fails; nothing of what arrived is left."""
        closed = self.hospitals.desk.closed
        with pytest.raises(RoundFailedError, match=says):
            self.open_sum(facts=facts)
        assert self.hospitals.desk.closed == closed + 1

    def accuses(self, site: str, says: str) -> None:
        """The job ends, and names the site at fault."""
        with pytest.raises(PeerError, match=says) as fault:
            self.open_sum()
        assert fault.value.site == site
        assert type(fault.value) is PeerError
        expected = self.hospitals.desk.expected
        assert self.hospitals.desk.closed == len(expected)

    @property
    def attempts(self) -> list[int]:
        """Of all sessions that were begun."""
        starts = [start for site in self.hospitals.sites.values() for start in site.starts]
        return sorted({start.attempt for start in starts})


@pytest.fixture
def server() -> Server:
    return Server()


def is_exact(opened: Opened, *survivors: str) -> bool:
    """The sum is over these sites, and has the bits that it must have."""
    return opened.survivors == survivors and np.array_equal(
        opened.take_words(), sum_of(opened.facts, survivors)
    )


def without(*lost: str) -> tuple[str, ...]:
    return tuple(site for site in SITES if site not in lost)


# --- nobody is lost ------------------------------------------------------------------------------


def test_with_everybody_the_sum_is_that_of_all_updates(server: Server) -> None:
    opened = server.open_sum()
    assert is_exact(opened, *SITES)
    assert opened.facts == facts_of(SITES, 1)
    assert opened.agreement == server.hospitals.sites["bonn"].session.agreement
    assert server.warnings == []


def test_every_site_is_asked_in_the_order_of_the_protocol_and_no_more_than_needed(
    server: Server,
) -> None:
    server.open_sum()
    asked = server.hospitals.asked
    assert [task for task, _ in itertools.groupby(asked, key=lambda pair: pair[0])] == [*TASKS]
    for task in (KEYS, SHARES, VECTOR, SURVIVORS):
        assert [site for told, site in asked if told == task] == [*SITES]
    assert [site for told, site in asked if told == UNMASK] == [*SITES[:4]]


def test_sites_are_told_who_takes_part_and_of_what(server: Server) -> None:
    server.open_sum(SITES[1:])
    for site in SITES[1:]:
        (start,) = server.hospitals.sites[site].starts
        assert (start.round, start.attempt, start.threshold) == (1, 1, 3)
        assert start.cipher == facts_of(SITES[1:], 1).cipher
        assert start.certificates == {s: IDENTITIES[s].certificate for s in SITES[1:]}
    assert server.hospitals.sites[SITES[0]].starts == []


def test_uploads_are_expected_once_of_everybody_and_dropped_at_the_end(server: Server) -> None:
    opened = server.open_sum()
    desk = server.hospitals.desk
    assert desk.expected == [(opened.facts.digest.hex(), opened.facts.plan.words, SITES)]
    assert desk.closed == 1
    assert len(set(desk.tickets.values())) == len(SITES)


def test_every_sum_is_opened_in_a_session_of_its_own(server: Server) -> None:
    for attempt in (1, 2, 3):
        opened = server.open_sum()
        assert opened.facts.attempt == attempt
        assert is_exact(opened, *SITES)
    keys = [name for name, _, _ in server.hospitals.desk.expected]
    assert len(set(keys)) == 3


def test_sites_may_join_between_two_sums() -> None:
    members = {site: MEMBERS[site] for site in SITES[:3]}
    server = Server(members=members)
    assert is_exact(server.open_sum(SITES[:3]), *SITES[:3])
    members["ulm"] = MEMBERS["ulm"]
    assert is_exact(server.open_sum((*SITES[:3], "ulm")), *SITES[:3], "ulm")


# --- somebody is lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("lost", SITES)
@pytest.mark.parametrize("task", [KEYS, SHARES])
def test_who_is_lost_before_any_vector_was_sent_costs_a_session(
    server: Server, task: str, lost: str
) -> None:
    server.lose(task, lost)
    opened = server.open_sum()
    assert is_exact(opened, *without(lost))
    assert opened.facts == facts_of(without(lost), 2)
    assert server.attempts == [1, 2]
    assert [sites for _, _, sites in server.hospitals.desk.expected] == [without(lost)]


@pytest.mark.parametrize("lost", SITES)
def test_who_is_lost_with_its_vector_is_left_out_of_the_sum(server: Server, lost: str) -> None:
    server.lose(VECTOR, lost)
    opened = server.open_sum()
    assert is_exact(opened, *without(lost))
    assert opened.facts == facts_of(SITES, 1)
    assert server.attempts == [1]


@pytest.mark.parametrize("lost", SITES)
@pytest.mark.parametrize("task", [SURVIVORS, UNMASK])
def test_the_vector_of_who_is_lost_afterwards_stays_in_the_sum(
    server: Server, task: str, lost: str
) -> None:
    server.lose(task, lost)
    assert is_exact(server.open_sum(), *SITES)
    assert (UNMASK, lost) not in server.hospitals.asked


@pytest.mark.parametrize("tasks", list(itertools.product(TASKS, repeat=2)))
def test_two_of_five_may_be_lost_whenever_if_three_are_enough(
    server: Server, tasks: tuple[str, str]
) -> None:
    session = 1
    for task in TASKS:
        lost = [site for site, when in zip(("bonn", "ulm"), tasks, strict=True) if when == task]
        server.lose(task, *lost, attempt=session)
        session += bool(lost) and task in (KEYS, SHARES)
    opened = server.open_sum(facts=CURIOUS)
    left_out = [s for s, when in zip(("bonn", "ulm"), tasks, strict=True) if when in TASKS[:3]]
    assert is_exact(opened, *without(*left_out))
    assert opened.facts.attempt == session


def test_losses_one_after_another_cost_a_session_each(server: Server) -> None:
    server.lose(KEYS, "bonn", attempt=1)
    server.lose(SHARES, "ulm", attempt=2)
    opened = server.open_sum()
    assert is_exact(opened, *without("bonn", "ulm"))
    assert server.attempts == [1, 2, 3]
    server.hospitals.come_back()
    assert server.open_sum().facts == facts_of(SITES, 4)


@pytest.mark.parametrize("task", [KEYS, SHARES])
def test_with_fewer_sites_than_the_job_asks_for_no_session_is_begun(task: str) -> None:
    server = Server(minimum_sites=5)
    server.lose(task, "bonn")
    with pytest.raises(RoundFailedError, match="4 sites are left, the job asks for 5") as fault:
        server.open_sum()
    assert "bring the lost sites back" in fault.value.remedy
    assert server.attempts == [1]
    assert server.hospitals.desk.expected == []


def test_a_round_that_has_too_few_sites_from_the_start_asks_nobody(server: Server) -> None:
    with pytest.raises(RoundFailedError, match="2 sites are left, the job asks for 3"):
        server.open_sum(SITES[:2])
    assert server.hospitals.asked == []


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (VECTOR, "3 of 5 sites have sent their vectors, 4 are needed: the sum stays closed"),
        (SURVIVORS, "3 of 5 sites have signed the survivors, 4 are needed"),
        (UNMASK, "3 of 5 sites have sent their shares, 4 are needed"),
    ],
)
def test_below_the_threshold_the_sum_stays_closed_and_another_session_opens_another(
    server: Server, task: str, says: str
) -> None:
    server.lose(task, "bonn", "ulm")
    server.fails(says)
    with pytest.raises(ServerError):
        server.aggregator.session.total()
    server.hospitals.come_back()
    opened = server.open_sum()
    assert opened.facts.attempt == 2
    assert is_exact(opened, *SITES)


@pytest.mark.parametrize("task", TASKS)
def test_if_everybody_is_lost_the_round_fails(server: Server, task: str) -> None:
    server.lose(task, *SITES)
    with pytest.raises(RoundFailedError):
        server.open_sum()


# --- somebody lies -------------------------------------------------------------------------------


JUNK: list[object] = [
    None,
    [],
    {},
    b"fedgestalt",
    {"schema": "fedgestalt.secagg.key-offer/2"},
    {"schema": None},
    {"schema": np.array(["a", "b"])},
    {"schema": ["fedgestalt.secagg.unmask-shares/1"]},
    np.zeros(3),
]


@pytest.mark.parametrize("junk", JUNK, ids=str)
@pytest.mark.parametrize("task", [KEYS, SHARES, VECTOR, SURVIVORS])
def test_junk_ends_the_job_and_names_who_sent_it(server: Server, task: str, junk: object) -> None:
    server.lie(task, "kiel", lambda _: junk)
    server.accuses("kiel", r"site 'kiel': ")


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_junk_instead_of_shares_is_nobodys_loss_but_a_warning(server: Server, junk: object) -> None:
    server.lie(UNMASK, "berlin", lambda _: junk)
    assert is_exact(server.open_sum(), *SITES)
    (warning,) = server.warnings
    assert warning.startswith("site 'berlin': ")


@pytest.fixture(scope="module")
def replies() -> dict[str, dict[str, Any]]:
    """The answers of one site to all tasks of its first session."""
    said: dict[str, dict[str, Any]] = {}

    def heard(task: str, fields: dict[str, Any]) -> dict[str, Any]:
        said[task] = fields
        return fields

    server = Server()
    for task in TASKS:
        server.lie(task, "berlin", functools.partial(heard, task))
    server.open_sum()
    return said


@pytest.mark.parametrize("task", [KEYS, SHARES, VECTOR, SURVIVORS])
@pytest.mark.parametrize("other", TASKS)
def test_the_answer_to_another_task_or_of_another_session_is_refused_and_its_sender_named(
    server: Server, replies: dict[str, dict[str, Any]], task: str, other: str
) -> None:
    server.open_sum()
    server.lie(task, "berlin", lambda _: replies[other])
    server.accuses("berlin", "another session" if task == other else "expected fedgestalt")


@pytest.mark.parametrize("other", TASKS)
def test_other_answers_instead_of_shares_are_no_shares(
    server: Server, replies: dict[str, dict[str, Any]], other: str
) -> None:
    server.open_sum()
    server.lie(UNMASK, "berlin", lambda _: replies[other])
    opened = server.open_sum()
    assert is_exact(opened, *SITES)
    assert len(server.warnings) == 1


def altered(fields: dict[str, Any]) -> dict[str, Any]:
    """Shares of which one is wrong."""
    shares = dict(fields["shares"])
    site, share = next(iter(shares.items()))
    shares[site] = share[:-1] + bytes([share[-1] ^ 1])
    return {**fields, "shares": shares}


@pytest.mark.parametrize("liar", SITES[:4])
def test_wrong_shares_do_not_matter_while_a_threshold_is_right(server: Server, liar: str) -> None:
    server.lie(UNMASK, liar, altered)
    assert is_exact(server.open_sum(), *SITES)
    (warning,) = server.warnings
    assert warning.startswith(f"site {liar!r}: its seed share of site ")


def test_as_many_may_send_wrong_shares_as_may_be_lost(server: Server) -> None:
    for liar in ("berlin", "kiel"):
        server.lie(UNMASK, liar, altered)
    assert is_exact(server.open_sum(facts=CURIOUS), *SITES)
    assert len(server.warnings) == 2


def test_one_more_wrong_answer_keeps_the_sum_closed_and_all_are_named(server: Server) -> None:
    for liar in ("berlin", "ulm"):
        server.lie(UNMASK, liar, altered)
    server.fails("3 of 5 sites have sent their shares, 4 are needed")
    assert [warning[:14] for warning in server.warnings] == ["site 'berlin':", "site 'ulm': it"]
    server.hospitals.lies.clear()
    assert is_exact(server.open_sum(), *SITES)


def test_losses_and_lies_add_up(server: Server) -> None:
    server.lose(VECTOR, "bonn")
    server.lie(UNMASK, "berlin", altered)
    server.fails("3 of 5 sites have sent their shares, 4 are needed")
    assert len(server.warnings) == 1


def test_a_site_that_says_it_has_sent_its_vector_and_has_not_is_named(server: Server) -> None:
    def lost_on_the_way(fields: dict[str, Any]) -> dict[str, Any]:
        server.hospitals.desk.arrived.clear()
        return fields

    server.lie(VECTOR, "kiel", lost_on_the_way)
    server.accuses("kiel", "its upload has 0 of 1 chunks")


@pytest.mark.parametrize("words", [0, 3, 11])
def test_a_vector_of_another_length_closes_the_sum(server: Server, words: int) -> None:
    def other(fields: dict[str, Any]) -> dict[str, Any]:
        server.hospitals.desk.arrived["kiel"] = np.zeros(words, np.uint32)
        return fields

    server.lie(VECTOR, "kiel", other)
    server.fails("the vector of site 'kiel' does not have its words 0 to 12")


def test_an_upload_of_another_session_is_refused(server: Server) -> None:
    server.lie(VECTOR, "kiel", lambda fields: {**fields, "session": bytes(32)})
    server.accuses("kiel", "its upload is of another session")


# --- the server itself ---------------------------------------------------------------------------


def test_what_goes_wrong_with_a_staging_file_costs_the_round(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(first: int, end: int) -> None:
        raise ServerError("a staging file is not what was written to it", where="server")

    with monkeypatch.context() as patch:
        patch.setattr(server.hospitals.desk, "vector", lambda site: broken)
        server.fails("a staging file is not what was written to it")
    assert is_exact(server.open_sum(), *SITES)


def test_a_session_that_nobody_could_agree_to_is_not_begun(server: Server) -> None:
    def strange(roster: tuple[str, ...], attempt: int) -> SessionFacts:
        return replace(facts_of(roster, attempt), threshold=1)

    with pytest.raises(ServerError, match="a threshold of 1 for 5 sites"):
        server.open_sum(facts=strange)
    assert server.hospitals.asked == []
