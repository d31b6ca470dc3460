"""A standing gallery of shares: no row travels twice, and no missing part goes unnoticed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Run, Script
from nvflare.apis.shareable import Shareable
from test_standing_gallery import NEWCOMER, THREE, Life, without

from fedgestalt.cohort import Cohort, read_cohort
from fedgestalt.federation.job import executor as executor_module
from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.matching.galleries import (
    GALLERIES_FOLDER,
    SITE_GALLERIES_FOLDER,
    Gallery,
)
from fedgestalt.federation.matching.holdings import KernelStore
from fedgestalt.federation.matching.messages import handles_digest, withdrawal_statement
from fedgestalt.federation.matching.shares import holdings
from fedgestalt.jobs import GalleryJob, JobSpec, MatchingJob, OnboardingJob
from fedgestalt.similarity.kernel import Kernel

STRATEGY = "secret-shared"
COMPUTING = ("berlin", "bonn")
EVERYBODY = (*THREE, NEWCOMER)


class SharedLife(Life):
    """A consortium whose gallery of shares stands."""

    def run(self, job: type[JobSpec], **fields: Any) -> Run:
        return super().run(job, **{"strategy": STRATEGY, **fields})

    def completed(self, job: type[JobSpec], **fields: Any) -> Run:
        run = self.run(job, **fields)
        assert run.outcome["status"] == "completed", run.outcome
        assert run.outcome["lost"] == [], run.outcome
        return run

    def kernels(self, site: str) -> list[Kernel]:
        return list(KernelStore(self.consortium.store(site)).held(self.ensemble, STRATEGY).values())

    def added(self, run: Run) -> dict[str, int]:
        replies = run.replies("fgm_enrol_shares")
        return {site: len(fields["handles"]) for site, fields in replies.items()}

    def folder(self, party: str) -> Path:
        """The party's one gallery."""
        assert self.root is not None
        where = self.root / "server" / GALLERIES_FOLDER
        if party != "server":
            where = self.consortium.store(party) / SITE_GALLERIES_FOLDER
        else:
            (where,) = self.root.rglob(str(GALLERIES_FOLDER))
        (folder,) = where.iterdir()
        return folder

    def held(self, party: str) -> Gallery:
        return Gallery(self.folder(party)).open()

    def file(self, party: str, owner: str) -> Path:
        return self.folder(party) / f"{owner.encode().hex()}.npz"

    def ranks(self, site: str, number: int) -> Any:
        return self.matches(site, number)["tables"]


def settled(consortium: Consortium, ensemble: Consortium, digest: str) -> SharedLife:
    for site in THREE:
        shutil.copytree(ensemble.store(site), consortium.store(site))
    return SharedLife(consortium, digest)


@pytest.fixture
def life(tmp_path: Path, trained: tuple[Consortium, str], four_sites: Consortium) -> SharedLife:
    return settled(Consortium(tmp_path, source=four_sites), *trained)


def patient_less(patch: pytest.MonkeyPatch, site: str, subject: str) -> None:
    def smaller(folder: Path, name: str) -> Cohort:
        found = read_cohort(folder, name=name)
        return without(found, subject) if name == site else found

    patch.setattr(executor_module, "read_cohort", smaller)


@dataclass
class Lived:
    """What :func:`lived` has seen."""

    life: SharedLife
    runs: dict[str, Run]
    kernels: dict[str, list[Kernel]]
    galleries: dict[str, dict[str, Gallery]]
    subject: str
    gone: set[str]


