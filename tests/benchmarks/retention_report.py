"""From the finished runs of the retention study to tables, a summary and a picture.

Accuracy is the mean over syndromes of the share of a syndrome's test photographs whose true
syndrome is among the first k; retention is the federated accuracy over the centralised one, each a
mean over the seeds that both have. Intervals (95 %) come from drawing seeds and subjects anew: a
subject that is drawn counts in every seed in which it tests, on both sides.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from markupsafe import escape
from numpy.typing import NDArray
from retention_study import ENSEMBLE, FULL, SPLITS, TRAINED, UNTOUCHED, Schedule, usual_schedule

TOP_K: Final = (1, 5, 10)
TARGETS: Final = {"near-uniform": 0.99, "non-overlapping": 0.97}
AT_HOME: Final = f"{ENSEMBLE}, own queries"
"""Of a hospital alone: its own test photographs, whose syndromes it has."""
SUMMARY, PICTURE = "retention.json", "retention.svg"
_DRAWS = 1000

Line = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """All seeds of one setting.

    Attributes:
        cohort, side, sites, split: of the setting.
        method: its rule, and what differs from the side's usual schedule.
    """

    cohort: str
    side: str
    sites: int
    split: str
    method: str

    @classmethod
    def of(cls, line: Line) -> Group:
        """The group of a run."""
        s = line["setting"]
        usual, schedule = usual_schedule(s["side"], s["rule"]), s["schedule"]
        parts = [s["rule"]] if s["rule"] else []
        if (schedule["rounds"], schedule["epochs"]) != (usual.rounds, usual.epochs):
            parts.append(f"{schedule['rounds']} x {schedule['epochs']}")
        parts += [
            f"{name} {value}"
            for name, value in sorted(schedule["training"].items())
            if usual.training.get(name) != value
        ]
        if schedule["momentum"] != usual.momentum:
            parts.append(f"momentum {schedule['momentum']:g}")
        plain = Schedule()
        optimiser = schedule.get("optimiser", plain.optimiser)
        if optimiser != usual.optimiser:
            parts.append(f"server {optimiser}")
        rate = schedule.get("learning_rate", plain.learning_rate)
        if rate != usual.learning_rate:
            parts.append(f"server learning rate {rate:g}")
        parts += ["full neck"] if schedule["neck"] == FULL else []
        return cls(s["cohort"], s["side"], s["sites"], s["split"], ", ".join(parts))


class Draws:
    """Seeds and subjects drawn anew; column 0 of every result is what was measured."""

    def __init__(self, lines: Iterable[Line]) -> None:
        rng = np.random.default_rng(0)
        lines = list(lines)
        subjects = sorted({subject for line in lines for subject in line.get("subjects", ())})
        self._subject = {name: row for row, name in enumerate(subjects)}
        self._weights = _counts(rng, len(subjects))
        seeds = sorted({line["setting"]["seed"] for line in lines})
        self._seed = {seed: row for row, seed in enumerate(seeds)}
        self._seed_weights = _counts(rng, len(seeds))

    def accuracy(self, line: Line, encoding: str, at_home: bool = False) -> Floats:
        """(top k, draws) of one run; ``at_home`` ranks a query with its own hospital's alone."""
        ranks = np.array(line["ranks"][encoding])
        ranks = ranks[None] if ranks.ndim == 1 else ranks
        if at_home:
            ranks = ranks[line["homes"], np.arange(ranks.shape[1])][None]
        hits = np.stack([((ranks > 0) & (ranks <= k)).mean(0) for k in TOP_K])
        weights = self._weights[[self._subject[name] for name in line["subjects"]]]
        _, syndrome = np.unique(line["syndromes"], return_inverse=True)
        member = np.eye(syndrome.max() + 1)[syndrome].T
        count = member @ weights
        present = (count > 0).sum(0)
        per_syndrome = [(member @ (weights * hit[:, None])) / np.maximum(count, 1) for hit in hits]
        return np.stack([rates.sum(0) / present for rates in per_syndrome])

    def mean(self, by_seed: Mapping[int, Floats], seeds: Iterable[int]) -> Floats:
        """Mean over seeds, (top k, draws); draws without any of these seeds are NaN."""
        chosen = list(seeds)
        weights = self._seed_weights[[self._seed[seed] for seed in chosen]]
        total = sum(by_seed[seed] * weights[i] for i, seed in enumerate(chosen))
        with np.errstate(invalid="ignore"):
            return np.asarray(total / weights.sum(0))


def _counts(rng: np.random.Generator, size: int) -> Floats:
    picks = rng.integers(0, size, (_DRAWS, size))
    drawn = [np.bincount(row, minlength=size) for row in picks]
    return np.stack([np.ones(size), *drawn], axis=1).astype(np.float64)


