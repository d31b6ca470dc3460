"""A disk that is full is said in one sentence, without the name of a file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from consortium import Consortium, tiny_ensemble
from safetensors import SafetensorError

import fedgestalt.learning.store
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.jobs import TrainingJob

JOB = TrainingJob(ensemble=tiny_ensemble(), rounds=1)


def test_a_file_that_cannot_be_written_is_reported_without_its_name(tmp_path: Path) -> None:
    class FullDisk(EnsembleTrainer):
        def _train(self, fields: object):
            raise OSError(errno.ENOSPC, "No space left on device", "/srv/store/SUBJECT-0001")

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
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(message)

    monkeypatch.setattr(fedgestalt.learning.store, "save_file", full)
    outcome = Consortium(tmp_path).run(JOB).outcome
    assert outcome["reason"] == (
        "the ensemble cannot be stored (No space left on device);"
        " free disk space; ensembles stored earlier are untouched."
    )
    assert not list(tmp_path.rglob(".ensemble-*"))
