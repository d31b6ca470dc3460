"""The picture of a split: which site has how many images of which syndrome."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final

from markupsafe import Markup, escape

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import Cohort
from fedgestalt.errors import DataError

_LEFT, _TOP, _ROW, _GAP = 236.0, 92.0, 34.0, 16.0
_WIDEST, _ALL_COLUMNS = 30.0, 900.0
_NUMBERED: Final = 15.0  # from this width on, a column says which syndrome it is
_STEPS: Final = 5
_STYLE: Final = Markup("""
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #17212b; }
.title { font-size: 17px; font-weight: 600; } .soft, .column { fill: #53606c; }
.column, .count { font-size: 11px; text-anchor: middle; } .page { fill: #ffffff; }
.s0 { fill: #f1f4f6; } .s1 { fill: #cfe1f3; } .s2 { fill: #94bfe6; } .s3 { fill: #4d92d0; }
.s4 { fill: #1f6bb3; } .s5 { fill: #0a4a86; } .count.s3, .count.s4, .count.s5 { fill: #ffffff; }
.count.s1, .count.s2 { fill: #17212b; } .rule { stroke: #d8dee4; }
@media (prefers-color-scheme: dark) {
  text { fill: #e5eaef; } .soft, .column { fill: #a5b0bb; } .page { fill: #11161b; }
  .s0 { fill: #1a2128; } .s1 { fill: #1d3a57; } .s2 { fill: #24588b; } .s3 { fill: #347dbf; }
  .s4 { fill: #69b1f7; } .s5 { fill: #b9dcff; } .count.s1, .count.s2 { fill: #e5eaef; }
  .count.s3, .count.s4, .count.s5 { fill: #11161b; } .rule { stroke: #303a44; }
}
""")


def write_split_picture(path: Path, silos: Mapping[str, Cohort], how: str) -> None:
    """Write :func:`split_picture` to ``path``.

    Raises:
        DataError: it cannot be written.
    """
    try:
        path.write_text(split_picture(silos, how), encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"the picture cannot be written: {error.strerror}",
            where=str(path),
            remedy="free space; the silos are complete",
        ) from None


def split_picture(silos: Mapping[str, Cohort], how: str) -> Markup:
    """An SVG file with a row per site and a column per syndrome; the darker, the more images.

    Columns are the frequent syndromes in the order of their ids, then the rare ones. Syndromes are
    named by id alone.

    Args:
        silos: by site; all with one label map.
        how: the split in words, for the title.
    """
    held = {site: silo.images_per_syndrome() for site, silo in silos.items()}
    label_map, classes = next((s.syndromes, s.classes) for s in silos.values())
    frequent = sorted(set(label_map) & set(classes))
    rare = sorted(set(label_map) - set(classes))
    most = max((number for counts in held.values() for number in counts.values()), default=1)
    cell = min(_WIDEST, _ALL_COLUMNS / max(len(label_map), 1))
    gap = _GAP if frequent and rare else 0.0
    places = {
        syndrome: _LEFT + index * cell + (gap if index >= len(frequent) else 0.0)
        for index, syndrome in enumerate(frequent + rare)
    }
    width = max(_LEFT + len(places) * cell + gap + 16, 620.0)
    bottom = _TOP + len(silos) * _ROW
    parts = [
        _text(16, 30, f"Who has what: {how}", "title"),
        _text(16, 50, "Images of each syndrome; a column is a syndrome, by its id.", "soft"),
    ]
    for group, name in ((frequent, "Frequent"), (rare, "Rare")):
        if group:
            parts.append(_text(places[group[0]], _TOP - 22, name, "soft"))
    if cell >= _NUMBERED:
        parts += [_text(x + cell / 2, _TOP - 6, str(s), "column") for s, x in places.items()]
    for index, (site, silo) in enumerate(silos.items()):
        top = _TOP + index * _ROW
        shown = site if len(site) <= 22 else f"{site[:21]}…"
        parts.append(_text(16, top + 14, shown, ""))
        size = f"{len(silo.images):,} images, {len(silo.subjects):,} subjects"
        parts.append(_text(16, top + 28, size, "soft"))
        for syndrome, x in places.items():
            parts += _cell(x, top, cell, held[site][syndrome], most)
    parts += _legend(bottom + 22, most)
    parts.append(_text(16, bottom + 62, RESEARCH_USE_ONLY, "soft"))
    spoken = "; ".join(f"{site}: {sum(counts.values())} images" for site, counts in held.items())
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}"'
        ' role="img" aria-label="{title}"><style>{style}</style>'
        '<rect class="page" width="100%" height="100%"/>{parts}</svg>\n'
    ).format(
        w=round(width),
        h=round(bottom + 78),
        title=f"Who has what: {how}. {spoken}.",
        style=_STYLE,
        parts=Markup("").join(Markup(part) for part in parts),  # noqa: S704
    )


def _cell(x: float, top: float, width: float, number: int, most: int) -> list[str]:
    shade = f"s{_step(number, most)}"
    drawn = width - min(1.5, width / 5)
    parts = [
        f'<rect x="{x:.2f}" y="{top:.1f}" width="{drawn:.2f}" height="{_ROW - 2:.0f}"'
        f' class="{shade}"/>'
    ]
    if number and width >= 7.0 * len(str(number)) + 3:
        parts.append(_text(x + drawn / 2, top + 20, str(number), f"count {shade}"))
    return parts


def _step(number: int, most: int) -> int:
    """0 for none, then 1 to 5 of equal steps of the square root, so that small ones are seen."""
    return math.ceil(math.sqrt(number / most) * _STEPS - 1e-9)


def _legend(top: float, most: int) -> list[str]:
    ends = [0, *(int(most * (step / _STEPS) ** 2 + 1e-9) for step in range(1, _STEPS + 1))]
    names = ["0", *(f"{a + 1}-{b}" if b > a + 1 else str(b) for a, b in pairwise(ends))]
    parts = [_text(16, top + 12, "Images", "soft")]
    x = _LEFT
    for step, name in enumerate(names):
        if step and ends[step] == ends[step - 1]:
            continue  # so few images that no number falls into this step
        parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="16" height="16" class="s{step}"/>')
        parts.append(_text(x + 22, top + 12, name, "soft"))
        x += 74
    return parts


def _text(x: float, y: float, text: str, name: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{name}">{escape(text)}</text>'
