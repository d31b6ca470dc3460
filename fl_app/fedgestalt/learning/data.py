"""A cohort's training images as arrays."""

from __future__ import annotations

import hashlib

import numpy as np

from fedgestalt.cohort import Cohort
from fedgestalt.errors import DataError
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.training import TrainingSet

HELD_OUT_IMAGES = 200


def training_set(cohort: Cohort) -> TrainingSet:
    """The training images of a cohort, with class indices in the consortium's order.

    Raises:
        DataError: a training image is damaged, or its syndrome is not in the class list.
    """
    index = {syndrome: i for i, syndrome in enumerate(cohort.classes)}
    records = list(cohort.records(cohort.train))
    unknown = {record.syndrome for record in records} - index.keys()
    if unknown:
        raise DataError(
            f"{len(unknown)} syndromes of training images are not in the class list",
            where=str(cohort.root),
            remedy="use the consortium's lookup table",
        )
    targets = np.array([index[record.syndrome] for record in records], np.int64)
    return TrainingSet(load_faces(records), targets, len(cohort.classes))


def held_out_set(cohort: Cohort) -> TrainingSet:
    """Test images of frequent syndromes, at most :data:`HELD_OUT_IMAGES`, spread evenly.

    Raises:
        DataError: one is damaged.
    """
    index = {syndrome: i for i, syndrome in enumerate(cohort.classes)}
    known = [r for r in cohort.records(cohort.frequent_test) if r.syndrome in index]
    rows = np.unique(np.linspace(0, len(known) - 1, HELD_OUT_IMAGES).astype(np.int64))
    records = [known[row] for row in rows] if known else []
    targets = np.array([index[record.syndrome] for record in records], np.int64)
    return TrainingSet(load_faces(records), targets, len(cohort.classes))


def local_seed(seed: int, site: str) -> int:
    """Seed of augmentation and batch order at one site; nothing secret depends on it."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{site}".encode()).digest()[:7], "big")
