"""Who may import whom: the arrows of the design, read from the sources themselves."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ROOTS = ("fl_app", "plugins", "provisioning")

# From the inside out; a part may import itself and what stands on lower floors.
FLOORS = (
    {"errors"},
    {"contracts", "messages", "console", "keys"},
    {"hooks"},
    {"cohort"},
    {"learning", "secagg", "similarity"},
    {"jobs", "reporting"},
    {"federation"},
    {"demo", "doctor", "encode", "evaluate", "publish", "service"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}

HEAVY = {"torch", "nvflare"}
OUTSIDE_WORLD = {
    *("asyncio", "builtins", "csv", "ctypes", "datetime", "fileinput", "ftplib", "glob", "http"),
    *("io", "mmap", "multiprocessing", "pathlib", "pickle", "posixpath", "selectors", "shelve"),
    *("shutil", "signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "subprocess"),
    *("sys", "tempfile", "threading", "time", "urllib", "zipfile", "requests", "grpc"),
}
READS_OR_WRITES = {
    *("open", "print", "input", "exec", "eval", "__import__"),
    *("read_text", "write_text", "read_bytes", "write_bytes", "tofile", "fromfile", "memmap"),
    *("save", "savez", "savez_compressed", "savetxt", "load", "loadtxt", "genfromtxt"),
}
PURE = ("fedgestalt.keys", "fedgestalt.secagg", "fedgestalt.similarity")


@dataclass(frozen=True)
class Source:
    """One module of the project."""

    name: str
    path: Path

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    @property
    def part(self) -> str:
        """``cohort`` for ``fedgestalt.cohort.scan``; empty for the package itself."""
        return _part(self.name)

    def inside(self, *packages: str) -> bool:
        return any(f"{self.name}.".startswith(f"{package}.") for package in packages)

    def imports(self) -> set[str]:
        """Dotted names; ``from a import b`` also counts as ``a.b`` where that is a module."""
        package = self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                relative = "." * node.level + (node.module or "")
                origin = importlib.util.resolve_name(relative, package)
                inner = {f"{origin}.{alias.name}" for alias in node.names}
                found |= {origin} | (inner & _project_names())
        return found

    def top_level_imports(self) -> set[str]:
        return {name.partition(".")[0] for name in self.imports()}


def _part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def _find() -> Iterator[Source]:
    for root in ROOTS:
        for path in sorted((PROJECT / root).rglob("*.py")):
            parts = path.relative_to(PROJECT / root).with_suffix("").parts
            yield Source(".".join(parts).removesuffix(".__init__"), path)


@cache
def sources() -> tuple[Source, ...]:
    return tuple(_find())


@cache
def _project_names() -> frozenset[str]:
    names = {source.name for source in sources()}
    packages = {name.rpartition(".")[0] for name in names} - {""}
    return frozenset(names | packages)


def core() -> list[Source]:
    return [source for source in sources() if source.inside("fedgestalt")]


def plugins() -> list[Source]:
    return [source for source in sources() if source.inside("fedgestalt_plugins")]


def pure() -> list[Source]:
    return [source for source in sources() if source.inside(*PURE)]


def loaded_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after ``statement``."""
    code = f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_walk_sees_all_three_source_roots() -> None:
    expected = {
        "fedgestalt",
        "fedgestalt.cli",
        "fedgestalt.federation.job.executor",
        "fedgestalt.federation.training.transcript",
        "fedgestalt.secagg.server",
        "fedgestalt.secagg.site",
        "fedgestalt.similarity.kernel",
        "fedgestalt_plugins.backbones.iresnet",
        "fedgestalt_provisioning.builder",
    }
    assert expected <= {source.name for source in sources()}


def test_nvflare_is_imported_by_the_federation_and_the_provisioning_builder_alone() -> None:
    users = {source.name for source in sources() if "nvflare" in source.top_level_imports()}
    packages = {".".join(name.split(".")[:2]) for name in users}
    assert packages == {"fedgestalt.federation", "fedgestalt_provisioning.builder"}


def test_secure_aggregation_and_similarity_import_neither_torch_nor_nvflare() -> None:
    offenders = {s.name: s.top_level_imports() & HEAVY for s in pure()}
    assert not any(offenders.values()), offenders


