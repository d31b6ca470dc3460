"""Matching with several computing parties: no single one sees a score."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from consortium import BothJobs, Consortium, Run
from nvflare.apis.shareable import Shareable

from fedgestalt.jobs import MatchingJob

SHARES = {"strategy": "secret-shared"}
ALLOWED = {"evaluation_release": True}


def run(both_jobs: BothJobs, job_id: str, **fields: Any) -> Run:
    job = MatchingJob(ensemble=both_jobs.training.outcome["ensemble"], **SHARES, **fields)
    return both_jobs.consortium.run(job, job_id=job_id)


def tables(consortium: Consortium, site: str, job: str) -> list[dict[str, Any]]:
    path = consortium.store(site) / "matches" / f"{job}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text())["tables"]
    return found


@pytest.fixture(scope="module")
def shared(both_jobs: BothJobs) -> Run:
    return run(both_jobs, "shared")


def test_ranks_through_shares_are_those_through_masked_rows(
    both_jobs: BothJobs, shared: Run
) -> None:
    assert shared.outcome["status"] == "completed", shared.outcome
    assert shared.outcome["computing"] == ["berlin", "bonn"]
    assert shared.outcome["privacy"]["strategy"] == "secret-shared"
    for site in both_jobs.consortium.sites:
        masked = tables(both_jobs.consortium, site, both_jobs.matching.outcome["job"])
        assert tables(both_jobs.consortium, site, "shared") == masked
        assert any(table["ranks"] for table in masked)


def test_the_server_gets_no_row_and_no_score(both_jobs: BothJobs, shared: Run) -> None:
    tasks = {message.task for message in shared.received}
    assert {"fgm_enrol_shares", "fgm_compute", "fgm_rank_shares"} <= tasks
    assert "fgm_enrol" not in tasks
    for fields in shared.replies("fgm_enrol_shares").values():
        gallery, question = fields["parts"]
        assert len(gallery) < 32 + 4 * 32  # sizes and keys: its share is a keystream
        assert len(question) < 32 + 8 * 32
    for site, fields in shared.replies("fgm_compute").items():
        assert fields["answers"].keys() == set(both_jobs.consortium.sites) - {site}


def test_what_the_sites_seal_for_each_other_is_uniform(shared: Run) -> None:
    boxes = [
        box
        for task, key in (("fgm_enrol_shares", "boxes"), ("fgm_compute", "answers"))
        for fields in shared.replies(task).values()
        for box in fields[key].values()
    ]
    assert len(boxes) == 4 + 4
    bits = np.unpackbits(np.frombuffer(b"".join(boxes), np.uint8))
    assert len(bits) > 100_000
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(bits))


def test_rows_do_not_come_in_the_order_of_hospitals(shared: Run) -> None:
    handles = {
        site: {handle.tobytes() for handle in fields["handles"]}
        for site, fields in shared.replies("fgm_enrol_shares").items()
    }
    (order,) = {tuple(fields["order"]) for fields in shared.orders("fgm_compute")}
    for fields in shared.orders("fgm_rank_shares"):
        assert [len(handles[site]) for site in order] == list(fields["counts"])
        assert {handle.tobytes() for handle in fields["handles"]} == set().union(*handles.values())


@pytest.mark.parametrize(
    ("task", "key", "change", "says"),
    [
        ("fgm_compute", "boxes", lambda b: {**b, "leuven": b["leuven"][:-1]}, "does not open"),
        ("fgm_compute", "boxes", lambda b: {**b, "leuven": b""}, "is cut short"),
        ("fgm_compute", "order", lambda o: o[1:], "the order of owners is not theirs"),
        ("fgm_consider", "queries", lambda q: {}, "this site's queries came back altered"),
        ("fgm_enrol_shares", "computing", lambda c: ("berlin",), "2 different computing sites"),
        ("fgm_enrol_shares", "computing", lambda c: ("berlin", "paris"), "kernel or roster"),
        ("fgm_rank_shares", "answer", lambda a: a[:-8] + bytes(8), "is wrong"),
        ("fgm_rank_shares", "answer", lambda a: a[:-8], "cut short"),
        ("fgm_rank_shares", "counts", lambda c: (c[0] + 1, *c[1:]), "does not fit"),
        ("fgm_rank_shares", "labels", lambda rows: rows[::-1].copy(), "altered or moved"),
    ],
)
def test_a_server_that_meddles_is_caught(
    both_jobs: BothJobs,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    key: str,
    change: Any,
    says: str,
) -> None:
    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if (site, name) == ("bonn", task):
            data["fedgestalt"][key] = change(data["fedgestalt"][key])
        return data

    monkeypatch.setattr(both_jobs.consortium, "on_download", tamper)
    outcome = run(both_jobs, "meddled").outcome
    assert outcome["status"] == "failed"
    assert says in outcome["reason"]
    assert "bonn" in outcome["reason"]


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("parts", lambda p: (p[0][:-1], p[1]), "is not what"),
        ("parts", lambda p: (p[0], b""), "not about the rows that it names"),
        ("boxes", lambda b: {}, "not for the job's computing sites"),
        ("labels", lambda rows: rows[1:], "do not go with"),
        ("queries", lambda q: q[1:], "signature does not fit"),
    ],
)
def test_a_site_that_sends_something_wrong_is_named(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch, key: str, change: Any, says: str
) -> None:
    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if (site, name) == ("leuven", "fgm_enrol_shares"):
            data["fedgestalt"][key] = change(data["fedgestalt"][key])
        return data

    monkeypatch.setattr(both_jobs.consortium, "on_upload", tamper)
    outcome = run(both_jobs, "wrong").outcome
    assert outcome["status"] == "failed"
    assert says in outcome["reason"]
    assert "leuven" in outcome["reason"]


def test_a_site_that_releases_no_evaluation_takes_no_part(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        both_jobs.consortium, "site_settings", {"bonn": {"evaluation_release": False}}
    )
    assert "releases no scores of all images" in run(both_jobs, "refused").outcome["reason"]
