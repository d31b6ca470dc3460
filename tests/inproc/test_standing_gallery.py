"""A standing gallery over several jobs: matched, joined, withdrawn from, rotated; and abused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Run, Script
from nvflare.apis.shareable import Shareable

from fedgestalt.cohort import Cohort, read_cohort
from fedgestalt.federation.job import executor as executor_module
from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.matching.galleries import GALLERIES_FOLDER
from fedgestalt.federation.matching.holdings import KernelStore
from fedgestalt.federation.matching.messages import handles_digest, withdrawal_statement
from fedgestalt.jobs import GalleryJob, JobSpec, MatchingJob, OnboardingJob
from fedgestalt.similarity.kernel import Kernel

THREE, NEWCOMER = ("berlin", "bonn", "leuven"), "ulm"
PLANTED = 2


def without(cohort: Cohort, subject: str) -> Cohort:
    """A cohort after a patient's images are gone from its folder."""
    gone = {i for i, record in cohort.images.items() if record.subject == subject}

    def left(images: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(i for i in images if i not in gone)

    return dataclasses.replace(
        cohort,
        images={i: record for i, record in cohort.images.items() if i not in gone},
        train=left(cohort.train),
        validation=left(cohort.validation),
        frequent_test=left(cohort.frequent_test),
        rare_splits=tuple(
            dataclasses.replace(s, gallery=left(s.gallery), test=left(s.test))
            for s in cohort.rare_splits
        ),
    )


@dataclass
class Life:
    """A consortium whose gallery stands."""

    consortium: Consortium
    ensemble: str
    root: Path | None = None
    count: int = 0

    def run(self, job: type[JobSpec], **fields: Any) -> Run:
        self.count += 1
        fields = {"ensemble": self.ensemble, "kernel": "standing", "sites": THREE, **fields}
        run = self.consortium.run(job(**fields), job_id=f"job-{self.count}", root=self.root)
        self.root = self.root or run.root
        return run

    def kernels(self, site: str) -> list[Kernel]:
        return list(
            KernelStore(self.consortium.store(site)).held(self.ensemble, "isometry").values()
        )

    def matches(self, site: str, number: int) -> dict[str, Any]:
        path = self.consortium.store(site) / "matches" / f"job-{number}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def receipt(self, site: str, number: int) -> dict[str, Any]:
        path = self.consortium.store(site) / "withdrawals" / f"job-{number}.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    def galleries(self, run: Run) -> list[Path]:
        return sorted(run.root.rglob(f"{GALLERIES_FOLDER}/*"))

    def added(self, run: Run) -> dict[str, int]:
        return {site: len(fields["rows"]) for site, fields in run.replies("fgm_enrol").items()}

    @property
    def images(self) -> dict[str, int]:
        return {site: len(cohort.images) for site, cohort in self.consortium.silos.items()}


@pytest.fixture
def life(tmp_path: Path, trained: tuple[Consortium, str], four_sites: Consortium) -> Life:
    """A consortium of its own, with the trained ensemble."""
    consortium = Consortium(tmp_path, source=four_sites)
    for site in THREE:
        shutil.copytree(trained[0].store(site), consortium.store(site))
    return Life(consortium, trained[1])


@dataclass
class Lived:
    """What :func:`lived` has seen."""

    life: Life
    runs: dict[str, Run]
    kernels: dict[str, list[Kernel]]
    subject: str
    handles: set[str]


@pytest.fixture(scope="module")
def lived(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Consortium, str],
    four_sites: Consortium,
) -> Lived:
    """All that a gallery goes through, in order."""
    consortium = Consortium(tmp_path_factory.mktemp("lived"), source=four_sites)
    for site in THREE:
        shutil.copytree(trained[0].store(site), consortium.store(site))
    life = Life(consortium, trained[1])
    everybody = {"sites": tuple(four_sites.sites)}
    cohort = consortium.silos["bonn"]
    subject = cohort.images[cohort.train[0]].subject
    runs, kernels = {}, {}

    def step(name: str, job: type[JobSpec], **fields: Any) -> None:
        runs[name] = life.run(job, **fields)
        kernels[name] = life.kernels("bonn")

    step("first", MatchingJob)
    step("again", MatchingJob)
    step("onboard", OnboardingJob, sponsor="leuven", **everybody)
    images = {i for i, record in cohort.images.items() if record.subject == subject}
    known = life.matches("bonn", 3)["images"]
    handles = {entry["handle"] for entry in known if entry["image"] in images}
    assert len(handles) == len(images)
    with pytest.MonkeyPatch.context() as patch:

        def smaller(folder: Path, name: str) -> Cohort:
            found = read_cohort(folder, name=name)
            return without(found, subject) if name == "bonn" else found

        patch.setattr(executor_module, "read_cohort", smaller)
        step("withdraw", GalleryJob, **everybody)
        step("rotate", GalleryJob, rotate=True, **everybody)
        step("last", MatchingJob, **everybody)
    return Lived(life, runs, kernels, subject, handles)


