"""Figures of the report as inline SVG; pure functions of numbers.

A figure says *what* things are through class names; the style sheet of the page says how they look,
in light, in dark and on paper. Sizes are in SVG user units, meant to be shown at about 1 px each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from fedgestalt.reporting.pictures import GramView
from fedgestalt.reporting.result import RoundFacts, SiteFacts, Table

Floats = NDArray[np.float32]

TOP_K: Final = (1, 5, 10, 30)
GROUPS: Final = 8
"""Most syndromes that a map tells apart by colour and shape."""

MODE_LABELS: Final[Mapping[str, str]] = {
    "federated": "Federated",
    "centralised": "All pooled",
    "local-only": "Each hospital alone",
    "pretrained": "Untouched network",
    "chance": "Chance",
}
"""What a reader calls the keys of an evaluation, in the order of the report."""

_SHORT_LABELS: Final = {"local-only": "Alone", "pretrained": "Untouched"}
_LINE_HEIGHT: Final = 17.0
_PLUS: Final = (
    *((-0.45, -0.45), (-0.45, -1.3), (0.45, -1.3), (0.45, -0.45), (1.3, -0.45), (1.3, 0.45)),
    *((0.45, 0.45), (0.45, 1.3), (-0.45, 1.3), (-0.45, 0.45), (-1.3, 0.45), (-1.3, -0.45)),
)


def ordered_modes(evaluation: Mapping[str, object]) -> list[str]:
    """Return the modes of ``evaluation``: known ones in the order of the report, then others."""
    known = [mode for mode in MODE_LABELS if mode in evaluation]
    return known + [mode for mode in evaluation if mode not in MODE_LABELS]


def mode_class(mode: str) -> str:
    """Class name that gives a mode its colour."""
    return f"m-{mode}" if mode in MODE_LABELS else "m-other"


# --- parts ---------------------------------------------------------------------------------------


def _svg(width: float, height: float, name: str, title: str, parts: Sequence[str]) -> Markup:
    head = Markup('<svg class="plot {}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        name, round(width), round(height), title
    )
    return head + Markup("").join(Markup(part) for part in parts) + Markup("</svg>")  # noqa: S704


def _text(x: float, y: float, text: str, name: str = "", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{name}"/>'


def _points(xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))


def _curve(xs: Sequence[float], ys: Sequence[float], name: str, radius: float) -> str:
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {name}"/>'
        for x, y in zip(xs, ys, strict=True)
    )
    return f'<polyline points="{_points(xs, ys)}" class="curve {name}"/>{dots}'


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions as little as possible so that they keep ``gap`` and their order.

    Adjacent labels that collide are merged into blocks centred on their mean wish (pool adjacent
    violators), then the blocks are shifted into ``low`` .. ``high`` where there is room.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[tuple[float, int]] = []  # (sum of wishes for the block's first label, size)
    for i in order:
        wish, size = min(max(wanted[i], low), high), 1
        while blocks and blocks[-1][0] / blocks[-1][1] + blocks[-1][1] * gap > wish / size:
            before, length = blocks.pop()
            wish, size = before + wish - size * length * gap, size + length
        blocks.append((wish, size))
    placed = [wish / size + step * gap for wish, size in blocks for step in range(size)]
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], high - (len(placed) - 1 - i) * gap)
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    result = [0.0] * len(wanted)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _shortened(text: str, length: int) -> str:
    """Leave out the middle: names of one family differ at their ends."""
    if len(text) <= length:
        return text
    tail = length // 3
    return f"{text[: length - 1 - tail].rstrip()}…{text[-tail:].lstrip()}"


def percent(value: float, digits: int = 0) -> str:
    """Fraction as a percentage with a narrow no-break space."""
    return f"{100 * value:.{digits}f}\u202f%"


# --- accuracy ------------------------------------------------------------------------------------


def topk_curve(
    evaluation: Mapping[str, Mapping[str, Table]], table: str = "frequent", width: int = 600
) -> Markup:
    """Accuracy over the length of the list, one labelled curve per mode.

    Curves are labelled where they start: the first name is what differs most and matters most.
    The band is the interval of ``federated``. Modes without ``table`` are left out.
    """
    modes = [mode for mode in ordered_modes(evaluation) if table in evaluation[mode]]
    height, top, bottom = 360.0, 16.0, 52.0
    narrow = width < 500
    left, right = (134.0, 38.0) if narrow else (182.0, 44.0)
    plot = height - top - bottom
    xs = [left + (width - left - right) * np.log(k) / np.log(TOP_K[-1]) for k in TOP_K]

    def y(value: float) -> float:
        return top + plot * (1 - value)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(left, y(share), width - right, y(share), "grid"))
        parts.append(_text(width - right + 8, y(share) + 4, percent(share), "tick"))
    for k, x in zip(TOP_K, xs, strict=True):
        parts.append(_line(x, y(0), x, y(0) + 5, "axis"))
        parts.append(_text(x, y(0) + 20, str(k), "tick", "middle"))
    middle = (xs[0] + xs[-1]) / 2
    parts.append(_text(middle, height - 8, "Names on the list", "axis-title", "middle"))

    values = {mode: [getattr(evaluation[mode][table], f"top{k}") for k in TOP_K] for mode in modes}
    if "federated" in values and (band := evaluation["federated"][table].interval):
        known = [(x, *band[f"top{k}"]) for k, x in zip(TOP_K, xs, strict=True) if f"top{k}" in band]
        outline = [(x, y(high)) for x, _, high in known] + [
            (x, y(low)) for x, low, _ in known[::-1]
        ]
        corners = _points([x for x, _ in outline], [v for _, v in outline])
        parts.append(f'<polygon points="{corners}" class="band"/>')
    for mode in reversed(modes):
        parts.append(_curve(xs, [y(v) for v in values[mode]], mode_class(mode), 3.2))
    starts = [y(values[mode][0]) for mode in modes]
    labels = spread(starts, _LINE_HEIGHT, top + 4, y(0))
    for mode, start, label in zip(modes, starts, labels, strict=True):
        parts.append(_line(left - 12, label, left - 5, start, f"leader {mode_class(mode)}"))
        name = _SHORT_LABELS.get(mode, "") if narrow else ""
        name = escape(_shortened(name or MODE_LABELS.get(mode, mode), 12 if narrow else 20))
        parts.append(
            f'<text x="{left - 16:.1f}" y="{label + 4:.1f}" text-anchor="end"'
            f' class="label {mode_class(mode)}">{name}'
            f' <tspan class="value">{percent(values[mode][0])}</tspan></text>'
        )
    firsts = ", ".join(f"{MODE_LABELS.get(m, m)} {percent(values[m][0])}" for m in modes)
    title = f"Share of test images whose true syndrome is first on the list: {firsts}."
    return _svg(width, height, "topk", title, parts)


# --- training ------------------------------------------------------------------------------------


def training_curve(rounds: Sequence[RoundFacts], metric: str, title: str) -> Markup:
    """One metric of every member over the rounds, mean over seeds.

    Args:
        rounds: of all seeds.
        metric: ``"accuracy"``, drawn as a percentage, or ``"loss"``.
        title: what the figure shows, for readers who hear it.
    """
    width, height, left, right, top, bottom = 400.0, 240.0, 46.0, 110.0, 14.0, 46.0
    series: dict[str, dict[int, list[float]]] = {}
    for facts in rounds:
        for member, metrics in facts.members.items():
            if metric in metrics:
                series.setdefault(member, {}).setdefault(facts.round, []).append(metrics[metric])
    means = {
        member: {number: float(np.mean(values)) for number, values in sorted(by_round.items())}
        for member, by_round in series.items()
    }
    if not means:
        return Markup("")
    numbers = sorted({number for curve in means.values() for number in curve})
    highest = max(value for curve in means.values() for value in curve.values())
    ticks = _ticks(1.0 if metric == "accuracy" else highest)
    span = max(numbers[-1] - numbers[0], 1)

    def x(number: int) -> float:
        return left + (width - left - right) * (number - numbers[0]) / span

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value / ticks[-1])

    parts = []
    for tick in ticks:
        text = percent(tick) if metric == "accuracy" else f"{tick:g}"
        parts.append(_line(left, y(tick), width - right, y(tick), "grid"))
        parts.append(_text(left - 8, y(tick) + 4, text, "tick", "end"))
    step = -(-len(numbers) // 10)
    for number in numbers[::step]:
        parts.append(_text(x(number), y(0) + 20, str(number), "tick", "middle"))
    middle = (x(numbers[0]) + x(numbers[-1])) / 2
    parts.append(_text(middle, height - 6, "Round", "axis-title", "middle"))
    ends = [y(list(curve.values())[-1]) for curve in means.values()]
    labels = spread(ends, _LINE_HEIGHT, top, y(0))
    for i, (member, curve) in enumerate(means.items()):
        name = f"t-{i % 4 + 1}"
        last = max(curve)
        parts.append(_curve([x(n) for n in curve], [y(v) for v in curve.values()], name, 2.6))
        parts.append(_line(x(last) + 5, ends[i], x(numbers[-1]) + 12, labels[i], f"leader {name}"))
        label = _shortened(member, 12)
        parts.append(_text(x(numbers[-1]) + 16, labels[i] + 4, label, f"label {name}"))
    return _svg(width, height, "training", title, parts)


def _ticks(highest: float) -> list[float]:
    """Four or five round numbers from 0 that reach ``highest``."""
    if not np.isfinite(highest) or highest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** np.floor(np.log10(highest / 4))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power * 4 >= highest * 0.9999)
    return [float(step * i) for i in range(int(np.ceil(highest * 0.9999 / step)) + 1)]


# --- who has what --------------------------------------------------------------------------------


def site_bars(sites: Sequence[SiteFacts]) -> Markup:
    """One bar per hospital: images that train, that are asked about, and that do neither."""
    width, row = 400.0, 46.0
    most = max((site.images for site in sites), default=0) or 1
    parts = []
    for i, site in enumerate(sites):
        top = i * row
        rest = max(site.images - site.training_images - site.queries, 0)
        counts = (("training", site.training_images), ("queries", site.queries), ("rest", rest))
        total = f"{site.images:,} images of {site.subjects:,} people"
        parts.append(_text(0, top + 14, _shortened(site.name, 24), "label"))
        parts.append(_text(width, top + 14, total, "tick", "end"))
        scale = width * site.images / most / max(sum(count for _, count in counts), 1)
        x = 0.0
        for kind, count in counts:
            if not count:
                continue
            length = count * scale
            drawn = max(length - 1.5, 0.5)
            parts.append(
                f'<rect x="{x:.1f}" y="{top + 21:.1f}" width="{drawn:.1f}" height="16" rx="1.5"'
                f' class="bar {kind}"/>'
            )
            if length > 9 * len(f"{count:,}") + 4:
                parts.append(_text(x + 6, top + 33, f"{count:,}", f"count {kind}"))
            x += length
    listed = "; ".join(
        f"{s.name}: {s.images} images, {s.training_images} train, {s.queries} are test images"
        for s in sites
    )
    return _svg(
        width, max(len(sites) * row - 6, 1), "sites", f"Images per hospital. {listed}.", parts
    )


# --- map of the similarities ---------------------------------------------------------------------


def project(gram: Floats, perplexity: float = 30.0, iterations: int = 300) -> Floats:
    """Place images in the plane so that alike images lie close together.

    t-SNE (van der Maaten and Hinton 2008) on squared distances ``2 - 2 * cosine``, started from
    classical scaling (Kobak and Berens 2019), so nothing is random. Of the methods tried on face
    encodings (classical scaling, Laplacian eigenmaps, t-SNE) it alone keeps the neighbours that
    the matrix has: a fine structure of many small groups has no two dominating directions.

    Args:
        gram: (n, n) cosine similarities; about 4 s for n = 2000.
        perplexity: effective number of neighbours; less for small n.
        iterations: steps of gradient descent, the first third exaggerated.

    Returns:
        (n, 2) coordinates, centred; neighbourhoods mean something, long distances do not.
    """
    n = len(gram)
    if n < 4:
        return np.stack([np.arange(n) - (n - 1) / 2, np.zeros(n)], 1).astype(np.float32)
    distances = np.nan_to_num(np.maximum(2 - 2 * gram.astype(np.float64), 0), nan=2.0)
    rows, columns, weights = _affinities(distances, min(perplexity, (n - 1) / 3))
    starts = np.searchsorted(rows, np.arange(n))
    places = _classical_scaling(distances)
    places *= 1e-2 / max(float(places.std()), 1e-12)
    velocity, gain = np.zeros_like(places), np.ones_like(places)
    for step in range(iterations):
        early = step < iterations // 3
        offsets = places[rows] - places[columns]
        pull = (weights / (1 + (offsets**2).sum(1)))[:, None] * offsets
        attraction = np.add.reduceat(pull, starts, axis=0)
        gradient = attraction * (12 if early else 1) - _repulsion(places)
        gain = np.where(gradient * velocity < 0, gain + 0.2, np.maximum(gain * 0.8, 0.01))
        velocity = (0.5 if early else 0.8) * velocity - max(n / 3, 50) * gain * gradient
        places = places + velocity.astype(np.float32)
        places -= places.mean(0)
    return places


def _affinities(
    distances: NDArray[np.float64], perplexity: float
) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Symmetric probabilities that two images are neighbours, as (row, column, weight) by row."""
    n = len(distances)
    k = min(n - 1, int(3 * perplexity) + 1)
    others = distances + np.diag(np.full(n, np.inf))
    nearest = np.argpartition(others, k - 1, axis=1)[:, :k]
    near = np.take_along_axis(others, nearest, 1)
    near -= near.min(1, keepdims=True)
    low, high = np.full((n, 1), 1e-6), np.full((n, 1), 1e9)
    for _ in range(60):  # bisection, on a logarithmic scale, for the wanted entropy
        precision = np.sqrt(low * high)
        weights = np.exp(-near * precision)
        total = weights.sum(1, keepdims=True)
        entropy = np.log(total) + precision * (near * weights).sum(1, keepdims=True) / total
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
    joint = np.zeros((n, n), np.float32)
    np.put_along_axis(joint, nearest, (weights / total).astype(np.float32), 1)
    joint += joint.T.copy()
    rows, columns = np.nonzero(joint)
    return rows, columns, joint[rows, columns] / joint.sum()


