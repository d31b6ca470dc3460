"""The installed software: versions, plugins, and digests of code to compare with other sites."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import fedgestalt
from fedgestalt.contracts import Described
from fedgestalt.doctor.findings import Check, check, counted, ok, problem, warning
from fedgestalt.doctor.kit import ADMIN, Kit
from fedgestalt.federation.job.handshake import versions
from fedgestalt.hooks.registry import Entry, Registry, code_digest

_PYTHON: Final = ((3, 11), (3, 13))
_FLARE: Final = ((2, 9), (2, 10))
_TORCH: Final = ((2,), (3,))
_SHOWN: Final = 12
_REINSTALL: Final = "install fedgestalt anew into an environment of its own"


@check("software.python")
def python() -> Iterator[Check]:
    """This Python is one that the project runs on."""
    version = ".".join(map(str, sys.version_info[:3]))
    figures = {"version": version, "executable": sys.executable}
    if not _PYTHON[0] <= sys.version_info[:2] < _PYTHON[1]:
        what = f"Python is {version}, needed is {_span(_PYTHON)}"
        yield problem("software.python", what, _REINSTALL, **figures)
    else:
        yield ok("software.python", f"Python {version}", **figures)


@check("software.nvflare")
def nvflare() -> Iterator[Check]:
    """This is the release of FLARE that the project is built for."""
    yield _release("nvflare", "NVIDIA FLARE", _FLARE)


@check("software.torch")
def torch() -> Iterator[Check]:
    """PyTorch is there."""
    yield _release("torch", "PyTorch", _TORCH)


def _release(package: str, title: str, wanted: tuple[tuple[int, ...], tuple[int, ...]]) -> Check:
    name = f"software.{package}"
    remedy = f"run `pip install '{package}>={_dotted(wanted[0])},<{_dotted(wanted[1])}'`"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return problem(name, f"{title} is not installed", remedy)
    digits = "".join(c if c.isdigit() else " " for c in version.partition("+")[0]).split()
    numbers = tuple(map(int, digits))
    if not wanted[0] <= numbers < wanted[1]:
        what = f"{title} is {version}, needed is {_span(wanted)}"
        return problem(name, what, remedy, version=version)
    return ok(name, f"{title} {version}", version=version)


def _span(wanted: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    return f"{_dotted(wanted[0])} or newer, below {_dotted(wanted[1])}"


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


@check("software.fedgestalt")
def code() -> Iterator[Check]:
    """Which version and which code exactly; every site of a job must have the same."""
    version, digest = fedgestalt.__version__, code_digest("fedgestalt")
    what = f"fedgestalt {version}, code {digest[:_SHOWN]}"
    yield ok("software.fedgestalt", what, version=version, digest=digest)


@check("software.plugins")
def plugins(registry: Registry) -> Iterator[Check]:
    """Which plugins are there, from where, and which were left out."""
    entries = registry.entries()
    left_out = [f"{p.plugin} of {p.distribution} ({p.reason})" for p in registry.problems]
    if left_out:
        what = f"{counted(len(left_out), 'plugin')} left out: {'; '.join(left_out)}"
        remedy = "update or uninstall the distribution that brings it"
        yield problem("software.plugins", what, remedy, left_out=left_out)
        return
    codes = {f"{e.distribution} {e.version}": e.digest for e in entries}
    sources = ", ".join(f"{source}, code {digest[:_SHOWN]}" for source, digest in codes.items())
    what = f"{counted(len(entries), 'plugin')} of {sources}"
    yield ok("software.plugins", what, facts=_facts(entries))


def _facts(entries: list[Entry[Described]]) -> dict[str, str]:
    """What this site will state at the start of every job, to be compared with the others."""
    try:
        return versions(entries)
    except importlib.metadata.PackageNotFoundError:  # a check of its own says so
        return {}


@check("software.path")
def path(kit: Kit) -> Iterator[Check]:
    """The kit's start script would run this Python."""
    if kit.role is ADMIN:
        return
    found = shutil.which("python3")
    if found and Path(found).parent.resolve() == Path(sys.executable).parent.resolve():
        yield ok("software.path", f"start.sh would run {found}", python3=found)
        return
    what = f"start.sh runs `python3`, which is {found or 'not on the PATH'}, not {sys.executable}"
    remedy = f"put {Path(sys.executable).parent} first on the PATH of whoever runs start.sh"
    yield warning("software.path", what, remedy, python3=found or "")
