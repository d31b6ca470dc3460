"""What goes wrong at one site while a consortium of real processes trains.

Every fault must end in a sentence that an administrator can act on, leave no process behind, and
leave the next job alone.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from consortium import TINY
from faults import (
    MIXED_UP_LABELS,
    NOT_A_NUMBER,
    OLD_VERSION,
    POISON,
    UNCHECKED,
    WRONG_CLOCK,
    Ward,
    measured,
    slow,
    until,
)
from hospitals import SITES, Hospitals, training

from fedgestalt.federation.tasks import TRAIN
from fedgestalt.hooks import get_registry
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.store import load_ensemble

pytestmark = pytest.mark.federation

STORE_KIB = 1024
ROOM_BYTES = 24 * 1024
"""Enough for a site's records, too little for an ensemble."""
SILENCE_SECONDS = 10.0
LEARNS = TrainingSpec(
    epochs=8, batch_size=8, learning_rate=1e-2, head_learning_rate=1e-2, dropout=0.0, variants=2
)
NETWORK = MemberSpec(name="fine-tuned", backbone="iresnet", options=TINY, training=LEARNS)


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    """Leuven's store is on a small disk of its own."""
    hospitals = Hospitals(
        tmp_path_factory.mktemp("consortium"),
        cohort={"frequent": 6},
    )
    with small_disk(hospitals.store("leuven")), hospitals.local() as local:
        ward = Ward(hospitals, local)
        local.start_server()
        for site in SITES:
            ward.start(site)
        local.wait_for(SITES)
        yield ward


