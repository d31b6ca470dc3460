"""Progress as JSON lines in the run folder, and the outcome of a job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROGRESS_FILE = "progress.jsonl"
OUTCOME_FILE = "outcome.json"


class ProgressLog:
    """Appends events to a file; counts of work, never a name of an image, subject or label."""

    def __init__(self, folder: Path, min_interval_seconds: float = 0.5) -> None:
        self._path = folder / PROGRESS_FILE
        self._interval, self._last = min_interval_seconds, 0.0
        self.current: tuple[str, float] = ("", 0.0)
        """Name and fraction of the work that was counted last."""

    def write(self, event: str, **facts: Any) -> None:
        """Append one event."""
        line = json.dumps({"time": round(time.time(), 2), "event": event, **facts})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A function for (done, total) that writes at most every ``min_interval_seconds``."""

        def count(done: int, total: int) -> None:
            now = time.monotonic()
            self.current = (what, done / total if total else 1.0)
            if done >= total or now - self._last >= self._interval:
                self._last = now
                self.write("work", what=what, done=done, total=total)

        return count


def write_outcome(folder: Path, content: dict[str, Any]) -> None:
    """Write the outcome of a job, at once or not at all."""
    temporary = folder / (OUTCOME_FILE + ".partial")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(folder / OUTCOME_FILE)
