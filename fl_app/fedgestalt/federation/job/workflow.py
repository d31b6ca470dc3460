"""The server's side of any job: a handshake, phases in which every site must answer, a clear end.

FLARE's ``COMPLETED`` says only that the controller returned. Every job therefore leaves an
``outcome.json`` in its run folder: ``completed``, or ``failed`` with the reason and the site.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.widgets.info_collector import GroupInfoCollector, InfoCollector

import fedgestalt
from fedgestalt.errors import FedgestaltError, PeerError, SiteLostError
from fedgestalt.federation.job.handshake import Present, check_agreement, clock_warnings
from fedgestalt.federation.job.places import PLACES_FILE, compare_places
from fedgestalt.federation.job.progress import ProgressLog, write_outcome
from fedgestalt.federation.job.status import PROGRESS_COMMAND, JobStatus
from fedgestalt.federation.job.watch import PING, PING_TIMEOUT_SECONDS, SiteWatch
from fedgestalt.federation.job.wire import body, fault_of, to_shareable
from fedgestalt.messages import Message, from_site, size_of

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
        start_limit_seconds: how long a site's job process may take to come up.
        silence_limit_seconds: how long it may then be silent before it is taken for lost.
    """

    template: ClassVar[str]

    def __init__(
        self,
        sites: list[str] | None = None,
        phase_limit_seconds: float = 3600.0,
        start_limit_seconds: float = 120.0,
        silence_limit_seconds: float = 30.0,
        rounds: int = 0,
    ) -> None:
        super().__init__(task_check_period=_POLL_SECONDS)
        self._sites, self._limit = list(sites or ()), phase_limit_seconds
        self._start_limit, self._silence_limit = start_limit_seconds, silence_limit_seconds
        self.folder = Path()
        self.roster: tuple[str, ...] = ()
        self.status = JobStatus(self.template, rounds)
        self._watch: SiteWatch | None = None

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

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Offer the status to ``show_stats`` and as an application command."""
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.START_RUN:
            fl_ctx.get_engine().register_app_command(PROGRESS_COMMAND, self._on_progress_command)
        elif event_type == InfoCollector.EVENT_TYPE_GET_STATS:
            collector = fl_ctx.get_prop(InfoCollector.CTX_KEY_STATS_COLLECTOR)
            if isinstance(collector, GroupInfoCollector):
                collector.set_info("fedgestalt", self._report())

    def _on_progress_command(self, topic: str, data: Any, fl_ctx: FLContext) -> dict[str, Any]:  # noqa: ARG002
        return self._report()

    def _report(self) -> dict[str, Any]:
        return self.status.report(self._watch, self.roster)

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
            "job": fl_ctx.get_job_id(),
            "template": self.template,
            "sites": list(self.roster),
        }
        self._watch = self._new_watch(fl_ctx)
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
        finally:
            self._watch.stop()
        self._compare_places(fl_ctx)
        outcome["warnings"] = self.status.warnings
        outcome["bytes"] = self.status.transferred
        outcome["seconds"] = round(time.time() - started, 2)
        write_outcome(self.folder, outcome)
        self.progress.write("end", status=outcome["status"])
        if outcome["status"] == "failed":
            self.system_panic(outcome["reason"], fl_ctx)

    def _compare_places(self, fl_ctx: FLContext) -> None:
        """Warn of sites that ran elsewhere than in the last job."""
        places = self._watch.places if self._watch else {}
        try:
            for warning in compare_places(self.folder.parent / PLACES_FILE, places):
                self.status.warn(warning)
        except OSError as error:
            self.log_warning(fl_ctx, f"{PLACES_FILE} cannot be written ({error.strerror})")

    def _new_watch(self, fl_ctx: FLContext) -> SiteWatch:
        engine = fl_ctx.get_engine()

        def ask() -> Mapping[str, object]:
            with engine.new_context() as context:
                replies = engine.send_aux_request(
                    targets=list(self.roster),
                    topic=PING,
                    request=Shareable(),
                    timeout=PING_TIMEOUT_SECONDS,
                    fl_ctx=context,
                    optional=True,
                )
            return {
                site: dict(reply)
                for site, reply in (replies or {}).items()
                if isinstance(reply, Shareable) and reply.get_return_code() == ReturnCode.OK
            }

        watch = SiteWatch(self.roster, ask, self._start_limit, self._silence_limit)
        watch.start()
        return watch

    @abstractmethod
    def run(self, abort_signal: Signal, fl_ctx: FLContext) -> dict[str, Any]:
        """Do the job; returns what the outcome should say."""

    # phases

    def join(
        self,
        task_name: str,
        message: Message,
        own_facts: Callable[[Mapping[str, Present]], Mapping[str, str]],
        abort_signal: Signal,
        fl_ctx: FLContext,
        sites: Collection[str] | None = None,
    ) -> dict[str, Present]:
        """The handshake: every site says what it would work with, or why it does not take part.

        A site that is lost is left out, if the job :meth:`goes_on_without` it.

        Args:
            task_name: of the handshake.
            message: what the job is about.
            own_facts: gives the server's facts, from the sites' ones.
            abort_signal: FLARE's.
            fl_ctx: FLARE's.
            sites: whom to ask; the whole roster if not given.

        Raises:
            ConfigError: names all differences and refusals, site by site.
        """
        stated: dict[str, Present] = {}
        received: dict[str, float] = {}

        def on_reply(site: str, fields: object) -> None:
            received[site] = time.time()
            stated[site] = Present.from_fields(fields, from_site(site))

        refusals = self._gather(
            task_name, message, on_reply, abort_signal, fl_ctx, collect=FedgestaltError, sites=sites
        )
        lost = {site: error for site, error in refusals.items() if isinstance(error, SiteLostError)}
        if not self.goes_on_without(lost):
            lost = {}
        for error in lost.values():
            self.status.warn(str(error))
        said = {s: _without_name(e, s) for s, e in refusals.items() if s not in lost}
        check_agreement(own_facts(stated) if stated else {}, stated, said)
        for warning in clock_warnings(stated, received):
            self.status.warn(warning)
        return stated

    def goes_on_without(self, lost: Collection[str]) -> bool:
        """Whether the job may begin, or go on, while these sites are lost."""
        return not lost

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
            FedgestaltError: a site failed, sent something wrong, died, or did not answer in time.
            Aborted: the administrator ended the job.
        """
        self._gather(task_name, messages, on_reply, abort_signal, fl_ctx, collect=())

    def gather_present(
        self,
        task_name: str,
        messages: Message | Mapping[str, Message],
        on_reply: OnReply,
        abort_signal: Signal,
        fl_ctx: FLContext,
        sites: Collection[str],
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[str, SiteLostError]:
        """As :meth:`gather`, with ``sites`` alone; those that are lost meanwhile are returned.

        Args:
            task_name, messages, on_reply, abort_signal, fl_ctx: see :meth:`gather`.
            sites: whom to ask.
            enough: asked after each answer; ends the phase early.
        """
        faults = self._gather(
            task_name,
            messages,
            on_reply,
            abort_signal,
            fl_ctx,
            collect=SiteLostError,
            sites=sites,
            enough=enough,
        )
        lost = {site: error for site, error in faults.items() if isinstance(error, SiteLostError)}
        for error in lost.values():
            self.status.warn(f"phase {task_name}: {error}")
        return lost

    def lost_sites(self, sites: Collection[str]) -> dict[str, str]:
        """Those of ``sites`` that are dead or silent now, with a sentence for each."""
        return self._watch.lost(sites) if self._watch else {}

    def is_up(self, site: str) -> bool:
        """Whether a site's job process has given a sign of life lately."""
        return self._watch is not None and self._watch.is_up(site)

    def _gather(
        self,
        task_name: str,
        messages: Message | Mapping[str, Message],
        on_reply: OnReply,
        abort_signal: Signal,
        fl_ctx: FLContext,
        *,
        collect: type[FedgestaltError] | tuple[type[FedgestaltError], ...],
        sites: Collection[str] | None = None,
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[str, FedgestaltError]:
        """As :meth:`gather`; returns the faults of the classes ``collect`` by site.

        The first fault of another class is raised at once. A silence is a fault of the silent site.
        """
        asked = self.roster if sites is None else tuple(sorted(sites))
        self.progress.write("phase", phase=task_name, sites=len(asked))
        self.status.begin_phase(task_name, frozenset(asked))
        waiting, faults = set(asked), dict[str, FedgestaltError]()

        def fatal() -> FedgestaltError | None:
            return next((e for e in faults.values() if not isinstance(e, collect)), None)

        lock = threading.Lock()

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:  # noqa: ARG001
            site, reply = client_task.client.name, client_task.result
            client_task.result = None
            with lock:
                if site not in waiting or fatal():
                    return
                said = ""
                try:
                    said = fault_of(reply)
                    if said:
                        raise PeerError(said, site=site)
                    on_reply(site, body(reply))
                except FedgestaltError as error:
                    faults[site] = error
                except Exception as error:  # noqa: BLE001  whatever a reply provokes is its fault
                    faults[site] = PeerError(f"its reply raised {type(error).__name__}", site=site)
                waiting.discard(site)
                self.status.answered(site, size_of(said or body(reply)))
                if self._watch:
                    self._watch.heard(site)
                self.progress.write("answer", phase=task_name, site=site)

        tasks = []
        for site in asked:
            message = messages if isinstance(messages, Message) else messages[site]
            data = to_shareable(message)
            task = Task(task_name, data, timeout=int(self._limit), result_received_cb=received)
            self.broadcast(task, fl_ctx, targets=[site], min_responses=1)
            self.status.sent(site, size_of(body(data)))
            tasks.append(task)
        deadline = time.monotonic() + self._limit
        try:
            while True:
                with lock:
                    lost = self.lost_sites(waiting)
                    if time.monotonic() > deadline:
                        what = f"no answer within {self._limit:.0f} seconds"
                        lost |= dict.fromkeys(waiting, what)
                    for site, what in lost.items():
                        remedy = "look at its log, or raise the job's limits"
                        faults[site] = SiteLostError(what, site=site, remedy=remedy)
                        waiting.discard(site)
                    if error := fatal():
                        raise error
                    if not waiting or enough():
                        return faults
                if abort_signal.triggered:
                    raise Aborted
                time.sleep(_POLL_SECONDS)
        finally:
            for task in tasks:
                if task.completion_status is None:
                    self.cancel_task(task, TaskCompletionStatus.CANCELLED, fl_ctx)


def _without_name(error: FedgestaltError, site: str) -> str:
    """The sentence without the site's name in front, for a list that has it already."""
    return str(error).removeprefix(f"site {site!r}: ").rstrip(".")
