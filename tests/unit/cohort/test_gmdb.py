"""Reading, writing and importing cohort folders."""

import re
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from fedgestalt.cohort import (
    ImageRecord,
    LabelMap,
    Syndrome,
    image_file,
    import_csv,
    load_image,
    read_cohort,
    write_cohort,
)
from fedgestalt.cohort import images as images_module
from fedgestalt.cohort.images import decode_photograph, save_jpeg
from fedgestalt.cohort.records import RareSplit
from fedgestalt.errors import DataError

TRAIN = "gmdb_train_images_v1.csv"
SUBJECTS = ("meier", "schulz", "weber", "huber", "lang", "wolf", "kern")


def refusal(folder):
    """The sentence with which a folder is refused; it names no subject and one remedy."""
    with pytest.raises(DataError) as caught:
        read_cohort(folder)
    sentence = str(caught.value)
    assert not any(subject in sentence for subject in SUBJECTS)
    assert caught.value.remedy
    return sentence


# --- what is read --------------------------------------------------------------------------------


def test_a_sound_folder_becomes_a_cohort(folder):
    cohort = read_cohort(folder)
    assert (cohort.name, cohort.version, cohort.root) == ("hospital", "v1", folder)
    assert cohort.train == ("1", "2")
    assert cohort.validation == ("3",)
    assert cohort.frequent_test == ("4", "5")
    assert cohort.rare_splits == (RareSplit(("6",), ("7",)), RareSplit(("7",), ("6",)))
    assert cohort.images["4"].subject == "huber"
    assert cohort.images["4"].path == folder / "gmdb_align" / "4_rot_aligned.jpg"


def test_classes_follow_the_lookup_table_and_labels_the_syndrome_table(folder):
    cohort = read_cohort(folder, name="north")
    assert cohort.name == "north"
    assert cohort.classes == (9, 7)
    assert cohort.syndromes[30] == Syndrome(30, "Thirty")


def test_features_and_other_metadata_are_read_under_the_current_column_names(folder):
    images = read_cohort(folder).images
    assert images["1"].hpo == ("HP:0000154", "HP:0000343")
    assert images["1"].facts == {"omim_ids": "122470", "gender": "female"}
    assert images["2"].hpo == ()
    assert images["3"].facts == {}


def test_a_byte_order_mark_and_blank_lines_do_not_matter(folder):
    path = folder / "gmdb_metadata" / TRAIN
    before = read_cohort(folder).train
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n\r\n")
    assert read_cohort(folder).train == before


def test_rare_splits_may_be_numbered_from_one(folder, edit):
    for kind in ("gallery", "test"):
        name = f"gmdb_rare_{kind}_images_v1.csv"
        edit(name, "30,1\n", "30,2\n")
        edit(name, "30,0\n", "30,1\n")
    assert read_cohort(folder).rare_splits == (
        RareSplit(("6",), ("7",)),
        RareSplit(("7",), ("6",)),
    )


def test_a_lookup_table_may_carry_another_suffix(folder):
    table = folder / "gmdb_metadata" / "lookup_table_v1.txt"
    table.rename(table.with_name("lookup_table_gmdb.txt"))
    assert read_cohort(folder).classes == (9, 7)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gmdb_metadata", "gmdb_align"])
def test_a_folder_without_its_parts_is_refused(folder, name):
    (folder / name).rename(folder / "elsewhere")
    assert f"the folder {name} cannot be read" in refusal(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "nowhere")


def test_a_folder_without_metadata_files_is_refused(folder):
    for path in (folder / "gmdb_metadata").iterdir():
        path.unlink()
    assert "no metadata file" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        TRAIN,
        "gmdb_rare_test_images_v1.csv",
        "gmdb_syndromes_v1.tsv",
        "image_metadata_v1.tsv",
        "lookup_table_v1.txt",
    ],
)
def test_a_missing_metadata_file_is_named(folder, name):
    (folder / "gmdb_metadata" / name).unlink()
    assert refusal(folder).startswith(f"gmdb_metadata/{name}: the file is missing")


def test_two_versions_in_one_folder_are_refused(folder):
    (folder / "gmdb_metadata" / "gmdb_train_images_v2.csv").write_text("")
    assert "files of 2 versions: v1, v2; keep the files of one version" in refusal(folder)


def test_a_missing_column_is_named_with_those_found(folder, edit):
    edit(TRAIN, "image_id,subject,label", "image_id,patient,label")
    expected = "row 1: no column 'subject'; the columns are 'image_id', 'patient', 'label'"
    assert f"gmdb_metadata/{TRAIN}, {expected}" in refusal(folder)


