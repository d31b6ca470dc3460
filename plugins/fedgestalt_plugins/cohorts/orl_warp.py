"""Cohort ``orl-warp``: real photographs with an artificial facial difference and a known answer.

The photographs of :mod:`fedgestalt_plugins.cohorts.orl` are aligned and moved by smooth
displacement fields: eight invented "syndromes" WARP-A to WARP-H, five people each, with a strength
that differs between people. The warped face is aligned again, as a photograph of such a face would
be, so that shifts of the whole face carry no signal. Here a subject is a person, and nobody is both
in a gallery and in the test against it. Six warps are frequent, two are rare.

The people are healthy, which warp they get is chance, and the warps imitate no disease.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import FACE_SIZE, Pixels, Progress
from fedgestalt.errors import DataError
from fedgestalt_plugins.cohorts.orl import LICENCE, PEOPLE, SHOTS, align, photographs

_FREQUENT_WARPS = 6
_TEST_PEOPLE = 2
_SEVERITY = 0.8
_SEED = 3
_KERNEL_WIDTH = 11.0  # of the displacement field, pixels

Moves = dict[str, tuple[float, float]]
"""Displacements in pixels by control point; for points in pairs x counts outwards."""

# Control points in the aligned frame, x and y in pixels, image left before image right.
_CONTROL: Final[Moves] = {
    "outer_eye_left": (29, 51),
    "inner_eye_left": (46, 52),
    "inner_eye_right": (66, 52),
    "outer_eye_right": (83, 51),
    "brow_left": (37, 42),
    "brow_right": (74, 42),
    "nostril_left": (49, 70),
    "nostril_right": (63, 70),
    "nose_tip": (56, 72),
    "mouth_left": (41, 92),
    "mouth_right": (71, 92),
    "upper_lip": (56, 87),
    "lower_lip": (56, 97),
    "chin": (56, 112),
    "jaw_left": (34, 104),
    "jaw_right": (78, 104),
    "forehead": (56, 25),
    "cheek_left": (22, 75),
    "cheek_right": (90, 75),
    "philtrum": (56, 80),  # never moved: anchors the area between nose and lip
}
_WARPS: Final[dict[str, Moves]] = {
    "WARP-A wide-set eyes": {"outer_eye": (2.0, 0), "inner_eye": (3.0, 0)},
    "WARP-B upslanted eyes": {"outer_eye": (0, -3.0), "inner_eye": (0, 1.5)},
    "WARP-C downslanted eyes": {"outer_eye": (0, 3.0), "inner_eye": (0, -1.5)},
    "WARP-D long philtrum": {"nose_tip": (0, -4), "nostril": (0, -4), "upper_lip": (0, 2)},
    "WARP-E small chin": {"chin": (0, -7), "jaw": (-4, -3), "lower_lip": (0, -1)},
    "WARP-F wide mouth": {"mouth": (5, 0), "lower_lip": (0, 3)},
    "WARP-G narrow mouth": {"mouth": (-4, 0), "nostril": (-2.5, 0), "outer_eye": (-1.5, 0)},
    "WARP-H broad jaw": {"jaw": (6, 2), "cheek": (4, 0), "chin": (0, 3)},
}


@dataclass(frozen=True)
class OrlWarp:
    """Cohort source ``orl-warp``."""

    name: str = "orl-warp"
    summary: str = "the ORL photographs with eight artificial warps of the face as syndromes"
    licence: str = LICENCE
    version: str = "v2"
    has_patients: bool = False

    def build(self, target: Path, progress: Progress) -> None:
        """Align and warp the 400 photographs into ``target``.

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

        rng = np.random.default_rng(_SEED)
        people = [int(p) for p in rng.permutation(np.arange(1, PEOPLE + 1))]
        label_of = {person: 1 + turn % len(_WARPS) for turn, person in enumerate(people)}
        strength = {p: _SEVERITY * float(np.clip(rng.normal(1, 0.25), 0.4, 1.6)) for p in people}
        fields = {label: displacement(moves) for label, moves in enumerate(_WARPS.values(), 1)}
        images: dict[str, ImageRecord] = {}
        image_file(target, "").parent.mkdir(parents=True, exist_ok=True)
        for photograph in photographs():
            person, label = photograph.person, label_of[photograph.person]
            face = warped_face(photograph.pixels, fields[label] * np.float32(strength[person]))
            image_id = f"{person:02d}-{photograph.shot:02d}"
            path = image_file(target, image_id)
            save_jpeg(path, face)
            images[image_id] = ImageRecord(
                image_id, f"s{person:02d}", label, path, facts={"image_type": "warped photograph"}
            )
            progress(len(images), PEOPLE * SHOTS)
        roles = Roles()
        for label in fields:
            members = [
                [i for i, r in images.items() if r.subject == f"s{person:02d}"]
                for person in sorted(people)
                if label_of[person] == label
            ]
            if label <= _FREQUENT_WARPS:
                roles.add_frequent(members, rng, test=_TEST_PEOPLE)
            else:
                roles.add_rare(members, rng, test=_TEST_PEOPLE)
        cohort = Cohort(
            name=self.name,
            version=self.version,
            root=target,
            images=images,
            syndromes={label: Syndrome(label, name) for label, name in enumerate(_WARPS, 1)},
            classes=tuple(range(1, _FREQUENT_WARPS + 1)),
            train=tuple(roles.train),
            frequent_test=tuple(roles.frequent_test),
            rare_splits=roles.rare_splits,
        )
        write_cohort(cohort, target)


def warped_face(photograph: Pixels, field: NDArray[Any]) -> Pixels:
    """Align, warp and align again; the first alignment stays if the warped face is not found."""
    warped = _warp(align(photograph), field)
    try:
        return align(warped)
    except DataError:
        return warped


def displacement(moves: Moves) -> NDArray[np.float32]:
    """Smooth field (112, 112, 2) in pixels through the moves: Gaussian kernels with a ridge."""
    control = np.array(list(_CONTROL.values()), float)
    target = np.zeros_like(control)
    for index, name in enumerate(_CONTROL):
        stem, _, side = name.rpartition("_")
        if side in ("left", "right") and stem in moves:
            dx, dy = moves[stem]
            target[index] = (-dx if side == "left" else dx, dy)
        elif name in moves:
            target[index] = moves[name]
    rows, columns = np.mgrid[:FACE_SIZE, :FACE_SIZE]
    grid = np.stack([columns.ravel(), rows.ravel()], 1).astype(float)

    def kernel(points: NDArray[Any]) -> NDArray[Any]:
        squared = ((points[:, None] - control[None]) ** 2).sum(2)
        values: NDArray[Any] = np.exp(-squared / (2 * _KERNEL_WIDTH**2))
        return values

    weights = np.linalg.solve(kernel(control) + 0.05 * np.eye(len(control)), target)
    return (kernel(grid) @ weights).reshape(FACE_SIZE, FACE_SIZE, 2).astype(np.float32)


def _warp(face: Pixels, field: NDArray[Any]) -> Pixels:
    """Move the pixels of an aligned face along ``field``."""
    import cv2

    rows, columns = np.mgrid[:FACE_SIZE, :FACE_SIZE].astype(np.float32)
    x, y = columns - field[..., 0], rows - field[..., 1]
    warped: Pixels = cv2.remap(face, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return warped
