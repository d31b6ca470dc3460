"""Groups of alike subjects, and p-values that know that one searched for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.errors import DataError
from fedgestalt.similarity.discovery import (
    Group,
    _neighbourhoods,
    _surprise,
    benjamini_hochberg,
    find_groups,
)


def unsolved(
    seed: int, groups: int, subjects: int = 60, size: int = 48, pull: float = 2.5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarities of images, subjects and sites; subjects 0-4 are the first group, and so on.

    Every third subject has two photographs.
    """
    rng = np.random.default_rng(seed)
    people = rng.normal(size=(subjects, size))
    for group in range(groups):
        people[5 * group : 5 * group + 5] += pull * rng.normal(size=size)
    member = np.sort(np.concatenate([np.arange(subjects), np.arange(0, subjects, 3)]))
    images = people[member] + 0.3 * rng.normal(size=(len(member), size))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    return images @ images.T, member, np.array(["bonn", "kiel", "ulm"])[member % 3]


def found(seed: int, groups: int, **options: Any) -> list[Group]:
    rng = np.random.default_rng(seed)
    return find_groups(*unsolved(seed, groups), rng, searches=99, resamples=199, **options)


def test_groups_that_are_there_are_found_across_sites() -> None:
    first, second, *_ = found(0, 2)
    for group in (first, second):
        assert group.p_search == 0.01
        assert group.q_random <= 0.05
        assert len(set(group.sites)) > 1
    members = [set(group.subjects) for group in (first, second)]
    assert sorted(members, key=min) == [set(range(5)), set(range(5, 10))]


@given(st.integers(0, 2**32))
def test_candidates_are_mutual_neighbours_with_the_mean_of_their_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(20, 4))
    similarities = rows @ rows.T
    order, closeness = _neighbourhoods(similarities, 3, 6)
    others = np.where(np.eye(20, dtype=bool), -np.inf, similarities)
    near = [set(np.argsort(-row)[:6].tolist()) for row in others]
    for subject in range(20):
        mutual = [j for j in near[subject] if subject in near[j]]
        mutual.sort(key=lambda j: -similarities[subject, j])
        for column, size in enumerate(range(3, 7)):
            if len(mutual) < size - 1:
                assert closeness[subject, column] == -np.inf
                continue
            group = [subject, *mutual[: size - 1]]
            assert order[subject, :size].tolist() == group
            pairs = [similarities[a, b] for i, a in enumerate(group) for b in group[:i]]
            assert closeness[subject, column] == pytest.approx(np.mean(pairs))


def test_groups_share_no_subject_and_keep_their_size() -> None:
    groups = found(1, 3, sizes=(3, 6))
    named = [subject for group in groups for subject in group.subjects]
    assert len(named) == len(set(named))
    assert all(3 <= len(group.subjects) <= 6 for group in groups)
    assert all(np.array_equal(g.sites, np.array(SITES)[np.array(g.subjects) % 3]) for g in groups)


SITES = ["bonn", "kiel", "ulm"]


def test_a_search_where_there_is_nothing_seldom_says_that_there_is() -> None:
    best = [min((g.p_search for g in found(seed, 0)), default=1.0) for seed in range(2, 42)]
    assert np.mean(np.array(best) <= 0.05) <= 0.15
    assert np.mean(best) > 0.3


def test_a_size_that_searches_seldom_reach_is_not_taken_for_a_discovery() -> None:
    best = np.array([[0.5, 0.3], [0.6, -np.inf], [0.7, -np.inf]])
    surprise, by_chance = _surprise(np.array([[0.8, 0.9], [0.6, -np.inf]]), best)
    assert np.isneginf(surprise[:, 1]).all()
    assert surprise[1, 0] == pytest.approx(0)
    assert surprise[0, 0] == pytest.approx(0.2 / np.std([0.5, 0.6, 0.7]))
    assert by_chance.tolist() == sorted(by_chance.tolist())


def test_random_groups_are_beaten_even_where_there_is_nothing() -> None:
    closer = [len(found(seed, 0)) for seed in range(2, 8)]
    assert np.mean(closer) > 3, "why p_random alone proves no group"


def test_the_same_seed_finds_the_same_and_handles_are_opaque() -> None:
    similarities, subjects, sites = unsolved(5, 1)
    names = np.array([f"handle-{59 - s}" for s in subjects])
    plain, again = (
        find_groups(similarities, subjects, sites, np.random.default_rng(1), searches=99)
        for _ in range(2)
    )
    assert plain == again
    renamed = find_groups(similarities, names, sites, np.random.default_rng(1), searches=99)
    assert {f"handle-{59 - s}" for s in plain[0].subjects} == set(renamed[0].subjects)


