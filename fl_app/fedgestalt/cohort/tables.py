"""Tables of a cohort folder: strict reading of CSV and TSV, and the faults found in them.

A fault is a :class:`Finding`. The reader hands each to a :data:`Report`, which raises the first one
(reading a cohort) or collects all (checking a cohort). Findings name files and rows, never
subjects.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedgestalt.errors import DataError

Row = Mapping[str, str]

_NOT_KEPT = re.compile(r"[\x00\r\ud800-\udfff]")
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_HPO_ID = re.compile(r"HP:[0-9]{7}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Finding:
    """Something wrong in a cohort folder.

    Attributes:
        severity: an ``error`` keeps the cohort from being used, a ``warning`` does not.
        file: relative to the cohort's folder, with forward slashes.
        row: line of the file as a spreadsheet counts, the header being 1; None if it is no line.
        what: what is wrong, without a full stop; names no subject.
        remedy: what the reader can do.
    """

    severity: Literal["error", "warning"]
    file: str
    row: int | None
    what: str
    remedy: str

    def as_error(self) -> DataError:
        """The finding as one sentence."""
        row = "" if self.row is None else f", row {self.row}"
        return DataError(self.what, where=f"{self.file}{row}", remedy=self.remedy)


Report = Callable[[Finding], None]
"""Called with each finding; may raise."""


def raise_errors(finding: Finding) -> None:
    """The report of a strict reader: errors are raised, warnings passed over.

    Raises:
        DataError: ``finding`` is an error.
    """
    if finding.severity == "error":
        raise finding.as_error()


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is safe as a file name: letters, digits, dot, hyphen, underscore."""
    return _PLAIN_NAME.fullmatch(name) is not None


def is_kept(cell: str) -> bool:
    """Whether a table gives ``cell`` back as it was written.

    Space around it is stripped when it is read; a carriage return would end the row, and null
    characters and lone surrogates are no text.
    """
    return cell == cell.strip() and not _NOT_KEPT.search(cell)


def integer(text: str) -> int | None:
    """The whole number that ``text`` is, of nine digits at most; None if it is none."""
    return int(text) if _INTEGER.fullmatch(text) else None


def is_hpo_id(term: str) -> bool:
    """Whether ``term`` has the form of a term of the Human Phenotype Ontology, ``HP:0000154``."""
    return _HPO_ID.fullmatch(term) is not None


def read_text(path: Path, file: str, report: Report) -> str | None:
    """The UTF-8 text of ``path``; None after a report. ``file`` is its name in findings."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "the file is missing" if not path.exists() else f"cannot be read: {error.strerror}"
        report(Finding("error", file, None, reason, "copy the complete folder again"))
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        report(Finding("error", file, row, "not UTF-8 text", "save the file as UTF-8"))
        return None
    if not text.strip():
        remedy = "write at least the line with the column names"
        report(Finding("error", file, None, "the file is empty", remedy))
        return None
    return text


def read_table(
    path: Path,
    file: str,
    columns: Sequence[str],
    report: Report,
    *,
    may_be_empty: Sequence[str] = (),
) -> Iterator[tuple[int, Row]]:
    """Yield (row number, cells by column) of a CSV, or of a TSV if the name ends in ``.tsv``.

    Cells are stripped. Every one of ``columns`` is there, and filled unless it is one of
    ``may_be_empty``; a row that breaks this is reported and skipped.
    """
    text = read_text(path, file, report)
    if text is None:
        return
    lines = csv.reader(
        io.StringIO(text, newline=""),  # other line breaks of Unicode are letters of a cell
        delimiter="\t" if path.suffix == ".tsv" else ",",
        strict=True,
    )
    try:
        header = [cell.strip() for cell in next(lines)]
        missing = [column for column in columns if column not in header]
        if missing:
            what = f"no column {_listed(missing)}; the columns are {_listed(header)}"
            report(Finding("error", file, 1, what, "add the column or correct its name"))
            return
        for cells in lines:
            if not any(cells):
                continue
            if len(cells) != len(header):
                what = f"{len(cells)} cells where the header has {len(header)}"
                report(Finding("error", file, lines.line_num, what, "complete the row"))
                continue
            row = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
            empty = [c for c in columns if not row[c] and c not in may_be_empty]
            if empty:
                what = f"nothing in column {_listed(empty)}"
                report(Finding("error", file, lines.line_num, what, "fill it in or drop the row"))
                continue
            yield lines.line_num, row
    except csv.Error as error:
        report(Finding("error", file, lines.line_num, f"not a table: {error}", "export it again"))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV, or a TSV if the name ends in ``.tsv``; UTF-8, one line feed per row.

    Raises:
        DataError: a cell would not be read as it was written; see :func:`is_kept`.
    """
    delimiter = "\t" if path.suffix == ".tsv" else ","
    cells = [[str(cell) for cell in row] for row in rows]
    for number, row in enumerate(cells, 2):
        for column, cell in zip(columns, row, strict=True):
            if not is_kept(cell):
                what = f"a value of {column!r} has space around it or a control character in it"
                raise Finding("error", path.name, number, what, "take it out").as_error()
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(cells)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
