"""The container files keep their promises: no root, no secrets, pinned, and they start a kit.

No container engine is needed. The last test starts real FLARE processes as the image would.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from hospitals import ADMIN, SERVER, Hospitals

import fedgestalt
from fedgestalt.errors import FedgestaltError
from fedgestalt.federation.operations.admin import AdminSession
from fedgestalt.federation.operations.processes import ProcessFamily

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "provisioning" / "containers"
ENTRYPOINT, HEALTHCHECK = FOLDER / "entrypoint.sh", FOLDER / "healthcheck.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRIVATE = re.compile(r"kit|startup|workspace|prod_|secret|password|token|\.(crt|key|pem|env)\b")
COMPILERS = re.compile(r"build-essential|\bgcc\b|\bg\+\+|\bclang\b|\bmake\b|\bcmake\b|-dev\b")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile."""

    name: str
    text: str

    @property
    def exec_form(self) -> list[str]:
        """The words of ``CMD ["a", "b"]``, behind any options."""
        words = json.loads(self.text[self.text.index("[") :])
        assert isinstance(words, list)
        return [str(word) for word in words]


def read_dockerfile() -> list[list[Instruction]]:
    """Instructions by stage."""
    lines = [x for x in (FOLDER / "Dockerfile").read_text().splitlines() if not x.startswith("#")]
    stages: list[list[Instruction]] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, text = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append(Instruction(name, text.strip()))
    return stages


STAGES = read_dockerfile()
FINAL = STAGES[-1]
EVERYTHING = [instruction for stage in STAGES for instruction in stage]
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def only(name: str, stage: list[Instruction] = FINAL) -> Instruction:
    (found,) = (i for i in stage if i.name == name)
    return found


def copied() -> list[str]:
    """What the image takes from this repository."""
    sources = []
    for instruction in EVERYTHING:
        if instruction.name in ("COPY", "ADD") and "--from=" not in instruction.text:
            words = [w for w in shlex.split(instruction.text) if not w.startswith("--")]
            sources += words[:-1]
    return sources


# the image


def test_the_base_image_is_pinned_and_has_the_projects_python() -> None:
    bases = {i.text.split()[0] for i in EVERYTHING if i.name == "FROM"}
    (base,) = bases
    version = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-bookworm", base)
    assert version
    assert version[1] == PROJECT["tool"]["mypy"]["python_version"]
    assert PROJECT["project"]["requires-python"].startswith(f">={version[1]},")
    assert f'base.name="{base}"' in only("LABEL").text


def test_every_package_is_pinned() -> None:
    installs = re.findall(r"pip [^&]*?\binstall\b([^&]*)", " && ".join(i.text for i in EVERYTHING))
    assert len(installs) == 2
    for options in installs:
        assert "--constraint constraints.txt" in options or (
            "--requirement torch.txt" in options and "--no-deps" in options
        )
    assert "grep '^torch==' constraints.txt > torch.txt" in " ".join(i.text for i in STAGES[0])
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert torch in PROJECT["project"]["dependencies"]
    assert not any("apt-get" in i.text for i in EVERYTHING)


def test_nothing_but_the_environment_leaves_the_build_stage() -> None:
    taken = [i.text for i in FINAL if i.name == "COPY" and "--from=" in i.text]
    assert taken == ["--from=build /opt/fedgestalt /opt/fedgestalt"]
    assert not any(i.name == "RUN" and COMPILERS.search(i.text) for i in FINAL)


def test_no_kit_and_no_secret_can_come_into_the_image() -> None:
    assert not any(i.name == "ADD" for i in EVERYTHING)
    for source in copied():
        assert (ROOT / source).exists(), source
        assert not PRIVATE.search(source), source
    for instruction in EVERYTHING:
        if instruction.name in ("ARG", "ENV"):
            names = re.findall(r"(\w+)=", instruction.text)
            assert not any(re.search("SECRET|PASSWORD|TOKEN|_KEY", name) for name in names)


def test_the_build_sees_only_what_it_copies() -> None:
    text = (FOLDER / "Dockerfile.dockerignore").read_text()
    first, *rest = [x for x in text.splitlines() if x and not x.startswith("#")]
    assert first == "*"
    shown = {x.removeprefix("!") for x in rest if x.startswith("!")}
    assert shown == set(copied())
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = ["README.md", "LICENSE", "NOTICE", *wheel["packages"], *wheel["force-include"]]
    for path in needed:
        assert any(fnmatch(path, f"{pattern}*") for pattern in shown), path


