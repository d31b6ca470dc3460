"""Which device and number format to compute with, decided at run time."""

from __future__ import annotations

import torch

from fedgestalt.errors import ConfigError, nearest

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str = "auto") -> torch.device:
    """Return the device called ``name``; ``auto`` is CUDA where there is one.

    Raises:
        ConfigError: unknown name, or CUDA is asked for and absent.
    """
    if name not in DEVICES:
        raise ConfigError(f"unknown device {name!r}", remedy=nearest(name, DEVICES))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("this machine has no usable CUDA device", remedy="use device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def trunk_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16", False) or capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32
