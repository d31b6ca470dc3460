"""What `cohort check` finds, and that it finds nothing in sound data."""

import shutil

import cv2
import numpy as np
import pytest

from fedgestalt.cohort import Finding, check_cohort, image_file
from fedgestalt.cohort.images import save_jpeg

TRAIN = "gmdb_metadata/gmdb_train_images_v1.csv"
SUBJECTS = ("meier", "schulz", "weber", "huber", "lang", "wolf", "kern")


def only(folder):
    """The one finding of a folder; it names no subject."""
    findings = check_cohort(folder)
    assert len(findings) == 1, findings
    assert findings[0].remedy
    assert not any(subject in str(findings[0]) for subject in SUBJECTS)
    return findings[0]


def place(finding):
    return finding.severity, finding.file, finding.row


def test_a_sound_folder_has_no_findings(folder):
    assert check_cohort(folder) == []


def test_a_folder_that_cannot_be_read_is_one_finding(tmp_path):
    found = only(tmp_path / "nowhere")
    assert place(found) == ("error", str(tmp_path / "nowhere"), None)


def test_faults_are_collected_rather_than_only_the_first(folder, edit):
    edit("gmdb_train_images_v1.csv", "meier,7", "meier,seven")
    edit("gmdb_test_images_v1.csv", "5,lang", "../5,lang")
    image_file(folder, "6").unlink()
    (folder / "gmdb_metadata" / "image_metadata_v1.tsv").unlink()
    found = {place(finding) for finding in check_cohort(folder)}
    assert {
        ("error", TRAIN, 2),
        ("error", "gmdb_metadata/gmdb_test_images_v1.csv", 3),
        ("error", "gmdb_metadata/gmdb_rare_gallery_images_v1.csv", 2),
        ("error", "gmdb_metadata/image_metadata_v1.tsv", None),
    } <= found


def test_a_missing_image_is_one_finding_however_often_it_is_listed(folder):
    image_file(folder, "6").unlink()
    missing = [f for f in check_cohort(folder) if "its image is not in" in f.what]
    assert [place(f)[1:] for f in missing] == [("gmdb_metadata/gmdb_rare_gallery_images_v1.csv", 2)]


def test_a_truncated_image_is_found(folder):
    path = image_file(folder, "2")
    path.write_bytes(path.read_bytes()[:-500])
    found = only(folder)
    assert place(found) == ("error", TRAIN, 3)
    assert found.what == "the image is truncated"


def test_a_file_that_is_no_image_is_found(folder):
    image_file(folder, "2").write_bytes(b"\0" * 1000)
    assert only(folder).what == "not a JPEG or PNG image"


def test_an_oversized_image_is_found(folder):
    path = image_file(folder, "2")
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert only(folder).what == "the image has 4295 megapixels, more than 50"


@pytest.mark.parametrize("size", [(96, 112), (224, 224)])
def test_an_image_of_the_wrong_size_is_found(folder, size):
    rng = np.random.default_rng(5)
    save_jpeg(image_file(folder, "2"), rng.integers(0, 256, (*size, 3), np.uint8))
    found = only(folder)
    assert place(found) == ("error", TRAIN, 3)
    assert found.what == f"the image is {size[1]} x {size[0]} pixels, not 112 x 112"


def test_the_same_image_of_two_subjects_is_found(folder):
    shutil.copy(image_file(folder, "1"), image_file(folder, "4"))
    found = only(folder)
    assert place(found) == ("error", "gmdb_metadata/gmdb_test_images_v1.csv", 2)
    assert found.what == f"the same image belongs to another subject in {TRAIN}, row 2"


def test_the_same_pixels_in_another_file_are_found(folder):
    data = image_file(folder, "1").read_bytes()
    comment = b"\xff\xfe\x00\x06here"
    image_file(folder, "4").write_bytes(data[:2] + comment + data[2:])
    assert "the same image" in only(folder).what


def test_the_same_image_of_one_subject_is_nothing_to_report(folder, edit):
    shutil.copy(image_file(folder, "1"), image_file(folder, "3"))
    for kind in ("val", "frequent_gallery"):
        edit(f"gmdb_{kind}_images_v1.csv", "3,weber", "3,meier")
    assert check_cohort(folder) == []


def test_a_subject_with_two_syndromes_is_a_warning(folder, edit):
    for kind in ("train", "frequent_gallery"):
        edit(f"gmdb_{kind}_images_v1.csv", "2,schulz", "2,meier")
    found = only(folder)
    assert place(found) == ("warning", TRAIN, 3)
    assert found.what == f"the subject has another syndrome in {TRAIN}, row 2"


def test_a_syndrome_with_one_subject_is_a_warning(folder, edit):
    for kind in ("test", "frequent_test"):
        edit(f"gmdb_{kind}_images_v1.csv", "5,lang,9\n", "")
    found = only(folder)
    assert place(found) == ("warning", "gmdb_metadata/gmdb_syndromes_v1.tsv", None)
    assert found.what == "syndromes with one subject only: 9"


def test_a_syndrome_without_images_is_nothing_to_report(folder, edit):
    edit("gmdb_syndromes_v1.tsv", "30\tThirty", "31\tElsewhere\t[]\t0\t0\n30\tThirty")
    assert check_cohort(folder) == []


def test_a_feature_that_is_no_hpo_id_is_a_warning(folder, edit):
    edit("image_metadata_v1.tsv", "HP:0000343", "long philtrum")
    found = only(folder)
    assert place(found) == ("warning", "gmdb_metadata/image_metadata_v1.tsv", 2)


def test_a_finding_reads_as_one_sentence():
    finding = Finding("error", "a.csv", 3, "label is no integer", "write the syndrome id")
    assert str(finding.as_error()) == "a.csv, row 3: label is no integer; write the syndrome id."


def test_exif_and_metadata_segments_are_no_damage(folder):
    pixels = np.random.default_rng(9).integers(0, 256, (112, 112, 3), np.uint8)
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_QUALITY, 60]
    data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
    thumbnail = b"\xff\xe1\x00\x0cExif\0\0\xff\xd8\xff\xd9"
    image_file(folder, "1").write_bytes(data[:2] + thumbnail + data[2:])
    assert check_cohort(folder) == []
