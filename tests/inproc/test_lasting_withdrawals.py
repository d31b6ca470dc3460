"""A withdrawal that neither a failed job nor an absent site loses; server and sites start anew with
every job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Run, Script, one_network, untouched
from nvflare.apis.shareable import Shareable
from test_standing_gallery import NEWCOMER, THREE, Life, tampered
from test_standing_shares import STRATEGY, SharedLife, patient_less

from fedgestalt.errors import SiteError
from fedgestalt.federation.job.identity import Trust
from fedgestalt.federation.matching.galleries import GALLERIES_FOLDER, Gallery
from fedgestalt.federation.matching.messages import handles_digest, withdrawal_statement
from fedgestalt.federation.matching.site import MatchingSite
from fedgestalt.federation.matching.withdrawals import WITHDRAWALS_FILE
from fedgestalt.jobs import GalleryJob, JobSpec, MatchingJob, TrainingJob

OWNER = "leuven"
EVERYBODY = (*THREE, NEWCOMER)
KINDS = {"isometry": Life, STRATEGY: SharedLife}


class Withdrawing:
    """A consortium in which ``OWNER`` takes a patient back whom all others have met."""

    def __init__(self, life: Life, patch: pytest.MonkeyPatch) -> None:
        self.life, self._patch = life, patch
        self.completed(MatchingJob, sites=EVERYBODY)
        cohort = life.consortium.silos[OWNER]
        self.images: dict[str, set[str]] = {}
        by_subject: dict[str, set[str]] = {}
        for entry in life.matches(OWNER, 1)["images"]:
            subject = cohort.images[entry["image"]].subject
            by_subject.setdefault(subject, set()).add(entry["handle"])
            self.images.setdefault(subject, set()).add(entry["image"])
        met = {subject: self._named(handles) for subject, handles in by_subject.items()}
        self.subject = max(met, key=lambda subject: (len(met[subject]), subject))
        self.handles = by_subject[self.subject]
        self.met = met[self.subject]
        assert NEWCOMER in self.met
        assert len(self.met) > 1

    def _named(self, handles: set[str]) -> set[str]:
        return {site for site in EVERYBODY if site != OWNER and self._names(site, handles)}

    def _names(self, site: str, handles: set[str]) -> bool:
        texts = [p.read_text() for p in (self.life.consortium.store(site) / "matches").iterdir()]
        return any(handle in text for text in texts for handle in handles)

    def remembered_by(self) -> set[str]:
        """Who still has the patient in a stored result."""
        return {site for site in EVERYBODY if self._names(site, self.handles)}

    def take_back(self) -> None:
        """The patient's images leave the owner's cohort."""
        patient_less(self._patch, OWNER, self.subject)

    def completed(self, job: type[JobSpec], **fields: Any) -> Run:
        run = self.life.run(job, **fields)
        assert run.outcome["status"] == "completed", run.outcome
        return run

    @property
    def list_file(self) -> Path:
        assert self.life.root is not None
        (path,) = self.life.root.rglob(str(WITHDRAWALS_FILE))
        return path

    @property
    def open(self) -> list[Any]:
        """What the server waits for."""
        found: list[Any] = json.loads(self.list_file.read_text())["open"]
        return found

    def standing(self) -> set[str]:
        """Handles of all rows in the server's galleries."""
        assert self.life.root is not None
        (folder,) = self.life.root.rglob(str(GALLERIES_FOLDER))
        rows = [Gallery(path).open().rows for path in folder.iterdir()]
        return {handle.tobytes().hex() for some in rows for handle in some.handles}

    def shown(self, run: Run) -> dict[str, int]:
        """How many lists each site was to sign."""
        return {
            to: len(data["fedgestalt"]["withdrawn"])
            for to, task, data in run.sent
            if task == "fgm_consider"
        }

    def check_receipt(self, number: int, signers: set[str], missing: set[str]) -> None:
        receipt = self.life.receipt(OWNER, number)
        assert set(receipt["images"]) == self.images[self.subject]
        assert self.handles <= set(receipt["rows"]) <= set(receipt["handles"])
        assert set(receipt["sites"]) == signers
        assert set(receipt["not_signed"]) == missing
        handles = np.array([list(bytes.fromhex(h)) for h in receipt["handles"]], np.uint8)
        for site, said in receipt["sites"].items():
            identity = Trust.of_anybody().check(site, said["certificate"].encode(), None)
            statement = withdrawal_statement(site, handles_digest(handles))
            identity.verify(statement, bytes.fromhex(said["signature"]))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, four_sites: Consortium
) -> tuple[Consortium, str]:
    consortium = Consortium(tmp_path_factory.mktemp("trained"), source=four_sites)
    run = consortium.run(TrainingJob(ensemble=one_network(), rounds=1, sites=EVERYBODY))
    assert run.outcome["status"] == "completed", run.outcome
    return consortium, run.outcome["ensemble"]