def test_it_runs_as_a_fixed_user_without_rights() -> None:
    user = only("USER").text
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert FINAL.index(only("USER")) > max(n for n, i in enumerate(FINAL) if i.name == "RUN")
    uid, gid = user.split(":")
    (setup,) = (i.text for i in FINAL if i.name == "RUN")
    assert f"--uid {uid} --gid {gid}" in setup
    assert f"--owner {uid} --group {gid}" in setup
    assert "nologin" in setup


def test_its_labels_name_it_and_its_version() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', only("LABEL").text))
    assert labels["title"] == "fedgestalt"
    assert labels["version"] == PROJECT["project"]["version"]
    assert labels["licenses"] == PROJECT["project"]["license"]
    assert fedgestalt.RESEARCH_USE_ONLY in labels["description"]


def test_the_commands_that_it_runs_exist() -> None:
    targets = {
        i.text.split()[-1]: ROOT / i.text.split()[-2]
        for i in FINAL
        if i.name == "COPY" and "--from=" not in i.text
    }
    (entry,) = only("ENTRYPOINT").exec_form
    assert targets[f"/usr/local/bin/{entry}"] == ENTRYPOINT
    assert ENTRYPOINT.read_text().startswith("#!/usr/bin/env bash\n")
    python, script = only("HEALTHCHECK").exec_form
    assert python == "python"
    assert targets[script] == HEALTHCHECK
    assert all("--chmod=0555" in i.text for i in FINAL if i.text.split()[-1] in targets)


# compose


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_change_nothing_but_its_volumes(name: str) -> None:
    service = SERVICES[name]
    assert service["user"] == only("USER").text
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc"}
    (temporary,) = service["tmpfs"]
    assert temporary.lstrip("/").startswith("tmp:size=")


@pytest.mark.parametrize("name", SERVICES)
def test_kit_and_data_are_mounted_read_only_and_must_exist(name: str) -> None:
    binds = {v["target"]: v for v in SERVICES[name]["volumes"] if isinstance(v, dict)}
    assert binds.keys() == {"/user_config"} | (
        {"/srv/fedgestalt/data"} if name == "site" else set()
    )
    for bind in binds.values():
        assert bind["type"] == "bind"
        assert bind["read_only"] is True
        assert bind["bind"] == {"create_host_path": False}
    named = [v for v in SERVICES[name]["volumes"] if isinstance(v, str)]
    targets = {v.rsplit(":", 1)[1] for v in named}
    assert targets <= set(only("VOLUME").exec_form)
    for volume in named:
        default = re.sub(r"\$\{\w+:-([\w-]+)\}", r"\1", volume)
        assert default.split(":")[0] in COMPOSE["volumes"]


