"""The server's side of any job: phases in which every site must answer, and a clear end.

FLARE's ``COMPLETED`` says only that the controller returned. Every job therefore leaves an
``outcome.json`` in its run folder: ``completed``, or ``failed`` with the reason and the site.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

import fedgestalt
from fedgestalt.errors import FedgestaltError, PeerError, ServerError
from fedgestalt.federation.progress import ProgressLog, write_outcome
from fedgestalt.federation.wire import body, fault_of, to_shareable
from fedgestalt.messages import Message

OnReply = Callable[[str, object], None]
"""Called with the site's name and the unchecked fields of its reply; raises on a fault."""

_POLL_SECONDS = 0.05


class Aborted(Exception):  # noqa: N818  not a fault
    """The job was aborted by an administrator."""


class PhasedWorkflow(Controller):
    """Base of the project's workflows.

    Args:
        sites: who must take part; empty means all sites that the job was deployed to.
        phase_limit_seconds: how long a site may work on one phase.
    """

    def __init__(self, sites: list[str] | None = None, phase_limit_seconds: float = 3600.0) -> None:
        super().__init__(task_check_period=_POLL_SECONDS)
        self._sites, self._limit = list(sites or ()), phase_limit_seconds
        self.folder = Path()
        self.roster: tuple[str, ...] = ()

    # FLARE's life cycle

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Find the run folder and the roster."""
        engine = fl_ctx.get_engine()
        self.folder = Path(engine.get_workspace().get_run_dir(fl_ctx.get_job_id()))
        self.progress = ProgressLog(self.folder)
        present = {client.name for client in engine.get_clients()}
        self.roster = tuple(sorted(self._sites or present))

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing to do."""

    def process_result_of_unknown_task(
        self,
        client: Any,
        task_name: str,
        client_task_id: str,  # noqa: ARG002
        result: Shareable,  # noqa: ARG002
        fl_ctx: FLContext,
    ) -> None:
        """A late answer to a phase that has ended is dropped."""
        self.log_info(fl_ctx, f"late answer of {client.name} to {task_name} dropped")

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the job and leave its outcome, whatever happens."""
        started = time.time()
        outcome: dict[str, Any] = {
            "fedgestalt": fedgestalt.__version__,
            "notice": fedgestalt.RESEARCH_USE_ONLY,
            "sites": list(self.roster),
        }
        try:
            outcome |= {"status": "completed", **self.run(abort_signal, fl_ctx)}
        except Aborted:
            outcome |= {"status": "aborted", "reason": "the job was aborted"}
        except FedgestaltError as error:
            outcome |= {"status": "failed", "reason": str(error)}
        except Exception as error:  # noqa: BLE001  the outcome is written whatever happens
            self.log_exception(fl_ctx, "unexpected error")
            outcome |= {
                "status": "failed",
                "reason": f"unexpected {type(error).__name__} at the server",
            }
        outcome["seconds"] = round(time.time() - started, 2)
        write_outcome(self.folder, outcome)
        self.progress.write("end", status=outcome["status"])
        if outcome["status"] == "failed":
            self.system_panic(outcome["reason"], fl_ctx)

    @abstractmethod
    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Do the job; returns what the outcome should say."""

    # phases

    def gather(
        self,
        task_name: str,
        messages: Message | Mapping[str, Message],
        on_reply: OnReply,
        abort_signal: Signal,
        fl_ctx: FLContext,
    ) -> None:
        """Send a task to every site of the roster and handle every answer as it comes.

        Args:
            task_name: which handler of the sites' executors.
            messages: one for all sites, or one for each.
            on_reply: see :data:`OnReply`; calls do not overlap.
            abort_signal: FLARE's.
            fl_ctx: FLARE's.

        Raises:
            FedgestaltError: a site failed, sent something wrong, or did not answer in time.
            Aborted: the administrator ended the job.
        """
        self.progress.write("phase", phase=task_name, sites=len(self.roster))
        waiting, faults, lock = set(self.roster), list[FedgestaltError](), threading.Lock()

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:  # noqa: ARG001
            site, reply = client_task.client.name, client_task.result
            client_task.result = None
            with lock:
                if site not in waiting or faults:
                    return
                try:
                    said = fault_of(reply)
                    if said:
                        raise PeerError(said, site=site)
                    on_reply(site, body(reply))
                except FedgestaltError as error:
                    faults.append(error)
                except Exception as error:  # noqa: BLE001  whatever a reply provokes is its fault
                    faults.append(PeerError(f"its reply raised {type(error).__name__}", site=site))
                waiting.discard(site)
                self.progress.write("answer", phase=task_name, site=site)

        tasks = []
        for site in self.roster:
            message = messages if isinstance(messages, Message) else messages[site]
            data = to_shareable(message)
            task = Task(task_name, data, timeout=int(self._limit), result_received_cb=received)
            self.broadcast(task, fl_ctx, targets=[site], min_responses=1)
            tasks.append(task)
        deadline = time.monotonic() + self._limit
        try:
            while True:
                with lock:
                    if faults:
                        raise faults[0]
                    if not waiting:
                        return
                if abort_signal.triggered:
                    raise Aborted
                if time.monotonic() > deadline:
                    names = ", ".join(sorted(waiting))
                    raise ServerError(
                        f"no answer from {names} within {self._limit:.0f} seconds",
                        where=f"phase {task_name}",
                        remedy="look at the logs of these sites, or raise phase_limit_seconds",
                    )
                time.sleep(_POLL_SECONDS)
        finally:
            for task in tasks:
                if task.completion_status is None:
                    self.cancel_task(task, TaskCompletionStatus.CANCELLED, fl_ctx)
