"""Photographs that look the same though their files differ: stored again, scaled, brightened.

Two steps, both on the aligned face in grey:

1. A difference hash (dHash, Krawetz 2013) of 256 bits: the face is shrunk to 17 x 16 pixels, and a
   bit says whether a pixel is darker than its right neighbour. Pairs that differ in more than 40
   bits are no duplicates.
2. The correlation of the two faces at 32 x 32 pixels, which brightness and contrast do not change.
   From 0.995 on they are taken for one photograph.

Measured on the cohorts that come with the project (tests/unit/plugins/test_cohorts.py): stored
again at JPEG quality 50, scaled to 80 pixels and back, brightened, or turned grey, a face
correlates with itself at 0.995 or more; two photographs of one person, taken within seconds, at
0.9915 or less; so nothing is reported in them.
A face that was aligned anew, moved by a pixel or turned by a degree, falls below the threshold: the
check finds copies, and does not recognise people.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Pixels

HASH_SIDE: Final = 16
MAX_BITS: Final = 40
SIDE: Final = 32
MIN_CORRELATION: Final = 0.995
_MIN_CONTRAST: Final = 2.0  # standard deviation in grey levels; below, there is nothing to compare
_BLOCK: Final = 512


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What is kept of a face to find copies of it.

    Attributes:
        bits: (256,) the difference hash.
        grey: (32, 32) the face, shrunk.
    """

    bits: NDArray[np.bool_]
    grey: NDArray[np.uint8]


def fingerprint(pixels: Pixels) -> Fingerprint | None:
    """The fingerprint of an RGB image (height, width, 3); None if it shows next to nothing."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    tiny = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    small = np.asarray(cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)
    if small.std() < _MIN_CONTRAST:
        return None
    return Fingerprint((tiny[:, :-1] < tiny[:, 1:]).ravel(), small)


def copies(prints: Sequence[Fingerprint], owners: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Yield (index, index of the first earlier one) of faces that look like another owner's.

    Args:
        prints: of n faces.
        owners: (n,) whose face it is.
    """
    if not prints:
        return
    signs = np.stack([p.bits for p in prints]).astype(np.float32) * 2 - 1
    faces = np.stack([p.grey for p in prints]).reshape(len(prints), -1).astype(np.float32)
    faces -= faces.mean(axis=1, keepdims=True)
    faces /= np.linalg.norm(faces, axis=1, keepdims=True)
    numbers: dict[Hashable, int] = {}
    owner = np.array([numbers.setdefault(o, len(numbers)) for o in owners])
    agreeing = signs.shape[1] - 2 * MAX_BITS
    for start in range(0, len(prints), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(prints)))
        alike = signs[rows] @ signs[: rows[-1] + 1].T >= agreeing
        alike &= owner[rows, None] != owner[: rows[-1] + 1]
        alike &= np.arange(rows[-1] + 1) < rows[:, None]
        some = alike.any(axis=1)
        alike, rows = alike[some], rows[some]
        if len(rows):
            alike &= faces[rows] @ faces[: alike.shape[1]].T >= MIN_CORRELATION
            for row, found in zip(rows.tolist(), alike, strict=True):
                if found.any():
                    yield row, int(found.argmax())
