"""Runs the demonstration: cohort, hospitals, two FLARE jobs, comparison, report."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fedgestalt.cohort import (
    Cohort,
    check_cohort,
    default_cache,
    materialise,
    read_cohort,
    split_cohort,
    write_silos,
)
from fedgestalt.console import Steps
from fedgestalt.demo.baselines import Baseline, Hospital, train_together
from fedgestalt.demo.outcomes import Ledger, SiteMatches, add_shared_gallery, read_matches
from fedgestalt.demo.pictures import examples, gram_view
from fedgestalt.errors import ConfigError, FedgestaltError, SiteError
from fedgestalt.federation.tasks import PHASES
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import JobSpec, MatchingJob, TrainingJob, render_job
from fedgestalt.learning.spec import EnsembleSpec, default_ensemble
from fedgestalt.reporting.report import write_report
from fedgestalt.reporting.result import CohortFacts, Privacy, Result, RoundFacts, SiteFacts

MINIMUM_HOSPITALS = 3
_LIMIT = {"phase_limit_seconds": 900.0}
TRAINING_DISCLOSURE = (
    "The server learns the weighted mean of the hospitals' updates, the total number of training"
    " images, the mean loss, accuracy and agreement, and how many values were clipped in all; of"
    " one hospital its software versions, how far it is with its work, and whether the model agrees"
    " with far fewer of its labels than with everybody's. A hospital learns the global model and"
    " the mean agreement. All hospitals but one together could work out the last one's update. What"
    " only one hospital has, such as a syndrome no other trains on, shows in the mean. Mask keys"
    " are not signed: a server that replaces keys is not detected."
)


@dataclass(frozen=True)
class DemoSettings:
    """What ``fedgestalt demo`` was asked to do.

    Attributes:
        cohort: name of a cohort plugin, or a folder in GMDB layout.
        sites: number of hospitals, at least 3.
        split: how the cohort is dealt, see :data:`fedgestalt.cohort.STRATEGIES`.
        out: folder for the result.
        seeds: the run is repeated with each; tables are means over them.
    """

    cohort: str
    sites: int
    split: str
    out: Path
    seeds: tuple[int, ...]


def run_demo(settings: DemoSettings, steps: Steps) -> Result:
    """Run the whole job; its two files appear in ``out`` at the end or not at all.

    Raises:
        FedgestaltError: anything foreseeable, in one sentence; earlier results stay as they are.
    """
    if settings.sites < MINIMUM_HOSPITALS:
        raise ConfigError(
            f"--sites {settings.sites} is too few: with fewer than {MINIMUM_HOSPITALS}, a hospital"
            " could tell another's update from the sum",
            remedy=f"use --sites {MINIMUM_HOSPITALS} or more",
        )
    with _work_folder(settings.out) as work:
        result = _run(settings, steps, work)
        for name in ("report.html", "result.json"):
            (work / name).replace(settings.out / name)
    return result


def _round_facts(seed: int, record: dict[str, Any]) -> RoundFacts:
    """A round of the outcome; all hospitals take part here."""
    return RoundFacts(seed=seed, **{name: v for name, v in record.items() if name != "sites"})


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside the result that vanishes with this run; after a failure its logs stay."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out, prefix=".work-"))
    except OSError as error:
        raise ConfigError(
            f"cannot be written ({error.strerror})", where=str(out), remedy="choose another --out"
        ) from None
    try:
        yield work
    except FedgestaltError as error:
        kept = out / "logs"
        for log in (*work.glob("*.log"), *work.glob("seed-*/*.log")):
            place = kept / log.relative_to(work)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, place)
        if str(work) in error.remedy:
            error.remedy = error.remedy.replace(str(work), str(kept))
        raise
    except OSError as error:
        what = f"the run could not go on ({error.strerror or error})"
        raise SiteError(what, where=error.filename or str(out)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def open_cohort(name: str, steps: Steps) -> tuple[Cohort, bool]:
    """Find or build a cohort; returns it and whether it has patients.

    Raises:
        PluginError: it is neither a cohort plugin nor a folder.
        DataError: it cannot be read.
    """
    catalogue = get_registry().cohorts
    if name not in catalogue.names() and ("/" in name or Path(name).is_dir()):
        with steps.step("cohort", f"Checking the cohort in {name}"):
            for finding in check_cohort(Path(name)):
                if finding.severity == "error":
                    raise finding.as_error()
            return read_cohort(Path(name)), True
    source = catalogue.get(name)
    with steps.step("cohort", f"Preparing cohort {name}"):
        root = materialise(
            source, default_cache(), lambda done, total: steps.note(f"{done} of {total} images")
        )
        return read_cohort(root, name=name), source.has_patients


def _run(settings: DemoSettings, steps: Steps, work: Path) -> Result:
    cohort, has_patients = open_cohort(settings.cohort, steps)
    names = [f"hospital-{number}" for number in range(1, settings.sites + 1)]
    ledger, rounds = Ledger(), list[RoundFacts]()
    site_facts: list[SiteFacts] = []
    for index, seed in enumerate(settings.seeds):
        last = index == len(settings.seeds) - 1
        folder = work / f"seed-{seed}"
        if len(settings.seeds) > 1:
            steps.say(f"Seed {seed} ({index + 1} of {len(settings.seeds)})")
        run = _SeedRun(cohort, names, settings.split, seed, folder, steps)
        spec, trained, matched = run.federate()
        rounds += [_round_facts(seed, record) for record in trained["rounds"]]
        site_matches = {h.name: read_matches(h, matched["job"]) for h in run.hospitals}
        for found in site_matches.values():
            ledger.add("federated", index, found.cohort, found.image_ids, found.ranked)
        run.compare(spec, trained, ledger, index)
        if last:
            site_facts = [_site_facts(name, found) for name, found in site_matches.items()]
            pictures = examples(cohort, site_matches, show_faces=not has_patients)
            view = gram_view(run.gram_file, cohort, site_matches)
        for log in folder.glob("*.log"):
            log.replace(work / f"seed-{seed}-{log.name}")
        shutil.rmtree(folder)
    result = Result(
        cohort=CohortFacts(
            name=cohort.name,
            version=cohort.version,
            digest=cohort.digest,
            images=len(cohort.images),
            subjects=len(cohort.subjects),
            syndromes=len(cohort.images_per_syndrome()),
            has_patients=has_patients,
        ),
        split=settings.split,
        ensemble=[
            {"name": m.name, "backbone": m.backbone, "trainable": m.trainable} for m in spec.members
        ],
        sites=site_facts,
        rounds=rounds,
        evaluation=ledger.tables(),
        privacy=Privacy(**matched["privacy"], training=TRAINING_DISCLOSURE),
        timings_seconds={**steps.seconds, "total": round(sum(steps.seconds.values()), 2)},
        seeds=list(settings.seeds),
    )
    result.write(work / "result.json")
    write_report(work / "report.html", result, pictures, view)
    return result


def _site_facts(name: str, found: SiteMatches) -> SiteFacts:
    cohort = found.cohort
    return SiteFacts(
        name=name,
        images=len(cohort.images),
        subjects=len(cohort.subjects),
        training_images=len(cohort.train),
        queries=len(found.queries),
    )


class _SeedRun:
    """One seed: hospitals on disk, two FLARE jobs, and the comparison."""

    def __init__(
        self,
        cohort: Cohort,
        names: Sequence[str],
        split: str,
        seed: int,
        folder: Path,
        steps: Steps,
    ) -> None:
        self._folder, self._seed, self._steps, self._names = folder, seed, steps, list(names)
        self._cohort = cohort
        folder.mkdir()
        self._data, self._stores = folder / "hospitals", folder / "stores"
        with steps.step("split", f"Dealing {len(cohort.images)} images to {len(names)} hospitals"):
            write_silos(split_cohort(cohort, names, split, seed), self._data)
        self.hospitals = [Hospital(n, self._data / n, self._stores / n) for n in names]

    @property
    def gram_file(self) -> Path:
        """Where the matching server left the Gram matrix."""
        from fedgestalt.federation.matching.workflow import GRAM_FILE
        from fedgestalt.federation.operations.simulation import run_folder

        return run_folder(self._folder / "match") / GRAM_FILE

    def federate(self) -> tuple[EnsembleSpec, dict[str, Any], dict[str, Any]]:
        """Run both jobs; returns the ensemble and both outcomes."""
        spec = default_ensemble(self._seed)
        trained = self._job(
            "train", "Hospitals train together under masks", TrainingJob(ensemble=spec, **_LIMIT)
        )
        job = MatchingJob(ensemble=trained["ensemble"], released_rows=0, keep_gram=True, **_LIMIT)
        matched = self._job("match", "Hospitals match their patients through FLAKE", job)
        return spec, trained, matched

    def _job(self, key: str, title: str, job: JobSpec) -> dict[str, Any]:
        from fedgestalt.federation.operations.simulation import run_simulated_job
        from fedgestalt.federation.site.settings import SiteSettings

        settings = SiteSettings(
            data=str((self._data / "{site}").resolve()),
            store=str((self._stores / "{site}").resolve()),
            device="cpu",
            threads=max(1, (os.cpu_count() or 1) // len(self._names)),
            evaluation_release=True,
            identity="ephemeral",  # the simulator has no startup kits
        )
        folder = self._folder / f"job-{key}"
        render_job(job, folder)
        with self._steps.step(key, title):
            notes = _Notes(self._steps)
            workspace = (self._folder / key).resolve()
            return run_simulated_job(folder.resolve(), workspace, self._names, settings, notes)

    def compare(
        self, spec: EnsembleSpec, trained: dict[str, Any], ledger: Ledger, seed_index: int
    ) -> None:
        """Train centralised and local-only baselines and rank the same queries with them."""
        splits = len(self._cohort.rare_splits)
        rounds, cores = len(trained["rounds"]), os.cpu_count() or 1
        groups = [self.hospitals, *([hospital] for hospital in self.hospitals)]
        with self._steps.step(
            "baselines", "Comparing with pooled data and with every hospital alone"
        ):
            workers = min(cores, len(groups))
            threads = max(1, cores // workers)
            with _workers(workers) as pool:
                futures: list[Future[Baseline]] = [
                    pool.submit(train_together, group, spec, rounds, threads) for group in groups
                ]
                pooled, *alone = [future.result() for future in futures]
            add_shared_gallery(
                ledger, "centralised", seed_index, self.hospitals, pooled.trained, splits
            )
            for hospital, baseline in zip(self.hospitals, alone, strict=True):
                mode = "local-only"
                add_shared_gallery(ledger, mode, seed_index, [hospital], baseline.trained, splits)
            if pooled.untouched:
                mode = "pretrained"
                add_shared_gallery(
                    ledger, mode, seed_index, self.hospitals, pooled.untouched, splits
                )


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this context at once if anything goes wrong.

    Raises:
        SiteError: a worker was ended from outside.
    """
    context = get_context("spawn")
    # An interrupt from the keyboard reaches every process: only this one is to speak of it.
    quiet = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(count, context, initializer=signal.signal, initargs=quiet)
    try:
        yield pool
    except BaseException as error:
        # The public ProcessPoolExecutor.kill_workers came with Python 3.14.
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        if isinstance(error, BrokenExecutor):
            raise SiteError(
                "a process that computes the comparison was ended, perhaps for want of memory"
            ) from None
        raise
    else:
        pool.shutdown()


class _Notes:
    """Turns progress events of server and sites into one line."""

    def __init__(self, steps: Steps) -> None:
        self._steps, self._where, self._work = steps, "starting FLARE", dict[str, str]()

    def __call__(self, party: str, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "phase":
            self._work.clear()
            self._where = PHASES.get(event["phase"], event["phase"])
        elif kind == "work":
            share = 100 * event["done"] // max(event["total"], 1)
            self._work[party] = f"{party} {event['what']} {share} %"
        elif kind == "round":
            losses = ", ".join(f"{n} loss {m['loss']:.2f}" for n, m in event["members"].items())
            self._steps.say(
                f"  round {event['round']} of {event['rounds']}: {losses}"
                f" [dim]({event['seconds']:.0f} s)[/dim]"
            )
        details = " · ".join(self._work[name] for name in sorted(self._work))
        self._steps.note(f"{self._where}  {details}".rstrip())
