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
from fedgestalt.cohort.tables import is_plain_name, raise_errors, write_table
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


def write_cohort(cohort: Cohort, target: Path) -> None:
    """Write ``cohort`` into the folder ``target`` in GMDB layout.

    Images that lie elsewhere are hard-linked, or copied where that is not possible; images that lie
    where they belong are left alone.

    Raises:
        DataError: an image is missing, an image id or the version is no plain name, or ``target``
            cannot be written.
    """
    if not all(is_plain_name(name) for name in (cohort.version, *cohort.images, *cohort.unsolved)):
        raise DataError(
            "the version or an image id is not a plain name",
            where=cohort.name,
            remedy="use letters, digits, dot, hyphen and underscore",
        )
    folder = target / METADATA
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (target / IMAGES).mkdir(exist_ok=True)
        for record in (*cohort.images.values(), *cohort.unsolved.values()):
            _link(record.path, image_file(target, record.image_id))
        _write_listings(cohort, folder)
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


def _link(source: Path, place: Path) -> None:
    if place.exists():
        if place.samefile(source):
            return
        place.unlink()
    try:
        place.hardlink_to(source)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, place)


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
    for kind, splits in sides.items():
        numbered = [
            (r.image_id, r.subject, r.syndrome, number)
            for number, members in enumerate(splits)
            for r in cohort.records(members)
        ]
        path = folder / f"gmdb_{kind}_images_{cohort.version}.csv"
        write_table(path, (*IMAGE_COLUMNS, "split"), numbered)
    if cohort.unsolved:
        unsolved = [(r.image_id, r.subject) for r in cohort.unsolved.values()]
        path = folder / f"gmdb_{UNSOLVED_FILE}_images_{cohort.version}.csv"
        write_table(path, UNSOLVED_COLUMNS, unsolved)


def _write_syndromes(cohort: Cohort, folder: Path) -> None:
    """Write the whole label map, with the images and numbers of this folder only."""
    members: dict[int, list[ImageRecord]] = defaultdict(list)
    for record in cohort.images.values():
        members[record.syndrome].append(record)
    rows = (
        (
            syndrome.id,
            syndrome.name,
            f"[{', '.join(record.image_id for record in members[syndrome.id])}]",
            len({record.subject for record in members[syndrome.id]}),
            len(members[syndrome.id]),
        )
        for _, syndrome in sorted(cohort.syndromes.items())
    )
    write_table(folder / f"gmdb_syndromes_{cohort.version}.tsv", SYNDROME_COLUMNS, rows)


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
