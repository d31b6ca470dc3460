"""A site's side of any job: tasks to handlers, errors to sentences."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from fedgestalt.cohort import Cohort, read_cohort
from fedgestalt.errors import FedgestaltError, SiteError
from fedgestalt.federation.job.identity import (
    Identity,
    Trust,
    ephemeral_identity,
    kit_identity,
)
from fedgestalt.federation.job.places import place_of
from fedgestalt.federation.job.progress import ProgressLog
from fedgestalt.federation.job.transfer import download, upload
from fedgestalt.federation.job.watch import PING
from fedgestalt.federation.job.wire import body, fault_reply, to_shareable
from fedgestalt.federation.site.labels import check_label_map
from fedgestalt.federation.site.settings import SiteSettings, read_settings
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import Registry
from fedgestalt.messages import Message
from fedgestalt.secagg import Words

Handler = Callable[[object], Message]


class SiteExecutor(Executor):
    """Base of the project's executors; one object lives for one job at one site.

    Before the first task is handled, the site's own policy decides whether it takes part in such
    jobs at all.

    Args:
        phase_limit_seconds: how long a transfer may take.
    """

    template: ClassVar[str]

    def __init__(self, phase_limit_seconds: float = 3600.0) -> None:
        super().__init__()
        self._limit = phase_limit_seconds
        self.site = self.job = self._place = ""
        self.progress: ProgressLog | None = None
        self._settings: SiteSettings | None = None
        self._cohort: Cohort | None = None
        self._call: tuple[FLContext, Signal] | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """Functions that turn a task's unchecked fields into a reply, by task name."""
        raise NotImplementedError

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Answer the server's question whether this process is alive, from the start."""
        if event_type == EventType.START_RUN:
            self._place = place_of(fl_ctx.get_engine().get_workspace().get_root_dir())
            fl_ctx.get_engine().register_aux_message_handler(PING, self._on_ping)

    def _on_ping(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        what, fraction = self.progress.current if self.progress else ("", 0.0)
        reply = make_reply(ReturnCode.OK)
        reply["what"], reply["fraction"] = what, round(fraction, 3)
        reply["place"] = self._place
        return reply

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Run one task; every error becomes a reply that the server can show."""
        try:
            if self._settings is None:
                self._begin(fl_ctx)
            if self.progress:
                self.progress.current = ("", 0.0)
            handler = self.handlers().get(task_name)
            if handler is None:
                raise SiteError(f"it knows no task {task_name!r}", remedy="check its version")
            self._call = fl_ctx, abort_signal
            reply = handler(body(shareable))
        except FedgestaltError as error:
            self.log_error(fl_ctx, str(error))
            return fault_reply(error)
        except OSError as error:  # a full disk above all; a path stays in the site's own log
            self.log_exception(fl_ctx, f"a file cannot be read or written in task {task_name}")
            why = error.strerror or type(error).__name__
            remedy = "its own log names the file"
            return fault_reply(
                SiteError(f"a file cannot be read or written ({why})", remedy=remedy)
            )
        except Exception as error:  # noqa: BLE001  a site must always answer
            self.log_exception(fl_ctx, f"unexpected error in task {task_name}")
            return fault_reply(error)
        if abort_signal.triggered:
            return make_reply(ReturnCode.TASK_ABORTED)
        return to_shareable(reply)

    @property
    def call(self) -> tuple[FLContext, Signal]:
        """FLARE's context and abort signal of the task that runs now."""
        if self._call is None:
            raise SiteError("no task has started yet")
        return self._call

    def send(self, name: str, ticket: str, words: Words) -> None:
        """Upload ``words``, which the server expects under this name and ticket."""
        context, abort = self.call
        upload(
            context.get_engine(),
            context,
            name,
            [words],
            words.size,
            ticket=ticket,
            limit_seconds=self._limit,
            should_stop=lambda: bool(abort.triggered),
            progress=self.counter("upload"),
        )

    def fetch(self, name: str, into: NDArray[Any]) -> None:
        """Download what the server offers under this name."""
        context, abort = self.call
        download(
            context.get_engine(),
            context,
            name,
            into.size,
            into,
            limit_seconds=self._limit,
            should_stop=lambda: bool(abort.triggered),
            progress=self.counter("download"),
        )

    def _begin(self, fl_ctx: FLContext) -> None:
        workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
        workspace = workspace or fl_ctx.get_engine().get_workspace()
        self.site, self.job = fl_ctx.get_identity_name(), fl_ctx.get_job_id()
        self.progress = ProgressLog(Path(workspace.get_run_dir(self.job)))
        settings = read_settings(Path(workspace.get_site_config_dir()))
        settings.check_job(self.template)
        self.store = settings.store_folder(self.site)
        try:
            self.store.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SiteError(f"its store cannot be written ({error.strerror})") from None
        if not os.access(self.store, os.W_OK):
            raise SiteError("its store cannot be written")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._startup = Path(workspace.get_startup_kit_dir())
        self._settings = settings

    def counter(self, what: str) -> Callable[[int, int], None]:
        """See :meth:`ProgressLog.counter`."""
        if self.progress is None:
            raise SiteError("no task has started yet")
        return self.progress.counter(what)

    @functools.cached_property
    def identity(self) -> Identity:
        """Who this site is to its peers: its startup kit's certificate, as its settings say.

        Raises:
            SiteError: the kit has none that can be used.
        """
        if self.settings.identity == "ephemeral":
            return ephemeral_identity(self.site)
        return kit_identity(self._startup)

    @functools.cached_property
    def trust(self) -> Trust:
        """Whose certificates this site believes."""
        if self.settings.identity == "ephemeral":
            return Trust.of_anybody()
        return Trust.from_kit(self._startup)

    @property
    def settings(self) -> SiteSettings:
        """This site's settings; read once per job."""
        if self._settings is None:
            raise SiteError("no task has started yet")
        return self._settings

    @property
    def registry(self) -> Registry:
        """The installed plugins, with this site's folder of weights files."""
        return get_registry().with_weights(self.settings.weights_folder(self.site))

    @property
    def cohort(self) -> Cohort:
        """This site's cohort; read and checked once per job."""
        if self._cohort is None:
            cohort = read_cohort(self.settings.data_folder(self.site), name=self.site)
            agreed = self.settings.label_map_folder(self.site)
            if agreed:
                check_label_map(cohort, agreed, self.store)
            self._cohort = cohort
        return self._cohort
