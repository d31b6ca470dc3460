"""A network of MONAI by name, as a backbone.

The network's last linear layer, which gives its classes, is taken away: all before it is the trunk,
and a new linear layer with a BatchNorm behind it is the neck.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedgestalt.contracts import BackboneModules, InputSpec
from fedgestalt.errors import ConfigError, nearest
from fedgestalt_plugins.backbones.neck import Neck
from fedgestalt_plugins.backbones.weights_file import load_weights

if TYPE_CHECKING:
    from fedgestalt_plugins.backbones import MonaiOptions

_PRETRAINED = "pretrained"
"""MONAI's argument that downloads weights."""


def build_monai(options: MonaiOptions, seed: int) -> BackboneModules:
    """Build the network; random weights are a function of ``seed`` alone.

    Raises:
        ConfigError: MONAI is not installed or has no such network, the arguments do not fit, the
            network gives no vector per image, or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(options)
        name, linear = _last_linear(network, options.network)
        neck = Neck(linear.in_features, options.embedding_size, dropout=options.dropout)
    if options.weights is not None:
        head = {f"{name}.{part}" for part in linear.state_dict()}
        _replace(network, name, nn.Identity())
        remedy = "use weights of this network, with the arguments that it was trained with"
        load_weights(options.weights, network, remedy=remedy, not_needed=head)
    else:
        _replace(network, name, nn.Identity())
    trunk = network.eval().requires_grad_(False)
    _check_feature(trunk, options, linear.in_features)
    return BackboneModules(
        trunk=trunk,
        neck=neck.eval(),
        input=InputSpec(size=options.input_size, channels=options.channels),
        feature_shape=(linear.in_features,),
        embedding_size=options.embedding_size,
        weights_licence=options.weights_licence if options.weights else "",
    )


def _network(options: MonaiOptions) -> nn.Module:
    try:
        nets = importlib.import_module("monai.networks.nets")
    except ModuleNotFoundError:
        raise ConfigError(
            "MONAI is not installed", remedy="install it with `pip install 'fedgestalt[monai]'`"
        ) from None
    known = {
        name: value
        for name, value in vars(nets).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module)))
    }
    if options.network not in known:
        raise ConfigError(
            f"MONAI has no network {options.network!r}", remedy=nearest(options.network, known)
        )
    make, arguments = known[options.network], dict(options.arguments)
    if arguments.get(_PRETRAINED):
        raise ConfigError(
            "MONAI would download weights, which no job may",
            remedy="remove `pretrained` and name a file as `weights`",
        )
    if _PRETRAINED in inspect.signature(make).parameters:
        arguments[_PRETRAINED] = False
    try:
        network = make(**arguments)
    except Exception as error:  # noqa: BLE001  whatever MONAI says of its arguments
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"MONAI's {options.network} does not take these arguments: {said}",
            remedy="look them up in MONAI's documentation of networks",
        ) from None
    if not isinstance(network, nn.Module):
        raise ConfigError(f"MONAI's {options.network} makes no network")
    return network


def _last_linear(network: nn.Module, name: str) -> tuple[str, nn.Linear]:
    linear = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ConfigError(
            f"MONAI's {name} has no linear layer at its end",
            remedy="choose a network that classifies images, such as resnet18 or DenseNet121",
        )
    return linear[-1]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)


def _check_feature(trunk: nn.Module, options: MonaiOptions, size: int) -> None:
    image = torch.zeros(2, 3, options.input_size, options.input_size)
    feature: Any = None
    said = ""
    try:
        with torch.inference_mode():
            feature = trunk(image)
    except Exception as error:  # noqa: BLE001  whatever a layer says of its input
        said = f" ({' '.join(str(error).split())[:200]})"
    if not torch.is_tensor(feature) or feature.shape != (2, size):
        raise ConfigError(
            f"MONAI's {options.network} with these arguments makes no vector of {size} numbers of"
            f" an RGB image of {options.input_size} x {options.input_size} pixels{said}",
            remedy="ask for two dimensions and three input channels, and choose a network that"
            " classifies images",
        )
