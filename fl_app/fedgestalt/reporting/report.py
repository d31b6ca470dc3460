"""``report.html``: what a run found, for people at a hospital, in one file without any link out.

The words stand in the template; what has to be computed for them stands here. Pictures of a cohort
with patients never enter the file, whatever the caller hands over.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.contracts import Pixels
from fedgestalt.errors import DataError
from fedgestalt.reporting import plots
from fedgestalt.reporting.pictures import Example, GramView
from fedgestalt.reporting.plots import MODE_LABELS, TOP_K, mode_class, ordered_modes, percent
from fedgestalt.reporting.result import Result, RoundFacts, Table

MAP_IMAGES: Final = 2000
"""Most images that the map draws."""

_NUMBERS: Final = (
    *("No", "One", "Two", "Three", "Four", "Five", "Six"),
    *("Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve"),
)
_NEIGHBOURS: Final = 6

TABLE_WORDS: Final[Mapping[str, tuple[str, str]]] = {
    "frequent": (
        "Common syndromes among common ones",
        "Syndromes that the networks were trained on.",
    ),
    "rare": (
        "Rare syndromes among rare ones",
        "Syndromes that no network has seen in training.",
    ),
    "frequent-in-all": (
        "Common syndromes among all",
        "As in the first table, with the rare syndromes as further candidates.",
    ),
    "rare-in-all": (
        "Rare syndromes among all",
        "The hardest case: few reference images, and all common syndromes as competitors.",
    ),
}

MODE_WORDS: Final[Mapping[str, str]] = {
    "federated": "Hospitals train together and match across hospitals; no image leaves a hospital.",
    "centralised": "All images in one place. Not allowed with patients; it shows what is possible.",
    "local-only": "Every hospital trains by itself and searches its own images only.",
    "pretrained": "The original face network, untrained for syndromes, searching all hospitals.",
    "chance": "Names drawn blindly.",
}


def write_report(
    path: Path, result: Result, examples: Sequence[Example], view: GramView | None
) -> None:
    """Write the report as one self-contained HTML file; a file appears only when it is complete.

    Args:
        path: of the file; its folder exists.
        result: what the run found.
        examples: queries to show; chosen by chance, not by success, they are honest.
        view: similarities to draw as a map; None leaves the map out.

    Raises:
        DataError: the file cannot be written.
    """
    page = render(result, examples, view)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise DataError(f"cannot be written ({error.strerror})", where=str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def render(result: Result, examples: Sequence[Example], view: GramView | None) -> str:
    """Return the report as HTML."""
    loader = PackageLoader("fedgestalt.reporting", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "picture": _picture,
        "percent": percent,
        "megabytes": _megabytes,
        "duration": _duration,
    }
    hidden = result.cohort.has_patients
    shown = [_shortened(_without_faces(e) if hidden else e) for e in examples]
    return environment.get_template("report.html.j2").render(
        notice=RESEARCH_USE_ONLY,
        result=result,
        summary=summary(result),
        figures=key_figures(result),
        tables=rank_tables(result),
        modes=[(m, _label(m), mode_class(m), MODE_WORDS.get(m, "")) for m in _modes(result)],
        examples=shown,
        faces_hidden=hidden or any(e.face is None for e in shown),
        map=_map(view) if view is not None and len(view.syndromes) > 1 else None,
        rounds=_rounds(result.rounds),
        retention=_retention(result),
        plots=plots,
        seeds=_seeds(result),
    )


# --- words ---------------------------------------------------------------------------------------


def summary(result: Result) -> str:
    """One or two sentences that say what came out, whether it is good or not."""
    hospitals = _counted(len(result.sites), "hospital")
    cohort = result.cohort
    start = (
        f"{hospitals}, {cohort.images:,} images of {_counted(cohort.subjects, 'person', 'people')}"
    )
    if len(result.seeds) > 1:
        start += f", mean of {len(result.seeds)} seeds"
    found = {mode: _first(result, mode) for mode in result.evaluation}
    federated = found.get("federated")
    if federated is None:
        return f"{start}: no federated result for common syndromes."
    text = f"{start}: the true syndrome came first for {percent(federated)} of the test images"
    pooled, alone, chance = (found.get(m) for m in ("centralised", "local-only", "chance"))
    by_chance = "" if chance is None else f"{percent(chance)} by chance"
    if alone is None:
        text += f", against {by_chance}." if by_chance else "."
    elif percent(alone) == percent(federated):
        text += f", no more than for a hospital alone{'; ' + by_chance if by_chance else ''}."
    elif alone > federated:
        text += f", less than the {percent(alone)} that a hospital reaches alone"
        text += f"; {by_chance}." if by_chance else "."
    else:
        text += f", against {percent(alone)} for a hospital alone"
        text += f" and {by_chance}." if by_chance else "."
    if pooled is None:
        return text
    if percent(federated) == percent(pooled):
        return f"{text} Pooling all images in one place would reach the same."
    if federated > pooled:
        return f"{text} Pooling all images in one place reached less ({percent(pooled)})."
    kept = f"{percent(federated / pooled)} of what pooling all images in one place would reach"
    return f"{text} The federated result is {kept}."


@dataclass(frozen=True)
class Figure:
    """One number that a reader should take away."""

    value: str
    label: str
    detail: str


def key_figures(result: Result) -> list[Figure]:
    """Return the few numbers at the top of the report; those that the result lacks are left out."""
    figures = []
    table = result.evaluation.get("federated", {}).get("frequent")
    if table is not None:
        for key, label in (
            ("top1", "true syndrome first"),
            ("top10", "true syndrome in first ten"),
        ):
            bounds = table.interval.get(key)
            detail = f"95\u202f% interval {_range(bounds)}" if bounds else "common syndromes"
            figures.append(Figure(percent(getattr(table, key)), label, detail))
        pooled, alone = _first(result, "centralised"), _first(result, "local-only")
        if (kept := _retention(result)) is not None and pooled is not None:
            detail = f"all pooled: {percent(pooled)} first"
            figures.append(Figure(percent(kept), "of the pooled accuracy", detail))
        if alone is not None:
            points = round(100 * table.top1) - round(100 * alone)
            sign = "+" if points > 0 else "\u2212" if points < 0 else "±"
            detail = f"a hospital alone: {percent(alone)} first"
            label = f"percentage point{'' if abs(points) == 1 else 's'} versus a hospital alone"
            figures.append(Figure(f"{sign}{abs(points)}", label, detail))
    return figures


def _first(result: Result, mode: str) -> float | None:
    table = result.evaluation.get(mode, {}).get("frequent")
    return None if table is None else table.top1


def _retention(result: Result) -> float | None:
    federated, pooled = _first(result, "federated"), _first(result, "centralised")
    return federated / pooled if federated is not None and pooled else None


def _counted(number: int, one: str, many: str = "") -> str:
    word = _NUMBERS[number] if number < len(_NUMBERS) and not many else f"{number:,}"
    return f"{word} {one if number == 1 else many or one + 's'}"


def _range(bounds: tuple[float, float], digits: int = 0) -> str:
    low, high = (f"{100 * bound:.{digits}f}" for bound in bounds)
    return f"{low}\u2013{high}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}\u202fMB" if size < 1e9 else f"{size / 1e9:,.2f}\u202fGB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u202fh {minutes}\u202fmin" if hours else f"{minutes}\u202fmin {rest}\u202fs"


def _label(mode: str) -> str:
    return MODE_LABELS.get(mode, mode)


def _modes(result: Result) -> list[str]:
    return ordered_modes({mode: tables for mode, tables in result.evaluation.items() if tables})


def _seeds(result: Result) -> str:
    return ", ".join(map(str, result.seeds)) or "none"


# --- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One accuracy in percent, its interval and whether it is the best that is not chance."""

    value: str
    interval: str
    best: bool