def test_a_row_whose_image_is_missing_is_named(folder):
    (folder / "gmdb_align" / "2_rot_aligned.jpg").unlink()
    assert f"{TRAIN}, row 3: its image is not in gmdb_align" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        (TRAIN, "meier,7", "meier,seven", "row 2: label is no integer"),
        (TRAIN, "meier,7", "meier,7.0", "row 2: label is no integer"),
        (TRAIN, "meier,7", "meier,", "row 2: nothing in column 'label'"),
        (TRAIN, "meier,7", "meier", "row 2: 2 cells where the header has 3"),
        (TRAIN, "meier,7", 'meier,"7', "row 3: not a table: unexpected end of data"),
        (TRAIN, "meier,7", "meier,8", "row 2: label 8 is not in the syndrome table"),
        (TRAIN, "meier,7", "meier,30", "row 2: label 30 is not in the lookup table"),
        (TRAIN, "2,schulz", "1,meier", "row 3: the image has another label in"),
        (TRAIN, "2,schulz,9", "1,meier,7", "row 3: the image is listed already in"),
        (TRAIN, "2,schulz,9\n", "", "lacks 0 that are"),
        (
            "gmdb_frequent_gallery_images_v1.csv",
            "2,schulz,9\n",
            "",
            "lists 0 images that are not in train + val and lacks 1 that are",
        ),
        (
            "gmdb_frequent_gallery_images_v1.csv",
            "1,meier",
            "1,mayer",
            "row 2: the image has another subject in gmdb_metadata/gmdb_train_images_v1.csv, row 2",
        ),
        (
            "gmdb_rare_test_images_v1.csv",
            "30,1",
            "30,-1",
            "row 3: split is no integer from 0 to 999",
        ),
        (
            "gmdb_rare_test_images_v1.csv",
            "30,1",
            "30,1000000000",
            "row 3: split is no integer from 0 to 999",
        ),
        (
            "gmdb_rare_gallery_images_v1.csv",
            "7,kern,30",
            "7,kern,9",
            "row 3: label 9 is in the lookup table, so it is not rare",
        ),
        ("gmdb_syndromes_v1.tsv", "30\tThirty", "x\tThirty", "row 4: syndrome_id is no integer"),
        ("gmdb_syndromes_v1.tsv", "30\tThirty", "9\tThirty", "row 4: syndrome_id is listed twice"),
        ("lookup_table_v1.txt", "[9, 7]", "9, 7", "row 2: no JSON list of syndrome ids"),
        ("lookup_table_v1.txt", "[9, 7]", "[9, 7.0]", "row 2: no JSON list of syndrome ids"),
        ("lookup_table_v1.txt", "[9, 7]", "[9, 9]", "row 2: a syndrome id is listed twice"),
        ("lookup_table_v1.txt", "[9, 7]", "[9, 8]", "row 2: syndrome ids [8] are not in"),
        ("image_metadata_v1.tsv", "present_features", "hpo", "no column 'present_features'"),
    ],
)
def test_a_wrong_row_is_refused_with_file_row_and_remedy(folder, edit, name, old, new, sentence):
    edit(name, old, new)
    assert sentence in refusal(folder)


@pytest.mark.parametrize(
    "image_id", ["../1", "/etc/passwd", "..", "a/b", "a\\b", "C:1", "1\0", ".x", "ü", "x" * 201]
)
def test_an_image_id_that_is_no_plain_name_is_refused(folder, edit, image_id):
    edit(TRAIN, "1,meier", f"{image_id},meier")
    sentence = refusal(folder)
    assert f"{TRAIN}, row 2: image_id is not a plain name" in sentence
    assert image_id not in sentence or image_id == ".."


def test_an_image_outside_the_folder_is_not_reached_even_if_it_exists(folder, edit):
    (folder / "1_rot_aligned.jpg").write_bytes(b"secret")
    edit(TRAIN, "1,meier", "../1,meier")
    assert "paths are not allowed" in refusal(folder)


def test_a_subject_in_frequent_gallery_and_test_is_refused(folder, edit):
    for kind in ("test", "frequent_test"):
        edit(f"gmdb_{kind}_images_v1.csv", "4,huber", "4,weber")
    expected = (
        "gmdb_test_images_v1.csv, row 2: the subject of this test image is also in train or val"
    )
    assert expected in refusal(folder)


def test_a_subject_in_gallery_and_test_of_a_rare_split_is_refused(folder, edit):
    for kind in ("gallery", "test"):
        edit(f"gmdb_rare_{kind}_images_v1.csv", "7,kern", "7,wolf")
    expected = "gmdb_rare_test_images_v1.csv, row 2: the subject of this test image is also in the"
    assert expected in refusal(folder)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(folder, content):
    (folder / "gmdb_metadata" / TRAIN).write_text(content)
    assert f"{TRAIN}: the file is empty" in refusal(folder)


