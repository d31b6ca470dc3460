"""Pictures that are made in blocks: the next block while the last one is computed on.

No more than two blocks exist at a time, whatever the number of images and variants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedgestalt.learning.augment import TEST_VARIANTS, draw_variants, test_variants
from fedgestalt.learning.images import FaceSource

BLOCK_IMAGES = 64
"""Images in a block; with twelve variants of 112 x 112 pixels a block takes 29 MB."""

T = TypeVar("T")


@dataclass(frozen=True)
class Pictures:
    """Variants of images, made when they are wanted.

    Attributes:
        images: how many.
        variants: of each image.
        make: from the first image and the one behind the last to (images, variants, 112, 112, 3)
            uint8; the same pixels every time.
    """

    images: int
    variants: int
    make: Callable[[int, int], NDArray[np.uint8]]


def given_pictures(variants: NDArray[np.uint8]) -> Pictures:
    """Pictures that are there already, (n, v, 112, 112, 3)."""
    images, each = variants.shape[:2]
    return Pictures(images, each, lambda start, stop: variants[start:stop])


def training_pictures(faces: FaceSource, count: int, seed: Sequence[int]) -> Pictures:
    """``count`` variants of each face; see :func:`.augment.draw_variants`."""
    return Pictures(
        len(faces),
        count,
        lambda start, stop: draw_variants(faces[start:stop], count, seed, first=start),
    )


def encoding_pictures(faces: FaceSource) -> Pictures:
    """The test-time variants of each face."""
    return Pictures(
        len(faces),
        len(TEST_VARIANTS),
        lambda start, stop: variants_of(faces[start:stop]),
    )


def variants_of(faces: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The test-time variants (n, v, 112, 112, 3) of faces (n, 112, 112, 3)."""
    if not len(faces):
        return np.empty((0, len(TEST_VARIANTS), *faces.shape[1:]), np.uint8)
    return np.stack([np.stack(test_variants(face)) for face in faces])


def block_ranges(images: int, size: int = BLOCK_IMAGES) -> list[tuple[int, int]]:
    """First image, and the one behind the last, of each block."""
    return [(start, min(start + size, images)) for start in range(0, images, size)]


def ahead(
    make: Callable[[int, int], T], ranges: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, T]]:
    """Yield (start, stop, block) for each range; a thread makes the next block meanwhile.

    What ``make`` raises is raised here, in its place.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="pictures") as worker:
        coming = [worker.submit(make, *ranges[0])] if ranges else []
        for number, (start, stop) in enumerate(ranges):
            block = coming.pop().result()
            if number + 1 < len(ranges):
                coming.append(worker.submit(make, *ranges[number + 1]))
            yield start, stop, block
