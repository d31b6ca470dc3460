"""Encodings of the cohort ``synthetic`` and of controls, by an ensemble trained on its gallery.

The ensemble, its seed and the number of rounds are the defaults of a training job, on the pooled
photographs. Controls, in eight cohorts, are subjects of the same renderer whose syndromes have
severity 0.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgestalt.cohort import Cohort, default_cache, materialise, read_cohort
from fedgestalt.contracts import CohortSource
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.data import local_seed, training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import encode, untouched_part
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state, write_shared_state
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.spec import default_ensemble
from fedgestalt.learning.training import LocalTrainer
from fedgestalt_plugins.cohorts.synthetic import Parameters, SyntheticCohort

ROUNDS = TrainingJob().rounds


@dataclass(frozen=True)
class Encoded:
    """A cohort with the encodings of its images, sorted by image id."""

    cohort: Cohort
    trained: NDArray[np.float32]
    untouched: NDArray[np.float32]

    @property
    def image_ids(self) -> list[str]:
        """In the order of the rows."""
        return sorted(self.cohort.images)


def encode_synthetic(
    parameters: Parameters = Parameters(),  # noqa: B008  frozen
    control_seeds: Iterable[int] = range(12, 20),
    seed: int = 1,
) -> tuple[Encoded, list[Encoded]]:
    """A synthetic cohort and eight cohorts of controls; minutes, then kept in the cache.

    ``parameters`` are those of the cohort ``synthetic`` by default; ``seed`` is the ensemble's.
    """
    healthy = {"severity": 0.0, "severity_spread": 0.0, "frequent_subjects": 5, "rare_subjects": 2}
    wanted = [parameters, *(Parameters(seed=s, **healthy) for s in control_seeds)]  # type: ignore[arg-type]
    cohorts = [_open(SyntheticCohort(each)) for each in wanted]
    versions = hashlib.sha256("|".join(c.version for c in cohorts).encode()).hexdigest()
    kept = default_cache() / f"benchmark-encodings-{versions[:8]}-{seed}.npz"
    if not kept.exists():
        arrays = _encode(cohorts, seed)
        with kept.with_suffix(".partial").open("wb") as stream:
            np.savez(stream, **arrays)
        kept.with_suffix(".partial").replace(kept)
    with np.load(kept) as arrays:
        whole, *controls = (
            Encoded(cohort, arrays[f"trained{i}"], arrays[f"untouched{i}"])
            for i, cohort in enumerate(cohorts)
        )
    return whole, controls


def _open(source: CohortSource) -> Cohort:
    return read_cohort(materialise(source, default_cache(), lambda done, total: None))


def _encode(cohorts: list[Cohort], seed: int) -> dict[str, NDArray[np.float32]]:
    device, spec, cohort = choose_device("cpu"), default_ensemble(seed), cohorts[0]
    ensemble = build_ensemble(spec, len(cohort.classes), get_registry())
    state = read_shared_state(ensemble)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        data = training_set(cohort)
        trainer = LocalTrainer(ensemble, data, device, local_seed(spec.seed, "all"), cache)
        trainer.prepare()
        for number in range(1, ROUNDS + 1):
            state, _ = trainer.run_round(state, number)
        write_shared_state(ensemble, state)
        arrays = {}
        for i, each in enumerate(cohorts):
            faces = load_faces(each.records(sorted(each.images)))
            arrays[f"trained{i}"] = encode(ensemble, faces, device, cache)
            untouched = untouched_part(ensemble, arrays[f"trained{i}"])
            assert untouched is not None
            arrays[f"untouched{i}"] = untouched
    return arrays