def test_data_and_store_lie_where_a_kits_policy_says_by_default() -> None:
    source = (ROOT / "provisioning/fedgestalt_provisioning/builder.py").read_text()
    mounts = [v["target"] if isinstance(v, dict) else v for v in SERVICES["site"]["volumes"]]
    for key, path in (("data", "/srv/fedgestalt/data"), ("store", "/srv/fedgestalt/store")):
        assert f'"{key}": "{path}"' in source
        assert any(mount.endswith(path) for mount in mounts)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_limits(name: str) -> None:
    assert SERVICES[name]["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert SERVICES[name]["stop_grace_period"]
    assert SERVICES[name]["logging"]["options"].keys() == {"max-size", "max-file"}


def test_one_port_is_published_and_only_by_the_server() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["server"]
    assert len(SERVICES["server"]["ports"]) == 1
    assert not any("expose" in service for service in SERVICES.values())


def test_both_services_are_one_image_of_this_version_and_no_environment_holds_a_secret() -> None:
    images = {service["image"] for service in SERVICES.values()}
    assert images == {f"fedgestalt:{PROJECT['project']['version']}"}
    for service in SERVICES.values():
        build = service["build"]
        context = FOLDER / build["context"]
        assert (context / build["dockerfile"]).resolve() == FOLDER / "Dockerfile"
        assert service["environment"]["NVFL_WORKSPACE"] == "/vault/workspace"
        assert not any(
            re.search("SECRET|PASSWORD|TOKEN|_KEY", key) for key in service["environment"]
        )


# what runs inside


def make_kit(folder: Path, script: str) -> Path:
    startup = folder / "startup"
    startup.mkdir(parents=True)
    (startup / "sub_start.sh").write_text(script)
    return folder


def enter(kit: Path, workspace: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "FEDGESTALT_KIT": str(kit), "NVFL_WORKSPACE": str(workspace)}
    return subprocess.Popen(
        ["bash", str(ENTRYPOINT)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_entrypoint_runs_the_kit_once_and_passes_its_exit_code_on(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit", 'echo "$@" "$NVFL_WORKSPACE"; umask; exit 7\n')
    process = enter(kit, tmp_path)
    out, _ = process.communicate(timeout=10)
    assert out.split() == ["--once", str(tmp_path), "0077"]
    assert process.returncode == 7


@pytest.mark.federation
def test_the_entrypoint_hands_sigterm_on(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit", "echo started $$; exec sleep 60\n")
    process = enter(kit, tmp_path)
    assert process.stdout
    child = int(process.stdout.readline().split()[1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    process.communicate()


def test_the_entrypoint_says_what_is_missing(tmp_path: Path) -> None:
    process = enter(tmp_path / "no-kit", tmp_path)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, "no startup kit can be read" in said) == (64, True)
    kit = make_kit(tmp_path / "kit", "exit 0\n")
    process = enter(kit, tmp_path / "no-workspace")
    _, said = process.communicate(timeout=10)
    assert (process.returncode, "cannot be written" in said) == (64, True)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def well(workspace: Path) -> tuple[bool, str]:
    done = subprocess.run(
        [sys.executable, str(HEALTHCHECK)],
        env={**os.environ, "NVFL_WORKSPACE": str(workspace)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    return done.returncode == 0, done.stderr


def write_config(workspace: Path, name: str, port: int) -> None:
    service = {"target": f"server.example.org:{port}", "scheme": "grpc"}
    (workspace / "startup").mkdir(exist_ok=True)
    config = {"servers": [{"name": "trial", "service": service}]}
    (workspace / "startup" / name).write_text(json.dumps(config))


def test_a_server_is_well_while_it_listens(tmp_path: Path) -> None:
    assert well(tmp_path) == (
        False,
        f"{tmp_path}/startup holds no startup kit: FLARE has not started",
    )
    with listening() as server:
        port = server.getsockname()[1]
        write_config(tmp_path, "fed_server.json", port)
        assert well(tmp_path) == (True, "")
    assert well(tmp_path) == (False, f"nobody listens on port {port}")


def test_a_site_is_well_while_it_is_connected(tmp_path: Path) -> None:
    with listening() as server:
        port = server.getsockname()[1]
        write_config(tmp_path, "fed_client.json", port)
        assert well(tmp_path) == (False, f"not connected to the server's port {port}")
        with socket.create_connection(("127.0.0.1", port)):
            assert well(tmp_path) == (True, "")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.federation
def test_server_and_site_start_from_kits_that_nobody_may_write_to(tmp_path: Path) -> None:
    site = "bonn"
    hospitals = Hospitals(tmp_path / "consortium", sites=(site,))
    families: dict[str, ProcessFamily] = {}
    kits: dict[Path, dict[str, tuple[int, int]]] = {}
    session: AdminSession | None = None

    def start(name: str) -> Path:
        kit, workspace = hospitals.kit(name), tmp_path / name
        for path in (kit, *kit.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        kits[kit] = snapshot(kit)
        workspace.mkdir()
        environment = {
            "FEDGESTALT_KIT": str(kit),
            "NVFL_WORKSPACE": str(workspace),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        log = tmp_path / f"{name}.log"
        families[name] = ProcessFamily(["bash", str(ENTRYPOINT)], tmp_path, log, environment)
        return workspace

    try:
        server = start(SERVER)
        deadline = time.monotonic() + 60
        while session is None:
            try:
                session = AdminSession(hospitals.kit(ADMIN), seconds=2.0)
            except FedgestaltError:
                assert time.monotonic() < deadline, (tmp_path / f"{SERVER}.log").read_text()
                time.sleep(0.3)
        assert well(server) == (True, "")
        workspace = start(site)
        while session.connected_sites() != [site]:
            assert time.monotonic() < deadline, (tmp_path / f"{site}.log").read_text()
            time.sleep(0.3)
        assert well(workspace) == (True, "")
        assert (server / "jobs").is_dir()
        session.shut_down()
        assert all(family.wait(30) for family in families.values())
        assert {kit: snapshot(kit) for kit in kits} == kits
    finally:
        if session:
            session.close()
        for family in families.values():
            family.end()
        for kit in kits:  # pytest removes them one day
            for path in (kit, *kit.rglob("*")):
                path.chmod(path.stat().st_mode | 0o200)
