"""The machine: processor, memory, graphics card and disk, against what a job needs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import torch

from fedgestalt.doctor.findings import Check, Figure, check, counted, in_bytes, ok, problem, warning
from fedgestalt.doctor.site_policy import existing
from fedgestalt.doctor.work import PROCESS_BYTES, Work
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.learning.device import choose_device, trunk_dtype

_FEATURES: Final = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")
_LEAST_DISK: Final = 1 << 30
_LEAST_GPU: Final = 2 << 30
_SPARE: Final = 1.2
_BUSY: Final = 0.75


@check("machine.cpu")
def cpu(threads: int | None, processes: int) -> Iterator[Check]:
    """How many cores there are, and whether they multiply bfloat16 natively."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    capabilities = torch.cpu.get_capabilities()
    features = [feature for feature in _FEATURES if capabilities.get(feature, False)]
    number = str(trunk_dtype(torch.device("cpu"))).removeprefix("torch.")
    load = round(os.getloadavg()[0], 1)
    figures: dict[str, Figure] = {"cores": cores, "threads": threads, "load": load}
    figures |= {"number_format": number, "features": features}
    if threads and threads > cores:
        what = f"the policy sets {threads} threads, the machine has {counted(cores, 'core')}"
        yield warning("machine.cpu", what, f"set threads to {cores} or fewer", **figures)
        return
    if processes > cores:
        what = f"the policy sets {processes} processes, the machine has {counted(cores, 'core')}"
        yield warning("machine.cpu", what, f"set processes to {cores} or fewer", **figures)
        return
    used = f"all {cores}" if threads is None else str(threads)
    what = f"{counted(cores, 'core')}, uses {used}; computes in {number}"
    if number == "float32":
        what += " (no native bfloat16 here: about half as fast, same results)"
    if load > _BUSY * cores:
        what += f"; busy now (load {load:g}), so that a dry run shows longer times than usual"
    yield ok("machine.cpu", what, **figures)


@check("machine.memory")
def memory(work: Work | None) -> Iterator[Check]:
    """There is memory for a job."""
    found = psutil.virtual_memory()
    need = work.memory_bytes if work else PROCESS_BYTES
    figures = {"total_bytes": found.total, "free_bytes": found.available, "needed_bytes": need}
    needs = f"a job here needs about {in_bytes(need)}"
    if found.total < need:
        what = f"the machine has {in_bytes(found.total)} of memory, {needs}"
        yield problem("machine.memory", what, "give this machine more memory", **figures)
    elif found.available < need:
        what = f"{in_bytes(found.available)} of memory are free, {needs}"
        yield warning("machine.memory", what, "end other programs before a job", **figures)
    else:
        what = f"{in_bytes(found.available)} of {in_bytes(found.total)} are free, {needs}"
        yield ok("machine.memory", what, **figures)


@check("machine.gpu")
def gpu(settings: SiteSettings | None) -> Iterator[Check]:
    """The device that the policy names is there, with memory to work in."""
    asked = settings.device if settings else "auto"
    if asked == "cuda" and not torch.cuda.is_available():
        what = "the policy sets device: cuda, and there is no usable CUDA device"
        remedy = "install the NVIDIA driver and a torch with CUDA, or set device to auto or cpu"
        yield problem("machine.gpu", what, remedy, device=asked)
        return
    if choose_device(asked).type != "cuda":
        seen = "; a GPU is there, unused" if torch.cuda.is_available() else ""
        yield ok("machine.gpu", f"computes on the CPU (device: {asked}){seen}", device=asked)
        return
    free, total = torch.cuda.mem_get_info()
    title = torch.cuda.get_device_name()
    figures: dict[str, Figure] = {
        "device": asked,
        "gpu": title,
        "free_bytes": free,
        "total_bytes": total,
    }
    what = f"{title}, {in_bytes(free)} of {in_bytes(total)} free"
    if free < _LEAST_GPU:
        what = f"{what}; a job needs about {in_bytes(_LEAST_GPU)}"
        yield problem("machine.gpu", what, "free GPU memory, or set device to cpu", **figures)
    else:
        yield ok("machine.gpu", what, **figures)


@check("machine.disk")
def disk(store: Path, work: Work | None) -> Iterator[Check]:
    """There is room in the store for features and models."""
    place = existing(store)
    free = shutil.disk_usage(place).free
    need = int(work.disk_bytes * _SPARE) if work else _LEAST_DISK
    needs = f"a training and a matching job leave about {in_bytes(need)} there"
    if not work:
        needs = "what a job needs is not known without usable data"
    figures: dict[str, Figure] = {
        "free_bytes": free,
        "needed_bytes": need if work else None,
        "path": str(place),
    }
    if free >= need:
        yield ok("machine.disk", f"{in_bytes(free)} are free at {place}; {needs}", **figures)
        return
    what = f"{in_bytes(free)} are free at {place}; {needs}"
    held = _size(store / "cache")
    remedy = "free disk space, or name a store on a larger disk"
    if free + held >= need:
        what = f"{what}; its cache holds {in_bytes(held)}, perhaps of these images"
        yield warning("machine.disk", what, remedy, **figures, cache_bytes=held)
    else:
        yield problem("machine.disk", what, remedy, **figures)


def _size(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


@check("machine.room")
def server_room(folder: Path) -> Iterator[Check]:
    """At a server: there is room for jobs and results."""
    free = shutil.disk_usage(folder).free
    what = f"{in_bytes(free)} are free at {folder}, where jobs and results are kept"
    if free < _LEAST_DISK:
        yield problem("machine.room", what, "free disk space", free_bytes=free)
    else:
        yield ok("machine.room", what, free_bytes=free)
