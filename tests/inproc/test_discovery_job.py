"""Whole discovery jobs: groups of alike unsolved cases, each hospital told of its own alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from consortium import HIDDEN_GROUPS, BothJobs, Consortium, Run
from nvflare.apis.shareable import Shareable

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import DiscoveryJob
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import load_ensemble
from fedgestalt.similarity.labels import HANDLE_BYTES, SEALED_BYTES

JOB = "discovery"
SITES = ("berlin", "bonn", "leuven")


@pytest.fixture(scope="module")
def willing(both_jobs: BothJobs) -> Iterator[Consortium]:
    """The consortium, all of whose sites allow a discovery; one lets others know who it is."""
    consortium = both_jobs.consortium
    before = consortium.settings, consortium.site_settings
    consortium.settings = {"discovery": True}
    consortium.site_settings = {"bonn": {"reveal_hospital": True}}
    yield consortium
    consortium.settings, consortium.site_settings = before


@pytest.fixture(scope="module")
def search(both_jobs: BothJobs, willing: Consortium) -> Run:
    job = DiscoveryJob(ensemble=both_jobs.training.outcome["ensemble"])
    run = willing.run(job, job_id=JOB)
    assert run.outcome["status"] == "completed", run.outcome
    return run


def stored(consortium: Consortium, site: str, job: str = JOB) -> dict[str, Any]:
    path = consortium.store(site) / "discoveries" / f"{job}.json"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def subjects_of(handles: list[dict[str, Any]]) -> list[str]:
    return [case["subject"] for case in handles if case["subject"]]


def test_the_hidden_groups_come_up_and_each_hospital_knows_its_own_member(
    willing: Consortium, search: Run
) -> None:
    cases = sum(len({r.subject for r in c.unsolved.values()}) for c in willing.silos.values())
    assert search.outcome["cases"] == cases
    found = {site: stored(willing, site)["groups"] for site in SITES}
    for hidden in range(HIDDEN_GROUPS):
        holding = []
        for number, site in enumerate(SITES):
            own = f"UNSOLVED-SUBJECT-{number}{hidden:02d}"
            (group,) = [g for g in found[site] if own in subjects_of(g["cases"])]
            holding.append(frozenset(case["case"] for case in group["cases"]))
            assert 0 < group["q_random"] <= 0.05
            assert 0 < group["p_search"] <= 1
        assert len(set(holding)) == 1, "the three hospitals hear of the same group"
        assert len(holding[0]) >= len(SITES)


def test_a_hospital_hears_of_no_group_without_a_case_of_its_own(
    willing: Consortium, search: Run
) -> None:
    for site in SITES:
        content = stored(willing, site)
        assert content["own_cases"] == len(
            {r.subject for r in willing.silos[site].unsolved.values()}
        )
        for group in content["groups"]:
            assert subjects_of(group["cases"])


def test_of_other_hospitals_cases_a_result_holds_handles_and_who_lets_others_know(
    willing: Consortium, search: Run
) -> None:
    hospitals = set()
    for site in SITES:
        others = {
            s
            for o in SITES
            if o != site
            for s in (r.subject for r in willing.silos[o].unsolved.values())
        }
        text = (willing.store(site) / "discoveries" / f"{JOB}.json").read_text()
        assert not [subject for subject in others if subject in text]
        for group in stored(willing, site)["groups"]:
            foreign = [case for case in group["cases"] if not case["subject"]]
            assert all(re.fullmatch("[0-9a-f]{32}", case["case"]) for case in foreign)
            hospitals |= {case["hospital"] for case in foreign}
    assert hospitals == {"", "bonn"}


def test_a_result_says_what_it_is_not(willing: Consortium, search: Run) -> None:
    content = stored(willing, "berlin")
    assert content["notice"] == RESEARCH_USE_ONLY
    assert "q_random alone is no evidence" in content["says"]
    path = willing.store("berlin") / "discoveries" / f"{JOB}.json"
    assert path.stat().st_mode & 0o077 == 0


def test_the_server_sees_one_row_a_case_and_nothing_that_names_it(
    willing: Consortium, search: Run
) -> None:
    assert {m.task for m in search.received if m.task != "fgm.ping"} == {
        *("fgm_match_start", "fgm_kernel_holdings", "fgm_kernel_keys", "fgm_kernel_seal"),
        *("fgm_kernel_agree", "fgm_cases", "fgm_groups"),
    }
    texts = ["UNSOLVED-SUBJECT", "UNSOLVED-IMAGE", "_rot_aligned", str(willing.folder)]
    for message in search.received:
        assert not [text for text in texts if text.encode() in message.payload]
    for site, fields in search.replies("fgm_cases").items():
        assert set(fields) == {"schema", "kernel", "rows", "handles", "labels"}
        cases = len({r.subject for r in willing.silos[site].unsolved.values()})
        assert len(fields["rows"]) == cases
        assert fields["handles"].shape == (cases, HANDLE_BYTES)
        assert fields["labels"].shape == (cases, SEALED_BYTES)
        assert len(np.unique(fields["labels"], axis=0)) == cases
    for fields in search.replies("fgm_groups").values():
        assert set(fields) == {"schema", "kernel"}


def test_the_rows_are_those_of_pooled_photographs_and_masked(
    both_jobs: BothJobs, willing: Consortium, search: Run
) -> None:
    plain, masked = [], []
    for site, fields in sorted(search.replies("fgm_cases").items()):
        folder = willing.store(site) / "ensembles" / both_jobs.training.outcome["ensemble"]
        ensemble, _ = load_ensemble(folder, get_registry())
        records = list(willing.silos[site].unsolved.values())
        encodings = encode(ensemble, load_faces(records), torch.device("cpu"))
        subjects = np.array([record.subject for record in records])
        sums = np.array([encodings[subjects == s].sum(0) for s in np.unique(subjects)])
        plain.append(sums / np.linalg.norm(sums, axis=1, keepdims=True))
        masked.append(fields["rows"])
    one, other = np.concatenate(plain), np.concatenate(masked)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(one @ one.T), np.linalg.eigvalsh(other @ other.T), atol=1e-4
    )
    assert np.abs(one @ other.T).max() < 0.9, "no masked row is anybody's encoding"


def test_what_the_server_keeps_and_tells_the_lead_names_no_case(search: Run) -> None:
    assert {"cases", "groups", "privacy"} <= search.outcome.keys()
    assert "Of each group that holds a case" in search.outcome["privacy"]["asking_site_learns"]
    files = [p for p in search.folder.rglob("*") if p.is_file()]
    assert files
    for path in files:
        assert b"UNSOLVED" not in path.read_bytes()
    handles = [
        h.tobytes().hex() for f in search.replies("fgm_cases").values() for h in f["handles"]
    ]
    text = json.dumps(search.outcome)
    assert not [handle for handle in handles if handle in text]


def run_with(both_jobs: BothJobs, **fields: Any) -> dict[str, Any]:
    job = DiscoveryJob(ensemble=both_jobs.training.outcome["ensemble"], **fields)
    return both_jobs.consortium.run(job, job_id="another").outcome


def test_a_site_takes_part_only_if_its_policy_says_so(
    both_jobs: BothJobs, willing: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(willing, "site_settings", {"leuven": {"discovery": False}})
    outcome = run_with(both_jobs)
    assert outcome["status"] == "failed"
    assert "leuven" in outcome["reason"]
    assert "compares no unsolved case" in outcome["reason"]


def test_a_discovery_needs_no_leave_to_match(
    both_jobs: BothJobs, willing: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(willing, "site_settings", {"leuven": {"jobs": ["discover"]}})
    assert run_with(both_jobs)["status"] == "completed"


def test_a_strategy_with_several_parties_is_refused(
    both_jobs: BothJobs, willing: Consortium
) -> None:
    outcome = run_with(both_jobs, strategy="secret-shared")
    assert outcome["status"] == "failed"
    assert "needs 3 computing parties; here the server compares alone" in outcome["reason"]


def test_groups_that_a_search_finds_anyway_can_be_left_out(
    both_jobs: BothJobs, willing: Consortium
) -> None:
    assert run_with(both_jobs, search_level=0.001)["groups"] == 0


def _swap(values: np.ndarray) -> np.ndarray:
    return values[::-1].copy()


def tampering(at: str, task: str, key: str, change: Callable[[Any], Any]) -> Any:
    """Changes one field of the messages of one task at one site."""

    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if (site, name) == (at, task):
            data["fedgestalt"][key] = change(data["fedgestalt"][key])
        return data

    return tamper


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("labels", _swap, "altered or moved"),
        ("handles", lambda h: h[1:], "do not go with"),
        ("groups", lambda g: g + 1, "has no case"),
        ("p_search", lambda p: p[1:], "not of the same groups"),
        ("compared", lambda _: -1, "outside"),
    ],
)
def test_a_server_that_meddles_with_groups_is_caught(
    both_jobs: BothJobs,
    willing: Consortium,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    change: Any,
    says: str,
) -> None:
    monkeypatch.setattr(willing, "on_download", tampering("bonn", "fgm_groups", key, change))
    outcome = run_with(both_jobs)
    assert outcome["status"] == "failed"
    assert says in outcome["reason"]


def test_a_group_without_an_own_case_is_refused(
    both_jobs: BothJobs, willing: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def tamper(site: str, name: str, data: Shareable) -> Shareable:
        if name == "fgm_groups":
            fields = data["fedgestalt"]
            own = {h.tobytes() for h in seen[site]}
            keep = np.array([h.tobytes() not in own for h in fields["handles"]])
            if site == "bonn":
                for key in ("handles", "labels", "groups"):
                    fields[key] = fields[key][keep]
        return data

    def note(site: str, name: str, data: Shareable) -> Shareable:
        if name == "fgm_cases":
            seen[site] = data["fedgestalt"]["handles"]
        return data

    monkeypatch.setattr(willing, "on_upload", note)
    monkeypatch.setattr(willing, "on_download", tamper)
    outcome = run_with(both_jobs)
    assert outcome["status"] == "failed"
    assert "a group came that holds no case of this site" in outcome["reason"]


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        ("rows", lambda r: r * 2, "not of length 1"),
        ("handles", lambda h: np.repeat(h[:1], len(h), 0), "sent a row twice"),
        ("labels", lambda rows: rows[1:], "do not go with"),
        ("kernel", lambda k: "0" * 32, "under kernel"),
        ("rows", lambda r: np.eye(len(r), 9, dtype=np.float32), "other dimensions"),
    ],
)
def test_a_site_that_sends_wrong_cases_is_named(
    both_jobs: BothJobs,
    willing: Consortium,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    change: Any,
    says: str,
) -> None:
    monkeypatch.setattr(willing, "on_upload", tampering("leuven", "fgm_cases", key, change))
    outcome = run_with(both_jobs)
    assert outcome["status"] == "failed"
    assert says in outcome["reason"]


def test_a_matching_task_is_unknown_in_a_discovery(
    both_jobs: BothJobs, willing: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = []

    def on_task(site: str, task: str, when: str) -> None:
        if (site, task, when) == ("bonn", "fgm_groups", "before"):
            kernel = willing.bus.run.replies("fgm_kernel_agree")["bonn"]["kernel"]
            fields = {
                "schema": "fedgestalt.matching.enrol/1",
                "kernel": kernel,
                "ask": 1,
                "handles": np.empty((0, HANDLE_BYTES), np.uint8),
            }
            replies.append(willing.demand("bonn", "fgm_enrol", fields))

    monkeypatch.setattr(willing, "on_task", on_task)
    assert run_with(both_jobs)["status"] == "completed"
    (reply,) = replies
    assert "knows no task" in json.dumps({k: str(v) for k, v in reply.items()})


def test_a_site_without_unsolved_cases_takes_part(
    both_jobs: BothJobs, willing: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = willing.data / "leuven" / "gmdb_metadata"
    (listing,) = metadata.glob("gmdb_unsolved_images_*.csv")
    away = tmp_path / listing.name
    away.write_bytes(listing.read_bytes())
    listing.unlink()
    try:
        outcome = run_with(both_jobs)
    finally:
        listing.write_bytes(away.read_bytes())
    assert outcome["status"] == "completed", outcome
    assert stored(willing, "leuven", "another")["own_cases"] == 0
    assert stored(willing, "leuven", "another")["groups"] == []
