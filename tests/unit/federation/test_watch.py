"""Which sites are alive, by a clock that the tests wind."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.federation.job import watch as watch_module
from fedgestalt.federation.job.watch import SiteState, SiteWatch, pause_between_pings

SITES = ("berlin", "bonn", "leuven")
START_LIMIT, SILENCE_LIMIT = 120.0, 30.0


class Clock:
    """Seconds since the watch began."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Watched:
    """A watch whose sites answer what the test says."""

    def __init__(self) -> None:
        self.clock, self.answers = Clock(), dict[str, object]()
        self.watch = SiteWatch(SITES, self._ask, START_LIMIT, SILENCE_LIMIT, self.clock)

    def _ask(self) -> Mapping[str, object]:
        return self.answers

    def ask(self, answers: Mapping[str, object]) -> None:
        self.answers = dict(answers)
        self.watch.step()


@pytest.fixture
def watched() -> Watched:
    return Watched()


ALIVE = {"what": "", "fraction": 0.0}


# --- lost sites ----------------------------------------------------------------------------------


def test_at_the_start_nobody_is_lost(watched: Watched) -> None:
    assert watched.watch.lost(SITES) == {}


def test_a_site_may_take_its_time_to_come_up(watched: Watched) -> None:
    watched.clock.wait(START_LIMIT)
    assert watched.watch.lost(SITES) == {}


def test_a_site_that_never_came_up_is_lost_after_the_start_limit(watched: Watched) -> None:
    watched.clock.wait(START_LIMIT - 1)
    watched.ask({"berlin": ALIVE, "bonn": ALIVE})
    watched.clock.wait(2)
    assert watched.watch.lost(SITES) == {
        "leuven": "its job process has not come up within 120 seconds"
    }


def test_a_site_that_fell_silent_is_lost_after_the_silence_limit(watched: Watched) -> None:
    watched.ask(dict.fromkeys(SITES, ALIVE))
    watched.clock.wait(SILENCE_LIMIT)
    assert watched.watch.lost(SITES) == {}
    watched.ask({"berlin": ALIVE, "leuven": ALIVE})
    watched.clock.wait(1)
    (site,) = lost = watched.watch.lost(SITES)
    assert site == "bonn"
    assert "silent for 31 seconds" in lost["bonn"]
    assert "killed, ran out of memory, or lost its connection" in lost["bonn"]


def test_the_start_limit_does_not_hold_for_a_site_that_came_up(watched: Watched) -> None:
    for _ in range(10):
        watched.ask({"bonn": ALIVE})
        watched.clock.wait(SILENCE_LIMIT)
    assert watched.watch.lost(["bonn"]) == {}


def test_a_site_that_came_back_is_not_lost(watched: Watched) -> None:
    watched.ask({"bonn": ALIVE})
    watched.clock.wait(SILENCE_LIMIT + 5)
    assert "bonn" in watched.watch.lost(SITES)
    watched.ask({"bonn": ALIVE})
    assert "bonn" not in watched.watch.lost(SITES)


def test_only_the_sites_that_are_asked_for_are_called_lost(watched: Watched) -> None:
    watched.clock.wait(START_LIMIT + 1)
    assert watched.watch.lost(["bonn"]).keys() == {"bonn"}
    assert watched.watch.lost([]) == {}


def test_a_site_is_up_from_its_first_sign_of_life_until_it_has_been_silent_for_too_long(
    watched: Watched,
) -> None:
    assert not watched.watch.is_up("bonn")
    watched.ask({"bonn": ALIVE})
    watched.clock.wait(SILENCE_LIMIT)
    assert watched.watch.is_up("bonn")
    assert not watched.watch.is_up("berlin")
    watched.clock.wait(0.1)
    assert not watched.watch.is_up("bonn")
    watched.ask({"bonn": ALIVE})
    assert watched.watch.is_up("bonn")


def test_a_site_that_may_still_come_up_is_neither_up_nor_lost(watched: Watched) -> None:
    watched.clock.wait(START_LIMIT)
    assert watched.watch.lost(SITES) == {}
    assert not any(map(watched.watch.is_up, SITES))


def test_an_answer_to_a_task_is_a_sign_of_life(watched: Watched) -> None:
    watched.ask({"bonn": ALIVE})
    watched.clock.wait(SILENCE_LIMIT + 1)
    watched.watch.heard("bonn")
    assert watched.watch.lost(["bonn"]) == {}


# --- what a site is doing ------------------------------------------------------------------------


