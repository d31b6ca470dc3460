"""One CSV and a folder of photographs: dealt by subject, and nothing left half done."""

import errno
from pathlib import Path

import cv2
import numpy as np
import pytest

from fedgestalt.cohort import (
    STRATEGIES,
    LabelMap,
    Syndrome,
    check_cohort,
    image_file,
    import_csv,
    read_cohort,
    save_jpeg,
    split_cohort,
)
from fedgestalt.errors import ConfigError, DataError

LABELS = LabelMap({i: Syndrome(i, f"S{i}") for i in (1, 2, 3, 4)}, (2, 1))
SUBJECTS = {1: 7, 2: 4, 3: 5, 4: 1}  # 1 and 2 are frequent; 4 has a single subject


def squared(pixels):
    return np.ascontiguousarray(cv2.resize(pixels, (112, 112)))


@pytest.fixture
def table(tmp_path):
    """Two photographs of each subject."""
    rng = np.random.default_rng(2)
    lines = ["image,subject,syndrome,hpo,age_year"]
    for label, subjects in SUBJECTS.items():
        for subject in range(subjects):
            for shot in range(2):
                name = f"{label}-{subject}-{shot}.jpg"
                save_jpeg(tmp_path / name, rng.integers(0, 256, (120, 120, 3), np.uint8))
                lines.append(f"{name},patient-{label}-{subject},{label},HP:0000154,{subject}")
    path = tmp_path / "cohort.csv"
    path.write_text("\n".join(lines))
    return path


def subjects_of(cohort, ids):
    return {cohort.images[image_id].subject for image_id in ids}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.9])
def test_parts_are_dealt_by_subject_and_every_syndrome_keeps_one_in_the_gallery(
    table, tmp_path, share
):
    import_csv(table, tmp_path / "new", squared, labels=LABELS, test_share=share)
    cohort = read_cohort(tmp_path / "new")
    assert [f for f in check_cohort(tmp_path / "new") if f.severity == "error"] == []
    for gallery, test in [
        (cohort.train, cohort.frequent_test),
        *((split.gallery, split.test) for split in cohort.rare_splits),
    ]:
        assert not subjects_of(cohort, gallery) & subjects_of(cohort, test)
        held = {cohort.images[i].syndrome for i in gallery + test}
        assert {cohort.images[i].syndrome for i in gallery} == held
        for label in held:
            tests = {cohort.images[i].subject for i in test if cohort.images[i].syndrome == label}
            expected = min(round(share * SUBJECTS[label]), SUBJECTS[label] - 1)
            assert len(tests) == expected
    assert len(cohort.rare_splits) == (10 if share else 1)
    assert cohort.classes == (2, 1)
    assert cohort.images["000001"].facts == {"age_year": "0"}


def test_rare_subjects_are_dealt_anew_for_each_split_and_the_seed_repeats_it(table, tmp_path):
    made = [
        import_csv(table, tmp_path / name, squared, labels=LABELS, test_share=0.4, seed=seed)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    assert len({split.test for split in made[0].rare_splits}) > 3
    assert made[0].digest == made[1].digest != made[2].digest


def test_no_subject_is_named_by_a_file_or_invented_in_the_tables(table, tmp_path):
    cohort = import_csv(table, tmp_path / "new", squared, labels=LABELS, test_share=0.3)
    assert not [p for p in (tmp_path / "new").rglob("*") if "patient" in p.name]
    assert sorted(cohort.images) == [f"{n:06d}" for n in range(1, 35)]
    assert {r.subject for r in cohort.images.values()} == {
        line.split(",")[1] for line in table.read_text().splitlines()[1:]
    }
    header, first, *_ = (
        (tmp_path / "new/gmdb_metadata/image_metadata_v1.0.0.tsv").read_text().splitlines()
    )
    known = {"image_id", "patient_id", "internal_syndrome_id", "internal_syndrome_name"}
    filled = {c for c, cell in zip(header.split("\t"), first.split("\t"), strict=True) if cell}
    assert filled == known | {"present_features", "age_year"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_class_with_one_subject_is_a_warning_and_can_be_dealt(table, tmp_path, strategy):
    import_csv(table, tmp_path / "new", squared, labels=LABELS, test_share=0.3)
    (found,) = check_cohort(tmp_path / "new")
    assert (found.severity, found.what) == ("warning", "syndromes with one subject only: 4")
    cohort = read_cohort(tmp_path / "new")
    silos = split_cohort(cohort, ["north", "south"], strategy, seed=1)
    assert sum(len(silo.images) for silo in silos.values()) == len(cohort.images)


def test_a_cell_that_could_not_be_written_is_named_by_its_row_before_any_work(table, tmp_path):
    text = table.read_text().replace("patient-1-2,1,HP:0000154,2", 'patient-1-2,1,,"2\r3"', 1)
    table.write_bytes(text.encode())
    with pytest.raises(DataError, match=r"cohort\.csv, row \d+: a cell has a control character"):
        import_csv(table, tmp_path / "new", squared)


def test_a_version_that_is_no_name_is_refused_before_anything_is_written(table, tmp_path):
    with pytest.raises(ConfigError, match="is no plain name"):
        import_csv(table, tmp_path / "new", squared, version="../v1")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("wrong", [{"test_share": 1.0}, {"test_share": -0.1}, {"seed": -1}])
def test_a_share_or_seed_that_makes_no_sense_is_refused_before_anything_is_written(
    table, tmp_path, wrong
):
    with pytest.raises(ConfigError, match="choose a share from 0 to less than 1"):
        import_csv(table, tmp_path / "new", squared, **wrong)
    assert not (tmp_path / "new").exists()


def test_a_photograph_that_goes_while_the_table_is_read_is_named_by_its_row(table, tmp_path):
    def align(pixels):
        (table.parent / "1-1-0.jpg").unlink(missing_ok=True)
        return squared(pixels)

    with pytest.raises(DataError, match=r"cohort\.csv, row 4: the image file cannot be read"):
        import_csv(table, tmp_path / "new", align)


def test_a_full_disk_is_named_by_the_row_that_did_not_fit(table, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def full(path, data):
        if path == image_file(tmp_path / "new", "000003"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match="the image file cannot be written: No space left on"):
        import_csv(table, tmp_path / "new", squared)