def _classical_scaling(distances: NDArray[np.float64]) -> Floats:
    """First two coordinates of classical scaling, by subspace iteration from a fixed start."""
    centred = distances - distances.mean(0) - distances.mean(1)[:, None] + distances.mean()
    inner = (-0.5 * centred).astype(np.float32)
    basis = np.random.default_rng(0).standard_normal((len(inner), 6)).astype(np.float32)
    for _ in range(12):
        basis = np.linalg.qr(inner @ basis)[0]
    values, vectors = np.linalg.eigh(basis.T @ inner @ basis)
    scale = np.sqrt(np.maximum(values[:-3:-1], 1e-12)).astype(np.float32)
    places: Floats = basis @ vectors[:, :-3:-1] * scale
    return places


def _repulsion(places: Floats, block: int = 128) -> Floats:
    """Normalised repulsive force of t-SNE, in blocks of rows that stay in the cache."""
    force, total = np.empty_like(places), 0.0
    squares = (places**2).sum(1)
    for start in range(0, len(places), block):
        mine = slice(start, start + block)
        kernel = places[mine] @ (-2 * places.T)
        kernel += squares
        kernel += squares[mine, None] + 1
        np.reciprocal(kernel, out=kernel)
        total += float(kernel.sum())
        kernel *= kernel
        force[mine] = kernel.sum(1)[:, None] * places[mine] - kernel @ places
    return force / np.float32(max(total - len(places), 1e-12))


