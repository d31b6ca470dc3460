"""Render a synthetic cohort into a folder, with several processes."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from fedgestalt.cohort import Cohort, ImageRecord, Syndrome, image_file, save_jpeg, write_cohort
from fedgestalt.contracts import Progress
from fedgestalt.errors import SiteError
from fedgestalt_plugins.cohorts.roles import Roles
from fedgestalt_plugins.cohorts.synthetic.parameters import Parameters
from fedgestalt_plugins.cohorts.synthetic.population import (
    Plan,
    Population,
    load_catalogue,
    plan,
)

_ROLES = 5  # first part of the key of the random streams that deal roles
_SUBJECTS_AT_ONCE = 8
# Age in years that the head model gives each of its age groups.
_AGE_YEARS: Final = {"baby": "1", "child": "12", "young": "25", "old": "90"}


def build_cohort(
    parameters: Parameters, name: str, target: Path, progress: Progress, *, workers: int | None
) -> None:
    """Render all subjects and write the cohort; see :class:`SyntheticCohort`."""
    catalogue = load_catalogue()
    plans = list(plan(parameters, catalogue))
    total = sum(subject.images for subject in plans)
    images: dict[str, ImageRecord] = {}
    image_file(target, "").parent.mkdir(parents=True, exist_ok=True)
    for records in _render_all(parameters, plans, target, workers or os.cpu_count() or 1):
        images |= {record.image_id: record for record in records}
        progress(len(images), total)
    images = dict(sorted(images.items()))
    roles = deal_roles(parameters, catalogue, plans)
    labels = _label_map(catalogue)
    cohort = Cohort(
        name=name,
        version=parameters.version,
        root=target,
        images=images,
        syndromes={number: Syndrome(number, label) for label, number in labels.items()},
        classes=tuple(
            labels[entry["label"]]
            for entry in catalogue["syndromes"]
            if entry["group"] == "frequent"
        ),
        train=tuple(roles.train),
        validation=tuple(roles.validation),
        frequent_test=tuple(roles.frequent_test),
        rare_splits=roles.rare_splits,
    )
    write_cohort(cohort, target)


def _label_map(catalogue: Mapping[str, Any]) -> dict[str, int]:
    return {entry["label"]: number for number, entry in enumerate(catalogue["syndromes"], 1)}


def _image_ids(subject: Plan) -> list[str]:
    return [f"{subject.number:05d}-{index}" for index in range(subject.images)]


def deal_roles(parameters: Parameters, catalogue: Mapping[str, Any], plans: list[Plan]) -> Roles:
    """Deal about 65 % of a frequent syndrome's subjects to train, 10 % to val, 25 % to test."""
    roles = Roles()
    for number, entry in enumerate(catalogue["syndromes"]):
        rng = np.random.default_rng([parameters.seed, _ROLES, number])
        subjects = [_image_ids(p) for p in plans if p.syndrome == entry["label"]]
        test = (len(subjects) + 2) // 4
        if entry["group"] == "frequent":
            roles.add_frequent(subjects, rng, test=test, validation=len(subjects) // 10)
        else:
            roles.add_rare(subjects, rng, test=test)
    return roles


def _render_all(
    parameters: Parameters, plans: list[Plan], target: Path, workers: int
) -> Iterator[list[ImageRecord]]:
    """Render all subjects, in no particular order; what is drawn does not depend on ``workers``."""
    shares = [plans[i : i + _SUBJECTS_AT_ONCE] for i in range(0, len(plans), _SUBJECTS_AT_ONCE)]
    if workers == 1:
        for share in shares:
            yield _render(parameters, share, target)
        return
    # Never a fork of this process: it may hold torch's or OpenCV's threads.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    pool = ProcessPoolExecutor(
        min(workers, len(shares)), mp_context=context, initializer=cv2.setNumThreads, initargs=(1,)
    )
    try:
        waiting = [pool.submit(_render, parameters, share, target) for share in shares]
        for future in as_completed(waiting):
            yield future.result()
    except BrokenProcessPool:
        raise SiteError(
            "a process that renders the synthetic cohort died", remedy="free memory and try again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def _population(parameters: Parameters) -> Population:
    return Population(parameters, load_catalogue())


def _render(parameters: Parameters, plans: list[Plan], target: Path) -> list[ImageRecord]:
    """Render some subjects into ``target``."""
    population, labels = _population(parameters), _label_map(load_catalogue())
    records = []
    for wanted in plans:
        person = population.subject(wanted.number, wanted.syndrome)
        facts = {
            "disorder_names": wanted.syndrome,
            "gender": person.sex,
            "age_year": _AGE_YEARS[person.age_group],
            "ethnicity": person.ancestry,
            "image_type": "rendered",
        }
        pictures = population.photographs(person, wanted.images)
        for image_id, pixels in zip(_image_ids(wanted), pictures, strict=True):
            path = image_file(target, image_id)
            save_jpeg(path, pixels)
            subject, label = f"{wanted.number:05d}", labels[wanted.syndrome]
            records.append(ImageRecord(image_id, subject, label, path, person.hpo, facts))
    return records
