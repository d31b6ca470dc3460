"""A running job for people: where it stands, who is being waited for, how long it may take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedgestalt.federation.tasks import PHASES

_SECONDS_BETWEEN_LINES = 5.0
_QUEUED = ("SUBMITTED", "APPROVED", "DISPATCHED")
_SILENT_AFTER_SECONDS = 10.0


class JobView:
    """Shows reports of :class:`~fedgestalt.federation.job.status.JobStatus` as they come.

    A table that changes in place on a terminal; elsewhere a line when something changes, and one
    every few seconds.

    Args:
        job: its id.
        console: where to write.
        wanted: sites that the job names; empty if it takes whoever is there.
    """

    def __init__(self, job: str, console: Console, wanted: tuple[str, ...] = ()) -> None:
        self._job, self._console, self._wanted = job, console, wanted
        self._live: Live | None = None
        self._last, self._last_time = "", 0.0
        self._shown: set[str] = set()
        self._reported = False

    def __enter__(self) -> JobView:
        """Begin to show."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()

    def show(self, status: str, report: Mapping[str, Any], connected: list[str]) -> None:
        """Show one report; ``connected`` are the sites that are there while the job waits."""
        for warning in report.get("warnings", ()):
            if warning not in self._shown:
                self._shown.add(warning)
                self._console.print(f"[yellow]![/yellow] {warning}", soft_wrap=True)
        line = headline(status, report, self._wanted, connected)
        if status == "RUNNING" and not report:
            line = "its processes end" if self._reported else "its processes start"
        self._reported = self._reported or bool(report)
        if self._live:
            self._live.update(_table(line, report))
            return
        changed = line.partition(",")[0] != self._last.partition(",")[0]
        if changed or time.monotonic() - self._last_time >= _SECONDS_BETWEEN_LINES:
            self._last, self._last_time = line, time.monotonic()
            self._console.print(line, soft_wrap=True, highlight=False)


def headline(
    status: str, report: Mapping[str, Any], wanted: tuple[str, ...], connected: list[str]
) -> str:
    """Where a job stands, in one line."""
    if status in _QUEUED:
        absent = sorted(set(wanted) - set(connected))
        if absent:
            return f"waiting for {', '.join(absent)} to connect (connected: {_list(connected)})"
        return "waiting for the server to start it"
    if not report:
        return "its processes start or end" if status == "RUNNING" else status.lower()
    parts = [PHASES.get(report["phase"], "starting")]
    if report["rounds"] and report["round"]:
        parts[0] = f"round {report['round']} of {report['rounds']}: {parts[0]}"
    working = [
        f"{site} {entry['fraction']:.0%}" if entry["fraction"] else site
        for site, entry in report["sites"].items()
        if entry["state"] == "working"
    ]
    if working:
        parts.append(f"waiting for {' '.join(working)}")
    if report["seconds_left"] is not None:
        parts.append(f"about {duration(report['seconds_left'])} left")
    moved = sum(entry["sent_to"] + entry["received_from"] for entry in report["sites"].values())
    parts.append(f"{size(moved)} so far")
    return ", ".join(parts)


def _table(line: str, report: Mapping[str, Any]) -> RenderableType:
    if not report:
        return Text(line)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, where in (("site", "left"), ("", "left"), ("work", "left"), ("received", "right")):
        table.add_column(name, justify=where)  # type: ignore[arg-type]
    table.add_column("sent", justify="right")
    for site, entry in report["sites"].items():
        done = entry["state"] == "done"
        heard = entry["heard_seconds_ago"]
        silent = heard is not None and heard > _SILENT_AFTER_SECONDS
        what = "done" if done else f"silent for {heard:.0f} s" if silent else entry["what"]
        table.add_row(
            site,
            ProgressBar(total=1.0, completed=1.0 if done else entry["fraction"], width=24),
            Text(what or "working", style="yellow" if silent and not done else ""),
            size(entry["received_from"]),
            size(entry["sent_to"]),
        )
    return Group(Text(line, style="bold"), table)


def size(count: int) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007
        if value < 1000:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _list(names: list[str]) -> str:
    return ", ".join(names) or "nobody"
