"""Both jobs, run once and inspected by many tests."""

from __future__ import annotations

import pytest
from consortium import BothJobs, Consortium, tiny_ensemble

from fedgestalt.jobs import MatchingJob, TrainingJob


@pytest.fixture(scope="session")
def both_jobs(tmp_path_factory: pytest.TempPathFactory) -> BothJobs:
    consortium = Consortium(tmp_path_factory.mktemp("consortium"))
    training = consortium.run(TrainingJob(ensemble=tiny_ensemble(), rounds=2))
    assert training.outcome["status"] == "completed", training.outcome
    job = MatchingJob(ensemble=training.outcome["ensemble"], released_rows=0, keep_gram=True)
    matching = consortium.run(job)
    assert matching.outcome["status"] == "completed", matching.outcome
    return BothJobs(consortium, training, matching)