def test_text_in_another_encoding_is_refused_with_its_row(folder):
    path = folder / "gmdb_metadata" / TRAIN
    path.write_bytes(path.read_bytes().replace(b"schulz", b"sch\xfclz"))
    assert f"{TRAIN}, row 3: not UTF-8 text; save the file as UTF-8" in refusal(folder)


def test_a_folder_that_lists_no_image_is_refused(folder):
    for path in (folder / "gmdb_metadata").glob("*_images_*.csv"):
        path.write_text(path.read_text().partition("\n")[0] + "\n")
    assert "no image is listed" in refusal(folder)


# --- writing -------------------------------------------------------------------------------------


def test_a_written_cohort_reads_back_the_same(folder, tmp_path):
    cohort = read_cohort(folder, name="copy")
    write_cohort(cohort, tmp_path / "copy")
    again = read_cohort(tmp_path / "copy")
    assert again.digest == cohort.digest
    assert again.label_map_digest == cohort.label_map_digest
    assert (again.rare_splits, again.train) == (cohort.rare_splits, cohort.train)
    for image_id, record in cohort.images.items():
        other = again.images[image_id]
        assert (other.hpo, other.facts) == (record.hpo, record.facts)


def test_writing_over_itself_keeps_the_images(folder):
    cohort = read_cohort(folder)
    digest = cohort.digest
    write_cohort(cohort, folder)
    assert read_cohort(folder).digest == digest


