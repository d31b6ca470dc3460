"""The global model as server and sites hold it between rounds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedgestalt.learning.ensemble import SharedState, shared_state_digest
from fedgestalt.secagg import blocks_of


class GlobalModel:
    """One flat vector with a view per tensor: it travels, moves and is hashed without copies.

    Args:
        state: copied; tensors are laid out in the order of their sorted names.

    Attributes:
        flat: (size,) float32.
        state: views into it, by tensor.
    """

    def __init__(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        names = sorted(state)
        self.flat = np.empty(sum(state[name].size for name in names), np.float32)
        self.state: SharedState = {}
        start = 0
        for name in names:
            values = state[name]
            part = self.flat[start : start + values.size].reshape(values.shape)
            part[...] = values
            self.state[name] = part
            start += values.size
        self._digest = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 over names, shapes and values, 32 bytes."""
        if not self._digest:
            self._digest = shared_state_digest(self.state)
        return self._digest

    def step(self, mean: Mapping[str, NDArray[np.float32]]) -> None:
        """Move the model by a mean update, in place; every party gets the same bits."""
        self._digest = b""
        for name, values in self.state.items():
            flat = values.reshape(-1)
            for place, part in blocks_of(mean, name):
                flat[place] += part

    def load(self, flat: NDArray[np.float32]) -> None:
        """Take over the values of another model of the same tensors."""
        self._digest = b""
        self.flat[:] = flat
