"""A disk that is full is said in one sentence, without the name of a file."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from consortium import Consortium, one_network

import fedgestalt.learning.store
from fedgestalt.federation.job import transfer
from fedgestalt.federation.job.transfer import UPLOAD
from fedgestalt.federation.training import checkpoints
from fedgestalt.federation.training import executor as trainer_module
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.jobs import TrainingJob

JOB = TrainingJob(ensemble=one_network(), rounds=1)
FULL = OSError(errno.ENOSPC, "No space left on device", "/srv/store/SUBJECT-0001")


def test_a_file_that_cannot_be_written_is_reported_without_its_name(tmp_path: Path) -> None:
    class FullDisk(EnsembleTrainer):
        def _train(self, fields: object):
            raise FULL

    spec = JOB.executor_arguments()["ensemble"]
    outcome = Consortium(tmp_path).run(JOB, lambda: FullDisk(spec)).outcome
    said = outcome["reason"].partition(": ")[2]
    assert said == (
        "a file cannot be read or written (No space left on device); its own log names the file."
    )


def test_an_ensemble_that_does_not_fit_on_the_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise FULL

    monkeypatch.setattr(fedgestalt.learning.store, "write_tensors", full)
    outcome = Consortium(tmp_path).run(JOB).outcome
    assert outcome["reason"] == (
        "the ensemble cannot be stored (No space left on device);"
        " free disk space; ensembles stored earlier are untouched; round 1 is kept: to go on from"
        " it, submit the job again with resume_from=job-1."
    )
    assert not list(tmp_path.rglob(".ensemble-*"))


def write_fails(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """No checkpoint can be written whose path names ``where``."""
    write = checkpoints._write

    def full(path: Path, *rest: Any) -> None:
        if where in str(path):
            raise FULL
        write(path, *rest)

    monkeypatch.setattr(checkpoints, "_write", full)


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (
            "/stores/bonn/checkpoints/sent.json",
            "site 'bonn': its record of what leaves it cannot be written (No space left on device);"
            " free disk space for its store; nothing was sent.",
        ),
        (
            ".safetensors",
            "the model of the round cannot be stored (No space left on device); free disk space for"
            " its store; models stored earlier are untouched.",
        ),
        (
            "/server/",
            "server: the checkpoint of round 1 cannot be written (No space left on device); free"
            " disk space; the checkpoint before it is untouched.",
        ),
    ],
)
def test_what_a_job_keeps_between_rounds_does_not_fit_on_the_disk(
    tmp_path: Path,
    three_sites: Consortium,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    says: str,
) -> None:
    write_fails(monkeypatch, where)
    run = Consortium(tmp_path, source=three_sites).run(JOB)
    assert run.outcome["reason"].endswith(says)
    assert "SUBJECT" not in run.outcome["reason"]
    left = {message.site for message in run.received if message.task == UPLOAD}
    assert left == {"berlin", "leuven"} | ({"bonn"} if "bonn" not in where else set())
    assert not list(tmp_path.rglob("*.partial"))


def test_a_vector_does_not_leave_a_site_that_cannot_write_it_down(
    tmp_path: Path, three_sites: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: Path, *rest: Any) -> None:
        if store.name == "bonn":
            raise FULL

    monkeypatch.setattr(trainer_module, "record_sent", full)
    run = Consortium(tmp_path, source=three_sites).run(JOB)
    assert run.outcome["reason"] == (
        "site 'bonn': a file cannot be read or written (No space left on device); its own log names"
        " the file."
    )
    assert "bonn" not in {message.site for message in run.received if message.task == UPLOAD}


def test_an_upload_that_does_not_fit_on_the_servers_disk_is_its_fault(
    tmp_path: Path, three_sites: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise FULL

    monkeypatch.setattr(transfer, "_write_all", full)
    run = Consortium(tmp_path, source=three_sites).run(JOB)
    assert run.outcome["reason"].partition(": ")[2] == (
        "server: it refused chunk 0 of 1: the server cannot store the upload (No space left on"
        " device); free disk space there."
    )
