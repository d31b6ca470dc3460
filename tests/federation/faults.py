"""Faults in the processes of one site, and what it takes to watch them.

A site starts with a folder of its own on its PYTHONPATH. The ``sitecustomize`` module in it, which
Python imports first, patches modules of that site's processes as they are imported. Job processes
are new for every job, so a fault can come and go without a restart of the site. The files of the
installed package stay as they are.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from hospitals import Hospitals

import fedgestalt
from fedgestalt.errors import ServerError
from fedgestalt.federation.operations.local import LocalConsortium
from fedgestalt.federation.site.outgoing import SENT_FILE
from fedgestalt.federation.tasks import TRAIN
from fedgestalt.federation.training.checkpoints import MODELS_FOLDER
from fedgestalt.jobs import JobSpec

OnReport = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)

LIMIT_SECONDS = 150.0
_POLL_SECONDS = 0.1
_LAST_LINES = 8
_REPORT_SECONDS = 0.5
"""FLARE's API answers quickly, but not for nothing."""
_JOB_PROCESSES = ("worker_process", "runner_process")

_SITECUSTOMIZE = '''
import importlib.machinery
import sys
from pathlib import Path

here = Path(__file__).parent
if (here / "modified").is_dir():
    sys.path.insert(0, str(here / "modified"))


class Faults:
    """Loads modules as usual, then patches those that the fault names."""

    patches = {}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name not in cls.patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_patch(module):
            load(module)
            cls.patches[name](module)

        spec.loader.exec_module = load_and_patch
        return spec


if (here / "fault.py").exists():
    fault = {"here": here}
    exec((here / "fault.py").read_text(), fault)
    Faults.patches = fault["PATCHES"]
    sys.meta_path.insert(0, Faults)
'''

CHANGED_ROUND = """
import time
import numpy as np

def changed_round(module):
    run_round = module.LocalTrainer.run_round
    def changed(self, state, number, progress, repeat=0):
        {before}
        new, metrics = run_round(self, state, number, progress, repeat)
        return {{name: {new} for name, values in new.items()}}, metrics
    module.LocalTrainer.run_round = changed

PATCHES = {{"fedgestalt.learning.training": changed_round}}
"""
"""Training of a round that does something before it, or returns other values."""

NOT_A_NUMBER = CHANGED_ROUND.format(before="", new="values * np.float32('nan')")
POISON = CHANGED_ROUND.format(
    before="", new="(state[name] + 1e6 * (values - state[name])).astype(np.float32)"
)
UNCHECKED = """
def unchecked(module):
    module.check_update_norm = lambda *arguments: None

PATCHES["fedgestalt.federation.training.executor"] = unchecked
"""
OLD_VERSION = """
def old_version(module):
    module.__version__ = "0.0.9"

PATCHES = {"fedgestalt": old_version}
"""
MIXED_UP_LABELS = """
import dataclasses

def mixed_up(data, every):
    targets = (data.targets[::every] + 1) % data.classes
    return dataclasses.replace(data, faces=data.faces[::every], targets=targets)

def mixed_up_labels(module):
    training_set, held_out_set = module.training_set, module.held_out_set
    module.training_set = lambda cohort: mixed_up(training_set(cohort), 6)
    module.held_out_set = lambda cohort: mixed_up(held_out_set(cohort), 1)

PATCHES = {"fedgestalt.federation.training.executor": mixed_up_labels}
"""
"""A site with few images to train on calls every syndrome by the name of the next one."""

WRONG_CLOCK = """
import time

real, PATCHES = time.time, {{}}
time.time = lambda: real() + {seconds}
"""