@pytest.fixture(scope="module")
def lived(
    tmp_path_factory: pytest.TempPathFactory,
    trained: tuple[Consortium, str],
    four_sites: Consortium,
) -> Lived:
    """All that a gallery goes through; server and sites start anew with every job."""
    life = settled(Consortium(tmp_path_factory.mktemp("lived"), source=four_sites), *trained)
    cohort = life.consortium.silos["bonn"]
    subject = cohort.images[cohort.train[0]].subject
    images = {i for i, record in cohort.images.items() if record.subject == subject}
    seen = Lived(life, {}, {}, {}, subject, set())

    def step(name: str, job: type[JobSpec], **fields: Any) -> None:
        seen.runs[name] = life.run(job, **fields)
        seen.kernels[name] = life.kernels("bonn")
        seen.galleries[name] = {party: life.held(party) for party in ("server", *COMPUTING)}

    step("first", MatchingJob)
    step("again", MatchingJob)
    step("onboard", OnboardingJob, sponsor="leuven", sites=EVERYBODY)
    known = life.matches("bonn", 3)["images"]
    seen.gone |= {entry["handle"] for entry in known if entry["image"] in images}
    with pytest.MonkeyPatch.context() as patch:
        patient_less(patch, "bonn", subject)
        step("withdraw", GalleryJob)  # the newcomer is not there
        step("absent", MatchingJob)
        step("rotate", GalleryJob, rotate=True, sites=EVERYBODY)
        step("last", MatchingJob, sites=EVERYBODY)
    return seen


STEPS = ("first", "again", "onboard", "withdraw", "absent", "rotate", "last")


@pytest.mark.parametrize("step", STEPS)
def test_every_job_of_a_gallerys_life_completes(lived: Lived, step: str) -> None:
    run = lived.runs[step]
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["lost"] == run.outcome["re_enrolled"] == run.outcome["left_out"] == []
    assert run.outcome["kernel_version"] == (2 if step in ("rotate", "last") else 1)
    assert run.outcome["computing"] == list(COMPUTING)


@pytest.mark.parametrize("step", STEPS)
def test_all_parties_hold_their_part_of_the_same_rows(lived: Lived, step: str) -> None:
    parties = lived.galleries[step]
    own = holdings(parties["server"])
    assert own == holdings(parties["berlin"]) == holdings(parties["bonn"])
    assert own.keys() == set(THREE if step in ("first", "again") else EVERYBODY)
    assert len(parties["server"].rows) == lived.runs[step].outcome["rows"]


def test_later_jobs_send_new_rows_alone_and_rank_the_same(lived: Lived) -> None:
    life = lived.life
    assert life.added(lived.runs["first"]) == {site: life.images[site] for site in THREE}
    assert life.added(lived.runs["again"]) == dict.fromkeys(THREE, 0)
    onboard = {**dict.fromkeys(THREE, 0), NEWCOMER: life.images[NEWCOMER]}
    assert life.added(lived.runs["onboard"]) == onboard
    for site in THREE:
        assert life.ranks(site, 1) == life.ranks(site, 2)
        assert any(table["ranks"] for table in life.ranks(site, 1))
    assert any(table["ranks"] for table in life.ranks(NEWCOMER, 3))


def test_rows_of_a_site_that_is_not_there_are_compared(lived: Lived) -> None:
    theirs = lived.galleries["absent"]["server"].part(NEWCOMER).handles
    names = {handle.tobytes().hex() for handle in theirs}
    found = {
        neighbour["handle"]
        for query in lived.life.matches("berlin", 5)["queries"]
        for neighbour in query["neighbours"]
    }
    assert len(names) == lived.life.images[NEWCOMER]
    assert names & found


