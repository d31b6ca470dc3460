"""Starts a site's job processes so that one that is killed is this site's loss alone.

FLARE 2.9 ends a whole job when the job process of one site is killed. A process that ends by a
signal (out of memory, an operator's ``kill``) is reported as unknown instead; the job's own
watch over its sites then decides what becomes of it.
"""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobHandleSpec, JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher

_SIGNALLED = range(129, 129 + 64)
"""How shells report a signal; Python gives it as a negative code."""


class SiteJobLauncher(ClientProcessJobLauncher):
    """The ``process_launcher`` of every site's resources."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> JobHandleSpec:
        """Start the job process."""
        return _Handle(super().launch_job(job_meta, fl_ctx))


class _Handle(JobHandleSpec):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner

    def terminate(self) -> None:
        self._inner.terminate()

    def wait(self) -> None:
        self._inner.wait()

    def poll(self) -> Any:
        code = self._inner.adapter.poll()
        if code is not None and (code < 0 or code in _SIGNALLED):
            return JobReturnCode.UNKNOWN
        return self._inner.poll()