@dataclass(frozen=True)
class Row:
    """One mode in one table; ``note`` says where its sizes are not those of the table."""

    label: str
    colour: str
    note: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class RankTable:
    """One of the four tables."""

    title: str
    detail: str
    sizes: str
    rows: tuple[Row, ...]


def rank_tables(result: Result) -> list[RankTable]:
    """Return the tables of accuracies in the words and the order of the report."""
    modes = _modes(result)
    known = {table for tables in result.evaluation.values() for table in tables}
    names = [name for name in TABLE_WORDS if name in known] + sorted(known - set(TABLE_WORDS))
    tables = []
    for name in names:
        mine = {m: result.evaluation[m][name] for m in modes if name in result.evaluation[m]}
        best = {
            k: max((round(_top(t, k), 3) for m, t in mine.items() if m != "chance"), default=2.0)
            for k in TOP_K
        }
        first = next(iter(mine.values()))
        rows = tuple(
            Row(
                _label(mode),
                mode_class(mode),
                "" if mode == "chance" else _difference(table, first),
                tuple(
                    Cell(
                        f"{100 * _top(table, k):.1f}",
                        _range(table.interval[f"top{k}"]) if f"top{k}" in table.interval else "",
                        mode != "chance" and round(_top(table, k), 3) >= best[k],
                    )
                    for k in TOP_K
                ),
            )
            for mode, table in mine.items()
        )
        sizes = f"{first.test:,} test images, {first.gallery:,} in the gallery"
        tables.append(RankTable(*TABLE_WORDS.get(name, (name, "")), sizes, rows))
    return tables


