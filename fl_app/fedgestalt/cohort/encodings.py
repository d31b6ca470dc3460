"""Files of encodings: our own ``.npz`` and the CSV of GestaltMatcher's tools.

``.npz``: ``schema``, ``image_ids`` (n,), ``vectors`` (n, f) float32 with rows of length 1,
``model`` (digest of the ensemble), ``parts`` (JSON, see :class:`EncodingPart`). Nothing runs code.

``.csv``, separated by semicolons, with one row for each image, network and test-time variant::

    img_name;model;flip;gray;class_conf;representations
    17_rot_aligned.jpg;0;0;1;[];[0.12, -0.5, ...]

A representation is what the network put out. The field compares images by the mean cosine over
these vectors, in which their lengths cancel; so each is divided by its length here, and all of an
image, divided by the root of their number, make one vector of length 1 with the same cosines.
"""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.cohort.tables import Finding, is_plain_name
from fedgestalt.errors import DataError

SCHEMA: Final = "fedgestalt.encodings/1"
COLUMNS: Final = ("img_name", "model", "flip", "gray", "class_conf", "representations")
_NEEDED: Final = tuple(column for column in COLUMNS if column != "class_conf")
_KEYS: Final = {"schema", "image_ids", "vectors", "model", "parts"}
_SUFFIXES: Final = (".jpg", ".jpeg", ".png")
_ENDINGS: Final = ("_rot_aligned", "_aligned")
_YES_NO: Final = {"0": False, "1": True, "false": False, "true": True}
_LENGTH_TOLERANCE: Final = 1e-3
_ROWS_AT_A_TIME: Final = 1024


@dataclass(frozen=True)
class EncodingPart:
    """One of the vectors that make up an encoding.

    Attributes:
        model: name of the network.
        flip, gray: the test-time variant.
        size: length of the vector.
    """

    model: str
    flip: bool
    gray: bool
    size: int


@dataclass(frozen=True)
class EncodingTable:
    """Encodings of images.

    Attributes:
        image_ids: (n,), each once.
        vectors: (n, f) float32, rows of length 1.
        model: digest of the ensemble that encoded; empty if unknown.
        parts: what lies where in a vector; empty if unknown.
    """

    image_ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    model: str = ""
    parts: tuple[EncodingPart, ...] = ()

    def of_images(self, image_ids: Sequence[str]) -> NDArray[np.float32]:
        """The vectors (images, f) of all images of a cohort, in that order.

        Raises:
            DataError: one has no encoding, or an encoding is of none of these images.
        """
        row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}
        strangers = len(row_of.keys() - set(image_ids))
        if strangers:
            raise DataError(
                f"{strangers} of {len(row_of)} encodings are of images that the cohort does not"
                " have",
                remedy="give the encodings and the cohort that belong together",
            )
        missing = sum(image_id not in row_of for image_id in image_ids)
        if missing:
            raise DataError(
                f"{missing} of the cohort's {len(image_ids)} images have no encoding",
                remedy="encode the whole cohort",
            )
        return self.vectors[[row_of[image_id] for image_id in image_ids]]


def read_encodings(path: Path) -> EncodingTable:
    """Read an ``.npz`` or ``.csv`` file of encodings.

    Raises:
        DataError: the first fault, with file, row and remedy; it names no image.
    """
    readers = {".npz": _read_npz, ".csv": _read_csv}
    reader = readers.get(path.suffix)
    if reader is None:
        raise DataError(
            f"encodings come as {' or '.join(readers)}", where=path.name, remedy="name such a file"
        )
    try:
        return reader(path)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror or error})", where=str(path), remedy="copy it again"
        ) from None


def write_encodings(path: Path, table: EncodingTable) -> None:
    """Write ``table`` as ``.npz`` or ``.csv``, by the ending of ``path``.

    A CSV keeps neither the digest of the ensemble nor class confidences.

    Raises:
        DataError: the ending is another, the table breaks the rules of :class:`EncodingTable`, or
            a CSV is asked for and its parts are unknown.
    """
    _check_vectors(table.image_ids, table.vectors, path.name)
    if path.suffix == ".npz":
        with path.open("wb") as stream:
            np.savez(
                stream,
                schema=np.array(SCHEMA),
                image_ids=np.array(table.image_ids, np.str_),
                vectors=np.asarray(table.vectors, np.float32),
                model=np.array(table.model),
                parts=np.array(json.dumps([astuple(part) for part in table.parts])),
            )
    elif path.suffix == ".csv":
        if not table.parts or sum(p.size for p in table.parts) != table.vectors.shape[1]:
            raise DataError("the parts of the encodings are unknown", where=path.name)
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter=";", lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(_csv_rows(table))
    else:
        raise DataError("encodings are written as .npz or .csv", where=path.name)


def _read_npz(path: Path) -> EncodingTable:
    try:
        with np.load(path, allow_pickle=False) as archive:
            content = {name: archive[name] for name in archive.files}
        if content.keys() != _KEYS or str(content["schema"]) != SCHEMA:
            raise DataError(f"does not follow {SCHEMA}", where=path.name)
        parts = tuple(EncodingPart(*part) for part in json.loads(str(content["parts"])))
        image_ids = tuple(map(str, content["image_ids"].tolist()))
        vectors = content["vectors"]
    except (zipfile.BadZipFile, ValueError, TypeError, EOFError, AttributeError) as error:
        raise DataError(
            f"is no file of encodings ({error})", where=path.name, remedy="write it again"
        ) from None
    _check_vectors(image_ids, vectors, path.name)
    if parts and sum(part.size for part in parts) != vectors.shape[1]:
        raise DataError(
            f"its parts do not add up to vectors of length {vectors.shape[1]}", where=path.name
        )
    return EncodingTable(image_ids, vectors, str(content["model"]), parts)