STEPS = ("first", "again", "onboard", "withdraw", "rotate", "last")


@pytest.mark.parametrize("step", STEPS)
def test_every_job_of_a_gallerys_life_completes(lived: Lived, step: str) -> None:
    run = lived.runs[step]
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["lost"] == []
    assert run.outcome["kernel_version"] == (2 if step in ("rotate", "last") else 1)


def test_a_second_job_sends_no_row_again_and_ranks_the_same(lived: Lived) -> None:
    life, first, again = lived.life, lived.runs["first"], lived.runs["again"]
    assert life.added(first) == {site: life.images[site] + PLANTED for site in THREE}
    assert life.added(again) == dict.fromkeys(THREE, 0)
    assert again.outcome["kernel"] == first.outcome["kernel"]
    assert again.outcome["rows"] == first.outcome["rows"]
    for site in THREE:
        one, two = life.matches(site, 1), life.matches(site, 2)
        assert one["tables"] == two["tables"]
        assert one["queries"] == two["queries"]
        assert any(table["ranks"] for table in one["tables"])


def test_a_newcomer_gets_ensemble_and_kernel_and_the_others_send_nothing(lived: Lived) -> None:
    life, run = lived.life, lived.runs["onboard"]
    assert life.added(run) == {**dict.fromkeys(THREE, 0), NEWCOMER: life.images[NEWCOMER] + PLANTED}
    assert run.outcome["kernel"] == lived.runs["first"].outcome["kernel"]
    assert (life.consortium.store(NEWCOMER) / "ensembles" / life.ensemble).is_dir()
    assert any(table["ranks"] for table in life.matches(NEWCOMER, 3)["tables"])
    assert run.replies("fgm_kernel_hand_over").keys() == {"leuven"}
    assert not run.replies("fgm_train")


def test_no_message_holds_a_kernels_secret_or_the_ensemble_in_the_clear(lived: Lived) -> None:
    life = lived.life
    weights = (life.consortium.store("bonn") / "ensembles" / life.ensemble).glob("*.safetensors")
    piece = next(weights).read_bytes()[-64:]
    kernels = [kernel for step in STEPS for kernel in lived.kernels[step]]
    assert len({kernel.id for kernel in kernels}) == 2
    for run in lived.runs.values():
        payload = b"".join(message.payload for message in run.received)
        assert len(payload) > 1000
        for kernel in kernels:
            for secret in (kernel.secret, kernel.masking_seed, kernel.label_key):
                assert secret not in payload
                assert secret.hex().encode() not in payload
        assert piece not in payload


def test_a_withdrawn_patient_leaves_every_place_and_the_hospital_has_a_receipt(
    lived: Lived,
) -> None:
    life, run = lived.life, lived.runs["withdraw"]
    cohort = life.consortium.silos["bonn"]
    images = sorted(i for i, r in cohort.images.items() if r.subject == lived.subject)
    removed = run.replies("fgm_enrol")["bonn"]["removed"]
    gone = lived.handles
    assert gone <= {handle.tobytes().hex() for handle in removed}
    assert run.outcome["withdrawn"] == len(removed)
    for site in life.consortium.sites:
        for number in (1, 2, 3):
            path = life.consortium.store(site) / "matches" / f"job-{number}.json"
            if path.exists():
                assert not any(name in path.read_text() for name in (*gone, *images))
    receipt = json.loads((life.consortium.store("bonn") / "withdrawals" / "job-4.json").read_text())
    assert receipt["images"] == images
    assert receipt["sites"].keys() == set(life.consortium.sites)
    assert receipt["not_signed"] == run.outcome["not_signed"] == []
    handles = np.array([list(bytes.fromhex(h)) for h in receipt["handles"]], np.uint8)
    for site, said in receipt["sites"].items():
        identity = Trust.of_anybody().check(site, said["certificate"].encode(), None)
        statement = withdrawal_statement(site, handles_digest(handles))
        identity.verify(statement, bytes.fromhex(said["signature"]))
    assert not (life.consortium.store("ulm") / "withdrawals").exists()


def test_somebody_had_the_withdrawn_patient_among_its_neighbours(lived: Lived) -> None:
    """Otherwise the test above would look for nothing."""
    released = [
        {handle.tobytes().hex() for handle in fields["handles"]}
        for site in ("berlin", "leuven")
        for fields in lived.runs["first"].orders("fgm_rank", site)
    ]
    assert any(lived.handles & some for some in released)


