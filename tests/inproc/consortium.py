"""A consortium in one process: FLARE's real server communicator, controllers, executors and FOBS.

No sockets and no processes, so a whole job takes about a second. Every byte that reaches the server
is kept for inspection.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from nvflare.apis.client import Client
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContextManager
from nvflare.apis.impl.wf_comm_server import WFCommServer
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.apis.workspace import Workspace
from nvflare.app_common.decomposers import common_decomposers
from nvflare.fuel.utils import fobs

from fedgestalt.cohort import Cohort, ImageRecord, RareSplit, Syndrome, save_jpeg, write_silos
from fedgestalt.cohort.layout import image_file
from fedgestalt.federation.job.executor import SiteExecutor
from fedgestalt.federation.job.workflow import PhasedWorkflow
from fedgestalt.federation.matching.executor import FlakeMatcher
from fedgestalt.federation.matching.workflow import FlakeSimilarityWorkflow
from fedgestalt.federation.site.outgoing import OutgoingGuard
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.federation.training.rounds import round_facts, with_metrics
from fedgestalt.federation.training.workflow import EnsembleTrainingWorkflow
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import JobSpec, TrainingJob
from fedgestalt.learning.data import held_out_set, local_seed, training_set
from fedgestalt.learning.ensemble import SharedState, build_ensemble
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer
from fedgestalt.secagg import NumberPlan

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


def tiny_silos(
    folder: Path,
    sites: Sequence[str],
    seed: int = 0,
    frequent: int = 3,
    mislabelled: Sequence[str] = (),
    test_subjects: Mapping[str, int] | None = None,
    spread: float = 30.0,
) -> dict[str, Cohort]:
    """Deal a small cohort: some frequent and 2 rare syndromes; subjects differ in their colours.

    A site that is ``mislabelled`` calls every frequent syndrome by the name of the next one. It has
    1 test subject of each, unless ``test_subjects`` says otherwise; ``spread`` is how far the
    subjects of one syndrome differ.
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
            for role in roles:
                number += 1
                subject = f"SUBJECT-{number:04d}"
                base = tints[index] + rng.normal(0, spread, 3)
                for shot in range(2):
                    image_id = f"IMAGE-{number:04d}-{shot}"
                    pixels = base + rng.normal(0, 25, (14, 14, 3))
                    pixels = np.kron(np.clip(pixels, 0, 255), np.ones((8, 8, 1)))
                    place = image_file(folder / "sources", image_id)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    save_jpeg(place, pixels.astype(np.uint8))
                    said = wrong.get(syndrome, syndrome) if site in mislabelled else syndrome
                    images[image_id] = ImageRecord(image_id, subject, said, place)
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
    write_silos(silos, folder / "hospitals")
    return silos


@dataclass
class Received:
    """One message that reached the server, as FLARE serialised it."""

    site: str
    task: str
    payload: bytes
    reply: Shareable


@dataclass
class Run:
    """What a job left behind."""

    outcome: dict[str, Any]
    received: list[Received]
    sent: list[tuple[str, str, Shareable]]
    folder: Path
    panics: list[str]

    def replies(self, task: str) -> dict[str, dict[str, Any]]:
        """The unchecked fields of all replies to a task, by site."""
        return {r.site: r.reply["fedgestalt"] for r in self.received if r.task == task}


Tamper = Callable[[str, str, Shareable], Shareable]
"""Called with (site, task, data); returns what arrives instead."""


def untouched(site: str, task: str, data: Shareable) -> Shareable:
    """Deliver as sent."""
    return data


