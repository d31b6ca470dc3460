"""Features of frozen trunks: the same with and without a cache, and never stale."""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedgestalt.errors import DataError, SiteError
from fedgestalt.hooks import get_registry
from fedgestalt.learning import blocks, trunk
from fedgestalt.learning import features as features_module
from fedgestalt.learning.blocks import Pictures
from fedgestalt.learning.ensemble import Member, build_ensemble
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
CPU = torch.device("cpu")


def build_member(seed: int = 1, **options: Any) -> Member:
    member = MemberSpec(name="a", backbone="iresnet", options=TINY | options, trainable="neck")
    return build_ensemble(EnsembleSpec(members=(member,), seed=seed), 2, get_registry()).members[0]


def noise(images: int = 3, variants: int = 2, seed: int = 0) -> NDArray[np.uint8]:
    shape = (images, variants, 112, 112, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def member() -> Member:
    return build_member()


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def compute_nothing(*arguments: object) -> None:
    raise AssertionError("the trunk ran again")


def test_cached_features_equal_uncached_ones(member: Member, tmp_path: Path) -> None:
    plain = trunk_features(member, noise(), CPU)
    cached = trunk_features(member, noise(), CPU, tmp_path)
    again = trunk_features(member, noise(), CPU, tmp_path)
    assert plain.shape == (3, 2, *member.feature_shape)
    assert plain.dtype == cached.dtype
    assert torch.equal(plain, cached)
    assert torch.equal(plain, again)
    assert len(files(tmp_path)) == 1


def test_a_file_that_is_there_saves_the_computation(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trunk_features(member, noise(), CPU, tmp_path).clone()
    monkeypatch.setattr(features_module, "_compute", compute_nothing)
    assert torch.equal(trunk_features(member, noise(), CPU, tmp_path), first)


def test_features_are_those_of_the_trunk(member: Member) -> None:
    from fedgestalt.learning.images import to_input

    variants = noise(1, 1)
    with torch.inference_mode():
        expected = member.trunk(to_input(variants[0], member.input, CPU, torch.float32))
    found = trunk_features(member, variants, CPU)[0].float()
    assert torch.nn.functional.cosine_similarity(found.ravel(), expected.ravel(), dim=0) > 0.99


def test_every_variant_of_every_image_has_its_own_place(member: Member) -> None:
    whole = trunk_features(member, noise(), CPU).float()
    for image in range(3):
        for variant in range(2):
            alone = noise()[image : image + 1, variant : variant + 1]
            single = trunk_features(member, alone, CPU)[0, 0].float()
            torch.testing.assert_close(whole[image, variant], single, rtol=0.05, atol=0.05)
    assert not torch.allclose(whole[0, 0], whole[1, 0], rtol=0.05, atol=0.05)


def test_the_size_of_batches_does_not_matter(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = trunk_features(member, noise(), CPU).float()
    monkeypatch.setattr(trunk, "BATCH", 4)
    torch.testing.assert_close(
        trunk_features(member, noise(), CPU).float(), together, rtol=0.05, atol=0.05
    )


# --- never stale ---------------------------------------------------------------------------------


def test_other_pixels_meet_another_file(member: Member, tmp_path: Path) -> None:
    variants = noise()
    trunk_features(member, variants, CPU, tmp_path)
    variants[2, 1, 50, 50, 0] ^= 255
    found = trunk_features(member, variants, CPU, tmp_path)
    assert len(files(tmp_path)) == 2
    assert torch.equal(found, trunk_features(member, variants, CPU))


def test_the_same_pixels_dealt_otherwise_meet_another_file(member: Member, tmp_path: Path) -> None:
    trunk_features(member, noise(3, 2), CPU, tmp_path)
    turned = trunk_features(member, noise(3, 2).reshape(2, 3, 112, 112, 3), CPU, tmp_path)
    assert turned.shape[:2] == (2, 3)
    assert len(files(tmp_path)) == 2


def test_another_trunk_meets_another_file(member: Member, tmp_path: Path) -> None:
    trunk_features(member, noise(), CPU, tmp_path)
    other = build_member(seed=2)
    found = trunk_features(other, noise(), CPU, tmp_path)
    assert len(files(tmp_path)) == 2
    assert torch.equal(found, trunk_features(other, noise(), CPU))


def test_a_trunk_that_sees_another_size_meets_another_file(member: Member, tmp_path: Path) -> None:
    large = build_member(input_size=48)
    trunk_features(large, noise(), CPU, tmp_path)
    found = trunk_features(member, noise(), CPU, tmp_path)
    assert len(files(tmp_path)) == 2
    assert torch.equal(found, trunk_features(member, noise(), CPU))


def test_changes_in_memory_do_not_reach_the_file(member: Member, tmp_path: Path) -> None:
    trunk_features(member, noise(), CPU, tmp_path).zero_()
    assert trunk_features(member, noise(), CPU, tmp_path).any()


@pytest.mark.parametrize("cached", [False, True])
def test_features_are_the_same_after_their_pages_were_given_back(
    member: Member, tmp_path: Path, cached: bool
) -> None:
    found = trunk_features(member, noise(), CPU, tmp_path if cached else None)
    before = found.clone()
    features_module.give_pages_back(found)
    assert torch.equal(found, before)


def test_giving_pages_back_gives_memory_back(tmp_path: Path) -> None:
    size = 64 << 20
    (tmp_path / "file").write_bytes(bytes(size))
    found = features_module._mapped(tmp_path / "file", (size // 4,), torch.float32, False)
    assert not found.any()
    full = resident()
    features_module.give_pages_back(found)
    assert full - resident() > 0.9 * size


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- files ---------------------------------------------------------------------------------------


def test_files_are_readable_by_their_user_alone(member: Member, tmp_path: Path) -> None:
    cache = tmp_path / "store" / "cache"
    before = os.umask(0)
    try:
        trunk_features(member, noise(), CPU, cache)
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    (file,) = cache.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_name_of_a_file_tells_nothing_but_a_digest(member: Member, tmp_path: Path) -> None:
    trunk_features(member, noise(), CPU, tmp_path)
    (name,) = files(tmp_path)
    digest = name.removeprefix("features-").removesuffix(".bin")
    assert len(digest) == 32
    assert int(digest, 16) >= 0


def test_a_full_disk_is_an_error_before_anything_is_computed(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(features_module, "_compute", compute_nothing)
    with pytest.raises(SiteError, match=r"No space left on device.*free disk space"):
        trunk_features(member, noise(), CPU, tmp_path)
    assert files(tmp_path) == set()


def test_the_whole_file_is_reserved_before_anything_is_computed(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = []

    def note(handle: int, offset: int, size: int) -> None:
        reserved.append((offset, size))
        os.truncate(handle, size)

    monkeypatch.setattr(os, "posix_fallocate", note)
    found = trunk_features(member, noise(), CPU, tmp_path)
    assert reserved == [(0, found.numel() * found.element_size())]


def test_a_failure_half_way_leaves_no_file(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trunk_features(member, noise(), CPU, tmp_path, fail)
    assert files(tmp_path) == set()


def test_what_killed_processes_left_goes_after_two_days_and_nothing_else(
    member: Member, tmp_path: Path
) -> None:
    ours, recent, somebodys = (
        tmp_path / name
        for name in (".fedgestalt-a.partial", ".fedgestalt-b.partial", "film.partial")
    )
    for path, days in ((ours, 3), (recent, 1), (somebodys, 3)):
        path.write_text("")
        then = time.time() - days * 24 * 3600
        os.utime(path, (then, then))
    trunk_features(member, noise(), CPU, tmp_path)
    assert files(tmp_path) > {recent.name, somebodys.name}
    assert ours.name not in files(tmp_path)


def test_a_cache_that_cannot_be_made_is_an_error(member: Member, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="the feature cache cannot be written"):
        trunk_features(member, noise(), CPU, tmp_path / "file" / "cache")


def test_a_cache_that_is_emptied_in_between_is_an_error(member: Member, tmp_path: Path) -> None:
    def empty(done: int, total: int) -> None:
        for path in tmp_path.iterdir():
            path.unlink()

    with pytest.raises(SiteError, match="leave the cache alone while a job is running"):
        trunk_features(member, noise(), CPU, tmp_path, empty)


@pytest.mark.parametrize("cached", [False, True])
def test_progress_counts_images_up_to_all(member: Member, tmp_path: Path, cached: bool) -> None:
    told: list[tuple[int, int]] = []
    cache = tmp_path if cached else None
    trunk_features(member, noise(), CPU, cache, lambda done, total: told.append((done, total)))
    assert told[-1] == (3, 3)
    assert told == sorted(told)


# --- in blocks -----------------------------------------------------------------------------------


def in_blocks(variants: NDArray[np.uint8]) -> Pictures:
    return Pictures(*variants.shape[:2], lambda start, stop: variants[start:stop].copy())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks.block_ranges, "__defaults__", (2,))


@pytest.mark.parametrize("cached", [False, True])
def test_blocks_give_the_features_of_the_whole(
    member: Member, tmp_path: Path, small_blocks: None, cached: bool
) -> None:
    found = trunk_features(member, in_blocks(noise(5)), CPU, tmp_path if cached else None)
    for image in range(5):
        alone = trunk_features(member, noise(5)[image : image + 1], CPU)[0]
        torch.testing.assert_close(found[image].float(), alone.float(), rtol=0.05, atol=0.05)


def test_an_image_that_changes_in_between_is_an_error_and_leaves_no_file(
    member: Member, tmp_path: Path, small_blocks: None
) -> None:
    variants, calls = noise(5), []

    def make(start: int, stop: int) -> NDArray[np.uint8]:
        calls.append(start)
        if len(calls) == 6:  # the last block, when it is computed on
            variants[4, 0, 0, 0, 0] ^= 1
        return variants[start:stop].copy()

    with pytest.raises(DataError, match=r"an image changed .* run it again"):
        trunk_features(member, Pictures(5, 2, make), CPU, tmp_path)
    assert len(calls) == 6
    assert files(tmp_path) == set()


def test_an_image_that_vanishes_in_between_is_an_error_and_leaves_no_file(
    member: Member, tmp_path: Path, small_blocks: None
) -> None:
    calls = []

    def make(start: int, stop: int) -> NDArray[np.uint8]:
        calls.append(start)
        if len(calls) == 6:
            raise DataError("the image file cannot be read")
        return noise(5)[start:stop]

    with pytest.raises(DataError, match="cannot be read"):
        trunk_features(member, Pictures(5, 2, make), CPU, tmp_path)
    assert files(tmp_path) == set()


def test_another_way_of_computing_meets_another_file(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk_features(member, noise(), CPU, tmp_path)
    monkeypatch.setattr(features_module, "_FORMAT", -1)
    trunk_features(member, noise(), CPU, tmp_path)
    assert len(files(tmp_path)) == 2
