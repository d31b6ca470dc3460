"""Both jobs do what they say: exact sums, identical ranks, the same model everywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from consortium import BothJobs, Consortium, Run, plain_update, tiny_ensemble
from nvflare.apis.shareable import Shareable

from fedgestalt.federation.training.rounds import split_metrics
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import MatchingJob, TrainingJob
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import load_ensemble
from fedgestalt.messages import size_of
from fedgestalt.similarity.evaluation import rank_tables
from fedgestalt.similarity.order import image_order


def test_the_aggregate_equals_the_plain_fixed_point_mean_bit_for_bit(both_jobs: BothJobs) -> None:
    run = both_jobs.training
    starts = [data["fedgestalt"] for _, task, data in run.sent if task == "fgm_round"]
    first, second = (next(s for s in starts if s["round"] == r) for r in (1, 2))
    sites = [plain_update(both_jobs.consortium, run, site) for site in both_jobs.consortium.sites]
    total = np.add.reduce([site.words for site in sites], dtype=np.uint32)
    mean, _ = split_metrics(sites[0].plan.decode(total).mean)
    assert any(np.abs(values).max() > 0 for values in mean.values())
    for name, values in mean.items():
        assert np.array_equal(second["state"][name], first["state"][name] + values), name


def test_every_site_stores_the_published_model(both_jobs: BothJobs) -> None:
    digest = both_jobs.training.outcome["ensemble"]
    for site in both_jobs.consortium.sites:
        folder = both_jobs.consortium.store(site) / "ensembles" / digest
        _, stored = load_ensemble(folder, get_registry())
        assert stored == digest


def test_ranks_through_masked_flake_equal_ranks_from_plaintext_encodings(
    both_jobs: BothJobs,
) -> None:
    consortium = both_jobs.consortium
    digest = both_jobs.training.outcome["ensemble"]
    encodings, orders = {}, {}
    for site in consortium.sites:
        folder = consortium.store(site) / "ensembles" / digest
        ensemble, _ = load_ensemble(folder, get_registry())
        cohort = consortium.silos[site]
        orders[site] = image_order(cohort)
        faces = load_faces(cohort.records(orders[site].image_ids))
        encodings[site] = encode(ensemble, faces, torch.device("cpu"))
    everything = np.concatenate(list(encodings.values())).astype(np.float64)
    syndromes = np.concatenate([order.syndromes for order in orders.values()])
    roles = np.concatenate([order.roles for order in orders.values()])
    kernel = both_jobs.matching.outcome["kernel"]
    compared = 0
    for site, order in orders.items():
        queries = slice(0, order.queries)
        plain = rank_tables(
            encodings[site][queries].astype(np.float64) @ everything.T,
            order.syndromes[queries],
            order.roles[queries],
            syndromes,
            roles,
        )
        stored = json.loads((consortium.store(site) / "matches" / f"{kernel}.json").read_text())
        assert [t["ranks"] for t in stored["tables"]] == [t.ranks.tolist() for t in plain]
        assert [t["rows"] for t in stored["tables"]] == [t.rows.tolist() for t in plain]
        compared += sum(len(t.ranks) for t in plain)
    assert compared > 100


def test_a_run_is_a_function_of_data_and_seed(both_jobs: BothJobs, tmp_path) -> None:
    again = Consortium(tmp_path).run(TrainingJob(ensemble=tiny_ensemble(), rounds=2))
    other = Consortium(tmp_path / "other").run(TrainingJob(ensemble=tiny_ensemble(2), rounds=2))
    assert again.outcome["ensemble"] == both_jobs.training.outcome["ensemble"]
    assert other.outcome["ensemble"] != both_jobs.training.outcome["ensemble"]


def test_two_sessions_mask_the_same_images_differently(both_jobs: BothJobs) -> None:
    first = both_jobs.matching
    job_rows = first.replies("fgm_encode")
    again = both_jobs.consortium.run(MatchingJob(ensemble=both_jobs.training.outcome["ensemble"]))
    assert again.outcome["kernel"] != first.outcome["kernel"]
    for site, fields in again.replies("fgm_encode").items():
        assert fields["rows"].shape == job_rows[site]["rows"].shape
        assert np.abs(fields["rows"] - job_rows[site]["rows"]).max() > 0.01


def sizes(messages: Iterable[tuple[str, Shareable]]) -> dict[str, int]:
    """Bytes of content by site."""
    total: Counter[str] = Counter()
    for site, message in messages:
        total[site] += size_of(message["fedgestalt"])
    return dict(total)


@pytest.mark.parametrize("job", ["training", "matching"])
def test_the_outcome_counts_the_bytes_that_were_sent_and_received(
    both_jobs: BothJobs, job: str
) -> None:
    run: Run = getattr(both_jobs, job)
    counted = run.outcome["bytes"]
    assert {site: c["sent_to"] for site, c in counted.items()} == sizes(
        (site, data) for site, _, data in run.sent
    )
    assert {site: c["received_from"] for site, c in counted.items()} == sizes(
        (message.site, message.reply) for message in run.received
    )
    assert counted.keys() == set(both_jobs.consortium.sites)
    assert min(c["received_from"] for c in counted.values()) > 1000


def test_every_site_has_a_record_of_all_that_left_it(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path)
    run = consortium.run(TrainingJob(ensemble=tiny_ensemble(), rounds=2))
    for site in consortium.sites:
        lines = (consortium.store(site) / "sent.jsonl").read_text().splitlines()
        recorded = [json.loads(line) for line in lines]
        received = [message for message in run.received if message.site == site]
        assert [line["task"] for line in recorded] == [message.task for message in received]
        assert [line["message"] for line in recorded] == [
            message.reply["fedgestalt"]["schema"] for message in received
        ]
        assert (
            sum(line["bytes"] for line in recorded) == (run.outcome["bytes"][site]["received_from"])
        )


def test_an_honest_run_has_no_warnings(both_jobs: BothJobs) -> None:
    assert both_jobs.training.outcome["warnings"] == []
    assert both_jobs.matching.outcome["warnings"] == []
