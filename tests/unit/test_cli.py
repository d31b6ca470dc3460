"""The ``fedgestalt`` command: what it prints where, and how it refuses."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import fedgestalt
from fedgestalt.cli import CALL_WRONG, WORK_FAILED, main
from fedgestalt.cohort import (
    Cohort,
    ImageRecord,
    RareSplit,
    Syndrome,
    image_file,
    read_cohort,
    save_jpeg,
    write_cohort,
)
from fedgestalt.contracts import Progress
from fedgestalt.jobs import JOBS, MatchingJob, TrainingJob, read_job, with_settings
from fedgestalt.learning.spec import MemberSpec, TrainingSpec

DIGEST = "0123456789abcdef" * 4
TRAIN_TABLE = Path("gmdb_metadata/gmdb_train_images_v1.csv")


def build_cohort(root: Path) -> Cohort:
    """Nine frequent and two rare images, each of a subject of its own."""
    (root / "gmdb_align").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {}
    for number in range(1, 12):
        syndrome = 30 if number > 9 else 7 + 2 * (number % 2)
        record = ImageRecord(
            str(number), f"subject-{number}", syndrome, image_file(root, str(number))
        )
        save_jpeg(record.path, rng.integers(0, 256, (112, 112, 3), np.uint8))
        images[record.image_id] = record
    cohort = Cohort(
        name="tiny",
        version="v1",
        root=root,
        images=images,
        syndromes={i: Syndrome(i, f"syndrome {i}") for i in (7, 9, 30)},
        classes=(9, 7),
        train=("1", "2", "3", "4", "5", "6"),
        validation=("7",),
        frequent_test=("8", "9"),
        rare_splits=(RareSplit(("10",), ("11",)),),
    )
    write_cohort(cohort, root)
    return cohort


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_cohort(tmp_path / "tiny").root


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def done(*arguments: object) -> str:
    """What a command that works prints on standard output."""
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(code: int, *arguments: object) -> str:
    """The one sentence with which a command is refused; nothing on standard output."""
    result = run(*arguments)
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (sentence,) = [s for s in result.stderr.splitlines() if s.startswith("fedgestalt: ")]
    assert result.stderr.endswith(f"{sentence}\n")
    return sentence


# --- version, help, wrong calls ------------------------------------------------------------------


def test_the_version_is_that_of_the_distribution() -> None:
    assert done("version") == f"{fedgestalt.__version__}\n"
    assert done("--version") == f"fedgestalt {fedgestalt.__version__}\n"


def test_help_says_what_the_result_is_not() -> None:
    assert fedgestalt.RESEARCH_USE_ONLY in done("--help")
    assert done("-h") == done("--help")


@pytest.mark.parametrize(
    "arguments",
    [
        ("demon",),
        ("cohort", "biuld"),
        ("job", "submit"),
        ("demo", "--site", "3", "x"),
        ("demo", "--sites", "three"),
        ("cohort", "check"),
        ("cohort", "split", "folder"),
        ("job", "render", "match"),
    ],
)
def test_a_call_that_click_cannot_read_is_wrong(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == CALL_WRONG
    assert result.stdout == ""
    assert "Usage: " in result.stderr
    assert "Error: " in result.stderr


def test_the_command_also_runs_as_a_module_with_json_alone_on_standard_output() -> None:
    command = [sys.executable, "-m", "fedgestalt", "plugins", "--json"]
    ended = subprocess.run(command, capture_output=True, check=True)
    content = json.loads(ended.stdout)
    assert content.keys() == {"plugins", "problems"}
    assert ended.stderr == b""


def test_a_reader_that_goes_away_is_no_error_to_talk_about() -> None:
    command = [sys.executable, "-m", "fedgestalt", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == WORK_FAILED
    assert said == b""


# --- plugins -------------------------------------------------------------------------------------


def test_every_plugin_is_listed_with_its_origin_and_licence() -> None:
    lines = done("plugins").splitlines()
    assert lines[0].split() == ["KIND", "NAME", "DISTRIBUTION", "VERSION", "LICENCE", "SUMMARY"]
    (row,) = [line for line in lines if " isometry " in line]
    assert row.startswith("matching strategy")
    assert f"  fedgestalt    {fedgestalt.__version__}" in row


def test_plugins_as_json_hold_the_same_facts() -> None:
    content = json.loads(done("plugins", "--json"))
    assert content["problems"] == []
    rows = {row["name"]: row for row in content["plugins"]}
    assert {"iresnet", "sface", "isometry", "yunet-arcface", "synthetic"} <= rows.keys()
    for row in rows.values():
        assert row.keys() == {"kind", "name", "summary", "licence", "distribution", "version"}
        assert all(row.values())


# --- cohorts -------------------------------------------------------------------------------------


@dataclass
class TinySource:
    """A cohort plugin that builds at once."""

    name: str = "tiny"
    summary: str = "eleven noisy squares"
    licence: str = "CC0-1.0"
    version: str = "1"
    has_patients: bool = False

    def build(self, target: Path, progress: Progress) -> None:
        place = target / "built"
        cohort = build_cohort(place)
        write_cohort(replace(cohort, root=target), target)
        shutil.rmtree(place)
        progress(11, 11)


@pytest.fixture
def tiny_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgestalt.hooks import Catalogue, Entry, Registry

    registry = Registry([])
    registry.cohorts = Catalogue(
        "cohort", {"tiny": Entry("cohort", TinySource(), "tests", "1")}, {}
    )
    monkeypatch.setattr("fedgestalt.hooks.get_registry", lambda: registry)
    monkeypatch.setenv("FEDGESTALT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("tiny_plugin")
def test_a_cohort_is_built_into_a_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "tiny"
    assert done("cohort", "build", "tiny", "--out", out) == f"{out}: 11 images of 11 subjects\n"
    assert len(read_cohort(out).images) == 11
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


@pytest.mark.usefixtures("tiny_plugin")
def test_a_built_cohort_does_not_share_files_with_the_cache(tmp_path: Path) -> None:
    done("cohort", "build", "tiny", "--out", tmp_path / "mine")
    image_file(tmp_path / "mine", "1").write_bytes(b"")
    done("cohort", "build", "tiny", "--out", tmp_path / "yours")
    assert image_file(tmp_path / "yours", "1").stat().st_size > 0


@pytest.mark.usefixtures("tiny_plugin")
def test_an_unknown_cohort_names_the_nearest_one(tmp_path: Path) -> None:
    said = refused(CALL_WRONG, "cohort", "build", "tinny", "--out", tmp_path / "out")
    assert "no cohort is called 'tinny'; did you mean 'tiny'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny_plugin")
def test_no_cohort_is_built_over_an_existing_folder(tmp_path: Path) -> None:
    said = refused(CALL_WRONG, "cohort", "build", "tiny", "--out", tmp_path)
    assert said == f"fedgestalt: {tmp_path}: exists already; name a new folder."


@pytest.mark.usefixtures("tiny_plugin")
def test_a_cohort_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(WORK_FAILED, "cohort", "build", "tiny", "--out", tmp_path / "file" / "x" / "y")
    assert str(tmp_path / "file") in said


def test_a_cohort_is_dealt_to_silos_that_are_sound(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "silos"
    lines = done("cohort", "split", folder, "--sites", 2, "--out", out).splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{out}/site-1", f"{out}/site-2"]
    silos = [read_cohort(out / f"site-{number}") for number in (1, 2)]
    assert sum(len(silo.images) for silo in silos) == 11
    assert not silos[0].subjects & silos[1].subjects
    for number in (1, 2):
        assert "0 errors" in done("cohort", "check", out / f"site-{number}")


def test_the_same_seed_deals_in_the_same_way(folder: Path, tmp_path: Path) -> None:
    def deal(name: str, seed: int) -> tuple[str, ...]:
        strategy = ("--strategy", "dirichlet", "--seed", seed)
        done("cohort", "split", folder, "--sites", 2, "--out", tmp_path / name, *strategy)
        return tuple(read_cohort(tmp_path / name / "site-1").images)

    assert deal("a", 5) == deal("b", 5)
    assert len({deal(f"seed-{seed}", seed) for seed in range(6, 10)}) > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sites", 2, "--strategy", "near-unifrom"), "did you mean 'near-uniform'"),
        (("--sites", 1), "at least two sites"),
        (("--sites", -1), "at least two sites"),
        (("--sites", 2, "--seed", -1), "seed"),
    ],
)
def test_a_split_that_makes_no_sense_is_a_wrong_call(
    folder: Path, tmp_path: Path, options: tuple[object, ...], says: str
) -> None:
    out = tmp_path / "silos"
    assert says in refused(CALL_WRONG, "cohort", "split", folder, "--out", out, *options)
    assert not out.exists()


def test_more_silos_than_training_subjects_fail(folder: Path, tmp_path: Path) -> None:
    said = refused(WORK_FAILED, "cohort", "split", folder, "--sites", 7, "--out", tmp_path / "x")
    assert "6 training subjects cannot be dealt over 7 sites" in said


def test_silos_are_never_written_over_an_existing_folder(folder: Path) -> None:
    said = refused(CALL_WRONG, "cohort", "split", folder, "--sites", 2, "--out", folder)
    assert "exists already" in said


def test_a_sound_cohort_has_no_errors(folder: Path) -> None:
    assert done("cohort", "check", folder).splitlines()[-1].startswith("0 errors, ")


def test_a_check_as_json_is_one_document(folder: Path) -> None:
    content = json.loads(done("cohort", "check", folder, "--json"))
    assert content["ok"] is True
    assert {finding["severity"] for finding in content["findings"]} <= {"warning"}


def cut_column(folder: Path) -> None:
    path = folder / TRAIN_TABLE
    path.write_text(path.read_text().replace("subject", "patient", 1))


def lose_image(folder: Path) -> None:
    image_file(folder, "2").unlink()


def cut_image(folder: Path) -> None:
    path = image_file(folder, "2")
    path.write_bytes(path.read_bytes()[:-500])


def lose_tables(folder: Path) -> None:
    shutil.rmtree(folder / "gmdb_metadata")


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_column, "no column 'subject'"),
    (lose_image, "its image is not in gmdb_align"),
    (cut_image, "the image is truncated"),
    (lose_tables, "gmdb_metadata cannot be read"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_check_of_a_damaged_cohort_fails_and_says_why(
    folder: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(folder)
    result = run("cohort", "check", folder)
    assert result.exit_code == WORK_FAILED
    assert any(s.startswith("error: ") and says in s for s in result.stdout.splitlines())
    as_json = run("cohort", "check", folder, "--json")
    assert as_json.exit_code == WORK_FAILED
    content = json.loads(as_json.stdout)
    assert content["ok"] is False
    assert any(says in finding["what"] for finding in content["findings"])
    assert "subject-" not in result.stdout + as_json.stdout


def test_a_check_of_no_folder_fails(tmp_path: Path) -> None:
    assert run("cohort", "check", tmp_path / "nowhere").exit_code == WORK_FAILED


def test_a_split_comes_with_a_picture_of_who_has_what(folder: Path, tmp_path: Path) -> None:
    how = ("--strategy", "dirichlet", "--alpha", 0.3, "--seed", 4)
    done("cohort", "split", folder, "--sites", 2, *how, "--out", tmp_path / "silos")
    picture = (tmp_path / "silos" / "split.svg").read_text()
    assert "Who has what: dirichlet, alpha 0.3, seed 4" in picture
    assert "site-2" in picture
    assert "subject-" not in picture


@pytest.fixture
def preprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only preprocessor takes the whole photograph for a face, if it is red enough."""
    from fedgestalt.contracts import FACE_SIZE, AlignedFace, Options, Pixels
    from fedgestalt.errors import DataError
    from fedgestalt.hooks import Catalogue, Entry, Registry

    class Whole:
        name, options = "whole", Options

        def align(self, photograph: Pixels, options: object) -> AlignedFace:
            if photograph[..., 0].mean() < 10:
                raise DataError("no face was found in the photograph", remedy="use another one")
            return AlignedFace(photograph[:FACE_SIZE, :FACE_SIZE], size=80.0)

    registry = Registry([])
    entry: Any = Entry("preprocessor", Whole(), "tests", "1")  # type: ignore[type-var]
    registry.preprocessors = Catalogue("preprocessor", {"whole": entry}, {})
    monkeypatch.setattr("fedgestalt.hooks.get_registry", lambda: registry)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six photographs of six subjects, with two syndromes."""
    rng = np.random.default_rng(3)
    place = tmp_path / "photographs"
    place.mkdir()
    rows = ["image,subject,syndrome,gender"]
    for number in range(6):
        save_jpeg(place / f"meier-{number}.jpg", rng.integers(0, 256, (130, 120, 3), np.uint8))
        rows.append(f"meier-{number}.jpg,subject-{number},{7 + 2 * (number % 2)},female")
    (place / "cohort.csv").write_text("\n".join(rows))
    return place / "cohort.csv"


@pytest.mark.usefixtures("preprocessor")
def test_a_table_is_checked_imported_and_exported(table: Path, tmp_path: Path) -> None:
    assert done("cohort", "check", table) == "0 errors, 0 warnings\n"
    new, out = tmp_path / "new", tmp_path / "out"
    said = done("cohort", "import", table, "--out", new, "--test-share", 0.34)
    assert said == f"{new}: 6 images of 6 subjects\n"
    cohort = read_cohort(new)
    assert (len(cohort.train), len(cohort.frequent_test)) == (4, 2)
    assert {r.facts["gender"] for r in cohort.images.values()} == {"female"}
    done("cohort", "export", new, "--version", "v1.1.0", "--out", out)
    assert read_cohort(out).digest == cohort.digest
    assert read_cohort(out).version == "v1.1.0"
    assert not [path for path in out.rglob("*") if "meier" in path.name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "out", "photographs"]


@pytest.mark.usefixtures("preprocessor")
def test_a_photograph_without_a_face_keeps_a_table_from_being_imported(
    table: Path, tmp_path: Path
) -> None:
    save_jpeg(table.parent / "meier-4.jpg", np.zeros((130, 120, 3), np.uint8))
    checked = run("cohort", "check", table)
    assert checked.exit_code == WORK_FAILED
    assert checked.stdout.splitlines()[0] == (
        "error: cohort.csv, row 6: no face was found in the photograph; use another one."
    )
    said = refused(WORK_FAILED, "cohort", "import", table, "--out", tmp_path / "new")
    assert "cohort.csv, row 6: no face was found" in said
    assert not (tmp_path / "new").exists()


def test_without_a_preprocessor_a_table_cannot_be_checked(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgestalt.hooks import Registry

    monkeypatch.setattr("fedgestalt.hooks.get_registry", lambda: Registry([]))
    assert "0 preprocessors are installed" in refused(CALL_WRONG, "cohort", "check", table)


def test_labels_of_a_consortium_are_compared(folder: Path, tmp_path: Path) -> None:
    agreed = tmp_path / "agreed"
    shutil.copytree(folder, agreed)
    assert "0 errors" in done("cohort", "check", folder, "--labels", agreed)
    names = agreed / "gmdb_metadata" / "gmdb_syndromes_v1.tsv"
    names.write_text(names.read_text().replace("syndrome 9", "syndrome nine"))
    result = run("cohort", "check", folder, "--labels", agreed)
    assert result.exit_code == WORK_FAILED
    assert "syndrome 9 is 'syndrome 9', in the agreed map 'syndrome nine'" in result.stdout
    said = refused(WORK_FAILED, "cohort", "check", folder, "--labels", tmp_path)
    assert "gmdb_metadata cannot be read" in said


def test_a_check_counts_without_saying_of_what(folder: Path) -> None:
    content = json.loads(done("cohort", "check", folder, "--json"))
    assert content["counts"]["images"] == 11
    assert content["counts"]["images_per_syndrome"] == [5, 4, 2]
    assert content["not_checked"] == []


def test_an_export_onto_a_full_disk_is_one_sentence_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, place: Path) -> None:
        place.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    said = refused(WORK_FAILED, "cohort", "export", folder, "--out", tmp_path / "out")
    assert "the cohort cannot be written: No space left on device; free space, or" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_an_export_under_a_version_that_is_no_name_is_refused(folder: Path, tmp_path: Path) -> None:
    said = refused(
        WORK_FAILED, "cohort", "export", folder, "--version", "../v", "--out", tmp_path / "o"
    )
    assert "the version or an image id is not a plain name" in said
    assert not (tmp_path / "o").exists()


# --- jobs ----------------------------------------------------------------------------------------


def test_job_templates_are_listed_as_json() -> None:
    rows = json.loads(done("job", "list", "--json"))["templates"]
    assert [row["name"] for row in rows] == list(JOBS)
    for row in rows:
        assert (Path(row["folder"]) / "meta.json").is_file()


def test_job_templates_are_listed_as_a_table() -> None:
    lines = done("job", "list").splitlines()
    assert lines[0].split() == ["NAME", "SUMMARY", "FOLDER"]
    assert [line.split()[0] for line in lines[1:]] == list(JOBS)


def test_a_job_is_rendered_with_the_given_settings(tmp_path: Path) -> None:
    out = tmp_path / "job"
    settings = ("--set", "rounds=10", "--set", "sites=[bonn, ulm, kiel]")
    assert f"nvflare job submit -j {out}" in done(
        "job", "render", "train_ensemble", "--out", out, *settings
    )
    assert read_job(out) == TrainingJob(rounds=10, sites=("bonn", "ulm", "kiel"))


def test_a_value_may_hold_an_equals_sign(tmp_path: Path) -> None:
    out = tmp_path / "job"
    settings = ("--set", f"ensemble={DIGEST}", "--set", "strategy=a=b")
    said = refused(CALL_WRONG, "job", "render", "match", "--out", out, *settings)
    assert "no matching strategy is called 'a=b'" in said
    assert not out.exists()


def test_a_matching_job_needs_an_ensemble(tmp_path: Path) -> None:
    said = refused(CALL_WRONG, "job", "render", "match", "--out", tmp_path / "job")
    assert "--set ensemble=DIGEST" in said
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train_ensembel",), "did you mean 'train_ensemble'"),
        (("train_ensemble", "--set", "round=3"), "did you mean 'rounds'"),
        (("train_ensemble", "--set", "rounds=0"), "rounds"),
        (("train_ensemble", "--set", "rounds"), "not KEY=VALUE"),
        (("train_ensemble", "--set", "=3"), "not KEY=VALUE"),
        (("train_ensemble", "--set", "minimum_sites=2"), "minimum_sites"),
    ],
)
def test_a_job_that_makes_no_sense_is_a_wrong_call(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert says in refused(CALL_WRONG, "job", "render", *arguments, "--out", tmp_path / "job")
    assert not (tmp_path / "job").exists()


def test_no_job_is_rendered_over_an_existing_folder(tmp_path: Path) -> None:
    said = refused(CALL_WRONG, "job", "render", "train_ensemble", "--out", tmp_path)
    assert "exists already" in said


@pytest.fixture
def rendered(tmp_path: Path) -> Path:
    done("job", "render", "match", "--out", tmp_path / "job", "--set", f"ensemble={DIGEST}")
    return tmp_path / "job"


def test_a_job_is_explained_key_by_key(rendered: Path) -> None:
    said = done("job", "explain", rendered)
    assert said.startswith(f"match: {MatchingJob.summary}\n")
    assert f'  ensemble = "{DIGEST}"   # digest of a published ensemble\n' in said
    assert all(f"  {name} = " in said for name in MatchingJob.model_fields)
    assert said.endswith(f"{fedgestalt.RESEARCH_USE_ONLY}\n")


def test_every_key_of_a_training_job_is_explained_as_it_can_be_set(tmp_path: Path) -> None:
    done("job", "render", "train_ensemble", "--out", tmp_path / "job")
    said = done("job", "explain", tmp_path / "job")
    shown = re.findall(r"^  (\S+) = (.+?)(?:   # .+)?$", said, re.M)
    keys = dict(shown)
    assert keys.keys() >= TrainingJob.model_fields.keys() - {"ensemble"}
    for index in range(3):
        prefix = f"ensemble.members.{index}."
        assert {prefix + name for name in MemberSpec.model_fields} - {prefix + "training"} < set(
            keys
        )
        assert {f"{prefix}training.{name}" for name in TrainingSpec.model_fields} < set(keys)
    assert "  server_momentum = 0.0   # how much of its last step" in said
    assert with_settings(TrainingJob(), dict(shown)) == TrainingJob()


def test_a_job_is_explained_as_json(rendered: Path) -> None:
    content: dict[str, Any] = json.loads(done("job", "explain", rendered, "--json"))
    assert content["template"] == "match"
    assert MatchingJob(**content["settings"]) == MatchingJob(ensemble=DIGEST)


def test_a_tampered_job_is_not_explained(rendered: Path) -> None:
    path = rendered / "app/config/config_fed_client.json"
    path.write_text(path.read_text().replace("fedgestalt.federation", "custom.federation"))
    assert "executors differs" in refused(CALL_WRONG, "job", "explain", rendered)


def test_what_is_no_job_folder_is_not_explained(tmp_path: Path) -> None:
    assert "this is no job folder" in refused(CALL_WRONG, "job", "explain", tmp_path)


# --- the demonstration, refused before anything runs ---------------------------------------------


@pytest.fixture
def flare(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Holds the FLARE jobs that were started; none ever runs."""
    started: list[object] = []

    def start(job: Path, *rest: object) -> None:
        started.append(job.name)
        raise AssertionError("the demonstration started FLARE")

    monkeypatch.setattr("fedgestalt.federation.operations.simulation.run_simulated_job", start)
    return started


