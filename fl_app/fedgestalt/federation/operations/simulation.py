"""Runs a job folder in FLARE's simulator: server and sites as processes of this machine.

For trials and the demonstration. Sites of the simulator have no certificates; real consortia run
the same job folders on provisioned servers and sites.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from fedgestalt.errors import SiteError
from fedgestalt.federation.job.progress import OUTCOME_FILE, PROGRESS_FILE
from fedgestalt.federation.operations.processes import ProcessFamily
from fedgestalt.federation.site.settings import FILE_NAME, SiteSettings

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with the party's name (``server`` or a site) and one event of its progress log."""

_RUN = "simulate_job"
_SIMULATOR = "fedgestalt.federation.operations.simulator"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 1.5


def run_simulated_job(
    job: Path, workspace: Path, sites: Sequence[str], settings: SiteSettings, on_event: OnEvent
) -> dict[str, Any]:
    """Run a job to its end.

    Args:
        job: a rendered job folder.
        workspace: a new folder; :func:`run_folder` finds what the parties left in it.
        sites: names.
        settings: the same for all sites, with ``{site}`` in its paths.
        on_event: see :data:`OnEvent`.

    Returns:
        The job's outcome.

    Raises:
        SiteError: the job failed; the sentence says where and why.
    """
    local = workspace / "local"
    local.mkdir(parents=True)
    resources = {
        "format_version": 2,
        "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, "fedgestalt."],
    }
    (local / "resources.json").write_text(json.dumps(resources), encoding="utf-8")
    (local / FILE_NAME).write_text(yaml.safe_dump(settings.model_dump()), encoding="utf-8")
    log = workspace.with_suffix(".log")
    outcome_file = workspace / "server" / _RUN / OUTCOME_FILE
    parties = ("server", *sites)
    tails = {p: _tail(workspace / p / _RUN / PROGRESS_FILE) for p in parties}
    ended_at = float("inf")
    command = [sys.executable, "-m", _SIMULATOR, str(job), "-w", str(workspace)]
    command += ["-c", ",".join(sites), "-t", str(len(sites))]
    simulator = ProcessFamily(command, workspace.parent, log, {"OMP_NUM_THREADS": "1"})
    try:
        while simulator.is_running():
            _forward(tails, on_event)
            if outcome_file.exists():
                ended_at = min(ended_at, time.monotonic())
                if time.monotonic() - ended_at > _GRACE_SECONDS:
                    break
            time.sleep(_POLL_SECONDS)
    finally:
        simulator.end()
    _forward(tails, on_event)
    if not outcome_file.exists():
        raise SiteError(
            f"the job ended without an outcome; the end of its log: {_last_line(log)}",
            where="simulator",
            remedy=f"see {log}",
        )
    outcome: dict[str, Any] = json.loads(outcome_file.read_text(encoding="utf-8"))
    if outcome["status"] != "completed":
        raise SiteError(str(outcome["reason"]), where="job", remedy=f"see {log}")
    return outcome


def run_folder(workspace: Path, party: str = "server") -> Path:
    """A party's run folder after :func:`run_simulated_job`."""
    return workspace / party / _RUN


def _tail(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Each step gives the complete lines that came since the last one."""
    position = 0
    while True:
        lines: list[dict[str, Any]] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                for raw in file:
                    if raw.endswith(b"\n"):
                        lines.append(json.loads(raw))
                        position += len(raw)
        yield lines


def _forward(tails: dict[str, Iterator[list[dict[str, Any]]]], on_event: OnEvent) -> None:
    for party, tail in tails.items():
        for event in next(tail):
            on_event(party, event)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "empty"