@pytest.fixture(params=KINDS)
def case(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    trained: tuple[Consortium, str],
    four_sites: Consortium,
    monkeypatch: pytest.MonkeyPatch,
) -> Withdrawing:
    return withdrawing(request.param, tmp_path, trained, four_sites, monkeypatch)


@pytest.fixture
def masked(
    tmp_path: Path,
    trained: tuple[Consortium, str],
    four_sites: Consortium,
    monkeypatch: pytest.MonkeyPatch,
) -> Withdrawing:
    return withdrawing("isometry", tmp_path, trained, four_sites, monkeypatch)


def withdrawing(
    kind: str,
    folder: Path,
    trained: tuple[Consortium, str],
    four_sites: Consortium,
    patch: pytest.MonkeyPatch,
) -> Withdrawing:
    consortium = Consortium(folder, source=four_sites)
    for site in EVERYBODY:
        shutil.copytree(trained[0].store(site), consortium.store(site))
    return Withdrawing(KINDS[kind](consortium, trained[1]), patch)


def nobody_considers(site: str, task: str, data: Shareable) -> Shareable:
    """What is asked comes to no site as it should, so that the job ends there."""
    if task == "fgm_consider":
        data["fedgestalt"]["kernel"] = "0" * 32
    return data


def test_after_a_job_that_fails_when_the_rows_are_gone_the_next_one_tells_everybody(
    case: Withdrawing,
) -> None:
    case.take_back()
    case.life.consortium.on_download = nobody_considers
    assert case.life.run(GalleryJob, sites=EVERYBODY).outcome["status"] == "failed"
    assert not case.handles & case.standing()
    assert case.remembered_by() >= case.met
    case.check_receipt(2, set(), set(EVERYBODY))
    assert case.list_file.stat().st_mode & 0o777 == 0o600

    case.life.consortium.on_download = untouched
    run = case.completed(MatchingJob, sites=EVERYBODY)
    assert run.outcome["withdrawn"] == 0
    assert run.outcome["not_signed"] == case.open == []
    assert case.remembered_by() == set()
    case.check_receipt(2, set(EVERYBODY), set())
    assert case.shown(case.completed(MatchingJob, sites=EVERYBODY)) == dict.fromkeys(EVERYBODY, 0)


@pytest.mark.parametrize("how", ["absent", "lost"])
def test_a_site_that_was_not_there_forgets_in_the_next_job_also_without_the_owner(
    case: Withdrawing, how: str
) -> None:
    case.take_back()
    if how == "lost":
        case.life.consortium.on_task = Script().kill(NEWCOMER, "fgm_consider", "before")
    run = case.completed(GalleryJob, sites=THREE if how == "absent" else EVERYBODY)
    assert run.outcome["not_signed"] == [NEWCOMER]
    assert case.remembered_by() == {NEWCOMER}
    case.check_receipt(2, set(THREE), {NEWCOMER})

    case.life.consortium.on_task = Script()
    others = tuple(site for site in EVERYBODY if site != OWNER)
    run = case.completed(MatchingJob, sites=others)
    assert case.shown(run) == {**dict.fromkeys(others, 0), NEWCOMER: 1}
    assert case.remembered_by() == set()
    assert len(case.open) == 1  # until the owner has its receipt

    run = case.completed(MatchingJob, sites=EVERYBODY)
    assert case.shown(run) == dict.fromkeys(EVERYBODY, 0)
    case.check_receipt(2, set(EVERYBODY), set())
    assert case.open == []


