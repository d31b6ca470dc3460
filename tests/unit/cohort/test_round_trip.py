"""What is written in GMDB layout is read as it was: reading after writing changes nothing."""

import errno
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.cohort import (
    Cohort,
    EncodingPart,
    EncodingTable,
    ImageRecord,
    RareSplit,
    Syndrome,
    export_cohort,
    image_file,
    read_cohort,
    read_encodings,
    write_cohort,
)
from fedgestalt.cohort.layout import FACT_COLUMNS, IMAGES, METADATA
from fedgestalt.errors import DataError

FILES = {
    *(f"gmdb_{kind}_images" for kind in ("train", "val", "test", "rare_gallery", "rare_test")),
    *("gmdb_frequent_gallery_images", "gmdb_frequent_test_images"),
    *("gmdb_syndromes", "image_metadata", "lookup_table"),
}

cells = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1, max_size=12
).filter(lambda text: text == text.strip())
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
versions = st.sampled_from(["v1.0.3", "v1.1.0", "v2"])
numbers = st.integers(-(10**8), 10**9 - 1)
terms = st.lists(st.from_regex(r"HP:[0-9]{7}", fullmatch=True), max_size=3).map(tuple)
facts = st.dictionaries(
    st.sampled_from([c for c in FACT_COLUMNS if c != "omim_ids"]), cells, max_size=4
)
identifiers = st.lists(
    st.sampled_from(["OMIM:122470", "OMIM:PS122470", "MONDO:0016033", "ORPHA:199"]),
    unique=True,
    max_size=3,
).map(tuple)


@st.composite
def cohorts(draw):
    """Cohorts that keep the rules of the layout; no image file is there."""
    labels = draw(st.lists(numbers, min_size=1, max_size=5, unique=True))
    syndromes = {i: Syndrome(i, draw(cells), draw(identifiers)) for i in labels}
    classes = tuple(labels[: draw(st.integers(0, len(labels)))])
    subjects = draw(st.lists(cells, min_size=1, max_size=8, unique=True))
    images, frequent, rare = {}, {"train": [], "validation": [], "frequent_test": []}, {}
    for image_id in draw(st.lists(names, min_size=1, max_size=12, unique=True)):
        label = draw(st.sampled_from(labels))
        subject = draw(st.sampled_from(subjects))
        images[image_id] = ImageRecord(
            image_id, subject, label, Path("x"), draw(terms), draw(facts)
        )
        if label in classes:  # a subject is on one side
            side = "frequent_test" if len(subject) % 2 else None
            frequent[side or draw(st.sampled_from(["train", "validation"]))].append(image_id)
        else:
            rare.setdefault(subject, []).append(image_id)
    splits = []
    for _ in range(draw(st.integers(1, 10)) if rare else 0):
        tests = draw(st.sets(st.sampled_from(sorted(rare))))
        sides = (
            [i for s in rare if s not in tests for i in rare[s]],
            [i for s in tests for i in rare[s]],
        )
        splits.append(RareSplit(*map(tuple, sides)))
    if splits and draw(st.booleans()):
        splits.insert(0, RareSplit((), ()))
    return Cohort(
        name="made",
        version=draw(versions),
        root=Path(),
        images=images,
        syndromes=syndromes,
        classes=classes,
        rare_splits=tuple(splits),
        **{role: tuple(ids) for role, ids in frequent.items()},
    )


@settings(max_examples=60, deadline=None)
@given(cohorts())
def test_reading_what_was_written_gives_the_same_cohort(tmp_path_factory, cohort):
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    images = {}
    for image_id, record in cohort.images.items():
        path = here / image_id
        path.write_bytes(image_id.encode())
        images[image_id] = replace(record, path=path)
    write_cohort(replace(cohort, images=images), there)
    read = read_cohort(there, name="made")
    assert all(r.path == image_file(there, i) for i, r in read.images.items())
    assert all(r.path.read_bytes() == i.encode() for i, r in read.images.items())
    unplaced = {i: replace(r, path=Path("x")) for i, r in read.images.items()}
    assert replace(read, root=Path(), images=unplaced) == cohort
    # `facts` play no part in the hash of a record; they do in its equality
    assert {i: r.facts for i, r in unplaced.items()} == {i: r.facts for i, r in images.items()}
    for folder in (here, there):
        shutil.rmtree(folder)


def test_every_file_of_the_layout_is_written(folder, tmp_path):
    write_cohort(replace(read_cohort(folder), version="v1.1.0"), tmp_path / "new")
    written = {p.stem.removesuffix("_v1.1.0") for p in (tmp_path / "new" / METADATA).iterdir()}
    assert written == FILES
    assert len(list((tmp_path / "new" / IMAGES).glob("*_rot_aligned.jpg"))) == 7


