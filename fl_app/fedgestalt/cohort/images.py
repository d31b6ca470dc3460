"""Photographs: decoded strictly, so that a damaged or monstrous file is an error and not a face.

OpenCV decodes a truncated JPEG with no more than a warning on standard error, and allocates
whatever a header claims. So the structure of a file is walked first: kind, size, end marker.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, cast

import cv2
import numpy as np

from fedgestalt.cohort.records import ImageRecord
from fedgestalt.contracts import Pixels
from fedgestalt.errors import DataError

MAX_PIXELS: Final = 50_000_000
MAX_BYTES: Final = 100_000_000
JPEG_QUALITY: Final = 95

_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_END: Final = b"IEND\xaeB`\x82"
_SOI, _EOI, _SOS, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
_ORIENTATION_TAG: Final = 0x0112
# Start-of-frame markers: C0..CF without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # TEM and RST: no length follows


def load_image(record: ImageRecord) -> Pixels:
    """Decode the photograph of a record.

    Returns:
        RGB, (height, width, 3) uint8, EXIF rotation applied.

    Raises:
        DataError: the file is missing, no JPEG or PNG, truncated, damaged, or larger than
            50 megapixels.
    """
    return read_photograph(record.path)


def read_photograph(path: Path) -> Pixels:
    """Decode a JPEG or PNG file; see :func:`load_image`."""
    return decode_photograph(photograph_bytes(path), where=path.name)


def photograph_bytes(path: Path) -> bytes:
    """The content of an image file; see :func:`load_image` for what is refused."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"the image file is larger than {MAX_BYTES // 1_000_000} MB",
                where=path.name,
                remedy="export it smaller",
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the image file cannot be read: {error.strerror}",
            where=path.name,
            remedy="copy it again",
        ) from None


def decode_photograph(data: bytes, *, where: str) -> Pixels:
    """Decode a JPEG or PNG held in memory; ``where`` names it in errors."""
    height, width = _size(data, where)
    if height * width > MAX_PIXELS:
        raise DataError(
            f"the image has {height * width / 1e6:.0f} megapixels, more than"
            f" {MAX_PIXELS // 1_000_000}",
            where=where,
            remedy="export it smaller",
        )
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        decoded = None
    if decoded is None:
        raise DataError("the image is damaged", where=where, remedy="export it again")
    return cast("Pixels", decoded)


def exif_orientation(data: bytes) -> int:
    """How a JPEG says it is to be turned, 1 to 8 (Exif 2.3, tag 0x0112); 1 is as it is.

    1 also where it says nothing or nothing that can be understood.
    """
    if not data.startswith(bytes([0xFF, _SOI])):
        return 1
    for marker, at in _jpeg_segments(data):
        if marker == _APP1 and data[at + 2 : at + 8] == b"Exif\0\0":
            return _orientation(data[at + 8 : at + int.from_bytes(data[at : at + 2], "big")])
        if marker == _SOS:
            break
    return 1


def _orientation(tiff: bytes) -> int:
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    entries = number(4, 4)
    for entry in range(entries + 2, entries + 2 + 12 * number(entries, 2), 12):
        if entry + 12 > len(tiff):
            break
        if number(entry, 2) == _ORIENTATION_TAG:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1


def save_jpeg(path: Path, pixels: Pixels) -> None:
    """Write RGB ``pixels`` (height, width, 3) as a JPEG of quality 95.

    Raises:
        DataError: the file cannot be written.
    """
    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, encoded = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), quality)
    if not done:
        raise DataError("the pixels cannot be coded as JPEG", where=path.name)
    try:
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise DataError(
            f"the image file cannot be written: {error.strerror}",
            where=path.name,
            remedy="free space or choose another folder",
        ) from None


def _size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width according to the header of a complete JPEG or PNG."""
    if data.startswith(_PNG_SIGNATURE) and len(data) >= 24:
        complete = _PNG_END in data
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    elif data.startswith(bytes([0xFF, _SOI, 0xFF])):
        segments = dict(_jpeg_segments(data))
        frame = next((at for marker, at in segments.items() if marker in _FRAMES), None)
        complete = frame is not None and _EOI in segments
        height, width = (
            int.from_bytes(data[frame + at : frame + at + 2], "big") if frame is not None else 0
            for at in (3, 5)
        )
    else:
        raise DataError("not a JPEG or PNG image", where=where, remedy="export it as JPEG")
    if not complete:
        raise DataError("the image is truncated", where=where, remedy="copy or export it again")
    return height, width


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, offset behind the marker) up to the end marker or the end of the data.

    See ITU-T T.81, annex B. In coded data, FF is followed by 00 or by a restart marker.
    """
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker, at = data[at + 1], at + 1
        if marker == 0xFF:  # fill byte
            continue
        at += 1
        if marker == 0 or marker in _BARE:
            continue
        yield marker, at
        if marker == _EOI:
            return
        at += int.from_bytes(data[at : at + 2], "big")