class _Engine:
    def __init__(
        self, name: str, clients: list[Client], workspace: Workspace, components: Mapping[str, Any]
    ) -> None:
        self.clients, self.workspace, self.components = clients, workspace, components
        self.panics: list[str] = []
        private = {
            FLContextKey.WORKSPACE_OBJECT: workspace,
            FLContextKey.JOB_META: {"min_clients": 1},
        }
        self._contexts = FLContextManager(
            engine=self,
            identity_name=name,
            job_id=JOB_ID,
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

    def send_aux_request(self, targets: Sequence[str], **_: Any) -> dict[str, Shareable]:
        """All sites are alive here."""
        return {site: make_reply(ReturnCode.OK) for site in targets}


@dataclass
class Consortium:
    """Sites with data and stores on disk; jobs run on it one after another.

    Attributes:
        folder: of everything that the consortium has on disk.
        sites: their names.
        settings: of all sites, beside those that they need.
        site_settings: of single sites; they win over ``settings``.
        frequent, mislabelled, test_subjects, spread: see :func:`tiny_silos`.
        on_upload, on_download: stand between the sites and the server.
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
    on_upload: Tamper = untouched
    on_download: Tamper = untouched
    jobs: int = 0

    def __post_init__(self) -> None:
        self.silos = tiny_silos(
            self.folder,
            self.sites,
            frequent=self.frequent,
            mislabelled=self.mislabelled,
            test_subjects=self.test_subjects,
            spread=self.spread,
        )

    def store(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return self.folder / "stores" / site

    def run(self, job: JobSpec, executor: Callable[[], SiteExecutor] | None = None) -> Run:
        """Run a job to its end."""
        self.jobs += 1
        root = self.folder / f"run-{self.jobs}"
        workflow, make, components = _parts(job)
        make = executor or make
        clients = [Client(site, f"token-{site}") for site in self.sites]
        engine = _Engine("server", clients, _workspace(root, "server"), components)
        communicator = WFCommServer(task_check_period=0.005)
        workflow.set_communicator(communicator)
        communicator.controller = workflow
        workflow._task_check_period = 0.005
        context = engine.new_context()
        workflow.initialize(context)
        communicator.initialize_run(context)
        abort, done = Signal(), threading.Event()
        run = Run({}, [], [], Path(), engine.panics)
        lock, one_at_a_time = threading.Lock(), threading.Lock()

        def site_loop(client: Client) -> None:
            workspace = _workspace(root, client.name)
            own_settings = {
                "data": str(self.folder / "hospitals" / "{site}"),
                "store": str(self.folder / "stores" / "{site}"),
                "threads": 1,
                "evaluation_release": True,
                "max_released_rows": 1000,
                **self.settings,
                **self.site_settings.get(client.name, {}),
            }
            local = Path(workspace.get_site_config_dir())
            (local / "fedgestalt.yaml").write_text(yaml.safe_dump(own_settings))
            site_engine = _Engine(client.name, clients, workspace, {})
            executor_, guard = make(), OutgoingGuard()
            while not done.is_set():
                with engine.new_context() as ctx:
                    name, task_id, data = communicator.process_task_request(client, ctx)
                if not name:
                    time.sleep(0.005)
                    continue
                data = self.on_download(client.name, name, fobs.loads(fobs.dumps(data)))
                with lock:
                    run.sent.append((client.name, name, data))
                # Sites are processes of their own elsewhere; here they share torch's random state.
                with one_at_a_time, site_engine.new_context() as ctx:
                    ctx.set_prop(FLContextKey.TASK_NAME, name, private=True, sticky=False)
                    reply = guard.process(executor_.execute(name, data, ctx, abort), ctx)
                payload = fobs.dumps(self.on_upload(client.name, name, reply))
                arrived = fobs.loads(payload)
                with lock:
                    run.received.append(Received(client.name, name, payload, fobs.loads(payload)))
                with engine.new_context() as ctx:
                    communicator.process_submission(client, name, task_id, arrived, ctx)

        threads = [threading.Thread(target=site_loop, args=(c,), daemon=True) for c in clients]
        for thread in threads:
            thread.start()
        with engine.new_context() as ctx:
            workflow.control_flow(abort, ctx)
        done.set()
        for thread in threads:
            thread.join(5)
        communicator._all_done = True
        run.folder = Path(engine.workspace.get_run_dir(JOB_ID))
        run.outcome = json.loads((run.folder / "outcome.json").read_text())
        return run


@dataclass
class BothJobs:
    """A training job and the evaluation that followed it."""

    consortium: Consortium
    training: Run
    matching: Run


@dataclass(frozen=True)
class PlainUpdate:
    """What a site computes in a round before it masks anything."""

    plan: NumberPlan
    words: NDArray[np.uint32]
    update: SharedState
    new: SharedState


def plain_update(consortium: Consortium, run: Run, site: str) -> PlainUpdate:
    """Compute a site's first update again, from what the server sent it."""
    starts = [d["fedgestalt"] for s, task, d in run.sent if (s, task) == (site, "fgm_round")]
    start = next(fields for fields in starts if fields["round"] == 1)
    spec, data = tiny_ensemble(), training_set(consortium.silos[site])
    torch.set_num_threads(1)
    ensemble = build_ensemble(spec, data.classes, get_registry())
    seed, held_out = local_seed(spec.seed, site), held_out_set(consortium.silos[site])
    trainer = LocalTrainer(ensemble, data, torch.device("cpu"), seed, held_out=held_out)
    new, metrics = trainer.run_round(start["state"], 1)
    update = {name: values - start["state"][name] for name, values in new.items()}
    facts = round_facts(
        job=JOB_ID,
        attempt=1,
        round_number=1,
        state=dict(start["state"]),
        exponents=start["exponents"],
        max_weight=start["max_weight"],
        roster=tuple(consortium.sites),
        spec=spec,
    )
    words = facts.plan.encode(with_metrics(update, metrics), len(data.targets))
    return PlainUpdate(facts.plan, words, update, new)


def _parts(job: JobSpec) -> tuple[PhasedWorkflow, Callable[[], SiteExecutor], dict[str, Any]]:
    arguments = job.workflow_arguments()
    if isinstance(job, TrainingJob):
        ensemble = job.executor_arguments()["ensemble"]
        parts = {"aggregator": ZeroSumMaskAggregator()}
        return EnsembleTrainingWorkflow(**arguments), lambda: EnsembleTrainer(ensemble), parts
    return FlakeSimilarityWorkflow(**arguments), FlakeMatcher, {}


def _workspace(root: Path, name: str) -> Workspace:
    folder = root / name
    for part in ("startup", "local", JOB_ID):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return Workspace(str(folder), name)
