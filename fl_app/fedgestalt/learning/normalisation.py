"""BatchNorm layers that normalise with the consortium's statistics while they train.

A layer in training normalises with the mean and variance of its batch. At a hospital whose patients
have one syndrome that takes away just what tells the syndrome from others. *Pooled* layers
normalise with the running statistics that the round began with, those of all sites, as they do in
evaluation; meanwhile the site measures mean and second moment of what it sees, and their weighted
mean over the sites, which the sum under masks gives exactly, are the statistics of the next round.
(FixBN, Zhong et al. 2023, fixes the statistics of the last rounds; here they follow the model, one
round behind.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import nn

NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)
Norm = nn.BatchNorm1d | nn.BatchNorm2d


class PooledNorms:
    """The layers of some modules, from :meth:`begin_epoch` to :meth:`end`.

    Args:
        modules: in training; their BatchNorm layers are put in evaluation.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        layers = [layer for root in modules for layer in root.modules()]
        self._meters = [
            _Meter(layer)
            for layer in layers
            if isinstance(layer, NORMS) and layer.track_running_stats
        ]

    def begin_epoch(self) -> None:
        """Forget what was measured: the last epoch counts, its weights are nearest to the last."""
        for meter in self._meters:
            meter.forget()

    def end(self) -> None:
        """Give the layers what was measured, as their running statistics."""
        for meter in self._meters:
            meter.end()


class _Meter:
    """Measures what comes into one layer."""

    def __init__(self, layer: Norm) -> None:
        self._layer = layer.eval()
        self._hook = layer.register_forward_pre_hook(self._see)
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._count, self._sums = 0, torch.zeros(2, self._layer.num_features, dtype=torch.float64)

    def _see(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        over = [axis for axis in range(values.ndim) if axis != 1]
        self._count += values.numel() // values.shape[1]
        sums = torch.stack([values.sum(over), values.square().sum(over)])
        self._sums += sums.double().cpu()

    def end(self) -> None:
        """See :meth:`PooledNorms.end`."""
        self._hook.remove()
        mean, moment = self._sums / self._count
        with torch.no_grad():
            self._layer.running_mean.copy_(mean)  # type: ignore[union-attr]
            self._layer.running_var.copy_((moment - mean.square()).clamp_(min=0))  # type: ignore[union-attr]
