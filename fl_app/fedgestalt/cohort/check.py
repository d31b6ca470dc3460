"""What a data steward wants to know before anything runs: every fault of a site's data.

A site keeps a folder in GMDB layout (:func:`check_cohort`), or begins with one CSV and a folder of
photographs (:func:`check_table`). Findings name files and rows, never subjects or images.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedgestalt.cohort.duplicates import Fingerprint, copies, fingerprint
from fedgestalt.cohort.images import decode_photograph, exif_orientation, photograph_bytes
from fedgestalt.cohort.labels import LabelMap, differences, label_map_of
from fedgestalt.cohort.layout import IMAGES, METADATA
from fedgestalt.cohort.phenotype import ontology_is_installed, outdated_terms
from fedgestalt.cohort.records import UNSOLVED, Cohort
from fedgestalt.cohort.scan import Listing, Scan, scan
from fedgestalt.cohort.simple import photographs
from fedgestalt.cohort.tables import Finding
from fedgestalt.contracts import FACE_SIZE, AlignedFace, Pixels
from fedgestalt.errors import DataError

FaceFinder = Callable[[Pixels], AlignedFace]
"""Aligns the face in an RGB photograph; raises DataError if there is none that can be used."""

_UPRIGHT: Final = 1


@dataclass(frozen=True)
class Counts:
    """How much a cohort holds: numbers alone, which may leave the site.

    Attributes:
        images, subjects, syndromes: in all; syndromes that have an image here.
        training, validation, frequent_test: images of each part.
        rare_splits: how many there are.
        images_per_syndrome, subjects_per_syndrome: of each syndrome that has some here, the largest
            first; they do not say which syndrome.
    """

    images: int
    subjects: int
    syndromes: int
    training: int
    validation: int
    frequent_test: int
    rare_splits: int
    images_per_syndrome: tuple[int, ...]
    subjects_per_syndrome: tuple[int, ...]


def counts_of(cohort: Cohort) -> Counts:
    """Count what a cohort holds."""
    subjects: dict[int, set[str]] = defaultdict(set)
    for record in cohort.images.values():
        subjects[record.syndrome].add(record.subject)
    return Counts(
        images=len(cohort.images),
        subjects=len(cohort.subjects),
        syndromes=len(subjects),
        training=len(cohort.train),
        validation=len(cohort.validation),
        frequent_test=len(cohort.frequent_test),
        rare_splits=len(cohort.rare_splits),
        images_per_syndrome=tuple(sorted(cohort.images_per_syndrome().values(), reverse=True)),
        subjects_per_syndrome=tuple(sorted(map(len, subjects.values()), reverse=True)),
    )


def check_cohort(
    root: Path, *, labels: LabelMap | None = None, find_face: FaceFinder | None = None
) -> list[Finding]:
    """All faults of a folder in GMDB layout; empty if there are none.

    Errors keep :func:`~fedgestalt.cohort.gmdb.read_cohort` from reading it, or are images that
    cannot be decoded, are not 112 x 112 or are the same for two subjects, a folder that changes
    while it is read, and rows that differ from ``labels``. Warnings are images that look the same
    for two subjects (:mod:`~fedgestalt.cohort.duplicates`) or ask to be turned, subjects with two
    syndromes, syndromes with one subject, and HPO terms or identifiers that do not exist.

    Args:
        root: the folder.
        labels: the consortium's label map, if the folder is to be compared with it.
        find_face: also looks for the face in every image; for photographs that are aligned already
            this is slow and rarely useful. One without a face, or with several, is a warning.
    """
    findings: list[Finding] = []
    before = _files(root / IMAGES)
    try:
        found = scan(root, findings.append)
    except DataError as error:
        return [*findings, Finding("error", error.where, None, error.what, error.remedy)]
    cohort, listings = found.cohort(), found.first_listings()
    rows = {image_id: listings[image_id] for image_id in cohort.images}
    pictures = _Pictures(find_face, aligned=True)
    for image_id, record in cohort.images.items():
        findings += pictures.look(record.path, rows[image_id])
    for image_id, record in cohort.unsolved.items():
        findings += pictures.look(record.path, found.unsolved[image_id])
    findings += pictures.copies()
    after = _files(root / IMAGES)
    changed = sum(before.get(name) != after.get(name) for name in before.keys() | after.keys())
    if changed:
        what = f"the folder changed while it was read ({changed} of its files)"
        findings.append(
            Finding("error", IMAGES, None, what, "wait until nobody writes to it, check again")
        )
    findings += _diagnosis_findings(rows.values())
    findings += _lonely(rows.values(), f"{METADATA}/gmdb_syndromes_{cohort.version}.tsv")
    findings += _label_findings(cohort, found, labels)
    file = f"{METADATA}/image_metadata_{cohort.version}.tsv"
    terms = ((found.metadata_rows[image_id], hpo) for image_id, hpo in found.hpo.items())
    findings += _term_findings(file, list(terms))
    return findings


def check_table(
    table: Path, find_face: FaceFinder, *, labels: LabelMap | None = None
) -> list[Finding]:
    """All faults of a CSV and its photographs, before a cohort is built from them.

    Errors are rows and photographs from which no cohort can be built, a photograph without a face
    or with one that is too small, and the same photograph for two subjects. Warnings are
    photographs with several faces, and those of :func:`check_cohort`.
    """
    findings: list[Finding] = []
    pictures, rows = _Pictures(find_face, aligned=False), []
    terms: list[tuple[int, tuple[str, ...]]] = []
    for photo in photographs(table, findings.append, labels):
        row = Listing(table.name, photo.row, "", photo.subject, photo.syndrome)
        rows.append(row)
        terms.append((photo.row, photo.hpo))
        findings += pictures.look(photo.path, row)
    if not rows and not findings:
        remedy = "list at least one photograph"
        findings.append(Finding("error", table.name, None, "no photograph is listed", remedy))
    findings += pictures.copies()
    findings += _diagnosis_findings(rows)
    findings += _lonely(rows, table.name)
    findings += _term_findings(table.name, terms)
    return findings


class _Pictures:
    """Looks at one image after the other, and remembers what is needed to find copies."""

    def __init__(self, find_face: FaceFinder | None, *, aligned: bool) -> None:
        self._find_face, self._aligned = find_face, aligned
        self._seen: dict[bytes, Listing] = {}
        self._prints: list[Fingerprint] = []
        self._rows: list[Listing] = []

    def look(self, path: Path, row: Listing) -> Iterator[Finding]:
        """Yield what is wrong with one image."""
        try:
            data = photograph_bytes(path)
            pixels = decode_photograph(data, where=path.name)
        except DataError as error:
            yield Finding("error", row.file, row.row, error.what, error.remedy)
            return
        height, width, _ = pixels.shape
        if self._aligned and (height, width) != (FACE_SIZE, FACE_SIZE):
            what = f"the image is {width} x {height} pixels, not {FACE_SIZE} x {FACE_SIZE}"
            yield Finding("error", row.file, row.row, what, "align the photograph again")
        turn = exif_orientation(data)
        if self._aligned and turn != _UPRIGHT:
            what = (
                f"the image asks to be turned (EXIF orientation {turn}), an aligned face must not"
            )
            remedy = "align the photograph again: programs differ in whether they turn it"
            yield Finding("warning", row.file, row.row, what, remedy)
        twin = self._seen.setdefault(hashlib.sha256(pixels.tobytes()).digest(), row)
        face = yield from self._face(pixels, row)
        if twin.subject != row.subject:
            what = f"the same image belongs to another subject in {twin.file}, row {twin.row}"
            yield Finding("error", row.file, row.row, what, "find out whose image it is")
        elif face is not None and (mark := fingerprint(face)):
            self._prints.append(mark)
            self._rows.append(row)

    def _face(self, pixels: Pixels, row: Listing) -> Generator[Finding, None, Pixels | None]:
        """Yield findings about the face; return the aligned one, None if there is none."""
        if self._find_face is None:
            return pixels
        try:
            face = self._find_face(pixels)
        except DataError as error:
            yield Finding(
                "warning" if self._aligned else "error",
                row.file,
                row.row,
                error.what,
                error.remedy,
            )
            return pixels if self._aligned else None
        if face.faces > 1:
            what = f"the photograph shows {face.faces} faces"
            remedy = "cut it so that it shows the subject alone: the largest one is taken"
            yield Finding("warning", row.file, row.row, what, remedy)
        return pixels if self._aligned else face.pixels

    def copies(self) -> Iterator[Finding]:
        """Yield the images that look like an earlier one of another subject."""
        for index, earlier in copies(self._prints, [row.subject for row in self._rows]):
            row, twin = self._rows[index], self._rows[earlier]
            what = (
                f"the image looks the same as one of another subject in {twin.file}, row {twin.row}"
            )
            remedy = "find out whether both are one photograph, and whose it is"
            yield Finding("warning", row.file, row.row, what, remedy)


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file in ``folder``, by name."""
    files = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                status = entry.stat()
                files[entry.name] = (status.st_size, status.st_mtime_ns)
    except OSError:  # it has gone, or a file has: the other look will differ
        files[""] = (len(files), 0)
    return files