def _top(table: Table, k: int) -> float:
    return float(getattr(table, f"top{k}"))


def _difference(table: Table, first: Table) -> str:
    """Sizes of ``table`` that are not those of the ``first``."""
    test = f"{table.test:,} test images" if table.test != first.test else ""
    gallery = f"gallery of {table.gallery:,}" if table.gallery != first.gallery else ""
    return ", ".join(filter(None, (test, gallery)))


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundMean:
    """One round, mean over seeds."""

    number: int
    images: float
    members: Mapping[str, Mapping[str, float]]
    clipped: float
    uploaded_bytes: float
    seconds: float


@dataclass(frozen=True)
class Rounds:
    """Training as the server saw it; totals are of one seed on average."""

    means: tuple[RoundMean, ...]
    members: tuple[str, ...]
    uploaded_bytes: float
    clipped: float
    seconds: float
    loss: Markup
    accuracy: Markup


def _rounds(facts: Sequence[RoundFacts]) -> Rounds | None:
    if not facts:
        return None
    members = tuple(dict.fromkeys(name for fact in facts for name in fact.members))
    means = []
    for number in sorted({fact.round for fact in facts}):
        mine = [fact for fact in facts if fact.round == number]
        means.append(
            RoundMean(
                number,
                float(np.mean([fact.images for fact in mine])),
                {name: _member_means(mine, name) for name in members},
                float(np.mean([fact.clipped for fact in mine])),
                float(np.mean([fact.uploaded_bytes_per_site for fact in mine])),
                float(np.mean([fact.seconds for fact in mine])),
            )
        )
    return Rounds(
        tuple(means),
        members,
        sum(mean.uploaded_bytes for mean in means),
        sum(mean.clipped for mean in means),
        sum(mean.seconds for mean in means),
        plots.training_curve(facts, "loss", "Training loss of every network over the rounds."),
        plots.training_curve(
            facts, "accuracy", "Training accuracy of every network over the rounds."
        ),
    )


def _member_means(facts: Sequence[RoundFacts], member: str) -> dict[str, float]:
    metrics = [fact.members[member] for fact in facts if member in fact.members]
    names = {name for values in metrics for name in values}
    return {n: float(np.mean([values[n] for values in metrics if n in values])) for n in names}


# --- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Map:
    """The two views of the same points, and the legend of the second."""

    unlabelled: Markup
    labelled: Markup
    legend: tuple[tuple[Markup, str, int], ...]
    others: int
    other_syndromes: int
    drawn: int
    total: int


def _map(view: GramView) -> Map:
    total = len(view.syndromes)
    if total > MAP_IMAGES:
        rows = np.unique(np.linspace(0, total - 1, MAP_IMAGES).round().astype(int))
        view = GramView(
            view.gram[np.ix_(rows, rows)],
            tuple(view.syndromes[i] for i in rows),
            tuple(view.sites[i] for i in rows),
        )
    places = plots.project(view.gram)
    named = plots.compact_syndromes(view)
    groups = [named.index(s) if s in named else None for s in view.syndromes]
    counts = [view.syndromes.count(name) for name in named]
    count = len(groups)
    return Map(
        plots.gram_map(places, [None] * count, f"{count} images as grey dots, without any label."),
        plots.gram_map(
            places,
            groups,
            f"The same {count} images; {len(named)} syndromes have a colour and a shape.",
            named,
        ),
        tuple((plots.marker(i), name, counts[i]) for i, name in enumerate(named)),
        count - sum(counts),
        len(set(view.syndromes)) - len(named),
        count,
        total,
    )


def _shortened(example: Example) -> Example:
    return replace(example, neighbours=example.neighbours[:_NEIGHBOURS])


def _without_faces(example: Example) -> Example:
    neighbours = tuple(replace(neighbour, face=None) for neighbour in example.neighbours)
    return replace(example, face=None, neighbours=neighbours)


def _picture(face: Pixels) -> str:
    """Return an RGB face as a data URI."""
    _, data = cv2.imencode(
        ".jpg", cv2.cvtColor(face, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 88]
    )
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
