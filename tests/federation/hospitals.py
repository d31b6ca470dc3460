"""Provisioned consortia for tests: real kits and processes, mutual TLS, tiny data and networks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from consortium import tiny_ensemble, tiny_silos

from fedgestalt.federation.operations.local import LocalConsortium, free_port
from fedgestalt.jobs import JobSpec, MatchingJob, TrainingJob, render_job

PROJECT, ADMIN, SERVER = "trial", "lead@example.org", "localhost"
SITES = ("berlin", "bonn", "leuven")
BIN = Path(sys.executable).parent
FLARE = "nvflare.lighter.impl"
JOB_LIMIT_SECONDS = 120.0


def nvflare(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run FLARE's command line as a user does."""
    command = [str(BIN / "nvflare"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def fedgestalt(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run our command line as a user does."""
    command = [str(BIN / "fedgestalt"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


@dataclass
class Hospitals:
    """A provisioned consortium in a folder; each site has a tiny cohort and a store.

    Attributes:
        folder: everything lies in it.
        sites: names; data exist for ``spare`` as well, kits do not.
        policy: of all sites, beside data and store.
        site_policy: of one site, by name.
        roles: further administrators: name to role.
        builder: further arguments of the policy Builder.
        host: name or address of the server, under which everybody reaches it.
        cohort: further arguments of :func:`consortium.tiny_silos`.
    """

    folder: Path
    sites: Sequence[str] = SITES
    spare: Sequence[str] = ()
    policy: Mapping[str, Any] = field(default_factory=dict)
    site_policy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    builder: Mapping[str, Any] = field(default_factory=dict)
    host: str = SERVER
    cohort: Mapping[str, Any] = field(default_factory=dict)
    jobs: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        names = [*self.sites, *self.spare]
        self.silos = tiny_silos(self.folder / "cohort", names, **self.cohort)
        (self.folder / "cohort" / "hospitals").rename(self.folder / "data")
        self.write_project()
        done = nvflare("provision", "-p", "project.yml", "-w", "workspace", folder=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def kits(self) -> Path:
        """Where the startup kits lie."""
        return self.folder / "workspace" / PROJECT / "prod_00"

    def kit(self, name: str) -> Path:
        """One party's startup kit."""
        return self.kits / name

    def store(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return self.folder / "store" / site

    def site_entry(self, site: str) -> dict[str, Any]:
        """A site's entry of the project file."""
        own = {"policy": dict(self.site_policy[site])} if site in self.site_policy else {}
        return {"name": site, "type": "client", "org": site, **own}

    def write_project(self) -> None:
        """Write ``project.yml``."""
        ports = {"fed_learn_port": self.port, "admin_port": self.port}
        people = {ADMIN: "project_admin", **self.roles}
        policy = {
            "data": f"{self.folder}/data/{{site}}",
            "store": f"{self.folder}/store/{{site}}",
            "threads": 1,
            **self.policy,
        }
        project = {
            "api_version": 3,
            "name": PROJECT,
            "description": "a consortium for tests",
            "participants": [
                {"name": self.host, "type": "server", "org": "lead", **ports},
                *map(self.site_entry, self.sites),
                *(
                    {"name": name, "type": "admin", "org": "lead", "role": role}
                    for name, role in people.items()
                ),
            ],
            "builders": [
                {
                    "path": f"{FLARE}.workspace.WorkspaceBuilder",
                    "args": {"template_file": "master_template.yml"},
                },
                {
                    "path": f"{FLARE}.static_file.StaticFileBuilder",
                    "args": {"config_folder": "config", "scheme": "grpc"},
                },
                {
                    "path": "fedgestalt_provisioning.FedgestaltPolicyBuilder",
                    "args": {"policy": policy, **self.builder},
                },
                {"path": f"{FLARE}.cert.CertBuilder"},
                {"path": f"{FLARE}.signature.SignatureBuilder"},
            ],
        }
        (self.folder / "project.yml").write_text(yaml.safe_dump(project, sort_keys=False))

    def local(
        self,
        environment: Mapping[str, str] | None = None,
        prefixes: Mapping[str, Sequence[str]] | None = None,
    ) -> LocalConsortium:
        """The consortium's processes; a context that ends all of them."""
        return LocalConsortium(self.kit(self.host), self.kit(ADMIN), environment, prefixes)

    def up(self, local: LocalConsortium, sites: Sequence[str] | None = None) -> None:
        """Start server and sites, and wait until they are connected."""
        local.start_server()
        for site in self.sites if sites is None else sites:
            local.start(self.kit(site))
        local.wait_for(self.sites if sites is None else sites)

    def render(self, job: JobSpec) -> Path:
        """A new job folder."""
        self.jobs += 1
        folder = self.folder / f"job-{self.jobs}"
        render_job(job, folder)
        return folder

    def run(
        self,
        local: LocalConsortium,
        job: JobSpec,
        on_status: Callable[[str, dict[str, Any]], None] = lambda status, report: None,
        limit_seconds: float = JOB_LIMIT_SECONDS,
    ) -> dict[str, Any]:
        """Run a job to its end; returns its outcome with FLARE's status as ``flare``."""
        job_id = local.session.submit(self.render(job))
        status = local.session.watch(job_id, on_status, 0.3, limit_seconds)
        return {**local.session.outcome(job_id), "flare": status}


def training(**fields: Any) -> TrainingJob:
    """A training job that takes seconds."""
    return TrainingJob(**{"ensemble": tiny_ensemble(), "rounds": 2, **fields})


def matching(ensemble: str, **fields: Any) -> MatchingJob:
    """A matching job."""
    return MatchingJob(**{"ensemble": ensemble, "released_rows": 50, **fields})


def copy_kit(kit: Path, to: Path) -> Path:
    """The same kit in another folder, as on another machine."""
    return Path(shutil.copytree(kit, to / kit.name))
