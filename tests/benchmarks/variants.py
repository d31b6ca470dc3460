"""How many cached variants are as good as fresh augmentation: an experiment on ``synthetic``.

``python tests/benchmarks/variants.py --seeds 3 --out build/variants``

For each seed: a cohort, SFace with neck and classifier trained on its gallery, and the nearest
gallery image of each frequent test image (both as they are, without test-time variants). *Fresh*
training sees a variant in one epoch and never again; training with K variants sees one of K, drawn
before. Everything else is the same. Intervals are 95 % bootstrap intervals over the subjects of all
seeds, of the paired difference to fresh training in mean per-syndrome top-1 and top-5.
One JSON line per finished run; what is there is not
run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.cohort import Cohort, default_cache, materialise, read_cohort
from fedgestalt.console import Pace, Steps
from fedgestalt.hooks import get_registry
from fedgestalt.learning.blocks import training_pictures
from fedgestalt.learning.data import training_set
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.ensemble import (
    Ensemble,
    build_ensemble,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.images import FaceFiles
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer
from fedgestalt_plugins.cohorts.synthetic import Parameters, SyntheticCohort

EPOCHS, BATCH = 10, 32
VARIANTS = (1, 2, 4, 8)
DRAWS = 2000
FRESH = "fresh"


@dataclass
class FreshEachEpoch:
    """Features of which each epoch gets the next variant; looks like a tensor to the trainer."""

    features: torch.Tensor
    served: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.features), 1

    def __getitem__(self, chosen: tuple[NDArray[np.int64], NDArray[np.int64]]) -> torch.Tensor:
        epoch = self.served // len(self.features)
        self.served += len(chosen[0])
        return self.features[chosen[0], 1 + epoch]  # the first is the photograph itself


def run(seed: int, folder: Path, steps: Steps) -> list[dict[str, Any]]:
    """Outcomes of all conditions on one cohort: a record each, with a row per test image."""
    device, registry = choose_device("cpu"), get_registry()
    source = SyntheticCohort(Parameters(seed=seed))
    with steps.step("cohort", f"Cohort {seed}"):
        root = materialise(source, default_cache(), lambda d, t: steps.note(f"{d} of {t} images"))
    cohort = read_cohort(root)
    data = training_set(cohort)
    settings = TrainingSpec(epochs=EPOCHS, batch_size=BATCH)
    member = MemberSpec(name="m", backbone="sface", trainable="neck", training=settings)
    spec = EnsembleSpec(members=(member,), seed=seed)
    ensemble = build_ensemble(spec, data.classes, registry)
    start = read_shared_state(ensemble)
    pictures = training_pictures(data.faces, EPOCHS + 1, (seed, 0))
    with steps.step("features", f"Features of {EPOCHS + 1} variants of {len(data.faces)} images"):
        pace = Pace("images")
        features = trunk_features(
            ensemble.members[0],
            pictures,
            device,
            folder / "cache",
            lambda d, t: steps.count(d, t, pace),
        )
    found = []
    for condition in (FRESH, *VARIANTS):
        given: Any = FreshEachEpoch(features) if condition == FRESH else features[:, :condition]
        with steps.step("train", f"Training, {condition} variants"):
            trainer = LocalTrainer(ensemble, data, device, seed, None, {"m": given})
            state, _ = trainer.run_round(start, 1)
            write_shared_state(ensemble, state)
            rows = outcomes(cohort, ensemble, device, folder / "cache")
        found.append({"seed": seed, "variants": condition, "outcomes": rows})
    for path in (folder / "cache").glob("features-*"):
        path.unlink()
    return found


def outcomes(
    cohort: Cohort, ensemble: Ensemble, device: torch.device, cache: Path
) -> list[tuple[str, int, int]]:
    """(subject, syndrome, rank of the true syndrome) of each frequent test image."""
    sides = (cohort.frequent_test, cohort.frequent_gallery)
    records = [tuple(cohort.records(images)) for images in sides]
    queries, gallery = (vectors(ensemble, FaceFiles(r), device, cache) for r in records)
    labels = np.array([record.syndrome for record in records[1]])
    rows = []
    for record, scores in zip(records[0], queries @ gallery.T, strict=True):
        best = {int(s): float(scores[labels == s].max()) for s in np.unique(labels)}
        rank = sum(score >= best[record.syndrome] for score in best.values())
        rows.append((record.subject, record.syndrome, rank))
    return rows


def vectors(
    ensemble: Ensemble, faces: FaceFiles, device: torch.device, cache: Path
) -> NDArray[np.float32]:
    """One vector of length 1 for each photograph as it is."""
    (member,) = ensemble.members
    features = trunk_features(member, training_pictures(faces, 1, (0,)), device, cache)
    with torch.inference_mode():
        found = member.neck(features[:, 0].float())
    result: NDArray[np.float32] = torch.nn.functional.normalize(found, dim=1).numpy()
    return result


def top(rows: NDArray[np.int64], weights: NDArray[np.float64], k: int) -> float:
    """Mean per-syndrome share of images whose rank is at most ``k``; images have weights."""
    hits = (rows[:, 1] <= k).astype(np.float64)
    counts = np.bincount(rows[:, 0], weights)
    present = counts > 0
    shares = np.bincount(rows[:, 0], weights * hits)[present] / counts[present]
    return float(shares.mean())


def table(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy of each condition and its difference to fresh training, with intervals."""
    seeds = sorted({record["seed"] for record in records})
    by_key = {(r["seed"], str(r["variants"])): r["outcomes"] for r in records}
    rng = np.random.default_rng(0)
    weights: dict[int, list[NDArray[np.float64]]] = {}
    for seed in seeds:
        subjects = np.array([row[0] for row in by_key[seed, FRESH]])
        names, place = np.unique(subjects, return_inverse=True)
        plain = [np.ones(len(subjects))]
        for _ in range(DRAWS):
            picked = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
            plain.append(picked[place].astype(np.float64))
        weights[seed] = plain
    result = []
    values: dict[tuple[str, int], NDArray[np.float64]] = {}
    for condition in (FRESH, *map(str, VARIANTS)):
        row: dict[str, Any] = {"variants": condition, "seeds": len(seeds)}
        for k in (1, 5):
            per_seed = [
                [
                    top(np.array([r[1:] for r in by_key[seed, condition]], np.int64), w, k)
                    for w in weights[seed]
                ]
                for seed in seeds
            ]
            values[condition, k] = np.mean(per_seed, axis=0)
            row[f"top{k}"] = round(float(values[condition, k][0]), 4)
            difference = values[condition, k] - values[FRESH, k]
            low, high = np.quantile(difference[1:], (0.025, 0.975))
            row[f"top{k}_minus_fresh"] = round(float(difference[0]), 4)
            row[f"top{k}_interval"] = [round(float(low), 4), round(float(high), 4)]
        result.append(row)
    return result


def main() -> None:
    """Run what is missing; write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/variants"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept, steps = given.out / "runs.jsonl", Steps()
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    records = [json.loads(line) for line in lines]
    for seed in range(1, given.seeds + 1):
        if sum(record["seed"] == seed for record in records) == 1 + len(VARIANTS):
            continue
        found = run(seed, given.out, steps)
        records = [r for r in records if r["seed"] != seed] + json.loads(json.dumps(found))
        text = "".join(json.dumps(record) + "\n" for record in records)
        kept.with_suffix(".partial").write_text(text, encoding="utf-8")
        kept.with_suffix(".partial").replace(kept)
    rows = table(records)
    (given.out / "table.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    sys.stdout.write(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
