"""Sites that differ, or that do not want to: one reason names all of them before anything is read.

What a site refuses, it refuses by its own policy, which no job can change.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from consortium import BothJobs, Consortium, Run, tiny_ensemble
from nvflare.apis.shareable import Shareable

from fedgestalt.cohort import Syndrome, write_silos
from fedgestalt.errors import DataError
from fedgestalt.federation.job import executor as site_module
from fedgestalt.federation.job.wire import fault_of
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import MatchingJob, TrainingJob

JOB = TrainingJob(ensemble=tiny_ensemble(), rounds=1)
NO_DATA = {"data": "/there/is/no/such/folder"}


def reason(run: Run, task: str) -> str:
    """Why a job ended with its first task."""
    assert run.outcome["status"] == "failed"
    assert {name for _, name, _ in run.sent} == {task}
    assert {message.task for message in run.received} == {task}
    return str(run.outcome["reason"])


def parts(said: str) -> dict[str, str]:
    """What is said of each site."""
    found = said.removeprefix("the job cannot start. ").split(" | ")
    return {site: what for site, _, what in (part.partition(": ") for part in found)}


def test_sites_that_differ_in_different_things_are_named_in_one_reason(tmp_path: Path) -> None:
    changed = {"berlin": ("fedgestalt", "0.0.9"), "bonn": ("label map", "0" * 64)}

    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if site in changed and task == "fgm_join":
            facts = data["fedgestalt"]["facts"]
            name, value = changed[site]
            data["fedgestalt"]["facts"] = {**facts, name: value}
        return data

    consortium = Consortium(
        tmp_path,
        sites=("berlin", "bonn", "leuven", "ulm"),
        site_settings={"leuven": {"jobs": ["match"]}},
        on_upload=tamper,
    )
    run = consortium.run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"berlin", "bonn", "leuven"}
    assert said["berlin"].startswith("fedgestalt is 0.0.9, with ")
    assert said["bonn"].startswith("label map is 000000000000, with ")
    assert "does not take part in jobs of the kind 'train_ensemble'" in said["leuven"]
    assert run.panics == [run.outcome["reason"]]
    assert "rounds" not in run.outcome
    assert run.outcome["reason"].endswith("nothing was trained or compared.")
    for site in consortium.sites:
        assert not (consortium.store(site) / "ensembles").exists()
        assert not (consortium.store(site) / "cache").exists()


# --- label maps ----------------------------------------------------------------------------------


def relabelled(consortium: Consortium, folder: Path) -> dict[str, Any]:
    """Data of ``bonn`` in which two rows of the label map differ, and settings that name both."""
    own, agreed = folder / "own", consortium.data / "bonn"
    shutil.copytree(agreed, own)
    (table,) = (own / "gmdb_metadata").glob("gmdb_syndromes_*.tsv")
    text = table.read_text()
    for number in (11, 21):
        assert f"SYNDROME-NAME-{number}" in text
        text = text.replace(f"SYNDROME-NAME-{number}", f"OTHER-NAME-{number}")
    table.write_text(text)
    return {"data": str(own), "label_map": str(agreed)}


def test_rows_of_a_label_map_that_differ_are_named_to_the_people_of_the_site_alone(
    tmp_path: Path, three_sites: Consortium, caplog: pytest.LogCaptureFixture
) -> None:
    settings = relabelled(three_sites, tmp_path / "bonn")
    consortium = Consortium(tmp_path / "jobs", source=three_sites, site_settings={"bonn": settings})
    run = consortium.run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn"}
    assert said["bonn"].startswith("its label map differs from the consortium's in 2 rows; ")
    file = consortium.store("bonn") / "label-map-differences.txt"
    assert file.read_text().splitlines()[:2] == [
        "syndrome 11 is 'OTHER-NAME-11', in the agreed map 'SYNDROME-NAME-11'",
        "syndrome 21 is 'OTHER-NAME-21', in the agreed map 'SYNDROME-NAME-21'",
    ]
    assert file.stat().st_mode & 0o077 == 0
    left = b"".join(message.payload for message in run.received)
    assert b"differs from the consortium's" in left
    assert b"-NAME-" not in left
    assert "-NAME-" not in json.dumps(run.outcome)
    assert "differs from the consortium's" in caplog.text
    assert "-NAME-" not in caplog.text


def test_without_the_consortiums_map_sites_that_differ_are_told_by_digest_alone(
    tmp_path: Path, three_sites: Consortium
) -> None:
    settings = relabelled(three_sites, tmp_path / "bonn") | {"label_map": ""}
    consortium = Consortium(tmp_path / "jobs", source=three_sites, site_settings={"bonn": settings})
    run = consortium.run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn"}
    assert said["bonn"].startswith("label map is ")
    assert "cohort check DIR --labels DIR` names the rows" in said["bonn"]
    assert b"-NAME-" not in b"".join(message.payload for message in run.received)


def test_a_site_whose_map_is_the_consortiums_takes_part_and_keeps_no_list_of_differences(
    tmp_path: Path, three_sites: Consortium
) -> None:
    agreed = {"label_map": str(three_sites.data / "berlin")}
    consortium = Consortium(tmp_path, source=three_sites, settings=agreed)
    stale = consortium.store("bonn") / "label-map-differences.txt"
    stale.parent.mkdir(parents=True, exist_ok=True)
    stale.write_text("from before")
    assert consortium.run(JOB).outcome["status"] == "completed"
    assert not stale.exists()


def test_a_label_map_that_cannot_be_read_is_a_refusal_that_names_no_folder(
    tmp_path: Path, three_sites: Consortium
) -> None:
    policy = {"bonn": {"label_map": "/there/is/no/such/folder"}}
    run = Consortium(tmp_path, source=three_sites, site_settings=policy).run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said["bonn"].startswith("its copy of the consortium's label map cannot be read")
    assert "such/folder" not in run.outcome["reason"]


RENAMED = {12: Syndrome(12, "ANOTHER-NAME")}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"syndromes": RENAMED}, ("label map",)),
        ({"classes": (12, 11, 13)}, ("label map",)),
        ({"classes": (11, 12)}, ("classes", "label map", "start model")),
    ],
    ids=["another name", "another order", "a class less"],
)
def test_a_site_whose_class_map_differs_is_named_with_what_to_do(
    tmp_path: Path, three_sites: Consortium, changes: dict[str, Any], facts: tuple[str, ...]
) -> None:
    """No row of it is told: the server learns digests of the labels alone."""
    own = three_sites.silos["bonn"]
    if "syndromes" in changes:
        changes = {"syndromes": {**own.syndromes, **changes["syndromes"]}}
    gone = set(own.classes) - set(changes.get("classes", own.classes))
    images = {i: record for i, record in own.images.items() if record.syndrome not in gone}
    train, tests = (
        tuple(image for image in part if image in images) for part in (own.train, own.frequent_test)
    )
    other = dataclasses.replace(own, images=images, train=train, frequent_test=tests, **changes)
    write_silos({"bonn": other}, tmp_path / "other")
    settings = {"bonn": {"data": str(tmp_path / "other" / "bonn")}}
    run = Consortium(tmp_path, source=three_sites, site_settings=settings).run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn"}
    for fact in facts:
        assert f"{fact} is " in said["bonn"]
    assert "use the consortium's syndrome table and class list at every site" in said["bonn"]
    assert "ANOTHER-NAME" not in str(run.outcome)


def test_a_refusal_counts_with_the_bytes_of_its_sentence(tmp_path: Path) -> None:
    sites = ("berlin", "köln", "leuven")
    policy = {"köln": {"excluded_sites": ["berlin"]}, "leuven": {"excluded_sites": ["köln"]}}
    run = Consortium(tmp_path, sites=sites, site_settings=policy).run(JOB)
    faults = {m.site: fault_of(m.reply) for m in run.received}
    assert "does not work with köln" in faults["leuven"]
    for site in ("köln", "leuven"):
        received = run.outcome["bytes"][site]["received_from"]
        assert received == len(faults[site].encode()) > 50
    assert run.outcome["bytes"]["leuven"]["received_from"] > len(faults["leuven"])


def test_a_site_takes_no_part_in_a_job_whose_roster_leaves_it_out(tmp_path: Path) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_join"):
            data["fedgestalt"]["roster"] = ("berlin", "leuven", "ulm")
        return data

    consortium = Consortium(tmp_path, site_settings={"bonn": NO_DATA}, on_download=tamper)
    said = parts(reason(consortium.run(JOB), "fgm_join"))
    assert said.keys() == {"bonn"}
    assert said["bonn"].startswith("the job's roster does not name this site; submit it again")


# --- before anything is read ---------------------------------------------------------------------

NOT_READ = "its data cannot be used"


def test_a_site_without_its_data_says_so_if_it_has_no_other_objection(tmp_path: Path) -> None:
    run = Consortium(tmp_path, site_settings={"bonn": NO_DATA}).run(JOB)
    assert NOT_READ in parts(reason(run, "fgm_join"))["bonn"]


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ({"jobs": ["match"]}, "does not take part in jobs of the kind 'train_ensemble'"),
        ({"partners": ["leuven"]}, "does not work with berlin"),
        ({"excluded_sites": ["leuven", "ulm"]}, "does not work with leuven"),
        ({"minimum_sites": 4}, "takes part with 4 sites or more, the job has 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_site_refuses_a_training_by_policy_before_it_looks_for_its_data(
    tmp_path: Path, policy: dict[str, Any], says: str
) -> None:
    run = Consortium(tmp_path, site_settings={"bonn": {**NO_DATA, **policy}}).run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn"}
    assert says in said["bonn"]
    assert f"ask the site to change {next(iter(policy))} in its fedgestalt.yaml" in said["bonn"]
    assert NOT_READ not in said["bonn"]


@pytest.mark.parametrize(
    ("key", "asked", "says"),
    [
        ("threat_model", "malicious", "does not trust the server to follow the protocol, the job"),
        ("reveal_aggregate_to", "sites", "lets no server learn the sum of updates"),
    ],
)
def test_a_site_refuses_a_training_that_protects_less_than_it_asks_for(
    tmp_path: Path, three_sites: Consortium, key: str, asked: str, says: str
) -> None:
    lax = {"threat_model": "honest-but-curious", "reveal_aggregate_to": "server"}
    consortium = Consortium(
        tmp_path,
        source=three_sites,
        settings=lax,
        site_settings={"bonn": {**NO_DATA, key: asked}},
    )
    run = consortium.run(JOB.model_copy(update=lax))
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn"}
    assert says in said["bonn"]
    assert f"ask the site to change {key} in its fedgestalt.yaml" in said["bonn"]


def test_a_site_that_takes_part_in_no_such_job_keeps_a_record_of_its_refusal_and_no_more(
    tmp_path: Path,
) -> None:
    consortium = Consortium(tmp_path, site_settings={"bonn": {"jobs": []}})
    consortium.run(JOB)
    assert consortium.store("berlin").is_dir()
    assert [path.name for path in consortium.store("bonn").iterdir()] == ["sent.jsonl"]


@pytest.fixture
def licensed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone starts from weights that somebody else has licensed."""
    backbone = type(get_registry().backbones.get("iresnet"))
    build = backbone.build

    def licensed_build(self: Any, options: Any, seed: int) -> Any:
        return dataclasses.replace(build(self, options, seed), weights_licence="CC-BY-NC-4.0")

    monkeypatch.setattr(backbone, "build", licensed_build)


