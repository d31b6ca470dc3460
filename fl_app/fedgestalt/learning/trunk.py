"""A frozen trunk, made ready to run fast.

A copy, so that the member keeps its full precision: BatchNorm is folded into the convolution before
it (exact in evaluation mode), numbers become bfloat16 where the hardware multiplies them natively,
memory is channels-last, and pictures run in batches without gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedgestalt.contracts import FoldsNorms, InputSpec
from fedgestalt.learning.images import to_input

BATCH = 16
"""Pictures at a time; twice as fast as 64 on a CPU: larger tensors leave its cache."""

BATCH_ON_GPU = 256


class FastTrunk:
    """Runs pictures through a trunk.

    Args:
        trunk: in evaluation mode; it is copied.
        input_spec: what it expects.
        device: to compute on.
        dtype: to compute with.
    """

    def __init__(
        self, trunk: nn.Module, input_spec: InputSpec, device: torch.device, dtype: torch.dtype
    ) -> None:
        ready = with_folded_norms(trunk).to(device=device, dtype=dtype)
        self._trunk = ready.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._input, self._device, self._dtype = input_spec, device, dtype

    def __call__(self, pictures: NDArray[np.uint8]) -> torch.Tensor:
        """Features (n, v, *feature_shape) of pictures (n, v, 112, 112, 3), on the CPU."""
        flat = torch.cat(list(self.in_batches(pictures)))
        return flat.view(*pictures.shape[:2], *flat.shape[1:])

    def in_batches(self, pictures: NDArray[np.uint8]) -> Iterator[torch.Tensor]:
        """Features (n * v, *feature_shape) of pictures (n, v, 112, 112, 3), a batch at a time."""
        flat = pictures.reshape(-1, *pictures.shape[2:])
        size = BATCH if self._device.type == "cpu" else BATCH_ON_GPU
        for start in range(0, len(flat), size):
            with torch.inference_mode():
                batch = to_input(flat[start : start + size], self._input, self._device, self._dtype)
                yield self._trunk(batch).cpu()


def with_folded_norms(trunk: nn.Module) -> nn.Module:
    """A copy of a trunk, in evaluation mode, with BatchNorms folded into the convolutions before.

    Jacob et al. 2018, "Quantization and training of neural networks", section 3.2. Where the one
    follows the other in a ``Sequential``; other modules of a backbone that know their own order
    say so by a method ``fold_norms`` (:class:`~fedgestalt.contracts.FoldsNorms`).
    """
    copied = copy.deepcopy(trunk).eval().requires_grad_(False)
    for module in list(copied.modules()):
        if isinstance(module, FoldsNorms):
            module.fold_norms()
        elif isinstance(module, nn.Sequential):
            for place in range(1, len(module)):
                convolution, norm = module[place - 1], module[place]
                if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    module[place - 1] = fuse_conv_bn_eval(convolution, norm)
                    module[place] = nn.Identity()
    return copied