def _diagnosis_findings(rows: Iterable[Listing]) -> Iterator[Finding]:
    first: dict[str, Listing] = {}
    told: set[str] = set()
    for row in rows:
        known = first.setdefault(row.subject, row)
        if known.label != row.label and row.subject not in told:
            told.add(row.subject)
            what = f"the subject has another syndrome in {known.file}, row {known.row}"
            yield Finding("warning", row.file, row.row, what, "make sure that both are meant")


def _lonely(rows: Iterable[Listing], file: str) -> Iterator[Finding]:
    subjects: dict[int, set[str]] = defaultdict(set)
    for row in rows:
        if row.label != UNSOLVED:
            subjects[row.label].add(row.subject)
    lonely = sorted(syndrome for syndrome, members in subjects.items() if len(members) < 2)
    if lonely:
        what = f"syndromes with one subject only: {', '.join(map(str, lonely))}"
        remedy = "add subjects, or expect that only other sites can match them"
        yield Finding("warning", file, None, what, remedy)


def _label_findings(cohort: Cohort, found: Scan, labels: LabelMap | None) -> Iterator[Finding]:
    if labels is None:
        return
    syndromes = f"{METADATA}/gmdb_syndromes_{cohort.version}.tsv"
    for difference in differences(label_map_of(cohort), labels):
        known = difference.syndrome is not None
        file = syndromes if known else f"{METADATA}/lookup_table_{cohort.version}.txt"
        row = found.syndrome_rows.get(difference.syndrome or 0) if known else 2
        remedy = "take the consortium's file, and give your labels its numbers"
        yield Finding("error", file, row, difference.what, remedy)


def _term_findings(file: str, terms: Sequence[tuple[int, tuple[str, ...]]]) -> Iterator[Finding]:
    """Yield terms that do not exist, if the ontology is there to ask."""
    if not ontology_is_installed():
        return
    outdated = outdated_terms(term for _, hpo in terms for term in hpo)
    for row, hpo in terms:
        for term in (term for term in hpo if term in outdated):
            remedy = "look the feature up at hpo.jax.org and write its current id"
            yield Finding("warning", file, row, f"{term} {outdated[term]}", remedy)