@pytest.mark.usefixtures("licensed")
def test_a_site_refuses_weights_by_their_licence_before_it_looks_for_its_data(
    tmp_path: Path,
) -> None:
    allowed = {"weight_licences": ["CC-BY-NC-4.0"]}
    consortium = Consortium(
        tmp_path, settings=allowed, site_settings={"bonn": {**NO_DATA, "weight_licences": ["MIT"]}}
    )
    said = parts(reason(consortium.run(JOB), "fgm_join"))
    assert said.keys() == {"bonn"}
    assert "may not use weights under CC-BY-NC-4.0 (ensemble member 'fine-tuned')" in said["bonn"]
    assert "weight_licences" in said["bonn"]


@pytest.mark.parametrize(
    ("job", "policy", "says"),
    [
        ({}, {"jobs": ["train_ensemble"]}, "does not take part in jobs of the kind 'match'"),
        ({}, {"partners": ["berlin"]}, "does not work with leuven"),
        ({}, {"excluded_sites": ["berlin"]}, "does not work with berlin"),
        ({}, {"minimum_sites": 4}, "takes part with 4 sites or more, the job has 3"),
        ({}, {"strategies": ["other"]}, "does not take part in matching by 'isometry'"),
        (
            {"released_rows": 11},
            {"max_released_rows": 10},
            "10 rows per query, the job asks for 11",
        ),
        ({"released_rows": 0}, {"evaluation_release": False}, "no scores of all images"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_site_refuses_a_matching_by_policy_before_it_looks_for_its_data(
    both_jobs: BothJobs,
    monkeypatch: pytest.MonkeyPatch,
    job: dict[str, Any],
    policy: dict[str, Any],
    says: str,
) -> None:
    own = {"bonn": {**NO_DATA, **policy}}
    monkeypatch.setattr(both_jobs.consortium, "site_settings", own)
    # An ensemble that no site has: a policy comes before that as well.
    run = both_jobs.consortium.run(MatchingJob(ensemble="a" * 64, **job))
    said = parts(reason(run, "fgm_match_start"))
    assert says in said["bonn"]
    assert f"ask the site to change {next(iter(policy))} in its fedgestalt.yaml" in said["bonn"]
    assert "ensemble" not in said["bonn"].replace("train_ensemble", "")
    assert "does not hold the ensemble" in said["berlin"]


def test_a_site_refuses_a_stored_ensemble_by_its_licences_before_it_looks_for_its_data(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch, licensed: None
) -> None:
    monkeypatch.setattr(both_jobs.consortium, "settings", {"weight_licences": ["CC-BY-NC-4.0"]})
    own = {"bonn": {**NO_DATA, "weight_licences": []}}
    monkeypatch.setattr(both_jobs.consortium, "site_settings", own)
    run = both_jobs.consortium.run(MatchingJob(ensemble=both_jobs.training.outcome["ensemble"]))
    said = parts(reason(run, "fgm_match_start"))
    assert said.keys() == {"bonn"}
    assert "may not use weights under CC-BY-NC-4.0" in said["bonn"]


def test_no_record_is_read_at_a_site_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    read_cohort = site_module.read_cohort

    def reading(folder: Path, name: str) -> Any:
        read.append(name)
        return read_cohort(folder, name=name)

    monkeypatch.setattr(site_module, "read_cohort", reading)
    policy = {"bonn": {"excluded_sites": ["berlin"]}}
    Consortium(tmp_path, site_settings=policy).run(JOB)
    assert sorted(read) == ["berlin", "leuven"]


def test_a_refusal_of_one_site_does_not_hide_the_fault_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_cohort = site_module.read_cohort

    def broken(folder: Path, name: str) -> Any:
        if name == "leuven":
            raise DataError("row 7 names SUBJECT-0007")
        return read_cohort(folder, name=name)

    monkeypatch.setattr(site_module, "read_cohort", broken)
    run = Consortium(tmp_path, site_settings={"bonn": {"jobs": []}}).run(JOB)
    said = parts(reason(run, "fgm_join"))
    assert said.keys() == {"bonn", "leuven"}
    assert NOT_READ in said["leuven"]
    assert "SUBJECT" not in run.outcome["reason"]