def compact_syndromes(view: GramView, limit: int = GROUPS) -> list[str]:
    """Syndromes whose images are most alike, in contrast to the other images; at most ``limit``.

    Of more than ``limit`` syndromes, those with fewer than eight images come last.
    """
    names = np.array(view.syndromes)
    contrast: dict[str, tuple[bool, float]] = {}
    for name in dict.fromkeys(view.syndromes):
        mine = names == name
        count = int(mine.sum())
        own = view.gram[np.ix_(mine, mine)]
        inside = (own.sum() - own.trace()) / max(count * (count - 1), 1)
        outside = view.gram[np.ix_(mine, ~mine)].mean() if count < len(names) else 0.0
        contrast[name] = (count >= 8, float(inside - outside))
    best = sorted(contrast, key=lambda name: contrast[name], reverse=True)[:limit]
    return sorted(best)


def gram_map(
    places: Floats, groups: Sequence[int | None], title: str, names: Sequence[str] = ()
) -> Markup:
    """Images as points; a group has its own colour and shape, None is a plain grey dot.

    Args:
        places: (n, 2) from :func:`project`.
        groups: (n,) 0 .. ``GROUPS`` - 1 or None.
        title: what the figure shows, for readers who hear it.
        names: of the groups, shown when pointed at.
    """
    size, margin = 480.0, 12.0
    low, high = (places.min(0), places.max(0)) if len(places) else (np.zeros(2), np.ones(2))
    scale = (size - 2 * margin) / max(float((high - low).max()), 1e-9)
    at = (places - (low + high) / 2) * scale + size / 2
    radius = float(np.clip(100 / np.sqrt(max(len(places), 1)), 2.6, 5.0))
    members: dict[int | None, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    plain = "".join(f"M{at[i, 0]:.1f} {at[i, 1]:.1f}h0" for i in members.pop(None, []))
    kind = "others" if members else "unknown"
    parts = [f'<path d="{plain}" class="{kind}" stroke-width="{2 * radius:.1f}"/>'] if plain else []
    for group, rows in sorted((g, r) for g, r in members.items() if g is not None):
        shape = _shape(group, radius * 1.15)
        d = "".join(f"M{at[i, 0]:.1f} {at[i, 1]:.1f}{shape}" for i in rows)
        name = f"<title>{escape(names[group])}</title>" if group < len(names) else ""
        parts.append(f'<path d="{d}" class="group g-{group % GROUPS + 1}">{name}</path>')
    return _svg(size, size, "map", title, parts)


def marker(group: int | None) -> Markup:
    """Mark of a group for a legend; None is the grey dot of the others."""
    shape = "M8 8h0" if group is None else f"M8 8{_shape(group, 5.5)}"
    name = "others" if group is None else f"group g-{group % GROUPS + 1}"
    width = ' stroke-width="9"' if group is None else ""
    return Markup(  # noqa: S704
        f'<svg class="marker" viewBox="0 0 16 16" aria-hidden="true">'
        f'<path d="{shape}" class="{name}"{width}/></svg>'
    )


def _shape(group: int, radius: float) -> str:
    """Path of a mark relative to its centre; shapes have about equal areas."""
    r = radius
    outlines: tuple[Sequence[tuple[float, float]] | None, ...] = (
        None,
        ((0, -1.3), (1.2, 0.8), (-1.2, 0.8)),
        ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        ((0, -1.35), (1.2, 0), (0, 1.35), (-1.2, 0)),
        ((0, 1.3), (-1.2, -0.8), (1.2, -0.8)),
        _PLUS,
        ((-0.6, -1.1), (0.6, -1.1), (1.2, 0), (0.6, 1.1), (-0.6, 1.1), (-1.2, 0)),
        ((-1.5, -0.6), (1.5, -0.6), (1.5, 0.6), (-1.5, 0.6)),
    )
    outline = outlines[group % GROUPS]
    if outline is None:
        return (
            f"m{-r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0z"
        )
    x0, y0 = outline[0]
    steps = [(x - px, y - py) for (px, py), (x, y) in pairwise(outline)]
    return (
        f"m{x0 * r:.1f} {y0 * r:.1f}l"
        + " ".join(f"{dx * r:.1f} {dy * r:.1f}" for dx, dy in steps)
        + "z"
    )
