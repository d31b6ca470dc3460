"""Make a cohort folder from one CSV and a folder of photographs.

The CSV has the columns ``image`` (path relative to the CSV), ``subject``, ``syndrome`` (its id, or
``unsolved`` for a patient without a diagnosis) and, if wanted, ``hpo`` (ids joined by semicolons).
File names, which often hold names of patients, are not carried over: images get numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedgestalt.cohort.gmdb import write_cohort
from fedgestalt.cohort.images import read_photograph, save_jpeg
from fedgestalt.cohort.layout import IMAGES, image_file
from fedgestalt.cohort.records import UNSOLVED, Cohort, ImageRecord, RareSplit, Syndrome
from fedgestalt.cohort.tables import Finding, Row, raise_errors, read_table
from fedgestalt.contracts import Pixels
from fedgestalt.errors import DataError

COLUMNS = ("image", "subject", "syndrome")
UNSOLVED_WORD = "unsolved"
_WRITE = f"write its id, or {UNSOLVED_WORD}"


def import_csv(
    table: Path,
    target: Path,
    align: Callable[[Pixels], Pixels],
    *,
    syndromes: Mapping[int, Syndrome] | None = None,
    classes: Sequence[int] | None = None,
    version: str = "v1.0.0",
) -> Cohort:
    """Align the photographs of ``table`` into ``target``, a folder in GMDB layout.

    All images of diagnosed patients become gallery: of frequent syndromes for training, of rare
    ones as one rare split.

    Args:
        table: the CSV.
        target: the folder to write.
        align: brings a photograph (RGB, EXIF applied) onto the template, 112 x 112.
        syndromes: the consortium's label map; by default what the table holds.
        classes: ids of its frequent syndromes, in class order; by default all, ascending.
        version: of the metadata files.

    Raises:
        DataError: the first row that cannot be used.
    """
    records: dict[str, ImageRecord] = {}
    unsolved: dict[str, ImageRecord] = {}
    try:
        (target / IMAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another folder",
        ) from None
    for number, row in read_table(table, table.name, COLUMNS, raise_errors):
        image_id = f"{number - 1:06d}"
        try:
            is_unsolved = row["syndrome"].lower() == UNSOLVED_WORD
            syndrome = UNSOLVED if is_unsolved else int(row["syndrome"])
            if syndrome == UNSOLVED and not is_unsolved:
                raise DataError(f"syndrome {UNSOLVED} stands for no diagnosis", remedy=_WRITE)
            if syndromes is not None and not is_unsolved and syndrome not in syndromes:
                raise DataError(f"syndrome {syndrome} is not in the label map")
            pixels = align(read_photograph(_photograph(table.parent, row)))
        except ValueError:
            raise _fault(table, number, "syndrome is no integer", _WRITE) from None
        except DataError as error:
            raise _fault(table, number, error.what, error.remedy) from None
        place = image_file(target, image_id)
        save_jpeg(place, pixels)
        hpo = tuple(term.strip() for term in row.get("hpo", "").split(";") if term.strip())
        record = ImageRecord(image_id, row["subject"], syndrome, place, hpo)
        (unsolved if is_unsolved else records)[image_id] = record
    _check_unsolved(table, records, unsolved)
    if not records and not unsolved:
        raise DataError("no row", where=table.name, remedy="list at least one photograph")
    if syndromes is None:
        present = sorted({record.syndrome for record in records.values()})
        syndromes = {i: Syndrome(i, f"syndrome {i}") for i in present}
    classes = tuple(sorted(syndromes) if classes is None else classes)
    rare = tuple(i for i, record in records.items() if record.syndrome not in classes)
    cohort = Cohort(
        name=target.resolve().name,
        version=version,
        root=target,
        images=records,
        syndromes=syndromes,
        classes=classes,
        train=tuple(i for i in records if i not in rare),
        rare_splits=(RareSplit(rare, ()),) if rare else (),
        unsolved=unsolved,
    )
    write_cohort(cohort, target)
    return cohort


def _check_unsolved(
    table: Path, records: Mapping[str, ImageRecord], unsolved: Mapping[str, ImageRecord]
) -> None:
    """Image ids are row numbers: raise DataError for the first subject that is both."""
    diagnosed = {record.subject for record in records.values()}
    for image_id, record in unsolved.items():
        if record.subject in diagnosed:
            what = "the subject of this unsolved image has a syndrome in another row"
            raise _fault(table, int(image_id) + 1, what, "give all images of a subject the same")


def _photograph(folder: Path, row: Row) -> Path:
    path = (folder / row["image"]).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise DataError(
            "the image lies outside the folder of the table",
            remedy="move it there and write its relative path",
        )
    return path


def _fault(table: Path, number: int, what: str, remedy: str) -> DataError:
    return Finding("error", table.name, number, what, remedy).as_error()