def test_a_withdrawn_patient_leaves_every_party_and_the_hospital_has_a_receipt(
    lived: Lived,
) -> None:
    life, run = lived.life, lived.runs["withdraw"]
    before, after = lived.galleries["onboard"], lived.galleries["withdraw"]
    gone = np.array([list(bytes.fromhex(handle)) for handle in sorted(lived.gone)], np.uint8)
    assert len(gone)
    assert run.outcome["withdrawn"] == len(gone)
    for party in ("server", *COMPUTING):
        shares = {row.tobytes() for row in after[party].rows.rows}
        places = before[party].rows.at(gone)
        assert (places >= 0).all()
        assert (after[party].rows.at(gone) < 0).all()
        assert not shares & {row.tobytes() for row in before[party].rows.rows[places]}
    receipt = json.loads((life.consortium.store("bonn") / "withdrawals" / "job-4.json").read_text())
    assert set(receipt["handles"]) == lived.gone
    assert set(THREE) <= receipt["sites"].keys()  # the newcomer signs later
    handles = np.array([list(bytes.fromhex(h)) for h in receipt["handles"]], np.uint8)
    for site, said in receipt["sites"].items():
        identity = Trust.of_anybody().check(site, said["certificate"].encode(), None)
        statement = withdrawal_statement(site, handles_digest(handles))
        identity.verify(statement, bytes.fromhex(said["signature"]))
    for site in THREE:
        for number in (1, 2, 3):
            text = json.dumps(life.matches(site, number))
            assert not any(handle in text for handle in lived.gone)


def test_a_rotation_shares_all_rows_anew(lived: Lived) -> None:
    run, life = lived.runs["rotate"], lived.life
    assert sum(life.added(run).values()) == run.outcome["rows"]
    assert life.added(lived.runs["last"]) == dict.fromkeys(EVERYBODY, 0)
    for party in ("server", *COMPUTING):
        before, after = (lived.galleries[step][party].rows for step in ("absent", "rotate"))
        for column in ("rows", "handles", "uploads"):
            old = {row.tobytes() for row in getattr(before, column)}
            assert not old & {row.tobytes() for row in getattr(after, column)}
        assert life.folder(party).name == lived.runs["last"].outcome["kernel"]


def test_each_partys_view_is_uniform_and_readable_by_its_user_alone(lived: Lived) -> None:
    life = lived.life
    for party in ("server", *COMPUTING):
        rows = life.held(party).rows
        bits = np.unpackbits(np.ascontiguousarray(rows.rows).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))
        counts = np.bincount(rows.rows.view(np.uint8).ravel(), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2).sum() / expected < 255 + 6 * 510**0.5
        folder = life.folder(party)
        assert folder.stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    one, two, three = (life.held(party).rows for party in ("server", *COMPUTING))
    second, third = (other.rows[other.at(one.handles)] for other in (two, three))
    assert np.array_equal(one.rows + third, second - third)  # r, 2 x - r and x - r: x both times
    lengths = np.linalg.norm((second - third).view(np.int64) * 2.0**-23, axis=1)
    assert np.abs(lengths - 1).max() < 1e-3
    assert not life.held("berlin").rows.labels.size


def test_what_is_sealed_for_a_party_is_uniform_also_without_new_rows(lived: Lived) -> None:
    for step in ("first", "again", "withdraw"):
        boxes = [
            box
            for fields in lived.runs[step].replies("fgm_enrol_shares").values()
            for box in fields["boxes"].values()
        ]
        assert len(boxes) == 4
        bits = np.unpackbits(np.frombuffer(b"".join(boxes), np.uint8))
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))


def test_a_site_that_asks_nothing_gets_no_handle_and_no_label(lived: Lived) -> None:
    orders = lived.runs["withdraw"].orders("fgm_rank_shares")
    assert len(orders) == len(THREE)
    for fields in orders:
        assert not len(fields["handles"])
        assert not len(fields["labels"])


# --- parts that are missing, stale or wrong ------------------------------------------------------


def handles_of(life: SharedLife) -> set[bytes]:
    return {handle.tobytes() for handle in life.held("server").rows.handles}


