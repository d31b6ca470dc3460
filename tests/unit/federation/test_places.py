"""A site that moved, or a startup kit that is in use twice, is noticed from one job to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgestalt.federation.job.places import compare_places, is_place, place_of
from fedgestalt.federation.job.watch import SiteWatch

HERE, THERE = place_of("/srv/fedgestalt/kit"), place_of("/home/copy/kit")


def test_places_differ_between_folders_and_say_nothing_of_them() -> None:
    assert HERE != THERE
    assert place_of("/srv/fedgestalt/kit") == HERE
    assert is_place(HERE)


@pytest.mark.parametrize("value", [None, 7, "", "berlin", HERE + "0", HERE.upper() + "G"])
def test_what_is_no_place_is_not_taken_for_one(value: object) -> None:
    assert not is_place(value)


def test_nobody_has_moved_in_the_first_job(tmp_path: Path) -> None:
    assert compare_places(tmp_path / "places.json", {"berlin": HERE}) == []


def test_a_site_that_runs_elsewhere_is_named_once(tmp_path: Path) -> None:
    file = tmp_path / "places.json"
    compare_places(file, {"berlin": HERE, "bonn": HERE})
    (warning,) = compare_places(file, {"berlin": HERE, "bonn": THERE})
    assert warning.startswith("site 'bonn': it ran on another machine or in another folder")
    assert "its startup kit is in use twice" in warning
    assert compare_places(file, {"berlin": HERE, "bonn": THERE}) == []


def test_a_site_that_was_absent_is_remembered(tmp_path: Path) -> None:
    file = tmp_path / "places.json"
    compare_places(file, {"berlin": HERE, "bonn": HERE})
    compare_places(file, {"berlin": HERE})
    assert len(compare_places(file, {"bonn": THERE})) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"berlin": 7}'])
def test_a_damaged_memory_is_written_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "places.json"
    file.write_text(content)
    compare_places(file, {"berlin": HERE})
    assert compare_places(file, {"berlin": HERE}) == []


def test_the_watch_notes_the_places_that_sites_answer_with_and_nothing_else() -> None:
    answers = {
        "berlin": {"what": "", "fraction": 0.0, "place": HERE},
        "bonn": {"what": "", "fraction": 0.0, "place": "/home/copy/kit"},
        "leuven": {"what": "", "fraction": 0.0},
    }
    watch = SiteWatch(answers, lambda: answers, 120, 30)
    watch.step()
    assert watch.places == {"berlin": HERE}