class small_disk:  # noqa: N801  reads as a statement
    """A real file system of ``STORE_KIB`` at a folder; skips where nobody may mount one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True)
        options = ["-o", f"size={STORE_KIB}k,mode=0700"]
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(self.folder)]
        self.mounted = not subprocess.run(command, capture_output=True, timeout=10).returncode

    def __exit__(self, *exc_info: object) -> None:
        if self.mounted:
            command = ["umount", "--lazy", str(self.folder)]
            subprocess.run(command, check=True, capture_output=True, timeout=10)


def one_round(**fields: Any) -> Any:
    """The shortest job."""
    return training(rounds=1, **fields)


def nothing_published(ward: Ward, outcome: dict[str, Any]) -> bool:
    """A failed job leaves no ensemble, neither at the server nor at a site."""
    stores = (ward.hospitals.store(site) / "ensembles" for site in SITES)
    return "ensemble" not in outcome and not any(list(s.glob("*")) for s in stores)


def test_all_differences_between_the_versions_of_two_sites_come_in_one_message(
    ward: Ward,
) -> None:
    with ward.patients["bonn"].suffers(OLD_VERSION), ward.patients["leuven"].has_other_files():
        outcome = ward.run(one_round())
    said = outcome["reason"]
    assert "bonn: fedgestalt is 0.0.9, with berlin, leuven, the server " in said
    assert "leuven: fedgestalt code is " in said
    assert "reinstall fedgestalt: its files differ from those elsewhere" in said
    assert "berlin: " not in said
    assert "nothing was trained or compared" in said
    assert outcome["flare"] == "FINISHED:EXECUTION_EXCEPTION"
    assert nothing_published(ward, outcome)


def test_a_loss_that_is_not_a_number_is_refused_at_its_site(ward: Ward) -> None:
    with ward.patients["bonn"].suffers(NOT_A_NUMBER):
        outcome = ward.run(one_round())
    assert outcome["status"] == "failed"
    assert outcome["reason"].startswith("site 'bonn': tensor ")
    assert "this site's update holds NaN or infinity; lower the learning rate" in outcome["reason"]
    assert not any(ward.vectors(site, outcome["job"]) for site in SITES)
    assert nothing_published(ward, outcome)


def test_an_update_a_million_times_too_large_is_refused_by_its_own_site(ward: Ward) -> None:
    with ward.patients["bonn"].suffers(POISON):
        outcome = ward.run(one_round())
    assert outcome["status"] == "failed"
    assert outcome["reason"].startswith("site 'bonn': this site's update is ")
    assert "times as large as the model, at most " in outcome["reason"]
    assert not any(ward.vectors(site, outcome["job"]) for site in SITES)
    assert nothing_published(ward, outcome)


def test_the_sum_with_a_site_that_checks_nothing_is_refused_and_nobody_is_accused(
    ward: Ward,
) -> None:
    with ward.patients["bonn"].suffers(POISON + UNCHECKED):
        outcome = ward.run(one_round())
    assert outcome["reason"].startswith("the mean of all updates is ")
    assert "times as large as the model, at most " in outcome["reason"]
    assert "under the masks nobody can tell which" in outcome["reason"]
    (warning,) = outcome["warnings"]
    assert warning.startswith("round 1: 3")
    assert "% of all values that the sites sent were larger than the round allows" in warning
    assert "bonn" not in outcome["reason"] + warning
    assert nothing_published(ward, outcome)


def test_an_abort_in_mid_training_ends_the_job_everywhere(ward: Ward) -> None:
    with ward.patients["leuven"].suffers(slow(300)):
        job = ward.submit(one_round())
        ward.wait_until_only("leuven", job)
    assert len(ward.job_processes()) == 1 + len(SITES)
    began = time.monotonic()
    ward.local.session.abort(job)
    outcome = ward.ended(job, 40)
    until(lambda: not ward.job_processes(), "all processes of the job to end", 30)
    measured("abort, all over", began)
    assert outcome["flare"] == "FINISHED:ABORTED"
    assert (outcome["status"], outcome["reason"]) == ("aborted", "the job was aborted")
    assert nothing_published(ward, outcome)


@pytest.mark.parametrize("whole_site", [False, True], ids=["job process", "whole site"])
def test_a_job_of_three_sites_ends_with_the_name_of_one_that_is_killed_in_mid_round(
    ward: Ward, whole_site: bool
) -> None:
    with ward.patients["leuven"].suffers(slow(300)):
        job = ward.submit(one_round(silence_limit_seconds=SILENCE_SECONDS))
        ward.wait_until_only("leuven", job)
    began = time.monotonic()
    if whole_site:
        ward.local.running["leuven"].kill()
    else:
        for pid in ward.job_processes("leuven"):
            psutil.Process(pid).kill()
    until(lambda: not ward.report(job).get("phase"), "the loss to be noticed", 40)
    measured(f"killed ({whole_site=}), noticed", began)
    outcome = ward.ended(job, 60)
    measured(f"killed ({whole_site=}), all over", began)
    assert outcome["flare"] == "FINISHED:EXECUTION_EXCEPTION"
    assert outcome["reason"] == (
        "round 1: 2 sites are there, the job asks for 3 (lost: leuven); bring the lost sites back."
    )
    lost, *_ = outcome["warnings"]
    assert lost.startswith("phase fgm_train: site 'leuven': its job process has been silent for 1")
    assert "it was killed, ran out of memory, or lost its connection" in lost
    assert not any(ward.vectors(site, job) for site in SITES)
    until(lambda: not ward.job_processes(), "all processes of the job to end", 30)
    assert nothing_published(ward, outcome)
    if whole_site:
        ward.start("leuven")
        joined = "Successfully registered client:leuven"
        until(lambda: ward.log("leuven").count(joined) == 2, "leuven to be back")


@pytest.fixture(scope="module")
def after_all_this(ward: Ward) -> dict[str, Any]:
    """The next job: leuven is slow, berlin's clock is wrong, bonn's labels are wrong."""
    seen: list[dict[str, Any]] = []
    job = one_round(ensemble=EnsembleSpec(members=(NETWORK,))).model_copy(update={"rounds": 4})
    clock = WRONG_CLOCK.format(seconds=-3600)
    ill = zip(("leuven", "berlin", "bonn"), (slow(3), clock, MIXED_UP_LABELS), strict=True)
    with contextlib.ExitStack() as stack:
        for site, fault in ill:
            stack.enter_context(ward.patients[site].suffers(fault))
        outcome = ward.run(job, on_report=seen.append)
    return {**outcome, "seen": seen}


def test_a_slow_site_is_waited_for_and_seen(after_all_this: dict[str, Any]) -> None:
    assert after_all_this["status"] == "completed", after_all_this["reason"]
    assert len(after_all_this["rounds"]) == 4
    assert all(record["seconds"] > 3 for record in after_all_this["rounds"])
    waiting = [
        [site for site, entry in report["sites"].items() if entry["state"] == "working"]
        for report in after_all_this["seen"]
        if report["phase"] == TRAIN
    ]
    assert waiting.count(["leuven"]) > len(waiting) / 2


def test_a_wrong_clock_is_named_and_the_site_takes_part(after_all_this: dict[str, Any]) -> None:
    (warning,) = [w for w in after_all_this["warnings"] if "clock" in w]
    assert warning.startswith("site 'berlin': its clock is 3")
    assert "seconds behind the server's; synchronise it (NTP)" in warning


def test_a_mislabelled_site_is_named_and_not_left_out(after_all_this: dict[str, Any]) -> None:
    (warning,) = [w for w in after_all_this["warnings"] if "labels" in w]
    assert warning.startswith("site 'bonn': the consortium's model agrees with far fewer")
    assert "check its lookup table and diagnoses. It was not left out." in warning
    images = 6 * 2 * 2
    in_sum = images + images + images // 6
    assert [record["images"] for record in after_all_this["rounds"]] == [in_sum] * 4


def test_a_full_disk_is_said_in_one_sentence_and_spares_what_is_stored(
    ward: Ward, after_all_this: dict[str, Any]
) -> None:
    store = ward.hospitals.store("leuven")
    if not store.is_mount():
        pytest.skip("needs a user who may mount a file system")
    digest = after_all_this["ensemble"]
    fill(store / "other-files", ROOM_BYTES)
    outcome = ward.run(one_round())
    (store / "other-files").unlink()
    assert outcome["status"] == "failed"
    assert outcome["reason"] == (
        "site 'leuven': the model of the round cannot be stored (No space left on device);"
        " free disk space for its store; models stored earlier are untouched."
    )
    kept = [path.name for path in (store / "ensembles").iterdir()]
    assert kept == [digest]
    assert load_ensemble(store / "ensembles" / digest, get_registry())[1] == digest


def fill(file: Path, room: int) -> None:
    """Write a file until the file system has ``room`` bytes left."""
    with file.open("wb") as filler:
        filler.write(bytes(psutil.disk_usage(str(file.parent)).free - room))
