"""What this site decides itself: ``local/fedgestalt.yaml``, its data folder and its store."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedgestalt.doctor.findings import Check, check, counted, ok, problem, warning
from fedgestalt.doctor.kit import Kit
from fedgestalt.errors import ConfigError, nearest
from fedgestalt.federation.site.settings import FILE_NAME, SiteSettings, read_settings
from fedgestalt.hooks.registry import Registry
from fedgestalt.jobs import JOBS

_GUIDE: Final = f"correct local/{FILE_NAME}"


def settings_of(kit: Kit) -> SiteSettings | None:
    """The site's settings, or None where they cannot be read; :func:`rules` says why."""
    try:
        return read_settings(kit.folder / "local")
    except ConfigError:
        return None


@check("policy.rules")
def rules(kit: Kit, registry: Registry) -> Iterator[Check]:
    """The policy is valid and names what exists."""
    try:
        settings = read_settings(kit.folder / "local")
    except ConfigError as error:
        where = f"local/{FILE_NAME}"
        what = error.what if FILE_NAME in error.what else f"{where}: {error.what}"
        yield problem("policy.rules", what, f"{_GUIDE}: {error.remedy}" if error.remedy else _GUIDE)
        return
    for key, named, known in (
        ("jobs", settings.jobs, tuple(JOBS)),
        ("strategies", settings.strategies, registry.matching.names()),
    ):
        unknown = sorted(set(named) - set(known))
        if unknown:
            what = f"{key} names {', '.join(map(repr, unknown))}, which nothing here is called"
            yield problem("policy.rules", what, f"{_GUIDE}: {nearest(unknown[0], known)}")
            return
    others = set(settings.partners) - set(settings.excluded_sites) - {kit.name}
    if settings.partners and len(others) + 1 < settings.minimum_sites:
        what = (
            f"minimum_sites is {settings.minimum_sites}, but partners leaves"
            f" {counted(len(others), 'other site')}: it can take part in no job"
        )
        yield problem("policy.rules", what, f"{_GUIDE}: name more partners")
        return
    yield ok("policy.rules", _in_force(settings), **_figures(settings))


def _in_force(settings: SiteSettings) -> str:
    rows = counted(settings.max_released_rows, "row")
    parts = [
        f"jobs {', '.join(settings.jobs) or 'none'}",
        f"{settings.minimum_sites} sites or more",
        f"partners {', '.join(settings.partners) or 'any'}",
        f"not with {', '.join(settings.excluded_sites)}" if settings.excluded_sites else "",
        f"strategies {', '.join(settings.strategies) or 'any'}",
        f"releases {rows} per query and {'also' if settings.evaluation_release else 'no'}"
        " evaluations",
        f"updates up to norm {settings.max_update_norm:g}",
    ]
    return "; ".join(part for part in parts if part)


def _figures(settings: SiteSettings) -> dict[str, int | float | bool | list[str]]:
    return {
        "jobs": list(settings.jobs),
        "minimum_sites": settings.minimum_sites,
        "partners": list(settings.partners),
        "excluded_sites": list(settings.excluded_sites),
        "strategies": list(settings.strategies),
        "max_released_rows": settings.max_released_rows,
        "evaluation_release": settings.evaluation_release,
        "max_update_norm": settings.max_update_norm,
    }


@check("policy.data")
def data_folder(folder: Path) -> Iterator[Check]:
    """The cohort's folder is there and can be read."""
    name, path = "policy.data", str(folder)
    remedy = f"correct data in local/{FILE_NAME}, or put the cohort there"
    if not folder.is_dir():
        yield problem(name, f"there is no data folder {path}", remedy, path=path)
        return
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError as error:
        what = f"the data folder {path} cannot be read ({error.strerror})"
        yield problem(name, what, "let the user that runs FLARE read it", path=path)
        return
    if not folder.is_absolute():
        what = f"{path!r} depends on the folder in which FLARE is started"
        yield warning(name, what, f"write the whole path as data in local/{FILE_NAME}", path=path)
    else:
        yield ok(name, f"{path} can be read", path=path)


@check("policy.weights")
def weights_folder(folder: Path) -> Iterator[Check]:
    """The weights files that jobs may name can be read."""
    name, path = "policy.weights", str(folder)
    if not folder.is_dir():
        remedy = f"correct weights in local/{FILE_NAME}, or put the files there"
        yield problem(name, f"there is no weights folder {path}", remedy, path=path)
        return
    if not folder.is_absolute():
        what = f"{path!r} depends on the folder in which FLARE is started"
        yield warning(name, what, f"write the whole path as weights in local/{FILE_NAME}")
        return
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if closed := [file.name for file in files if not os.access(file, os.R_OK)]:
        what = f"weights file {closed[0]!r} in {path} cannot be read"
        yield problem(name, what, "let the user that runs FLARE read it", path=path)
    elif not files:
        remedy = "put the weights files there that the consortium's jobs name"
        yield warning(name, f"the weights folder {path} is empty", remedy, path=path)
    else:
        yield ok(name, f"{path} holds {counted(len(files), 'weights file')}", path=path)


@check("policy.store")
def store_folder(folder: Path, data: Path) -> Iterator[Check]:
    """We can keep our own files in the store, and nobody else sees them."""
    name, path = "policy.store", str(folder)
    elsewhere = f"name another folder as store in local/{FILE_NAME}"
    if not folder.is_absolute():
        what = f"{path!r} depends on the folder in which FLARE is started"
        yield warning(name, what, f"write the whole path as store in local/{FILE_NAME}")
        return
    if folder.resolve().is_relative_to(data.resolve()):
        what = f"the store {path} lies inside the data folder"
        yield problem(name, what, elsewhere, path=path)
        return
    if fault := _writing_fault(folder):
        what = f"the store {path} cannot be written ({fault})"
        yield problem(name, what, f"let the user that runs FLARE write it, or {elsewhere}")
    elif not folder.exists():
        yield ok(name, f"{path} does not exist yet; the first job will make it", path=path)
    elif stat.S_IMODE(folder.stat().st_mode) & 0o077:
        mode = f"{stat.S_IMODE(folder.stat().st_mode):04o}"
        what = f"other users can look into the store {path} (mode {mode})"
        yield warning(name, what, f"run `chmod 700 {path}`", path=path, mode=mode)
    else:
        yield ok(name, f"{path} can be written, and read by its user alone", path=path)


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _writing_fault(folder: Path) -> str:
    """Why nothing can be written in ``folder``; empty if something can. Leaves nothing behind."""
    place = existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        return error.strerror or "it is refused"
    return ""
