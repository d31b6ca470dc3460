"""The ensemble as torch modules, and its shared state as plain arrays.

*Shared state* is what training changes and sites aggregate: parameters, and the running statistics
of BatchNorm as mean and **second moment**. A weighted mean of second moments gives the exact pooled
variance, ``var = E[x^2] - E[x]^2``; a mean of variances would not. ``num_batches_tracked`` never
travels: it would tell how many images a site has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedgestalt.contracts import BackboneModules, FromWeights, InputSpec, Options
from fedgestalt.errors import ConfigError
from fedgestalt.hooks.registry import Registry, read_options
from fedgestalt.learning.augment import TEST_VARIANTS
from fedgestalt.learning.normalisation import NORMS
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.weights import find_weights, without_place

SharedState = dict[str, NDArray[np.float32]]

_MEAN, _VARIANCE, _SECOND_MOMENT = "running_mean", "running_var", "running_second_moment"
_NEEDS_STATISTICS = {
    "local": "publishes the start's BatchNorm layers",
    "pooled": "trains with the start's BatchNorm statistics in the first round",
}
_STAGED_AT_A_TIME = 64
"""Images: maps of a last stage are larger than its features."""


class StagedNeck(nn.Module):
    """The last stage of a trunk and the neck behind it, which train together."""

    def __init__(self, last_stage: nn.Module, neck: nn.Module) -> None:
        super().__init__()
        self.last_stage, self.neck = last_stage, neck

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Encode (n, *feature_shape); in small parts where nothing is learnt from the whole."""
        parts = (feature,) if self.training else torch.split(feature, _STAGED_AT_A_TIME)
        if feature.ndim == 4:
            parts = tuple(p.contiguous(memory_format=torch.channels_last) for p in parts)
        encoded: torch.Tensor = torch.cat([self.neck(self.last_stage(part)) for part in parts])
        return encoded


class Member(nn.Module):
    """One network: trunk, neck and, while training, a classifier on the encoding.

    Where the last stage trains, ``trunk`` is what comes before it, and ``neck`` begins with it.
    """

    def __init__(
        self,
        spec: MemberSpec,
        trunk: nn.Module,
        neck: nn.Module,
        head: nn.Module,
        input_spec: InputSpec,
        feature_shape: tuple[int, ...],
        embedding_size: int,
        weights_licence: str = "",
    ) -> None:
        super().__init__()
        self.spec, self.input, self.feature_shape = spec, input_spec, feature_shape
        self.embedding_size, self.weights_licence = embedding_size, weights_licence
        self.trunk, self.neck, self.head = trunk, neck, head
        for part in self.trained_parts.values():
            part.requires_grad_(True)
        self.trunk_digest = self._digest_of_trunk()

    def _digest_of_trunk(self) -> str:
        facts = f"{self.input}|{self.feature_shape}|{state_digest(self.trunk)}"
        return hashlib.sha256(facts.encode()).hexdigest()

    def frozen_state(self) -> dict[str, NDArray[np.float32]]:
        """What training does not change and an encoding needs, by name in the member."""
        return {
            name: tensor.detach().float().cpu().numpy()
            for name, tensor in self.state_dict().items()
            if name.partition(".")[0] not in {"head", *self.trained_parts}
            and not name.endswith("num_batches_tracked")
        }

    def load_frozen_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy what :meth:`frozen_state` returned into the modules.

        Raises:
            ConfigError: names or shapes differ; the modules are unchanged then.
        """
        current = self.frozen_state()
        if {n: v.shape for n, v in current.items()} != {n: v.shape for n, v in state.items()}:
            raise ConfigError(
                f"the frozen tensors of member {self.spec.name!r} do not fit its backbone",
                remedy="install the version of the backbone's plugin that it was trained with",
            )
        self.load_state_dict({n: torch.from_numpy(v) for n, v in state.items()}, strict=False)
        self.trunk_digest = self._digest_of_trunk()

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that training changes, by name; empty for an untouched member."""
        parts = {"none": (), "all": ("trunk", "neck", "head")}
        return {n: getattr(self, n) for n in parts.get(self.spec.trainable, ("neck", "head"))}

    @property
    def trunk_is_frozen(self) -> bool:
        """Whether the trunk's features may be cached."""
        return self.spec.trainable != "all"


