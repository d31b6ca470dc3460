"""Make a cohort folder from one CSV and a folder of photographs.

The CSV has the columns ``image`` (path relative to the CSV), ``subject``, ``syndrome`` (its id, or
``unsolved`` for a patient without a diagnosis) and, if wanted, ``hpo`` (ids joined by semicolons)
and any column of ``image_metadata`` that says more about the subject, such as ``gender`` or
``age_year``. File names, which often hold names of patients, are not carried over: images get
numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedgestalt.cohort.gmdb import write_cohort
from fedgestalt.cohort.images import read_photograph, save_jpeg
from fedgestalt.cohort.labels import LabelMap
from fedgestalt.cohort.layout import FACT_COLUMNS, IMAGES, image_file
from fedgestalt.cohort.records import UNSOLVED, Cohort, ImageRecord, RareSplit, Syndrome
from fedgestalt.cohort.tables import (
    Finding,
    Report,
    Row,
    integer,
    is_hpo_id,
    is_kept,
    is_plain_name,
    raise_errors,
    read_table,
)
from fedgestalt.contracts import Pixels
from fedgestalt.errors import ConfigError, DataError

COLUMNS = ("image", "subject", "syndrome")
RARE_SPLITS: Final = 10
UNSOLVED_WORD: Final = "unsolved"


@dataclass(frozen=True)
class Photograph:
    """A sound row of the table.

    Attributes:
        row: its number, the header being 1.
        path: of the file, inside the folder of the table; it may be missing or damaged.
        subject, syndrome, hpo, facts: as in :class:`~fedgestalt.cohort.records.ImageRecord`.
    """

    row: int
    path: Path
    subject: str
    syndrome: int
    hpo: tuple[str, ...]
    facts: dict[str, str]


def photographs(
    table: Path, report: Report, labels: LabelMap | None = None
) -> Iterator[Photograph]:
    """Yield the sound rows of ``table``; every other one goes to ``report``. No file is opened.

    Args:
        table: the CSV.
        report: gets the faults.
        labels: the consortium's label map; without one any integer is a syndrome.
    """
    solved: dict[str, tuple[bool, int]] = {}
    for number, row in read_table(table, table.name, COLUMNS, report):
        try:
            photo = _photograph(table, number, row, labels)
            is_solved = photo.syndrome != UNSOLVED
            known, first = solved.setdefault(photo.subject, (is_solved, number))
            if known != is_solved:
                raise DataError(
                    f"the subject is unsolved here or in row {first}, and has a syndrome in the"
                    " other",
                    remedy="give all images of a subject the same",
                )
            yield photo
        except DataError as error:
            report(Finding("error", table.name, number, error.what, error.remedy))


def import_csv(
    table: Path,
    target: Path,
    align: Callable[[Pixels], Pixels],
    *,
    labels: LabelMap | None = None,
    version: str = "v1.0.0",
    test_share: float = 0.0,
    seed: int = 1,
) -> Cohort:
    """Align the photographs of ``table`` into ``target``, a folder in GMDB layout.

    Args:
        table: the CSV.
        target: the folder to write.
        align: brings a photograph (RGB, EXIF applied) onto the template, 112 x 112.
        labels: the consortium's label map; by default the syndromes of the table, all frequent.
        version: of the metadata files.
        test_share: the share of each syndrome's subjects that is kept out of the gallery, 0 to
            less than 1; at least one subject stays in it. With 0, all images are gallery, and the
            rare ones make one rare split; else rare subjects are dealt anew for each of ten.
        seed: the same seed deals subjects in the same way.

    Raises:
        ConfigError: ``version``, ``test_share`` or ``seed`` makes no sense.
        DataError: the first row that cannot be used, or ``target`` cannot be written.
    """
    if not 0 <= test_share < 1 or seed < 0:
        raise ConfigError(
            f"test share {test_share} with seed {seed}",
            remedy="choose a share from 0 to less than 1 and a seed of 0 or more",
        )
    if not is_plain_name(version):
        raise ConfigError(f"version {version!r} is no plain name", remedy="write such as v1.0.0")
    try:
        (target / IMAGES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the folder cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another folder",
        ) from None
    records: dict[str, ImageRecord] = {}
    unsolved: dict[str, ImageRecord] = {}
    for photo in photographs(table, raise_errors, labels):
        image_id = f"{photo.row - 1:06d}"
        try:
            pixels = align(read_photograph(photo.path))
        except DataError as error:
            raise _fault(table, photo.row, error.what, error.remedy) from None
        place = image_file(target, image_id)
        save_jpeg(place, pixels)
        record = ImageRecord(image_id, photo.subject, photo.syndrome, place, photo.hpo, photo.facts)
        (unsolved if photo.syndrome == UNSOLVED else records)[image_id] = record
    if not records and not unsolved:
        raise DataError("no row", where=table.name, remedy="list at least one photograph")
    if labels is None:
        present = sorted({record.syndrome for record in records.values()})
        labels = LabelMap({i: Syndrome(i, f"syndrome {i}") for i in present}, tuple(present))
    frequent = [r for r in records.values() if r.syndrome in labels.classes]
    rare = [r for r in records.values() if r.syndrome not in labels.classes]
    rng = np.random.default_rng(seed)
    train, test = _dealt(frequent, test_share, rng)
    draws = RARE_SPLITS if test_share else 1
    cohort = Cohort(
        name=target.resolve().name,
        version=version,
        root=target,
        images=records,
        syndromes=labels.syndromes,
        classes=tuple(labels.classes),
        train=train,
        frequent_test=test,
        rare_splits=tuple(
            RareSplit(*_dealt(rare, test_share, rng)) for _ in range(draws if rare else 0)
        ),
        unsolved=unsolved,
    )
    write_cohort(cohort, target)
    return cohort


def _dealt(
    records: Sequence[ImageRecord], share: float, rng: np.random.Generator
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Image ids of gallery and test; a subject with two syndromes goes by the first of them."""
    syndrome_of: dict[str, int] = {}
    for record in records:
        syndrome_of.setdefault(record.subject, record.syndrome)
    members: dict[int, list[str]] = defaultdict(list)
    for subject, syndrome in syndrome_of.items():
        members[syndrome].append(subject)
    tests: set[str] = set()
    for subjects in members.values():
        chosen = rng.permutation(len(subjects))[
            : min(round(share * len(subjects)), len(subjects) - 1)
        ]
        tests |= {subjects[index] for index in chosen}
    return (
        tuple(r.image_id for r in records if r.subject not in tests),
        tuple(r.image_id for r in records if r.subject in tests),
    )