def test_a_withdrawal_that_never_reached_the_server_is_said_again(case: Withdrawing) -> None:
    case.take_back()
    task = "fgm_enrol" if type(case.life) is Life else "fgm_enrol_shares"
    case.life.consortium.on_task = Script().kill(OWNER, task, "after")
    run = case.completed(GalleryJob, sites=EVERYBODY)
    assert run.outcome["lost"] == [OWNER]
    assert case.handles <= case.standing()

    case.life.consortium.on_task = Script()
    case.completed(GalleryJob, sites=EVERYBODY)
    assert case.remembered_by() == case.handles & case.standing() == set()
    case.check_receipt(2, set(EVERYBODY), set())


def test_a_server_that_has_lost_its_list_gets_it_from_the_owner(masked: Withdrawing) -> None:
    masked.take_back()
    masked.completed(GalleryJob)
    masked.list_file.write_text(masked.list_file.read_text()[:-9])
    said = masked.life.run(MatchingJob, sites=EVERYBODY).outcome["reason"]
    assert f"the list of open withdrawals is damaged ({masked.list_file.name})" in said
    masked.list_file.unlink()
    masked.completed(MatchingJob, sites=EVERYBODY)
    assert masked.remembered_by() == set()
    masked.check_receipt(2, set(EVERYBODY), set())


def test_a_rotation_in_between_loses_no_withdrawal(masked: Withdrawing) -> None:
    masked.take_back()
    masked.completed(GalleryJob)
    masked.completed(GalleryJob, rotate=True)
    assert masked.remembered_by() == {NEWCOMER}
    masked.completed(MatchingJob, sites=EVERYBODY)
    assert masked.remembered_by() == set()
    masked.check_receipt(2, set(EVERYBODY), set())


@pytest.mark.parametrize("rotations", [1, 2])
def test_results_from_under_an_earlier_kernel_are_reached(
    masked: Withdrawing, rotations: int
) -> None:
    for _ in range(rotations - 1):
        masked.completed(GalleryJob, sites=EVERYBODY, rotate=True)
    masked.take_back()
    masked.completed(GalleryJob, sites=EVERYBODY, rotate=True)
    assert masked.remembered_by() == set()
    masked.check_receipt(1 + rotations, set(EVERYBODY), set())


def test_results_from_under_another_strategy_are_reached(masked: Withdrawing) -> None:
    masked.completed(GalleryJob, sites=EVERYBODY, strategy="isometry-blocks")
    masked.take_back()
    masked.completed(GalleryJob, sites=EVERYBODY, strategy="isometry-blocks")
    assert masked.remembered_by() == masked.handles & masked.standing() == set()
    masked.check_receipt(3, set(EVERYBODY), set())
    assert masked.open == []
    masked.completed(MatchingJob, sites=EVERYBODY)
    assert masked.remembered_by() == set()


