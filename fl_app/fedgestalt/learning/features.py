"""Features of a frozen trunk, computed once and kept in memory-mapped files.

The trunk does not change, so an epoch needs it only the first time. Pictures are made, and features
computed, in blocks, so that memory does not grow with the number of images.

A file's name is a digest of everything its content depends on (trunk weights, pixels and variants,
number format): another model or another picture cannot meet a stale file. The pixels are digested
before anything is computed, and each block again when it is computed on: an image that changed in
between is an error, and no file is kept. Files hold features of photographs: they are as sensitive
as photographs, stay in the site's own store, and are readable by its user alone.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.contracts import Progress
from fedgestalt.errors import DataError, SiteError
from fedgestalt.learning.blocks import Pictures, ahead, block_ranges, given_pictures
from fedgestalt.learning.crew import ALONE, Crew, crew_of_this_process
from fedgestalt.learning.device import trunk_dtype
from fedgestalt.learning.ensemble import Member
from fedgestalt.learning.trunk import FastTrunk

_OURS, _PARTIAL, _LEFT_SECONDS = ".fedgestalt-", ".partial", 2 * 24 * 3600
_FORMAT = 2
"""Changes with the way in which features are computed."""


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def trunk_features(
    member: Member,
    pictures: Pictures | NDArray[np.uint8],
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> torch.Tensor:
    """Features of all variants of all images.

    In a process of a crew, each process computes a share of the blocks into the same file.

    Args:
        member: whose trunk to run.
        pictures: n images of v variants; or an array (n, v, 112, 112, 3).
        device: to compute on.
        cache: folder for the files; None keeps the result in memory.
        progress: called with (images done, images).

    Returns:
        (n, v, *feature_shape), bfloat16 or float32, on the CPU; memory-mapped if cached.

    Raises:
        DataError: an image cannot be read, or changed in the meantime.
        SiteError: the cache cannot be written.
    """
    if not isinstance(pictures, Pictures):
        pictures = given_pictures(pictures)
    dtype = trunk_dtype(device)
    shape = (pictures.images, pictures.variants, *member.feature_shape)
    if cache is None:
        result = torch.empty(shape, dtype=dtype)
        _compute(member, pictures, device, result, progress)
        return result
    crew = crew_of_this_process()
    digests = _block_digests(pictures, crew)
    name = hashlib.sha256(f"{_FORMAT}|{member.trunk_digest}|{dtype}|{shape}|".encode())
    name.update(b"".join(digests))
    target = cache / f"features-{name.hexdigest()[:32]}.bin"
    size = math.prod(shape) * dtype.itemsize
    temporary = crew.from_leader(lambda: None if target.exists() else reserve_file(cache, size))
    if temporary is not None:
        try:
            with crew.together():
                mapped = _mapped(temporary, shape, dtype, True)
                _compute(member, pictures, device, mapped, progress, digests, crew)
            crew.from_leader(lambda: _keep(temporary, target))
        finally:
            if crew.leads:
                temporary.unlink(missing_ok=True)
    return _mapped(target, shape, dtype, False)


def _block_digests(pictures: Pictures, crew: Crew) -> list[bytes]:
    """Digests of all blocks, of which this process reads its share."""
    ranges, found = block_ranges(pictures.images), {}
    with crew.together():
        for start, _, block in ahead(pictures.make, crew.share(ranges)):
            found[start] = _digest(block)
    everybodys = {start: value for part in crew.gather(found) for start, value in part.items()}
    return [everybodys[start] for start, _ in ranges]


def _digest(block: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(block).data).digest()


def reserve_file(folder: Path, size: int, what: str = "the feature cache") -> Path:
    """Make a file whose disk space is taken: a full disk shows now, not as a bus error later.

    Args:
        folder: made if need be, for its user alone.
        size: bytes.
        what: the file is, in words.

    Raises:
        SiteError: the folder cannot be written, or has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(folder)
        handle, name = tempfile.mkstemp(_PARTIAL, _OURS, folder)  # readable by its user alone
    except OSError as error:
        raise SiteError(f"{what} cannot be written ({error.strerror})") from None
    path = Path(name)
    try:
        os.posix_fallocate(handle, 0, max(size, 1))
    except OSError as error:
        path.unlink()
        raise SiteError(
            f"{what} needs {size >> 20} MiB ({error.strerror})",
            remedy="free disk space or lower the number of variants",
        ) from None
    finally:
        os.close(handle)
    return path


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left; nobody computes for two days."""
    for left in folder.glob(f"{_OURS}*{_PARTIAL}"):
        if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
            left.unlink(missing_ok=True)


def _keep(temporary: Path, target: Path) -> None:
    try:
        temporary.replace(target)
    except OSError as error:
        raise SiteError(
            f"the feature cache cannot be written ({error.strerror})",
            remedy="leave the cache alone while a job is running",
        ) from None


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype, write: bool) -> torch.Tensor:
    size = math.prod(shape) * dtype.itemsize
    access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
    with path.open("r+b" if write else "rb") as file:
        mapping = mmap.mmap(file.fileno(), size, access=access)
    result = torch.frombuffer(mapping, dtype=dtype).view(shape)
    result.mapping = mapping  # type: ignore[attr-defined]
    return result


def give_pages_back(features: torch.Tensor) -> None:
    """Let go of the memory that a mapped file has taken so far; it is read again when needed.

    Without effect on features that are in memory alone.
    """
    mapping = getattr(features, "mapping", None)
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def _compute(
    member: Member,
    pictures: Pictures,
    device: torch.device,
    result: torch.Tensor,
    progress: Progress,
    digests: Sequence[bytes] = (),
    crew: Crew = ALONE,
) -> None:
    """Fill this process's blocks of ``result``; ``digests`` are those of all blocks."""
    trunk = FastTrunk(member.trunk, member.input, device, result.dtype)
    blocks = list(enumerate(block_ranges(pictures.images)))
    mine = crew.share(blocks)
    number_of = {start: number for number, (start, _) in blocks}
    for start, stop, block in ahead(pictures.make, [block for _, block in mine]):
        if digests and _digest(block) != digests[number_of[start]]:
            raise DataError(
                "an image changed while features were computed",
                remedy="run it again when nothing writes to the cohort's folder",
            )
        flat, at = result[start:stop].flatten(0, 1), 0
        for features in trunk.in_batches(block):
            flat[at : at + len(features)] = features
            at += len(features)
            progress(start + at // pictures.variants, pictures.images)
        give_pages_back(result)