@pytest.mark.parametrize("sites", [-1, 0, 1, 2])
def test_a_demo_with_fewer_than_three_hospitals_is_refused(tmp_path: Path, sites: int) -> None:
    said = refused(CALL_WRONG, "demo", "--sites", sites, "--out", tmp_path / "out")
    assert f"--sites {sites} is too few" in said
    assert "use --sites 3 or more" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--seeds", 0), ("--seed", -1)])
def test_a_demo_without_seeds_is_refused(tmp_path: Path, options: tuple[object, ...]) -> None:
    assert "--seed" in refused(CALL_WRONG, "demo", *options, "--out", tmp_path / "out")


def test_a_demo_into_a_file_is_refused(tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "file"
    out.write_text("precious")
    said = refused(CALL_WRONG, "demo", "--cohort", folder, "--out", out)
    assert said.startswith(f"fedgestalt: {out}: cannot be written")
    assert out.read_text() == "precious"


def test_a_demo_into_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "below" / "it"
    said = refused(CALL_WRONG, "demo", "--cohort", folder, "--out", out)
    assert said.startswith(f"fedgestalt: {out}: cannot be written")
    assert "choose another --out" in said


def assert_nothing_came_of_it(out: Path, flare: list[object]) -> None:
    assert flare == []
    assert not out.exists() or list(out.iterdir()) == []


def test_a_demo_of_an_unknown_cohort_names_the_nearest_one(
    tmp_path: Path, flare: list[object]
) -> None:
    out = tmp_path / "out"
    said = refused(CALL_WRONG, "demo", "--cohort", "syntetic", "--out", out)
    assert "no cohort is called 'syntetic'; did you mean 'synthetic'" in said
    assert_nothing_came_of_it(out, flare)


def test_a_demo_of_no_folder_is_refused(tmp_path: Path, flare: list[object]) -> None:
    out = tmp_path / "out"
    said = refused(WORK_FAILED, "demo", "--cohort", tmp_path / "nowhere", "--out", out)
    assert str(tmp_path / "nowhere") in said
    assert_nothing_came_of_it(out, flare)


def test_a_demo_with_an_unknown_split_names_the_nearest_one(
    tmp_path: Path, folder: Path, flare: list[object]
) -> None:
    out = tmp_path / "out"
    said = refused(CALL_WRONG, "demo", "--cohort", folder, "--split", "dirichlett", "--out", out)
    assert "did you mean 'dirichlet'" in said
    assert_nothing_came_of_it(out, flare)


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_demo_of_a_damaged_cohort_is_refused_before_flare_starts(
    tmp_path: Path,
    folder: Path,
    flare: list[object],
    damage: Callable[[Path], None],
    says: str,
) -> None:
    damage(folder)
    out = tmp_path / "out"
    assert says in refused(WORK_FAILED, "demo", "--cohort", folder, "--out", out)
    assert_nothing_came_of_it(out, flare)


def test_a_refused_demo_leaves_the_earlier_result_as_it_is(
    tmp_path: Path, folder: Path, flare: list[object]
) -> None:
    cut_column(folder)
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("earlier")
    refused(WORK_FAILED, "demo", "--cohort", folder, "--out", out)
    assert (out / "result.json").read_text() == "earlier"
    assert [path.name for path in out.iterdir()] == ["result.json"]
    assert flare == []


def test_a_rehearsal_without_rounds_is_a_wrong_call(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["consortium", "--rounds", "0", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    assert "--rounds" in done.stderr
    assert not (tmp_path / "x").exists()
