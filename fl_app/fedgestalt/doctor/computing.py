"""Data, machine and dry run: the checks that need torch, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fedgestalt.cohort import Cohort
from fedgestalt.console import Steps
from fedgestalt.doctor import data, dry_run, machine
from fedgestalt.doctor.findings import Check, check, counted, in_bytes, not_checked, ok
from fedgestalt.doctor.work import Work, work_of
from fedgestalt.errors import ConfigError
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.hooks.registry import Registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import Ensemble, build_ensemble


def examine(
    job: TrainingJob,
    registry: Registry,
    settings: SiteSettings | None,
    site: str,
    folder: Path | None,
    store: Path | None,
    steps: Steps,
    with_dry_run: bool,
) -> list[Check]:
    """All checks of this site's images and of the machine that computes on them.

    Args:
        job: the training job to measure by.
        registry: the plugins.
        settings: the site's, where it has a kit.
        site: its name there.
        folder: the cohort; None if there is none to look at.
        store: the site's store, where it has a kit.
        steps: shows progress.
        with_dry_run: whether to compute one batch.
    """
    cohort: Cohort | None = None
    found: list[Check] = []
    if folder:
        with steps.step("data", "Data"):
            agreed = settings.label_map_folder(site) if settings else None
            cohort, found = _data(folder, agreed)
    device = _device(settings)
    models: list[tuple[Ensemble, Work]] = []
    built = _model(job, registry, cohort, device, models) if cohort else []
    work = models[0][1] if models else None
    threads = settings.threads if settings else None
    processes = settings.processes if settings else 1
    found += machine.cpu(threads, processes) + machine.memory(work) + machine.gpu(settings)
    found += machine.disk(store, work) if store else []
    if not with_dry_run or not folder:
        return found
    found += built
    if not cohort:
        return found + not_checked("dry-run.training", "the data cannot be used")
    if not models:
        reason = "the networks of the default job cannot be built"
        return found + not_checked("dry-run.training", reason)
    if not device:
        reason = "the device that the policy names is not there"
        return found + not_checked("dry-run.training", reason)
    ensemble, work = models[0]
    with steps.step("dry-run", "Dry run"), dry_run.with_threads(threads):
        found += dry_run.licences(settings, ensemble) if settings else []
        found += dry_run.training(job, ensemble, cohort, device)
        found += dry_run.encoding(ensemble, cohort, device)
    return found + dry_run.bytes_moved(job, work)


def _data(folder: Path, agreed: Path | None) -> tuple[Cohort | None, list[Check]]:
    if not folder.is_dir():
        return None, not_checked("data.cohort", "the data folder is not there")
    found = data.data(folder, agreed)
    usable = all(one.state in ("ok", "warning") for one in found)
    return data.sound_cohort(folder) if usable else None, found


def _device(settings: SiteSettings | None) -> torch.device | None:
    """The device that the jobs would use; None if it is not there, as ``machine.gpu`` says."""
    try:
        return choose_device(settings.device if settings else "auto")
    except ConfigError:
        return None


@check("dry-run.model")
def _model(
    job: TrainingJob,
    registry: Registry,
    cohort: Cohort,
    device: torch.device | None,
    made: list[tuple[Ensemble, Work]],
) -> Iterator[Check]:
    """The job's networks can be built from the installed plugins; appends them to ``made``."""
    spec = dry_run.one_epoch(job.ensemble)
    ensemble = build_ensemble(spec, max(len(cohort.classes), 1), registry)
    work = work_of(job, ensemble, cohort, device or torch.device("cpu"))
    made.append((ensemble, work))
    networks = counted(len(ensemble.members), "network")
    what = f"{networks} of the default job, {work.values:,} trained values"
    what += f" ({in_bytes(work.model_bytes)}), {work.encoding_size:,} numbers an image"
    yield ok("dry-run.model", what, values=work.values, encoding_size=work.encoding_size)
