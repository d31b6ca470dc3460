"""The checks for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.doctor.findings import Check, State, counted

_TITLES: Final[Mapping[str, str]] = {
    "software": "Software",
    "kit": "Startup kit",
    "network": "Way to the server",
    "flare": "What FLARE allows here",
    "policy": "This site's own policy",
    "data": "Data",
    "machine": "Machine",
    "dry-run": "Dry run of the default job",
}
_SIGNS: Final[Mapping[State, tuple[str, str]]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "problem": ("✗", "bold red"),
    "skipped": ("·", "dim"),
}


def is_ready(checks: Sequence[Check]) -> bool:
    """Whether no check found a problem."""
    return all(found.state != "problem" for found in checks)


def as_document(checks: Sequence[Check]) -> dict[str, Any]:
    """The JSON document of ``fedgestalt doctor --json``."""
    rows = [
        {
            "name": found.name,
            "state": found.state,
            "what": found.what,
            "remedy": found.remedy,
            **found.figures,
        }
        for found in checks
    ]
    return {"ok": is_ready(checks), "checks": rows}


def verdict(checks: Sequence[Check]) -> str:
    """One sentence."""
    problems = sum(found.state == "problem" for found in checks)
    warnings = sum(found.state == "warning" for found in checks)
    left_out = sum(found.state == "skipped" for found in checks)
    parts = [counted(problems, "problem")] if problems else []
    parts += [counted(warnings, "warning")] if warnings else []
    parts += [f"{counted(left_out, 'check')} not made"] if left_out else []
    start = "Not ready" if problems else "Ready"
    return f"{start}: {', '.join(parts)}." if parts else f"{start}."


def show(checks: Sequence[Check], console: Console) -> None:
    """Print all checks in groups, aligned on a terminal, one line each elsewhere."""
    width = max((len(_detail(found)) for found in checks), default=0)
    for group, members in groupby(checks, key=lambda found: found.group):
        console.print()
        console.print(Text(_TITLES.get(group, group), style="bold"))
        for found in members:
            if console.is_terminal:
                console.print(_row(found, width))
            else:
                console.print(_line(found), soft_wrap=True, markup=False, highlight=False)
    console.print()
    style = "bold green" if is_ready(checks) else "bold red"
    console.print(Text(verdict(checks), style=style))
    console.print(RESEARCH_USE_ONLY)


def _detail(found: Check) -> str:
    return found.name.partition(".")[2]


def _row(found: Check, width: int) -> Table:
    sign, style = _SIGNS[found.state]
    row = Table.grid(padding=(0, 1))
    row.add_column(width=3, justify="right")
    row.add_column(width=width)
    row.add_column(overflow="fold")
    text = Text(f"{found.what}.", style="dim" if found.state == "skipped" else "")
    if found.remedy:
        text.append(f"\n→ {_sentence(found.remedy)}", style="italic")
    row.add_row(Text(sign, style=style), Text(_detail(found), style=style), text)
    return row


def _line(found: Check) -> str:
    remedy = f" {_sentence(found.remedy)}" if found.remedy else ""
    return f"{found.state}: {found.name}: {found.what}.{remedy}"


def _sentence(text: str) -> str:
    stop = "" if text.endswith("?") else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"
