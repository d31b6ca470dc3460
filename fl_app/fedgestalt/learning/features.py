"""Features of a frozen trunk, computed once and kept in memory-mapped files.

The trunk does not change, so an epoch needs it only the first time. A file's name is a digest of
everything its content depends on (trunk weights, pixels and variants, number format): another
model or another picture cannot meet a stale file. Files hold features of photographs: they are as
sensitive as photographs, stay in the site's own store, and are readable by its user alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.contracts import Progress
from fedgestalt.errors import SiteError
from fedgestalt.learning.device import trunk_dtype
from fedgestalt.learning.ensemble import Member
from fedgestalt.learning.images import to_input

_BATCH = 16  # twice as fast as 64 on a CPU: larger tensors leave the cache and are mapped afresh


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def trunk_features(
    member: Member,
    variants: NDArray[np.uint8],
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Features of all variants of all images.

    Args:
        member: whose trunk to run.
        variants: (n, v, 112, 112, 3).
        device: to compute on.
        cache: folder for the files; None keeps the result in memory.
        progress: called with (images done, images).

    Returns:
        (n, v, *feature_shape), bfloat16 or float32, on the CPU; memory-mapped if cached.
    """
    dtype = trunk_dtype(device)
    shape = (*variants.shape[:2], *member.feature_shape)
    if cache is None:
        result = torch.empty(shape, dtype=dtype)
        _compute(member, variants, device, result, progress)
        return result
    name = hashlib.sha256(f"{member.trunk_digest}|{dtype}|{variants.shape}|".encode())
    name.update(np.ascontiguousarray(variants).data)
    target = cache / f"features-{name.hexdigest()[:32]}.bin"
    if not target.exists():
        with _reserved_file(cache, math.prod(shape) * dtype.itemsize) as temporary:
            _compute(member, variants, device, _mapped(temporary, shape, dtype, True), progress)
            temporary.replace(target)
    return _mapped(target, shape, dtype, False)


@contextlib.contextmanager
def _reserved_file(folder: Path, size: int) -> Iterator[Path]:
    """A new file whose disk space is already taken: a full disk shows now, not as a bus error."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=folder, suffix=".partial")  # readable by its user alone
    except OSError as error:
        raise SiteError(f"the feature cache cannot be written ({error.strerror})") from None
    path = Path(name)
    try:
        try:
            os.posix_fallocate(handle, 0, max(size, 1))
        except OSError as error:
            raise SiteError(
                f"the feature cache needs {size >> 20} MiB ({error.strerror})",
                remedy="free disk space or lower the number of variants",
            ) from None
        finally:
            os.close(handle)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, write: bool) -> torch.Tensor:
    size = math.prod(shape)
    return torch.from_file(str(path), shared=write, size=size, dtype=dtype).view(shape)


def _compute(
    member: Member,
    variants: NDArray[np.uint8],
    device: torch.device,
    result: torch.Tensor,
    progress: Progress,
) -> None:
    trunk = copy.deepcopy(member.trunk).to(device=device, dtype=result.dtype)
    trunk = trunk.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    per_image = variants.shape[1]
    flat, out = variants.reshape(-1, *variants.shape[2:]), result.flatten(0, 1)
    with torch.inference_mode():
        for start in range(0, len(flat), _BATCH):
            batch = to_input(flat[start : start + _BATCH], member.input, device, result.dtype)
            out[start : start + _BATCH] = trunk(batch).to(device="cpu")
            progress(min(start + _BATCH, len(flat)) // per_image, len(variants))
