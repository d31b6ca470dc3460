"""Jobs that are run once and inspected by many tests, and data that many jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest
from consortium import BothJobs, Consortium, Plain, one_network, tiny_ensemble, write_kits

from fedgestalt.jobs import MatchingJob, TrainingJob

FOUR = ("berlin", "bonn", "leuven", "ulm")
FIVE = ("berlin", "bonn", "leuven", "paris", "ulm")


@pytest.fixture(scope="session")
def both_jobs(tmp_path_factory: pytest.TempPathFactory) -> BothJobs:
    consortium = Consortium(tmp_path_factory.mktemp("consortium"))
    training = consortium.run(TrainingJob(ensemble=tiny_ensemble(), rounds=2))
    assert training.outcome["status"] == "completed", training.outcome
    job = MatchingJob(ensemble=training.outcome["ensemble"], released_rows=0, keep_gram=True)
    matching = consortium.run(job)
    assert matching.outcome["status"] == "completed", matching.outcome
    return BothJobs(consortium, training, matching)


@pytest.fixture(scope="session")
def three_sites(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Data alone: a test runs its jobs on consortiums of its own that share them."""
    return Consortium(tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="session")
def four_sites(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("four"), sites=FOUR)


@pytest.fixture(scope="session")
def five_sites(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("five"), sites=FIVE)


@pytest.fixture(scope="session")
def plain_four(four_sites: Consortium) -> Plain:
    """What the jobs of :func:`one_network` come to with four sites."""
    return Plain(four_sites, TrainingJob(ensemble=one_network()))


@pytest.fixture(scope="session")
def plain_five(five_sites: Consortium) -> Plain:
    return Plain(five_sites, TrainingJob(ensemble=one_network()))


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Startup kits of three sites, as far as identities go."""
    return write_kits(tmp_path_factory.mktemp("kits") / "kits", ("berlin", "bonn", "leuven"))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, four_sites: Consortium
) -> tuple[Consortium, str]:
    """Three of four sites have trained; with the ensemble's digest."""
    consortium = Consortium(tmp_path_factory.mktemp("trained"), source=four_sites)
    run = consortium.run(TrainingJob(ensemble=one_network(), rounds=1, sites=FOUR[:3]))
    assert run.outcome["status"] == "completed", run.outcome
    return consortium, run.outcome["ensemble"]
