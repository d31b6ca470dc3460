"""Cohorts that a package can build, kept on disk once built.

A cohort is built in a folder of its own beside its place and renamed into it when it is whole. So a
folder with the final name is complete, and two processes that build at once do no harm: the second
to finish finds the place taken and throws its own work away.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from fedgestalt.cohort.gmdb import read_cohort
from fedgestalt.cohort.tables import is_plain_name
from fedgestalt.contracts import CohortSource, Progress
from fedgestalt.errors import ConfigError, DataError, PluginError

_BUILDING = ".building-"
_STALE_SECONDS = 24 * 3600


def default_cache() -> Path:
    """``$FEDGESTALT_CACHE``, or ``fedgestalt`` in the user's cache folder.

    Raises:
        ConfigError: the user has no home folder.
    """
    if own := os.environ.get("FEDGESTALT_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "fedgestalt"
    try:
        return Path.home() / ".cache" / "fedgestalt"
    except RuntimeError:
        raise ConfigError(
            "there is no home folder for the cache", remedy="set FEDGESTALT_CACHE to a folder"
        ) from None


def materialise(source: CohortSource, cache: Path, progress: Progress) -> Path:
    """Return the folder of ``source`` in ``cache``, building it if it is not there.

    Raises:
        ConfigError: ``cache`` cannot be written.
        DataError: what the cohort is built from is missing or damaged.
        PluginError: the plugin's name or version is no folder name, or what it built is no cohort.
    """
    name = f"{source.name}-{source.version}"
    if not is_plain_name(name):
        raise PluginError(f"cohort {name!r} cannot be a folder name", remedy="update the plugin")
    place = cache / name
    if place.is_dir():
        return place
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cache, older_than=time.time() - _STALE_SECONDS)
        building = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{name}-", dir=cache))
    except OSError as error:
        raise ConfigError(
            f"the cache cannot be written: {error.strerror}",
            where=str(cache),
            remedy="set FEDGESTALT_CACHE to a folder that can",
        ) from None
    try:
        source.build(building, progress)
        _check(source, building)
        building.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was first
            building.rename(place)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if not place.is_dir():
        raise ConfigError(
            "the finished cohort cannot be moved into the cache",
            where=str(place),
            remedy="set FEDGESTALT_CACHE to a folder on an ordinary disk",
        )
    return place


def _check(source: CohortSource, folder: Path) -> None:
    try:
        read_cohort(folder)
    except DataError as error:
        raise PluginError(
            f"cohort {source.name!r} was built with a fault: {error}".rstrip("."),
            remedy="report it to the author of the plugin",
        ) from error


def _remove_leftovers(cache: Path, *, older_than: float) -> None:
    """Remove builds that were interrupted; ``older_than`` in seconds since the epoch."""
    for path in cache.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < older_than:
                shutil.rmtree(path, ignore_errors=True)
