"""Image variants: random ones to train with, fixed ones to encode with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import FACE_SIZE, Pixels

TEST_VARIANTS: Final = (
    ("plain", False, False),
    ("flip", True, False),
    ("grey", False, True),
    ("flip-grey", True, True),
)
"""Test-time augmentation as (name, flip, grey): four variants per member."""


def to_grey(image: Pixels) -> Pixels:
    """Luma in all three channels (ITU-R BT.601)."""
    return np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)


def test_variants(image: Pixels) -> list[Pixels]:
    """The variants of one image in the order of :data:`TEST_VARIANTS`."""
    grey = to_grey(image)
    return [image, image[:, ::-1], grey, grey[:, ::-1]]


def training_variant(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Draw one random variant.

    Shrunk to 50..100 pixels and back (p 0.1), mirrored (p 0.5), hue turned by up to 0.1 of the
    circle with brightness and saturation within 10 %, grey (p 0.1): the augmentation of
    GestaltMatcher-Arc as published.
    """
    if rng.random() < 0.1:
        side = int(rng.integers(50, 101))
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.1:
        return to_grey(np.ascontiguousarray(image))
    return _jitter(np.ascontiguousarray(image), rng)


def _jitter(image: Pixels, rng: np.random.Generator) -> Pixels:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-18, 18) * rng.random()) % 180
    hsv[..., 1:] *= rng.uniform(0.9, 1.1, 2).astype(np.float32)
    limited = np.clip(hsv, 0, 255).astype(np.uint8)
    coloured: Pixels = cv2.cvtColor(limited, cv2.COLOR_HSV2RGB)
    return coloured


def draw_variants(
    faces: NDArray[np.uint8], count: int, seed: Sequence[int], first: int = 0
) -> NDArray[np.uint8]:
    """``count`` variants of each face, (n, count, 112, 112, 3); the first is the face itself.

    Args:
        faces: (n, 112, 112, 3), all of a set or a block of it.
        count: variants of each.
        seed: of the draws.
        first: place of the first face in the set; a block is drawn as in the whole.
    """
    result = np.empty((len(faces), count, *faces.shape[1:]), np.uint8)
    for index, face in enumerate(faces):
        rng = np.random.default_rng([*seed, first + index])
        result[index, 0] = face
        for variant in range(1, count):
            result[index, variant] = training_variant(face, rng)
    return result
