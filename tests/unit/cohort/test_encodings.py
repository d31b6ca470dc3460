"""Files of encodings: written, read, refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgestalt.cohort import EncodingPart, EncodingTable, read_encodings, write_encodings
from fedgestalt.errors import DataError

PARTS = tuple(
    EncodingPart(model, flip, gray, size)
    for model, size in (("a", 3), ("b", 2))
    for flip in (False, True)
    for gray in (False, True)
)
IMAGES = ("17", "4-b", "x.y")


def table() -> EncodingTable:
    """Three encodings, each of eight vectors of length 1."""
    rng = np.random.default_rng(0)
    blocks = []
    for part in PARTS:
        block = rng.normal(size=(len(IMAGES), part.size))
        blocks.append(block / np.linalg.norm(block, axis=1, keepdims=True))
    vectors = np.concatenate(blocks, axis=1) / np.sqrt(len(PARTS))
    return EncodingTable(IMAGES, vectors.astype(np.float32), "e" * 64, PARTS)


@pytest.fixture(params=[".npz", ".csv"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"encodings{request.param}"
    write_encodings(path, table())
    return path


def test_what_was_written_is_read(file: Path) -> None:
    found, written = read_encodings(file), table()
    assert found.image_ids == written.image_ids
    assert found.parts == written.parts
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, written.vectors, atol=1e-7)
    assert found.model == (written.model if file.suffix == ".npz" else "")


def test_both_formats_read_the_same_and_convert_into_each_other(tmp_path: Path) -> None:
    write_encodings(tmp_path / "a.csv", table())
    write_encodings(tmp_path / "b.npz", read_encodings(tmp_path / "a.csv"))
    write_encodings(tmp_path / "c.csv", read_encodings(tmp_path / "b.npz"))
    first, last = (read_encodings(tmp_path / name) for name in ("a.csv", "c.csv"))
    np.testing.assert_allclose(first.vectors, last.vectors, atol=1e-7)


def gmdb_csv(path: Path, *rows: tuple[object, ...]) -> Path:
    lines = ["img_name;model;flip;gray;class_conf;representations"]
    lines += [";".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_cosine_of_csv_encodings_is_the_mean_over_the_networks_vectors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    raw = 9 * rng.normal(size=(2, 3, 4))
    rows = [
        (f"{image}_rot_aligned.jpg", model, 0, "False", "[0.1]", raw[image, model].tolist())
        for model in range(3)
        for image in range(2)
    ]
    found = read_encodings(gmdb_csv(tmp_path / "all.csv", *rows))
    unit = raw / np.linalg.norm(raw, axis=2, keepdims=True)
    assert found.image_ids == ("0", "1")
    assert found.vectors[0] @ found.vectors[1] == pytest.approx((unit[0] * unit[1]).sum() / 3)


ROW = ("17_rot_aligned.jpg", "0", "0", "0", "[]", "[3, 4]")
CSV_DAMAGES: list[tuple[tuple[tuple[object, ...], ...], str]] = [
    ((), "row 1: no row"),
    ((ROW, ROW), "row 3: the same image, model and variant came before"),
    ((ROW, ("18.jpg", *ROW[1:5], "[1, 2, 3]")), "row 3: 3 values where others have 2"),
    (((*ROW[:5], "[1, NaN]"),), "row 2: the representation is not finite"),
    (((*ROW[:5], "[1, Infinity]"),), "row 2: the representation is not finite"),
    (((*ROW[:5], "[0, 0]"),), "row 2: the representation is zero"),
    (((*ROW[:5], "[]"),), "row 2: the representation is no JSON list"),
    (((*ROW[:5], "[1, [2]]"),), "row 2: the representation is no JSON list"),
    (((*ROW[:5], '{"a": 1}'),), "row 2: the representation is no JSON list"),
    (((*ROW[:5], "1, 2"),), "row 2: the representation is no JSON list"),
    (((*ROW[:2], "yes", *ROW[3:]),), "row 2: flip or gray is neither 0 nor 1"),
    ((("../17.jpg", *ROW[1:]),), "row 2: img_name is no plain file name"),
    ((ROW[:5],), "row 2: 5 cells where the header has 6"),
    (
        (ROW, ("17", "0", "1", *ROW[3:]), ("18", *ROW[1:])),
        "1 of 2 images lack some of the 2 models and variants",
    ),
]


@pytest.mark.parametrize(("rows", "says"), CSV_DAMAGES)
def test_a_damaged_csv_is_refused_by_row(
    tmp_path: Path, rows: tuple[tuple[object, ...], ...], says: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"{says}")) as caught:
        read_encodings(gmdb_csv(tmp_path / "all.csv", *rows))
    assert "all.csv" in str(caught.value)
    assert "17" not in str(caught.value).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"img_name,model\n", "row 1: no column 'img_name', 'model'"),
        (b"", "row 1: no column"),
        (b"img_name;model;flip;gray;representations\n\xff;;;;\n", "not a table of UTF-8 text"),
        (b'img_name;model;flip;gray;representations\n"17;0;0;0;[1]\n', "not a table"),
    ],
)
def test_what_is_no_csv_of_encodings_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "all.csv").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_encodings(tmp_path / "all.csv")


def change(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


def scaled(row: int, factor: float) -> Callable[[dict[str, Any]], None]:
    def damage(content: dict[str, Any]) -> None:
        content["vectors"] = content["vectors"].copy()
        content["vectors"][row] *= factor

    return damage


NPZ_DAMAGES: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (scaled(1, 2.0), "1 of 3 encodings are not of length 1"),
    (scaled(2, np.nan), "1 of 3 encodings are not finite"),
    (change(image_ids=np.array(["17", "17", "x"])), "1 image ids come more than once"),
    (change(image_ids=np.array(["17", "../x", "x"])), "no plain name"),
    (change(image_ids=np.array(["17", "x"])), "is not one float32 vector for each of 2 images"),
    (change(vectors=np.eye(3)), "float64 of shape (3, 3) is not one float32 vector"),
    (change(vectors=np.ones((3, 2, 2), np.float32)), "is not one float32 vector"),
    (change(schema=np.array("fedgestalt.encodings/9")), "does not follow"),
    (change(more=np.array(1)), "does not follow"),
    (lambda content: content.pop("model"), "does not follow"),
    (change(parts=np.array("[[")), "is no file of encodings"),
    (change(parts=np.array('[["a", 1]]')), "is no file of encodings"),
    (change(parts=np.array('[["a", false, false, 5]]')), "do not add up"),
    (change(image_ids=np.array([{}, {}, {}], object)), "is no file of encodings"),
]


@pytest.mark.parametrize(("damage", "says"), NPZ_DAMAGES)
def test_a_damaged_npz_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = tmp_path / "damaged.npz"
    write_encodings(path, table())
    with np.load(path) as archive:
        content = dict(archive)
    damage(content)
    np.savez(path, **content)
    with pytest.raises(DataError, match=re.escape(says)):
        read_encodings(path)


@pytest.mark.parametrize("keep", [0, 10, 400, -30])
def test_a_cut_npz_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.npz"
    write_encodings(path, table())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="is no file of encodings"):
        read_encodings(path)


def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_encodings(tmp_path / "none.npz")
    with pytest.raises(DataError, match="cannot be read"):
        read_encodings(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"come as \.npz or \.csv"):
        read_encodings(tmp_path / "all.pkl")


def test_what_breaks_the_rules_is_not_written(tmp_path: Path) -> None:
    good = table()
    long = EncodingTable(IMAGES, 2 * good.vectors)
    for wrong, name, says in (
        (long, "a.npz", "not of length 1"),
        (EncodingTable(IMAGES, good.vectors), "a.csv", "parts of the encodings are unknown"),
        (good, "a.txt", r"written as \.npz or \.csv"),
    ):
        with pytest.raises(DataError, match=says):
            write_encodings(tmp_path / name, wrong)
    assert list(tmp_path.iterdir()) == []


def test_vectors_come_in_the_order_of_the_cohort() -> None:
    found = table()
    turned = found.of_images(["x.y", "17", "4-b"])
    assert np.array_equal(turned, found.vectors[[2, 0, 1]])


def test_the_encodings_of_another_cohort_are_refused() -> None:
    with pytest.raises(DataError, match="2 of 3 encodings are of images that the cohort does not"):
        table().of_images(["17", "5"])
    with pytest.raises(DataError, match="1 of the cohort's 4 images have no encoding"):
        table().of_images([*IMAGES, "5"])


def test_a_csv_holds_the_networks_vectors_as_json(tmp_path: Path) -> None:
    write_encodings(tmp_path / "a.csv", table())
    header, first, *rest = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "img_name;model;flip;gray;class_conf;representations"
    name, model, flip, gray, _, values = first.split(";")
    assert (name, model, flip, gray) == ("17_rot_aligned.jpg", "a", "0", "0")
    assert np.linalg.norm(json.loads(values)) == pytest.approx(1, abs=1e-6)
    assert len(rest) == len(IMAGES) * len(PARTS) - 1
