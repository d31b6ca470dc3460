"""How a running job stands, by a clock that the tests wind."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from fedgestalt.federation.job import status as status_module
from fedgestalt.federation.job.status import SCHEMA, JobStatus
from fedgestalt.federation.job.watch import SiteWatch

SITES = ("berlin", "bonn", "leuven")


class Job:
    """A job's status, its watch, and the clock of both."""

    def __init__(self, rounds: int) -> None:
        self.now = 500.0
        self.rounds = rounds

    def begin(self) -> None:
        self.status = JobStatus("train_ensemble", self.rounds)
        self.watch = SiteWatch(SITES, dict, 120, 30, lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def phase(self, name: str = "fgm_train") -> None:
        self.status.begin_phase(name, frozenset(SITES))

    def working(self, **fractions: float) -> None:
        for site, fraction in fractions.items():
            self.watch.heard(site, "scratch", fraction)

    def round(self, number: int, seconds: float) -> None:
        """One whole round."""
        self.status.begin_round(number)
        self.phase()
        self.wait(seconds)
        for site in SITES:
            self.status.answered(site, 0)
        self.status.end_round({})

    @property
    def report(self) -> dict[str, Any]:
        return self.status.report(self.watch, SITES)

    @property
    def seconds_left(self) -> float | None:
        return self.report["seconds_left"]  # type: ignore[no-any-return]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    made = Job(rounds=4)
    clock = SimpleNamespace(monotonic=lambda: made.now)
    monkeypatch.setattr(status_module, "time", clock)
    made.begin()
    return made


def test_a_report_says_which_job_it_is_of(job: Job) -> None:
    job.wait(12.34)
    report = job.report
    assert report["schema"] == SCHEMA
    assert report["template"] == "train_ensemble"
    assert (report["round"], report["rounds"]) == (0, 4)
    assert report["seconds"] == 12.3


def test_a_report_is_json(job: Job) -> None:
    job.phase()
    job.working(bonn=0.5)
    job.status.sent("bonn", 10)
    job.status.answered("berlin", 5)
    job.status.warn("a sentence")
    job.round(1, 2.0)
    job.status.end_round({"scratch": {"loss": 1.5}})
    report = job.report
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_report_without_a_watch_is_json_too(job: Job) -> None:
    job.phase()
    report = job.status.report(None, SITES)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["sites"]["bonn"]["heard_seconds_ago"] is None
    assert report["seconds_left"] is None


# --- phases --------------------------------------------------------------------------------------


def test_in_a_phase_all_sites_work_until_they_answer(job: Job) -> None:
    job.phase("fgm_keys")
    job.status.answered("bonn", 3)
    report = job.report
    assert report["phase"] == "fgm_keys"
    states = {site: entry["state"] for site, entry in report["sites"].items()}
    assert states == {"berlin": "working", "bonn": "done", "leuven": "working"}


def test_the_next_phase_has_all_sites_work_again(job: Job) -> None:
    job.phase()
    job.status.answered("bonn", 3)
    job.phase("fgm_publish")
    assert {entry["state"] for entry in job.report["sites"].values()} == {"working"}


def test_a_working_site_shows_its_work_and_a_done_one_does_not(job: Job) -> None:
    job.phase()
    job.working(berlin=0.12345, bonn=0.5)
    job.wait(3)
    job.status.answered("bonn", 3)
    sites = job.report["sites"]
    assert (sites["berlin"]["what"], sites["berlin"]["fraction"]) == ("scratch", 0.123)
    assert (sites["bonn"]["what"], sites["bonn"]["fraction"]) == ("", 1.0)
    assert sites["berlin"]["heard_seconds_ago"] == 3.0
    assert sites["leuven"]["heard_seconds_ago"] is None


def test_an_answer_of_somebody_else_changes_no_site(job: Job) -> None:
    job.phase()
    job.status.answered("mallory", 3)
    assert job.report["sites"].keys() == set(SITES)
    assert {entry["state"] for entry in job.report["sites"].values()} == {"working"}


# --- bytes ---------------------------------------------------------------------------------------


def test_bytes_are_added_up_by_site_and_direction(job: Job) -> None:
    job.phase()
    job.status.sent("bonn", 100)
    job.status.sent("bonn", 20)
    job.status.sent("berlin", 7)
    job.status.answered("bonn", 3)
    job.phase()
    job.status.answered("bonn", 4)
    job.status.answered("leuven", 9)
    assert job.status.transferred == {
        "berlin": {"sent_to": 7, "received_from": 0},
        "bonn": {"sent_to": 120, "received_from": 7},
        "leuven": {"sent_to": 0, "received_from": 9},
    }
    sites = job.report["sites"]
    assert (sites["bonn"]["sent_to"], sites["bonn"]["received_from"]) == (120, 7)


def test_a_site_that_got_nothing_yet_has_no_bytes(job: Job) -> None:
    assert job.status.transferred == {}


def test_a_vector_counts_as_received_and_is_no_answer(job: Job) -> None:
    job.phase("fgm_vector")
    job.status.uploaded("bonn", 4000)
    assert job.report["sites"]["bonn"]["state"] == "working"
    job.status.answered("bonn", 40)
    job.status.uploaded("bonn", 4000)
    assert job.report["sites"]["bonn"]["received_from"] == 8040
    assert job.report["sites"]["berlin"]["received_from"] == 0
    assert job.report["sites"]["bonn"]["sent_to"] == 0


# --- how long it will take -----------------------------------------------------------------------


def test_without_any_sign_nothing_is_said_of_the_time_left(job: Job) -> None:
    job.phase()
    job.wait(60)
    assert job.seconds_left is None


def test_too_small_a_fraction_is_no_sign(job: Job) -> None:
    job.phase()
    job.wait(60)
    job.working(berlin=0.9, bonn=0.04, leuven=0.9)
    assert job.seconds_left is None


def test_in_the_first_round_the_slowest_site_tells_the_time(job: Job) -> None:
    job.status.begin_round(1)
    job.phase()
    job.wait(30)
    job.working(berlin=0.9, bonn=0.25, leuven=0.5)
    # 30 s for a quarter: 90 s for the rest of this round, and three more of 120 s
    assert job.seconds_left == pytest.approx(90 + 3 * 120)


def test_a_site_that_is_done_is_not_the_slowest(job: Job) -> None:
    job.status.begin_round(1)
    job.phase()
    job.wait(30)
    job.working(berlin=0.5, bonn=0.1, leuven=0.5)
    job.status.answered("bonn", 1)
    assert job.seconds_left == pytest.approx(30 + 3 * 60)


def test_after_a_round_the_rest_is_told_from_the_rounds_so_far(job: Job) -> None:
    job.round(1, 10)
    job.round(2, 20)
    assert job.seconds_left == pytest.approx(2 * 15)


def test_within_a_round_the_time_already_spent_is_taken_off(job: Job) -> None:
    job.round(1, 10)
    job.status.begin_round(2)
    job.phase()
    job.wait(4)
    assert job.seconds_left == pytest.approx(30 - 4)


def test_a_round_that_takes_long_leaves_no_negative_time(job: Job) -> None:
    for number in (1, 2, 3):
        job.round(number, 10)
    job.status.begin_round(4)
    job.wait(1000)
    assert job.seconds_left == 0


def test_after_all_rounds_nothing_is_left(job: Job) -> None:
    for number in (1, 2, 3, 4):
        job.round(number, 10)
    assert job.seconds_left == 0


def test_a_job_without_rounds_is_told_from_its_phase(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.rounds = 0
    job.begin()
    job.phase("fgm_enrol")
    job.wait(10)
    job.working(berlin=0.5, bonn=0.5, leuven=0.5)
    assert job.seconds_left == pytest.approx(10)


# --- metrics and warnings ------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_last_round(job: Job) -> None:
    job.status.begin_round(1)
    job.status.end_round({"scratch": {"loss": 2.0}})
    job.status.begin_round(2)
    assert job.report["metrics"] == {"scratch": {"loss": 2.0}}
    assert job.report["round"] == 2


def test_warnings_are_kept_in_order(job: Job) -> None:
    assert job.status.warnings == []
    job.status.warn("first")
    job.status.warn("second")
    assert job.status.warnings == ["first", "second"]
    assert job.report["warnings"] == ["first", "second"]


def test_a_report_does_not_change_afterwards(job: Job) -> None:
    report = job.report
    job.status.warn("later")
    assert report["warnings"] == []
    job.status.warnings.append("from outside")
    assert job.status.warnings == ["later"]