@dataclass(frozen=True)
class Ensemble:
    """All members, for one number of classes.

    Attributes:
        spec: its specification.
        members: in the order of the encoding.
        classes: of the classifier.
        weights: files that it began from, by name.
    """

    spec: EnsembleSpec
    members: tuple[Member, ...]
    classes: int
    weights: Mapping[str, Path] = field(default_factory=dict)

    @property
    def encoding_size(self) -> int:
        """Length of a concatenated encoding."""
        return sum(member.embedding_size for member in self.members) * len(TEST_VARIANTS)

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbone plugins, each once."""
        return tuple(dict.fromkeys(member.spec.backbone for member in self.members))

    @property
    def licences(self) -> dict[str, str]:
        """SPDX licence of each member's start weights; empty for random ones."""
        return {member.spec.name: member.weights_licence for member in self.members}

    @property
    def start_digest(self) -> str:
        """SHA-256 over specification, classes and all frozen and start weights, hexadecimal.

        Two sites with equal digests start from the same model.
        """
        parts = [self.spec.digest, str(self.classes)]
        parts += [state_digest(member) for member in self.members]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    def outline(self) -> Outline:
        """What is needed to name and store states of this ensemble, without its modules."""
        frozen = [member.trunk_digest for member in self.members]
        frozen += [state_digest(m.neck) for m in self.members if not m.trained_parts]
        return Outline(self.spec, self.classes, tuple(frozen))

    def digest(self, state: Mapping[str, NDArray[np.float32]]) -> str:
        """SHA-256 over the frozen parts and a shared state, hexadecimal."""
        return self.outline().digest(state)


@dataclass(frozen=True)
class Outline:
    """An ensemble without its modules.

    Attributes:
        spec: its specification.
        classes: of the classifier.
        frozen: digests of the parts that training does not change.
    """

    spec: EnsembleSpec
    classes: int
    frozen: tuple[str, ...]

    def digest(self, state: Mapping[str, NDArray[np.float32]]) -> str:
        """SHA-256 over the frozen parts and a shared state, hexadecimal."""
        parts = "|".join([self.spec.digest, *self.frozen, shared_state_digest(state).hex()])
        return hashlib.sha256(parts.encode()).hexdigest()


def build_ensemble(spec: EnsembleSpec, classes: int, registry: Registry) -> Ensemble:
    """Build the start model: a function of specification, classes and installed weights alone.

    Raises:
        PluginError: a backbone is not installed.
        ConfigError: its options are wrong, or it cannot train as the specification says.
        SiteError: this machine lacks a weights file, or has one that does not fit.
    """
    members, weights = [], {}
    for index, member in enumerate(spec.members):
        modules, path = _built(member, spec.seed + index, registry)
        if path:
            weights[path.name] = path
        trunk, neck, feature_shape = _divided(member, modules)
        dropout = nn.Dropout(member.training.dropout)
        head = nn.Sequential(dropout, _linear(modules.embedding_size, classes, spec.seed + index))
        members.append(
            Member(
                member,
                trunk.eval(),
                neck.eval(),
                head.eval(),
                modules.input,
                feature_shape,
                modules.embedding_size,
                modules.weights_licence,
            )
        )
    return Ensemble(spec, tuple(members), classes, weights)


def _built(
    member: MemberSpec, seed: int, registry: Registry
) -> tuple[BackboneModules, Path | None]:
    """A member's modules, and the file that they began from."""
    where = f"ensemble member {member.name!r}"
    options = find_weights(_options(member, registry), registry, where)
    path = options.weights if isinstance(options, FromWeights) else None
    try:
        modules = registry.backbones.get(member.backbone).build(options, seed)
    except ConfigError as error:
        raise without_place(error, path, where) if path else error from None
    needed = _NEEDS_STATISTICS.get(member.training.batch_norm)
    if needed and member.trainable != "none" and not modules.weights_licence:
        raise ConfigError(
            f"batch_norm: {member.training.batch_norm} {needed}, and those of random weights have"
            " seen no image",
            where=where,
            remedy="begin from pretrained weights, or set batch_norm: shared",
        )
    return modules, path


def _options(member: MemberSpec, registry: Registry) -> Options:
    model = registry.backbones.get(member.backbone).options
    return read_options(model, member.options, where=f"options of ensemble member {member.name!r}")


def _divided(
    member: MemberSpec, modules: BackboneModules
) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """Trunk, neck and the shape of a feature between them."""
    if member.trainable != "last-stage":
        return modules.trunk, modules.neck, modules.feature_shape
    cut = modules.cut
    if cut is None:
        raise ConfigError(
            f"backbone {member.backbone!r} does not say where its last stage begins",
            where=f"ensemble member {member.name!r}",
            remedy="set trainable to neck or all",
        )
    return cut.early, StagedNeck(cut.last_stage, modules.neck), cut.feature_shape


def _linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(0, inputs**-0.5, generator=generator)
        layer.bias.zero_()
    return layer


