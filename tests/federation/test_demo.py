"""The demonstration as a user runs it: FLARE's simulator, separate processes, files at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from consortium import tiny_silos

from fedgestalt.cohort import Cohort, RareSplit, write_cohort
from fedgestalt.reporting.result import read_result

pytestmark = [pytest.mark.federation, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """A shell lets what it starts in the background ignore them, and so would our children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


COMMAND = [sys.executable, "-m", "fedgestalt", "demo"]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of 78 images in GMDB layout, as a hospital might bring one."""
    folder = tmp_path_factory.mktemp("cohort")
    silos = list(tiny_silos(folder, ("a", "b", "c")).values())
    splits = [[silo.rare_splits[index] for silo in silos] for index in (0, 1)]
    whole = Cohort(
        name="whole",
        version="v1",
        root=folder,
        images={k: v for s in silos for k, v in s.images.items()},
        syndromes=silos[0].syndromes,
        classes=silos[0].classes,
        train=tuple(i for s in silos for i in s.train),
        frequent_test=tuple(i for s in silos for i in s.frequent_test),
        rare_splits=tuple(
            RareSplit(
                tuple(i for part in parts for i in part.gallery),
                tuple(i for part in parts for i in part.test),
            )
            for parts in splits
        ),
    )
    write_cohort(whole, folder / "whole")
    return folder / "whole"


def test_a_demo_leaves_a_result_and_a_report_and_nothing_else(cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.run(
        [*COMMAND, "--cohort", str(cohort), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "result.json"]
    result = read_result(out / "result.json")
    assert json.loads((out / "result.json").read_text())["schema"] == "fedgestalt.result/1"
    assert [site.name for site in result.sites] == ["hospital-1", "hospital-2", "hospital-3"]
    assert sum(site.images for site in result.sites) == result.cohort.images == 78
    assert {"federated", "centralised", "local-only", "chance"} <= result.evaluation.keys()
    for mode in ("federated", "centralised", "chance"):
        assert result.evaluation[mode].keys() == {
            "frequent",
            "rare",
            "frequent-in-all",
            "rare-in-all",
        }
    assert result.evaluation["chance"]["frequent"].top1 == pytest.approx(1 / 3)
    assert [r.round for r in result.rounds] == list(range(1, 7))
    assert {r.images for r in result.rounds} == {36}
    report = (out / "report.html").read_text()
    assert "Research use only, not a diagnosis" in report
    assert "data:image" not in report, "a folder may hold patients: no face may show"
    assert "SUBJECT-" not in report


def test_an_interrupted_demo_says_so_and_leaves_an_earlier_result_alone(
    cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("earlier")
    process = subprocess.Popen(
        [*COMMAND, "--cohort", str(cohort), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 60
    children: list[psutil.Process] = []
    while time.monotonic() < deadline and len(children) < 4:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.2)
    assert len(children) >= 4, "server and sites have not started"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in said
    assert "Traceback" not in said
    assert (out / "result.json").read_text() == "earlier"
    assert [p.name for p in out.iterdir()] == ["result.json"]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_an_interrupt_from_the_keyboard_during_the_comparison_leaves_no_traceback(
    cohort: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "--cohort", str(cohort), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    said = ""
    while "Comparing with" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    said += process.stderr.read()
    assert process.wait(60) == 1
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not list(out.iterdir())
