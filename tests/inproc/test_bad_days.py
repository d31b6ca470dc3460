"""What goes wrong at one site, or at the server, ends the job with a sentence that names it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import (
    BothJobs,
    Consortium,
    Plain,
    Run,
    Script,
    Summed,
    one_network,
)
from nvflare.apis.shareable import Shareable

from fedgestalt.federation.job.transfer import UPLOAD
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.jobs import MatchingJob, TrainingJob

JOB = TrainingJob(ensemble=one_network(), rounds=1)


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


def swap(boxes: dict[str, bytes]) -> dict[str, bytes]:
    """The boxes of two sites, each in the other's place."""
    (one, first), (other, second) = boxes.items()
    return {one: second, other: first}


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
        ("fgm_join", "certificate", b"-----BEGIN", "are no certificate in PEM"),
        ("fgm_train", "round", 2, "trained another round"),
        ("fgm_keys", "mask_key", b"short", "has 5 bytes, not 1216"),
        ("fgm_keys", "mask_key", bytes(1216), "its signature does not fit"),
        ("fgm_keys", "session", bytes(32), "sees another session"),
        ("fgm_keys", "signature", bytes(64), "its signature does not fit"),
        ("fgm_shares", "boxes", lambda b: dict(list(b.items())[1:]), "not for all other sites"),
        ("fgm_shares", "boxes", swap, "is not the one that it signed"),
        ("fgm_shares", "header", lambda h: {**h, "escrow": bytes(16)}, "signature does not fit"),
        ("fgm_vector", "session", bytes(32), "its upload is of another session"),
        ("fgm_vector", "schema", "fedgestalt.training.uploaded/2", "expected fedgestalt"),
        ("fgm_survivors", "signature", bytes(64), "its signature does not fit"),
        ("fgm_apply", "signature", bytes(64), "its signature does not fit"),
        ("fgm_apply", "record", lambda r: r.replace(b'"round":1', b'"round":2'), "differs from"),
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


def test_a_site_that_says_it_has_uploaded_and_has_not_is_named(tmp_path: Path) -> None:
    class Lazy(EnsembleTrainer):
        def send(self, name: str, ticket: str, words: Any) -> None:
            if self.site != "bonn":
                super().send(name, ticket, words)

    run = Consortium(tmp_path).run(JOB, lambda: Lazy(**JOB.executor_arguments()))
    assert reason(run) == "site 'bonn': its upload has 0 of 1 chunks; look at its log."


def test_a_site_cannot_upload_with_another_ones_ticket(tmp_path: Path) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", UPLOAD):
            data["fedgestalt"]["ticket"] = "0" * 32
        return data

    said = reason(Consortium(tmp_path, on_upload=tamper).run(JOB))
    assert said.startswith("site 'bonn': server: it refused chunk 0 of 1: the ticket is not this")


# --- wrong shares: any threshold of right ones will do -------------------------------------------


def wrong_share(fields: dict[str, bytes]) -> dict[str, bytes]:
    return {**fields, "berlin": bytes(len(fields["berlin"]))}


def test_a_wrong_share_is_named_and_the_sum_opened_by_the_others(
    four_sites: Consortium, plain_four: Plain, tmp_path: Path
) -> None:
    tamper = change("bonn", "fgm_unmask", "shares", wrong_share)
    last = Script().at("leuven", "fgm_unmask", "after", lambda: wait_for_bonn(consortium))
    consortium = Consortium(tmp_path, source=four_sites, on_upload=tamper, on_task=last)
    run = consortium.run(JOB)
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["warnings"] == [
        "site 'bonn': its seed share of site 'berlin' is a wrong one."
    ]
    assert run.outcome["ensemble"] == plain_four.digest(Summed(four_sites.sites))


def wait_for_bonn(consortium: Consortium) -> None:
    """The threshold is three of four: without bonn's, leuven's is the third that is right."""
    while "bonn" in consortium.bus.waiting[1]:
        time.sleep(0.002)


