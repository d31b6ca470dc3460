"""A site that computes features in several processes: the same model, the same encodings."""

from __future__ import annotations

import shutil
from pathlib import Path

from consortium import Consortium, Plain, Summed, one_network

from fedgestalt.jobs import MatchingJob, TrainingJob

JOB = TrainingJob(ensemble=one_network(), rounds=1)


def features_of(consortium: Consortium, site: str) -> dict[str, bytes]:
    folder = consortium.store(site) / "cache"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_compute_what_one_does(tmp_path: Path, three_sites: Consortium) -> None:
    two = {"bonn": {"processes": 2}}
    consortium = Consortium(tmp_path / "two", source=three_sites, site_settings=two)
    run = consortium.run(JOB)
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["ensemble"] == Plain(three_sites, JOB).digest(Summed(three_sites.sites))
    trained_on = features_of(consortium, "bonn")
    assert trained_on
    matched = consortium.run(
        MatchingJob(ensemble=run.outcome["ensemble"]), job_id="job-2", root=run.root
    )
    assert matched.outcome["status"] == "completed", matched.outcome
    encoded = features_of(consortium, "bonn")
    assert encoded.keys() > trained_on.keys()

    alone = Consortium(tmp_path / "one", source=three_sites)
    first = alone.run(JOB)
    alone.run(MatchingJob(ensemble=run.outcome["ensemble"]), job_id="job-2", root=first.root)
    assert features_of(alone, "bonn") == encoded


def test_a_fault_in_one_of_the_processes_reaches_the_job(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, site_settings={"bonn": {"processes": 2}})

    def make_unwritable() -> None:
        folder = consortium.store("bonn") / "cache"
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_text("in the way")

    consortium.on_task = lambda site, task, when: (
        make_unwritable() if (site, task, when) == ("bonn", "fgm_train", "before") else None
    )
    run = consortium.run(JOB)
    assert run.outcome["status"] == "failed"
    assert run.panics == ["site 'bonn': the feature cache cannot be written (File exists)."]
