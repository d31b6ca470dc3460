"""A provisioned consortium trains and matches, three ways to submit, and what its kits forbid."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hospitals import ADMIN, BIN, SERVER, SITES, Hospitals, fedgestalt, matching, nvflare, training
from nvflare.fuel.flare_api.api_spec import AuthorizationError
from nvflare.fuel.hci.client import file_transfer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedgestalt.errors import ServerError
from fedgestalt.federation.operations.admin import AdminSession, read_outcome
from fedgestalt.federation.operations.local import LocalConsortium
from fedgestalt.federation.tasks import JOIN, TRAIN, VECTOR

pytestmark = pytest.mark.federation

MEMBER = "member@example.org"
LIMIT_SECONDS = 90.0


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    """Leuven releases fewer rows than the others; Bonn computes features in two processes."""
    return Hospitals(
        tmp_path_factory.mktemp("consortium"),
        site_policy={"leuven": {"max_released_rows": 50}, "bonn": {"processes": 2}},
        roles={MEMBER: "member"},
    )


@pytest.fixture(scope="module")
def local(hospitals: Hospitals) -> Iterator[LocalConsortium]:
    """The consortium, running."""
    with hospitals.local() as running:
        hospitals.up(running)
        yield running


@pytest.fixture(scope="module")
def trained(hospitals: Hospitals, local: LocalConsortium) -> dict[str, Any]:
    """A training job, submitted with ``nvflare job submit`` and followed with our command."""
    folder = hospitals.render(training(rounds=3))
    kit = hospitals.kit(ADMIN)
    done = nvflare("job", "submit", "-j", str(folder), "--startup-kit", str(kit), folder=kit)
    assert done.returncode == 0, done.stdout + done.stderr
    (newest, *_) = local.session.jobs()
    job = newest["job_id"]
    reports: list[dict[str, Any]] = []
    stats: dict[str, Any] = {}

    def look(status: str, report: dict[str, Any]) -> None:
        if report:
            reports.append(report)
            if not stats and report["phase"]:
                stats.update(local.session.stats(job))
                said = nvflare("job", "stats", job, "--startup-kit", str(kit), folder=kit)
                stats["printed"] = said.stdout

    local.session.watch(job, look, 0.3, LIMIT_SECONDS)
    keep = hospitals.folder / "kept"
    watched = fedgestalt(
        "job", "watch", str(kit), job, "--download", str(keep), "--json", folder=hospitals.folder
    )
    assert watched.returncode == 0, watched.stderr
    said = json.loads(watched.stdout)
    return {**said, "reports": reports, "stats": stats}


def test_nvflare_job_submit_trains_with_all_three(trained: dict[str, Any]) -> None:
    assert trained["status"] == "completed"
    assert trained["flare_status"] == "FINISHED:COMPLETED"
    assert trained["sites"] == list(SITES)
    assert trained["warnings"] == []


def test_a_site_computes_features_in_as_many_processes_as_its_policy_says(
    hospitals: Hospitals, trained: dict[str, Any]
) -> None:
    logs = {site: (hospitals.kit(site) / trained["job"] / "log.txt").read_text() for site in SITES}
    assert {site for site in SITES if "2 processes compute features" in logs[site]} == {"bonn"}


def test_progress_names_round_phase_sites_and_bytes(trained: dict[str, Any]) -> None:
    reports = trained["reports"]
    assert {report["rounds"] for report in reports} == {3}
    assert max(report["round"] for report in reports) == 3
    assert {JOIN, TRAIN} & {report["phase"] for report in reports}
    assert all(set(report["sites"]) == set(SITES) for report in reports)
    assert max(site["received_from"] for site in reports[-1]["sites"].values()) > 50_000
    assert any(report["seconds_left"] is not None for report in reports)


def test_show_stats_of_flare_carries_the_same_report(trained: dict[str, Any]) -> None:
    assert trained["stats"]["server"]["fedgestalt"]["schema"] == "fedgestalt.progress/1"


def test_nvflare_job_stats_prints_it(trained: dict[str, Any]) -> None:
    printed = trained["stats"]["printed"]
    for word in ("fedgestalt", "rounds", "received_from", *SITES):
        assert word in printed


def test_the_downloaded_result_is_readable_without_us(trained: dict[str, Any]) -> None:
    workspace = Path(trained["result"]) / "workspace"
    outcome = json.loads((workspace / "outcome.json").read_text())
    assert outcome["ensemble"] == trained["ensemble"]
    manifest = json.loads((workspace / "ensemble" / "ensemble.json").read_text())
    assert manifest["digest"] == trained["ensemble"]
    (events,) = {path.parent for path in (workspace / "tb_events").rglob("events.*")}
    accumulator = EventAccumulator(str(events)).Reload()
    losses = accumulator.Scalars("fine-tuned/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert losses[-1].value == pytest.approx(outcome["rounds"][-1]["members"]["fine-tuned"]["loss"])


def test_no_log_of_a_site_is_in_the_result(trained: dict[str, Any]) -> None:
    result = Path(trained["result"])
    assert read_outcome(result)
    for path in result.rglob("*"):
        assert not any(site in path.name for site in SITES), path


def test_every_site_recorded_what_left_it(hospitals: Hospitals, trained: dict[str, Any]) -> None:
    for site in SITES:
        lines = (hospitals.store(site) / "sent.jsonl").read_text().splitlines()
        sent = [json.loads(line) for line in lines]
        mine = [line for line in sent if line["job"] == trained["job"]]
        vectors = [line for line in mine if line["message"] == "masked vector"]
        assert [line["task"] for line in vectors] == [VECTOR] * 3
        assert {line["bytes"] for line in vectors} == {
            record["uploaded_bytes_per_site"] for record in trained["rounds"]
        }
        total = sum(line["bytes"] for line in mine)
        assert total == trained["bytes"][site]["received_from"]


def test_the_flare_api_submits_a_matching_job(
    hospitals: Hospitals, local: LocalConsortium, trained: dict[str, Any]
) -> None:
    matched = hospitals.run(local, matching(trained["ensemble"]))
    assert matched["status"] == "completed"
    for site in SITES:
        assert list((hospitals.store(site) / "matches").glob("*.json"))


def test_the_console_submits_a_job_and_a_site_refuses_what_it_does_not_release(
    hospitals: Hospitals, local: LocalConsortium, trained: dict[str, Any]
) -> None:
    kit = hospitals.kit(ADMIN)
    folder = hospitals.render(matching(trained["ensemble"], released_rows=51))
    folder.rename(kit / "transfer" / folder.name)
    before = {job["job_id"] for job in local.session.jobs()}
    said = console(kit, f"submit_job {folder.name}", "list_jobs", "bye")
    (job,) = {job["job_id"] for job in local.session.jobs()} - before
    assert f"Submitted job: {job}" in said
    local.session.watch(job, lambda status, report: None, 0.3, LIMIT_SECONDS)
    watched = fedgestalt("job", "watch", str(kit), job, folder=hospitals.folder)
    assert watched.returncode == 1
    assert "leuven: this site releases 50 rows per query, the job asks for 51" in watched.stdout
    assert "Research use only" in watched.stdout
    assert "Traceback" not in watched.stdout + watched.stderr
    console(kit, f"download_job {job}", "bye")
    assert read_outcome(kit / "transfer" / job)["status"] == "failed"


def test_a_job_with_custom_code_is_refused(hospitals: Hospitals, local: LocalConsortium) -> None:
    folder = hospitals.render(training())
    (folder / "app" / "custom").mkdir()
    (folder / "app" / "custom" / "own.py").write_text("print('own code')\n")
    job = local.session.submit(folder)
    status = local.session.watch(job, lambda *_: None, 0.3, LIMIT_SECONDS)
    assert status == "FINISHED:FAILED_TO_RUN"
    watched = fedgestalt("job", "watch", str(hospitals.kit(ADMIN)), job, folder=hospitals.folder)
    assert watched.returncode == 1
    assert "reason: server: BYOC not permitted" in watched.stdout


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_foreign_class_is_not_built(
    hospitals: Hospitals, local: LocalConsortium, side: str
) -> None:
    folder = hospitals.render(training())
    path = folder / "app" / "config" / f"config_fed_{side}.json"
    config = json.loads(path.read_text())
    target = hospitals.folder / f"built-at-{side}"
    foreign = {"id": "foreign", "path": "pathlib.Path", "args": {"args": [str(target)]}}
    config["components"].append(foreign)
    path.write_text(json.dumps(config))
    job = local.session.submit(folder)
    status = local.session.watch(job, lambda *_: None, 0.3, LIMIT_SECONDS)
    assert status.startswith("FINISHED:")
    assert status != "FINISHED:COMPLETED"
    result = local.session.download(job, hospitals.folder / "refused")
    if side == "server":
        log = local.session.reason(job, result)
    else:
        log = (hospitals.kit(SITES[0]) / job / "log.txt").read_text()
    assert "'pathlib.Path'" in log
    assert "is not in allow_list" in log


def test_an_unsigned_job_is_refused(
    hospitals: Hospitals, local: LocalConsortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_transfer, "sign_folders", lambda *_: None)
    job = local.session.submit(hospitals.render(training()))
    status = local.session.watch(job, lambda *_: None, 0.3, LIMIT_SECONDS)
    assert status == "FINISHED:FAILED_TO_RUN"
    assert "unsigned job rejected" in str(local.session.meta(job))


def test_a_member_may_look_but_not_submit(hospitals: Hospitals, local: LocalConsortium) -> None:
    with AdminSession(hospitals.kit(MEMBER)) as member:
        assert member.connected_sites() == list(SITES)
        with pytest.raises(ServerError, match="may not do that"):
            member.submit(hospitals.render(training()))


@pytest.mark.parametrize("target", ["server", "bonn"])
def test_nobody_runs_shell_commands(local: LocalConsortium, target: str) -> None:
    with pytest.raises(AuthorizationError):
        local.session._session.cat_target(target, file="log.txt")


def test_jobs_lie_in_the_servers_own_folder(hospitals: Hospitals, trained: dict[str, Any]) -> None:
    assert (hospitals.kit(SERVER) / "jobs" / trained["job"]).is_dir()


def console(kit: Path, *commands: str) -> str:
    """Type commands into FLARE's admin console and return what it printed."""
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(kit / "startup" / "fl_admin.sh")],
        input="\n".join([ADMIN, *commands, ""]),
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    return done.stdout
