"""Figures: what they show, and the map of similarities."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from fedgestalt.reporting.pictures import GramView
from fedgestalt.reporting.plots import (
    compact_syndromes,
    gram_map,
    marker,
    ordered_modes,
    project,
    site_bars,
    spread,
    topk_curve,
    training_curve,
)
from fedgestalt.reporting.result import RoundFacts, SiteFacts, Table


def table(*values, interval=None):
    top1, top5, top10, top30 = values
    return Table(
        top1=top1, top5=top5, top10=top10, top30=top30, gallery=90, test=30,
        interval=interval or {},
    )  # fmt: skip


GOOD, CHANCE = table(0.5, 0.8, 0.9, 1), table(0.05, 0.25, 0.5, 1)


def clusters(number=4, size=15, seed=0):
    """Cosines of unit vectors around ``number`` directions, and which direction each is of."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(number), size)
    rows = 3 * np.eye(number, 32)[labels] + 0.3 * rng.standard_normal((number * size, 32))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows @ rows.T).astype(np.float32), labels


def parsed(svg):
    return list(ET.fromstring(str(svg)).iter())


def elements(svg, name):
    return [e for e in parsed(svg) if name in e.get("class", "").split()]


def words(svg):
    return " ".join(part.strip(" ") for e in parsed(svg) for part in (e.text, e.tail) if part)


# --- labels and curves ---------------------------------------------------------------------------


def test_labels_that_do_not_collide_stay_where_they_are():
    assert spread([10.0, 50.0, 90.0], 16, 0, 100) == [10.0, 50.0, 90.0]


@pytest.mark.parametrize(
    "wanted", [[50.0, 50.0, 50.0], [99.0, 100.0, 98.0], [0.0, 1.0, 60.0], [30.0, 45.0, 44.0, 20.0]]
)
def test_labels_keep_their_distance_their_order_and_their_room(wanted):
    placed = spread(wanted, 16, 0, 100)
    assert np.diff(sorted(placed)).min() >= 16 - 1e-9
    assert [wanted[i] for i in np.argsort(placed)] == sorted(wanted)
    assert min(placed) >= 0
    assert max(placed) <= 100


def test_known_modes_come_in_the_order_of_the_report_and_unknown_ones_last():
    assert ordered_modes({"chance": 1, "novel": 1, "federated": 1}) == [
        "federated", "chance", "novel",
    ]  # fmt: skip


def test_every_mode_is_labelled_with_its_first_value():
    svg = topk_curve({"federated": {"frequent": GOOD}, "chance": {"frequent": CHANCE}})
    assert "Federated 50\u202f%" in words(svg)
    assert "Chance 5\u202f%" in words(svg)
    assert len(elements(svg, "curve")) == 2


def test_a_better_result_is_drawn_higher():
    svg = topk_curve({"federated": {"frequent": GOOD}, "chance": {"frequent": CHANCE}})
    (federated,) = (e for e in elements(svg, "curve") if "m-federated" in e.get("class"))
    (chance,) = (e for e in elements(svg, "curve") if "m-chance" in e.get("class"))
    first = [float(e.get("points").split()[0].split(",")[1]) for e in (federated, chance)]
    assert first[0] < first[1]


def test_only_the_federated_interval_is_a_band():
    interval = {f"top{k}": (0.4, 0.6) for k in (1, 5, 10, 30)}
    with_band = table(0.5, 0.5, 0.5, 0.5, interval=interval)
    assert len(elements(topk_curve({"federated": {"frequent": with_band}}), "band")) == 1
    assert not elements(topk_curve({"pretrained": {"frequent": with_band}}), "band")


def test_a_mode_without_the_table_is_left_out():
    svg = topk_curve({"federated": {"rare": GOOD}})
    assert not elements(svg, "curve")


