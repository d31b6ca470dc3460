"""``fedgestalt encode``: photographs to a file of encodings, with a published model, offline.

One pass: while a block of photographs is computed on, the next is read and its faces are found and
aligned. Encodings go to their places in a file as they come; the faces are never all in memory.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.cohort import (
    EncodingPart,
    EncodingTable,
    read_cohort,
    read_photograph,
    write_encodings,
)
from fedgestalt.cohort.encodings import plain_image_id
from fedgestalt.cohort.layout import METADATA
from fedgestalt.console import Pace, Steps
from fedgestalt.contracts import FACE_SIZE, Options, Pixels, Preprocessor
from fedgestalt.errors import ConfigError, DataError, SiteError
from fedgestalt.hooks.registry import Registry
from fedgestalt.learning.augment import TEST_VARIANTS
from fedgestalt.learning.blocks import ahead, block_ranges, variants_of
from fedgestalt.learning.bundle import Bundle, read_bundle
from fedgestalt.learning.crew import Crew
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import ENCODED_AT_A_TIME, Encoder
from fedgestalt.learning.ensemble import Ensemble
from fedgestalt.learning.features import reserve_file

SCHEMA: Final = "fedgestalt.encode/1"
PHOTOGRAPHS: Final = frozenset({".jpg", ".jpeg", ".png"})
ENDINGS: Final = (".npz", ".csv")


@dataclass(frozen=True)
class Request:
    """What to encode.

    Attributes:
        model: a bundle, folder or zip.
        images: one photograph, a folder of photographs, or a folder in GMDB layout.
        out: a new ``.npz`` or ``.csv``; see :mod:`fedgestalt.cohort.encodings`.
        preprocessor: finds and aligns faces; photographs of 112 x 112 pixels count as aligned.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    model: Path
    images: Path
    out: Path
    preprocessor: Preprocessor
    device: str = "auto"


@dataclass(frozen=True)
class Photograph:
    """A file and the id of its encoding; the id is empty if the name does not make one."""

    image_id: str
    path: Path


@dataclass(frozen=True)
class Block:
    """What came of some photographs.

    Attributes:
        rows: places of those with a face.
        variants: test-time variants of these, (rows, variants, 112, 112, 3).
        faults: what is wrong with the others, by place.
    """

    rows: NDArray[np.int64]
    variants: NDArray[np.uint8]
    faults: dict[int, str]


def encode_photographs(
    request: Request, registry: Registry, steps: Steps, crew: Crew
) -> dict[str, Any]:
    """Encode what can be encoded; say by file what cannot.

    Returns:
        A summary: counts, no name of a file.

    Raises:
        ConfigError: the request does not fit together.
        DataError: there is no photograph, or none could be encoded.
        SiteError: the result cannot be written.
    """
    if request.out.suffix not in ENDINGS:
        raise ConfigError(
            "encodings are written as .npz or .csv",
            where=str(request.out),
            remedy="name such a file",
        )
    if request.out.exists():
        raise ConfigError("exists already", where=str(request.out), remedy="name a new file")
    started = time.monotonic()
    device = choose_device(request.device)
    preprocessor = request.preprocessor
    photographs, ignored = find_photographs(request.images)
    if ignored and crew.leads:
        steps.say(f"{ignored} files in {request.images} are no JPEG or PNG and are left out")
    with _quietly(steps, crew, "model", "Reading the model"):
        bundle = read_bundle(request.model, registry)
    encoder = Encoder(bundle.ensemble, device)
    options = preprocessor.options()

    def make(start: int, stop: int) -> Block:
        return _block(photographs, start, stop, preprocessor, options)

    size = bundle.ensemble.encoding_size
    with _staging(request.out, (len(photographs), size), crew) as rows:
        mine = crew.share(block_ranges(len(photographs), ENCODED_AT_A_TIME))
        faults: dict[int, str] = {}
        with (
            crew.together(),
            _quietly(steps, crew, "encode", f"Encoding {len(photographs):,} photographs"),
        ):
            pace = Pace("photographs")
            for number, (_, _, block) in enumerate(ahead(make, mine), 1):
                for row, fault in block.faults.items():
                    steps.say(f"fedgestalt: {photographs[row].path.name}: {fault}")
                faults |= block.faults
                if len(block.rows):
                    rows[block.rows] = encoder.encode(block.variants)
                if crew.leads:
                    done = len(photographs) * number // len(mine)
                    steps.count(done, len(photographs), pace)
        failed = {row for part in crew.gather(faults) for row in part}
        good = [row for row in range(len(photographs)) if row not in failed]
        if not good:
            raise DataError(
                f"none of {len(photographs):,} photographs could be encoded",
                where=str(request.images),
            )
        crew.from_leader(lambda: _write(request.out, photographs, rows, good, bundle))
    return {
        "schema": SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "fedgestalt": __version__,
        "model": bundle.digest,
        "out": str(request.out),
        "encoding_size": size,
        "encoded": len(good),
        "failed": len(failed),
        "ignored": ignored,
        "device": str(device),
        "processes": crew.size,
        "seconds": round(time.monotonic() - started, 2),
    }


