"""A little of the real work on the site's own images, and what a whole job would take.

It runs the code of the jobs on one batch, keeps everything in memory, and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import torch

from fedgestalt.cohort import Cohort
from fedgestalt.doctor.findings import (
    Check,
    check,
    counted,
    in_bytes,
    in_time,
    ok,
    warning,
)
from fedgestalt.doctor.work import Work, traffic
from fedgestalt.errors import SiteError
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.data import training_set
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import Ensemble, Member, read_shared_state
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet

_ENCODED: Final = 16
_TIMES, _SECONDS = 3, 3.0
"""How often to measure at most, and how long: other programs disturb, so the fastest counts."""

ResultT = TypeVar("ResultT")

_ESTIMATE: Final = "an estimate; waiting for other sites and the network come on top"


@dataclass(frozen=True)
class Pace:
    """What one member's training costs here, in seconds an image: once, and in each epoch."""

    once: float
    epoch: float


@check("dry-run.licences")
def licences(settings: SiteSettings, ensemble: Ensemble) -> Iterator[Check]:
    """The site may use the start weights of the default job."""
    try:
        settings.check_licences(ensemble.licences)
    except SiteError as error:
        yield warning("dry-run.licences", f"in the default job, {error.what}", error.remedy)
        return
    used = sorted({licence for licence in ensemble.licences.values() if licence})
    shown = f"start weights of the default job are under {', '.join(used)}" if used else ""
    yield ok("dry-run.licences", shown or "the default job starts from random weights")


@check("dry-run.training")
def training(
    job: TrainingJob, ensemble: Ensemble, cohort: Cohort, device: torch.device, seed: int = 0
) -> Iterator[Check]:
    """One step of every member that trains, and the time of a whole job.

    ``ensemble`` is built from :func:`one_epoch` of the job's.
    """
    count = len(cohort.train)
    if count < 2:
        what = f"{counted(count, 'training image')}, at least 2 are needed"
        remedy = "this site can match without training: leave it out of the training job's sites"
        yield warning("dry-run.training", what, remedy)
        return
    trained = [member for member in ensemble.members if member.trained_parts]
    size = max((member.spec.training.batch_size for member in trained), default=2)
    batch = training_set(_some(cohort, size, seed))
    paces = {m.spec.name: _pace(m, ensemble.classes, batch, device) for m in trained}
    epochs = {member.name: member.training.epochs for member in job.ensemble.members}
    once = count * sum(pace.once for pace in paces.values())
    a_round = count * sum(epochs[name] * pace.epoch for name, pace in paces.items())
    seconds = once + job.rounds * a_round
    figures = {
        "training_images": count,
        "rounds": job.rounds,
        "seconds_once": round(once, 2),
        "seconds_per_round": round(a_round, 2),
        "seconds": round(seconds, 1),
    }
    if count > job.max_images_per_site:
        what = f"{count:,} training images, the default job takes {job.max_images_per_site:,}"
        remedy = "ask the consortium lead to raise max_images_per_site in the job"
        yield warning("dry-run.training", what, remedy, **figures)
        return
    what = (
        f"a step of every network works; a job of {counted(job.rounds, 'round')} computes about"
        f" {in_time(seconds)} here ({in_time(once)} once, {in_time(a_round)} a round;"
        f" {_ESTIMATE})"
    )
    yield ok("dry-run.training", what, **figures)


def _some(cohort: Cohort, size: int, seed: int) -> Cohort:
    """The cohort with ``size`` of its training images."""
    chosen = np.random.default_rng(seed).permutation(len(cohort.train))[:size]
    return replace(cohort, train=tuple(cohort.train[i] for i in sorted(chosen)))


def _pace(member: Member, classes: int, batch: TrainingSet, device: torch.device) -> Pace:
    alone = Ensemble(EnsembleSpec(members=(member.spec,), seed=0), (member,), classes)
    trainer = LocalTrainer(alone, batch, device, seed=0)
    images = len(batch.targets)
    started = time.perf_counter()
    trainer.prepare()
    features = time.perf_counter() - started
    state = read_shared_state(alone)
    (_, metrics), step = _fastest(lambda: trainer.run_round(state, 1))
    if not all(math.isfinite(m.loss) for m in metrics.values()):
        raise SiteError(
            f"the loss of network {member.spec.name!r} is not finite after one step",
            remedy="look at the images, and at the driver if a GPU computes",
        )
    return Pace(features / images, step / images)


def _fastest(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    """The last result of ``work``, and the fewest seconds that it took."""
    took: list[float] = []
    while not took or (len(took) < _TIMES and sum(took) < _SECONDS):
        started = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - started)
    return result, min(took)


@check("dry-run.encoding")
def encoding(ensemble: Ensemble, cohort: Cohort, device: torch.device) -> Iterator[Check]:
    """One batch of images with test-time augmentation, and the time of all images."""
    count = len(cohort.images)
    faces = load_faces(cohort.records(list(cohort.images)[:_ENCODED]))
    vectors, seconds = _fastest(lambda: encode(ensemble, faces, device))
    each = seconds / len(faces)
    if not np.isfinite(vectors).all():
        raise SiteError("an encoding is not finite", remedy="look at the driver if a GPU computes")
    what = (
        f"encoding works; {counted(count, 'image')} take about {in_time(each * count)} here the"
        f" first time ({each * 1000:.0f} ms each; an estimate)"
    )
    figures = {"images": count, "seconds_per_image": round(each, 4)}
    yield ok("dry-run.encoding", what, **figures, seconds=round(each * count, 1))


@check("dry-run.traffic")
def bytes_moved(job: TrainingJob, work: Work) -> Iterator[Check]:
    """How much a training and a matching job send and receive."""
    figures = traffic(job, work)
    what = (
        f"training sends {in_bytes(figures['sent_bytes_per_round'])} a round,"
        f" {in_bytes(figures['sent_bytes'])} in {counted(job.rounds, 'round')}, and receives"
        f" {in_bytes(figures['received_bytes'])}; matching sends"
        f" {in_bytes(figures['matching_sent_bytes'])} (estimates)"
    )
    yield ok("dry-run.traffic", what, **figures)


def one_epoch(spec: EnsembleSpec) -> EnsembleSpec:
    """The same networks with one local epoch each, for a short look."""
    members = tuple(
        member.model_copy(update={"training": member.training.model_copy(update={"epochs": 1})})
        for member in spec.members
    )
    return spec.model_copy(update={"members": members})


@contextlib.contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads, as the site's jobs would."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