def test_a_training_curve_is_the_mean_over_seeds():
    def facts(seed, accuracy):
        return RoundFacts(
            seed=seed, round=1, images=9, members={"net": {"accuracy": accuracy}}, clipped=0,
            uploaded_bytes_per_site=1, seconds=1.0,
        )  # fmt: skip

    both = training_curve([facts(1, 0.2), facts(2, 0.6)], "accuracy", "t")
    mean = training_curve([facts(1, 0.4)], "accuracy", "t")
    assert elements(both, "curve")[0].get("points") == elements(mean, "curve")[0].get("points")


def test_a_metric_that_nobody_measured_draws_nothing():
    assert training_curve([], "loss", "t") == ""


def test_bars_are_as_long_as_the_hospitals_are_large():
    def site(name, images):
        return SiteFacts(name=name, images=images, subjects=5, training_images=images, queries=0)

    svg = site_bars([site("<A>", 100), site("B", 50)])
    long, short = (float(e.get("width")) for e in elements(svg, "bar"))
    assert long == pytest.approx(2 * short, rel=0.02)
    assert "<A>" in words(svg)


def test_long_names_of_one_family_stay_apart():
    sites = [
        SiteFacts(
            name="university-hospital-" * 2 + i, images=9, subjects=5, training_images=9, queries=0
        )
        for i in "12"
    ]
    first, second = (e.text for e in parsed(site_bars(sites)) if e.get("class") == "label")
    assert first != second
    assert len(first) < 30


# --- map -----------------------------------------------------------------------------------------


def test_a_projection_is_finite_and_the_same_each_time():
    gram, _ = clusters()
    first = project(gram)
    assert first.shape == (len(gram), 2)
    assert np.isfinite(first).all()
    assert np.array_equal(first, project(gram))


def test_a_projection_separates_obvious_clusters():
    gram, labels = clusters()
    places = project(gram)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    same = labels[:, None] == labels[None]
    np.fill_diagonal(distances, np.nan)
    assert np.nanmax(np.where(same, distances, np.nan)) < np.nanmin(
        np.where(same, np.nan, distances)
    )


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 7])
def test_few_images_are_placed_apart(n):
    places = project(np.eye(n, dtype=np.float32))
    assert places.shape == (n, 2)
    assert np.isfinite(places).all()
    assert len(np.unique(places.round(4), axis=0)) == n


def test_images_that_are_all_the_same_have_finite_places():
    assert np.isfinite(project(np.ones((30, 30), np.float32))).all()


def test_the_most_compact_syndromes_are_named():
    rng = np.random.default_rng(1)
    tight, _ = clusters(2, 10)
    names = ("A",) * 10 + ("B",) * 10 + ("C",) * 10
    gram = rng.uniform(-0.1, 0.1, (30, 30)).astype(np.float32)
    gram[:20, :20] = tight
    assert compact_syndromes(GramView(gram, names, ("s",) * 30), limit=2) == ["A", "B"]


def test_a_map_without_groups_draws_every_image_alike():
    svg = gram_map(np.arange(10, dtype=np.float32).reshape(5, 2), [None] * 5, "t")
    (dots,) = elements(svg, "unknown")
    assert dots.get("d").count("M") == 5


def test_every_group_has_its_own_colour_and_shape():
    places = np.arange(16, dtype=np.float32).reshape(8, 2)
    drawn = elements(gram_map(places, list(range(8)), "t", [f"S{i}" for i in range(8)]), "group")
    assert len({e.get("class") for e in drawn}) == 8
    assert len({re.sub(r"^M\S+ \S+?(?=m)", "", e.get("d")) for e in drawn}) == 8
    assert len({str(marker(i)) for i in range(8)}) == 8


def test_points_stay_inside_the_frame():
    places = np.random.default_rng(0).normal(0, 50, (40, 2)).astype(np.float32)
    path = elements(gram_map(places, [None] * 40, "t"), "unknown")[0].get("d")
    numbers = [float(x) for pair in re.findall(r"M(\S+) (\S+?)h", path) for x in pair]
    assert min(numbers) >= 0
    assert max(numbers) <= 480
