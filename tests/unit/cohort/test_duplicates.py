"""Copies of a photograph are found, other photographs are not taken for copies."""

import cv2
import numpy as np
import pytest

from fedgestalt.cohort.duplicates import MAX_BITS, MIN_CORRELATION, copies, fingerprint


def face(seed):
    """A smooth picture, as faces are; different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 190, (14, 14, 3)).astype(np.float32)
    return cv2.resize(coarse, (112, 112), interpolation=cv2.INTER_CUBIC).clip(0, 255).astype("u1")


def stored_again(pixels):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1)


def scaled(pixels):
    small = cv2.resize(pixels, (80, 80), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (112, 112))


def brighter(pixels):
    return cv2.convertScaleAbs(pixels, alpha=1.0, beta=25)


def grey(pixels):
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def found(pictures, owners):
    return list(copies([fingerprint(p) for p in pictures], owners))


@pytest.mark.parametrize("change", [stored_again, scaled, brighter, grey])
@pytest.mark.parametrize("seed", range(5))
def test_a_changed_copy_is_found(change, seed):
    pictures = [face(100), face(seed), change(face(seed))]
    assert (pictures[1] != pictures[2]).any()
    assert found(pictures, ["a", "b", "c"]) == [(2, 1)]


def test_copies_of_one_owner_are_nothing_to_report():
    assert found([face(1), brighter(face(1)), face(2)], ["a", "a", "b"]) == []


def test_a_copy_is_told_once_with_the_first_of_another_owner():
    pictures = [face(1), face(1), brighter(face(1)), grey(face(1))]
    assert found(pictures, ["a", "b", "b", "c"]) == [(1, 0), (2, 0), (3, 0)]


def test_many_different_pictures_have_no_copy():
    assert found([face(seed) for seed in range(200)], list(range(200))) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_picture_that_is_nearly_the_same_is_no_copy(seed):
    """As two photographs of one person are: within the bits of the hash, below the correlation."""
    one = face(seed)
    other = cv2.addWeighted(one, 0.88, face(seed + 500), 0.12, 0)
    prints = [fingerprint(picture) for picture in (one, other)]
    assert int((prints[0].bits != prints[1].bits).sum()) <= MAX_BITS
    alike = float(np.corrcoef(*(p.grey.ravel() for p in prints))[0, 1])
    assert 0.97 < alike < MIN_CORRELATION
    assert list(copies(prints, ["a", "b"])) == []


def test_a_copy_is_found_across_blocks():
    pictures = [face(seed) for seed in range(1100)]
    pictures[1050] = brighter(pictures[3])
    assert found(pictures, list(range(1100))) == [(1050, 3)]


def test_a_picture_that_shows_nothing_has_no_fingerprint():
    assert fingerprint(np.full((112, 112, 3), 90, np.uint8)) is None
    assert list(copies([], [])) == []