def test_images_are_copied_where_links_are_not_possible(folder, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    cohort = read_cohort(folder, name="copy")
    write_cohort(cohort, tmp_path / "copy")
    assert read_cohort(tmp_path / "copy").digest == cohort.digest


def test_writing_without_an_image_is_refused(folder, tmp_path):
    cohort = read_cohort(folder)
    image_file(folder, "3").unlink()
    with pytest.raises(DataError, match="an image of the cohort is no longer there"):
        write_cohort(cohort, tmp_path / "copy")


def test_writing_an_image_id_with_a_path_is_refused(folder, tmp_path):
    cohort = read_cohort(folder)
    images = dict(cohort.images) | {"../x": cohort.images["1"]}
    broken = type(cohort)(**{**cohort.__dict__, "images": images})
    with pytest.raises(DataError, match="not a plain name"):
        write_cohort(broken, tmp_path / "copy")


# --- images --------------------------------------------------------------------------------------


def jpeg(height=20, width=30, *, exif_orientation=0, progressive=False):
    """An image whose left edge is red."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 3, 2] = 255
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
    if exif_orientation:
        tiff = struct.pack("<4sIHHHIII", b"II*\0", 8, 1, 0x112, 3, 1, exif_orientation, 0)
        segment = b"Exif\0\0" + tiff
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
    return data


def record(path):
    return ImageRecord("1", "meier", 7, path)


@pytest.mark.parametrize("progressive", [False, True])
def test_an_image_is_decoded_as_rgb(tmp_path, progressive):
    path = tmp_path / "1.jpg"
    path.write_bytes(jpeg(progressive=progressive))
    pixels = load_image(record(path))
    assert (pixels.shape, pixels.dtype) == ((20, 30, 3), np.uint8)
    assert pixels[10, 2, 0] > 200 > 50 > pixels[10, 2, 2]


def test_exif_rotation_is_applied(tmp_path):
    path = tmp_path / "1.jpg"
    path.write_bytes(jpeg(exif_orientation=6))  # to be shown turned a quarter clockwise
    pixels = load_image(record(path))
    assert pixels.shape == (30, 20, 3)
    assert pixels[2, 10, 0] > 200 > 50 > pixels[27, 10, 0]


def test_a_png_is_decoded_too():
    data = cv2.imencode(".png", np.full((5, 6, 3), (1, 2, 3), np.uint8))[1].tobytes()
    assert decode_photograph(data, where="x")[0, 0].tolist() == [3, 2, 1]
    with pytest.raises(DataError, match="x: the image is truncated"):
        decode_photograph(data[:-12], where="x")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("padding", [b"", bytes(5000)])
def test_a_truncated_jpeg_is_refused(progressive, kept, padding):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (112, 112, 3), np.uint8)
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive)]
    data = cv2.imencode(".jpg", pixels, flags)[1].tobytes()
    with pytest.raises(DataError, match="truncated"):
        decode_photograph(data[: int(len(data) * kept)] + padding, where="x")


def test_bytes_behind_the_end_of_a_jpeg_do_not_matter():
    assert decode_photograph(jpeg() + b"trailer", where="x").shape == (20, 30, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"GIF89a", b"<html>", bytes(1000)])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DataError, match="x: not a JPEG or PNG image; export it as JPEG"):
        decode_photograph(data, where="x")


def test_a_damaged_image_is_refused():
    data = bytearray(jpeg())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16  # Huffman code lengths that cannot be
    with pytest.raises(DataError, match=r"x: the image is (damaged|truncated)"):
        decode_photograph(bytes(data), where="x")


def test_a_monstrous_image_is_refused_before_it_is_decoded(monkeypatch):
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="3600 megapixels, more than 50; export it smaller"):
        decode_photograph(bytes(data), where="x")


def test_a_monstrous_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "MAX_BYTES", 10)
    path = tmp_path / "1.jpg"
    path.write_bytes(jpeg())
    with pytest.raises(DataError, match="larger than"):
        load_image(record(path))


def test_a_missing_image_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"1\.jpg: the image file cannot be read: No such file"):
        load_image(record(tmp_path / "1.jpg"))


def test_an_image_that_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(DataError, match="the image file cannot be written"):
        save_jpeg(tmp_path / "nowhere" / "1.jpg", np.zeros((4, 4, 3), np.uint8))


# --- import --------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """Three photographs of two subjects, named after them."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in ("meier-1", "meier-2", "weber"):
        (photographs / f"{name}.jpg").write_bytes(jpeg())
    path = photographs / "cohort.csv"
    path.write_text(
        "image,subject,syndrome,hpo\nmeier-1.jpg,meier,7,HP:0000154; HP:0000343\n"
        "meier-2.jpg,meier,7,\nweber.jpg,weber,30,\n"
    )
    return path


def squared(pixels):
    return np.ascontiguousarray(cv2.resize(pixels, (112, 112)))


def test_a_csv_becomes_a_cohort_folder_without_the_names_of_files(table, tmp_path):
    imported = import_csv(table, tmp_path / "new", squared)
    cohort = read_cohort(tmp_path / "new")
    assert cohort.train == imported.train == ("000001", "000002", "000003")
    assert cohort.images["000001"].hpo == ("HP:0000154", "HP:0000343")
    assert load_image(cohort.images["000003"]).shape == (112, 112, 3)
    assert not [p for p in (tmp_path / "new").rglob("*") if "meier" in p.name]


def test_an_import_with_a_label_map_keeps_rare_syndromes_out_of_training(table, tmp_path):
    label_map = {i: Syndrome(i, str(i)) for i in (7, 9, 30)}
    import_csv(table, tmp_path / "new", squared, labels=LabelMap(label_map, (9, 7)))
    cohort = read_cohort(tmp_path / "new")
    assert cohort.classes == (9, 7)
    assert cohort.syndromes == label_map
    assert cohort.train == ("000001", "000002")
    assert cohort.rare_splits == (RareSplit(("000003",), ()),)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("weber.jpg", "../cohort.jpg", "row 4: the image lies outside the folder"),
        ("weber.jpg", "/tmp/cohort.jpg", "row 4: the image lies outside the folder"),  # noqa: S108
        ("weber.jpg", "nobody.jpg", "row 4: the image file cannot be read"),
        ("weber,30", "weber,x", "row 4: syndrome is no integer"),
        ("weber,30", "weber,31", "row 4: syndrome 31 is not in the label map"),
        ("image,", "photo,", "row 1: no column 'image'"),
        ("weber,30", ",30", "row 4: nothing in column 'subject'"),
    ],
)
def test_a_wrong_row_of_an_import_is_refused(table, tmp_path, old, new, sentence):
    table.write_text(table.read_text().replace(old, new, 1))
    label_map = {i: Syndrome(i, str(i)) for i in (7, 30)}
    with pytest.raises(DataError, match=re.escape(f"cohort.csv, {sentence}")):
        import_csv(table, tmp_path / "new", squared, labels=LabelMap(label_map, (7, 30)))


def test_a_photograph_that_cannot_be_aligned_is_refused_with_its_row(table, tmp_path):
    def faceless(pixels):
        raise DataError("no face")

    with pytest.raises(DataError, match=r"cohort\.csv, row 2: no face"):
        import_csv(table, tmp_path / "new", faceless)


def test_an_import_without_rows_is_refused(table, tmp_path):
    table.write_text("image,subject,syndrome\n")
    with pytest.raises(DataError, match="no row"):
        import_csv(table, tmp_path / "new", squared)
