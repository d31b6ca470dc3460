"""The trainable end of a face network."""

from __future__ import annotations

import torch
from torch import nn


class Neck(nn.Module):
    """Feature map -> encoding: dropout, flatten, linear layer ``fc``, BatchNorm1d ``features``.

    Args:
        inputs: numbers in one flattened feature.
        embedding_size: length of one encoding.
        dropout: share of the flattened feature that is dropped in training.
        eps: added to the variance by the batch normalisation.

    The names ``fc`` and ``features`` are those of published ArcFace iResNet checkpoints.
    """

    def __init__(
        self, inputs: int, embedding_size: int, *, dropout: float = 0.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=eps)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Encode (n, *feature_shape) as (n, embedding_size), not normalised."""
        encoded: torch.Tensor = self.features(self.fc(self.dropout(feature.flatten(1))))
        return encoded
