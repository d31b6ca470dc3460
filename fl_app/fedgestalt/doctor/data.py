"""The site's cohort: is it sound, and how much is it? Counts only; nobody in it is named."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from fedgestalt.cohort import Cohort, Finding, check_cohort, read_cohort, read_label_map
from fedgestalt.doctor.findings import Check, Figure, check, counted, ok, problem, warning
from fedgestalt.errors import DataError

_KINDS: Final = 4
_REMEDY: Final = "run `fedgestalt cohort check` on the folder for every row, and correct the tables"

# What may be shown of a finding: sizes in pixels, rows, and the names of the cohort's tables. All
# other numbers and quoted words could be a label, an image or a subject.
_SHOWN: Final = re.compile(
    r"(?P<kept>\d+ x \d+ pixels|not \d+ x \d+|row \d+|larger than \d+ MB"
    r"|(?:gmdb_metadata/)?gmdb_\w+_images_[\w.-]+\.csv)"
    r"|\[[^\]]*\]|'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[A-Za-z_.-]*\d[\w.,-]*(?:, \d[\w.-]*)*"
)
_HEADER: Final = "; the columns are"  # a table without a header line shows its first row there


def sound_cohort(folder: Path) -> Cohort | None:
    """The cohort in ``folder``; None if it cannot be used, which :func:`data` explains."""
    try:
        return read_cohort(folder)
    except DataError:
        return None


@check("data.cohort")
def data(folder: Path, agreed: Path | None = None) -> Iterator[Check]:
    """Every fault of the cohort folder, by kind, with the first place where it occurs.

    ``agreed`` is the folder with the consortium's label map, if the site compares its own with it.
    """
    findings = check_cohort(folder, labels=read_label_map(agreed) if agreed else None)
    errors = [finding for finding in findings if finding.severity == "error"]
    warnings = [finding for finding in findings if finding.severity == "warning"]
    figures: dict[str, Figure] = {
        "errors": len(errors),
        "warnings": len(warnings),
        "kinds": kinds(findings),
    }
    cohort = sound_cohort(folder)
    if errors:
        what = f"{counted(len(errors), 'error')}: {_first(kinds(errors))}"
        yield problem("data.cohort", what, _REMEDY, **figures)
        return
    if cohort is None:  # reading and checking must agree
        yield problem("data.cohort", "the cohort cannot be read", _REMEDY, **figures)
        return
    figures |= {
        "images": len(cohort.images),
        "training_images": len(cohort.train),
        "subjects": len(cohort.subjects),
        "syndromes": len(cohort.images_per_syndrome()),
    }
    size = (
        f"{counted(len(cohort.images), 'image')} of {counted(len(cohort.subjects), 'subject')},"
        f" {len(cohort.train):,} of them to train with"
    )
    if warnings:
        what = f"{size}; {counted(len(warnings), 'warning')}: {_first(kinds(warnings))}"
        yield warning("data.cohort", what, _REMEDY, **figures)
    else:
        yield ok("data.cohort", size, **figures)


def kinds(findings: Iterable[Finding]) -> list[str]:
    """Kinds of findings, most frequent first, with how often and where first; names no one."""
    numbers: Counter[str] = Counter()
    places: dict[str, str] = {}
    for finding in findings:
        kind = unnamed(finding.what)
        row = f", row {finding.row}" if finding.row else ""
        places.setdefault(kind, f"{finding.file}{row}")
        numbers[kind] += 1
    return [
        f"{kind} ({places[kind]}{f'; {number} times' if number > 1 else ''})"
        for kind, number in numbers.most_common()
    ]


def unnamed(what: str) -> str:
    """The words of a finding without anything that could be a label, an image or a subject."""
    return _SHOWN.sub(lambda match: match["kept"] or "…", what.partition(_HEADER)[0])


def _first(described: list[str]) -> str:
    more = len(described) - _KINDS
    shown = "; ".join(described[:_KINDS])
    return f"{shown}; and {more} more kinds" if more > 0 else shown
