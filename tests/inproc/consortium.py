"""A consortium in one process: FLARE's real server communicator, controllers, executors and FOBS.

No sockets and no processes, so a whole job takes about a second. Every byte that reaches the server
is kept for inspection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import functools
import json
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.apis.workspace import Workspace
from nvflare.app_common.decomposers import common_decomposers
from nvflare.fuel.utils import fobs

from fedgestalt.cohort import (
    UNSOLVED,
    Cohort,
    ImageRecord,
    RareSplit,
    Syndrome,
    save_jpeg,
    write_silos,
)
from fedgestalt.cohort.layout import image_file
from fedgestalt.federation.job import transfer as transfer_module
from fedgestalt.federation.job import workflow as workflow_module
from fedgestalt.federation.job.executor import SiteExecutor
from fedgestalt.federation.job.status import JobStatus
from fedgestalt.federation.job.watch import SiteWatch
from fedgestalt.federation.job.workflow import PhasedWorkflow
from fedgestalt.federation.matching.discovery import DiscoveryWorkflow
from fedgestalt.federation.matching.executor import FlakeMatcher
from fedgestalt.federation.matching.finder import CaseFinder
from fedgestalt.federation.matching.workflow import FlakeSimilarityWorkflow
from fedgestalt.federation.site.outgoing import OutgoingGuard
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.federation.training.model import Optimiser, ServerStep
from fedgestalt.federation.training.rounds import (
    Aggregation,
    Rule,
    Scope,
    exponents_of,
    first_ranges,
    next_ranges,
    number_plan,
    row_weights,
    shapes_of,
    with_metrics,
)
from fedgestalt.federation.training.workflow import EnsembleTrainingWorkflow
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import DiscoveryJob, JobSpec, TrainingJob
from fedgestalt.learning.data import held_out_set, local_seed, training_set
from fedgestalt.learning.ensemble import (
    SharedState,
    build_ensemble,
    read_shared_state,
    shared_state_digest,
)
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, MemberMetrics, TrainingSet
from fedgestalt.secagg import NumberPlan, Recipient, ThreatModel

JOB_ID = "job-1"
TINY = {"depth": 18, "width": 2, "embedding_size": 8, "input_size": 32}

flare_decomposers.register()
common_decomposers.register()


def tiny_ensemble(seed: int = 1) -> EnsembleSpec:
    """A neck-trained, a fully trained and an untouched member, all very small."""
    training = TrainingSpec(epochs=1, batch_size=8, variants=2)
    parts = (("fine-tuned", "neck"), ("scratch", "all"), ("original", "none"))
    members = [
        MemberSpec(name=n, backbone="iresnet", options=TINY, trainable=t, training=training)
        for n, t in parts
    ]
    return EnsembleSpec(members=tuple(members), seed=seed)


def one_network(trainable: str = "neck", seed: int = 1) -> EnsembleSpec:
    """One very small network, for jobs of which only the protocol matters."""
    training = TrainingSpec(epochs=1, batch_size=8, variants=1)
    member = MemberSpec(
        name="network", backbone="iresnet", options=TINY, trainable=trainable, training=training
    )
    return EnsembleSpec(members=(member,), seed=seed)


HPO_TERMS = (
    ("HP:0000154", "HP:0000343"),
    ("HP:0000316", "HP:0000494", "HP:0001263"),
    ("HP:0000252",),
    ("HP:0000664", "HP:0000998"),
    ("HP:0000400", "HP:0011968"),
)
"""Of the patients with each syndrome of :func:`tiny_silos`, but for a quarter who have none."""


def tiny_silos(
    folder: Path,
    sites: Sequence[str],
    seed: int = 0,
    frequent: int = 3,
    mislabelled: Sequence[str] = (),
    test_subjects: Mapping[str, int] | None = None,
    spread: float = 30.0,
    without: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Cohort]:
    """Deal a small cohort: some frequent and 2 rare syndromes; subjects differ in their colours.

    A site that is ``mislabelled`` calls every frequent syndrome by the name of the next one. It has
    1 test subject of each, unless ``test_subjects`` says otherwise; ``spread`` is how far the
    subjects of one syndrome differ. A site has no training or test images of the syndromes that
    ``without`` names.
    """
    rng = np.random.default_rng(seed)
    classes = tuple(range(11, 11 + frequent))
    syndromes = {i: Syndrome(i, f"SYNDROME-NAME-{i}") for i in (*classes, 21, 22)}
    wrong = dict(zip(classes, (*classes[1:], classes[0]), strict=True))
    tints = rng.uniform(40, 215, (len(syndromes), 3))
    silos, number = {}, 0
    for site in sites:
        images: dict[str, ImageRecord] = {}
        parts: dict[str, list[str]] = {"train": [], "test": [], "rare": []}
        for index, syndrome in enumerate(syndromes):
            tests = ("test",) * (test_subjects or {}).get(site, 1)
            roles = ("rare", "rare") if syndrome > 20 else ("train", "train", *tests)
            if syndrome in (without or {}).get(site, ()):
                roles = ()
            for role in roles:
                number += 1
                subject = f"SUBJECT-{number:04d}"
                base = tints[index] + rng.normal(0, spread, 3)
                terms = HPO_TERMS[index % len(HPO_TERMS)] if number % 4 else ()
                for shot in range(2):
                    image_id = f"IMAGE-{number:04d}-{shot}"
                    pixels = base + rng.normal(0, 25, (14, 14, 3))
                    pixels = np.kron(np.clip(pixels, 0, 255), np.ones((8, 8, 1)))
                    place = image_file(folder / "sources", image_id)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    save_jpeg(place, pixels.astype(np.uint8))
                    said = wrong.get(syndrome, syndrome) if site in mislabelled else syndrome
                    images[image_id] = ImageRecord(image_id, subject, said, place, terms)
                    parts[role].append(image_id)
        halves = parts["rare"][:2] + parts["rare"][4:6], parts["rare"][2:4] + parts["rare"][6:]
        silos[site] = Cohort(
            name=site,
            version="v1",
            root=folder / "sources",
            images=images,
            syndromes=syndromes,
            classes=classes,
            train=tuple(parts["train"]),
            frequent_test=tuple(parts["test"]),
            rare_splits=(RareSplit(*map(tuple, halves)), RareSplit(*map(tuple, halves[::-1]))),
        )
        silos[site] = dataclasses.replace(silos[site], unsolved=_unsolved(folder, site, sites))
    write_silos(silos, folder / "hospitals")
    return silos


HIDDEN_GROUPS = 2
"""Of unsolved cases that look the same, one at each site."""


def _unsolved(folder: Path, site: str, sites: Sequence[str]) -> dict[str, ImageRecord]:
    """A site's unsolved cases: one of each hidden group, and some who are like nobody else."""
    number = list(sites).index(site)
    shared, own = np.random.default_rng(7), np.random.default_rng([8, number])
    looks = list(shared.uniform(20, 235, (HIDDEN_GROUPS, 4, 4, 3)))
    looks += list(own.uniform(20, 235, (18 // len(sites), 4, 4, 3)))
    images = {}
    for person, look in enumerate(looks):
        for shot in range(1 + (person == 0)):
            image_id = f"UNSOLVED-IMAGE-{number}{person:02d}-{shot}"
            pixels = np.kron(look, np.ones((28, 28, 1))) + own.normal(0, 6, (112, 112, 3))
            place = image_file(folder / "sources", image_id)
            save_jpeg(place, np.clip(pixels, 0, 255).astype(np.uint8))
            subject = f"UNSOLVED-SUBJECT-{number}{person:02d}"
            images[image_id] = ImageRecord(image_id, subject, UNSOLVED, place)
    return images


@dataclass
class Received:
    """One message that reached the server, as FLARE serialised it.

    ``task`` is the topic of one that came beside the tasks: a piece of an upload, or a question for
    a piece of a download.
    """

    site: str
    task: str
    payload: bytes
    reply: Shareable


@dataclass
class Run:
    """What a job left behind.

    Attributes:
        outcome: as ``outcome.json`` says.
        received: everything that reached the server, in this order.
        sent: (site, task, data) of every task that a site got.
        folder: the server's run folder.
        panics: what FLARE's administrators were told.
        root: the workspaces of all parties.
    """

    outcome: dict[str, Any]
    received: list[Received]
    sent: list[tuple[str, str, Shareable]]
    folder: Path
    panics: list[str]
    root: Path

    def replies(self, task: str) -> dict[str, dict[str, Any]]:
        """The unchecked fields of all replies to a task, by site; the last ones of each."""
        return {r.site: r.reply["fedgestalt"] for r in self.received if r.task == task}

    def orders(self, task: str, site: str = "") -> list[dict[str, Any]]:
        """The fields of the messages with a task, in the order in which they were fetched."""
        return [
            data["fedgestalt"] for to, name, data in self.sent if name == task and site in ("", to)
        ]

    @property
    def signed(self) -> list[dict[str, Any]]:
        """The transcript's records."""
        path = self.folder / "transcript.json"
        rounds = json.loads(path.read_text())["rounds"] if path.exists() else []
        return [entry["record"] for entry in rounds]


Tamper = Callable[[str, str, Shareable], Shareable]
"""Called with (site, task, data); returns what arrives instead. A topic is a task here as well."""


def untouched(site: str, task: str, data: Shareable) -> Shareable:
    """Deliver as sent."""
    return data


class Killed(BaseException):
    """A site's process ends here and now; no handler of ours may catch it."""


OnTask = Callable[[str, str, str], None]
"""Called with (site, task, when); may raise :class:`Killed`.

When: ``before`` the site works on the task; ``after``, when its answer has not left; or ``sent``,
when it has. An auxiliary request of a site is a task of its topic's name, with ``before`` alone.
"""


def nothing_happens(site: str, task: str, when: str) -> None:
    """Every site lives."""


Event = Callable[[], object]


class Script:
    """An :data:`OnTask` that is written down beforehand."""

    def __init__(self) -> None:
        self._plan: dict[tuple[str, str, str, int], Event] = {}
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self.done: list[tuple[str, str]] = []
        """(site, task) of what has happened; a test looks whether it tested anything."""

    def at(self, site: str, task: str, when: str, event: Event, time: int = 1) -> Script:
        """Have ``event`` happen when ``site`` comes to ``task`` for the ``time``-th time."""
        self._plan[site, task, when, time] = event
        return self

    def kill(self, site: str, task: str, when: str = "before", time: int = 1) -> Script:
        """End a site's process there."""

        def end() -> None:
            raise Killed

        return self.at(site, task, when, end, time)

    def __call__(self, site: str, task: str, when: str) -> None:
        with self._lock:
            self._seen[site, task, when] += 1
            event = self._plan.get((site, task, when, self._seen[site, task, when]))
        if event is not None:
            self.done.append((site, task))
            event()


class _Watch(SiteWatch):
    """Knows at once who is gone, so that no test waits for a silence."""

    def __init__(self, bus: _Bus, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._bus, bus.watch = bus, self

    def start(self) -> None:
        self.step()
        super().start()

    def heard(self, site: str, what: str | None = None, fraction: float = 0.0) -> None:
        if site not in self._bus.gone:
            super().heard(site, what, fraction)

    def lost(self, sites: Iterable[str]) -> dict[str, str]:
        self._forget_the_gone()
        return super().lost(sites)

    def is_up(self, site: str) -> bool:
        self._forget_the_gone()
        return super().is_up(site)

    def _forget_the_gone(self) -> None:
        with self._lock:
            for site in self._bus.gone & self._heard.keys():
                long_ago = self._clock() - self._silence_limit - 1
                self._heard[site] = min(self._heard[site], long_ago)


class _Clock:
    """The workflow's clock, which a test can put forward."""

    def __init__(self) -> None:
        self.skipped = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@dataclass
class _Bus:
    """What connects the parties of one job.

    Attributes:
        dead: sites whose processes have ended.
        silent: sites whose connection is cut.
        down: sites whose processes have not come up yet.
        errors: of a test's own functions; the job does not wait for the site where one was raised.
    """

    on_task: OnTask
    on_upload: Tamper
    on_download: Tamper
    run: Run
    handlers: dict[tuple[str, str], Callable[..., Shareable]] = field(default_factory=dict)
    engines: dict[str, _Engine] = field(default_factory=dict)
    executors: dict[str, SiteExecutor] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    down: set[str] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)
    watch: SiteWatch | None = None
    status: JobStatus | None = None
    phases: int = 0
    clock: _Clock = field(default_factory=_Clock)
    done: threading.Event = field(default_factory=threading.Event)

    @property
    def gone(self) -> set[str]:
        """Sites that the server cannot reach."""
        return self.dead | self.silent | self.down

    @property
    def waiting(self) -> tuple[str, set[str]]:
        """The phase, and the sites that have not answered in it."""
        report = self.status.report(None, tuple(self.engines)) if self.status else {}
        sites = report.get("sites", {}).items()
        return report.get("phase", ""), {s for s, said in sites if said["state"] == "working"}

    def listen(self, status: JobStatus) -> None:
        """Count phases."""
        self.status, begin = status, status.begin_phase

        def counted(phase: str, sites: frozenset[str]) -> None:
            begin(phase, sites)
            self.phases += 1

        status.begin_phase = counted  # type: ignore[method-assign]

    def ask(self, sender: str, target: str, topic: str, request: Shareable) -> Shareable:
        if target != "server":
            return self._deliver(sender, target, topic, request)
        try:
            self.on_task(sender, topic, "before")
            request = self.on_upload(sender, topic, request)
            reply = self._deliver(sender, target, topic, request)
            if reply.get_return_code() == ReturnCode.OK:
                reply = self.on_download(sender, topic, reply)
        except (Killed, Exception) as error:  # noqa: BLE001  a test's own
            # In a thread that only waits for FLARE: it cannot end the site, the site's own does.
            self.end(sender, error)
        gone = sender in self.gone
        return make_reply(ReturnCode.COMMUNICATION_ERROR) if gone else reply

    def end(self, site: str, why: BaseException) -> None:
        """End a site's process."""
        self.dead.add(site)
        if site in self.engines:
            self.engines[site].abort.trigger(True)
        if isinstance(why, Exception):
            self.errors.append(why)

    def _deliver(self, sender: str, target: str, topic: str, request: Shareable) -> Shareable:
        handler = self.handlers.get((target, topic))
        if handler is None or {sender, target} & self.gone:
            return make_reply(ReturnCode.COMMUNICATION_ERROR)
        payload = fobs.dumps(request)
        if target == "server":
            self.run.received.append(Received(sender, topic, payload, fobs.loads(payload)))
        with self.engines[target].new_context() as context:
            peer = FLContext()
            peer.set_prop(ReservedKey.IDENTITY_NAME, sender, private=False, sticky=False)
            context.set_peer_context(peer)
            reply = fobs.loads(fobs.dumps(handler(topic, fobs.loads(payload), context)))
        gone = {sender, target} & self.gone
        return make_reply(ReturnCode.COMMUNICATION_ERROR) if gone else reply


class _Engine:
    def __init__(
        self,
        name: str,
        clients: list[Client],
        workspace: Workspace,
        components: Mapping[str, Any],
        bus: _Bus,
        job_id: str,
    ) -> None:
        self.clients, self.workspace, self.components = clients, workspace, components
        self.name, self.bus, self.abort = name, bus, Signal()
        bus.engines[name] = self
        self.panics: list[str] = []
        private = {
            FLContextKey.WORKSPACE_OBJECT: workspace,
            FLContextKey.JOB_META: {"min_clients": 1},
        }
        self._contexts = FLContextManager(
            engine=self,
            identity_name=name,
            job_id=job_id,
            public_stickers={},
            private_stickers=private,
        )

    def new_context(self) -> Any:
        return self._contexts.new_context()

    def get_clients(self) -> list[Client]:
        return self.clients

    def validate_targets(self, names: list[str]) -> tuple[list[Client], list[str]]:
        known = {c.name: c for c in self.clients}
        return [known[n] for n in names if n in known], [n for n in names if n not in known]

    def get_workspace(self) -> Workspace:
        return self.workspace

    def fire_event(self, event: str, ctx: Any) -> None:
        if event == EventType.FATAL_SYSTEM_ERROR:
            self.panics.append(str(ctx.get_prop(FLContextKey.EVENT_DATA)))

    def get_component(self, component_id: str) -> FLComponent | None:
        return self.components.get(component_id)

    def register_app_command(self, *_: Any) -> None:
        """Nobody watches here."""

    def register_aux_message_handler(
        self, topic: str, message_handle_func: Callable[..., Shareable]
    ) -> None:
        self.bus.handlers[self.name, topic] = message_handle_func

    def send_aux_request(
        self, targets: Sequence[str], topic: str, request: Shareable, *_: Any, **__: Any
    ) -> dict[str, Shareable]:
        return {target: self.bus.ask(self.name, target, topic, request) for target in targets}


_DRAWS_OR_BUILDS = {"fgm_join", "fgm_train", "fgm_publish", "fgm_match_start", "fgm_enrol"}
"""Tasks that use torch, of which only one may run at a time: sites are processes of their own
elsewhere, and share torch's random state here."""

Make = Callable[[], SiteExecutor]


@dataclass
class Consortium:
    """Sites with data and stores on disk; jobs run on it one after another.

    Attributes:
        folder: of everything that the consortium has on disk.
        sites: their names.
        settings: of all sites, beside those that they need.
        site_settings: of single sites; they win over ``settings``.
        frequent, mislabelled, test_subjects, spread, without: see :func:`tiny_silos`.
        on_upload, on_download: stand between the sites and the server.
        on_task: see :data:`OnTask`.
        workflow_settings: arguments of the workflow that win over the job's.
        late: sites whose processes come up no sooner than a test says so (:meth:`come_up`).
        kits: a folder with a startup kit for each site and the server, see :func:`write_kits`.
        source: another consortium of the same sites, whose data this one shares.
        jobs: how many have run.
    """

    folder: Path
    sites: Sequence[str] = ("berlin", "bonn", "leuven")
    settings: Mapping[str, Any] = field(default_factory=dict)
    site_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    frequent: int = 3
    mislabelled: Sequence[str] = ()
    test_subjects: Mapping[str, int] = field(default_factory=dict)
    spread: float = 30.0
    without: Mapping[str, Collection[int]] = field(default_factory=dict)
    on_upload: Tamper = untouched
    on_download: Tamper = untouched
    on_task: OnTask = nothing_happens
    workflow_settings: Mapping[str, Any] = field(default_factory=dict)
    late: Collection[str] = ()
    kits: Path | None = None
    source: Consortium | None = None
    jobs: int = 0

    def __post_init__(self) -> None:
        self._bus: _Bus | None = None
        if self.source is not None:
            self.sites, self.silos, self.data = (
                self.source.sites,
                self.source.silos,
                self.source.data,
            )
            return
        self.data = self.folder / "hospitals"
        self.silos = tiny_silos(
            self.folder,
            self.sites,
            frequent=self.frequent,
            mislabelled=self.mislabelled,
            test_subjects=self.test_subjects,
            spread=self.spread,
            without=self.without,
        )

    def store(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return self.folder / "stores" / site

    # what happens while a job runs

    @property
    def bus(self) -> _Bus:
        """What connects the parties of the job that runs, or ran last."""
        assert self._bus is not None, "no job has run"
        return self._bus

    def cut(self, site: str) -> None:
        """Cut a site's connection."""
        self.bus.silent.add(site)

    def restore(self, site: str) -> None:
        """Mend it; the server hears of the site at once, and drops what it still had to say."""
        self._back(self.bus.silent, site)

    def come_up(self, site: str) -> None:
        """Let a ``late`` site's process come up."""
        self._back(self.bus.down, site)

    def _back(self, away: set[str], site: str) -> None:
        assert site in away
        away.discard(site)
        while not self.bus.done.is_set() and ("fgm.ping" not in self._topics(site)):
            time.sleep(0.002)
        if self.bus.watch:
            self.bus.watch.step()

    def _topics(self, site: str) -> set[str]:
        return {topic for party, topic in list(self.bus.handlers) if party == site}

    def demand(self, site: str, task: str, fields: Mapping[str, Any]) -> Shareable:
        """A task that no honest server would send now; for an event of ``site`` itself."""
        message = Shareable()
        message["fedgestalt"] = dict(fields)
        engine = self.bus.engines[site]
        with engine.new_context() as ctx:
            ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
            arrived = fobs.loads(fobs.dumps(message))
            return self.bus.executors[site].execute(task, arrived, ctx, engine.abort)

    def phase_ends_without(self, site: str, task: str) -> Event:
        """For :meth:`Script.at`, ``after`` a task: all others answer, then the phase's time is up.

        The site itself answers in the next phase, which is too late.
        """

        def wait_and_pass() -> None:
            bus = self.bus
            while not bus.done.is_set() and bus.waiting != (task, {site} | bus.dead):
                time.sleep(0.002)
            phase = bus.phases
            bus.clock.skipped += 1e6
            while not bus.done.is_set() and bus.phases == phase:
                time.sleep(0.002)

        return wait_and_pass

    # jobs

    def run(
        self,
        job: JobSpec,
        executor: Make | None = None,
        job_id: str = JOB_ID,
        root: Path | None = None,
        workflow: Callable[..., PhasedWorkflow] | None = None,
    ) -> Run:
        """Run a job to its end; in the workspaces of an earlier job, if ``root`` names them.

        Args:
            job: what to run.
            executor: makes the sites' executors; the job's own if not given.
            job_id: its id.
            root: see :attr:`Run.root`.
            workflow: takes the place of the job's workflow.
        """
        self.jobs += 1
        root = root or self.folder / f"run-{self.jobs}"
        controller, make, components = _parts(job, self.workflow_settings, workflow)
        run = Run({}, [], [], Path(), [], root)
        bus = self._bus = _Bus(self.on_task, self.on_upload, self.on_download, run)
        bus.down = set(self.late)
        bus.listen(controller.status)
        with contextlib.ExitStack() as patches:
            for module, name, value in (
                (workflow_module, "SiteWatch", functools.partial(_Watch, bus)),
                (workflow_module, "time", bus.clock),
                (workflow_module, "_POLL_SECONDS", 0.01),
                (transfer_module, "FIRST_PAUSE_SECONDS", 0.02),
                (transfer_module, "LONGEST_PAUSE_SECONDS", 0.1),
            ):
                patches.enter_context(mock.patch.object(module, name, value))
            self._run(controller, executor or make, components, bus, job_id)
        return run

    def _run(
        self,
        workflow: PhasedWorkflow,
        make: Make,
        components: Mapping[str, Any],
        bus: _Bus,
        job_id: str,
    ) -> None:
        run = bus.run
        clients = [Client(site, f"token-{site}") for site in self.sites]
        engine = _Engine(
            "server", clients, self._workspace(run, "server", job_id), components, bus, job_id
        )
        run.panics = engine.panics
        communicator = WFCommServer(task_check_period=0.005)
        workflow.set_communicator(communicator)
        communicator.controller = workflow
        workflow._task_check_period = 0.005
        context = engine.new_context()
        workflow.initialize(context)
        communicator.initialize_run(context)
        workflow.handle_event(EventType.START_RUN, context)
        lock, one_at_a_time = threading.Lock(), threading.Lock()

        def come_up(client: Client) -> tuple[_Engine, SiteExecutor]:
            workspace = self._workspace(run, client.name, job_id)
            site_engine = _Engine(client.name, clients, workspace, {}, bus, job_id)
            executor = bus.executors[client.name] = make()
            with site_engine.new_context() as ctx:
                executor.handle_event(EventType.START_RUN, ctx)
            return site_engine, executor

        def live(client: Client, parts: tuple[_Engine, SiteExecutor] | None) -> None:
            while client.name in bus.down:
                if bus.done.wait(0.005):
                    return
            try:
                serve(client, *(parts or come_up(client)))
            except (Killed, Exception) as error:  # noqa: BLE001  a test's own
                bus.end(client.name, error)

        def serve(client: Client, site_engine: _Engine, executor: SiteExecutor) -> None:
            guard, name = OutgoingGuard(), ""
            while not bus.done.is_set():
                if client.name not in bus.silent:
                    with engine.new_context() as ctx:
                        name, task_id, data = communicator.process_task_request(client, ctx)
                if not name:
                    time.sleep(0.005)
                    continue
                data = self.on_download(client.name, name, fobs.loads(fobs.dumps(data)))
                with lock:
                    run.sent.append((client.name, name, data))
                self.on_task(client.name, name, "before")
                turn = one_at_a_time if name in _DRAWS_OR_BUILDS else contextlib.nullcontext()
                with turn, site_engine.new_context() as ctx:
                    ctx.set_prop(FLContextKey.TASK_NAME, name, private=True, sticky=False)
                    reply = executor.execute(name, data, ctx, site_engine.abort)
                    if client.name in bus.dead:
                        raise Killed
                    reply = guard.process(reply, ctx)
                self.on_task(client.name, name, "after")
                while client.name in bus.silent and not bus.done.wait(0.005):
                    pass
                payload = fobs.dumps(self.on_upload(client.name, name, reply))
                arrived = fobs.loads(payload)
                with lock:
                    run.received.append(Received(client.name, name, payload, fobs.loads(payload)))
                with engine.new_context() as ctx:
                    communicator.process_submission(client, name, task_id, arrived, ctx)
                done, name = name, ""
                self.on_task(client.name, done, "sent")

        threads = [
            threading.Thread(
                target=live,
                args=(client, None if client.name in bus.down else come_up(client)),
                daemon=True,
            )
            for client in clients
        ]
        for thread in threads:
            thread.start()
        with engine.new_context() as ctx:
            workflow.control_flow(Signal(), ctx)
        bus.done.set()
        for site in self.sites:
            if site in bus.engines:
                bus.engines[site].abort.trigger(True)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a site has not come to its end"
        for error in bus.errors:
            raise error
        communicator._all_done = True
        run.folder = Path(engine.workspace.get_run_dir(job_id))
        run.outcome = json.loads((run.folder / "outcome.json").read_text())

    def _workspace(self, run: Run, name: str, job_id: str) -> Workspace:
        folder = run.root / name
        for part in ("startup", "local", job_id):
            (folder / part).mkdir(parents=True, exist_ok=True)
        if self.kits is not None:
            shutil.copytree(self.kits / name, folder / "startup", dirs_exist_ok=True)
        workspace = Workspace(str(folder), name)
        if name != "server":
            settings = {
                "data": str(self.data / "{site}"),
                "store": str(self.folder / "stores" / "{site}"),
                "threads": 1,
                "identity": "ephemeral" if self.kits is None else "kit",
                "evaluation_release": True,
                "max_released_rows": 1000,
                **self.settings,
                **self.site_settings.get(name, {}),
            }
            local = Path(workspace.get_site_config_dir())
            (local / "fedgestalt.yaml").write_text(yaml.safe_dump(settings))
        return workspace


@dataclass
class BothJobs:
    """A training job and the evaluation that followed it."""

    consortium: Consortium
    training: Run
    matching: Run


@dataclass(frozen=True)
class Summed:
    """A round as it should have been: whose session it was, and whose updates are in the sum.

    Attributes:
        survivors: whose updates.
        session: all sites of the session; the survivors if not given.
        repeats: how often each site's update to this model had left it before.
    """

    survivors: Sequence[str]
    session: Sequence[str] = ()
    repeats: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlainUpdate:
    """What a site computes in a round before it masks anything."""

    plan: NumberPlan
    words: NDArray[np.uint32]
    update: SharedState
    new: SharedState


class Plain:
    """What a training job comes to, computed without server, sites, messages and masks."""

    def __init__(self, consortium: Consortium, job: TrainingJob) -> None:
        self.job, self.silos = job, consortium.silos
        self.aggregation = Aggregation(
            Scope(job.scope),
            Rule(job.rule),
            Recipient(job.reveal_aggregate_to),
            ThreatModel(job.threat_model),
            job.max_images_per_site,
            ServerStep(
                Optimiser(job.server_optimiser), job.server_learning_rate, job.server_momentum
            ),
        )
        classes = training_set(next(iter(self.silos.values()))).classes
        ensemble = build_ensemble(job.ensemble, classes, get_registry())
        self.outline, self.start = ensemble.outline(), read_shared_state(ensemble)
        self._trainers: dict[str, LocalTrainer] = {}
        self._trained: dict[Any, tuple[SharedState, dict[str, MemberMetrics]]] = {}

    def data(self, site: str) -> TrainingSet:
        """A site's training images."""
        return self._trainer(site).data

    def train(
        self, site: str, state: SharedState, number: int, repeat: int = 0
    ) -> tuple[SharedState, dict[str, MemberMetrics]]:
        """A site's training in a round; remembered."""
        key = site, number, repeat, shared_state_digest(state)
        if key not in self._trained:
            torch.set_num_threads(1)
            new, metrics = self._trainer(site).run_round(state, number, repeat=repeat)
            self._trained[key] = new, metrics
        return self._trained[key]

    def states(self, *rounds: Summed) -> list[SharedState]:
        """The model before the first round, and after each."""
        states = [self.start]
        aggregated = self.aggregation.shared(self.start, self.job.ensemble)
        remembered: dict[str, dict[str, Any]] = {}
        model = dict(aggregated)
        rest = {name: v for name, v in self.start.items() if name not in aggregated}
        own = {site: dict(rest) for site in self.silos}
        ranges = first_ranges(model, self.job.ensemble)
        for number, summed in enumerate(rounds, 1):
            plan = self._plan(ranges, len(summed.session or summed.survivors))
            total = np.zeros(plan.words, np.uint32)
            for site in summed.survivors:
                repeat = summed.repeats.get(site, 0)
                new, metrics = self.train(site, {**own[site], **model}, number, repeat)
                own[site] = {name: new[name] for name in rest}
                update = {name: new[name] - values for name, values in model.items()}
                total += self._encode(plan, site, with_metrics(update, metrics))
            aggregate = plan.decode(total)
            if self.aggregation.recipient is Recipient.SERVER:
                ranges = next_ranges(ranges, aggregate, number)
            for name, values in model.items():
                step = aggregate.mean[name]
                if "running_" not in name:
                    step = self._moved(step, remembered.setdefault(name, {}))
                model[name] = values + step
            states.append({**rest, **model})
        return states

    def _moved(self, mean: Any, remembered: dict[str, Any]) -> Any:
        """What the server's optimiser makes of a tensor's mean update."""
        one, rate, beta = map(
            np.float32, (1, self.job.server_learning_rate, self.job.server_momentum)
        )
        last = remembered.get("velocity", np.zeros_like(mean))
        if self.job.server_optimiser == "sgd":
            remembered["velocity"] = last * beta + mean
            return remembered["velocity"] * rate
        tau, gamma = np.float32(1e-6), np.float32(0.99)
        squares = remembered.get("squares", np.full_like(mean, tau * tau))
        remembered["velocity"] = last * beta + mean * (one - beta)
        remembered["squares"] = squares * gamma + mean * mean * (one - gamma)
        return remembered["velocity"] * rate / (np.sqrt(remembered["squares"]) + tau)

    def digest(self, *rounds: Summed) -> str:
        """Of the ensemble that is published after these rounds."""
        return self.outline.digest(self.states(*rounds)[-1])

    def first_plan(self) -> NumberPlan:
        """Of the first round, with all sites in the session."""
        shared = self.aggregation.shared(self.start, self.job.ensemble)
        ranges = first_ranges(shared, self.job.ensemble)
        return self._plan(ranges, len(self.silos))

    def first_sum(self) -> NDArray[np.uint32]:
        """The words of all sites' first updates, added."""
        words = [self.first_update(site).words for site in self.silos]
        return np.add.reduce(words, dtype=np.uint32)

    def first_update(self, site: str) -> PlainUpdate:
        """A site's first update, with all sites in the session."""
        plan = self.first_plan()
        new, metrics = self.train(site, self.start, 1)
        update = {name: values - self.start[name] for name, values in new.items()}
        words = self._encode(plan, site, with_metrics(update, metrics))
        return PlainUpdate(plan, words, update, new)

    def _plan(self, ranges: Mapping[str, float], sites: int) -> NumberPlan:
        return number_plan(
            shapes_of(self.aggregation.shared(self.start, self.job.ensemble)),
            exponents_of(ranges),
            sites,
            self.aggregation,
            self.job.ensemble,
            self.outline.classes,
        )

    def _encode(self, plan: NumberPlan, site: str, update: SharedState) -> NDArray[np.uint32]:
        targets = self.data(site).targets
        return plan.encode(update, len(targets), row_weights(plan, targets))

    def _trainer(self, site: str) -> LocalTrainer:
        if site not in self._trainers:
            spec, cohort = self.job.ensemble, self.silos[site]
            data = training_set(cohort)
            self._trainers[site] = LocalTrainer(
                build_ensemble(spec, data.classes, get_registry()),
                data,
                torch.device("cpu"),
                local_seed(spec.seed, site),
                held_out=held_out_set(cohort),
            )
        return self._trainers[site]


def write_kits(folder: Path, sites: Sequence[str], root: str = "fedgestalt") -> Path:
    """Startup kits of a consortium, as far as identities go: made as ``nvflare`` makes them."""
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)

    def certificate(
        name: str, role: str, key: rsa.RSAPrivateKey, issuer: str, by: rsa.RSAPrivateKey
    ) -> bytes:
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        if role:
            subject.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
        built = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + 300 * day)
            .add_extension(x509.BasicConstraints(ca=not role, path_length=None), critical=not role)
            .sign(by, hashes.SHA256())
        )
        return built.public_bytes(serialization.Encoding.PEM)

    root_key = rsa.generate_private_key(65537, 2048)
    root_pem = certificate(root, "", root_key, root, root_key)
    for name in (*sites, "server"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rootCA.pem").write_bytes(root_pem)
    for site in sites:
        key = rsa.generate_private_key(65537, 2048)
        (folder / site / "client.crt").write_bytes(certificate(site, "client", key, root, root_key))
        (folder / site / "client.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
    return folder


def _parts(
    job: JobSpec, settings: Mapping[str, Any], workflow: Callable[..., PhasedWorkflow] | None
) -> tuple[PhasedWorkflow, Make, dict[str, Any]]:
    arguments = {**job.workflow_arguments(), **settings}
    if isinstance(job, TrainingJob):
        own = job.executor_arguments()
        parts = {"aggregator": ZeroSumMaskAggregator(**job.component_arguments()["aggregator"])}
        controller = (workflow or EnsembleTrainingWorkflow)(**arguments)
        return controller, lambda: EnsembleTrainer(**own), parts
    if isinstance(job, DiscoveryJob):
        return (workflow or DiscoveryWorkflow)(**arguments), CaseFinder, {}
    return (workflow or FlakeSimilarityWorkflow)(**arguments), FlakeMatcher, {}
