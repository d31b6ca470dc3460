"""How a site's job process ended, as FLARE is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle, ProcessJobLauncher
from nvflare.fuel.common.exit_codes import ProcessExitCode
from nvflare.utils.process_utils import ProcessAdapter, spawn_process

from fedgestalt.federation.site.launcher import SiteJobLauncher, _Handle


class Ended(ProcessAdapter):
    """A process that ended with ``code``, or still runs."""

    def __init__(self, code: int | None) -> None:
        super().__init__(pid=1)
        self.code = code
        self.calls: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.calls.append("terminate")

    def wait(self) -> None:
        self.calls.append("wait")


@pytest.mark.parametrize(
    "code",
    [-signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV, -1, 129, 128 + 9, 128 + 15, 192],
)
def test_a_death_by_signal_is_unknown(code: int) -> None:
    assert _Handle(ProcessHandle(process_adapter=Ended(code))).poll() == JobReturnCode.UNKNOWN


def test_flare_alone_would_call_it_an_error_of_the_whole_job() -> None:
    handle = ProcessHandle(process_adapter=Ended(-signal.SIGKILL))
    assert handle.poll() == JobReturnCode.EXECUTION_ERROR


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0, JobReturnCode.SUCCESS),
        (1, JobReturnCode.EXECUTION_ERROR),
        (9, JobReturnCode.ABORTED),
        (2, JobReturnCode.EXECUTION_ERROR),
        (ProcessExitCode.CONFIG_ERROR, JobReturnCode.EXECUTION_ERROR),
        (128, JobReturnCode.EXECUTION_ERROR),
        (193, JobReturnCode.EXECUTION_ERROR),
        (255, JobReturnCode.EXECUTION_ERROR),
        (None, JobReturnCode.UNKNOWN),
    ],
)
def test_other_ends_are_told_as_flare_tells_them(code: int | None, said: int) -> None:
    inner = ProcessHandle(process_adapter=Ended(code))
    assert _Handle(inner).poll() == said == inner.poll()


def test_ending_and_waiting_reach_the_process() -> None:
    process = Ended(None)
    handle = _Handle(ProcessHandle(process_adapter=process))
    handle.terminate()
    handle.wait()
    assert process.calls == ["terminate", "wait"]


# --- real processes ------------------------------------------------------------------------------

Launch = Callable[[str], _Handle]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launches Python code through FLARE's launcher, in place of a job."""
    started: list[ProcessAdapter] = []

    def launched(code: str) -> _Handle:
        def launch_job(self: object, job_meta: object, fl_ctx: object) -> ProcessHandle:
            started.append(spawn_process([sys.executable, "-c", code], dict(os.environ)))
            return ProcessHandle(process_adapter=started[-1])

        monkeypatch.setattr(ProcessJobLauncher, "launch_job", launch_job)
        handle = SiteJobLauncher().launch_job({}, FLContext())
        assert isinstance(handle, _Handle)
        return handle

    yield launched
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()


def ended(handle: _Handle) -> int:
    deadline = time.monotonic() + 60
    while handle._inner.adapter.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(handle.poll())


def test_a_job_process_that_the_system_kills_is_unknown(launch: Launch) -> None:
    handle = launch("import time; time.sleep(600)")
    assert handle.poll() == JobReturnCode.UNKNOWN
    os.kill(handle._inner.adapter.pid, signal.SIGKILL)
    assert ended(handle) == JobReturnCode.UNKNOWN
    assert handle._inner.poll() == JobReturnCode.EXECUTION_ERROR


def test_a_job_process_that_its_handle_ends_is_unknown(launch: Launch) -> None:
    handle = launch("import time; time.sleep(600)")
    handle.terminate()
    handle.wait()
    assert ended(handle) == JobReturnCode.UNKNOWN


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, JobReturnCode.SUCCESS), (1, JobReturnCode.EXECUTION_ERROR), (9, JobReturnCode.ABORTED)],
)
def test_a_job_process_that_ends_by_itself_says_how(launch: Launch, code: int, said: int) -> None:
    assert ended(launch(f"raise SystemExit({code})")) == said


def test_a_job_process_behind_a_shell_that_is_killed_is_unknown(launch: Launch) -> None:
    script = "sh -c 'kill -9 $$'; exit $?"
    handle = launch(f"import os; os.execv('/bin/sh', ['sh', '-c', {script!r}])")
    assert ended(handle) == JobReturnCode.UNKNOWN
    assert handle._inner.adapter.poll() == 128 + signal.SIGKILL


def test_the_launcher_is_flares_for_sites() -> None:
    assert issubclass(SiteJobLauncher, ClientProcessJobLauncher)