FALL = """
import os
import signal
import time

asked = []

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_with_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

def freeze():
    os.kill(os.getppid(), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)

def hang():
    time.sleep(300)

def wait():
    while not (here / "go").exists():
        time.sleep(0.1)

def fall():
    while len(asked) < 2:
        time.sleep(0.1)
    (here / "fell").write_text(repr(time.time()))
    {how}()

def falls(module):
    from fedgestalt.federation.job import executor

    trainer, upload, calls = module.EnsembleTrainer, executor.upload, []
    handlers, on_ping = trainer.handlers, trainer._on_ping

    def with_fall(self):
        found = dict(handlers(self))
        handle = found["{task}"]
        def handle_or_fall(fields):
            calls.append(fields)
            if len(calls) == {call} and {chunk} is None:
                fall()
            return handle(fields)
        return found | {{"{task}": handle_or_fall}}

    def upload_or_fall(*arguments, progress, **options):
        def count(done, total):
            progress(done, total)
            if len(calls) == {call} and done == {chunk}:
                fall()
        upload(*arguments, progress=count, **options)
        if len(calls) == {call} and {chunk} == 0:
            fall()

    def ping(self, **arguments):
        asked.append(arguments)
        return on_ping(self, **arguments)

    trainer.handlers, trainer._on_ping = with_fall, ping
    executor.upload = upload_or_fall

PATCHES = {{"fedgestalt.federation.training.executor": falls}}
"""
"""A job process that dies, alone or with its parent, freezes with its parent, hangs, or waits.

The server has heard of it before: it asks every process whether it is alive. ``here/fell`` says
when it happened.
"""


def falls_in(task: str, call: int = 1, how: str = "die", chunk: int | None = None) -> str:
    """A site falls when a task comes for the ``call``-th time.

    Args:
        task: which.
        call: counted in each job.
        how: ``die``, ``die_with_parent``, ``freeze``, ``hang``, or ``wait`` for
            :meth:`Patient.go`.
        chunk: of the task's upload; then it falls when so many are through, and with 0 after all of
            them are, before it answers.
    """
    return FALL.format(task=task, call=call, how=how, chunk=chunk)


def slow(seconds: float) -> str:
    """A round takes so much longer."""
    return CHANGED_ROUND.format(before=f"time.sleep({seconds})", new="values")


@dataclass
class Patient:
    """One site's folder of faults."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        (self.folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)

    @property
    def environment(self) -> dict[str, str]:
        """For the site's process."""
        return {"PYTHONPATH": str(self.folder)}

    @contextlib.contextmanager
    def suffers(self, fault: str) -> Iterator[None]:
        """Every process that the site starts meanwhile has this fault."""
        (self.folder / "fault.py").write_text(fault)
        for note in ("fell", "go"):
            (self.folder / note).unlink(missing_ok=True)
        try:
            yield
        finally:
            (self.folder / "fault.py").unlink()

    @property
    def fell(self) -> float | None:
        """When the site fell, if it did; see :data:`FALL`."""
        note = self.folder / "fell"
        return float(note.read_text()) if note.exists() else None

    def go(self) -> None:
        """Let it go on, if it waits."""
        (self.folder / "go").touch()

    @contextlib.contextmanager
    def has_other_files(self) -> Iterator[None]:
        """Every process that the site starts meanwhile runs a copy that was edited."""
        source, copy = Path(fedgestalt.__file__).parent, self.folder / "modified" / "fedgestalt"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / "secagg" / "plan.py").open("a") as file:
            file.write("\n# edited at this site\n")
        try:
            yield
        finally:
            shutil.rmtree(copy.parent)


