"""The report: safe to hand on, right in its words, complete or absent."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.errors import DataError
from fedgestalt.reporting.pictures import Example, GramView, Neighbour
from fedgestalt.reporting.report import key_figures, rank_tables, summary, write_report
from fedgestalt.reporting.result import (
    CohortFacts,
    Privacy,
    Result,
    RoundFacts,
    SiteFacts,
    Table,
)


def table(top1, gallery=90):
    wide = {f"top{k}": (max(top1 - 0.1, 0), min(top1 + 0.1, 1)) for k in (1, 5, 10, 30)}
    return Table(
        top1=top1, top5=min(top1 + 0.2, 1), top10=min(top1 + 0.3, 1), top30=1.0,
        gallery=gallery, test=30, interval=wide,
    )  # fmt: skip


def result(first=None, *, seeds=(1,), patients=False, trained=2, **changes):
    """Build a result whose ``frequent`` top-1 is ``first`` by mode."""
    first = first or {"federated": 0.53, "centralised": 0.55, "local-only": 0.36, "chance": 0.05}
    facts = {
        "cohort": CohortFacts(
            name="made-up", version="v1", digest="ab" * 32, images=1442, subjects=540,
            syndromes=26, has_patients=patients,
        ),
        "split": "near-uniform",
        "ensemble": [{"name": "net", "backbone": "sface", "trainable": "neck"}],
        "sites": [
            SiteFacts(name=n, images=480, subjects=180, training_images=320, queries=100)
            for n in ("North", "South", "West")
        ],
        "rounds": [
            RoundFacts(
                seed=seed, round=number + 1, images=960,
                members={"net": {"loss": 2.0 - number, "accuracy": 0.5}},
                clipped=0, uploaded_bytes_per_site=5_000_000, seconds=4.0,
            )
            for seed in seeds
            for number in range(trained)
        ],
        "evaluation": {
            mode: {name: table(value) for name in ("frequent", "rare")}
            for mode, value in first.items()
        },
        "privacy": Privacy(
            strategy="isometry", server_learns="Similarities.", sites_learn="The seed.",
            asking_site_learns="Neighbours.", training="Sums.",
        ),
        "timings_seconds": {"training": 75.0},
        "seeds": list(seeds),
    }  # fmt: skip
    return Result(**(facts | changes))


def example(truth="SYN-A", *, face=True):
    pixels = np.full((112, 112, 3), 128, np.uint8) if face else None
    near = (Neighbour(pixels, truth, "South", 0.7), Neighbour(pixels, "SYN-Z", "West", 0.5))
    return Example(pixels, "North", truth, ((truth, 0.7), ("SYN-Z", 0.5)), near)


def view(names=("SYN-A", "SYN-B")):
    labels = np.repeat(np.arange(len(names)), 10)
    gram = (labels[:, None] == labels[None]).astype(np.float32) * 0.8 + 0.1
    np.fill_diagonal(gram, 1)
    return GramView(gram, tuple(names[i] for i in labels), ("North",) * len(labels))


@pytest.fixture
def written(tmp_path):
    def write(*arguments):
        path = tmp_path / "report.html"
        write_report(path, *arguments)
        return path.read_text(encoding="utf-8")

    return write


class Tags(HTMLParser):
    """Collects all (tag, attributes) of a page and checks that they close in order."""

    VOID = frozenset({"meta", "img", "br", "path", "line", "circle", "rect", "polyline", "use"})

    def __init__(self, page):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


# --- safe to hand on -----------------------------------------------------------------------------


def test_nothing_is_fetched_from_anywhere(written):
    page = written(result(), [example()], view())
    for tag, attributes in Tags(page).seen:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/")), (tag, attributes)
    assert not re.search(r"url\(|@import|https?://", page)


def test_the_page_is_well_formed(written):
    assert Tags(written(result(), [example()], view())).open == []


def test_the_notice_stands_on_screen_and_paper(written):
    page = written(result(notice="something else"), [], None)
    assert f'<div class="notice" role="note">{RESEARCH_USE_ONLY}</div>' in page
    assert re.search(r"@page \{[^\n]*" + re.escape(RESEARCH_USE_ONLY), page)


def test_names_cannot_become_markup(written):
    evil = "<b>x</b>"
    sites = [SiteFacts(name=evil, images=3, subjects=1, training_images=3, queries=0)]
    rounds = result().rounds[0].model_copy(update={"members": {evil: {"loss": 1.0}}})
    page = written(
        result(sites=sites, rounds=[rounds], split=evil), [example(evil)], view((evil, "SYN-B"))
    )
    assert evil not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page


def test_faces_are_inside_the_file(written):
    tags = Tags(written(result(), [example()], None)).seen
    pictures = [a for tag, a in tags if tag == "img"]
    assert len(pictures) == 3
    assert all(a["alt"] for a in pictures)


def test_released_pictures_only(written):
    page = written(result(patients=True), [example(face=False)], None)
    assert "<img" not in page
    assert "Pictures are not shown because this cohort has patients." in page


def test_faces_of_patients_are_dropped_even_if_handed_over(written):
    page = written(result(patients=True), [example(face=True)], None)
    assert "data:image" not in page


def test_pictures_are_not_excused_where_they_are_shown(written):
    assert "not shown" not in written(result(), [example()], None)


# --- right in its words --------------------------------------------------------------------------


def test_the_summary_of_one_seed():
    assert summary(result()) == (
        "Three hospitals, 1,442 images of 540 people: the true syndrome came first for 53\u202f% of"
        " the test images, against 36\u202f% for a hospital alone and 5\u202f% by chance. The"
        " federated result is 96\u202f% of what pooling all images in one place would reach."
    )


def test_the_summary_of_several_seeds_is_a_mean():
    assert "540 people, mean of 3 seeds: the true" in summary(result(seeds=(1, 2, 3)))
    assert "mean" not in summary(result())


def test_a_result_below_a_hospital_alone_is_said_to_be_less():
    text = summary(result({"federated": 0.3, "local-only": 0.4, "chance": 0.05}))
    assert "30\u202f% of the test images, less than the 40\u202f% that a hospital reaches" in text
    assert "; 5\u202f% by chance." in text


def test_a_difference_that_rounding_hides_is_not_claimed():
    text = summary(result({"federated": 0.531, "local-only": 0.529, "centralised": 0.534}))
    assert "no more than for a hospital alone" in text
    assert "would reach the same" in text


def test_a_result_above_pooling_is_not_called_a_share_of_it():
    text = summary(result({"federated": 0.6, "centralised": 0.5}))
    assert text.endswith("Pooling all images in one place reached less (50\u202f%).")


@pytest.mark.parametrize(
    ("first", "ending"),
    [
        ({"federated": 0.5}, "for 50\u202f% of the test images."),
        ({"federated": 0.5, "chance": 0.1}, "test images, against 10\u202f% by chance."),
        ({"federated": 0.5, "centralised": 0.0}, "in one place reached less (0\u202f%)."),
        ({"chance": 0.1}, "no federated result for common syndromes."),
    ],
)
def test_missing_modes_are_not_mentioned(first, ending, written):
    assert summary(result(first)).endswith(ending)
    assert written(result(first), [], None)


def test_one_hospital_is_singular_and_many_are_figures():
    site = result().sites[0]
    assert summary(result(sites=[site])).startswith("One hospital, ")
    assert summary(result(sites=[site] * 16)).startswith("16 hospitals, ")


def test_a_loss_against_a_hospital_alone_is_a_negative_figure():
    figures = key_figures(result({"federated": 0.3, "local-only": 0.4}))
    assert figures[-1].value == "\u221210"
    assert key_figures(result({"chance": 0.1})) == []


def test_chance_is_never_the_best_and_ties_are_all_best():
    (first, _) = rank_tables(result({"federated": 0.1, "pretrained": 0.1, "chance": 0.9}))
    assert [row.cells[0].best for row in first.rows] == [True, True, False]


def test_a_smaller_gallery_is_stated():
    evaluation = {"federated": {"rare": table(0.5)}, "local-only": {"rare": table(0.4, gallery=30)}}
    (rare,) = rank_tables(result(evaluation=evaluation))
    assert rare.sizes == "30 test images, 90 in the gallery"
    assert [row.note for row in rare.rows] == ["", "gallery of 30"]


def test_the_true_syndrome_is_marked_in_the_list_and_among_the_neighbours(written):
    tags = Tags(written(result(), [example()], None)).seen
    assert [a.get("class") for tag, a in tags if tag == "li"].count("true") == 1
    assert [a.get("class") for tag, a in tags if tag == "li"].count("same") == 1


def test_a_true_syndrome_that_is_not_listed_is_reported(written):
    lost = Example(None, "North", "SYN-Q", (("SYN-A", 0.5),), ())
    assert "The true syndrome is not among the 1 names listed." in written(result(), [lost], None)


def test_what_each_party_learns_stands_in_its_own_words(written):
    page = written(result(), [], None)
    for words in ("Similarities.", "The seed.", "Neighbours.", "Sums."):
        assert words in page


def test_a_run_without_training_examples_and_map_has_a_report(written):
    page = written(result(trained=0, sites=[], ensemble=[], timings_seconds={}), [], None)
    assert "This run trained nothing" in page
    assert 'id="map"' not in page
    assert 'id="examples"' not in page


def test_a_large_map_says_how_much_it_draws(written, monkeypatch):
    monkeypatch.setattr("fedgestalt.reporting.report.MAP_IMAGES", 12)
    assert "for 12 of 20 images" in written(result(), [], view())


# --- complete or absent --------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_interrupted_writing_leaves_no_file(tmp_path, monkeypatch, fault):
    def half(path, text, **keywords):
        path.write_bytes(text[:100].encode())
        raise fault

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises((KeyboardInterrupt, DataError)):
        write_report(tmp_path / "report.html", result(), [], None)
    assert list(tmp_path.iterdir()) == []


def test_an_older_report_survives_a_failed_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("older")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(DataError, match="cannot be written \\(full\\)"):
        write_report(path, result(), [], None)
    assert path.read_text() == "older"


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"report\.html"):
        write_report(tmp_path / "absent" / "report.html", result(), [], None)