def test_what_a_party_lacks_is_found_before_anything_is_compared_and_shared_again(
    life: SharedLife, tmp_path: Path
) -> None:
    first = life.completed(MatchingJob)
    before, ranks = handles_of(life), {site: life.ranks(site, 1) for site in THREE}
    shutil.copytree(life.folder("berlin"), tmp_path / "old")

    life.file("berlin", "leuven").unlink()
    run = life.completed(MatchingJob)
    assert run.outcome["re_enrolled"] == ["leuven"]
    assert life.added(run) == {"berlin": 0, "bonn": 0, "leuven": life.images["leuven"]}

    shutil.rmtree(life.folder("bonn").parent)
    run = life.completed(MatchingJob)
    assert run.outcome["re_enrolled"] == list(THREE)

    life.file("server", "bonn").unlink()  # the server's own part: handles and labels are gone
    run = life.completed(GalleryJob)
    assert life.added(run) == {"berlin": 0, "bonn": life.images["bonn"], "leuven": 0}
    assert len(handles_of(life) & before) == run.outcome["rows"] - life.images["bonn"]

    folder = life.folder("berlin")  # an older state of one party, complete in itself
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "old", folder)
    run = life.completed(MatchingJob)
    assert run.outcome["re_enrolled"] == list(THREE)
    assert {site: life.ranks(site, life.count) for site in THREE} == ranks
    assert run.outcome["kernel"] == first.outcome["kernel"]
    assert life.added(life.completed(MatchingJob)) == dict.fromkeys(THREE, 0)


def test_an_owner_that_cannot_share_again_is_left_out_and_named(
    life: SharedLife, trained: tuple[Consortium, str]
) -> None:
    stores = [consortium.store("berlin") for consortium in (trained[0], life.consortium)]
    target = life.consortium.store(NEWCOMER) / "ensembles"
    shutil.copytree(stores[0] / "ensembles", target)
    life.completed(MatchingJob, sites=EVERYBODY)
    life.file("bonn", NEWCOMER).unlink()
    run = life.completed(MatchingJob)
    assert run.outcome["left_out"] == [NEWCOMER]
    theirs = {h.tobytes().hex() for h in life.held("server").part(NEWCOMER).handles}
    assert theirs
    assert not any(handle in json.dumps(life.matches("berlin", 2)) for handle in theirs)
    run = life.completed(MatchingJob, sites=EVERYBODY)
    assert (run.outcome["re_enrolled"], run.outcome["left_out"]) == ([NEWCOMER], [])
    again = {h.tobytes().hex() for h in life.held("bonn").part(NEWCOMER).handles}
    assert again == theirs


def test_a_computing_site_that_is_not_there_is_said_and_others_take_over_by_rotation(
    life: SharedLife, trained: tuple[Consortium, str]
) -> None:
    shutil.copytree(
        trained[0].store("berlin") / "ensembles", life.consortium.store(NEWCOMER) / "ensembles"
    )
    life.completed(MatchingJob, sites=EVERYBODY)
    others = ("bonn", "leuven", NEWCOMER)
    reason = life.run(MatchingJob, sites=others).outcome["reason"]
    assert "computing site berlin is not there" in reason
    assert "rotate=true and other computing_sites" in reason
    reason = life.run(MatchingJob, sites=EVERYBODY, computing_sites=others[1:]).outcome["reason"]
    assert "the shares of the standing gallery are with berlin, bonn" in reason
    run = life.completed(GalleryJob, sites=others, rotate=True, computing_sites=others[1:])
    assert run.outcome["computing"] == list(others[1:])
    run = life.completed(MatchingJob, sites=EVERYBODY)
    assert run.outcome["computing"] == list(others[1:])
    for former in COMPUTING:  # what they held went with the kernel
        assert not list((life.consortium.store(former) / SITE_GALLERIES_FOLDER).rglob("*.npz"))


@pytest.mark.parametrize(
    ("task", "lost", "status"),
    [
        ("fgm_shares_held", "bonn", "failed"),
        ("fgm_compute", "bonn", "failed"),
        ("fgm_enrol_shares", NEWCOMER, "completed"),
        ("fgm_rank_shares", NEWCOMER, "completed"),
    ],
)
def test_after_a_site_was_lost_the_next_job_has_all_rows(
    life: SharedLife, trained: tuple[Consortium, str], task: str, lost: str, status: str
) -> None:
    shutil.copytree(
        trained[0].store("berlin") / "ensembles", life.consortium.store(NEWCOMER) / "ensembles"
    )
    life.consortium.on_task = Script().kill(lost, task, "before")
    run = life.run(MatchingJob, sites=EVERYBODY)
    assert run.outcome["status"] == status, run.outcome
    if status == "failed":
        assert "a computing site was lost" in run.outcome["reason"]
        assert "rotate=true" in run.outcome["reason"]
    life.consortium.on_task = Script()
    run = life.completed(MatchingJob, sites=EVERYBODY)
    assert run.outcome["rows"] == sum(life.images.values())
    assert len({len(life.held(party).rows) for party in ("server", *COMPUTING)}) == 1


