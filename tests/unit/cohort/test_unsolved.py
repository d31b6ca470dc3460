"""Patients without a diagnosis: how a cohort names them, and that only discovery sees them."""

import re

import numpy as np
import pytest

from fedgestalt.cohort import (
    UNSOLVED,
    Syndrome,
    check_cohort,
    import_csv,
    read_cohort,
    save_jpeg,
    split_cohort,
    write_cohort,
)
from fedgestalt.errors import DataError
from fedgestalt.similarity.order import image_order

LISTING = "gmdb_unsolved_images_v1.csv"


@pytest.fixture
def unsolved(folder):
    """Two patients without a diagnosis, one of them with two photographs."""
    rng = np.random.default_rng(1)
    for image_id in (8, 9, 10):
        pixels = rng.integers(0, 256, (112, 112, 3), np.uint8)
        save_jpeg(folder / "gmdb_align" / f"{image_id}_rot_aligned.jpg", pixels)
    path = folder / "gmdb_metadata" / LISTING
    path.write_text("image_id,subject\n8,braun\n9,braun\n10,vogel\n")
    return folder


def test_a_listing_of_its_own_says_who_has_no_diagnosis(unsolved, edit):
    edit("image_metadata_v1.tsv", "2\t\t\t\n", "2\t\t\t\n8\tHP:0000316\t\tmale\n")
    cohort = read_cohort(unsolved)
    assert list(cohort.unsolved) == ["8", "9", "10"]
    assert {record.syndrome for record in cohort.unsolved.values()} == {UNSOLVED}
    assert cohort.unsolved["8"].subject == cohort.unsolved["9"].subject
    assert cohort.unsolved["8"].hpo == ("HP:0000316",)
    assert cohort.unsolved["8"].facts == {"gender": "male"}


def test_a_cohort_without_the_listing_has_none(folder):
    assert read_cohort(folder).unsolved == {}


def test_nothing_else_of_a_cohort_changes(folder, unsolved):
    listing = folder / "gmdb_metadata" / LISTING
    cohort = read_cohort(folder)
    listing.unlink()
    before = read_cohort(folder)
    assert cohort.images == before.images
    assert cohort.subjects == before.subjects
    assert cohort.images_per_syndrome() == before.images_per_syndrome()
    assert cohort.label_map_digest == before.label_map_digest
    assert image_order(cohort).image_ids == image_order(before).image_ids
    assert cohort.digest != before.digest


def test_a_written_cohort_keeps_them(unsolved, tmp_path):
    cohort = read_cohort(unsolved)
    write_cohort(cohort, tmp_path / "copy")
    again = read_cohort(tmp_path / "copy")
    assert again.digest == cohort.digest
    assert {i: (r.subject, r.syndrome) for i, r in again.unsolved.items()} == {
        i: (r.subject, r.syndrome) for i, r in cohort.unsolved.items()
    }


def test_their_listing_alone_is_a_cohort(unsolved):
    for path in (unsolved / "gmdb_metadata").glob("gmdb_*_images_v1.csv"):
        if path.name != LISTING:
            path.write_text(path.read_text().splitlines()[0] + "\n")
    cohort = read_cohort(unsolved)
    assert not cohort.images
    assert len(cohort.unsolved) == 3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("10,vogel", "1,vogel", "row 4: the image is listed already in .*train.*, row 2"),
        ("10,vogel", "8,vogel", "row 4: the image is listed already in .*unsolved.*, row 2"),
        ("10,vogel", "10,meier", "row 4: the subject has a diagnosis in .*train.*, row 2"),
        ("10,vogel", "11,vogel", "row 4: its image is not in gmdb_align"),
        ("10,vogel", "../10,vogel", "row 4: image_id is not a plain name"),
        ("10,vogel", "10,", "row 4: nothing in column 'subject'"),
        ("image_id,subject", "image_id,patient", "row 1: no column 'subject'"),
    ],
)
def test_a_wrong_row_is_refused_and_names_nobody(unsolved, edit, old, new, says):
    edit(LISTING, old, new)
    with pytest.raises(DataError, match=f"{LISTING}, {says}") as caught:
        read_cohort(unsolved)
    assert not re.search("braun|vogel|meier", str(caught.value))
    assert caught.value.remedy


def test_the_number_that_stands_for_no_diagnosis_is_no_syndrome(folder, edit):
    edit("gmdb_train_images_v1.csv", "meier,7", "meier,-1")
    with pytest.raises(
        DataError, match=r"row 2: label -1 stands for no diagnosis; list .*unsolved"
    ):
        read_cohort(folder)


def test_a_check_looks_at_their_images(unsolved):
    (unsolved / "gmdb_align" / "9_rot_aligned.jpg").write_bytes(b"no image")
    (finding,) = [f for f in check_cohort(unsolved) if f.severity == "error"]
    assert (finding.file, finding.row) == (f"gmdb_metadata/{LISTING}", 3)


def test_a_check_finds_the_photograph_of_a_diagnosed_patient_among_them(unsolved):
    images = unsolved / "gmdb_align"
    (images / "9_rot_aligned.jpg").write_bytes((images / "1_rot_aligned.jpg").read_bytes())
    (finding,) = [f for f in check_cohort(unsolved) if f.severity == "error"]
    assert "the same image belongs to another subject" in finding.what


@pytest.mark.parametrize("strategy", ["near-uniform", "non-overlapping", "dirichlet"])
def test_they_are_dealt_by_subject_and_nobody_is_dealt_twice(unsolved, strategy):
    whole = read_cohort(unsolved)
    silos = split_cohort(whole, ("north", "south"), strategy, 3)
    assert sorted(i for silo in silos.values() for i in silo.unsolved) == ["10", "8", "9"]
    for silo in silos.values():
        assert len({record.subject for record in silo.unsolved.values()}) == 1


def test_a_csv_calls_them_unsolved(tmp_path):
    for name in ("a", "b", "c"):
        save_jpeg(tmp_path / f"{name}.jpg", np.full((112, 112, 3), 90, np.uint8))
    table = tmp_path / "cohort.csv"
    table.write_text("image,subject,syndrome\na.jpg,x,7\nb.jpg,y,unsolved\nc.jpg,y,Unsolved\n")
    label_map = {7: Syndrome(7, "Seven")}
    import_csv(table, tmp_path / "new", lambda pixels: pixels, syndromes=label_map)
    cohort = read_cohort(tmp_path / "new")
    assert list(cohort.images) == ["000001"]
    assert list(cohort.unsolved) == ["000002", "000003"]


def test_a_csv_says_unsolved_and_no_number_for_it(tmp_path):
    save_jpeg(tmp_path / "a.jpg", np.full((112, 112, 3), 90, np.uint8))
    table = tmp_path / "cohort.csv"
    table.write_text("image,subject,syndrome\na.jpg,x,-1\n")
    with pytest.raises(DataError, match=r"row 2: syndrome -1 stands for no diagnosis; .*unsolved"):
        import_csv(table, tmp_path / "new", lambda pixels: pixels)


def test_a_csv_with_a_patient_both_ways_is_refused(tmp_path):
    for name in ("a", "b"):
        save_jpeg(tmp_path / f"{name}.jpg", np.full((112, 112, 3), 90, np.uint8))
    table = tmp_path / "cohort.csv"
    table.write_text("image,subject,syndrome\na.jpg,meier,7\nb.jpg,meier,unsolved\n")
    with pytest.raises(DataError, match=r"row 3: the subject of this unsolved image has") as caught:
        import_csv(table, tmp_path / "new", lambda pixels: pixels)
    assert "meier" not in str(caught.value)