@dataclass
class Ward:
    """A consortium whose sites can fall ill.

    Attributes:
        hospitals: the consortium.
        local: its processes.
        patients: folders of faults, by site.
    """

    hospitals: Hospitals
    local: LocalConsortium
    patients: dict[str, Patient] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.hospitals.sites:
            self.patients[site] = Patient(self.hospitals.folder / "faults" / site)

    def start(self, site: str) -> None:
        """Start a site, with its folder of faults."""
        self.local.start(self.hospitals.kit(site), self.patients[site].environment)

    def submit(self, job: JobSpec) -> str:
        """Submit a job; returns its id."""
        return self.local.session.submit(self.hospitals.render(job))

    def run(self, job: JobSpec, on_report: OnReport | None = None) -> dict[str, Any]:
        """Run a job to its end; see :meth:`ended`."""
        began = time.monotonic()
        outcome = self.ended(self.submit(job), on_report=on_report)
        measured(f"{outcome['status']} {outcome['seconds']} s, from submission", began)
        return outcome

    def report(self, job: str) -> dict[str, Any]:
        """Our report of a running job, or an empty mapping.

        FLARE's API waits for 5 seconds; a job process that starts or ends may take longer.
        """
        try:
            return self.local.session.progress(job)
        except ServerError:
            return {}

    def wait_until_only(self, site: str, job: str) -> None:
        """Wait until all sites but one have trained their round."""

        def alone() -> bool:
            report = self.report(job)
            working = [s for s, e in report.get("sites", {}).items() if e["state"] == "working"]
            return report.get("phase") == TRAIN and working == [site]

        until(alone, f"{site} to be the last one that trains")

    def ended(
        self, job: str, limit_seconds: float = LIMIT_SECONDS, on_report: OnReport | None = None
    ) -> dict[str, Any]:
        """Wait for the end of a job; its outcome with FLARE's status as ``flare``."""

        def is_over() -> bool:
            if on_report and (report := self.report(job)):
                on_report(report)
            return self.local.session.status(job).startswith("FINISHED")

        try:
            until(is_over, f"the end of job {job}", limit_seconds, _REPORT_SECONDS)
        except AssertionError as error:
            error.add_note(self.state(job))
            raise
        return {**self.local.session.outcome(job), "flare": self.local.session.status(job)}

    def state(self, job: str) -> str:
        """What is known of a job that does not end."""
        lines = [f"report: {self.report(job)}"]
        for party in self.local.running:
            lines.append(f"{party}: job processes {self.job_processes(party)}")
            logs = list((self.hospitals.kit(party) / job).glob("log.txt"))
            for log_file in logs:
                lines += log_file.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return "\n".join(lines)

    def job_processes(self, *parties: str) -> list[int]:
        """Processes of jobs that run now."""
        found = []
        for party in parties or tuple(self.local.running):
            for process in self.local.running[party].members():
                with contextlib.suppress(psutil.Error):
                    if any(name in " ".join(process.cmdline()) for name in _JOB_PROCESSES):
                        found.append(process.pid)
        return found

    def vectors(self, site: str, job: str) -> int:
        """How many masked vectors have left a site in a job, by its own record."""
        record = self.hospitals.store(site) / SENT_FILE
        lines = record.read_text().splitlines() if record.exists() else ()
        mine = [line for line in map(json.loads, lines) if line["job"] == job]
        return [line["message"] for line in mine].count("masked vector")

    def forget(self) -> None:
        """Let no site remember a model, nor that an update to it was sent.

        A job gives the same model as one before only at sites that have sent no update for it yet:
        whatever is trained again is trained with other draws.
        """
        for site in self.hospitals.sites:
            shutil.rmtree(self.hospitals.store(site) / MODELS_FOLDER, ignore_errors=True)

    def log(self, party: str) -> str:
        """What FLARE wrote at a site or at the server."""
        return log_of(self.hospitals.kit(party))


def measured(what: str, began: float) -> None:
    """Note the time since ``began``; ``pytest --log-cli-level=INFO`` shows it."""
    log.info("measured: %s after %.1f seconds", what, time.monotonic() - began)


def log_of(kit: Path) -> str:
    """The console of a kit's process."""
    log = kit / "console.log"
    return log.read_text(errors="replace") if log.exists() else ""


def until(
    happens: Callable[[], object],
    what: str,
    limit_seconds: float = LIMIT_SECONDS,
    poll_seconds: float = _POLL_SECONDS,
) -> float:
    """Wait for something; returns the seconds it took."""
    started = time.monotonic()
    while not happens():
        waited = time.monotonic() - started
        assert waited < limit_seconds, f"waited {waited:.0f} seconds for {what}"
        time.sleep(poll_seconds)
    return time.monotonic() - started
