"""Progress for people: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

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

    def count(self, done: int, total: int, pace: Pace) -> None:
        """Say how far the current step is, how fast it goes and how long it will take."""
        if not self._status and time.monotonic() - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        said = pace.said(done, total)
        self.note(f"{_bar(done, total)} {said}" if self._status else said)

    def say(self, text: str = "") -> None:
        """Print a line that stays."""
        self._console.print(text, soft_wrap=True)


class Pace:
    """How fast something goes, from when this was made.

    Args:
        what: is counted, in the plural.
        clock: seconds; of the system by default.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock, self._started = what, clock, clock()

    def said(self, done: int, total: int) -> str:
        """For example ``120 of 5,000 images, 61 per second, 80 s left``."""
        so_far = f"{done:,} of {total:,} {self._what}"
        took = self._clock() - self._started
        if not done or took <= 0:
            return so_far
        rate = done / took
        return f"{so_far}, {_round(rate)} per second, {_duration((total - done) / rate)} left"


def _round(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _bar(done: int, total: int, width: int = 24) -> str:
    filled = width * done // max(total, 1)
    return "━" * filled + "╌" * (width - filled)
