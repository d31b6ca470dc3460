"""A face network of the ArcFace kind from the ONNX file that a site has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedgestalt.contracts import BackboneModules, InputSpec
from fedgestalt.errors import ConfigError
from fedgestalt_plugins.backbones.onnx_graph import read_face_network

if TYPE_CHECKING:
    from fedgestalt_plugins.backbones import ArcFaceOnnxOptions


def build_arcface_onnx(options: ArcFaceOnnxOptions) -> BackboneModules:
    """Return trunk and neck of the file, cut at its last Gemm.

    Raises:
        ConfigError: it cannot be read, is no face network, or is not of the stated sizes.
    """
    path = options.weights
    network = read_face_network(path, dropout=options.dropout, size=options.input_size)
    wanted = options.embedding_size
    if wanted is not None and network.embedding_size != wanted:
        raise ConfigError(
            f"encodings of this file have length {network.embedding_size}, not {wanted}",
            where=str(path),
            remedy="set embedding_size to that of the file, or use the file that is meant",
        )
    raw = network.takes_pixels
    return BackboneModules(
        trunk=network.trunk.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        neck=network.neck,
        input=InputSpec(
            size=network.size,
            offset=0.0 if raw else 127.5,
            scale=1.0 if raw else 127.5,
            channels=options.channels,
        ),
        feature_shape=network.feature_shape,
        embedding_size=network.embedding_size,
        weights_licence=options.weights_licence,
        cut=network.cut,
    )
