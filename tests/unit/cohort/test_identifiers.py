"""Identifiers of diseases, by their form."""

import pytest

from fedgestalt.cohort import Syndrome, check_cohort, read_cohort
from fedgestalt.cohort.identifiers import are_omim_numbers, curie, curies


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("OMIM:122470", "OMIM:122470"),
        (" mim:122470 ", "OMIM:122470"),
        ("OMIM:PS122470", "OMIM:PS122470"),
        ("MONDO:0016033", "MONDO:0016033"),
        ("ORPHA:199", "ORPHA:199"),
        ("Orphanet:199", "ORPHA:199"),
    ],
)
def test_an_identifier_is_written_in_one_way(text, known):
    assert curie(text) == known


@pytest.mark.parametrize(
    "text",
    [
        *("", "122470", "OMIM:", "OMIM:12247", "OMIM:022470", "OMIM:1224701", "MONDO:16033"),
        *("ORPHA:0199", "ORPHA:1234567", "HP:0000154", "OMIM:122470 x", "OMIM:١٢٢٤٧٠"),
    ],
)
def test_what_has_not_the_form_of_an_identifier_is_none(text):
    assert curie(text) is None


def test_identifiers_of_a_cell_come_once_each_and_strangers_are_noticed():
    assert curies("OMIM:122470; MIM:122470;ORPHA:199;") == (("OMIM:122470", "ORPHA:199"), True)
    assert curies("OMIM:122470;Cornelia") == (("OMIM:122470",), False)
    assert curies("") == ((), True)


@pytest.mark.parametrize(
    ("cell", "sound"),
    [
        ("122470", True),
        ("122470, 300590", True),
        ("[122470; 'OMIM:300590']", True),
        ("", True),
        ("None", True),
        ("12247", False),
        ("ORPHA:199", False),
        ("122470;meier", False),
    ],
)
def test_the_omim_numbers_of_all_versions_are_read(cell, sound):
    assert are_omim_numbers(cell) is sound


def test_identifiers_of_syndromes_are_read_from_a_column_that_need_not_be_there(folder):
    assert read_cohort(folder).syndromes[7] == Syndrome(7, "Seven")
    path = folder / "gmdb_metadata" / "gmdb_syndromes_v1.tsv"
    lines = path.read_text().splitlines()
    cells = ["identifiers", "OMIM:122470;ORPHA:199", "", "MONDO:16033"]
    path.write_text("\n".join(f"{line}\t{cell}" for line, cell in zip(lines, cells, strict=True)))
    assert read_cohort(folder).syndromes[7].identifiers == ("OMIM:122470", "ORPHA:199")
    (found,) = check_cohort(folder)
    assert (found.severity, found.row) == ("warning", 4)
    assert "no OMIM, MONDO or ORPHA id" in found.what


def test_a_wrong_omim_number_is_a_warning(folder, edit):
    edit("image_metadata_v1.tsv", "122470", "12247")
    (found,) = check_cohort(folder)
    assert (found.severity, found.row) == ("warning", 2)
    assert found.what == "omim_ids holds something that is no OMIM number"


def test_identifiers_do_not_change_the_digest_of_the_label_map(folder):
    before = read_cohort(folder).label_map_digest
    path = folder / "gmdb_metadata" / "gmdb_syndromes_v1.tsv"
    lines = path.read_text().splitlines()
    cells = ["identifiers", "OMIM:122470", "", ""]
    path.write_text("\n".join(f"{line}\t{cell}" for line, cell in zip(lines, cells, strict=True)))
    assert read_cohort(folder).syndromes[7].identifiers
    assert read_cohort(folder).label_map_digest == before
