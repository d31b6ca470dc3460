"""A cohort as a complete GMDB folder that shares no file with where it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedgestalt.cohort.encodings import EncodingTable, write_encodings
from fedgestalt.cohort.gmdb import read_cohort, write_cohort
from fedgestalt.cohort.layout import ENCODINGS, IMAGES
from fedgestalt.cohort.records import Cohort
from fedgestalt.errors import DataError


def export_cohort(
    cohort: Cohort,
    target: Path,
    *,
    version: str | None = None,
    encodings: EncodingTable | None = None,
) -> Cohort:
    """Write every file of the layout into ``target``, copy the images, and read it back.

    Args:
        cohort: what to export.
        target: the folder to write.
        version: of the new files, such as ``v1.1.0``; that of ``cohort`` by default.
        encodings: of all its images, if they are to go along.

    Returns:
        The cohort as it is read from ``target``.

    Raises:
        DataError: the layout cannot hold the cohort, ``target`` cannot be written, the encodings
            are of other images, or the images changed meanwhile.
    """
    cohort = replace(cohort, version=version or cohort.version)
    if encodings is not None:
        encodings.of_images(list(cohort.images))  # raises if they do not belong together
    before = cohort.digest
    write_cohort(cohort, target, copy=True)
    if encodings is not None:
        place = target / ENCODINGS / f"encodings_{cohort.version}.csv"
        try:
            place.parent.mkdir(exist_ok=True)
            write_encodings(place, encodings)
        except OSError as error:
            raise DataError(
                f"the encodings cannot be written: {error.strerror}",
                where=str(target),
                remedy="free space, or choose another folder",
            ) from error
    written = read_cohort(target, name=cohort.name)
    if written.digest != before:
        raise DataError(
            "what was written is not what was read",
            where=IMAGES,
            remedy="wait until nobody writes to the folder, and export again",
        )
    return written