def test_a_rotation_leaves_nothing_of_the_old_kernel(lived: Lived) -> None:
    life, run = lived.life, lived.runs["rotate"]
    old, new = lived.runs["first"].outcome["kernel"], run.outcome["kernel"]
    assert old != new
    assert [kernel.id for kernel in lived.kernels["rotate"]] == [new]
    assert [path.name for path in life.galleries(run)] == [new]
    added = life.added(run)
    assert all(added[site] >= life.images[site] - 5 for site in life.consortium.sites)
    for site in life.consortium.sites:
        assert {k.id for k in life.kernels(site)} == {new}
        kept = [path for path in life.consortium.store(site).rglob("*") if path.is_file()]
        assert not any(old in path.name for path in kept if "matches" not in path.parts)


def test_files_of_kernels_and_results_are_the_sites_users_alone(lived: Lived) -> None:
    for site in THREE:
        for folder in ("kernels", "matches"):
            files = list((lived.life.consortium.store(site) / folder).iterdir())
            assert files
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


# --- what a server may try -----------------------------------------------------------------------


def tampered(site: str, task: str, key: str, change: Any) -> Any:
    def tamper(to: str, name: str, data: Shareable) -> Shareable:
        if (to, name) == (site, task):
            fields = data["fedgestalt"]
            fields[key] = change(fields[key])
        return data

    return tamper


def swapped(columns: np.ndarray) -> np.ndarray:
    changed = columns.copy()
    changed[:, [0, -1]] = changed[:, [-1, 0]]
    return changed


@pytest.mark.parametrize(
    ("task", "key", "change", "says"),
    [
        ("fgm_rank", "scores", lambda s: (s * 0.9).astype(np.float32), "made up"),
        ("fgm_rank", "columns", swapped, "rows were swapped"),
        ("fgm_enrol", "kernel", lambda k: "0" * 32, "names a kernel that this site does not hold"),
        ("fgm_consider", "queries", lambda q: {}, "this site's queries came back altered"),
        (
            "fgm_consider",
            "queries",
            lambda q: {**q, "berlin": {**q["berlin"], "count": 1}},
            "its signature does not fit",
        ),
        ("fgm_kernel_agree", "contributions", lambda c: {**c, "boxes": {}}, "agreed roster"),
    ],
)
def test_a_server_that_lies_is_caught(
    life: Life, task: str, key: str, change: Any, says: str
) -> None:
    life.consortium.on_download = tampered("bonn", task, key, change)
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "failed", run.outcome
    assert says in run.outcome["reason"]


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("handles", lambda rows: rows[:0], "were not told of all rows that this site has"),
        ("handles", lambda rows: twice(rows), "were not told of all rows that this site has"),
        ("signatures", lambda s: {**s, "berlin": s["bonn"]}, "its signature does not fit"),
        ("certificates", lambda c: {}, "no certificate came for"),
    ],
)
def test_a_receipt_that_proves_nothing_is_refused(
    life: Life, monkeypatch: pytest.MonkeyPatch, key: str, change: Any, says: str
) -> None:
    assert life.run(MatchingJob).outcome["status"] == "completed"
    cohort = life.consortium.silos["bonn"]
    subject = cohort.images[cohort.train[0]].subject
    monkeypatch.setattr(
        executor_module,
        "read_cohort",
        lambda folder, name: (
            without(read_cohort(folder, name=name), subject)
            if name == "bonn"
            else read_cohort(folder, name=name)
        ),
    )
    life.consortium.on_download = tampered(
        "bonn",
        "fgm_rank",
        "receipts",
        lambda came: {n: {**said, key: change(said[key])} for n, said in came.items()},
    )
    run = life.run(GalleryJob)
    assert run.outcome["status"] == "failed"
    assert says in run.outcome["reason"]
    receipt = life.receipt("bonn", 2)
    assert (receipt["sites"], receipt["not_signed"]) == ({}, list(THREE))


def test_a_server_that_goes_back_to_an_older_kernel_is_refused(life: Life) -> None:
    assert life.run(MatchingJob).outcome["status"] == "completed"
    life.consortium.on_download = tampered("bonn", "fgm_kernel_keys", "version", lambda v: 1)
    run = life.run(GalleryJob, rotate=True)
    assert "it asks for kernel version 1, this site has version 1" in run.outcome["reason"]


# --- what a site may try -------------------------------------------------------------------------


def twice(rows: np.ndarray) -> np.ndarray:
    changed = rows.copy()
    changed[1] = changed[0]
    return changed


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("handles", twice, "it sent a row twice"),
        ("removed", lambda r: np.ones((1, 16), np.uint8), "removes rows that it does not have"),
        ("queries", lambda q: np.ones((1, 16), np.uint8), "a row that it has not enrolled"),
        ("queries", lambda q: q[1:], "its signature does not fit"),
        (
            "rows",
            lambda r: np.eye(len(r), 5, dtype=np.float32) + np.eye(len(r), 5, -5, np.float32),
            "",
        ),
    ],
)
def test_a_site_that_sends_something_wrong_is_named(
    life: Life, key: str, change: Any, says: str
) -> None:
    life.consortium.on_upload = tampered("bonn", "fgm_enrol", key, change)
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "failed"
    assert "bonn" in run.outcome["reason"] or not says
    assert says in run.outcome["reason"]