def test_too_few_right_shares_leave_the_sum_closed_and_the_job_ends_after_three_tries(
    tmp_path: Path,
) -> None:
    tamper = change("bonn", "fgm_unmask", "shares", wrong_share)
    run = Consortium(tmp_path, on_upload=tamper).run(JOB)
    said = reason(run)
    assert said.startswith("session: 2 of 3 sites have sent their shares, 3 are needed")
    again = [w for w in run.outcome["warnings"] if w.startswith("round 1 begins anew: session: ")]
    blamed = [w for w in run.outcome["warnings"] if w.startswith("site 'bonn': its seed share of")]
    assert (len(again), len(blamed)) == (2, 3)
    assert not list(tmp_path.rglob("weights.safetensors"))


# --- a site that is alive and too slow -----------------------------------------------------------


def too_slow(folder: Path, task: str, source: Consortium, **settings: Any) -> Run:
    """A job in which leuven has not answered when the time of one phase is up."""
    script = Script()
    consortium = Consortium(folder, source=source, on_task=script, **settings)
    script.at("leuven", task, "after", consortium.phase_ends_without("leuven", task))
    return consortium.run(JOB)


def test_a_silent_site_ends_the_handshake_if_too_few_are_left(
    tmp_path: Path, three_sites: Consortium
) -> None:
    run = too_slow(tmp_path, "fgm_join", three_sites)
    assert reason(run) == (
        "the job cannot start. leuven: no answer within 3600 seconds; look at its log, or raise the"
        " job's limits; nothing was trained or compared."
    )


def test_a_silent_site_does_not_hide_the_refusal_of_another(
    tmp_path: Path, four_sites: Consortium
) -> None:
    policy = {"bonn": {"jobs": ["match"]}}
    run = too_slow(tmp_path, "fgm_join", four_sites, site_settings=policy)
    said = reason(run)
    assert said.startswith("the job cannot start. bonn: this site does not take part in jobs of")
    assert not {"berlin", "leuven", "ulm"} & set(re.findall(r"\w+", said))
    (warning,) = run.outcome["warnings"]
    assert warning.startswith("site 'leuven': no answer within 3600 seconds; look at its log")


@pytest.mark.parametrize("task", ["fgm_train", "fgm_keys", "fgm_shares", "fgm_vector"])
def test_a_site_that_is_too_slow_costs_a_try_if_too_few_are_left(
    tmp_path: Path, three_sites: Consortium, task: str
) -> None:
    run = too_slow(tmp_path, task, three_sites)
    lost = f"phase {task}: site 'leuven': no answer within 3600 seconds; look at its log, or raise"
    assert run.outcome["warnings"][0].startswith(lost)
    # It is there again for the next try.
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["warnings"][1].startswith("round 1 begins anew: session: 2 ")


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
        ("fgm_enrol", "rows", lambda r: r * 2, "not of length 1"),
        ("fgm_enrol", "rows", lambda r: r * np.nan, "NaN"),
        ("fgm_enrol", "handles", lambda h: h[1:], "do not go with"),
        ("fgm_enrol", "kernel", "0" * 32, "it enrolled under kernel 0000"),
        ("fgm_kernel_seal", "boxes", lambda b: {}, "not for the agreed roster"),
        ("fgm_kernel_seal", "boxes", lambda b: dict.fromkeys(b, bytes(1136)), "does not open"),
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


@pytest.mark.parametrize("digest", ["../../../../tmp/elsewhere", "f" * 64, bytes(31), b""])
def test_a_server_cannot_make_a_site_write_elsewhere(tmp_path: Path, digest: str) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("bonn", "fgm_publish"):
            data["fedgestalt"]["model"] = digest
        return data

    consortium = Consortium(tmp_path, on_download=tamper)
    said = reason(consortium.run(JOB))
    assert "field 'model' " in said
    assert not list(consortium.store("bonn").rglob("weights.safetensors"))


def test_matching_without_a_named_ensemble_is_refused(both_jobs: BothJobs) -> None:
    said = reason(both_jobs.consortium.run(MatchingJob()))
    assert "is not 64 hexadecimal digits" in said
