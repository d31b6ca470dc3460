"""The global model as server and sites hold it between rounds.

With a server momentum (FedAvgM, Hsu et al. 2019) a step is not the mean update *u* but a velocity,
``v <- momentum * v + u``, and every party carries it: velocity and momentum are part of the model's
vector and digest, so that sites that disagree about either open no sum. Running statistics follow
the mean at once: they follow the data, and a momentum could make a variance negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from fedgestalt.learning.ensemble import SharedState, is_statistic, shared_state_digest
from fedgestalt.secagg import blocks_of

_MOMENTUM, _VELOCITY = ".momentum", ".velocity/"
"""No member can have such a name."""


class GlobalModel:
    """One flat vector with a view per tensor: it travels, moves and is hashed without copies.

    Args:
        state: copied; tensors are laid out in the order of their sorted names.
        momentum: of its steps.

    Attributes:
        flat: (size,) float32.
        tensors: views into it, by name; with a momentum, it and the velocity are among them.
        state: those of them that are the model.
    """

    def __init__(self, state: Mapping[str, NDArray[np.float32]], momentum: float = 0.0) -> None:
        every = dict(state)
        if momentum:
            moving = [name for name in state if not is_statistic(name)]
            every |= {_VELOCITY + name: np.zeros_like(state[name]) for name in moving}
            every[_MOMENTUM] = np.array(momentum, np.float32)
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

    @property
    def momentum(self) -> float:
        """Of its steps, as everybody who has this digest applies it."""
        return float(self.tensors.get(_MOMENTUM, 0.0))

    def change(self, mean: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """By how much :meth:`step` would move each tensor."""
        return _Change(self.tensors, mean) if _MOMENTUM in self.tensors else mean

    def step(self, mean: Mapping[str, NDArray[np.float32]]) -> None:
        """Move the model by a mean update, in place; every party gets the same bits."""
        self._digest = b""
        for name, values in self.state.items():
            flat, velocity = values.reshape(-1), self.tensors.get(_VELOCITY + name)
            for place, part in blocks_of(mean, name):
                step = part
                if velocity is not None:
                    step = velocity.reshape(-1)[place]
                    step *= self.tensors[_MOMENTUM]
                    step += part
                flat[place] += step

    def load(self, flat: NDArray[np.float32]) -> None:
        """Take over the values of another model of the same tensors."""
        self._digest = b""
        self.flat[:] = flat

    def take(self, tensors: Mapping[str, NDArray[np.float32]]) -> bool:
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


class _Change(Mapping[str, NDArray[np.float32]]):
    """Computes a tensor's step when it is looked up: the whole of it is never there twice."""

    def __init__(self, tensors: SharedState, mean: Mapping[str, NDArray[np.float32]]) -> None:
        self._tensors, self._mean = tensors, mean

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        mean, velocity = self._mean[name], self._tensors.get(_VELOCITY + name)
        if velocity is None:
            return mean
        step: NDArray[np.float32] = velocity * self._tensors[_MOMENTUM] + mean
        return step

    def __iter__(self) -> Iterator[str]:
        return iter(self._mean)

    def __len__(self) -> int:
        return len(self._mean)