def test_nothing_is_known_of_a_site_before_it_answers(watched: Watched) -> None:
    assert watched.watch.state("bonn") == SiteState(None, "", 0.0)


def test_a_site_tells_its_work_and_the_time_since_it_did(watched: Watched) -> None:
    watched.ask({"bonn": {"what": "encoding", "fraction": 0.25}})
    watched.clock.wait(4)
    assert watched.watch.state("bonn") == SiteState(4, "encoding", 0.25)
    assert watched.watch.state("berlin") == SiteState(None, "", 0.0)


def test_an_answer_to_a_task_does_not_change_the_work(watched: Watched) -> None:
    watched.ask({"bonn": {"what": "encoding", "fraction": 0.5}})
    watched.clock.wait(4)
    watched.watch.heard("bonn")
    assert watched.watch.state("bonn") == SiteState(0, "encoding", 0.5)


@pytest.mark.parametrize(
    ("said", "fraction"),
    [
        (-1, 0.0),
        (-math.inf, 0.0),
        (1.5, 1.0),
        (math.inf, 1.0),
        (10**400, 1.0),
        (-(10**400), 0.0),
        (math.nan, 0.0),
        (1, 1.0),
    ],
)
def test_a_fraction_is_kept_between_nothing_and_all(
    watched: Watched, said: float, fraction: float
) -> None:
    watched.ask({"bonn": {"what": "encoding", "fraction": said}})
    state = watched.watch.state("bonn")
    assert state == SiteState(0, "encoding", fraction)
    assert isinstance(state.fraction, float)


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"what": "encoding"},
        {"fraction": 0.5},
        {"what": 7, "fraction": 0.5},
        {"what": "encoding", "fraction": "0.5"},
        {"what": "encoding", "fraction": None},
        {"what": "encoding", "fraction": [0.5]},
        {"what": "\x1b[2J", "fraction": 0.5},
        {"what": "two\nlines", "fraction": 0.5},
    ],
)
def test_a_malformed_answer_is_a_sign_of_life_and_no_work(
    watched: Watched, answer: dict[str, object]
) -> None:
    watched.ask({"bonn": {"what": "encoding", "fraction": 0.5}})
    watched.clock.wait(5)
    watched.ask({"bonn": answer})
    assert watched.watch.state("bonn") == SiteState(0, "", 0.0)


@pytest.mark.parametrize("answer", [None, "alive", 1, ["encoding", 0.5]])
def test_what_is_no_answer_is_no_sign_of_life(watched: Watched, answer: object) -> None:
    watched.ask({"bonn": answer})
    assert watched.watch.state("bonn").heard_seconds_ago is None


def test_the_name_of_the_work_is_cut(watched: Watched) -> None:
    watched.ask({"bonn": {"what": "x" * 1000, "fraction": 0.5}})
    assert len(watched.watch.state("bonn").what) == 64


# --- its thread ----------------------------------------------------------------------------------


def test_the_watch_asks_again_and_again_until_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch_module, "PING_SECONDS", 0.001)
    asked = threading.Semaphore(0)

    def ask() -> dict[str, object]:
        asked.release()
        return {"bonn": ALIVE}

    watch = SiteWatch(SITES, ask, START_LIMIT, SILENCE_LIMIT)
    watch.start()
    assert all(asked.acquire(timeout=10) for _ in range(3))
    watch.stop()
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    assert watch.state("bonn").heard_seconds_ago is not None


def test_a_question_that_fails_does_not_end_the_watch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch_module, "PING_SECONDS", 0.001)
    answered, failures = threading.Event(), [RuntimeError("the engine is busy")]

    def ask() -> dict[str, object]:
        if failures:
            raise failures.pop()
        answered.set()
        return {}

    watch = SiteWatch(SITES, ask, START_LIMIT, SILENCE_LIMIT)
    with caplog.at_level(logging.ERROR):
        watch.start()
        assert answered.wait(10)
        watch.stop()
        watch._thread.join(10)
    assert "could not be asked whether they are alive" in caplog.text


@given(sites=st.integers(1, 500), silence=st.floats(10, 3600))
def test_many_sites_are_asked_less_often_but_often_enough(sites: int, silence: float) -> None:
    pause = pause_between_pings(sites, silence)
    assert pause >= 2
    assert pause <= silence / 4
    assert sites / pause <= 1.5 + 1e-9 or pause == silence / 4
    assert pause_between_pings(3, 30) == 2
    assert pause_between_pings(15, 60) == 10
