"""The tutorial, executed command by command out of the document itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest
from walkthrough import shell_script

from fedgestalt.federation.operations.local import free_port

pytestmark = pytest.mark.federation

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "tutorials" / "first-consortium.md"


@pytest.mark.timeout(900)
def test_a_first_time_administrator_gets_from_nothing_to_finished_jobs(tmp_path: Path) -> None:
    trial = tmp_path / "trial"
    script = shell_script(
        DOCUMENT, {"build/first-consortium": str(trial), "PORT=8002": f"PORT={free_port()}"}
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    log = tmp_path / "said.txt"
    try:
        with log.open(
            "wb"
        ) as output:  # no pipe: what the start scripts leave running would hold it
            done = subprocess.run(
                ["bash", "-c", script],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=800,
                env=environment,
                stdin=subprocess.DEVNULL,
            )
    finally:
        _end_all(trial)
    said = log.read_text()
    assert done.returncode == 0, said[-4000:]
    assert said.count(": completed (FINISHED:COMPLETED)") == 2
    assert "Submitted job: " in said
    assert "\nReady" in said
    (outcome,) = (trial / "results").glob("*/workspace/outcome.json")
    assert json.loads(outcome.read_text())["status"] == "completed"
    for site in ("berlin", "bonn", "leuven"):
        assert list((trial / "hospitals" / site / "store" / "matches").glob("*.json"))


def test_the_tutorial_stops_what_it_starts() -> None:
    script = shell_script(DOCUMENT)
    assert script.count("startup/start.sh") == 2 * 2  # each command is shown, then run
    assert "'shutdown all' 'y'" in script


def _end_all(folder: Path) -> None:
    """Whatever the shutdown left: FLARE's start scripts sleep for some seconds."""
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in str(p.info["cmdline"])]
    psutil.wait_procs(mine, timeout=20)
    for process in mine:
        if process.is_running():
            process.kill()
