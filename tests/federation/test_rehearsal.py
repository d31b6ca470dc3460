"""``fedgestalt consortium``: everything a consortium does in its first week, on one machine."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from hospitals import fedgestalt

from fedgestalt.demo.consortium import HOSPITALS, NEWCOMER

pytestmark = pytest.mark.federation


@pytest.mark.timeout(600)
def test_a_rehearsal_trains_matches_grows_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "rehearsal"
    done = fedgestalt("consortium", "--out", str(out), "--rounds", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for which, sites in (("first", HOSPITALS), ("second", (*HOSPITALS, NEWCOMER))):
        trained = json.loads((out / "results" / f"{which}-training.json").read_text())
        matched = json.loads((out / "results" / f"{which}-matching.json").read_text())
        assert trained["sites"] == matched["sites"] == sorted(sites)
        assert matched["ensemble"] == trained["ensemble"]
        assert matched["rows"] > 100 * len(sites)
    left = [p for p in psutil.process_iter(["cmdline"]) if str(out) in str(p.info["cmdline"])]
    assert not left
    assert "Research use only" in done.stderr


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    done = fedgestalt("consortium", "--out", str(tmp_path), folder=tmp_path)
    assert done.returncode == 2
    assert "no earlier rehearsal" in done.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep me"