def test_secure_aggregation_and_similarity_load_neither_torch_nor_nvflare_by_way_of_others() -> (
    None
):
    names = sorted(source.name for source in pure())
    loaded = loaded_after(f"import {', '.join(names)}")
    assert {"fedgestalt", "numpy"} <= loaded
    assert not loaded & HEAVY


def test_secure_aggregation_and_similarity_import_no_files_sockets_or_clocks() -> None:
    offenders = {s.name: s.top_level_imports() & OUTSIDE_WORLD for s in pure()}
    assert not any(offenders.values()), offenders


def test_secure_aggregation_and_similarity_ask_the_operating_system_for_entropy_alone() -> None:
    for source in pure():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "os":
                assert {alias.name for alias in node.names} == {"urandom"}, source.name
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "os" or node.attr == "urandom", source.name


def test_secure_aggregation_and_similarity_read_and_write_nothing() -> None:
    for source in pure():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
                assert name not in READS_OR_WRITES, f"{source.name}, line {node.lineno}"


def test_the_core_names_no_plugin_module() -> None:
    packages = {source.name.split(".")[0] for source in plugins()}
    assert packages == {"fedgestalt_plugins"}
    for source in core():
        assert "fedgestalt_plugins" not in source.path.read_text(encoding="utf-8"), source.name


def test_the_core_loads_no_module_by_a_computed_name() -> None:
    for source in core():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                assert name not in {"import_module", "__import__", "exec_module"}, source.name


def test_plugins_know_of_the_core_what_is_promised_to_plugins() -> None:
    promised = {"contracts", "errors", "hooks"}
    for source in plugins():
        cohorts = {"cohort"} if source.inside("fedgestalt_plugins.cohorts") else set()
        ours = {name for name in source.imports() if name.split(".")[0] == "fedgestalt"}
        assert {_part(name) for name in ours} <= promised | cohorts, source.name


def test_plugins_of_one_kind_do_not_import_those_of_another() -> None:
    for source in plugins():
        ours = {n for n in source.imports() if n.startswith("fedgestalt_plugins.")}
        assert {_part(name) for name in ours} <= {source.part, "shipped"}, source.name


def test_provisioning_stands_alone() -> None:
    for source in sources():
        if source.inside("fedgestalt_provisioning"):
            found = source.top_level_imports()
            assert not found & {"fedgestalt", "fedgestalt_plugins", "torch"}, source.name
        else:
            assert "fedgestalt_provisioning" not in source.top_level_imports(), source.name


def test_every_part_of_the_core_has_a_floor() -> None:
    assert {source.part for source in core()} - {""} <= FLOOR_OF.keys()


@pytest.mark.parametrize("part", sorted(FLOOR_OF.keys() - {"service"}))
def test_arrows_point_down(part: str) -> None:
    members = [source for source in core() if source.part == part]
    assert members
    for source in members:
        ours = {n for n in source.imports() if n.split(".")[0] == "fedgestalt"}
        used = {_part(name) for name in ours} - {"", part}
        upward = {other for other in used if FLOOR_OF[other] >= FLOOR_OF[part]}
        assert not upward, f"{source.name} imports {sorted(upward)}"


def test_the_package_itself_imports_nothing_of_the_project() -> None:
    (package,) = [source for source in core() if source.name == "fedgestalt"]
    assert not package.top_level_imports() & {"fedgestalt", "fedgestalt_plugins"}


def test_only_programs_import_the_federation() -> None:
    users = {s.part for s in core() if any(_part(n) == "federation" for n in s.imports())}
    assert users - {"federation"} <= {"demo", "doctor", "cli", "service"}
    assert "demo" in users


def test_the_command_line_starts_without_torch_and_nvflare() -> None:
    loaded = loaded_after("import fedgestalt.cli, fedgestalt.jobs")
    assert "click" in loaded
    assert not loaded & {*HEAVY, "fedgestalt_plugins", "cv2", "onnx"}


def test_listing_plugins_loads_neither_torch_nor_nvflare() -> None:
    loaded = loaded_after("from fedgestalt.hooks import get_registry\nget_registry().entries()")
    assert "fedgestalt_plugins" in loaded
    assert not loaded & {*HEAVY, "onnx"}
