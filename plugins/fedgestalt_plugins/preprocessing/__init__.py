"""Built-in preprocessing. Listing it does not import OpenCV; aligning a face does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field

from fedgestalt.contracts import AlignedFace, Options, Pixels, Preprocessor
from fedgestalt.hooks import hookimpl


class YuNetOptions(Options):
    """What counts as a face."""

    min_face_pixels: float = Field(default=40, gt=0, description="width of the face")
    min_confidence: float = Field(default=0.6, gt=0, lt=1, description="score of the detector")


class YuNetArcFace:
    """YuNet detection (Wu et al. 2023), then a similarity transform onto the ArcFace template."""

    name: ClassVar[str] = "yunet-arcface"
    summary: ClassVar[str] = "YuNet face detection in any orientation, ArcFace five-point alignment"
    licence: ClassVar[str] = "Apache-2.0 AND MIT"
    options: ClassVar[type[Options]] = YuNetOptions

    def align(self, photograph: Pixels, options: YuNetOptions) -> AlignedFace:
        """Return the largest face of an RGB photograph, (h, w, 3) uint8, on the template.

        Raises:
            DataError: no face, or one narrower than ``min_face_pixels``.
        """
        from fedgestalt_plugins.preprocessing.yunet import align

        return align(photograph, options)


@hookimpl
def fedgestalt_preprocessors() -> Iterable[Preprocessor]:
    """Face detection and alignment."""
    return [YuNetArcFace()]
