"""Dealing a cohort over sites."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.cohort import (
    STRATEGIES,
    Cohort,
    ImageRecord,
    RareSplit,
    Syndrome,
    load_image,
    read_cohort,
    split_cohort,
    write_silos,
)
from fedgestalt.errors import ConfigError, DataError

SITES = ("north", "south", "west")


def make_cohort(subjects_by_syndrome, rare_by_syndrome=(), images=2, seed=0):
    """A cohort without files: subjects of every role for each syndrome."""
    rng = np.random.default_rng(seed)
    records, roles = {}, {"train": [], "validation": [], "frequent_test": []}
    rare, label = [], 0
    for label, counts in enumerate(subjects_by_syndrome, 1):
        for role, count in zip(roles, counts, strict=True):
            for number in range(count):
                subject = f"{label}-{role}-{number}"
                for shot in range(int(rng.integers(1, images + 1))):
                    image_id = f"{subject}-{shot}"
                    records[image_id] = ImageRecord(image_id, subject, label, Path("x"))
                    roles[role].append(image_id)
    frequent = label
    for label, count in enumerate(rare_by_syndrome, frequent + 1):
        for number in range(count):
            image_id = f"{label}-rare-{number}"
            records[image_id] = ImageRecord(image_id, image_id, label, Path("x"))
            rare.append(image_id)
    splits = [(rare[turn::2], rare[1 - turn :: 2]) for turn in range(2)] if rare else []
    return Cohort(
        name="made",
        version="v1",
        root=Path(),
        images=records,
        syndromes={i: Syndrome(i, str(i)) for i in range(1, label + 1)},
        classes=tuple(range(1, frequent + 1)),
        rare_splits=tuple(RareSplit(tuple(gallery), tuple(test)) for gallery, test in splits),
        **{role: tuple(ids) for role, ids in roles.items()},
    )


counts = st.tuples(st.integers(1, 5), st.integers(0, 2), st.integers(0, 3))
cohorts = st.builds(
    make_cohort,
    st.lists(counts, min_size=3, max_size=6),
    st.lists(st.integers(1, 6), max_size=3),
    seed=st.integers(0, 99),
)


@settings(max_examples=60, deadline=None)
@given(cohorts, st.sampled_from(STRATEGIES), st.integers(0, 2**32), st.floats(0.01, 100))
def test_silos_are_the_whole_by_subject_with_roles_and_label_map_kept(
    cohort, strategy, seed, alpha
):
    silos = list(split_cohort(cohort, SITES, strategy, seed, alpha).values())
    for role in ("images", "train", "validation", "frequent_test"):
        dealt = Counter(i for silo in silos for i in getattr(silo, role))
        assert dealt == Counter(list(getattr(cohort, role)))
    for index, split in enumerate(cohort.rare_splits):
        there = [silo.rare_splits[index] for silo in silos if silo.rare_splits]
        assert sorted(i for s in there for i in s.gallery) == sorted(split.gallery)
        assert sorted(i for s in there for i in s.test) == sorted(split.test)
    assert sum(len(silo.subjects) for silo in silos) == len(cohort.subjects)
    assert all(silo.train for silo in silos)
    assert {silo.label_map_digest for silo in silos} == {cohort.label_map_digest}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_decides(strategy):
    cohort = make_cohort([(8, 2, 4)] * 6, [6, 6])

    def dealt(seed):
        return [s.train for s in split_cohort(cohort, SITES, strategy, seed).values()]

    assert dealt(1) == dealt(1)
    assert dealt(1) != dealt(2)


@settings(max_examples=30, deadline=None)
@given(cohorts, st.integers(0, 1000))
def test_near_uniform_gives_each_site_its_share_of_every_syndrome_and_role(cohort, seed):
    silos = split_cohort(cohort, SITES, "near-uniform", seed).values()
    for role in ("train", "validation", "frequent_test"):
        for label in cohort.syndromes:
            held = [
                len({r.subject for r in s.records(getattr(s, role)) if r.syndrome == label})
                for s in silos
            ]
            assert max(held) - min(held) <= 1
    for label in set(cohort.syndromes) - set(cohort.classes):
        held = [s.images_per_syndrome()[label] for s in silos]
        assert max(held) - min(held) <= 1


def test_non_overlapping_gives_each_syndrome_to_one_site_and_balances_images():
    cohort = make_cohort([(4, 1, 2)] * 12, [5] * 6, images=1)
    silos = split_cohort(cohort, SITES, "non-overlapping", seed=3)
    held = [set(silo.images_per_syndrome()) for silo in silos.values()]
    assert sum(map(len, held)) == len(cohort.syndromes)
    assert {len(silo.images) for silo in silos.values()} == {4 * 7 + 2 * 5}


def test_a_smaller_alpha_deals_less_equally():
    cohort = make_cohort([(20, 2, 5)] * 8)

    def largest_share(alpha):
        silos = split_cohort(cohort, SITES, "dirichlet", seed=1, alpha=alpha).values()
        tops = [max(s.images_per_syndrome()[label] for s in silos) for label in cohort.classes]
        return sum(tops) / len(cohort.images)

    assert largest_share(0.1) > 0.75 > 0.5 > largest_share(100)


@pytest.mark.parametrize("alpha", [1e-300, 1e-6])
def test_a_tiny_alpha_still_leaves_every_site_something_to_train_on(alpha):
    silos = split_cohort(make_cohort([(9, 0, 0)]), SITES, "dirichlet", seed=1, alpha=alpha)
    assert sorted(len(silo.subjects) for silo in silos.values()) == [1, 1, 7]


def test_a_subject_with_two_syndromes_stays_whole():
    cohort = make_cohort([(3, 0, 0)] * 3, images=1)
    images = {
        i: ImageRecord(
            i, "both" if r.subject in ("1-train-0", "3-train-0") else r.subject, 1, r.path
        )
        for i, r in cohort.images.items()
    }
    double = Cohort(**{**cohort.__dict__, "images": images})
    for strategy in ("near-uniform", "dirichlet"):
        silos = split_cohort(double, SITES, strategy, seed=1).values()
        assert sorted(len(s.images) for s in silos if "both" in s.subjects)[0] >= 2
        assert sum("both" in silo.subjects for silo in silos) == 1


def test_written_silos_are_complete_folders(folder, tmp_path):
    cohort = read_cohort(folder)
    silos = split_cohort(cohort, ["north", "south"], "near-uniform", seed=5)
    write_silos(silos, tmp_path / "silos")
    assert sorted(path.name for path in (tmp_path / "silos").iterdir()) == ["north", "south"]
    for site, silo in silos.items():
        read = read_cohort(tmp_path / "silos" / site)
        assert read.digest == silo.digest
        assert read.rare_splits == silo.rare_splits
        assert read.name == site
        assert all(load_image(record).shape == (112, 112, 3) for record in read.images.values())
        assert len(list((read.root / "gmdb_align").iterdir())) == len(silo.images)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "strategy", "alpha", "sentence"),
    [
        (SITES, "dirchlet", 0.5, "no split is called 'dirchlet'; did you mean 'dirichlet'"),
        (("north",), "near-uniform", 0.5, "a split needs at least two sites"),
        (("north", "north"), "near-uniform", 0.5, "a site is named twice"),
        (("north", "../south"), "near-uniform", 0.5, "'../south' cannot be a folder name"),
        (SITES, "dirichlet", 0.0, "alpha is 0.0"),
        (SITES, "dirichlet", float("nan"), "alpha is nan"),
    ],
)
def test_a_senseless_argument_is_refused(sites, strategy, alpha, sentence):
    with pytest.raises(ConfigError) as caught:
        split_cohort(make_cohort([(3, 0, 0)] * 3), sites, strategy, 1, alpha)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_more_sites_than_training_subjects_are_refused(strategy):
    cohort = make_cohort([(2, 0, 4)])
    with pytest.raises(DataError, match="2 training subjects cannot be dealt over 3 sites"):
        split_cohort(cohort, SITES, strategy, seed=1)


def test_fewer_syndromes_than_sites_cannot_be_partitioned():
    cohort = make_cohort([(5, 0, 0)] * 2)
    with pytest.raises(DataError, match="would get no training image with the split 'non-overl"):
        split_cohort(cohort, SITES, "non-overlapping", seed=1)


def test_silos_never_replace_a_folder(folder, tmp_path):
    silos = split_cohort(read_cohort(folder), ["north", "south"], "near-uniform", seed=5)
    (tmp_path / "silos" / "south").mkdir(parents=True)
    with pytest.raises(ConfigError, match="the folder is there already; choose a new folder"):
        write_silos(silos, tmp_path / "silos")
    assert [path.name for path in (tmp_path / "silos").iterdir()] == ["south"]


def test_silos_leave_nothing_behind_when_writing_fails(folder, tmp_path):
    silos = split_cohort(read_cohort(folder), ["north", "south"], "near-uniform", seed=5)
    for image in (folder / "gmdb_align").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="an image of the cohort is no longer there"):
        write_silos(silos, tmp_path / "silos")
    assert list((tmp_path / "silos").iterdir()) == []


def test_silos_that_cannot_be_written_are_refused(folder, tmp_path):
    silos = split_cohort(read_cohort(folder), ["north", "south"], "near-uniform", seed=5)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the folder cannot be written"):
        write_silos(silos, tmp_path / "file" / "silos")
