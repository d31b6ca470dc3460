"""Pictures in blocks are the pictures of the whole, and the next block is made meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedgestalt.cohort import ImageRecord, save_jpeg
from fedgestalt.errors import DataError
from fedgestalt.learning.augment import draw_variants
from fedgestalt.learning.blocks import (
    ahead,
    block_ranges,
    encoding_pictures,
    given_pictures,
    training_pictures,
    variants_of,
)
from fedgestalt.learning.images import FaceFiles, load_faces


@pytest.fixture(scope="module")
def faces() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (7, 112, 112, 3), np.uint8)


def records_of(folder: Path, faces: NDArray[np.uint8]) -> tuple[ImageRecord, ...]:
    records = []
    for number, face in enumerate(faces):
        path = folder / f"{number}.jpg"
        save_jpeg(path, face)
        records.append(ImageRecord(str(number), "s", 0, path))
    return tuple(records)


def test_blocks_cover_every_image_once() -> None:
    assert block_ranges(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert block_ranges(0) == []


def test_training_variants_in_blocks_are_those_of_the_whole(faces: NDArray[np.uint8]) -> None:
    whole = draw_variants(faces, 4, (1, 0))
    pictures = training_pictures(faces, 4, (1, 0))
    for start, stop in block_ranges(7, 3):
        np.testing.assert_array_equal(pictures.make(start, stop), whole[start:stop])
        np.testing.assert_array_equal(pictures.make(start, stop), whole[start:stop])


def test_test_variants_in_blocks_are_those_of_the_whole(faces: NDArray[np.uint8]) -> None:
    whole = variants_of(faces)
    assert whole.shape == (7, 4, 112, 112, 3)
    np.testing.assert_array_equal(encoding_pictures(faces).make(2, 5), whole[2:5])
    assert variants_of(faces[:0]).shape == (0, 4, 112, 112, 3)


def test_files_are_read_when_they_are_wanted(faces: NDArray[np.uint8], tmp_path: Path) -> None:
    records = records_of(tmp_path, faces)
    files = FaceFiles(records)
    assert len(files) == 7
    np.testing.assert_array_equal(files[2:4], load_faces(records)[2:4])
    records[5].path.unlink()
    assert len(files[0:5]) == 5
    with pytest.raises(DataError, match="cannot be read"):
        files[4:7]


def test_the_next_block_is_made_while_the_last_is_used() -> None:
    second = threading.Event()

    def make(start: int, stop: int) -> int:
        if start == 1:
            second.set()
        return start

    blocks = ahead(make, block_ranges(3, 1))
    assert next(blocks) == (0, 1, 0)
    assert second.wait(10)
    assert [block for _, _, block in blocks] == [1, 2]


def test_no_more_than_two_blocks_are_there_at_a_time() -> None:
    made: list[int] = []

    def make(start: int, stop: int) -> int:
        made.append(start)
        return start

    for start, _, _ in ahead(make, block_ranges(20, 1)):
        assert len(made) <= start + 2


def test_a_fault_of_the_maker_is_raised_in_the_place_of_its_block() -> None:
    def make(start: int, stop: int) -> int:
        if start == 2:
            raise DataError("damaged")
        return start

    blocks = ahead(make, block_ranges(4, 1))
    assert [next(blocks)[2], next(blocks)[2]] == [0, 1]
    with pytest.raises(DataError, match="damaged"):
        next(blocks)


def test_given_pictures_are_the_array(faces: NDArray[np.uint8]) -> None:
    pictures = given_pictures(faces[:6].reshape(3, 2, 112, 112, 3))
    assert (pictures.images, pictures.variants) == (3, 2)
    np.testing.assert_array_equal(pictures.make(1, 3)[0, 0], faces[2])
