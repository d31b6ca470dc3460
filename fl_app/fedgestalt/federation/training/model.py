"""The global model as server and sites hold it between rounds, and how it moves.

The mean update *u* of a round is a direction; the server's optimiser makes a step of it (FedOpt,
Reddi et al. 2021). ``sgd`` with a momentum (FedAvgM, Hsu et al. 2019) moves by a velocity::

    v <- momentum * v + u                       model <- model + learning_rate * v

and ``adam`` (FedAdam) by as much in every coordinate, however small the mean is there::

    v <- momentum * v + (1 - momentum) * u
    s <- 0.99 * s + 0.01 * u^2
    model <- model + learning_rate * v / (sqrt(s) + 1e-6)

with ``s`` at 1e-12 in the beginning. Every party carries ``v`` and ``s``: they and the settings are
part of the model's vector and digest, so that sites that disagree about any of it open no sum; all
operations are those that IEEE 754 rounds correctly, so all parties get the same bits. Running
statistics follow the mean at once: they follow the data, and a momentum could make a variance
negative.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.learning.ensemble import SharedState, is_statistic, shared_state_digest
from fedgestalt.secagg import blocks_of

Floats = NDArray[np.float32]

_SETTINGS, _VELOCITY, _SQUARES = ".optimiser", ".velocity/", ".squares/"
"""No member can have such a name."""
_FORGETS, _FLOOR = np.float32(0.99), np.float32(1e-6)


class Optimiser(enum.StrEnum):
    """What makes a step of a mean update."""

    SGD = "sgd"
    ADAM = "adam"


@dataclass(frozen=True)
class ServerStep:
    """The server's optimiser and its settings; see the module.

    Attributes:
        optimiser: which.
        learning_rate: positive.
        momentum: 0 to below 1.
    """

    optimiser: Optimiser = Optimiser.SGD
    learning_rate: float = 1.0
    momentum: float = 0.0

    def numbers(self) -> Floats:
        """(3,) as they are part of a model."""
        kind = list(Optimiser).index(self.optimiser)
        return np.array([kind, self.learning_rate, self.momentum], np.float32)


MEAN_ITSELF: Final = ServerStep()
"""The model moves by the mean update."""


class GlobalModel:
    """One flat vector with a view per tensor: it travels, moves and is hashed without copies.

    Args:
        state: copied; tensors are laid out in the order of their sorted names.
        step: how it moves.

    Attributes:
        flat: (size,) float32.
        tensors: views into it, by name; with an optimiser, what that remembers is among them.
        state: those of them that are the model.
    """

    def __init__(self, state: Mapping[str, Floats], step: ServerStep = MEAN_ITSELF) -> None:
        every = dict(state)
        if step != MEAN_ITSELF:
            moving = [name for name in state if not is_statistic(name)]
            every |= {_VELOCITY + name: np.zeros_like(state[name]) for name in moving}
            if step.optimiser is Optimiser.ADAM:
                every |= {_SQUARES + n: np.full_like(state[n], _FLOOR**2) for n in moving}
            every[_SETTINGS] = step.numbers()
        names = sorted(every)
        self.flat = np.empty(sum(every[name].size for name in names), np.float32)
        self.tensors: SharedState = {}
        start = 0
        for name in names:
            values = every[name]
            part = self.flat[start : start + values.size].reshape(values.shape)
            part[...] = values
            self.tensors[name] = part
            start += values.size
        self.state = {name: self.tensors[name] for name in names if name in state}
        self._digest = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 over names, shapes and values, 32 bytes."""
        if not self._digest:
            self._digest = shared_state_digest(self.tensors)
        return self._digest

    def moves_by(self, step: ServerStep) -> bool:
        """Whether everybody who has this digest moves it so."""
        return np.array_equal(self.tensors.get(_SETTINGS, MEAN_ITSELF.numbers()), step.numbers())

    def change(self, mean: Mapping[str, Floats]) -> Mapping[str, Floats]:
        """By how much :meth:`step` would move each tensor."""
        return _Change(self, mean) if _SETTINGS in self.tensors else mean

    def step(self, mean: Mapping[str, Floats]) -> None:
        """Move the model by a mean update, in place; every party gets the same bits."""
        self._digest = b""
        for name, values in self.state.items():
            flat = values.reshape(-1)
            for place, part in blocks_of(mean, name):
                step, remembered = self._step(name, place, part)
                for kind, new in remembered.items():
                    self.tensors[kind + name].reshape(-1)[place] = new
                flat[place] += step

    def _step(self, name: str, place: slice, mean: Floats) -> tuple[Floats, dict[str, Floats]]:
        """How a part of a tensor would move, and what would be remembered of it."""
        velocity = self.tensors.get(_VELOCITY + name)
        if velocity is None:
            return mean, {}
        _, rate, momentum = self.tensors[_SETTINGS]
        squares = self.tensors.get(_SQUARES + name)
        kept = velocity.reshape(-1)[place] * momentum
        if squares is None:
            moved = kept + mean
            return moved * rate, {_VELOCITY: moved}
        moved = kept + mean * (1 - momentum)
        spread = squares.reshape(-1)[place] * _FORGETS + np.square(mean) * (1 - _FORGETS)
        return moved * rate / (np.sqrt(spread) + _FLOOR), {_VELOCITY: moved, _SQUARES: spread}

    def load(self, flat: Floats) -> None:
        """Take over the values of another model of the same tensors."""
        self._digest = b""
        self.flat[:] = flat

    def take(self, tensors: Mapping[str, Floats]) -> bool:
        """Take over the :attr:`tensors` of another model; False, and nothing done, if they differ.

        They differ if names or shapes do.
        """
        if {n: v.shape for n, v in tensors.items()} != {
            n: v.shape for n, v in self.tensors.items()
        }:
            return False
        self._digest = b""
        for name, values in tensors.items():
            self.tensors[name][...] = values
        return True


class _Change(Mapping[str, Floats]):
    """Computes a tensor's step when it is looked up: the whole of it is never there twice."""

    def __init__(self, model: GlobalModel, mean: Mapping[str, Floats]) -> None:
        self._model, self._mean = model, mean

    def __getitem__(self, name: str) -> Floats:
        mean = self._mean[name]
        step, _ = self._model._step(name, slice(0, mean.size), mean.reshape(-1))
        return step.reshape(mean.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._mean)

    def __len__(self) -> int:
        return len(self._mean)