def _check_vectors(image_ids: Sequence[str], vectors: NDArray[Any], where: str) -> None:
    if vectors.dtype != np.float32 or vectors.shape != (len(image_ids), *vectors.shape[1:2]):
        raise DataError(
            f"{vectors.dtype} of shape {vectors.shape} is not one float32 vector for each of"
            f" {len(image_ids)} images",
            where=where,
            remedy="encode the images again",
        )
    if not len(image_ids) or not all(map(is_plain_name, image_ids)):
        raise DataError("no image, or an image id is no plain name", where=where)
    twice = len(image_ids) - len(set(image_ids))
    if twice:
        raise DataError(
            f"{twice} image ids come more than once", where=where, remedy="keep one of each"
        )
    parts = range(0, len(vectors), _ROWS_AT_A_TIME)  # a file of encodings may be larger than memory
    lengths = np.concatenate(
        [np.linalg.norm(vectors[start : start + _ROWS_AT_A_TIME], axis=1) for start in parts]
    )
    for wrong, what in (
        (~np.isfinite(lengths), "are not finite"),
        (np.abs(lengths - 1) > _LENGTH_TOLERANCE, "are not of length 1"),
    ):
        if wrong.any():
            raise DataError(
                f"{int(wrong.sum())} of {len(wrong)} encodings {what}",
                where=where,
                remedy="encode the images again",
            )


def _read_csv(path: Path) -> EncodingTable:
    images: dict[str, dict[tuple[str, bool, bool], NDArray[np.float32]]] = {}
    sizes: dict[tuple[str, bool, bool], int] = {}
    for number, cells in _csv_cells(path):
        try:
            image_id = _image_id(cells["img_name"])
            key = (cells["model"], _yes_no(cells["flip"]), _yes_no(cells["gray"]))
            vector = _unit_vector(cells["representations"])
            if len(vector) != sizes.setdefault(key, len(vector)):
                raise ValueError(f"{len(vector)} values where others have {sizes[key]}")
            vectors = images.setdefault(image_id, {})
            if key in vectors:
                raise ValueError("the same image, model and variant came before")
        except ValueError as error:
            raise _fault(path, number, str(error), "write the encodings again") from None
        vectors[key] = vector
    if not images:
        raise _fault(path, 1, "no row", "write one row for each image, model and variant")
    partial = sum(vectors.keys() != sizes.keys() for vectors in images.values())
    if partial:
        raise DataError(
            f"{partial} of {len(images)} images lack some of the {len(sizes)} models and variants",
            where=path.name,
            remedy="encode these images again",
        )
    rows = [np.concatenate([vectors[key] for key in sizes]) for vectors in images.values()]
    parts = tuple(EncodingPart(*key, size) for key, size in sizes.items())
    joined = np.asarray(np.stack(rows) / math.sqrt(len(parts)), np.float32)
    return EncodingTable(tuple(images), joined, parts=parts)


def _csv_cells(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Row numbers, the header being 1, and cells by column."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter=";", strict=True)
        try:
            header = [cell.strip() for cell in next(lines, [])]
            missing = [column for column in _NEEDED if column not in header]
            if missing:
                what = f"no column {', '.join(map(repr, missing))}"
                raise _fault(path, 1, what, f"the columns are {';'.join(COLUMNS)}")
            for cells in lines:
                if len(cells) != len(header):
                    what = f"{len(cells)} cells where the header has {len(header)}"
                    raise _fault(path, lines.line_num, what, "complete the row")
                yield lines.line_num, dict(zip(header, map(str.strip, cells), strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            what = f"not a table of UTF-8 text: {error}"
            raise _fault(path, lines.line_num, what, "write the encodings again") from None


def plain_image_id(file_name: str) -> str | None:
    """``17`` for ``17_rot_aligned.jpg``; None if what is left is no plain name."""
    for suffix in _SUFFIXES:
        if file_name.lower().endswith(suffix):
            file_name = file_name[: -len(suffix)]
    for ending in _ENDINGS:
        file_name = file_name.removesuffix(ending)
    return file_name if is_plain_name(file_name) else None


def _image_id(name: str) -> str:
    image_id = plain_image_id(name)
    if image_id is None:
        raise ValueError("img_name is no plain file name")
    return image_id


def _yes_no(cell: str) -> bool:
    if cell.lower() not in _YES_NO:
        raise ValueError("flip or gray is neither 0 nor 1")
    return _YES_NO[cell.lower()]


def _unit_vector(cell: str) -> NDArray[np.float32]:
    try:
        values = np.array(json.loads(cell), np.float64)
    except (ValueError, TypeError):
        raise ValueError("the representation is no JSON list of numbers") from None
    if values.ndim != 1 or not len(values):
        raise ValueError("the representation is no JSON list of numbers")
    length = float(np.linalg.norm(values))
    if not math.isfinite(length):
        raise ValueError("the representation is not finite")
    if length == 0:
        raise ValueError("the representation is zero")
    return (values / length).astype(np.float32)


def _csv_rows(table: EncodingTable) -> Iterator[tuple[object, ...]]:
    ends = np.cumsum([part.size for part in table.parts])[:-1]
    scale = math.sqrt(len(table.parts))
    for image_id, row in zip(table.image_ids, table.vectors, strict=True):
        scaled = row.astype(np.float64) * scale
        for part, vector in zip(table.parts, np.split(scaled, ends), strict=True):
            values = json.dumps(np.round(vector, 9).tolist())
            name = f"{image_id}_rot_aligned.jpg"
            yield name, part.model, int(part.flip), int(part.gray), "[]", values


def _fault(path: Path, row: int, what: str, remedy: str) -> DataError:
    return Finding("error", path.name, row, what, remedy).as_error()