def find_photographs(place: Path) -> tuple[list[Photograph], int]:
    """The photographs that ``place`` stands for, sorted, and how many files it has beside them.

    Raises:
        DataError: there is none, or two have the same id.
    """
    ignored = 0
    if (place / METADATA).is_dir():
        cohort = read_cohort(place)
        return [Photograph(i, r.path) for i, r in sorted(cohort.images.items())], 0
    if place.is_dir():
        files = sorted(path for path in place.iterdir() if path.is_file())
        paths = [path for path in files if path.suffix.lower() in PHOTOGRAPHS]
        ignored = len(files) - len(paths)
    else:
        paths = [place] if place.exists() else []
    if not paths:
        raise DataError(
            "there is no photograph (JPEG or PNG)",
            where=str(place),
            remedy="name a photograph, a folder of them, or a folder in GMDB layout",
        )
    found = [Photograph(plain_image_id(path.name) or "", path) for path in paths]
    by_id: dict[str, str] = {}
    for photograph in found:
        other = by_id.setdefault(photograph.image_id, photograph.path.name)
        if photograph.image_id and other != photograph.path.name:
            raise DataError(
                f"{other} and {photograph.path.name} would have the same id",
                where=str(place),
                remedy="rename one",
            )
    return found, ignored


def _block(
    photographs: list[Photograph],
    start: int,
    stop: int,
    preprocessor: Preprocessor,
    options: Options,
) -> Block:
    rows, faces, faults = [], [], {}
    for row in range(start, stop):
        try:
            faces.append(_face(photographs[row], preprocessor, options))
            rows.append(row)
        except DataError as error:
            faults[row] = f"{error.what}; {error.remedy}." if error.remedy else f"{error.what}."
    stacked = np.stack(faces) if faces else np.empty((0, FACE_SIZE, FACE_SIZE, 3), np.uint8)
    return Block(np.array(rows, np.int64), variants_of(stacked), faults)


def _face(photograph: Photograph, preprocessor: Preprocessor, options: Options) -> Pixels:
    if not photograph.image_id:
        raise DataError(
            "its name does not make an id",
            remedy="use letters, digits, dot, hyphen and underscore",
        )
    pixels = read_photograph(photograph.path)
    if pixels.shape == (FACE_SIZE, FACE_SIZE, 3):
        return pixels
    return preprocessor.align(pixels, options).pixels


@contextlib.contextmanager
def _quietly(steps: Steps, crew: Crew, key: str, title: str) -> Iterator[None]:
    """A step that only the leading process shows."""
    with steps.step(key, title) if crew.leads else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _staging(out: Path, shape: tuple[int, int], crew: Crew) -> Iterator[NDArray[np.float32]]:
    """Rows in a file beside ``out``, for this user alone, that all processes of a crew share."""
    size = shape[0] * shape[1] * 4
    path = crew.from_leader(lambda: reserve_file(out.parent, size, "the file of encodings"))
    try:
        yield np.memmap(path, np.float32, "r+", shape=shape)
    finally:
        if crew.leads:
            path.unlink(missing_ok=True)


def _write(
    out: Path,
    photographs: list[Photograph],
    rows: NDArray[np.float32],
    good: list[int],
    bundle: Bundle,
) -> None:
    for place, row in enumerate(good):  # ascending: a row moves up, if at all
        if place != row:
            rows[place] = rows[row]
    ids = tuple(photographs[row].image_id for row in good)
    table = EncodingTable(ids, rows[: len(good)], bundle.digest, parts_of(bundle.ensemble))
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".encodings-") as folder:
            partial = Path(folder) / out.name
            write_encodings(partial, table)
            partial.replace(out)
    except OSError as error:
        raise SiteError(
            f"the encodings cannot be written ({error.strerror})",
            where=str(out),
            remedy="free disk space: they need it twice for a moment",
        ) from None


def parts_of(ensemble: Ensemble) -> tuple[EncodingPart, ...]:
    """What lies where in an encoding."""
    return tuple(
        EncodingPart(member.spec.name, flip, grey, member.embedding_size)
        for member in ensemble.members
        for _, flip, grey in TEST_VARIANTS
    )
