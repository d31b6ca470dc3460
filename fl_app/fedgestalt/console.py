"""Progress for people: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.status import Status

_SECONDS_BETWEEN_LINES = 5.0


class Steps:
    """Shows named steps, what goes on inside them, and how long they took.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._title, self._last_line = "", 0.0
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, key: str, title: str) -> Iterator[None]:
        """Run a step; its time is added up under ``key``."""
        started, self._title = time.monotonic(), title
        if self._console.is_terminal:
            self._status = self._console.status(f"{title} …")
            self._status.start()
        else:
            self._console.print(f"{title} …", soft_wrap=True)
            self._last_line = started
        try:
            yield
        finally:
            if self._status:
                self._status.stop()
                self._status = None
            took = time.monotonic() - started
            self.seconds[key] = round(self.seconds.get(key, 0.0) + took, 2)
        self._console.print(f"[green]✓[/green] {title} [dim]({took:.0f} s)[/dim]")

    def note(self, text: str) -> None:
        """Say what the current step is doing; on a terminal it replaces the last note."""
        if self._status:
            self._status.update(f"{self._title} … [dim]{text}[/dim]")
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._console.print(f"  {text}", soft_wrap=True)

    def say(self, text: str = "") -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)