def _photograph(table: Path, number: int, row: Row, labels: LabelMap | None) -> Photograph:
    is_unsolved = row["syndrome"].lower() == UNSOLVED_WORD
    syndrome = UNSOLVED if is_unsolved else integer(row["syndrome"])
    remedy = f"write its id, or {UNSOLVED_WORD}"
    if syndrome is None:
        raise DataError("syndrome is no integer", remedy=remedy)
    if syndrome == UNSOLVED and not is_unsolved:
        raise DataError(f"syndrome {UNSOLVED} stands for no diagnosis", remedy=remedy)
    if labels is not None and not is_unsolved and syndrome not in labels.syndromes:
        raise DataError(
            f"syndrome {syndrome} is not in the label map",
            remedy="correct it, or ask the consortium's lead for the current map",
        )
    hpo = tuple(term.strip() for term in row.get("hpo", "").split(";") if term.strip())
    if not all(map(is_hpo_id, hpo)):
        raise DataError(
            "hpo holds something that is no HPO id",
            remedy="write ids such as HP:0000154, joined by semicolons",
        )
    facts = {column: row[column] for column in FACT_COLUMNS if row.get(column)}
    if not all(map(is_kept, (row["subject"], *facts.values()))):
        raise DataError("a cell has a control character in it", remedy="take it out")
    return Photograph(
        number, _inside(table.parent, row["image"]), row["subject"], syndrome, hpo, facts
    )


def _inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, however the path is written; never one outside of it."""
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError):  # a loop of links; a null character
        raise DataError("the image is no path", remedy="write its relative path") from None
    if Path(name).is_absolute() or not path.is_relative_to(folder.resolve()):
        raise DataError(
            "the image lies outside the folder of the table",
            remedy="move it there and write its relative path",
        )
    return path


def _fault(table: Path, number: int, what: str, remedy: str) -> DataError:
    return Finding("error", table.name, number, what, remedy).as_error()
