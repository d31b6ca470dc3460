"""Cohort folders in the layout of GestaltMatcher DB: read strictly, written completely.

The layout is in :mod:`fedgestalt.cohort.layout`, the rules that a folder must keep in
:mod:`fedgestalt.cohort.scan`.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

from fedgestalt.cohort.layout import (
    FACT_COLUMNS,
    IDENTIFIERS,
    IMAGE_COLUMNS,
    IMAGES,
    METADATA,
    METADATA_COLUMNS,
    SYNDROME_COLUMNS,
    UNSOLVED_COLUMNS,
    UNSOLVED_FILE,
    image_file,
)
from fedgestalt.cohort.records import Cohort, ImageRecord
from fedgestalt.cohort.scan import scan
from fedgestalt.cohort.tables import is_hpo_id, is_plain_name, raise_errors, write_table
from fedgestalt.errors import DataError


def read_cohort(root: Path, name: str | None = None) -> Cohort:
    """Read a folder in GMDB layout; images are looked for, not decoded.

    Args:
        root: the folder that holds ``gmdb_metadata`` and ``gmdb_align``.
        name: of the cohort; the folder's name by default.

    Raises:
        DataError: the first fault, with file, row and remedy.
    """
    return scan(root, raise_errors).cohort(name)


def write_cohort(cohort: Cohort, target: Path, *, copy: bool = False) -> None:
    """Write ``cohort`` into the folder ``target`` in GMDB layout: every file, nothing invented.

    Reading the folder gives the same cohort, but for rare splits at the end that hold no image.
    Images that lie elsewhere are hard-linked, or copied where that is not possible; images that lie
    where they belong are left alone.

    Args:
        cohort: what to write.
        target: the folder; made if it is not there.
        copy: copy all images, so that the folders share no file.

    Raises:
        DataError: the layout cannot hold the cohort, an image cannot be read, or ``target`` cannot
            be written.
    """
    _check_layout_holds(cohort)
    folder = target / METADATA
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (target / IMAGES).mkdir(exist_ok=True)
        for record in (*cohort.images.values(), *cohort.unsolved.values()):
            _place(record.path, image_file(target, record.image_id), copy=copy)
        _write_listings(cohort, folder)
        _write_unsolved(cohort, folder)
        _write_syndromes(cohort, folder)
        _write_metadata(cohort, folder)
        lookup = f"classifier output: syndrome id\n{json.dumps(cohort.classes)}\n"
        path = folder / f"lookup_table_{cohort.version}.txt"
        path.write_text(lookup, encoding="utf-8", newline="\n")
    except OSError as error:
        raise DataError(
            f"the cohort cannot be written: {error.strerror}",
            where=str(target),
            remedy="free space, or choose another folder",
        ) from error


def _check_layout_holds(cohort: Cohort) -> None:
    """Raise DataError if something of ``cohort`` would be lost or could not be read back."""
    if not all(is_plain_name(name) for name in (cohort.version, *cohort.images, *cohort.unsolved)):
        raise DataError(
            "the version or an image id is not a plain name",
            where=cohort.name,
            remedy="use letters, digits, dot, hyphen and underscore",
        )
    records = (*cohort.images.values(), *cohort.unsolved.values())
    rare = (i for split in cohort.rare_splits for i in split.gallery + split.test)
    listed = {*cohort.frequent_gallery, *cohort.frequent_test, *rare}
    for wrong, what, remedy in (
        (cohort.images.keys() - listed, "images play no part", "give each a part or leave it out"),
        (listed - cohort.images.keys(), "listed images have no record", "leave them out"),
        (
            {r.image_id for r in records if not set(r.facts) <= set(FACT_COLUMNS)},
            "images have facts for which there is no column",
            f"keep to {', '.join(FACT_COLUMNS)}",
        ),
        (
            {r.image_id for r in records if not all(map(is_hpo_id, r.hpo))},
            "images have a feature that is no HPO id",
            "write ids such as HP:0000154",
        ),
    ):
        if wrong:
            raise DataError(f"{len(wrong)} {what}", where=cohort.name, remedy=remedy)


def _place(source: Path, place: Path, *, copy: bool) -> None:
    try:
        before = source.stat()
        if place.exists():
            if place.samefile(source):
                return
            place.unlink()
        if not copy:
            try:
                place.hardlink_to(source)
            except OSError:  # another file system, or one without links
                copy = True
        if copy:
            shutil.copyfile(source, place)
        after = source.stat()
    except FileNotFoundError:
        if source.exists():
            raise
        raise _changed("an image of the cohort is no longer there") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise _changed("an image of the cohort changed while it was copied")


def _changed(what: str) -> DataError:
    return DataError(what, where=IMAGES, remedy="wait until nobody writes to the folder, try again")


def _write_listings(cohort: Cohort, folder: Path) -> None:
    roles = {
        "train": cohort.train,
        "val": cohort.validation,
        "test": cohort.frequent_test,
        "frequent_gallery": cohort.frequent_gallery,
        "frequent_test": cohort.frequent_test,
    }
    for kind, members in roles.items():
        rows = [(r.image_id, r.subject, r.syndrome) for r in cohort.records(members)]
        write_table(folder / f"gmdb_{kind}_images_{cohort.version}.csv", IMAGE_COLUMNS, rows)
    sides = {
        "rare_gallery": [split.gallery for split in cohort.rare_splits],
        "rare_test": [split.test for split in cohort.rare_splits],
    }
    # A reader takes the lowest of 0 and 1 that occurs for the first split.
    first = next((int(not (s.gallery or s.test)) for s in cohort.rare_splits), 0)
    for kind, splits in sides.items():
        numbered = [
            (r.image_id, r.subject, r.syndrome, number)
            for number, members in enumerate(splits, first)
            for r in cohort.records(members)
        ]
        path = folder / f"gmdb_{kind}_images_{cohort.version}.csv"
        write_table(path, (*IMAGE_COLUMNS, "split"), numbered)


def _write_unsolved(cohort: Cohort, folder: Path) -> None:
    if cohort.unsolved:
        rows = [(r.image_id, r.subject) for r in cohort.unsolved.values()]
        path = folder / f"gmdb_{UNSOLVED_FILE}_images_{cohort.version}.csv"
        write_table(path, UNSOLVED_COLUMNS, rows)


def _write_syndromes(cohort: Cohort, folder: Path) -> None:
    """Write the whole label map, with the images and numbers of this folder only."""
    members: dict[int, list[ImageRecord]] = defaultdict(list)
    for record in cohort.images.values():
        members[record.syndrome].append(record)
    columns: tuple[str, ...] = SYNDROME_COLUMNS
    if any(syndrome.identifiers for syndrome in cohort.syndromes.values()):
        columns = (*SYNDROME_COLUMNS, IDENTIFIERS)
    rows = (
        (
            syndrome.id,
            syndrome.name,
            f"[{', '.join(record.image_id for record in members[syndrome.id])}]",
            len({record.subject for record in members[syndrome.id]}),
            len(members[syndrome.id]),
            ";".join(syndrome.identifiers),
        )[: len(columns)]
        for _, syndrome in sorted(cohort.syndromes.items())
    )
    write_table(folder / f"gmdb_syndromes_{cohort.version}.tsv", columns, rows)


def _write_metadata(cohort: Cohort, folder: Path) -> None:
    rows = []
    for record in (*cohort.images.values(), *cohort.unsolved.values()):
        syndrome = cohort.syndromes.get(record.syndrome)
        cells = dict(record.facts) | {
            "image_id": record.image_id,
            "patient_id": record.subject,
            "internal_syndrome_id": str(syndrome.id) if syndrome else "",
            "internal_syndrome_name": syndrome.name if syndrome else "",
            "present_features": ";".join(record.hpo),
        }
        rows.append([cells.get(column, "") for column in METADATA_COLUMNS])
    write_table(folder / f"image_metadata_{cohort.version}.tsv", METADATA_COLUMNS, rows)
