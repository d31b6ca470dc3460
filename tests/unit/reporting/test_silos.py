"""The picture of a split says who has what."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import Cohort, ImageRecord, Syndrome
from fedgestalt.errors import DataError
from fedgestalt.reporting.silos import split_picture, write_split_picture

NAMES = {7: "Seven", 9: "Nine", 30: "Thirty"}


def silo(name, numbers, names=NAMES, classes=(9, 7)):
    """So many images of each syndrome, of one subject each."""
    images = {
        f"{name}-{label}-{i}": ImageRecord(f"{name}-{label}-{i}", f"s{label}-{i}", label, Path())
        for label, count in numbers.items()
        for i in range(count)
    }
    return Cohort(
        name=name,
        version="v1",
        root=Path(),
        images=images,
        syndromes={i: Syndrome(i, n) for i, n in names.items()},
        classes=classes,
        train=tuple(images),
    )


SILOS = {"bonn": silo("bonn", {7: 12, 30: 3}), "ulm": silo("ulm", {7: 1, 9: 4})}


def drawn(silos):
    return ET.fromstring(split_picture(silos, "near-uniform, seed 1"))


def texts(svg, name):
    return [e.text for e in svg.iter() if e.tag.endswith("}text") and e.get("class") == name]


def cells(svg):
    """(class, x, y) of every cell, without the page and the legend."""
    return [
        (e.get("class"), float(e.get("x")), float(e.get("y")))
        for e in svg.iter()
        if e.tag.endswith("}rect") and e.get("height") == "32"
    ]


def test_there_is_a_cell_for_every_site_and_syndrome_frequent_ones_first():
    svg = drawn(SILOS)
    assert texts(svg, "column") == ["7", "9", "30"]
    found = cells(svg)
    assert len(found) == 6
    assert [shade for shade, _, _ in found] == ["s5", "s0", "s3", "s2", "s3", "s0"]
    xs = [x for _, x, _ in found[:3]]
    assert xs[2] - xs[1] > xs[1] - xs[0]  # rare syndromes stand apart


def test_numbers_and_sizes_are_written_and_nobody_is_named():
    svg = drawn(SILOS)
    counts = [e.text for e in svg.iter() if (e.get("class") or "").startswith("count")]
    assert counts == ["12", "3", "1", "4"]
    said = " ".join(texts(svg, "soft"))
    assert "15 images, 15 subjects" in said
    assert RESEARCH_USE_ONLY in said
    text = split_picture(SILOS, "x")
    assert not any(name in text for name in NAMES.values())
    assert "s7-0" not in text
    assert "bonn-7" not in text


def test_more_images_are_never_lighter():
    numbers = range(1, 41)
    names = dict.fromkeys(numbers, "x")
    svg = drawn({"bonn": silo("bonn", {i: i for i in numbers}, names, classes=())})
    steps = [int(shade[1:]) for shade, _, _ in cells(svg)]
    assert steps == sorted(steps)
    assert set(steps) == {1, 2, 3, 4, 5}


def test_a_large_label_map_still_fits_and_stays_without_numbers():
    names = {i: f"n{i}" for i in range(600)}
    svg = drawn({"bonn": silo("bonn", {0: 200, 599: 1}, names, tuple(range(300)))})
    assert float(svg.get("width")) < 1200
    assert texts(svg, "column") == []
    assert len(cells(svg)) == 600


def test_a_silo_without_images_and_odd_names_do_no_harm():
    svg = drawn({"<a&b>": silo("a", {}), "x" * 60: silo("b", {})})
    assert texts(svg, "") == ["<a&b>", "x" * 21 + "…"]
    assert {shade for shade, _, _ in cells(svg)} == {"s0"}


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="the picture cannot be written: No such file"):
        write_split_picture(tmp_path / "nowhere" / "split.svg", SILOS, "x")
