"""The retention study trains as the masked job does, and encodes as a site does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from consortium import Consortium, tiny_ensemble
from retention_study import Schedule, deal_roles, federate, member_vectors, with_small_neck

from fedgestalt.federation.training.model import Optimiser, ServerStep
from fedgestalt.federation.training.rounds import Aggregation, Rule, Scope
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning import augment
from fedgestalt.learning.data import local_seed, training_set
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import build_ensemble
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.training import LocalTrainer

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "aggregation"),
    [
        ({}, Aggregation()),
        ({"rule": "class-weighted"}, Aggregation(rule=Rule.CLASS_WEIGHTED)),
        ({"scope": "encoder"}, Aggregation(scope=Scope.ENCODER)),
        ({"server_momentum": 0.5}, Aggregation(step=ServerStep(momentum=0.5))),
        (
            {"server_optimiser": "adam", "server_learning_rate": 0.003, "server_momentum": 0.9},
            Aggregation(step=ServerStep(Optimiser.ADAM, 0.003, 0.9)),
        ),
    ],
    ids=["mean", "class-weighted", "encoder-only", "momentum", "adam"],
)
def test_the_studys_rounds_come_to_the_model_of_the_masked_job(
    tmp_path: Path, three_sites: Consortium, changes: dict[str, Any], aggregation: Aggregation
) -> None:
    spec = tiny_ensemble()
    job = TrainingJob(ensemble=spec, rounds=2, **changes)
    run = Consortium(tmp_path, source=three_sites).run(job)
    assert run.outcome["status"] == "completed", run.outcome

    torch.set_num_threads(1)
    silos = three_sites.silos
    classes = len(next(iter(silos.values())).classes)
    ensemble = build_ensemble(spec, classes, get_registry())
    outline = ensemble.outline()
    trainers = {
        site: LocalTrainer(ensemble, training_set(silo), CPU, local_seed(spec.seed, site))
        for site, silo in silos.items()
    }
    first = federate(ensemble, trainers, aggregation, 1)
    assert outline.digest(first) != run.outcome["ensemble"]
    ensemble = build_ensemble(spec, classes, get_registry())
    for trainer in trainers.values():
        trainer.ensemble = ensemble
    assert outline.digest(federate(ensemble, trainers, aggregation, 2)) == run.outcome["ensemble"]


def test_the_studys_vectors_score_as_encodings_do() -> None:
    ensemble = build_ensemble(tiny_ensemble(), 3, get_registry())
    faces = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    whole = encode(ensemble, faces, CPU)
    variants = np.stack([np.stack(augment.test_variants(face)) for face in faces])
    scores = [
        (vectors := member_vectors(m, trunk_features(m, variants, CPU))) @ vectors.T
        for m in ensemble.members
    ]
    mean = np.sum(scores, axis=0) / (len(augment.TEST_VARIANTS) * len(ensemble.members))
    np.testing.assert_allclose(mean, whole @ whole.T, atol=1e-5)


def test_the_small_neck_starts_as_the_original_network() -> None:
    whole = build_ensemble(Schedule().ensemble(1), 5, get_registry())
    small = with_small_neck(whole)
    faces = np.random.default_rng(0).integers(0, 256, (3, 1, 112, 112, 3), np.uint8)
    ours, theirs = (
        member_vectors(m, trunk_features(m, faces, CPU))
        for m in (small.members[0], whole.members[1])
    )
    np.testing.assert_allclose((ours * theirs).sum(1), 1, atol=1e-3)
    linear = small.members[0].neck[0]
    assert linear.in_features == 128 + 4 * 1024
    with torch.no_grad():
        linear.weight[:, 128:] += 0.05
    moved = member_vectors(small.members[0], trunk_features(small.members[0], faces, CPU))
    assert ((moved * theirs).sum(1) < 0.99).all(), "what was added counts"


def test_roles_are_dealt_by_subject_and_validation_subjects_never_test(
    three_sites: Consortium,
) -> None:
    silo = next(iter(three_sites.silos.values()))
    kept, *rest = sorted({record.subject for record in silo.records(silo.train)})
    parts = {
        "validation": tuple(r.image_id for r in silo.records(silo.train) if r.subject == kept),
        "train": tuple(r.image_id for r in silo.records(silo.train) if r.subject in rest),
    }
    cohort = silo.__class__(**{**vars(silo), **parts})
    dealt = [deal_roles(cohort, seed) for seed in range(4)]
    for each in dealt:
        assert each.validation == parts["validation"]
        assert sorted(each.train + each.frequent_test) == sorted(
            cohort.train + cohort.frequent_test
        )
        trained, tested = (
            {record.subject for record in each.records(part)}
            for part in (each.train, each.frequent_test)
        )
        assert not trained & tested
        assert len(each.frequent_test) == len(cohort.frequent_test)
    assert len({each.frequent_test for each in dealt}) > 1
