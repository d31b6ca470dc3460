"""What the federation is compared with: pooling all photographs, and every hospital alone.

Both train exactly as the sites do (same code, start, rounds and epochs), without FLARE or masks.
They read the sites' feature caches, so no trunk runs twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedgestalt.cohort import Cohort, read_cohort
from fedgestalt.hooks import get_registry
from fedgestalt.learning.data import local_seed, training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import Encodings, encode, untouched_part
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state, write_shared_state
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet
from fedgestalt.similarity.order import image_order


@dataclass(frozen=True)
class Hospital:
    """One site's folders, as the demonstration laid them out."""

    name: str
    data: Path
    store: Path

    def cohort(self) -> Cohort:
        """Read the site's cohort."""
        return read_cohort(self.data, name=self.name)


@dataclass(frozen=True)
class Baseline:
    """Encodings by site, in the order of :func:`~fedgestalt.similarity.order.image_order`.

    Attributes:
        trained: of the whole ensemble.
        untouched: of the members that do not train, alone; empty if all train.
    """

    trained: dict[str, Encodings]
    untouched: dict[str, Encodings]


def train_together(
    hospitals: Sequence[Hospital], spec: EnsembleSpec, rounds: int, threads: int
) -> Baseline:
    """Train one ensemble on the pooled images of ``hospitals`` and encode all their images.

    Args:
        hospitals: one alone, or all.
        spec: the ensemble.
        rounds: as many as the federation had.
        threads: of torch.
    """
    torch.set_num_threads(threads)
    device = choose_device("cpu")
    cohorts = [hospital.cohort() for hospital in hospitals]
    ensemble = build_ensemble(spec, len(cohorts[0].classes), get_registry())
    state = read_shared_state(ensemble)
    trainers = []
    for hospital, cohort in zip(hospitals, cohorts, strict=True):
        seed = local_seed(spec.seed, hospital.name)
        data = training_set(cohort)
        trainer = LocalTrainer(ensemble, data, device, seed, hospital.store / "cache")
        trainer.prepare()
        trainers.append(trainer)
    pooled = trainers[0] if len(trainers) == 1 else _pool(trainers)
    for number in range(1, rounds + 1):
        state, _ = pooled.run_round(state, number)
    write_shared_state(ensemble, state)
    trained, untouched = {}, {}
    for hospital, cohort in zip(hospitals, cohorts, strict=True):
        faces = load_faces(cohort.records(image_order(cohort).image_ids))
        encodings = encode(ensemble, faces, device, hospital.store / "cache")
        trained[hospital.name] = encodings
        part = untouched_part(ensemble, encodings)
        if part is not None:
            untouched[hospital.name] = part
    return Baseline(trained, untouched)


def _pool(trainers: Sequence[LocalTrainer]) -> LocalTrainer:
    first = trainers[0]
    data = TrainingSet(
        np.concatenate([trainer.data.faces for trainer in trainers]),
        np.concatenate([trainer.data.targets for trainer in trainers]),
        first.data.classes,
    )
    names = first.features
    features = {name: torch.cat([trainer.features[name] for trainer in trainers]) for name in names}
    return LocalTrainer(first.ensemble, data, first.device, first.seed, None, features)
