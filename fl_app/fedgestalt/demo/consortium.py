"""A whole consortium on one machine: startup kits, processes, mutual TLS, jobs, a newcomer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import split_cohort, write_silos
from fedgestalt.console import Steps
from fedgestalt.demo.run import open_cohort
from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.federation.operations.admin import read_outcome
from fedgestalt.federation.operations.local import LocalConsortium, free_port
from fedgestalt.federation.operations.view import headline
from fedgestalt.jobs import JobSpec, MatchingJob, TrainingJob, render_job

PROJECT: Final = "rehearsal"
SERVER, ADMIN = "localhost", "lead@example.org"
HOSPITALS: Final = ("berlin", "bonn", "leuven")
NEWCOMER: Final = "zurich"
_SHARES = 8
"""The cohort is dealt to so many silos; half of them take part, so that it does not take long."""
_JOB_LIMIT_SECONDS = 600.0
_MARKER = "rehearsal.yml"
_FLARE = "nvflare.lighter.impl"


def rehearse(out: Path, rounds: int, steps: Steps) -> Iterator[str]:
    """Do everything that a consortium does in its first week.

    Provision a server, three hospitals and an administrator; start them; train and match; add a
    fourth hospital without touching anybody else; train and match with it; shut down.

    Args:
        out: a new folder, or one of an earlier rehearsal, which is replaced.
        rounds: of each training job.
        steps: shows what is going on.

    Yields:
        A line for each job.

    Raises:
        FedgestaltError: the first thing that went wrong; nothing is left running.
    """
    root = _fresh_folder(out)
    _deal_data(root, steps)
    with steps.step("provision", "Provisioning a server, three hospitals and an administrator"):
        _provision(root, "-p", "project.yml")
    kits = root / "workspace" / PROJECT / "prod_00"
    with LocalConsortium(kits / SERVER, kits / ADMIN, {"OMP_NUM_THREADS": "1"}) as local:
        with steps.step("start", "Starting them with mutual TLS"):
            local.start_server()
            for name in HOSPITALS:
                local.start(kits / name)
            local.wait_for(HOSPITALS)
        yield from _train_and_match(root, local, rounds, steps, "first")
        with steps.step("grow", f"Adding {NEWCOMER}: no other kit changes, nobody restarts"):
            entry = {"name": NEWCOMER, "type": "client", "org": NEWCOMER}
            (root / "newcomer.yml").write_text(yaml.safe_dump(entry), encoding="utf-8")
            _provision(root, "-p", "project.yml", "--add-client", "newcomer.yml", "--force")
            local.start(_newest_kit(root, NEWCOMER))
            local.wait_for([*HOSPITALS, NEWCOMER])
        yield from _train_and_match(root, local, rounds, steps, "second")
        with steps.step("stop", "Shutting everybody down"):
            local.end()


def _fresh_folder(out: Path) -> Path:
    root = out.resolve()
    if root.exists() and not (root / _MARKER).is_file() and any(root.iterdir()):
        raise ConfigError(
            "exists already and is no earlier rehearsal", where=str(out), remedy="name a new folder"
        )
    try:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True, exist_ok=True)
        port = free_port()
        (root / _MARKER).write_text(f"# {RESEARCH_USE_ONLY}\nport: {port}\n", encoding="utf-8")
        project = yaml.safe_dump(project_file(root, port), sort_keys=False)
        (root / "project.yml").write_text(project, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=str(out)) from None
    return root


def project_file(root: Path, port: int) -> dict[str, Any]:
    """FLARE's project file: one port, our policy in every kit."""
    policy = {
        "data": f"{root}/data/{{site}}",
        "store": f"{root}/stores/{{site}}",
        "threads": 1,
        "max_released_rows": 50,
    }
    return {
        "api_version": 3,
        "name": PROJECT,
        "description": f"a rehearsal on one machine. {RESEARCH_USE_ONLY}",
        "participants": [
            {
                "name": SERVER,
                "type": "server",
                "org": "lead",
                "fed_learn_port": port,
                "admin_port": port,
            },
            *({"name": name, "type": "client", "org": name} for name in HOSPITALS),
            {"name": ADMIN, "type": "admin", "org": "lead", "role": "project_admin"},
        ],
        "builders": [
            {
                "path": f"{_FLARE}.workspace.WorkspaceBuilder",
                "args": {"template_file": "master_template.yml"},
            },
            {
                "path": f"{_FLARE}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {
                "path": "fedgestalt_provisioning.FedgestaltPolicyBuilder",
                "args": {"policy": policy},
            },
            {"path": f"{_FLARE}.cert.CertBuilder"},
            {"path": f"{_FLARE}.signature.SignatureBuilder"},
        ],
    }