def summarise(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each group: accuracy and retention by encoding and k, as [value, low, high]."""
    rows = []
    for cohort in dict.fromkeys(line["setting"]["cohort"] for line in lines):
        mine = [line for line in lines if line["setting"]["cohort"] == cohort]
        draws = Draws(mine)
        groups: dict[Group, dict[int, Line]] = defaultdict(dict)
        for line in mine:
            groups[Group.of(line)][line["setting"]["seed"]] = line
        pooled = [by_seed for group, by_seed in groups.items() if group.side == "centralised"]
        if len(pooled) != 1:
            message = f"{len(pooled)} centralised settings of {cohort}, exactly 1 is needed"
            raise SystemExit(message)
        for group, by_seed in groups.items():
            rows.append(_row(group, by_seed, pooled[0], draws))
    return rows


@np.errstate(invalid="ignore", divide="ignore")
def _row(
    group: Group, by_seed: Mapping[int, Line], pooled: Mapping[int, Line], draws: Draws
) -> dict[str, Any]:
    usable = {s: line for s, line in by_seed.items() if "ranks" in line and s in pooled}
    row: dict[str, Any] = {**vars(group), "seeds": sorted(usable)}
    row["impossible"] = sorted({x["impossible"] for x in by_seed.values() if "impossible" in x})
    if not usable:
        return row
    measured = [(ENSEMBLE, ENSEMBLE, False), (TRAINED, TRAINED, False)]
    if group.side == "centralised":
        measured.append((UNTOUCHED, UNTOUCHED, False))
    if group.side == "local-only":
        measured.append((AT_HOME, ENSEMBLE, True))
    for name, encoding, at_home in measured:
        found = {s: draws.accuracy(line, encoding, at_home) for s, line in usable.items()}
        mean = draws.mean(found, usable)
        row.setdefault("accuracy", {})[name] = _with_interval(mean)
        if not at_home and encoding != UNTOUCHED:
            base = {s: draws.accuracy(pooled[s], encoding) for s in usable}
            ratio = mean / draws.mean(base, usable)
            row.setdefault("retention", {})[name] = _with_interval(ratio)
            by_seed_ratio = [found[s][:, 0] / base[s][:, 0] for s in sorted(usable)]
            row.setdefault("retention_by_seed", {})[name] = np.round(by_seed_ratio, 4).tolist()
    row["cpu_seconds"] = round(float(np.mean([line["cpu_seconds"] for line in usable.values()])), 1)
    return row


def _with_interval(values: Floats) -> dict[str, list[float]]:
    low, high = np.nanpercentile(values[:, 1:], (2.5, 97.5), axis=1)
    return {
        f"top{k}": [round(float(v), 4) for v in (values[i, 0], low[i], high[i])]
        for i, k in enumerate(TOP_K)
    }


# --- tables --------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]], encoding: str = ENSEMBLE) -> str:
    """Markdown: one line per group, federated ones with their retention."""
    head = "| split | sites | side | seeds | top-1 | top-5 | top-10 | retention |"
    out = [head.replace("retention |", "retention of top-1 | of top-5 | of top-10 |")]
    out.append("| --- " * 10 + "|")
    for row in sorted(rows, key=_order):
        place = f"| {row['split'] or '-'} | {row['sites']} | "
        if "accuracy" not in row:
            out.append(f"{place}{_side(row)} | 0 | {row['impossible'][0]} |||||||")
            continue
        seeds = len(row["seeds"])
        kept = row["retention"][encoding] if row["side"] != "centralised" else None
        cells = [_ratio(kept[f"top{k}"]) if kept else "" for k in TOP_K]
        out.append(
            f"{place}{_side(row)} | {seeds} | {_percents(row, encoding)}{' | '.join(cells)} |"
        )
        if encoding == ENSEMBLE and UNTOUCHED in row["accuracy"]:
            out.append(f"{place}untouched | {seeds} | {_percents(row, UNTOUCHED)} | | |")
        if encoding == ENSEMBLE and AT_HOME in row["accuracy"]:
            out.append(f"{place}{_side(row)}, own | {seeds} | {_percents(row, AT_HOME)} | | |")
    return "\n".join(out)


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    splits = ["", *SPLITS]
    return splits.index(row["split"]), row["sites"], row["side"], row["method"]


def _side(row: Mapping[str, Any]) -> str:
    return ", ".join(
        filter(None, ["" if row["side"] == "federated" else row["side"], row["method"]])
    )


def _percents(row: Mapping[str, Any], encoding: str) -> str:
    values = [row["accuracy"][encoding][f"top{k}"] for k in TOP_K]
    return "".join(
        "{:.1f} ({:.1f} to {:.1f}) | ".format(*(100 * v for v in each)) for each in values
    )


def _ratio(value: Sequence[float]) -> str:
    point, low, high = (f"{v:.3f}" for v in value)
    return f"{point} ({low} to {high})"


# --- picture -------------------------------------------------------------------------------------

_STYLE: Final = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11px; fill: #57606a } .head { font-weight: 600 }
.grid { stroke: #d0d7de; stroke-width: 1 } .one { stroke: #57606a; stroke-width: 1 }
.target { stroke: #b42318; stroke-width: 1.5; stroke-dasharray: 4 3 }
.whisker { stroke-width: 1.6; fill: none } .back { fill: #ffffff }
.c0 { fill: #1f5fa8; stroke: #1f5fa8 } .c1 { fill: #c2570c; stroke: #c2570c }
.c2 { fill: #2f7d4f; stroke: #2f7d4f } .c3 { fill: #7a3e9d; stroke: #7a3e9d }
.c4 { fill: #8a6d00; stroke: #8a6d00 } .c5 { fill: #6e7781; stroke: #6e7781 }
"""
_LEFT, _PANEL, _GAP, _TOP, _STEP = 190.0, 230.0, 40.0, 84.0, 11.0
_SAID: Final = (
    "Federated over centralised accuracy; bars are 95 % intervals, dashed red is the target."
)


def picture(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> str:
    """SVG: retention of top-1, 5 and 10 with intervals, by split, sites and method."""
    shown = [
        r for r in rows if r["side"] == "federated" and r["method"] in methods and "retention" in r
    ]
    shown.sort(key=lambda r: (list(SPLITS).index(r["split"]), r["sites"]))
    kept = [value for r in shown for value in r["retention"][ENSEMBLE].values()]
    low = np.floor(10 * min([0.9, *(v[1] for v in kept)])) / 10
    high = np.ceil(20 * max([1.05, *(v[2] for v in kept)])) / 20

    def x_of(panel: int, value: float) -> float:
        return float(_LEFT + panel * (_PANEL + _GAP) + (value - low) / (high - low) * _PANEL)

    parts = []
    for index, method in enumerate(methods):
        x, y = 18 + 300 * (index % 3), 18 + 18 * (index // 3)
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" class="c{index}"/>')
        parts.append(_text(x + 10, y, method))
    y, split, marks = _TOP, "", list[str]()
    for (its_split, sites), group in itertools.groupby(
        shown, key=lambda r: (r["split"], r["sites"])
    ):
        here = list(group)
        if its_split != split:
            y += 14 * bool(split)
            split = its_split
            marks.append(_text(8, y + 14, split, "head"))
        marks.append(_text(_LEFT - 12, y + 14, f"{sites} sites", "small", "end"))
        tall = max(_STEP * len(here), 16) + 6
        for panel, k in enumerate(TOP_K):
            if target := TARGETS.get(split):
                marks.append(_line(x_of(panel, target), y, x_of(panel, target), y + tall, "target"))
            for turn, row in enumerate(sorted(here, key=lambda r: methods.index(r["method"]))):
                name, level = f"c{methods.index(row['method'])}", y + 10 + _STEP * turn
                point, left, right = row["retention"][ENSEMBLE][f"top{k}"]
                bar = x_of(panel, left), level, x_of(panel, right), level
                marks.append(_line(*bar, f"whisker {name}"))
                x = x_of(panel, point)
                marks.append(f'<circle cx="{x:.1f}" cy="{level:.1f}" r="3.6" class="{name}"/>')
        y += tall
    bottom, width = y + 6, _LEFT + len(TOP_K) * (_PANEL + _GAP)
    for panel, k in enumerate(TOP_K):
        middle = x_of(panel, (low + high) / 2)
        parts.append(_text(middle, _TOP - 12, f"retention of top-{k}", "head", "middle"))
        for tick in range(round(20 * low), round(20 * high) + 1):
            x, name = x_of(panel, tick / 20), "one" if tick == 20 else "grid"
            parts.append(_line(x, _TOP, x, bottom, name))
            if tick % 2 == 0:
                parts.append(_text(x, bottom + 16, f"{tick / 20:.1f}", "small", "middle"))
    height = bottom + 46
    marks.append(_text(8, height - 6, _SAID, "small"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        f' aria-label="{escape(_SAID)}"><style>{_STYLE}</style>'
        f'<rect class="back" width="{width:.0f}" height="{height:.0f}"/>\n'
        + "\n".join(parts + marks)
        + "</svg>\n"
    )


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{name}"/>'


def write_report(lines: Sequence[Line], folder: Path, methods: Sequence[str] = ()) -> None:
    """Write the summary and the picture; tables go to standard output."""
    rows = summarise(lines)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{name: v for name, v in row.items() if name != "cpu_seconds"} for row in rows]
    text = ",\n".join(json.dumps(row) for row in kept)
    (folder / SUMMARY).write_text(f"[\n{text}\n]\n", encoding="utf-8")
    for cohort in dict.fromkeys(row["cohort"] for row in rows):
        mine = [row for row in rows if row["cohort"] == cohort]
        for encoding in (ENSEMBLE, TRAINED):
            sys.stdout.write(f"\n{cohort}, {encoding}\n\n{table(mine, encoding)}\n")
    synthetic = [row for row in rows if row["cohort"] == "synthetic"]
    runs = Counter[str]()
    for row in synthetic:
        if row["side"] == "federated":
            runs[row["method"]] += len(row["seeds"])
    drawn = methods or [method for method, _ in runs.most_common(6)]
    (folder / PICTURE).write_text(picture(synthetic, drawn), encoding="utf-8")