@pytest.mark.parametrize("version", ["v1.0.3", "v1.1.0"])
def test_both_names_of_the_omim_column_are_read_and_the_current_one_is_written(
    folder, tmp_path, version
):
    write_cohort(replace(read_cohort(folder), version=version), tmp_path / "new")
    text = (tmp_path / "new" / METADATA / f"image_metadata_{version}.tsv").read_text()
    assert "\tomim_ids\t" in text.partition("\n")[0]
    assert read_cohort(tmp_path / "new").images["1"].facts["omim_ids"] == "122470"


@pytest.mark.parametrize("subject", [" meier", "mei\rer", "mei\0er", "meier\n", "\udcff"])
def test_a_cell_that_would_not_be_read_as_it_is_is_refused(folder, tmp_path, subject):
    cohort = read_cohort(folder)
    images = {i: replace(r, subject=subject) for i, r in cohort.images.items()}
    with pytest.raises(
        DataError, match=r"row 2: a value of 'subject' has space around it"
    ) as caught:
        write_cohort(replace(cohort, images=images), tmp_path / "new")
    assert subject.strip() not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"facts": {"surname": "meier"}}, "images have facts for which there is no column"),
        ({"hpo": ("wide mouth",)}, "images have a feature that is no HPO id"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_rather_than_lost(folder, tmp_path, change, says):
    cohort = read_cohort(folder)
    images = {**cohort.images, "1": replace(cohort.images["1"], **change)}
    with pytest.raises(DataError, match=f"1 {says}"):
        write_cohort(replace(cohort, images=images), tmp_path / "new")


def test_an_image_without_a_part_is_refused_rather_than_lost(folder, tmp_path):
    with pytest.raises(DataError, match="1 images play no part"):
        write_cohort(replace(read_cohort(folder), validation=()), tmp_path / "new")


# --- export --------------------------------------------------------------------------------------


def test_an_export_is_the_same_cohort_and_shares_no_file_with_it(folder, tmp_path):
    cohort = read_cohort(folder)
    exported = export_cohort(cohort, tmp_path / "new", version="v1.1.0")
    assert exported.version == "v1.1.0"
    assert exported.digest == cohort.digest
    for image_id, record in cohort.images.items():
        assert not exported.images[image_id].path.samefile(record.path)


def test_encodings_go_along_as_the_csv_of_the_field(folder, tmp_path):
    cohort = read_cohort(folder)
    vectors = np.eye(len(cohort.images), 8, dtype=np.float32)
    table = EncodingTable(
        tuple(cohort.images), vectors, parts=(EncodingPart("m", flip=False, gray=True, size=8),)
    )
    export_cohort(cohort, tmp_path / "new", encodings=table)
    again = read_encodings(tmp_path / "new" / "gmdb_encodings" / "encodings_v1.csv")
    np.testing.assert_allclose(again.of_images(list(cohort.images)), vectors, atol=1e-6)
    read_cohort(tmp_path / "new")  # the further folder does no harm


def test_encodings_of_other_images_are_refused_before_anything_is_written(folder, tmp_path):
    table = EncodingTable(("99",), np.eye(1, 8, dtype=np.float32))
    with pytest.raises(DataError, match="encodings are of images that the cohort does not have"):
        export_cohort(read_cohort(folder), tmp_path / "new", encodings=table)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    cohort = read_cohort(folder)

    def full(source, place):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(DataError) as caught:
        export_cohort(cohort, tmp_path / "new")
    expected = "the cohort cannot be written: No space left on device; free space, or choose"
    assert expected in str(caught.value)


def test_an_image_that_changes_while_it_is_copied_is_noticed(folder, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def copy_and_change(source, place):
        copyfile(source, place)
        with source.open("ab") as stream:
            stream.write(b"more")

    monkeypatch.setattr(shutil, "copyfile", copy_and_change)
    with pytest.raises(DataError, match="an image of the cohort changed while it was copied"):
        export_cohort(read_cohort(folder), tmp_path / "new")


def test_an_image_that_changes_before_it_is_copied_is_noticed(folder, tmp_path, monkeypatch):
    copyfile, last = shutil.copyfile, image_file(folder, "7")

    def change_another_and_copy(source, place):
        if source != last:
            last.write_bytes(b"another")
        copyfile(source, place)

    monkeypatch.setattr(shutil, "copyfile", change_another_and_copy)
    with pytest.raises(DataError, match="what was written is not what was read"):
        export_cohort(read_cohort(folder), tmp_path / "new")


def test_an_image_that_goes_while_the_digest_is_made_is_one_sentence(folder):
    cohort = read_cohort(folder)
    image_file(folder, "3").unlink()
    with pytest.raises(DataError, match="an image cannot be read: No such file"):
        _ = cohort.digest
