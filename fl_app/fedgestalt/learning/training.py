"""Local training of every member at one site.

A round starts from the global state, trains each trainable member for its local epochs and returns
the new state. Members with a frozen trunk train on cached features of variants that were drawn
once; the others draw fresh variants each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgestalt.errors import SiteError
from fedgestalt.learning.augment import training_variant
from fedgestalt.learning.blocks import training_pictures
from fedgestalt.learning.device import trunk_dtype
from fedgestalt.learning.ensemble import (
    Ensemble,
    Member,
    SharedState,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.features import give_pages_back, trunk_features
from fedgestalt.learning.images import Faces, to_input
from fedgestalt.learning.normalisation import PooledNorms

_HELD_OUT_BATCH = 32
_OPTIMISERS: Final = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}

MemberProgress = Callable[[str, int, int], None]
"""Called with (member, epochs or images done, total)."""


def show_nothing(member: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class TrainingSet:
    """What a site trains on.

    Attributes:
        faces: (n, 112, 112, 3).
        targets: (n,) class indices.
        classes: number of classes of the consortium.
    """

    faces: Faces
    targets: NDArray[np.int64]
    classes: int


@dataclass(frozen=True)
class MemberMetrics:
    """How a round's training went.

    Attributes:
        loss, accuracy: means over the last local epoch, dropout and augmentation on.
        agreement: share of the held-out images that the model classified as labelled *before* this
            round's training; None if there are none. Training images would not do: a model learns
            wrong labels by heart.
    """

    loss: float
    accuracy: float
    agreement: float | None


@dataclass
class LocalTrainer:
    """Trains one ensemble on one set, round by round.

    Attributes:
        ensemble: its modules are changed by every round.
        data: the site's training set.
        device: to compute on.
        seed: of augmentation and batch order; differs between sites.
        cache: folder for trunk features; None keeps them in memory.
        features: trunk features by member; computed in the first round unless given.
        held_out: images that are not trained on; see :attr:`MemberMetrics.agreement`.
    """

    ensemble: Ensemble
    data: TrainingSet
    device: torch.device
    seed: int
    cache: Path | None = None
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    held_out: TrainingSet | None = None
    _held_out_features: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.data.targets) < 2:
            raise SiteError(
                f"{len(self.data.targets)} training images, at least 2 are needed",
                remedy="this site can match without training: leave it out of the training roster",
            )
        restricted = [m for m in self.ensemble.spec.members if m.training.softmax == "present"]
        if restricted and len(np.unique(self.data.targets)) < 2:
            raise SiteError(
                f"member {restricted[0].name!r} has a softmax over the site's own classes, and all"
                " training images are of one class: there is nothing to tell apart",
                remedy="set softmax: all in the job, or leave this site out of the training roster",
            )

    def prepare(self, progress: MemberProgress = show_nothing) -> None:
        """Compute, or find in the cache, the features of all members with a frozen trunk."""
        for index, member in enumerate(self.ensemble.members):
            if member.trained_parts and member.trunk_is_frozen:
                self._features(member, index, progress)

    def run_round(
        self,
        state: Mapping[str, NDArray[np.float32]],
        round_number: int,
        progress: MemberProgress = show_nothing,
        repeat: int = 0,
    ) -> tuple[SharedState, dict[str, MemberMetrics]]:
        """Train all trainable members from ``state``; return the new state and their metrics.

        Args:
            state: what to start from.
            round_number: sets, with the seed, all random draws.
            progress: see :data:`MemberProgress`.
            repeat: how often this round was trained and given away before; other draws then.
        """
        write_shared_state(self.ensemble, state)
        metrics: dict[str, MemberMetrics] = {}
        for index, member in enumerate(self.ensemble.members):
            if member.trained_parts:
                again = [repeat] if repeat else []
                rng = np.random.default_rng([self.seed, round_number, index, *again])
                metrics[member.spec.name] = self._train(member, index, rng, progress)
        return read_shared_state(self.ensemble), metrics

    def _train(
        self, member: Member, index: int, rng: np.random.Generator, progress: MemberProgress
    ) -> MemberMetrics:
        settings, name = member.spec.training, member.spec.name
        batches = self._batches(member, index, rng, progress)
        chosen = self._classes_of(member)
        targets = torch.from_numpy(np.searchsorted(chosen, self.data.targets)).to(self.device)
        weights = class_weights(self.data.targets, self.data.classes)[chosen].to(self.device)
        loss_of = nn.CrossEntropyLoss(weights, label_smoothing=settings.label_smoothing)
        columns = ... if len(chosen) == self.data.classes else torch.from_numpy(chosen)
        body = [p for k, m in member.trained_parts.items() if k != "head" for p in m.parameters()]
        optimiser = _OPTIMISERS[settings.optimiser](
            [
                {
                    "params": body,
                    "lr": settings.learning_rate,
                    "weight_decay": settings.weight_decay,
                },
                {
                    "params": list(member.head.parameters()),
                    "lr": settings.head_learning_rate,
                    "weight_decay": settings.head_weight_decay,
                },
            ],
            fused=True,  # twelve times faster than the default on a CPU
        )
        dtype = trunk_dtype(self.device)
        mixed = dtype != torch.float32
        member.to(self.device)
        agreement = self._agreement(member)
        for module in member.trained_parts.values():
            module.train()
        pooled = PooledNorms(
            member.trained_parts.values() if settings.batch_norm == "pooled" else ()
        )
        anchor = _Anchor(optimiser, settings.proximal)
        before = {name: p.detach().clone() for name, p in member.head.named_parameters()}
        losses, correct, seen = 0.0, 0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**62)))
            for epoch in range(settings.epochs):
                losses, correct, seen = 0.0, 0, 0
                pooled.begin_epoch()
                for rows, features in batches():
                    expected = targets[rows]
                    with torch.autocast(self.device.type, dtype=dtype, enabled=mixed):
                        encodings = member.neck(features)
                    logits = member.head(encodings.float())[..., columns]
                    loss = loss_of(logits, expected)
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    anchor.pull()
                    optimiser.step()
                    losses += float(loss.detach()) * len(rows)
                    correct += int((logits.detach().argmax(1) == expected).sum())
                    seen += len(rows)
                progress(name, epoch + 1, settings.epochs)
        pooled.end()
        member.eval()
        if member.spec.name in self.features:
            give_pages_back(self.features[member.spec.name])
        absent = np.setdiff1d(np.arange(self.data.classes), chosen)
        with torch.no_grad():  # the weight decay alone has moved them
            for name, parameter in member.head.named_parameters():
                parameter[absent] = before[name][absent]
        return MemberMetrics(losses / seen, correct / seen, agreement)

    def _classes_of(self, member: Member) -> NDArray[np.int64]:
        """Ascending classes that a member's loss is over."""
        if member.spec.training.softmax == "present":
            return np.unique(self.data.targets)
        return np.arange(self.data.classes)

    def _agreement(self, member: Member) -> float | None:
        """See :class:`MemberMetrics`; draws no random numbers."""
        held_out = self.held_out
        if held_out is None or not len(held_out.targets):
            return None
        dtype = trunk_dtype(self.device)
        correct = 0
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            for rows in np.array_split(
                np.arange(len(held_out.targets)), math.ceil(len(held_out.targets) / _HELD_OUT_BATCH)
            ):
                if member.trunk_is_frozen:
                    features = self._held_out(member, held_out)[rows, 0].to(self.device)
                else:
                    faces = to_input(held_out.faces[rows], member.input, self.device, torch.float32)
                    features = member.trunk(faces)
                found = member.head(member.neck(features)).argmax(1).cpu().numpy()
                correct += int((found == held_out.targets[rows]).sum())
        return correct / len(held_out.targets)

    def _held_out(self, member: Member, held_out: TrainingSet) -> torch.Tensor:
        name = member.spec.name
        if name not in self._held_out_features:
            self._held_out_features[name] = trunk_features(
                member, held_out.faces[:, None], self.device, self.cache
            )
        return self._held_out_features[name]

    def _batches(
        self, member: Member, index: int, rng: np.random.Generator, progress: MemberProgress
    ) -> Callable[[], Iterator[tuple[NDArray[np.int64], torch.Tensor]]]:
        """A function that yields (rows, trunk features) of one epoch."""
        count, size = len(self.data.targets), member.spec.training.batch_size

        def from_cache() -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
            features = self._features(member, index, progress)
            for rows in shuffled_batches(count, size, rng):
                chosen = rng.integers(0, features.shape[1], len(rows))
                yield rows, features[rows, chosen].to(self.device)

        def fresh() -> Iterator[tuple[NDArray[np.int64], torch.Tensor]]:
            dtype = trunk_dtype(self.device)
            for rows in shuffled_batches(count, size, rng):
                faces = np.stack([training_variant(face, rng) for face in self.data.faces[rows]])
                images = to_input(faces, member.input, self.device, torch.float32)
                images = images.contiguous(memory_format=torch.channels_last)
                mixed = dtype != torch.float32
                with torch.autocast(self.device.type, dtype=dtype, enabled=mixed):
                    features = member.trunk(images)
                yield rows, features

        return from_cache if member.trunk_is_frozen else fresh

    def _features(self, member: Member, index: int, progress: MemberProgress) -> torch.Tensor:
        name = member.spec.name
        if name not in self.features:
            count = member.spec.training.variants
            pictures = training_pictures(self.data.faces, count, (self.seed, index))
            self.features[name] = trunk_features(
                member, pictures, self.device, self.cache, lambda d, t: progress(name, d, t)
            )
        return self.features[name]


