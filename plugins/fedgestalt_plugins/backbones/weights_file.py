"""Start weights from safetensors or a plain torch state_dict; code in a file is never run."""

from __future__ import annotations

import pickle
from collections.abc import Collection
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from fedgestalt.errors import ConfigError


def load_weights(
    path: Path, *modules: nn.Module, remedy: str, not_needed: Collection[str] = ()
) -> None:
    """Fill modules from one file, every tensor of which must have a place and its shape.

    Args:
        path: of the file.
        modules: to fill; no two have a tensor of one name.
        remedy: what to change where they do not fit.
        not_needed: names of tensors that the file may have or not, in any shape.

    Raises:
        ConfigError: the file cannot be read or does not fit.
    """
    found = _read(path)
    for name in not_needed:
        found.pop(name, None)
    expected = {name: t for module in modules for name, t in module.state_dict().items()}
    for name, tensor in expected.items():
        if name not in found and name.endswith("num_batches_tracked"):
            found[name] = torch.zeros_like(tensor)  # not in older checkpoints, never used here
        elif name not in found:
            what = f"has no tensor {name!r} of shape {tuple(tensor.shape)}"
            raise ConfigError(what, where=str(path), remedy=remedy)
        elif found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, the network needs {tuple(tensor.shape)}"
            what = f"tensor {name!r} has shape {shapes}"
            raise ConfigError(what, where=str(path), remedy=remedy)
    for name in found:
        if name not in expected:
            what = (
                f"tensor {name!r} of shape {tuple(found[name].shape)} has no place in the network"
            )
            raise ConfigError(what, where=str(path), remedy=remedy)
    for module in modules:
        module.load_state_dict({name: found[name] for name in module.state_dict()})


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError("the weights file does not exist", where=str(path)) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError):
        what = "the weights file is neither safetensors nor a plain torch state_dict"
        raise ConfigError(what, where=str(path)) from None
    if not isinstance(found, dict) or not all(torch.is_tensor(t) for t in found.values()):
        raise ConfigError("the weights file is not a state_dict of tensors", where=str(path))
    return dict(found)
