"""The registry finds plugins, leaves broken ones out with a reason, and serves no name twice."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.contracts import (
    Backbone,
    CohortSource,
    Described,
    Disclosure,
    MatchingStrategy,
    Options,
    Preprocessor,
    RankingStrategy,
)
from fedgestalt.errors import ConfigError, PluginError
from fedgestalt.hooks import Catalogue, Registry, get_registry, hookimpl, specs
from fedgestalt.hooks.registry import Entry, code_digest, read_options

CONTRACTS = {
    "backbone": Backbone,
    "preprocessor": Preprocessor,
    "matching strategy": MatchingStrategy,
    "ranking strategy": RankingStrategy,
    "cohort": CohortSource,
}
HOOKS = {
    name: function
    for name, function in inspect.getmembers(specs, inspect.isfunction)
    if name.startswith("fedgestalt_")
}


@dataclass
class Versatile:
    """Has whatever any contract asks for."""

    name: Any = "versatile"
    summary: str = "does everything"
    licence: str = "MIT"
    options: type[Options] = Options
    roles: tuple[str, ...] = ("server",)
    disclosure: Disclosure = field(default_factory=lambda: Disclosure("", "", ""))
    version: str = "1"
    has_patients: bool = False
    pools_subjects: bool = False

    def build(self, *arguments: Any) -> Any: ...

    def align(self, photograph: Any, options: Any) -> Any: ...

    def enrol(self, encodings: Any, seed: bytes) -> Any: ...

    def ask(self, queries: Any, seed: bytes) -> Any: ...

    def receive(self, party: int, part: Any) -> Any: ...

    def compare(self, party: int, gallery: Any, question: Any) -> Any: ...

    def open(self, question: Any, answers: Any) -> Any: ...

    def scores(self, similarities: Any, gallery: Any) -> Any: ...


@dataclass
class Owner:
    name: str
    version: str = "1.0"


@dataclass
class Point:
    """What the registry uses of an entry point."""

    name: str
    load: Callable[[], object]
    dist: Owner
    value: str = "somewhere"


def plugin_module(**hooks: Callable[..., object]) -> ModuleType:
    module = ModuleType("somebodys_plugin")
    for name, hook in hooks.items():
        setattr(module, name, hookimpl(hook))
    return module


def point(
    name: str = "theirs",
    *plugins: object,
    owner: str = "their-package",
    hook: str = "fedgestalt_cohorts",
) -> Point:
    """An entry point of a sound module that brings ``plugins``."""
    module = plugin_module(**{hook: lambda: list(plugins)})
    return Point(name, lambda: module, Owner(owner))


SOUND = point("sound", Versatile("sound"), owner="sound-package")


def registry_with(*points: object) -> Registry:
    return Registry(points)  # type: ignore[arg-type]


def left_out(broken: object) -> str:
    """The reason why ``broken`` was left out; a sound neighbour is not affected."""
    registry = registry_with(broken, SOUND)
    assert [entry.plugin.name for entry in registry.entries()] == ["sound"]
    (problem,) = registry.problems
    assert (problem.plugin, problem.distribution) == ("theirs", "their-package")
    return problem.reason


# --- what is installed ---------------------------------------------------------------------------


def built_ins() -> list[tuple[str, Described]]:
    entries = get_registry().entries()
    return [(entry.kind, entry.plugin) for entry in entries if entry.distribution == "fedgestalt"]


def test_built_in_plugins_come_through_the_entry_point() -> None:
    assert {
        ("backbone", "iresnet"),
        ("backbone", "sface"),
        ("cohort", "orl"),
        ("cohort", "orl-warp"),
        ("cohort", "synthetic"),
        ("matching strategy", "isometry"),
        ("preprocessor", "yunet-arcface"),
        ("ranking strategy", "nearest-image"),
    } <= {(kind, plugin.name) for kind, plugin in built_ins()}
    assert registry_with().entries() == []


def test_no_built_in_plugin_is_left_out() -> None:
    assert [p for p in get_registry().problems if p.distribution == "fedgestalt"] == []


def test_entries_say_the_distribution_and_version_they_come_from() -> None:
    entry = get_registry().backbones.entry("iresnet")
    assert entry.distribution == "fedgestalt"
    assert entry.version == importlib.metadata.version("fedgestalt")


@pytest.mark.parametrize(("kind", "plugin"), built_ins(), ids=lambda x: getattr(x, "name", ""))
def test_every_built_in_plugin_keeps_its_contract(kind: str, plugin: Described) -> None:
    assert isinstance(plugin, CONTRACTS[kind])
    assert "\n" not in plugin.summary
    for said in ("server_learns", "sites_learn", "asking_site_learns"):
        if isinstance(plugin, MatchingStrategy):
            assert getattr(plugin.disclosure, said).endswith(".")


WITH_OPTIONS = [plugin for _, plugin in built_ins() if hasattr(plugin, "options")]


NEEDED = {"arcface-onnx": {"weights": "net.onnx"}, "monai": {"network": "resnet18"}}


@pytest.mark.parametrize("plugin", WITH_OPTIONS, ids=lambda plugin: plugin.name)
def test_options_of_built_in_plugins_survive_json_and_refuse_unknown_keys(plugin: Any) -> None:
    model = plugin.options
    assert issubclass(model, Options)
    needed = NEEDED.get(plugin.name, {})
    assert model.model_validate_json(model(**needed).model_dump_json()) == model(**needed)
    with pytest.raises(ConfigError, match="unknown key 'no_such_option'"):
        read_options(model, {"no_such_option": 1}, where="here")


def test_the_installed_registry_is_loaded_once() -> None:
    assert get_registry() is get_registry()


# --- hooks ---------------------------------------------------------------------------------------


def test_there_is_a_hook_for_each_contract() -> None:
    assert len(HOOKS) == len(CONTRACTS)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_and_takes_nothing(name: str) -> None:
    assert (inspect.getdoc(HOOKS[name]) or "").endswith(".")
    assert not inspect.signature(HOOKS[name]).parameters


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_fills_one_catalogue(name: str) -> None:
    registry = registry_with(point("theirs", Versatile(), hook=name))
    catalogues = [value for value in vars(registry).values() if isinstance(value, Catalogue)]
    (filled,) = [catalogue for catalogue in catalogues if catalogue.names()]
    assert filled.names() == ("versatile",)
    assert [entry.kind for entry in registry.entries()] == [filled.kind]
    assert filled.kind in CONTRACTS


# --- look-up -------------------------------------------------------------------------------------


def test_a_plugin_is_found_by_its_name() -> None:
    plugin = Versatile("mine")
    registry = registry_with(point("theirs", plugin))
    assert registry.cohorts.get("mine") is plugin
    assert registry.cohorts.entry("mine").distribution == "their-package"
    assert [entry.plugin for entry in registry.cohorts] == [plugin]


def test_an_unknown_name_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(PluginError, match="no cohort is called 'sond'; did you mean 'sound'"):
        registry_with(SOUND).cohorts.get("sond")


def test_an_unknown_name_without_a_near_one_is_answered_with_all() -> None:
    registry = registry_with(point("theirs", Versatile("alpha"), Versatile("beta")))
    with pytest.raises(PluginError, match="known: alpha, beta"):
        registry.cohorts.get("xyz")


def test_an_empty_catalogue_says_so() -> None:
    with pytest.raises(PluginError, match="no backbone is called 'sface'; none is installed"):
        registry_with(SOUND).backbones.get("sface")


@given(order=st.permutations(["alpha", "beta", "gamma", "delta"]))
def test_the_order_of_installation_does_not_matter(order: list[str]) -> None:
    points = [point(f"point-{name}", Versatile(name), owner=name) for name in order]
    registry = registry_with(*points)
    assert registry.cohorts.names() == ("alpha", "beta", "delta", "gamma")
    assert [entry.distribution for entry in registry.entries()] == list(registry.cohorts.names())


# --- broken plugins ------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [ImportError("no module named 'theirs'"), SyntaxError("bad"), RuntimeError("no GPU")]
)
def test_a_plugin_that_raises_at_import_is_left_out(error: Exception) -> None:
    reason = left_out(Point("theirs", raising(error), Owner("their-package")))
    assert reason == f"{type(error).__name__}: {error}"


def test_a_plugin_whose_hook_raises_is_left_out() -> None:
    module = plugin_module(fedgestalt_cohorts=raising(KeyError("HOME")))
    reason = left_out(Point("theirs", lambda: module, Owner("their-package")))
    assert reason == "KeyError in fedgestalt_cohorts: 'HOME'"


def test_a_hook_that_fails_half_way_brings_nothing() -> None:
    def half() -> Iterable[object]:
        yield Versatile("first")
        raise OSError("disk")

    module = plugin_module(fedgestalt_cohorts=half)
    assert "disk" in left_out(Point("theirs", lambda: module, Owner("their-package")))


def test_a_plugin_whose_hook_returns_nothing_is_left_out() -> None:
    module = plugin_module(fedgestalt_cohorts=lambda: None)
    assert "TypeError" in left_out(Point("theirs", lambda: module, Owner("their-package")))


def test_a_misspelt_hook_is_named() -> None:
    module = plugin_module(fedgestalt_cohort=lambda: [Versatile()])
    reason = left_out(Point("theirs", lambda: module, Owner("their-package")))
    assert "unknown hook 'fedgestalt_cohort'" in reason


def test_a_hook_with_arguments_is_left_out() -> None:
    module = plugin_module(fedgestalt_cohorts=lambda folder: [Versatile()])
    reason = left_out(Point("theirs", lambda: module, Owner("their-package")))
    assert "folder" in reason
    assert "\n" not in reason


def test_what_a_plugin_lacks_is_named() -> None:
    class Meagre:
        name, summary, licence = "meagre", "has little", "MIT"

    reason = left_out(point("theirs", Meagre()))
    assert reason == "a cohort: Meagre lacks build, has_patients, version"


@pytest.mark.parametrize(
    "name", ["", "Upper", "two words", "under_score", "-led", "1st", "tail-", "ümlaut", "a/b"]
)
def test_a_bad_name_is_left_out(name: str) -> None:
    assert f"name {name!r} is not lower-case" in left_out(point("theirs", Versatile(name)))


@pytest.mark.parametrize("name", [None, 5, b"bytes", ["list"]])
def test_a_name_that_is_no_text_is_left_out(name: object) -> None:
    assert "name" in left_out(point("theirs", Versatile(name)))


def test_a_plugin_whose_facts_raise_is_left_out() -> None:
    class Moody(Versatile):
        @property
        def licence(self) -> str:  # type: ignore[override]
            raise RuntimeError("ask my lawyer")

        @licence.setter
        def licence(self, value: str) -> None: ...

    assert "ask my lawyer" in left_out(point("theirs", Moody()))


@pytest.mark.parametrize("fact", ["summary", "licence"])
def test_a_plugin_that_does_not_state_a_fact_is_left_out(fact: str) -> None:
    plugin = Versatile("silent", **{fact: ""})
    assert left_out(point("theirs", plugin)) == f"a cohort: 'silent' states no {fact}"


def test_other_plugins_of_the_same_module_stay() -> None:
    registry = registry_with(point("theirs", Versatile("Bad Name"), Versatile("good")))
    assert registry.cohorts.names() == ("good",)
    assert len(registry.problems) == 1


def test_what_is_left_out_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        registry_with(point("theirs", Versatile(licence="")))
    (record,) = caplog.records
    assert "theirs" in record.getMessage()
    assert "their-package" in record.getMessage()


def test_real_entry_points_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    module = plugin_module(fedgestalt_cohorts=lambda: [Versatile("from-afar")])
    monkeypatch.setitem(sys.modules, "somebodys_plugin", module)
    group = specs.ENTRY_POINT_GROUP
    sound = importlib.metadata.EntryPoint("sound", "somebodys_plugin", group)
    broken = importlib.metadata.EntryPoint("broken", "nobodys_plugin_module", group)
    registry = registry_with(sound, broken)
    assert registry.cohorts.entry("from-afar").distribution == "unknown distribution"
    (problem,) = registry.problems
    assert problem.plugin == "broken"
    assert "nobodys_plugin_module" in problem.reason


# --- names claimed twice -------------------------------------------------------------------------


@given(order=st.permutations(["alpha", "beta"]))
def test_a_name_claimed_by_two_distributions_is_served_to_nobody(order: list[str]) -> None:
    points = [point(f"point-{owner}", Versatile("wanted"), owner=owner) for owner in order]
    registry = registry_with(*points, SOUND)
    assert registry.cohorts.names() == ("sound",)
    with pytest.raises(PluginError, match="'wanted' is provided by alpha and beta"):
        registry.cohorts.get("wanted")
    (problem,) = registry.problems
    assert (problem.plugin, problem.distribution) == ("wanted", "alpha and beta")


def test_a_name_claimed_twice_by_one_module_is_served_to_nobody() -> None:
    registry = registry_with(point("theirs", Versatile("wanted"), Versatile("wanted")))
    with pytest.raises(PluginError, match="uninstall all but one"):
        registry.cohorts.get("wanted")


def test_plugins_of_different_kinds_may_share_a_name() -> None:
    module = plugin_module(
        fedgestalt_cohorts=lambda: [Versatile("shared")],
        fedgestalt_backbones=lambda: [Versatile("shared")],
    )
    registry = registry_with(Point("theirs", lambda: module, Owner("their-package")))
    assert registry.problems == []
    assert [entry.kind for entry in registry.entries()] == ["backbone", "cohort"]


def test_two_distributions_may_give_their_entry_points_the_same_name() -> None:
    points = [point("plugins", Versatile(name), owner=name) for name in ("alpha", "beta")]
    registry = registry_with(*points)
    assert registry.cohorts.names() == ("alpha", "beta")
    assert registry.problems == []


# --- options -------------------------------------------------------------------------------------


class Shape(Options):
    depth: int = 18
    width: int = 4


def test_options_are_read_and_missing_ones_take_their_defaults() -> None:
    assert read_options(Shape, {"depth": 50}, where="here") == Shape(depth=50, width=4)


def test_an_unknown_option_names_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match="here: unknown key 'widht'; did you mean 'width'"
    ) as fault:
        read_options(Shape, {"widht": 8}, where="here")
    assert fault.value.where == "here"


def test_a_wrong_option_is_one_sentence_that_names_its_key() -> None:
    with pytest.raises(ConfigError, match=r"here: depth: .*integer") as fault:
        read_options(Shape, {"depth": "deep", "width": "wide"}, where="here")
    assert "\n" not in str(fault.value)


def test_an_option_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="here"):
        read_options(Shape, {7: 8}, where="here")  # type: ignore[dict-item]


def test_the_group_of_entry_points_is_the_name_of_the_hooks() -> None:
    manager = pluggy.PluginManager(specs.ENTRY_POINT_GROUP)
    manager.add_hookspecs(specs)
    assert all(hasattr(manager.hook, name) for name in HOOKS)


# --- digests of code -----------------------------------------------------------------------------


class Package:
    """A package on disk that the tests change and load anew."""

    name = "somebodys_package"

    def __init__(self, folder: Path) -> None:
        self.root = folder / self.name
        (self.root / "inner").mkdir(parents=True)
        self.write("__init__.py", "A = 1\n")
        self.write("inner/__init__.py", "")
        self.write("inner/part.py", "B = 2\n")

    def write(self, file: str, text: str) -> None:
        (self.root / file).write_text(text)

    @property
    def digest(self) -> str:
        """As a process that starts now would compute it."""
        code_digest.cache_clear()
        importlib.invalidate_caches()
        sys.modules.pop(self.name, None)
        importlib.import_module(self.name)
        return code_digest(self.name)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Package(tmp_path)
    sys.modules.pop(Package.name, None)
    code_digest.cache_clear()


def test_a_digest_is_hexadecimal_and_stays_while_nothing_changes(package: Package) -> None:
    first = package.digest
    assert len(first) == 64
    assert int(first, 16) >= 0
    assert package.digest == first


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("__init__.py", "A = 2\n"),
        ("inner/part.py", "B = 2 \n"),
        ("inner/part.py", ""),
        ("inner/new.py", ""),
        ("inner/new.py", "B = 2\n"),
    ],
)
def test_a_digest_changes_with_every_file_however_deep(
    package: Package, file: str, text: str
) -> None:
    before = package.digest
    package.write(file, text)
    assert package.digest != before


def test_a_digest_changes_when_a_file_is_renamed(package: Package) -> None:
    before = package.digest
    (package.root / "inner" / "part.py").rename(package.root / "inner" / "other.py")
    assert package.digest != before


def test_text_that_moves_from_one_file_to_another_changes_the_digest(package: Package) -> None:
    before = package.digest
    package.write("__init__.py", "B = 2\n")
    package.write("inner/part.py", "A = 1\n")
    assert package.digest != before


@pytest.mark.parametrize("file", ["notes.txt", "inner/data.json", "part.pyc"])
def test_other_files_do_not_matter(package: Package, file: str) -> None:
    before = package.digest
    package.write(file, "anything")
    assert package.digest == before


def test_a_digest_does_not_depend_on_where_the_package_is(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = package.digest
    (tmp_path / "elsewhere").mkdir()
    package.root.rename(tmp_path / "elsewhere" / package.name)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert package.digest == before


def test_what_is_not_loaded_from_files_has_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    code_digest.cache_clear()
    monkeypatch.setitem(sys.modules, "somebodys_plugin", ModuleType("somebodys_plugin"))
    assert code_digest("somebodys_plugin") == ""
    assert code_digest("nobodys_plugin_module") == ""
    code_digest.cache_clear()


def test_an_entry_has_the_digest_of_the_package_that_its_plugin_comes_from() -> None:
    entry = get_registry().backbones.entry("iresnet")
    assert entry.plugin_name == "backbone iresnet"
    assert entry.digest == code_digest("fedgestalt_plugins") != code_digest("fedgestalt")
    assert Entry("cohort", Versatile("x"), "theirs", "1").digest == code_digest("test_registry")
