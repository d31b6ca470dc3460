"""What a person sees while long work goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedgestalt import console as console_module
from fedgestalt.console import Pace, Steps


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "done", "said"),
    [
        (0, 0, "0 of 5,000 images"),
        (2, 100, "100 of 5,000 images, 50 per second, 98 s left"),
        (100, 150, "150 of 5,000 images, 1.5 per second, 54 min left"),
        (9000, 1500, "1,500 of 5,000 images, 0.17 per second, 5 h 50 min left"),
        (10, 5000, "5,000 of 5,000 images, 500 per second, 0 s left"),
    ],
)
def test_the_pace_tells_rate_and_time_left(seconds: float, done: int, said: str) -> None:
    clock = Clock()
    pace = Pace("images", clock)
    clock.now = seconds
    assert pace.said(done, 5000) == said


def test_without_a_terminal_a_line_comes_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(console_module.time, "monotonic", clock)
    steps = Steps(Console(file=out, width=200))
    with steps.step("encode", "Encoding"):
        pace = Pace("images", clock)
        for second in range(1, 13):
            clock.now = second
            steps.count(second, 12, pace)
    lines = [line for line in out.getvalue().splitlines() if "per second" in line]
    assert [line.split()[0] for line in lines] == ["5", "10"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    steps = Steps(Console(file=out, width=200, force_terminal=True))
    shown = []
    with steps.step("encode", "Encoding"):
        monkeypatch.setattr(steps, "note", shown.append)
        steps.count(6, 12, Pace("images"))
    assert shown[0].startswith("━" * 12 + "╌" * 12 + " 6 of 12 images")
