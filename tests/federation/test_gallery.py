"""Real processes, mutual TLS: train, match, onboard a hospital, withdraw a patient, rotate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hospitals import SERVER, Hospitals, training

from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.matching.galleries import GALLERIES_FOLDER
from fedgestalt.federation.operations.local import LocalConsortium
from fedgestalt.federation.site.outgoing import SENT_FILE
from fedgestalt.jobs import GalleryJob, JobSpec, MatchingJob, OnboardingJob

pytestmark = pytest.mark.federation

THREE, NEWCOMER = ("berlin", "bonn", "leuven"), "ulm"
FOUR = (*THREE, NEWCOMER)
WITHDRAWN = "SUBJECT-0014"
PLANTED = 2


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    return Hospitals(tmp_path_factory.mktemp("consortium"), sites=FOUR)


@pytest.fixture(scope="module")
def local(hospitals: Hospitals) -> Iterator[LocalConsortium]:
    with hospitals.local() as running:
        hospitals.up(running)
        yield running


@pytest.fixture(scope="module")
def outcomes(hospitals: Hospitals, local: LocalConsortium) -> dict[str, dict[str, Any]]:
    """What comes of each job, one after the other."""
    found = {"train": hospitals.run(local, training(rounds=1, sites=THREE))}

    def step(name: str, job: type[JobSpec], **fields: Any) -> None:
        given = {"ensemble": found["train"]["ensemble"], "kernel": "standing", "sites": FOUR}
        found[name] = hospitals.run(local, job(**{**given, **fields}))

    step("match", MatchingJob, sites=THREE)
    local.running[SERVER].end()
    local.start_server()
    local.wait_for(FOUR)
    step("onboard", OnboardingJob, sponsor="bonn")
    cohort = hospitals.silos["bonn"]
    found["onboard"]["withdrawn handles"] = {
        entry["handle"]
        for entry in matches(hospitals, "bonn", found["onboard"])["images"]
        if cohort.images[entry["image"]].subject == WITHDRAWN
    }
    withdraw(hospitals, "bonn", WITHDRAWN)
    step("withdraw", GalleryJob)
    step("rotate", GalleryJob, rotate=True)
    step("last", MatchingJob)
    return found


def withdraw(hospitals: Hospitals, site: str, subject: str) -> None:
    """Take a patient out of a hospital's cohort, as the hospital does."""
    data = hospitals.folder / "data" / site
    for table in (data / "gmdb_metadata").glob("*"):
        lines = table.read_text().splitlines(keepends=True)
        table.write_text("".join(line for line in lines if subject not in line))
    for image in data.rglob(f"*{subject.removeprefix('SUBJECT-')}-*"):
        image.unlink()


def matches(hospitals: Hospitals, site: str, outcome: dict[str, Any]) -> dict[str, Any]:
    path = hospitals.store(site) / "matches" / f"{outcome['job']}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def sent_rows(hospitals: Hospitals, site: str, outcome: dict[str, Any]) -> int:
    """Bytes of the enrolment that left a site in a job, by its own record."""
    lines = map(json.loads, (hospitals.store(site) / SENT_FILE).read_text().splitlines())
    return sum(
        line["bytes"]
        for line in lines
        if line["job"] == outcome["job"] and line["task"] == "fgm_enrol"
    )


def galleries(hospitals: Hospitals) -> list[str]:
    return [path.name for path in (hospitals.kit(SERVER) / GALLERIES_FOLDER).iterdir()]


@pytest.mark.parametrize("step", ["train", "match", "onboard", "withdraw", "rotate", "last"])
def test_every_job_completes(outcomes: dict[str, dict[str, Any]], step: str) -> None:
    outcome = outcomes[step]
    assert outcome["status"] == "completed", outcome
    assert outcome["sites"] == list(THREE if step in ("train", "match") else FOUR)
    if step != "train":
        assert outcome["lost"] == []
        assert outcome["kernel_version"] == (2 if step in ("rotate", "last") else 1)


def test_the_newcomer_ranks_its_patients_and_the_others_send_nothing_again(
    hospitals: Hospitals, outcomes: dict[str, dict[str, Any]]
) -> None:
    """The server had been started anew in between."""
    match, onboard = outcomes["match"], outcomes["onboard"]
    assert onboard["kernel"] == match["kernel"]
    images = len(hospitals.silos[NEWCOMER].images)
    assert onboard["rows"] == match["rows"] + images + PLANTED
    assert any(table["ranks"] for table in matches(hospitals, NEWCOMER, onboard)["tables"])
    for site in THREE:
        assert sent_rows(hospitals, site, onboard) < sent_rows(hospitals, site, match) / 10
    ensemble = hospitals.store(NEWCOMER) / "ensembles" / outcomes["train"]["ensemble"]
    assert ensemble.is_dir()


def test_the_newcomers_patients_are_among_the_neighbours_of_the_others(
    hospitals: Hospitals, outcomes: dict[str, dict[str, Any]]
) -> None:
    before = {q["image"]: q for q in matches(hospitals, "bonn", outcomes["match"])["queries"]}
    after = {q["image"]: q for q in matches(hospitals, "bonn", outcomes["onboard"])["queries"]}
    assert before.keys() == after.keys()
    assert before != after


def test_the_withdrawn_patient_is_gone_and_all_have_signed(
    hospitals: Hospitals, outcomes: dict[str, dict[str, Any]]
) -> None:
    images = [i for i, r in hospitals.silos["bonn"].images.items() if r.subject == WITHDRAWN]
    assert images
    outcome = outcomes["withdraw"]
    receipt = json.loads(
        (hospitals.store("bonn") / "withdrawals" / f"{outcome['job']}.json").read_text()
    )
    assert receipt["images"] == sorted(images)
    assert receipt["sites"].keys() == set(FOUR)
    root = (hospitals.kit("bonn") / "startup" / "rootCA.pem").read_bytes()
    for site, said in receipt["sites"].items():
        Trust.from_root(root).check(site, said["certificate"].encode(), None)
    handles = outcomes["onboard"]["withdrawn handles"]
    assert len(handles) == len(images)
    assert handles <= set(receipt["handles"])
    for site in FOUR:
        for stored in (hospitals.store(site) / "matches").glob("*.json"):
            assert not any(name in stored.read_text() for name in (*handles, *images))
    assert outcome["rows"] == outcomes["onboard"]["rows"] - len(images)


def test_the_old_kernel_is_gone_everywhere_and_ranks_are_as_before(
    hospitals: Hospitals, outcomes: dict[str, dict[str, Any]]
) -> None:
    old, new = outcomes["match"]["kernel"], outcomes["rotate"]["kernel"]
    assert old != new == outcomes["last"]["kernel"]
    assert galleries(hospitals) == [new]
    for site in FOUR:
        kept = [path.name for path in (hospitals.store(site) / "kernels").iterdir()]
        assert sorted(kept) == [f"{new}.enrolled.json", f"{new}.kernel"]
    for site in ("berlin", "leuven", "ulm"):
        last = matches(hospitals, site, outcomes["last"])
        known = {q["image"]: [s for s, _ in q["ranked"]][:1] for q in last["queries"]}
        assert any(known.values())


def test_no_secret_of_a_kernel_is_at_the_server(
    hospitals: Hospitals, outcomes: dict[str, dict[str, Any]]
) -> None:
    new = outcomes["rotate"]["kernel"]
    kept = (hospitals.store("bonn") / "kernels" / f"{new}.kernel").read_text()
    secret = kept.splitlines()[-1]
    assert len(secret) == 64
    for path in Path(hospitals.kit(SERVER)).rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content