def _deal_data(root: Path, steps: Steps) -> None:
    cohort, _ = open_cohort("synthetic", steps)
    with steps.step("cohort", "Dealing synthetic patients to four hospitals"):
        places = [f"share-{number}" for number in range(_SHARES)]
        silos = split_cohort(cohort, places, "near-uniform", 1)
        taken = dict(zip((*HOSPITALS, NEWCOMER), silos.values(), strict=False))
        write_silos(taken, root / "data")


def _provision(root: Path, *arguments: str) -> None:
    command = [str(Path(sys.executable).parent / "nvflare"), "provision"]
    command += [*arguments, "-w", "workspace"]
    done = subprocess.run(  # noqa: S603  our own environment's command
        command, cwd=root, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise SiteError(
            f"nvflare provision failed: {said[-1] if said else 'it said nothing'}", where=str(root)
        )


def _newest_kit(root: Path, name: str) -> Path:
    kits = sorted((root / "workspace" / PROJECT).glob(f"prod_*/{name}"))
    if not kits:
        raise SiteError(f"nvflare provision made no kit for {name}", where=str(root))
    return kits[-1]


def _train_and_match(
    root: Path, local: LocalConsortium, rounds: int, steps: Steps, which: str
) -> Iterator[str]:
    sites = local.session.connected_sites()
    limits = {"start_limit_seconds": 300.0, "silence_limit_seconds": 60.0}
    job: JobSpec = TrainingJob(rounds=rounds, **limits)
    trained = _run(root, local, job, steps, f"{which}-training", sites)
    yield _line(trained, f"{len(trained['rounds'])} rounds, ensemble {trained['ensemble'][:12]}")
    job = MatchingJob(ensemble=trained["ensemble"], released_rows=50, **limits)
    matched = _run(root, local, job, steps, f"{which}-matching", sites)
    yield _line(matched, f"{matched['rows']} images compared; the ranks lie at the hospitals")


def _run(
    root: Path,
    local: LocalConsortium,
    job: JobSpec,
    steps: Steps,
    name: str,
    sites: Sequence[str],
) -> dict[str, Any]:
    folder = root / "jobs" / name
    render_job(job, folder, name)
    with steps.step(name, f"Job {name} with {', '.join(sites)}"):
        job_id = local.session.submit(folder)
        local.session.watch(
            job_id,
            lambda status, report: steps.note(headline(status, report, (), list(sites))),
            0.5,
            _JOB_LIMIT_SECONDS,
        )
        result = local.session.download(job_id, root / "results")
        result.rename(root / "results" / name)
    outcome = read_outcome(root / "results" / name)
    if outcome.get("status") != "completed":
        raise SiteError(
            str(outcome.get("reason", "the job left no outcome")),
            where=f"job {name}",
            remedy=f"see the logs under {root / 'workspace'}",
        )
    (root / "results" / f"{name}.json").write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    return outcome


def _line(outcome: dict[str, Any], what: str) -> str:
    sites = ", ".join(outcome["sites"])
    return f"  {outcome['template']} with {sites}: {what} [dim]({outcome['seconds']:.0f} s)[/dim]"
