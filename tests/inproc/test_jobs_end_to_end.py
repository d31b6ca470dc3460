"""Both jobs do what they say: exact sums, identical ranks, the same model everywhere."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from consortium import BothJobs, Consortium, Plain, Received, Run, Summed, tiny_ensemble
from nvflare.apis.shareable import Shareable
from safetensors.numpy import load_file

from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.federation.training.checkpoints import MODELS_FOLDER, SiteCheckpoints
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import MatchingJob, TrainingJob
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import shared_state_digest
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import load_ensemble
from fedgestalt.messages import size_of
from fedgestalt.similarity.evaluation import rank_tables
from fedgestalt.similarity.order import image_order


def test_the_model_is_the_plain_fixed_point_mean_of_all_updates_bit_for_bit(
    both_jobs: BothJobs,
) -> None:
    run, consortium = both_jobs.training, both_jobs.consortium
    plain = Plain(consortium, TrainingJob(ensemble=tiny_ensemble()))
    start, first, second = plain.states(*[Summed(consortium.sites)] * 2)
    assert all(np.abs(second[name] - first[name]).max() > 0 for name in first)
    assert all(np.abs(first[name] - start[name]).max() > 0 for name in first)
    assert run.outcome["ensemble"] == plain.outline.digest(second)
    for folder in (run.folder, *map(consortium.store, consortium.sites)):
        (stored,) = folder.rglob("weights.safetensors")
        published = load_file(stored)
        assert published.keys() == second.keys()
        for name, values in second.items():
            assert np.array_equal(published[name], values), (folder, name)


def test_every_site_keeps_the_model_of_every_round_and_signs_it(both_jobs: BothJobs) -> None:
    run, consortium = both_jobs.training, both_jobs.consortium
    plain = Plain(consortium, TrainingJob(ensemble=tiny_ensemble()))
    states = plain.states(*[Summed(consortium.sites)] * 2)
    digests = [shared_state_digest(state) for state in states]
    assert [bytes.fromhex(r["model_after"]) for r in run.signed] == digests[1:]
    assert [bytes.fromhex(r["model_before"]) for r in run.signed] == digests[:-1]
    assert [r["survivors"] for r in run.signed] == [sorted(consortium.sites)] * 2
    for site in consortium.sites:
        kept = SiteCheckpoints(consortium.store(site) / MODELS_FOLDER)
        for digest, state in zip(digests[1:], states[1:], strict=True):
            found = kept.find(digest)
            assert found is not None
            assert all(np.array_equal(found[name], values) for name, values in state.items())
            assert kept.times_sent(digest) == (digest == digests[1])
        assert kept.times_sent(digests[0]) == 1


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
    job = both_jobs.matching.outcome["job"]
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
        stored = json.loads((consortium.store(site) / "matches" / f"{job}.json").read_text())
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
    job_rows = first.replies("fgm_enrol")
    again = both_jobs.consortium.run(MatchingJob(ensemble=both_jobs.training.outcome["ensemble"]))
    assert again.outcome["kernel"] != first.outcome["kernel"]
    for site, fields in again.replies("fgm_enrol").items():
        assert fields["rows"].shape == job_rows[site]["rows"].shape
        assert np.abs(fields["rows"] - job_rows[site]["rows"]).max() > 0.01


def sizes(messages: Iterable[tuple[str, Shareable]]) -> Counter[str]:
    """Bytes of content by site."""
    total: Counter[str] = Counter()
    for site, message in messages:
        total[site] += size_of(message["fedgestalt"])
    return total


def tasks_of(run: Run) -> list[Received]:
    """The answers to tasks, without what came beside them."""
    return [message for message in run.received if message.task not in {UPLOAD, DOWNLOAD}]


@pytest.mark.parametrize("job", ["training", "matching"])
def test_the_outcome_counts_the_bytes_that_were_sent_and_received(
    both_jobs: BothJobs, job: str
) -> None:
    run: Run = getattr(both_jobs, job)
    counted, rounds = run.outcome["bytes"], run.outcome.get("rounds", [])
    vectors = sum(record["uploaded_bytes_per_site"] for record in rounds)
    assert vectors > 100_000 if job == "training" else not vectors
    sent = sizes((site, data) for site, _, data in run.sent)
    received = sizes((message.site, message.reply) for message in tasks_of(run))
    for site in both_jobs.consortium.sites:
        # Of each round, a site uploads its vector and downloads the sum.
        assert counted[site]["sent_to"] == sent[site] + vectors
        assert counted[site]["received_from"] == received[site] + vectors
        uploads = [
            len(message.reply["fedgestalt"]["words"])
            for message in run.received
            if (message.site, message.task) == (site, UPLOAD)
        ]
        assert sum(uploads) == vectors
    assert counted.keys() == set(both_jobs.consortium.sites)
    assert min(c["received_from"] for c in counted.values()) > 1000


def test_every_site_has_a_record_of_all_that_left_it(both_jobs: BothJobs) -> None:
    for site in both_jobs.consortium.sites:
        lines = (both_jobs.consortium.store(site) / "sent.jsonl").read_text().splitlines()
        recorded = [json.loads(line) for line in lines]
        received = [
            message
            for run in (both_jobs.training, both_jobs.matching)
            for message in run.received
            if message.site == site and message.task != DOWNLOAD
        ]
        expected = [
            ("fgm_vector", "masked vector")
            if message.task == UPLOAD
            else (message.task, message.reply["fedgestalt"]["schema"])
            for message in received
        ]
        recorded = recorded[: len(expected)]  # other tests run jobs on the same consortium
        assert [(line["task"], line["message"]) for line in recorded] == expected
        counted = (both_jobs.training.outcome["bytes"], both_jobs.matching.outcome["bytes"])
        assert sum(line["bytes"] for line in recorded) == sum(
            by_site[site]["received_from"] for by_site in counted
        )


def test_an_honest_run_has_no_warnings(both_jobs: BothJobs) -> None:
    assert both_jobs.training.outcome["warnings"] == []
    assert both_jobs.matching.outcome["warnings"] == []
