"""The reader of a cohort folder: what is sound in it, and every rule that its rows break.

The rules:

- One folder holds one version.
- ``frequent_gallery`` lists the images of ``train`` and ``val``, ``frequent_test`` those of
  ``test``.
- A label is a syndrome id. The lookup table lists the frequent ones in the order of the
  classifier's outputs; the rare files hold only others.
- An image has one subject and one label, wherever it is listed, and is listed once in
  train + val + test and once in each rare split.
- An unsolved case is in the file of unsolved cases alone, which may be missing.
- No subject is on both sides of a test: frequent gallery and test, gallery and test of a rare
  split.
- Image ids are plain names; none leads out of the folder.

Errors name file and row, never a subject.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedgestalt.cohort.layout import (
    FACT_COLUMNS,
    FREQUENT_FILES,
    IMAGE_COLUMNS,
    IMAGES,
    METADATA,
    RARE_FILES,
    SYNDROME_COLUMNS,
    UNSOLVED_COLUMNS,
    UNSOLVED_FILE,
    image_file,
)
from fedgestalt.cohort.records import UNSOLVED, Cohort, ImageRecord, RareSplit, Syndrome
from fedgestalt.cohort.tables import Finding, Report, is_plain_name, read_table, read_text
from fedgestalt.errors import DataError

_VERSIONED: Final = re.compile(
    rf"(?:gmdb_(?:{'|'.join((*FREQUENT_FILES, *RARE_FILES, UNSOLVED_FILE))})_images_(.+)\.csv"
    r"|(?:gmdb_syndromes|image_metadata)_(.+)\.tsv)"
)
_HPO_ID: Final = re.compile(r"HP:[0-9]{7}")
_INTEGER: Final = re.compile(r"-?[0-9]{1,9}")
_MAX_SPLITS: Final = 1000
_NO_PLAIN_NAME: Final = (
    "image_id is not a plain name of letters, digits, dot, hyphen and underscore"
)
_USE_NUMBERS: Final = "use the image's number; paths are not allowed"


def scan(root: Path, report: Report) -> Scan:
    """Read a folder, hand every fault to ``report``, and return what is sound.

    Raises:
        DataError: there is nothing to read, or ``report`` raises.
    """
    return _Reader(root, report).read()


@dataclass(frozen=True)
class Listing:
    """One row of an image file."""

    file: str
    row: int
    image_id: str
    subject: str
    label: int
    split: int = 0


@dataclass
class Scan:
    """The sound rows of a folder."""

    root: Path
    version: str
    listings: Mapping[str, list[Listing]]
    syndromes: dict[int, Syndrome] = field(default_factory=dict)
    classes: tuple[int, ...] = ()
    hpo: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    unsolved: dict[str, Listing] = field(default_factory=dict)

    def first_listings(self) -> dict[str, Listing]:
        """Where each image of a diagnosed subject is listed first."""
        first: dict[str, Listing] = {}
        for rows in self.listings.values():
            for row in rows:
                first.setdefault(row.image_id, row)
        return first

    def cohort(self, name: str | None = None) -> Cohort:
        """The records and roles of these rows."""
        return Cohort(
            name=name or self.root.resolve().name,
            version=self.version,
            root=self.root,
            images=self._records(self.first_listings()),
            syndromes=self.syndromes,
            classes=self.classes,
            train=_ids(self.listings["train"]),
            validation=_ids(self.listings["val"]),
            frequent_test=_ids(self.listings["test"]),
            rare_splits=self._rare_splits(),
            unsolved=self._records(self.unsolved),
        )

    def _records(self, rows: Mapping[str, Listing]) -> dict[str, ImageRecord]:
        return {
            image_id: ImageRecord(
                image_id=image_id,
                subject=row.subject,
                syndrome=row.label,
                path=image_file(self.root, image_id),
                hpo=self.hpo.get(image_id, ()),
                facts=self.facts.get(image_id, {}),
            )
            for image_id, row in rows.items()
        }

    def _rare_splits(self) -> tuple[RareSplit, ...]:
        """Split numbers are positions; the files number from 0 or from 1."""
        gallery, test = (defaultdict[int, list[str]](list) for _ in RARE_FILES)
        for kind, members in zip(RARE_FILES, (gallery, test), strict=True):
            for row in self.listings[kind]:
                members[row.split].append(row.image_id)
        numbers = gallery.keys() | test.keys()
        start = 0 if 0 in numbers else 1
        return tuple(
            RareSplit(tuple(gallery[number]), tuple(test[number]))
            for number in range(start, max(numbers, default=-1) + 1)
        )


def _ids(rows: Iterable[Listing]) -> tuple[str, ...]:
    return tuple(row.image_id for row in rows)


class _Reader:
    """Reads one folder; see the rules of the module."""

    def __init__(self, root: Path, report: Report) -> None:
        self._root, self._report = root, report
        self._told: set[tuple[str, str]] = set()
        self._image_files: frozenset[str] = frozenset()

    def read(self) -> Scan:
        version = self._version()
        self._image_files = frozenset(p.name for p in self._folder(IMAGES) if p.is_file())
        kinds = FREQUENT_FILES + RARE_FILES
        found = Scan(self._root, version, {k: list(self._listings(k, version)) for k in kinds})
        self._read_unsolved(found)
        self._read_syndromes(found)
        self._read_classes(found)
        self._read_metadata(found)
        self._check_labels(found)
        self._check_identity(found)
        self._check_listed_once(found)
        self._check_galleries(found)
        self._check_sides(found)
        if not any(found.listings.values()) and not found.unsolved:
            self._error(METADATA, None, "no image is listed", "list the images of the cohort")
        return found

    def _error(self, file: str, row: int | None, what: str, remedy: str) -> None:
        self._report(Finding("error", file, row, what, remedy))

    def _error_in(self, row: Listing, what: str, remedy: str) -> None:
        """Report a fault of an image once, in however many files and splits it is listed."""
        if (row.image_id, what) not in self._told:
            self._told.add((row.image_id, what))
            self._error(row.file, row.row, what, remedy)

    def _folder(self, name: str) -> list[Path]:
        try:
            return sorted((self._root / name).iterdir())
        except OSError as error:
            raise DataError(
                f"the folder {name} cannot be read: {error.strerror}",
                where=str(self._root),
                remedy=f"choose the folder that holds {METADATA} and {IMAGES}",
            ) from None

    def _version(self) -> str:
        matches = (_VERSIONED.fullmatch(path.name) for path in self._folder(METADATA))
        versions = sorted({match[1] or match[2] for match in matches if match})
        if not versions:
            raise DataError(
                "no metadata file",
                where=METADATA,
                remedy="copy gmdb_train_images_VERSION.csv and the other tables into it",
            )
        if len(versions) > 1:
            raise DataError(
                f"files of {len(versions)} versions: {', '.join(versions)}",
                where=METADATA,
                remedy="keep the files of one version",
            )
        return versions[0]

    def _listings(self, kind: str, version: str) -> Iterator[Listing]:
        file = f"{METADATA}/gmdb_{kind}_images_{version}.csv"
        columns = IMAGE_COLUMNS + (("split",) if kind in RARE_FILES else ())
        for number, row in read_table(self._root / file, file, columns, self._report):
            label, split = _integer(row["label"]), _integer(row.get("split", "0"))
            image_id = row["image_id"]
            if label is None:
                self._error(file, number, "label is no integer", "write the syndrome id")
            elif label == UNSOLVED:
                remedy = f"list the image in gmdb_{UNSOLVED_FILE}_images_{version}.csv instead"
                self._error(file, number, f"label {UNSOLVED} stands for no diagnosis", remedy)
            elif split is None or not 0 <= split < _MAX_SPLITS:
                what = f"split is no integer from 0 to {_MAX_SPLITS - 1}"
                self._error(file, number, what, "number the splits from 0")
            elif not is_plain_name(image_id):
                self._error(file, number, _NO_PLAIN_NAME, _USE_NUMBERS)
            else:
                listing = Listing(file, number, image_id, row["subject"], label, split)
                if self._has_image(listing):
                    yield listing

    def _has_image(self, listing: Listing) -> bool:
        there = image_file(self._root, listing.image_id).name in self._image_files
        if not there:
            what = f"its image is not in {IMAGES}"
            self._error_in(listing, what, "copy the image or drop the row")
        return there

    def _read_unsolved(self, found: Scan) -> None:
        """Images of subjects without a diagnosis: listed once, and in no other file."""
        file = f"{METADATA}/gmdb_{UNSOLVED_FILE}_images_{found.version}.csv"
        if not (self._root / file).exists():
            return
        first = found.first_listings()
        diagnosed = {row.subject: row for row in first.values()}
        for number, row in read_table(self._root / file, file, UNSOLVED_COLUMNS, self._report):
            listing = Listing(file, number, row["image_id"], row["subject"], UNSOLVED)
            if not is_plain_name(listing.image_id):
                self._error(file, number, _NO_PLAIN_NAME, _USE_NUMBERS)
                continue
            known = found.unsolved.get(listing.image_id) or first.get(listing.image_id)
            other = diagnosed.get(listing.subject)
            if known:
                what = f"the image is listed already in {known.file}, row {known.row}"
                self._error_in(listing, what, "drop one of the rows")
            elif other:
                what = f"the subject has a diagnosis in {other.file}, row {other.row}"
                self._error_in(listing, what, "list a subject as unsolved or with a syndrome")
            elif self._has_image(listing):
                found.unsolved[listing.image_id] = listing

    def _read_syndromes(self, found: Scan) -> None:
        file = f"{METADATA}/gmdb_syndromes_{found.version}.tsv"
        for number, row in read_table(self._root / file, file, SYNDROME_COLUMNS[:2], self._report):
            syndrome_id = _integer(row["syndrome_id"])
            if syndrome_id is None:
                self._error(file, number, "syndrome_id is no integer", "correct the row")
            elif syndrome_id in found.syndromes:
                self._error(file, number, "syndrome_id is listed twice", "drop one of the rows")
            else:
                found.syndromes[syndrome_id] = Syndrome(syndrome_id, row["syndrome_name"])

    def _read_classes(self, found: Scan) -> None:
        pattern, own = "lookup_table_*.txt", f"lookup_table_{found.version}.txt"
        tables = [path.name for path in self._folder(METADATA) if path.match(pattern)]
        file = f"{METADATA}/{tables[0] if len(tables) == 1 else own}"
        text = read_text(self._root / file, file, self._report)
        if text is None:
            return
        try:
            values = json.loads(text.partition("\n")[2])
        except ValueError:
            values = None
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            what = "no JSON list of syndrome ids behind the first line"
            self._error(file, 2, what, "write one header line, then a list such as [12, 7, 30]")
            return
        if len(set(values)) < len(values):
            self._error(file, 2, "a syndrome id is listed twice", "list each once")
        unknown = [value for value in values if value not in found.syndromes]
        if unknown and found.syndromes:
            what = f"syndrome ids {unknown[:5]} are not in the syndrome table"
            self._error(file, 2, what, "take both files from the same version")
        found.classes = tuple(values)

    def _read_metadata(self, found: Scan) -> None:
        file = f"{METADATA}/image_metadata_{found.version}.tsv"
        columns, feature = ("image_id", "present_features"), ("present_features",)
        rows = read_table(self._root / file, file, columns, self._report, may_be_empty=feature)
        for number, row in rows:
            terms = tuple(term.strip() for term in row["present_features"].split(";"))
            terms = tuple(term for term in terms if term)
            if not all(_HPO_ID.fullmatch(term) for term in terms):
                what = "present_features holds something that is no HPO id"
                remedy = "write ids such as HP:0000154, joined by semicolons"
                self._report(Finding("warning", file, number, what, remedy))
                terms = tuple(term for term in terms if _HPO_ID.fullmatch(term))
            facts = {"omim_ids": row.get("omim", ""), **row}
            found.hpo[row["image_id"]] = terms
            found.facts[row["image_id"]] = {c: facts[c] for c in FACT_COLUMNS if facts.get(c)}

    def _check_labels(self, found: Scan) -> None:
        for kind, rows in found.listings.items():
            for row in rows:
                frequent = row.label in found.classes
                if found.syndromes and row.label not in found.syndromes:
                    what = f"label {row.label} is not in the syndrome table"
                    remedy = "correct the label or take both files from the same version"
                    self._error_in(row, what, remedy)
                elif found.classes and frequent and kind in RARE_FILES:
                    what = f"label {row.label} is in the lookup table, so it is not rare"
                    self._error_in(row, what, "move the row to the frequent files")
                elif found.classes and not frequent and kind not in RARE_FILES:
                    what = f"label {row.label} is not in the lookup table, so it is not frequent"
                    self._error_in(row, what, "move the row to the rare files")

    def _check_identity(self, found: Scan) -> None:
        first = found.first_listings()
        for row in (row for rows in found.listings.values() for row in rows):
            known = first[row.image_id]
            differing = [f for f in ("subject", "label") if getattr(known, f) != getattr(row, f)]
            if differing:
                fact = " and ".join(differing)
                what = f"the image has another {fact} in {known.file}, row {known.row}"
                self._error_in(row, what, f"give the image one {fact}")

    def _check_listed_once(self, found: Scan) -> None:
        for kinds in (("train", "val", "test"), RARE_FILES):
            seen: dict[tuple[str, int], Listing] = {}
            for row in (row for kind in kinds for row in found.listings[kind]):
                known = seen.setdefault((row.image_id, row.split), row)
                if known is not row:
                    what = f"the image is listed already in {known.file}, row {known.row}"
                    self._error_in(row, what, "drop one of the rows")

    def _check_galleries(self, found: Scan) -> None:
        for whole, parts in (("frequent_gallery", ("train", "val")), ("frequent_test", ("test",))):
            listed = set(_ids(found.listings[whole]))
            expected = {image_id for part in parts for image_id in _ids(found.listings[part])}
            if listed != expected:
                file = f"{METADATA}/gmdb_{whole}_images_{found.version}.csv"
                what = (
                    f"lists {len(listed - expected)} images that are not in"
                    f" {' + '.join(parts)} and lacks {len(expected - listed)} that are"
                )
                self._error(file, None, what, "list the same images in both")

    def _check_sides(self, found: Scan) -> None:
        """Find subjects that are in a gallery and in the test against it."""
        frequent = [*found.listings["train"], *found.listings["val"]]
        gallery = {(row.subject, row.split) for row in found.listings["rare_gallery"]}
        sides = (
            (
                {(row.subject, row.split) for row in frequent},
                found.listings["test"],
                "train or val",
            ),
            (gallery, found.listings["rare_test"], "the gallery of this rare split"),
        )
        for taken, tests, place in sides:
            for row in tests:
                if (row.subject, row.split) in taken:
                    what = f"the subject of this test image is also in {place}"
                    remedy = "keep all images of a subject on one side"
                    self._error_in(row, what, remedy)


def _integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None
