"""Image variants to train and to encode with."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgestalt.learning import augment

Image = NDArray[np.uint8]


def noise(count: int = 1, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (count, 112, 112, 3), np.uint8)


def test_an_image_is_encoded_plain_mirrored_grey_and_both() -> None:
    (image,) = noise()
    grey = augment.to_grey(image)
    variants = augment.test_variants(image)
    expected = {
        (False, False): image,
        (True, False): np.fliplr(image),
        (False, True): grey,
        (True, True): np.fliplr(grey),
    }
    assert len(variants) == len(augment.TEST_VARIANTS)
    for variant, (_, flip, is_grey) in zip(variants, augment.TEST_VARIANTS, strict=True):
        np.testing.assert_array_equal(variant, expected[flip, is_grey])


def test_names_of_variants_differ() -> None:
    names = [name for name, _, _ in augment.TEST_VARIANTS]
    assert len(set(names)) == 4


def test_grey_has_equal_channels_and_the_luma_of_the_standard() -> None:
    (image,) = noise()
    grey = augment.to_grey(image)
    assert grey.shape == image.shape
    assert (grey == grey[..., :1]).all()
    luma = image @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[..., 0] - luma).max() <= 1


def test_grey_of_grey_is_the_same() -> None:
    grey = augment.to_grey(noise()[0])
    np.testing.assert_array_equal(augment.to_grey(grey), grey)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_a_variant_looks_like_a_face_and_depends_on_the_generator_alone(seed: int) -> None:
    (image,) = noise()
    first = augment.training_variant(image, np.random.default_rng(seed))
    again = augment.training_variant(image, np.random.default_rng(seed))
    assert first.shape == (112, 112, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(image, noise()[0])


def test_variants_are_of_many_kinds() -> None:
    (image,) = noise()
    grey = mirrored = small = 0
    for seed in range(300):
        variant = augment.training_variant(image, np.random.default_rng(seed)).astype(int)
        luma, original = variant.mean(2), image.mean(2)
        same = np.corrcoef(luma.ravel(), original.ravel())[0, 1]
        turned = np.corrcoef(luma.ravel(), original[:, ::-1].ravel())[0, 1]
        grey += bool((variant == variant[..., :1]).all())
        mirrored += bool(turned > same)
        small += bool(max(same, turned) < 0.8)
    assert 10 <= grey <= 60
    assert 110 <= mirrored <= 190
    assert 10 <= small <= 60


@given(seed=st.integers(0, 2**32), level=st.integers(0, 255))
@settings(max_examples=40, deadline=None)
def test_brightness_stays_within_a_tenth_and_grey_stays_grey(seed: int, level: int) -> None:
    image = np.full((112, 112, 3), level, np.uint8)
    variant = augment.training_variant(image, np.random.default_rng(seed)).astype(int)
    assert np.abs(variant - level).max() <= 0.1 * level + 1
    assert (variant == variant[..., :1]).all()


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_drawn_variant_is_the_face_itself(count: int) -> None:
    faces = noise(2)
    drawn = augment.draw_variants(faces, count, (1, 0))
    assert drawn.shape == (2, count, 112, 112, 3)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:, 0], faces)


def test_drawn_variants_depend_on_the_seed_alone() -> None:
    faces = noise(2)
    drawn = augment.draw_variants(faces, 6, (1, 0))
    np.testing.assert_array_equal(augment.draw_variants(faces, 6, (1, 0)), drawn)
    for seed in ((1, 1), (2, 0)):
        assert (augment.draw_variants(faces, 6, seed)[:, 1:] != drawn[:, 1:]).any()


def test_the_variants_of_a_face_do_not_depend_on_the_faces_behind_it() -> None:
    faces = noise(3)
    few, many = (augment.draw_variants(faces[:n], 4, (1, 0)) for n in (2, 3))
    np.testing.assert_array_equal(many[:2], few)


def test_two_like_faces_are_varied_differently() -> None:
    faces = np.concatenate([noise(), noise()])
    drawn = augment.draw_variants(faces, 6, (1, 0))
    assert (drawn[0, 1:] != drawn[1, 1:]).any()


def test_no_face_has_no_variants() -> None:
    assert augment.draw_variants(noise(0), 4, (1, 0)).shape == (0, 4, 112, 112, 3)
