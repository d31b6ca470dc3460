"""Jobs that were running when the server ended: closed when it starts again.

FLARE 2.9 leaves them ``RUNNING`` for ever, where nobody can abort them. A component of the server's
own resources, outside the reach of any job.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import Job, RunStatus

import fedgestalt
from fedgestalt.federation.job.progress import OUTCOME_FILE, write_outcome

REASON: Final = (
    "the server ended while this job ran; nothing was published, and the sites have ended their"
    " part: submit the job again."
)


class UnfinishedJobs(FLComponent):
    """Gives every job that an earlier server left running an outcome and an end."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Act once, before the server schedules its first job."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            manager = fl_ctx.get_engine().get_component(SystemComponents.JOB_MANAGER)
            for job in manager.get_jobs_by_status(
                [RunStatus.RUNNING, RunStatus.DISPATCHED], fl_ctx
            ):
                try:
                    self._close(job, fl_ctx)
                except Exception as error:  # noqa: BLE001  the server must start all the same
                    self.log_error(fl_ctx, f"job {job.job_id} cannot be closed: {error}")

    def _close(self, job: Job, fl_ctx: FLContext) -> None:
        manager = fl_ctx.get_engine().get_component(SystemComponents.JOB_MANAGER)
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        folder = Path(workspace.get_run_dir(job.job_id))
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / OUTCOME_FILE).exists():
            outcome = {
                "fedgestalt": fedgestalt.__version__,
                "notice": fedgestalt.RESEARCH_USE_ONLY,
                "job": job.job_id,
                "status": "failed",
                "reason": REASON,
                "warnings": [],
            }
            write_outcome(folder, outcome)
        manager.save_workspace(job.job_id, [str(folder)], fl_ctx)
        manager.set_status(job.job_id, RunStatus.ABANDONED, fl_ctx)
        shutil.rmtree(folder)
        self.log_warning(fl_ctx, f"job {job.job_id}: {REASON}")