def test_random_groups_come_from_the_same_sites() -> None:
    """Where a site's camera makes its subjects alike, a group of one site is no surprise."""
    rng = np.random.default_rng(6)
    camera = 3 * rng.normal(size=48)
    people = rng.normal(size=(60, 48))
    people[:20] += camera
    people /= np.linalg.norm(people, axis=1, keepdims=True)
    subjects, similarities = np.arange(60), people @ people.T

    def p_values(sites: np.ndarray) -> list[float]:
        rng = np.random.default_rng(0)
        groups = find_groups(similarities, subjects, sites, rng, searches=9, level=1.0)
        return [g.p_random for g in groups if max(g.subjects) < 20]

    blind, aware = p_values(np.zeros(60)), p_values(subjects // 20)
    assert len(blind) == len(aware) > 1
    assert np.mean(blind) < 0.005
    assert np.mean(aware) > 5 * np.mean(blind)


def lumpy(seed: int, subjects: int) -> np.ndarray:
    """Similarities of people in twelve lumps, as ancestry and age make them; no syndrome."""
    lumps = 1.2 * np.random.default_rng(0).normal(size=(12, 48))
    rng = np.random.default_rng(seed)
    people = lumps[rng.integers(0, 12, subjects)] + rng.normal(size=(subjects, 48))
    people /= np.linalg.norm(people, axis=1, keepdims=True)
    return people @ people.T


def test_people_who_share_no_syndrome_tell_lumps_from_discoveries() -> None:
    unrelated = lumpy(1, 240), np.arange(240)

    def best(seed: int, **options: Any) -> float:
        names, rng = np.arange(60), np.random.default_rng(seed)
        groups = find_groups(lumpy(seed, 60), names, names % 3, rng, searches=99, **options)
        return min((group.p_search for group in groups), default=1.0)

    seeds = range(2, 12)
    assert np.mean([best(seed) <= 0.05 for seed in seeds]) > 0.5
    assert np.mean([best(seed, unrelated=unrelated) <= 0.05 for seed in seeds]) <= 0.2


def test_a_group_stands_out_among_people_who_share_no_syndrome() -> None:
    similarities, subjects, _ = unsolved(9, 0, subjects=130)
    first, *_ = found(9, 1, unrelated=(similarities, subjects))
    assert set(first.subjects) == set(range(5))
    assert first.p_search == 0.01


def test_too_few_unrelated_people_are_refused() -> None:
    similarities, subjects, _ = unsolved(9, 0, subjects=119)
    with pytest.raises(DataError, match="119 unrelated people are too few for 60"):
        found(9, 1, unrelated=(similarities, subjects))


def test_too_few_subjects_form_no_group() -> None:
    similarities, subjects, sites = unsolved(7, 1, subjects=15)
    assert find_groups(similarities, subjects, sites, np.random.default_rng(0)) == []


@pytest.mark.parametrize("damage", ["asymmetric", "unreleased", "short"])
def test_similarities_that_are_not_of_all_pairs_are_refused(damage: str) -> None:
    similarities, subjects, sites = unsolved(8, 0)
    if damage == "short":
        subjects, sites = subjects[:-1], sites[:-1]
    else:
        similarities[1, 2] = -np.inf if damage == "unreleased" else 0.9
    with pytest.raises(DataError, match="similarit"):
        find_groups(similarities, subjects, sites, np.random.default_rng(0))


def test_benjamini_hochberg_by_hand() -> None:
    adjusted = benjamini_hochberg(np.array([0.04, 0.01, 0.03, 0.5]))
    np.testing.assert_allclose(adjusted, [0.16 / 3, 0.04, 0.16 / 3, 0.5])
    assert benjamini_hochberg(np.array([])).tolist() == []


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=20), st.floats(0.01, 0.5))
def test_benjamini_hochberg_accepts_what_the_step_up_rule_accepts(
    p_values: list[float], level: float
) -> None:
    ordered, count = sorted(p_values), len(p_values)
    passing = [p for i, p in enumerate(ordered, 1) if p * count / i <= level]
    accepted = [p for p in p_values if passing and p <= max(passing)]
    adjusted = benjamini_hochberg(np.array(p_values))
    assert sorted(np.array(p_values)[adjusted <= level].tolist()) == sorted(accepted)