@pytest.mark.parametrize("ends", ["when all are to consider", "before the rows are sent"])
def test_a_patient_who_comes_back_is_enrolled_as_a_new_one(
    masked: Withdrawing, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    masked.take_back()
    if ends == "before the rows are sent":

        def failing(own: MatchingSite, records: object) -> None:
            raise SiteError(f"{own.site} cannot encode")

        monkeypatch.setattr(MatchingSite, "encode", failing)
    else:
        masked.life.consortium.on_download = nobody_considers
    assert masked.life.run(GalleryJob, sites=EVERYBODY).outcome["status"] == "failed"
    masked.check_receipt(2, set(), set(EVERYBODY))
    masked.life.consortium.on_download = untouched
    monkeypatch.undo()
    run = masked.completed(GalleryJob, sites=EVERYBODY)
    assert masked.life.added(run)[OWNER] >= len(masked.images[masked.subject])
    assert masked.remembered_by() == masked.handles & masked.standing() == set()
    masked.check_receipt(2, set(EVERYBODY), set())


def test_a_server_that_lists_rows_that_stand_is_refused_by_their_owner(masked: Withdrawing) -> None:
    def listing(withdrawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        handles = np.array([list(bytes.fromhex(h)) for h in sorted(masked.handles)], np.uint8)
        return {handles_digest(handles).hex(): handles}

    masked.life.consortium.on_download = tampered(OWNER, "fgm_consider", "withdrawn", listing)
    said = masked.life.run(MatchingJob, sites=EVERYBODY).outcome["reason"]
    assert "it lists rows as withdrawn that this site has enrolled" in said
    assert masked.remembered_by() >= masked.met


@pytest.mark.parametrize(
    ("task", "withdrawn", "says"),
    [
        ("fgm_consider", lambda w: {"0" * 64: next(iter(w.values()))}, "by a wrong digest"),
        ("fgm_consider", lambda w: {"0" * 64: np.zeros((1, 3), np.uint8)}, "no list of handles"),
    ],
)
def test_a_list_that_is_none_is_refused(
    masked: Withdrawing, task: str, withdrawn: Any, says: str
) -> None:
    masked.take_back()
    masked.life.consortium.on_download = tampered("berlin", task, "withdrawn", withdrawn)
    said = masked.life.run(GalleryJob, sites=EVERYBODY).outcome["reason"]
    assert says in said
    assert "berlin" in masked.remembered_by() or "berlin" not in masked.met


@pytest.mark.parametrize("case_of", ["silent", "foreign"])
def test_a_site_cannot_remove_in_silence_nor_withdraw_for_others(
    case: Withdrawing, case_of: str
) -> None:
    masks = type(case.life) is Life
    task = "fgm_enrol" if masks else "fgm_enrol_shares"
    if case_of == "silent":
        case.take_back()
        upload = tampered(OWNER, task, "withdrawn", lambda handles: handles[:0])
        says = f"site '{OWNER}': it removes rows of which the others are not to hear"
    else:
        foreign = np.array([list(bytes.fromhex(h)) for h in sorted(case.handles)], np.uint8)
        upload = tampered("bonn", task, "withdrawn", lambda handles: foreign)
        says = "site 'bonn': it withdraws rows of another site"
    case.life.consortium.on_upload = upload
    assert says in case.life.run(GalleryJob, sites=EVERYBODY).outcome["reason"]
    assert case.handles <= case.standing()


def test_a_consent_to_other_withdrawals_is_refused(masked: Withdrawing) -> None:
    masked.take_back()
    masked.life.consortium.on_upload = tampered("bonn", "fgm_consider", "signatures", lambda s: {})
    said = masked.life.run(GalleryJob, sites=EVERYBODY).outcome["reason"]
    assert "site 'bonn': it signs other withdrawals than it was shown" in said


def test_what_sites_are_shown_does_not_say_whose_rows_they_are(case: Withdrawing) -> None:
    case.take_back()
    run = case.completed(GalleryJob, sites=EVERYBODY)
    for fields in run.orders("fgm_consider"):
        (listed,) = fields["withdrawn"].values()
        assert case.handles <= {handle.tobytes().hex() for handle in listed}
        assert [handle.tobytes() for handle in listed] == sorted(h.tobytes() for h in listed)
    task = "fgm_rank" if type(case.life) is Life else "fgm_rank_shares"
    for site in EVERYBODY:
        (fields,) = run.orders(task, site)
        assert bool(fields["receipts"]) == (site == OWNER)
