"""Galleries: rows of one party, kept by kernel and owner."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.federation.matching.galleries import (
    Galleries,
    Gallery,
    Rows,
    masked_rows,
    no_rows,
)
from fedgestalt.federation.matching.messages import Handles
from fedgestalt.similarity.labels import SEALED_BYTES

KERNEL, OTHER = "a" * 32, "b" * 32
PURPOSE = {"ensemble": "e" * 64, "strategy": "isometry"}


def handles(*numbers: int) -> Handles:
    return np.array([[number] * 16 for number in numbers], np.uint8).reshape(-1, 16)


def rows(*numbers: int, size: int = 4) -> Rows:
    values = np.full((len(numbers), size), np.array(numbers)[:, None], np.float32)
    return masked_rows(values, handles(*numbers), np.zeros((len(numbers), SEALED_BYTES), np.uint8))


def shares(*numbers: int) -> Rows:
    words = np.full((len(numbers), 3), np.array(numbers)[:, None] << 40, np.uint64)
    keys = np.full((len(numbers), 80), 7, np.uint8)
    return Rows(words, handles(*numbers), np.empty((len(numbers), 0), np.uint8), keys)


def filled(folder: Path) -> Galleries:
    galleries = Galleries(folder, "bonn")
    for number, kernel in enumerate((KERNEL, OTHER), 1):
        galleries.begin(kernel, PURPOSE, number, ("bonn", "ulm"))
        gallery = galleries.gallery(kernel)
        gallery.enrol("berlin", handles(), shares(1, 2, 3))
        gallery.enrol("leuven", handles(), shares(4))
    return galleries


def test_shares_come_back_as_they_were(tmp_path: Path) -> None:
    gallery = filled(tmp_path).gallery(KERNEL)
    found = gallery.part("berlin")
    for name in ("rows", "handles", "labels", "keys"):
        one, other = getattr(found, name), getattr(shares(1, 2, 3), name)
        assert np.array_equal(one, other)
        assert one.dtype == other.dtype
    assert gallery.sites == ["berlin", "leuven"]


def test_a_gallery_knows_who_computes_and_what_it_is_for(tmp_path: Path) -> None:
    galleries = filled(tmp_path)
    assert galleries.computing(KERNEL) == ("bonn", "ulm")
    assert galleries.computing("c" * 32) == ()
    assert galleries.known(PURPOSE) == {KERNEL: 1, OTHER: 2}
    galleries.keep_only(OTHER, {**PURPOSE, "strategy": "flake"})
    assert galleries.known(PURPOSE) == {KERNEL: 1, OTHER: 2}
    galleries.keep_only(OTHER, PURPOSE)
    assert galleries.known(PURPOSE) == {OTHER: 2}
    assert not (tmp_path / KERNEL).exists()


def test_what_is_withdrawn_goes_from_every_kernel_and_every_file(tmp_path: Path) -> None:
    galleries = filled(tmp_path)
    untouched = (tmp_path / KERNEL / f"{b'leuven'.hex()}.npz").stat().st_mtime_ns
    galleries.forget(handles(2, 9))
    for kernel in (KERNEL, OTHER):
        gallery = galleries.gallery(kernel)
        assert np.array_equal(gallery.part("berlin").rows, shares(1, 3).rows)
        assert len(gallery.part("leuven")) == 1
    assert (tmp_path / KERNEL / f"{b'leuven'.hex()}.npz").stat().st_mtime_ns == untouched
    galleries.forget(handles(1, 3))
    assert galleries.gallery(KERNEL).sites == ["leuven"]
    assert [path.stem for path in (tmp_path / KERNEL).glob("*.npz")] == [b"leuven".hex()]


def test_all_rows_of_a_site_can_be_replaced_under_the_same_handles() -> None:
    gallery = Gallery()
    gallery.enrol("berlin", handles(), rows(1, 2))
    gallery.enrol("berlin", handles(1, 2), rows(2, 3))
    assert np.array_equal(gallery.part("berlin").handles, handles(2, 3))


def test_the_order_is_that_of_enrolment() -> None:
    gallery = Gallery()
    gallery.enrol("berlin", handles(), rows(5, 1, 3))
    gallery.enrol("berlin", handles(1), rows(2))
    assert np.array_equal(gallery.part("berlin").handles, handles(5, 3, 2))


@pytest.mark.parametrize(
    ("removed", "added", "says"),
    [
        (handles(9), no_rows(), "removes rows that it does not have"),
        (handles(), rows(1), "sent a row twice"),
        (handles(), rows(4), "sent a row twice"),
        (handles(), rows(5, 5), "sent a row twice"),
        (handles(), rows(5, size=3), "its rows have 3 dimensions, the gallery 4"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    removed: Handles, added: Rows, says: str
) -> None:
    gallery = Gallery()
    gallery.enrol("berlin", handles(), rows(1, 2))
    gallery.enrol("leuven", handles(), rows(4))
    with pytest.raises(PeerError, match=says):
        gallery.enrol("berlin", removed, added)
    assert len(gallery.rows) == 3


@pytest.mark.parametrize(("holder", "fault"), [("server", ServerError), ("bonn", SiteError)])
def test_a_damaged_file_is_the_fault_of_who_keeps_it(
    tmp_path: Path, holder: str, fault: type[Exception]
) -> None:
    filled(tmp_path)
    path = tmp_path / KERNEL / f"{b'berlin'.hex()}.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(fault, match=r"damaged .*; remove it; the next matching job enrols") as said:
        Galleries(tmp_path, holder).gallery(KERNEL)
    assert said.value.where == holder  # type: ignore[attr-defined]
