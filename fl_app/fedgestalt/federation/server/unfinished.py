"""Jobs that were running when the server ended: closed when it starts again.

FLARE 2.9 leaves them ``RUNNING`` for ever, where nobody can abort them. It also waits for the job
process of a site that has started again meanwhile, and calls a job abnormal that completed without
that site. A component of the server's own resources, outside the reach of any job.
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
from nvflare.apis.workspace import Workspace

import fedgestalt
from fedgestalt.federation.job.progress import OUTCOME_FILE, write_outcome
from fedgestalt.federation.training.checkpoints import CHECKPOINTS_FOLDER, ServerCheckpoints

REASON: Final = (
    "the server ended while this job ran; nothing was published, and the sites have ended their"
    " part: submit the job again"
)


class UnfinishedJobs(FLComponent):
    """Gives every job that an earlier server, or an earlier process of a site, left an end."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Act before the server schedules its first job, and when a site registers."""
        if event_type == EventType.CLIENT_REGISTER_PROCESSED:
            runner = fl_ctx.get_engine().job_runner
            site = fl_ctx.get_peer_context().get_identity_name()
            for job in runner.get_client_outcome_jobs(site):
                runner.resolve_client_outcome(job, site)
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
                "reason": self._reason(job.job_id, workspace),
                "warnings": [],
            }
            write_outcome(folder, outcome)
        manager.save_workspace(job.job_id, [str(folder)], fl_ctx)
        manager.set_status(job.job_id, RunStatus.ABANDONED, fl_ctx)
        shutil.rmtree(folder)
        self.log_warning(fl_ctx, f"job {job.job_id}: {REASON}")

    def _reason(self, job: str, workspace: Workspace) -> str:
        checkpoints = ServerCheckpoints(Path(workspace.get_root_dir()) / CHECKPOINTS_FOLDER)
        if not checkpoints.has(job):
            return f"{REASON}."
        return f"{REASON}, with resume_from={job} to go on from its last complete round."
