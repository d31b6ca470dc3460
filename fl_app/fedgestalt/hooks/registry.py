"""The plugin manager: finds plugins, checks them, answers look-ups by name.

Rules:

- The core names no plugin; built-ins come through the same entry point as anybody's.
- A plugin that cannot be loaded, or breaks a rule of its contract, is left out with a
  :class:`Problem` that names it and says why. It never takes the program down.
- A name claimed twice is served to nobody: which of the two would run, and see patient data, must
  not depend on the order of installation.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar, cast, get_args

import pluggy
from pydantic import BaseModel, ValidationError

from fedgestalt.contracts import (
    Backbone,
    CohortSource,
    Described,
    MatchingStrategy,
    Options,
    Preprocessor,
    RankingStrategy,
)
from fedgestalt.errors import ConfigError, PluginError, nearest
from fedgestalt.hooks import specs

log = logging.getLogger(__name__)

PluginT = TypeVar("PluginT", bound=Described)
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Entry(Generic[PluginT]):
    """One plugin and where it comes from."""

    kind: str
    plugin: PluginT
    distribution: str
    version: str

    @property
    def plugin_name(self) -> str:
        """Kind and name."""
        return f"{self.kind} {self.plugin.name}"

    @property
    def digest(self) -> str:
        """Of the code of the package that the plugin comes from; see :func:`code_digest`."""
        return code_digest(type(self.plugin).__module__.partition(".")[0])


@dataclass(frozen=True)
class Problem:
    """A plugin that was left out, and why."""

    plugin: str
    distribution: str
    reason: str


@functools.cache
def code_digest(package: str) -> str:
    """SHA-256 over the names and contents of a loaded package's Python files, hexadecimal.

    Empty if the package is not loaded from files.
    """
    places = getattr(sys.modules.get(package), "__path__", None)
    total = hashlib.sha256()
    files = [
        (path.relative_to(place).as_posix(), path)
        for place in places or ()
        for path in Path(place).rglob("*.py")
    ]
    for name, path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest() if files else ""


class Catalogue(Generic[PluginT]):
    """The plugins of one kind, by name."""

    def __init__(
        self,
        kind: str,
        entries: Mapping[str, Entry[PluginT]],
        ambiguous: Mapping[str, tuple[str, ...]],
    ) -> None:
        self.kind = kind
        self._entries = MappingProxyType(dict(entries))
        self._ambiguous = MappingProxyType(dict(ambiguous))

    def __iter__(self) -> Iterator[Entry[PluginT]]:
        return iter(self._entries.values())

    def names(self) -> tuple[str, ...]:
        """All names that can be asked for, sorted."""
        return tuple(sorted(self._entries))

    def entry(self, name: str) -> Entry[PluginT]:
        """Return the entry called ``name``.

        Raises:
            PluginError: nobody, or more than one distribution, provides it.
        """
        if name in self._ambiguous:
            owners = " and ".join(self._ambiguous[name])
            raise PluginError(
                f"{self.kind} {name!r} is provided by {owners}", remedy="uninstall all but one"
            )
        if name not in self._entries:
            raise PluginError(
                f"no {self.kind} is called {name!r}", remedy=nearest(name, self.names())
            )
        return self._entries[name]

    def get(self, name: str) -> PluginT:
        """Return the plugin called ``name``; see :meth:`entry`."""
        return self.entry(name).plugin


class Registry:
    """All plugins of this installation, loaded once.

    Args:
        entry_points: where to look; the installed ones of the group ``fedgestalt`` by default.

    Attributes:
        problems: plugins that were left out.
        weights: folder of weights files that jobs name; from ``FEDGESTALT_WEIGHTS`` unless
            :meth:`with_weights` says another.
    """

    def __init__(self, entry_points: Iterable[importlib.metadata.EntryPoint] | None = None) -> None:
        if entry_points is None:
            entry_points = importlib.metadata.entry_points(group=specs.ENTRY_POINT_GROUP)
        self.problems: list[Problem] = []
        named = os.environ.get("FEDGESTALT_WEIGHTS")
        self.weights = Path(named) if named else None
        self._manager = pluggy.PluginManager(specs.ENTRY_POINT_GROUP)
        self._manager.add_hookspecs(specs)
        self._origin: dict[str, tuple[str, str, str]] = {}
        for point in sorted(entry_points, key=lambda p: (p.name, p.value)):
            self._load(point)
        self.backbones: Catalogue[Backbone] = self._collect("backbone", "backbones", Backbone)
        self.preprocessors: Catalogue[Preprocessor] = self._collect(
            "preprocessor", "preprocessors", Preprocessor
        )
        self.matching: Catalogue[MatchingStrategy] = self._collect(
            "matching strategy", "matching_strategies", MatchingStrategy
        )
        self.rankings: Catalogue[RankingStrategy] = self._collect(
            "ranking strategy", "ranking_strategies", RankingStrategy
        )
        self.cohorts: Catalogue[CohortSource] = self._collect("cohort", "cohorts", CohortSource)
        for problem in self.problems:
            log.warning(
                "plugin %s of %s left out: %s", problem.plugin, problem.distribution, problem.reason
            )

    def with_weights(self, folder: Path | None) -> Registry:
        """The same plugins, with another folder for weights files."""
        other = copy.copy(self)
        other.weights = folder
        return other

    def entries(self) -> list[Entry[Described]]:
        """Every usable plugin, by kind and name."""
        catalogues = (
            self.backbones,
            self.preprocessors,
            self.matching,
            self.rankings,
            self.cohorts,
        )
        found = [cast("Entry[Described]", entry) for catalogue in catalogues for entry in catalogue]
        return sorted(found, key=lambda entry: (entry.kind, entry.plugin.name))

    def _leave_out(self, plugin: str, distribution: str, reason: str) -> None:
        self.problems.append(Problem(plugin, distribution, " ".join(reason.split())))

    def _load(self, point: importlib.metadata.EntryPoint) -> None:
        owner = point.dist
        origin = (owner.name, owner.version) if owner else ("unknown distribution", "")
        name = f"{origin[0]}:{point.name}"
        try:
            self._manager.register(point.load(), name=name)
            self._manager.check_pending()
        except Exception as error:  # noqa: BLE001  a plugin may raise anything
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            self._leave_out(point.name, origin[0], f"{type(error).__name__}: {error}")
            return
        self._origin[name] = (point.name, *origin)

    def _collect(self, kind: str, hook: str, contract: Any) -> Catalogue[PluginT]:
        found: dict[str, list[Entry[PluginT]]] = {}
        caller: pluggy.HookCaller = getattr(self._manager.hook, f"fedgestalt_{hook}")
        for impl in caller.get_hookimpls():
            point, distribution, version = self._origin[impl.plugin_name]
            try:
                plugins: list[Any] = list(cast("Iterable[Any]", impl.function()))
            except Exception as error:  # noqa: BLE001  a plugin may raise anything
                reason = f"{type(error).__name__} in fedgestalt_{hook}: {error}"
                self._leave_out(point, distribution, reason)
                continue
            for plugin in plugins:
                try:
                    fault = _fault(plugin, contract)
                except Exception as error:  # noqa: BLE001  a plugin may raise anything
                    fault = f"{type(error).__name__}: {error}"
                if fault:
                    self._leave_out(point, distribution, f"a {kind}: {fault}")
                else:
                    entry = Entry(kind, plugin, distribution, version)
                    found.setdefault(plugin.name, []).append(entry)
        ambiguous = {n: tuple(e.distribution for e in es) for n, es in found.items() if len(es) > 1}
        for name, owners in ambiguous.items():
            reason = f"{kind} {name!r} is provided more than once"
            self._leave_out(name, " and ".join(owners), reason)
        single = {name: entries[0] for name, entries in sorted(found.items()) if len(entries) == 1}
        return Catalogue(kind, single, ambiguous)


def _fault(plugin: Any, contract: Any) -> str:
    """Why ``plugin`` breaks its contract, or an empty string."""
    if not isinstance(plugin, contract):
        needed = {name for name in dir(contract) if not name.startswith("_")}
        missing = sorted(name for name in needed if not hasattr(plugin, name))
        return f"{type(plugin).__name__} lacks {', '.join(missing)}"
    if not isinstance(plugin.name, str) or not _NAME.fullmatch(plugin.name):
        return f"name {plugin.name!r} is not lower-case letters, digits and hyphens"
    empty = [fact for fact in ("summary", "licence") if not getattr(plugin, fact)]
    return f"{plugin.name!r} states no {' and no '.join(empty)}" if empty else ""


ModelT = TypeVar("ModelT", bound=BaseModel)


def read_options(model: type[ModelT], values: Mapping[str, object], *, where: str) -> ModelT:
    """Validate ``values`` against a pydantic model.

    Raises:
        ConfigError: one sentence about the first fault; an unknown key names the nearest known one.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise config_error(error, model, where) from None


def config_error(error: ValidationError, model: type[BaseModel], where: str) -> ConfigError:
    """One sentence for the first fault that pydantic found; a misspelt key before a missing one."""
    faults = error.errors(include_url=False)
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(model, first["loc"][:-1])
        remedy = nearest(str(first["loc"][-1]), known) if known else "remove it"
        return ConfigError(f"unknown key {key!r}", where=where, remedy=remedy)
    return ConfigError(f"{key or 'value'}: {first['msg']}", where=where)


def _known_keys(model: Any, path: Iterable[int | str]) -> tuple[str, ...]:
    """Fields of the model that ``path`` leads to from ``model``; empty if it leads to none."""
    for part in path:
        if isinstance(part, int):  # an item of a sequence of models
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [annotation, *get_args(annotation)]
        model = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if model is None:
            return ()
    return tuple(model.model_fields)


@functools.cache
def get_registry() -> Registry:
    """The registry of the installed plugins."""
    return Registry()


__all__ = ["Catalogue", "Entry", "Options", "Problem", "Registry", "get_registry", "read_options"]
