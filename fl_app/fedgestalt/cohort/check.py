"""What a data steward wants to know before anything runs: every fault of a cohort folder."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from fedgestalt.cohort.images import load_image
from fedgestalt.cohort.layout import METADATA
from fedgestalt.cohort.records import Cohort
from fedgestalt.cohort.scan import Listing, scan
from fedgestalt.cohort.tables import Finding
from fedgestalt.contracts import FACE_SIZE
from fedgestalt.errors import DataError


def check_cohort(root: Path) -> list[Finding]:
    """All faults of a folder in GMDB layout; empty if there are none.

    Besides what keeps :func:`~fedgestalt.cohort.gmdb.read_cohort` from reading it, these are images
    that cannot be decoded, are not 112 x 112 or are the same for two subjects (errors), subjects
    with two syndromes, and syndromes with one subject (warnings). Findings name no subject.
    """
    findings: list[Finding] = []
    try:
        found = scan(root, findings.append)
    except DataError as error:
        return [*findings, Finding("error", error.where, None, error.what, error.remedy)]
    listings, cohort = {**found.first_listings(), **found.unsolved}, found.cohort()
    findings += _image_findings(cohort, listings)
    findings += _diagnosis_findings(cohort, listings)
    return findings


def _image_findings(cohort: Cohort, listings: dict[str, Listing]) -> Iterator[Finding]:
    seen: dict[bytes, Listing] = {}
    for image_id, record in {**cohort.images, **cohort.unsolved}.items():
        row = listings[image_id]
        try:
            pixels = load_image(record)
        except DataError as error:
            yield Finding("error", row.file, row.row, error.what, error.remedy)
            continue
        height, width, _ = pixels.shape
        if (height, width) != (FACE_SIZE, FACE_SIZE):
            what = f"the image is {width} x {height} pixels, not {FACE_SIZE} x {FACE_SIZE}"
            yield Finding("error", row.file, row.row, what, "align the photograph again")
        twin = seen.setdefault(hashlib.sha256(pixels.tobytes()).digest(), row)
        if twin.subject != row.subject:
            what = f"the same image belongs to another subject in {twin.file}, row {twin.row}"
            yield Finding("error", row.file, row.row, what, "find out whose image it is")


def _diagnosis_findings(cohort: Cohort, listings: dict[str, Listing]) -> Iterator[Finding]:
    subjects: dict[int, set[str]] = defaultdict(set)
    first: dict[str, Listing] = {}
    told: set[str] = set()
    for image_id in cohort.images:
        row = listings[image_id]
        subjects[row.label].add(row.subject)
        known = first.setdefault(row.subject, row)
        if known.label != row.label and row.subject not in told:
            told.add(row.subject)
            what = f"the subject has another syndrome in {known.file}, row {known.row}"
            yield Finding("warning", row.file, row.row, what, "make sure that both are meant")
    lonely = sorted(syndrome for syndrome, members in subjects.items() if len(members) < 2)
    if lonely:
        file = f"{METADATA}/gmdb_syndromes_{cohort.version}.tsv"
        what = f"syndromes with one subject only: {', '.join(map(str, lonely))}"
        remedy = "add subjects, or expect that only other sites can match them"
        yield Finding("warning", file, None, what, remedy)
