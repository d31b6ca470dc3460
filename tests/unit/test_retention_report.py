"""Tables and picture of the retention study, from made-up runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import retention
from retention_report import Draws, Group, picture, summarise, table, write_report
from retention_study import SIDES, Schedule, Setting

from fedgestalt.errors import DataError

SUBJECTS = ["a", "a", "b", "c", "d"]
SYNDROMES = [1, 1, 1, 1, 2]


def line(
    ranks: list[Any], side: str = "federated", seed: int = 1, **changes: Any
) -> dict[str, Any]:
    place = {} if side == "centralised" else {"sites": 4, "split": "near-uniform"}
    rule = {"rule": "mean"} if side == "federated" else {}
    usual = {"schedule": SIDES[side], **place, **rule}
    setting = Setting("synthetic", seed, side, **{**usual, **changes})
    facts = json.loads(json.dumps(setting.facts()))
    return {
        "setting": facts,
        "cpu_seconds": 1.0,
        "subjects": SUBJECTS,
        "syndromes": SYNDROMES,
        "ranks": dict.fromkeys(("ensemble", "fine-tuned", "original"), ranks),
    }


def row_of(rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
    (row,) = [row for row in rows if row["side"] == side]
    return row


def test_accuracy_is_the_mean_over_syndromes_and_a_lacking_syndrome_is_a_miss() -> None:
    rows = summarise([line([1, 3, 0, 7, 1], "centralised")])
    accuracy = row_of(rows, "centralised")["accuracy"]["ensemble"]
    assert accuracy["top1"][0] == (1 / 4 + 1) / 2
    assert accuracy["top5"][0] == (2 / 4 + 1) / 2
    assert accuracy["top10"][0] == (3 / 4 + 1) / 2
    assert accuracy["top1"][1] < accuracy["top1"][0] < accuracy["top1"][2]


def test_a_federation_that_ranks_alike_keeps_exactly_everything() -> None:
    ranks = [[1, 3, 0, 7, 1], [1, 1, 2, 1, 4]]
    runs = [line(r, side, s) for s, r in enumerate(ranks) for side in ("centralised", "federated")]
    row = row_of(summarise(runs), "federated")
    assert row["seeds"] == [0, 1]
    assert row["retention"]["ensemble"]["top5"] == [1, 1, 1]


def test_retention_is_of_the_seeds_that_both_sides_have() -> None:
    runs = [
        line([1, 1, 1, 1, 1], "centralised", 1),
        line([9, 9, 9, 9, 9], "centralised", 2),
        line([1, 1, 2, 2, 1], "federated", 1),
    ]
    row = row_of(summarise(runs), "federated")
    assert row["retention"]["ensemble"]["top1"][0] == 0.75
    assert row["retention_by_seed"]["ensemble"] == [[0.75, 1.0, 1.0]]


def test_a_hospital_alone_ranks_everybodys_queries_and_its_own() -> None:
    alone = line([[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]], "local-only") | {"homes": [0, 0, 0, 0, 1]}
    rows = summarise([line([1] * 5, "centralised"), alone])
    accuracy = row_of(rows, "local-only")["accuracy"]
    assert accuracy["ensemble"]["top1"][0] == 0.5
    assert accuracy["ensemble, own queries"]["top1"][0] == 1.0


def test_two_baselines_are_refused() -> None:
    other = line([1] * 5, "centralised", schedule=Schedule(1, 20))
    with pytest.raises(SystemExit, match="exactly 1"):
        summarise([line([1] * 5, "centralised"), other])


def test_the_report_is_a_table_a_summary_and_a_well_formed_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    impossible = line([], sites=16)
    del impossible["ranks"], impossible["subjects"], impossible["syndromes"]
    runs = [
        line([1] * 5, "centralised"),
        line([1, 1, 2, 2, 1]),
        impossible | {"impossible": "too few"},
    ]
    write_report(runs, tmp_path)
    shown = capsys.readouterr().out
    assert "0.750" in shown
    assert "too few" in shown
    rows = json.loads((tmp_path / "retention.json").read_text())
    assert {row["side"] for row in rows} == {"centralised", "federated"}
    drawn = ET.fromstring((tmp_path / "retention.svg").read_text())
    dots = [e for e in drawn.iter() if e.tag.endswith("circle") and e.get("r") == "3.6"]
    assert len(dots) == 3, "one for each k"
    assert picture(rows, ["mean"]) == (tmp_path / "retention.svg").read_text()
    assert "untouched" in shown
    assert len(table(rows).splitlines()) == 6


def test_a_method_is_named_by_its_rule_and_by_what_is_unusual() -> None:
    usual = SIDES["federated"]
    unusual = Schedule(40, 1, {**usual.training, "proximal": 0.1}, 0.8, "full")
    names = [Group.of(line([1] * 5, schedule=each)).method for each in (usual, unusual)]
    assert names == ["mean", "mean, 40 x 1, proximal 0.1, momentum 0.8, full neck"]


def test_every_option_reaches_the_runs() -> None:
    usual = SIDES["federated"]
    words = "--seeds 1 --sides federated --sites 8 --splits dirichlet-1 --rules mean"
    (setting,) = retention.settings(retention.read_arguments(words.split()))
    assert setting.schedule == usual
    words += " --schedules 10x2 --training softmax=present --momentum 0.8 --neck full --validation"
    (setting,) = retention.settings(retention.read_arguments(words.split()))
    schedule = Schedule(10, 2, {**usual.training, "softmax": "present"}, 0.8, "full")
    assert setting == Setting(
        "synthetic", 1, "federated", 8, "dirichlet-1", "mean", schedule, on_validation=True
    )


def test_a_second_call_runs_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Setting] = []

    def run(setting: Setting, photographs: object) -> dict[str, Any]:
        ran.append(setting)
        if setting.sites == 16:
            raise DataError("too few subjects")
        return {"ranks": {}}

    monkeypatch.setattr(retention, "open_photographs", lambda name, neck: None)
    monkeypatch.setattr(retention, "run", run)
    wanted = [Setting("synthetic", 1, "federated", n, "near-uniform", "mean") for n in (4, 8, 16)]
    retention.run_all(wanted[:1], tmp_path)
    results = tmp_path / "runs.jsonl"
    results.write_text(results.read_text() + '{"setting": {"cohort": "synth')
    retention.run_all(wanted, tmp_path)
    retention.run_all(wanted, tmp_path)
    assert ran == wanted
    lines = retention.read_lines(tmp_path)
    assert [line["setting"]["sites"] for line in lines] == [4, 8, 16]
    assert "too few" in lines[2]["impossible"]


def test_a_drawn_subject_brings_all_its_photographs() -> None:
    """Two right ones of one subject, a wrong one of another: no draw has a third of them right."""
    run = line([1, 1, 2], "centralised") | {"subjects": ["a", "a", "b"], "syndromes": [1, 1, 1]}
    found = Draws([run]).accuracy(run, "ensemble")[0]
    assert found[0] == 2 / 3
    assert set(found) == {0, 2 / 3, 1}


def test_settings_that_differ_have_lines_of_their_own() -> None:
    words = ["--cohort", "synthetic", "--seeds", "1", "--sides", "federated", "--sites", "4"]
    words += ["--splits", "near-uniform", "--rules", "adaptive", "mean"]
    changes: list[list[str]] = [
        [],
        ["--server-learning-rate", "0.5"],
        ["--server-optimiser", "sgd"],
        ["--server-optimiser", "adam"],
        ["--momentum", "0.1"],
        ["--training", "batch_norm=local"],
    ]
    found = {
        retention.key_of(setting.facts())
        for change in changes
        for setting in retention.settings(retention.read_arguments(words + change))
    }
    assert len(found) == 2 * len(changes) - 2, "each rule has one of the two optimisers anyway"
    methods = {Group.of({"setting": json.loads(key)}).method for key in found}
    assert len(methods) == len(found)