@pytest.mark.parametrize(
    ("policy", "jobs", "says"),
    [
        ({"max_queries_per_job": 1}, 1, "answers 1 queries of a site in a job, "),
        ({"max_queries_per_day": 12}, 2, "answers 12 queries of a site in a day, "),
    ],
)
def test_a_site_refuses_queries_beyond_its_budget(
    life: Life, policy: dict[str, int], jobs: int, says: str
) -> None:
    most = max(
        len(set(c.frequent_test) | {i for s in c.rare_splits for i in s.test})
        for c in life.consortium.silos.values()
    )
    if "max_queries_per_day" in policy:
        policy, says = {"max_queries_per_day": most}, says.replace("12", str(most))
    life.consortium.site_settings = {"leuven": policy}
    runs = [life.run(MatchingJob, yardstick_subjects=0) for _ in range(jobs)]
    assert [run.outcome["status"] for run in runs] == ["completed"] * (jobs - 1) + ["failed"]
    assert runs[-1].outcome["reason"].startswith("site 'leuven': this site " + says)


def test_a_hospital_is_named_only_if_it_lets_others_know(life: Life) -> None:
    life.consortium.site_settings = {"bonn": {"reveal_hospital": True}}
    assert life.run(MatchingJob).outcome["status"] == "completed"
    named = {
        neighbour["hospital"]
        for query in life.matches("berlin", 1)["queries"]
        for neighbour in query["neighbours"]
    }
    assert named == {"", "bonn"}


def test_a_syndrome_of_too_few_images_is_not_enrolled(life: Life) -> None:
    counts = life.consortium.silos["bonn"].images_per_syndrome()
    least = max(counts.values())
    life.consortium.site_settings = {"bonn": {"minimum_images_per_syndrome": least}}
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "completed", run.outcome
    expected = sum(count for count in counts.values() if count >= least)
    assert expected < life.images["bonn"]
    assert life.added(run)["bonn"] == expected + PLANTED


# --- bad days ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "when"),
    [
        ("fgm_kernel_keys", "before"),
        ("fgm_kernel_seal", "after"),
        ("fgm_enrol", "before"),
        ("fgm_rank", "before"),
    ],
)
def test_a_site_that_dies_costs_the_others_nothing(
    life: Life, four_sites: Consortium, trained: tuple[Consortium, str], task: str, when: str
) -> None:
    shutil.copytree(
        trained[0].store("berlin") / "ensembles", life.consortium.store("ulm") / "ensembles"
    )
    life.consortium.on_task = Script().kill("ulm", task, when)
    run = life.run(MatchingJob, sites=tuple(four_sites.sites))
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["lost"] == ["ulm"]
    assert any("site 'ulm'" in warning for warning in run.outcome["warnings"])
    for site in THREE:
        assert life.matches(site, 1)["queries"]


def test_a_server_that_starts_again_has_the_gallery_and_a_damaged_file_is_a_sentence(
    life: Life,
) -> None:
    run = life.run(MatchingJob)
    (gallery,) = life.galleries(run)
    file = sorted(gallery.glob("*.npz"))[0]
    file.write_bytes(file.read_bytes()[:100])
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "failed"
    assert f"a file of the standing gallery is damaged ({file.name})" in run.outcome["reason"]
    file.unlink()
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "completed", run.outcome
    assert sorted(life.added(run).values())[:2] == [0, 0]
    assert sum(life.added(run).values()) > 0


# --- how syndromes are ranked --------------------------------------------------------------------


def test_a_patient_with_several_photographs_is_one_query_where_the_ranking_pools_them(
    life: Life,
) -> None:
    life.run(MatchingJob)
    life.run(MatchingJob, ranking="patient")
    by_image, by_patient = life.matches("bonn", 1), life.matches("bonn", 2)
    assert (by_image["ranking"], by_patient["ranking"]) == ("nearest-image", "patient")
    cohort = life.consortium.silos["bonn"]
    for one, other in zip(by_image["tables"], by_patient["tables"], strict=True):
        images = [by_image["queries"][row]["image"] for row in one["rows"]]
        subjects = {cohort.images[image].subject for image in images}
        assert len(other["rows"]) == len(subjects) < len(images)


def test_a_ranking_that_nobody_has_is_refused(life: Life) -> None:
    run = life.run(MatchingJob, ranking="nearest-imag")
    assert run.outcome["status"] == "failed"
    assert "did you mean 'nearest-image'" in run.outcome["reason"]
