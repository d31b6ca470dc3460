"""Held-out images of a cohort."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedgestalt.cohort import Cohort, ImageRecord, Syndrome
from fedgestalt.errors import DataError
from fedgestalt.learning import data as data_module
from fedgestalt.learning.data import HELD_OUT_IMAGES, held_out_set, training_set
from fedgestalt.learning.training import class_weights

CLASSES = (11, 12, 13)


@pytest.fixture(autouse=True)
def faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A face is known by its first pixel: the number of its image."""

    def load(records: list[ImageRecord]) -> np.ndarray:
        loaded = np.zeros((len(records), 112, 112, 3), np.uint16)
        loaded[:, 0, 0, 0] = [int(record.image_id) for record in records]
        return loaded

    monkeypatch.setattr(data_module, "load_faces", load)


def cohort(tests: int) -> Cohort:
    images = {
        str(i): ImageRecord(str(i), f"subject-{i}", CLASSES[i % 3], Path(f"{i}.jpg"))
        for i in range(tests + 6)
    }
    names = list(images)
    return Cohort(
        name="bonn",
        version="v1",
        root=Path(),
        images=images,
        syndromes={i: Syndrome(i, f"syndrome {i}") for i in CLASSES},
        classes=CLASSES,
        train=tuple(names[tests:]),
        frequent_test=tuple(names[:tests]),
    )


@pytest.mark.parametrize("tests", [1, 2, 7, HELD_OUT_IMAGES - 1, HELD_OUT_IMAGES])
def test_all_test_images_are_held_out_with_their_labels_and_no_training_image(tests: int) -> None:
    found = held_out_set(cohort(tests))
    assert found.faces[:, 0, 0, 0].tolist() == list(range(tests))
    assert found.targets.tolist() == [i % 3 for i in range(tests)]
    assert found.classes == 3


def test_of_very_many_an_even_sample_is_taken() -> None:
    tests = 5 * HELD_OUT_IMAGES
    found = held_out_set(cohort(tests))
    rows = found.faces[:, 0, 0, 0].astype(int)
    assert len(rows) == len(found.targets) == HELD_OUT_IMAGES
    assert (rows[0], rows[-1]) == (0, tests - 1)
    assert set(np.diff(rows)) <= {5, 6}
    assert found.targets.tolist() == [row % 3 for row in rows]


def test_a_cohort_without_test_images_has_an_empty_set() -> None:
    found = held_out_set(cohort(0))
    assert (len(found.faces), len(found.targets), found.classes) == (0, 0, 3)


def test_syndromes_that_the_consortium_does_not_train_are_left_out() -> None:
    whole = cohort(9)
    found = held_out_set(dataclasses.replace(whole, classes=(11, 13)))
    assert set(found.targets.tolist()) == {0, 1}
    assert all(row % 3 != 1 for row in found.faces[:, 0, 0, 0])


def test_a_class_of_one_subject_trains_and_is_not_measured() -> None:
    """With its only image in training there is none to hold out."""
    whole = cohort(9)
    first = next(i for i in whole.train if whole.images[i].syndrome == 12)
    others = [i for i in whole.train if whole.images[i].syndrome != 12]
    tests = [i for i in whole.frequent_test if whole.images[i].syndrome != 12]
    alone = dataclasses.replace(whole, train=(first, *others), frequent_test=tuple(tests))
    found, held_out = training_set(alone), held_out_set(alone)
    assert found.targets.tolist().count(1) == 1
    assert 1 not in held_out.targets
    assert class_weights(found.targets, 3)[1] == 1


def test_a_syndrome_that_is_not_in_the_class_list_is_a_sentence() -> None:
    fewer = dataclasses.replace(cohort(0), classes=(11,))
    with pytest.raises(DataError) as fault:
        training_set(fewer)
    assert "2 syndromes of training images are not in the class list" in str(fault.value)
    assert "use the consortium's lookup table" in fault.value.remedy