class _Anchor:
    """FedProx (Li et al. 2020, eq. 2): keeps parameters near where the round found them.

    Adds the gradient of ``mu / 2 * |w - w_start|^2`` to that of the loss.
    """

    def __init__(self, optimiser: torch.optim.Optimizer, mu: float) -> None:
        self._mu = mu
        groups = optimiser.param_groups if mu else []
        self._parameters = [p for group in groups for p in group["params"]]
        self._start = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def pull(self) -> None:
        """Between ``backward`` and ``step``."""
        for parameter, start in zip(self._parameters, self._start, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu)


def shuffled_batches(
    count: int, size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Rows 0..count-1 in random order, in batches of ``size``; never a last batch of one.

    BatchNorm cannot train on a single row: it joins the batch before it.
    """
    order = rng.permutation(count)
    cuts = list(range(size, count, size))
    if cuts and count - cuts[-1] == 1:
        cuts.pop()
    yield from np.split(order, cuts)


def class_weights(targets: NDArray[np.int64], classes: int) -> torch.Tensor:
    """0.5 + 0.5 * (smallest class size / class size), for classes present; 0 for absent ones."""
    counts = np.bincount(targets, minlength=classes).astype(np.float64)
    present = counts > 0
    weights = np.zeros(classes)
    weights[present] = 0.5 + 0.5 * counts[present].min() / counts[present]
    return torch.from_numpy(weights.astype(np.float32))
