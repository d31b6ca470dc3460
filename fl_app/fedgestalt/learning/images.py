"""Faces as arrays and tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.cohort import ImageRecord, load_image
from fedgestalt.contracts import FACE_SIZE, InputSpec
from fedgestalt.errors import DataError

Faces = NDArray[np.uint8]
"""Aligned RGB faces, (n, 112, 112, 3)."""


class FaceSource(Protocol):
    """Faces that can be had in blocks: an array, or :class:`FaceFiles`."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, rows: slice, /) -> Faces:
        """Some of them."""


@dataclass(frozen=True)
class FaceFiles:
    """Aligned faces that stay on disk until they are wanted."""

    records: tuple[ImageRecord, ...]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.records)

    def __getitem__(self, rows: slice, /) -> Faces:
        """Load some of them; see :func:`load_faces`."""
        return load_faces(self.records[rows])


def load_faces(records: Iterable[ImageRecord]) -> Faces:
    """Load aligned faces.

    Raises:
        DataError: a file is missing or damaged, or not 112 x 112.
    """
    faces = []
    for record in records:
        face = load_image(record)
        if face.shape != (FACE_SIZE, FACE_SIZE, 3):
            raise DataError(
                f"an aligned face is {face.shape[1]} x {face.shape[0]} pixels, not 112 x 112",
                remedy="run `fedgestalt cohort check` on the folder",
            )
        faces.append(face)
    return np.stack(faces) if faces else np.empty((0, FACE_SIZE, FACE_SIZE, 3), np.uint8)


def to_input(
    faces: Faces, spec: InputSpec, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Tensor for a trunk: (n, 3, size, size), scaled as ``spec`` says, channels last in memory."""
    if spec.size != FACE_SIZE:
        size = (spec.size, spec.size)
        faces = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in faces])
    if spec.channels == "bgr":
        faces = faces[..., ::-1]
    tensor = torch.from_numpy(np.ascontiguousarray(faces)).to(device).permute(0, 3, 1, 2)
    return ((tensor.float() - spec.offset) / spec.scale).to(dtype)
