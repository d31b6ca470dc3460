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
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fedgestalt.contracts import InputSpec
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


class _WholeModules(fx.Tracer):
    """Looks into modules that only contain others; what computes by itself stays whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` stays as it is."""
        return super().is_leaf_module(m, module_qualified_name) or not any(m.children())


def with_folded_norms(trunk: nn.Module) -> nn.Module:
    """A copy of a trunk, in evaluation mode, with each BatchNorm folded into its convolution.

    Jacob et al. 2018, "Quantization and training of neural networks", section 3.2. A trunk whose
    ``forward`` torch cannot trace, or that shares a module between two places, is copied as it is.
    """
    copied = copy.deepcopy(trunk).eval().requires_grad_(False)
    try:
        graph = _WholeModules().trace(copied)
    except Exception:  # noqa: BLE001  whatever a plugin's forward raises for lack of real numbers
        return copied
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    if len(set(targets)) < len(targets):
        return copied
    for node in calls:
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        norm, convolution = (copied.get_submodule(str(n.target)) for n in (node, before))
        if isinstance(norm, nn.BatchNorm2d) and type(convolution) is nn.Conv2d:
            if not norm.track_running_stats:
                continue
            copied.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            copied.set_submodule(str(node.target), nn.Identity())
    return copied
