"""Processes of FLARE on this machine, and an end for all that they start.

FLARE starts job processes in sessions of their own, so that a signal to one group would not reach
them: they are remembered one by one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

END_SECONDS: Final = 5.0
QUIET_CPU: Final[Mapping[str, str]] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Several processes share this machine's cores: waiting threads must not spin."""


class ProcessFamily:
    """One process and its descendants.

    Args:
        command: what to run.
        folder: where.
        log: file for its output, appended to.
        environment: beside this process's own.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603  our own interpreter and paths
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **QUIET_CPU, **(environment or {})},
                cwd=folder,
                start_new_session=True,
            )
        self._members: dict[int, psutil.Process] = {}

    def is_running(self) -> bool:
        """Whether the first process has not ended; also looks for those started since."""
        self.members()
        return self._process.poll() is None

    def members(self) -> list[psutil.Process]:
        """The process and those of its descendants that still run."""
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(self._process.pid)
            self._members |= {p.pid: p for p in (parent, *parent.children(recursive=True))}
        self._members = {pid: p for pid, p in self._members.items() if p.is_running()}
        return list(self._members.values())

    def wait(self, seconds: float) -> bool:
        """Wait for the first process to end by itself; whether it did."""
        self.members()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, seconds: float = END_SECONDS) -> None:
        """End all of them: politely, then not."""
        self.members()
        family = list(self._members.values())
        for stop in (psutil.Process.terminate, psutil.Process.kill):
            for process in family:
                with contextlib.suppress(psutil.Error):
                    stop(process)
            _, family = psutil.wait_procs(family, timeout=seconds)
        self._process.wait()

    def kill(self) -> None:
        """End all of them at once, as a power cut would."""
        self.members()
        for process in self._members.values():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.wait()
