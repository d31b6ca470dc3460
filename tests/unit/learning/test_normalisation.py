"""Pooled BatchNorm: a batch does not change what it is normalised with, and is measured exactly."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fedgestalt.errors import ConfigError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    build_ensemble,
    is_statistic,
    read_shared_state,
)
from fedgestalt.learning.normalisation import PooledNorms
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet

CPU = torch.device("cpu")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(27))
    for layer in (network[1], network[3]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return network


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed)) + 1


def test_layers_normalise_with_their_running_statistics_whatever_the_batch() -> None:
    network = layers()
    expected = copy.deepcopy(network).eval()(pictures(6))
    network.train()
    pooled = PooledNorms([network])
    for rows in ([0], [0, 1], [0, 1, 2, 3, 4, 5]):
        torch.testing.assert_close(network(pictures(6)[rows]), expected[rows])
    pooled.end()


def test_what_was_seen_in_the_last_epoch_becomes_the_statistics() -> None:
    network = layers().train()
    start = copy.deepcopy(network).eval()
    pooled = PooledNorms([network])
    for epoch in range(2):
        pooled.begin_epoch()
        for batch in pictures(12, epoch).split([5, 4, 3]):
            network(batch)
    pooled.end()
    maps = start[0](pictures(12, 1))
    rows = start[:3](pictures(12, 1))
    for layer, seen, axes in ((network[1], maps, (0, 2, 3)), (network[3], rows, (0,))):
        variance, mean = torch.var_mean(seen, axes, correction=0)
        torch.testing.assert_close(layer.running_mean, mean)
        torch.testing.assert_close(layer.running_var, variance)
    network(pictures(1))  # no hook is left
    torch.testing.assert_close(network[1].running_mean, torch.var_mean(maps, (0, 2, 3))[1])


def test_layers_without_statistics_and_other_modules_are_left_alone() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.Dropout()).train()
    pooled = PooledNorms([network])
    network(torch.randn(4, 2))
    pooled.end()
    assert network[0].training
    assert network[1].training


# --- in the learner ------------------------------------------------------------------------------


def ensemble(batch_norm: str, **changes: object) -> Ensemble:
    """From random weights, but with statistics that images have set."""
    options = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
    settings = {"epochs": 1, "batch_size": 4, "variants": 1, "dropout": 0.0, **changes}
    spec = TrainingSpec(optimiser="sgd", learning_rate=1e-2, head_learning_rate=1e-2, **settings)
    member = MemberSpec(name="a", backbone="iresnet", options=options, training=spec)
    built = build_ensemble(EnsembleSpec(members=(member,)), 3, get_registry())
    trainer = LocalTrainer(built, some_set([0, 1, 2]), CPU, 1)
    trainer.run_round(read_shared_state(built), 1)
    norms = spec.model_copy(update={"batch_norm": batch_norm})
    built.members[0].spec = member.model_copy(update={"training": norms})
    return built


def some_set(classes: list[int], images: int = 12) -> TrainingSet:
    rng = np.random.default_rng(classes)
    targets = np.resize(np.array(classes, np.int64), images)
    faces = rng.integers(0, 120, (images, 112, 112, 3), np.uint8)
    for face, target in zip(faces, targets, strict=True):
        face[target * 37 : (target + 1) * 37] += 120
    return TrainingSet(faces, targets, 3)


def moved(batch_norm: str, data: TrainingSet, **changes: object) -> tuple[SharedState, SharedState]:
    built = ensemble(batch_norm, **changes)
    start = read_shared_state(built)
    return start, LocalTrainer(built, data, CPU, 1).run_round(start, 1)[0]


def test_without_local_steps_the_mean_of_the_sites_is_a_step_of_all_together() -> None:
    """Hospitals of one syndrome each, a batch that holds all a hospital has, and no momentum: the
    weighted mean of their models is the model after one step on everybody's images."""
    sets = [some_set([0], 12), some_set([1], 12), some_set([2], 12)]
    everybody = TrainingSet(
        np.concatenate([s.faces for s in sets]), np.concatenate([s.targets for s in sets]), 3
    )
    start, together = moved("pooled", everybody, batch_size=64)
    alone = [moved("pooled", one, batch_size=64)[1] for one in sets]
    for name, values in together.items():
        mean = np.mean([state[name] for state in alone], axis=0)
        size = np.abs(values - start[name]).max()
        assert np.abs(mean - values).max() <= 0.1 * size, name
        if is_statistic(name):
            np.testing.assert_allclose(mean, values, rtol=1e-2, atol=1e-3)


def test_batches_of_one_syndrome_mislead_layers_that_are_not_pooled() -> None:
    """Or the test before shows nothing."""
    sets = [some_set([0], 12), some_set([1], 12), some_set([2], 12)]
    everybody = TrainingSet(
        np.concatenate([s.faces for s in sets]), np.concatenate([s.targets for s in sets]), 3
    )
    start, together = moved("shared", everybody, batch_size=64)
    alone = [moved("shared", one, batch_size=64)[1] for one in sets]
    far = [
        np.abs(np.mean([s[name] for s in alone], axis=0) - values).max()
        > 0.5 * np.abs(values - start[name]).max()
        for name, values in together.items()
        if not is_statistic(name)
    ]
    assert any(far)


def test_random_weights_have_no_statistics_to_train_with() -> None:
    pooled = TrainingSpec(batch_norm="pooled")
    member = MemberSpec(name="a", backbone="iresnet", options={"depth": 18}, training=pooled)
    with pytest.raises(ConfigError, match="in the first round, and those of random weights") as f:
        build_ensemble(EnsembleSpec(members=(member,)), 2, get_registry())
    assert f.value.where == "ensemble member 'a'"
