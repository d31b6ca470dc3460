"""Folding BatchNorm into convolutions changes how fast a trunk is, not what it computes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedgestalt.contracts import InputSpec
from fedgestalt.hooks import get_registry
from fedgestalt.learning.ensemble import Member, build_ensemble, state_digest
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.trunk import FastTrunk, with_folded_norms

CPU = torch.device("cpu")


def member_of(backbone: str, **options: Any) -> Member:
    spec = EnsembleSpec(members=(MemberSpec(name="a", backbone=backbone, options=options),))
    return build_ensemble(spec, 2, get_registry()).members[0]


def shaken(trunk: nn.Module) -> nn.Module:
    """Running statistics of a network that has seen something."""
    generator = torch.Generator().manual_seed(0)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return trunk.eval()


def norms(module: nn.Module) -> int:
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


TINY = {"depth": 18, "width": 8, "embedding_size": 8, "input_size": 32}


@pytest.mark.parametrize(("backbone", "options"), [("iresnet", TINY), ("sface", {})])
def test_a_folded_trunk_computes_the_same(backbone: str, options: dict[str, Any]) -> None:
    member = member_of(backbone, **options)
    trunk = shaken(member.trunk)
    folded = with_folded_norms(trunk)
    pictures = torch.rand(3, 3, member.input.size, member.input.size) * 255
    with torch.inference_mode():
        expected, found = trunk(pictures), folded(pictures)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


def test_only_norms_that_follow_a_convolution_are_folded() -> None:
    folded = with_folded_norms(shaken(member_of("iresnet", **TINY).trunk))
    blocks, at_the_end = 8, 1
    assert norms(folded) == blocks + at_the_end, "the first norm of each block precedes it"


def test_the_member_itself_stays_as_it_is() -> None:
    member = member_of("iresnet", **TINY)
    before = state_digest(member.trunk)
    FastTrunk(member.trunk, member.input, CPU, torch.bfloat16)
    assert state_digest(member.trunk) == before
    assert next(member.trunk.parameters()).dtype == torch.float32


class Branching(nn.Module):
    """Nobody but itself knows in which order it uses its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            x = -x
        result: torch.Tensor = self.bn(self.conv(x))
        return result


class Twice(Branching):
    """Uses one convolution in two places."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.bn(self.conv(x)) + self.conv(x)
        return result


class Shared(Branching):
    """Uses what its convolution puts out with and without its norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.conv(x)
        result: torch.Tensor = self.bn(inner) + inner
        return result


@pytest.mark.parametrize("kind", [Branching, Twice, Shared])
def test_what_cannot_be_folded_safely_is_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    trunk = shaken(kind())
    pictures = torch.rand(2, 3, 8, 8)
    folded = with_folded_norms(trunk)
    with torch.inference_mode():
        torch.testing.assert_close(folded(pictures), trunk(pictures))
    assert norms(folded) == 1


def test_a_norm_after_a_convolution_in_a_sequence_is_folded() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)]
    trunk = shaken(nn.Sequential(*layers))
    pictures = torch.rand(2, 3, 8, 8)
    folded = with_folded_norms(trunk)
    with torch.inference_mode():
        torch.testing.assert_close(folded(pictures), trunk(pictures))
    assert (norms(folded), norms(trunk)) == (1, 2)


def test_trunks_are_made_ready_in_several_threads_at_once() -> None:
    trunk = shaken(member_of("iresnet", **TINY).trunk)
    pictures = torch.rand(1, 3, 32, 32)

    def fold_and_run(_: int) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = with_folded_norms(trunk)(pictures)
            return result

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(fold_and_run, range(24))
    assert all(torch.equal(first, other) for other in others)


def test_pictures_keep_their_places_over_batches() -> None:
    member = member_of("iresnet", **TINY)
    run = FastTrunk(member.trunk, member.input, CPU, torch.float32)
    pictures = np.random.default_rng(0).integers(0, 256, (9, 2, 112, 112, 3), np.uint8)
    whole = run(pictures)
    assert whole.shape == (9, 2, *member.feature_shape)
    torch.testing.assert_close(whole[8:], run(pictures[8:]), rtol=1e-3, atol=1e-3)


def test_the_input_is_scaled_as_the_member_says() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False))
    nn.init.ones_(trunk[0].weight)  # type: ignore[arg-type]
    run = FastTrunk(trunk, InputSpec(offset=1.0, scale=2.0), CPU, torch.float32)
    pictures = np.full((1, 1, 112, 112, 3), 5, np.uint8)
    assert float(run(pictures).mean()) == pytest.approx(3 * (5 - 1) / 2)