def test_a_wrong_share_is_found_and_a_rotation_mends_it(life: SharedLife) -> None:
    life.completed(MatchingJob)
    path = life.file("bonn", "leuven")
    with np.load(path) as kept:
        columns = {name: kept[name].copy() for name in kept.files}
    columns["rows"][0, 0] += 1 << 40
    with path.open("wb") as file:
        np.savez(file, **columns)
    said = life.run(MatchingJob).outcome["reason"]
    assert "the answer of one of the three computing parties is wrong" in said
    life.completed(GalleryJob, rotate=True)
    life.completed(MatchingJob)
    assert all(any(t["ranks"] for t in life.ranks(site, life.count)) for site in THREE)


def test_a_damaged_file_of_a_computing_site_is_a_sentence(life: SharedLife) -> None:
    life.completed(GalleryJob)
    path = life.file("bonn", "leuven")
    path.write_bytes(path.read_bytes()[:200])
    said = life.run(MatchingJob).outcome["reason"]
    assert f"a file of the standing gallery is damaged ({path.name})" in said
    assert "bonn" in said
    path.unlink()
    assert life.completed(MatchingJob).outcome["re_enrolled"] == ["leuven"]


def tampering(site: str, task: str, key: str, change: Any) -> Any:
    def tamper(to: str, name: str, data: Shareable) -> Shareable:
        if (to, name) == (site, task):
            fields = data["fedgestalt"]
            fields[key] = change(fields[key])
        return data

    return tamper


@pytest.mark.parametrize(
    ("task", "key", "change", "says"),
    [
        ("fgm_compute", "digests", lambda d: (bytes(32), *d[1:]), "hold different shares of"),
        ("fgm_compute", "digests", lambda d: d[1:], "the order of owners is not theirs"),
        ("fgm_enrol_shares", "handles", lambda h: h[1:], "hold different shares of the rows of"),
        ("fgm_enrol_shares", "keys", lambda k: {**k, "keys": {}}, "agreed roster"),
        ("fgm_shares_held", "kernel", lambda k: "0" * 32, "that this site does not hold"),
        ("fgm_rank_shares", "receipts", lambda r: {}, "were not told of all rows"),
        ("fgm_kernel_keys", "version", lambda v: v + 1, "names a kernel by another version"),
        ("fgm_kernel_keys", "held", lambda h: (), "this site has version 1"),
    ],
)
def test_a_server_that_lies_about_a_gallery_is_caught(
    life: SharedLife,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    key: str,
    change: Any,
    says: str,
) -> None:
    life.completed(GalleryJob)
    cohort = life.consortium.silos["bonn"]
    patient_less(monkeypatch, "bonn", cohort.images[cohort.train[0]].subject)
    life.consortium.on_download = tampering("bonn", task, key, change)
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "failed"
    assert says in run.outcome["reason"]


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("removed", lambda h: np.ones((1, 16), np.uint8), "removes rows that it does not have"),
        ("handles", lambda h: h[:0], "do not go with"),
        ("upload", lambda u: b"", "upload"),
    ],
)
def test_a_site_that_sends_something_wrong_is_named(
    life: SharedLife, key: str, change: Any, says: str
) -> None:
    life.consortium.on_upload = tampering("leuven", "fgm_enrol_shares", key, change)
    run = life.run(MatchingJob)
    assert run.outcome["status"] == "failed"
    assert says in run.outcome["reason"]
    assert "leuven" in run.outcome["reason"]
