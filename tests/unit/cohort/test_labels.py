"""In which rows two label maps differ."""

import shutil

import pytest

from fedgestalt.cohort import (
    LabelMap,
    Syndrome,
    check_cohort,
    differences,
    label_map_of,
    read_cohort,
    read_label_map,
)
from fedgestalt.errors import DataError


def label_map(names, classes=(), **identifiers):
    rows = {i: Syndrome(i, n, identifiers.get(f"s{i}", ())) for i, n in names.items()}
    return LabelMap(rows, classes)


AGREED = label_map({7: "Seven", 9: "Nine", 30: "Thirty"}, (9, 7))


def told(own, agreed=AGREED):
    return [(d.syndrome, d.what) for d in differences(own, agreed)]


def test_the_same_map_has_no_difference():
    assert told(label_map({30: "Thirty", 9: "Nine", 7: "Seven"}, (9, 7))) == []


def test_every_row_that_differs_is_named():
    own = label_map({7: "Septem", 8: "Eight", 9: "Nine"}, (9, 7))
    assert told(own) == [
        (7, "syndrome 7 is 'Septem', in the agreed map 'Seven'"),
        (8, "syndrome 8 ('Eight') is not in the agreed map"),
        (30, "syndrome 30 ('Thirty') is missing"),
    ]


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        ((7, 9), "class 0 is syndrome 7, in the agreed map 9"),
        ((9, 30), "class 1 is syndrome 30, in the agreed map 7"),
        ((9,), "1 classes, in the agreed map 2"),
    ],
)
def test_another_order_or_number_of_classes_is_named(classes, says):
    assert told(LabelMap(AGREED.syndromes, classes)) == [(None, says)]


def test_identifiers_differ_only_where_both_maps_know_some_of_one_catalogue():
    names = {7: "Seven"}
    agreed = label_map(names, s7=("OMIM:122470", "OMIM:300590"))
    assert told(label_map(names), agreed) == []
    assert told(label_map(names, s7=("ORPHA:199",)), agreed) == []
    assert told(label_map(names, s7=("OMIM:300590",)), agreed) == []
    other = label_map(names, s7=("OMIM:100100",))
    says = "syndrome 7 is OMIM:100100, in the agreed map OMIM:122470, OMIM:300590"
    assert told(other, agreed) == [(7, says)]


def test_two_maps_differ_in_a_row_just_if_their_digests_differ(folder, edit):
    cohort = read_cohort(folder)
    for name, old, new in (
        ("gmdb_syndromes_v1.tsv", "Seven", "Septem"),
        ("lookup_table_v1.txt", "[9, 7]", "[7, 9]"),
    ):
        edit(name, old, new)
        other = read_cohort(folder)
        assert other.label_map_digest != cohort.label_map_digest
        assert list(differences(label_map_of(other), label_map_of(cohort)))
        edit(name, new, old)
    again = read_cohort(folder)
    assert again.label_map_digest == cohort.label_map_digest
    assert not list(differences(label_map_of(again), label_map_of(cohort)))


def test_a_label_map_is_read_without_images_or_listings(folder, tmp_path):
    place = tmp_path / "agreed" / "gmdb_metadata"
    place.mkdir(parents=True)
    for name in ("gmdb_syndromes_v1.tsv", "lookup_table_v1.txt"):
        shutil.copy(folder / "gmdb_metadata" / name, place)
    assert read_label_map(place.parent) == AGREED
    (place / "lookup_table_v1.txt").unlink()
    with pytest.raises(DataError, match=r"lookup_table_v1\.txt: the file is missing"):
        read_label_map(place.parent)


def test_a_check_names_file_and_row_of_every_difference(folder, edit):
    agreed = read_label_map(folder)
    assert check_cohort(folder, labels=agreed) == []
    edit("gmdb_syndromes_v1.tsv", "Nine", "Novem")
    edit("lookup_table_v1.txt", "[9, 7]", "[7, 9]")
    found = [(f.severity, f.file, f.row, f.what) for f in check_cohort(folder, labels=agreed)]
    assert found == [
        (
            "error",
            "gmdb_metadata/gmdb_syndromes_v1.tsv",
            3,
            "syndrome 9 is 'Novem', in the agreed map 'Nine'",
        ),
        (
            "error",
            "gmdb_metadata/lookup_table_v1.txt",
            2,
            "class 0 is syndrome 7, in the agreed map 9",
        ),
    ]
