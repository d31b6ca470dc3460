"""What goes wrong at one site, or at the server, ends the job with a sentence that names it."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from consortium import BothJobs, Consortium, Run, Tamper, tiny_ensemble
from nvflare.apis.shareable import Shareable

from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.jobs import MatchingJob, TrainingJob

JOB = TrainingJob(ensemble=tiny_ensemble(), rounds=1)


def reason(run: Run) -> str:
    """Why a job failed; the administrator sees the same sentence."""
    assert run.outcome["status"] == "failed"
    assert run.panics == [run.outcome["reason"]]
    assert "rounds" not in run.outcome
    return str(run.outcome["reason"])


def change(site: str, task: str, key: str, value: object):
    """A tamper function that replaces one field of one reply."""

    def tamper(sender: str, name: str, data: Shareable) -> Shareable:
        if (sender, name) == (site, task):
            fields = data["fedgestalt"]
            fields[key] = value(fields[key]) if callable(value) else value
        return data

    return tamper


def test_two_sites_are_too_few_for_a_sum(tmp_path: Path) -> None:
    said = reason(Consortium(tmp_path, sites=("berlin", "bonn")).run(JOB))
    assert "takes part with 3 sites or more, the job has 2" in said
    assert "single updates could be told from the sum" in said


def test_a_site_with_another_version_is_named(tmp_path: Path) -> None:
    tamper = change("leuven", "fgm_join", "facts", lambda f: {**f, "fedgestalt": "0.0.9"})
    said = reason(Consortium(tmp_path, on_upload=tamper).run(JOB))
    assert "leuven: fedgestalt is 0.0.9, with berlin, bonn, the server " in said
    assert "install the same version of fedgestalt everywhere" in said


@pytest.mark.parametrize(
    ("fact", "others"),
    [
        ("label map", "berlin, leuven "),
        ("start model", "berlin, leuven, the server "),
        ("plugin backbone iresnet", "berlin, leuven, the server "),
        ("number plan", "berlin, leuven, the server "),
    ],
)
def test_a_site_with_another_fact_is_named_with_those_who_differ_from_it(
    tmp_path: Path, fact: str, others: str
) -> None:
    tamper = change("bonn", "fgm_join", "facts", lambda f: {**f, fact: "0" * 64})
    run = Consortium(tmp_path, on_upload=tamper).run(JOB)
    said = reason(run)
    assert f"bonn: {fact} is 000000000000, with {others}" in said
    assert "berlin:" not in said
    assert "leuven:" not in said
    assert {task for _, task, _ in run.sent} == {"fgm_join"}


@pytest.mark.parametrize(
    ("task", "key", "value", "expected"),
    [
        ("fgm_round", "public_key", b"short", "has 5 bytes, not 32"),
        ("fgm_round", "session", bytes(32), "sees another session"),
        ("fgm_update", "words", lambda w: w[:-1], "words, the plan"),
        ("fgm_update", "words", lambda w: w.astype(np.float32), "is float32"),
        ("fgm_update", "session", bytes(32), "sees another session"),
        ("fgm_update", "schema", "fedgestalt.secagg.masked-vector/2", "expected fedgestalt"),
        ("fgm_publish", "digest", "f" * 64, "stored another model"),
    ],
)
def test_a_malformed_reply_names_its_sender(
    tmp_path: Path, task: str, key: str, value: object, expected: str
) -> None:
    run = Consortium(tmp_path, on_upload=change("bonn", task, key, value)).run(JOB)
    said = reason(run)
    assert "'bonn'" in said
    assert expected in said


def test_a_site_that_raises_is_named_without_what_it_raised(tmp_path: Path) -> None:
    class Broken(EnsembleTrainer):
        def _train(self, fields: object):
            raise RuntimeError("SUBJECT-0001 of /data/photo.jpg")

    spec = JOB.executor_arguments()["ensemble"]
    said = reason(Consortium(tmp_path).run(JOB, lambda: Broken(spec)))
    assert "unexpected RuntimeError" in said
    assert "SUBJECT" not in said
    assert "photo" not in said


def test_a_damaged_image_at_a_site_is_reported_without_its_name(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    image = next((tmp_path / "hospitals" / "bonn").rglob("*_rot_aligned.jpg"))
    image.unlink()
    image.write_bytes(b"\xff\xd8\xff")
    said = reason(consortium.run(JOB))
    assert "bonn: its data cannot be used" in said
    assert image.name.split("_rot")[0] not in said


def test_a_server_that_swaps_a_key_back_to_its_owner_is_refused(tmp_path: Path) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_update"):
            data["fedgestalt"]["public_keys"]["bonn"] = bytes(range(32))
        return data

    said = reason(Consortium(tmp_path, on_download=tamper).run(JOB))
    assert "own key came back altered" in said


def test_a_site_that_was_told_another_model_cannot_join_the_sum(tmp_path: Path) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_round"):
            state = data["fedgestalt"]["state"]
            name = sorted(state)[0]
            state[name] = state[name] + np.float32(1)
        return data

    said = reason(Consortium(tmp_path, on_download=tamper).run(JOB))
    assert "'bonn'" in said
    assert "another session" in said


LIMIT = 6.0
IMPATIENT = JOB.model_copy(update={"phase_limit_seconds": LIMIT})


def silent(site: str, task: str) -> Tamper:
    """Holds one reply back until the phase is over; the other sites go on meanwhile."""

    def tamper(sender: str, name: str, data: Shareable) -> Shareable:
        if (sender, name) == (site, task):
            time.sleep(LIMIT + 1)
        return data

    return tamper


def test_a_silent_site_ends_the_handshake_when_the_phase_limit_is_over(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path, on_upload=silent("leuven", "fgm_join"))
    assert reason(consortium.run(IMPATIENT)) == (
        "the job cannot start. leuven: no answer within 6 seconds; look at its log;"
        " nothing was trained or compared."
    )


def test_a_silent_site_does_not_hide_the_refusal_of_another(tmp_path: Path) -> None:
    consortium = Consortium(
        tmp_path,
        sites=("berlin", "bonn", "leuven", "ulm"),
        site_settings={"bonn": {"jobs": ["match"]}},
        on_upload=silent("leuven", "fgm_join"),
    )
    said = reason(consortium.run(IMPATIENT))
    bonn, leuven = said.removeprefix("the job cannot start. ").split(" | ")
    assert bonn.startswith("bonn: this site does not take part in jobs of the kind")
    assert leuven.startswith("leuven: no answer within 6 seconds; look at its log; nothing was")
    assert "berlin" not in said
    assert "ulm" not in said


@pytest.mark.parametrize("task", ["fgm_round", "fgm_update", "fgm_publish"])
def test_a_silent_site_ends_a_later_phase_too(tmp_path: Path, task: str) -> None:
    said = reason(Consortium(tmp_path, on_upload=silent("leuven", task)).run(IMPATIENT))
    assert said == (
        f"phase {task}: no answer from leuven within 6 seconds;"
        " look at the logs of these sites, or raise phase_limit_seconds."
    )


def test_matching_with_an_ensemble_that_a_site_lacks_names_the_site(both_jobs: BothJobs) -> None:
    said = reason(both_jobs.consortium.run(MatchingJob(ensemble="a" * 64)))
    for site in both_jobs.consortium.sites:
        assert f"{site}: " in said
    assert "does not hold the ensemble" in said


def test_a_site_refuses_an_evaluation_release_that_its_policy_forbids(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(both_jobs.consortium, "settings", {"evaluation_release": False})
    digest = both_jobs.training.outcome["ensemble"]
    run = both_jobs.consortium.run(MatchingJob(ensemble=digest, released_rows=0))
    said = reason(run)
    assert "releases no scores of all images, which an evaluation asks for" in said
    assert "ask the site to change evaluation_release in its fedgestalt.yaml" in said


def test_a_site_refuses_to_release_more_rows_than_its_policy_allows(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(both_jobs.consortium, "settings", {"max_released_rows": 10})
    digest = both_jobs.training.outcome["ensemble"]
    said = reason(both_jobs.consortium.run(MatchingJob(ensemble=digest, released_rows=11)))
    assert "releases 10 rows per query, the job asks for 11" in said
    assert "ask the site to change max_released_rows in its fedgestalt.yaml" in said


def test_a_server_that_moves_a_label_to_another_row_is_caught(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if task == "fgm_rank":
            labels = data["fedgestalt"]["labels"].copy()
            labels[[0, 1]] = labels[[1, 0]]
            data["fedgestalt"]["labels"] = labels
        return data

    monkeypatch.setattr(both_jobs.consortium, "on_download", tamper)
    digest = both_jobs.training.outcome["ensemble"]
    said = reason(both_jobs.consortium.run(MatchingJob(ensemble=digest, released_rows=0)))
    assert "altered or moved to another row" in said


@pytest.mark.parametrize(
    ("task", "key", "value", "expected"),
    [
        ("fgm_encode", "rows", lambda r: r * 2, "not of length 1"),
        ("fgm_encode", "rows", lambda r: r * np.nan, "NaN"),
        ("fgm_encode", "handles", lambda h: h[1:], "do not go with"),
        ("fgm_encode", "kernel", "0" * 32, "kernel differs"),
        ("fgm_kernel_seal", "boxes", lambda b: {}, "not for the agreed roster"),
        ("fgm_kernel_seal", "boxes", lambda b: dict.fromkeys(b, bytes(48)), "does not open"),
        ("fgm_kernel_keys", "session", bytes(32), "another session"),
    ],
)
def test_a_malformed_matching_reply_names_its_sender(
    both_jobs: BothJobs,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    key: str,
    value: object,
    expected: str,
) -> None:
    monkeypatch.setattr(both_jobs.consortium, "on_upload", change("bonn", task, key, value))
    run = both_jobs.consortium.run(MatchingJob(ensemble=both_jobs.training.outcome["ensemble"]))
    said = reason(run)
    assert "bonn" in said
    assert expected in said


@pytest.mark.parametrize("digest", ["../../../../tmp/elsewhere", "f" * 63, "F" * 64, ""])
def test_a_server_cannot_make_a_site_write_elsewhere(tmp_path: Path, digest: str) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_publish"):
            data["fedgestalt"]["digest"] = digest
        return data

    consortium = Consortium(tmp_path, on_download=tamper)
    said = reason(consortium.run(JOB))
    assert "field 'digest' is not 64 hexadecimal digits" in said
    assert not list(consortium.store("bonn").rglob("weights.safetensors"))


def test_matching_without_a_named_ensemble_is_refused(both_jobs: BothJobs) -> None:
    said = reason(both_jobs.consortium.run(MatchingJob()))
    assert "is not 64 hexadecimal digits" in said
