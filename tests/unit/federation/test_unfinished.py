"""A server that starts again closes the jobs that an earlier one left running."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus

from fedgestalt.federation.server.unfinished import REASON, UnfinishedJobs
from fedgestalt.federation.training.checkpoints import CHECKPOINTS_FOLDER


class Manager:
    """FLARE's job manager, as far as it is asked."""

    def __init__(self, running: list[str], broken: str = "") -> None:
        self.running, self.broken = running, broken
        self.statuses: dict[str, RunStatus] = {}
        self.saved: dict[str, dict[str, Any]] = {}

    def get_jobs_by_status(self, statuses: list[RunStatus], fl_ctx: object) -> list[object]:
        assert statuses == [RunStatus.RUNNING, RunStatus.DISPATCHED]
        return [SimpleNamespace(job_id=job) for job in self.running]

    def save_workspace(self, job: str, folders: list[str], fl_ctx: object) -> None:
        if job == self.broken:
            raise OSError(28, "No space left on device")
        self.saved[job] = json.loads((Path(folders[0]) / "outcome.json").read_text())

    def set_status(self, job: str, status: RunStatus, fl_ctx: object) -> None:
        self.statuses[job] = status


def start(manager: Manager, root: Path, event: str = EventType.SYSTEM_BOOTSTRAP) -> None:
    context = FLContext()
    engine = SimpleNamespace(
        get_component=lambda name: manager, fire_event=lambda event, context: None
    )
    workspace = SimpleNamespace(
        get_run_dir=lambda job: str(root / job), get_root_dir=lambda: str(root)
    )
    context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True)
    context.get_engine = lambda *arguments, **keywords: engine
    UnfinishedJobs().handle_event(event, context)


def test_a_job_left_running_gets_an_outcome_and_an_end(tmp_path: Path) -> None:
    manager = Manager(["job-1"])
    start(manager, tmp_path)
    assert manager.statuses == {"job-1": RunStatus.ABANDONED}
    assert manager.saved["job-1"]["status"] == "failed"
    assert manager.saved["job-1"]["reason"] == f"{REASON}."
    assert not (tmp_path / "job-1").exists(), "its files lie in the job store now"


def test_a_job_with_a_checkpoint_says_how_to_go_on(tmp_path: Path) -> None:
    kept = tmp_path / CHECKPOINTS_FOLDER / "job-1"
    kept.mkdir(parents=True)
    (kept / "checkpoint.json").write_text("{}")
    manager = Manager(["job-1"])
    start(manager, tmp_path)
    assert "with resume_from=job-1 to go on" in manager.saved["job-1"]["reason"]


def test_an_outcome_that_was_written_already_is_kept(tmp_path: Path) -> None:
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1" / "outcome.json").write_text('{"status": "completed"}')
    manager = Manager(["job-1"])
    start(manager, tmp_path)
    assert manager.saved == {"job-1": {"status": "completed"}}


def test_a_job_that_cannot_be_closed_does_not_keep_the_server_from_starting(
    tmp_path: Path,
) -> None:
    manager = Manager(["job-1", "job-2"], broken="job-1")
    start(manager, tmp_path)
    assert manager.statuses == {"job-2": RunStatus.ABANDONED}


@pytest.mark.parametrize("event", [EventType.START_RUN, EventType.END_RUN, EventType.SYSTEM_END])
def test_nothing_is_closed_later(tmp_path: Path, event: str) -> None:
    manager = Manager(["job-1"])
    start(manager, tmp_path, event)
    assert not manager.statuses
