"""How a running job is shown."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fedgestalt.federation.operations.view import JobView, duration, headline, size
from fedgestalt.federation.tasks import ANSWERS, PHASES


def report(**changes: Any) -> dict[str, Any]:
    """A report in the middle of round 2 of 5."""
    site = {"what": "scratch", "heard_seconds_ago": 1.0, "sent_to": 1_500_000, "received_from": 0}
    fields = {
        "phase": "fgm_train",
        "round": 2,
        "rounds": 5,
        "seconds_left": 200.0,
        "sites": {
            "berlin": {"state": "working", "fraction": 0.25, **site},
            "bonn": {"state": "done", "fraction": 1.0, **site},
        },
        "warnings": [],
    }
    return {**fields, **changes}


def written(*steps: tuple[str, dict[str, Any]], terminal: bool = False) -> str:
    """What a view writes for a sequence of reports."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    with JobView("job-1", console) as view:
        for status, fields in steps:
            view.show(status, fields, ["berlin", "bonn"])
    return out.getvalue()


def test_every_task_has_words_for_people() -> None:
    assert PHASES.keys() == ANSWERS.keys()


def test_the_headline_names_round_phase_sites_time_and_bytes() -> None:
    assert headline("RUNNING", report(), (), []) == (
        "round 2 of 5: the sites train, waiting for berlin 25%, about 3 min left, 3.0 MB so far"
    )


def test_a_job_without_rounds_names_its_phase() -> None:
    said = headline("RUNNING", report(round=0, rounds=0, phase="fgm_enrol"), (), [])
    assert said.startswith("the sites encode their patients, waiting for")


def test_a_waiting_job_names_the_sites_that_are_absent() -> None:
    said = headline("SUBMITTED", {}, ("berlin", "bonn", "leuven"), ["berlin"])
    assert said == "waiting for bonn, leuven to connect (connected: berlin)"


def test_a_waiting_job_that_takes_whoever_is_there_waits_for_the_server() -> None:
    assert headline("SUBMITTED", {}, (), []) == "waiting for the server to start it"


def test_an_unknown_phase_of_another_version_is_no_fault() -> None:
    assert headline("RUNNING", report(phase="fgm_new"), (), []).startswith("round 2 of 5: starting")


def test_lines_are_not_repeated_while_nothing_changes() -> None:
    said = written(("RUNNING", report()), ("RUNNING", report()), ("RUNNING", report(round=3)))
    assert said.count("round 2 of 5") == 1
    assert said.count("round 3 of 5") == 1


def test_a_warning_is_shown_once() -> None:
    warned = report(warnings=["site 'bonn': its clock is behind."])
    said = written(("RUNNING", warned), ("RUNNING", warned))
    assert said.count("its clock is behind") == 1


def test_a_terminal_gets_a_table_with_every_site() -> None:
    said = written(("RUNNING", report()), terminal=True)
    for word in ("berlin", "bonn", "scratch", "done", "1.5 MB"):
        assert word in said


def test_a_silent_site_is_called_silent() -> None:
    fields = report()
    fields["sites"]["berlin"]["heard_seconds_ago"] = 12.0
    assert "silent for 12 s" in written(("RUNNING", fields), terminal=True)


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (261_000_000, "261.0 MB")]
)
def test_bytes_are_for_people(count: int, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h")]
)
def test_seconds_are_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