def _entries(member: Member) -> Iterator[tuple[str, torch.Tensor, nn.Module, str]]:
    """Name, tensor, owning module and local name of everything that is shared."""
    for part, root in member.trained_parts.items():
        for path, module in root.named_modules():
            prefix = f"{member.spec.name}/{part}/{path}." if path else f"{member.spec.name}/{part}/"
            for local, parameter in module.named_parameters(recurse=False):
                yield prefix + local, parameter, module, local
            if isinstance(module, NORMS) and module.track_running_stats:
                for local in (_MEAN, _VARIANCE):
                    yield prefix + local, getattr(module, local), module, local


def read_shared_state(ensemble: Ensemble) -> SharedState:
    """Copy the shared state out of the modules."""
    state: SharedState = {}
    with torch.no_grad():
        for member in ensemble.members:
            for name, tensor, module, local in _entries(member):
                values = tensor.detach().float()
                key = name
                if local == _VARIANCE:
                    values = values + getattr(module, _MEAN).float() ** 2
                    key = name.removesuffix(_VARIANCE) + _SECOND_MOMENT
                state[key] = values.cpu().numpy().copy()
    return state


def write_shared_state(ensemble: Ensemble, state: Mapping[str, NDArray[np.float32]]) -> None:
    """Copy a shared state into the modules.

    Raises:
        ConfigError: names or shapes differ; the modules are unchanged then.
    """
    current = read_shared_state(ensemble)
    if current.keys() != state.keys():
        differing = sorted(current.keys() ^ state.keys())
        raise ConfigError(f"the model and the received state differ in tensor {differing[0]!r}")
    for name, values in state.items():
        if values.shape != current[name].shape:
            raise ConfigError(
                f"tensor {name!r} has shape {values.shape}, not {current[name].shape}"
            )
    with torch.no_grad():
        for member in ensemble.members:
            for name, tensor, _, local in _entries(member):
                if local == _VARIANCE:
                    stem = name.removesuffix(_VARIANCE)
                    mean = state[stem + _MEAN].astype(np.float64)
                    spread = state[stem + _SECOND_MOMENT] - mean**2
                    values = np.maximum(spread, 0).astype(np.float32)
                else:
                    values = state[name]
                tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))


def is_classifier(name: str) -> bool:
    """Whether a tensor of the shared state belongs to a member's classifier; rows are classes."""
    return name.split("/")[1] == "head"


def is_statistic(name: str) -> bool:
    """Whether a tensor of the shared state is a running statistic, which follows the data."""
    return name.endswith((_MEAN, _SECOND_MOMENT))


def local_norms(spec: EnsembleSpec, names: Iterable[str]) -> frozenset[str]:
    """Tensors of BatchNorm layers that stay at the site (``batch_norm: local``).

    Args:
        spec: of the ensemble.
        names: of its shared state.
    """
    keeping = {member.name for member in spec.members if _keeps_norms(member)}
    own = [name for name in names if name.split("/")[0] in keeping]
    layers = {_layer(name) for name in own if name.endswith(_MEAN)}
    return frozenset(name for name in own if _layer(name) in layers)


def _layer(name: str) -> str:
    return name.removesuffix(re.split("[./]", name)[-1])


def _keeps_norms(member: MemberSpec) -> bool:
    return member.trainable != "none" and member.training.batch_norm == "local"


def shared_state_digest(state: Mapping[str, NDArray[np.float32]]) -> bytes:
    """SHA-256 over names, shapes and values, 32 bytes."""
    total = hashlib.sha256()
    for name, values in sorted(state.items()):
        total.update(f"{name}|{values.shape};".encode())
        total.update(np.ascontiguousarray(values, "<f4").data)
    return total.digest()


def state_digest(module: nn.Module) -> str:
    """SHA-256 over a module's parameters and buffers, hexadecimal."""
    state = {
        name: tensor.detach().float().cpu().numpy()
        for name, tensor in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return shared_state_digest(state).hex()


def weight_licences(spec: EnsembleSpec, registry: Registry) -> dict[str, str]:
    """SPDX licence of each member's start weights; of those from files, as the job states it.

    Files are not opened for it: what they hold may be large, and not allowed here.

    Raises:
        PluginError: a backbone is not installed.
        ConfigError: its options are wrong.
    """
    found = {}
    for index, member in enumerate(spec.members):
        options = _options(member, registry)
        if isinstance(options, FromWeights) and options.weights is not None:
            found[member.name] = options.weights_licence
        else:
            found[member.name] = _built(member, spec.seed + index, registry)[0].weights_licence
    return found
