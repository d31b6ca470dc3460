"""What a member trains, under masks: local objectives, local normalisation, server momentum."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Plain, Run, Script, Summed, nothing_happens, one_network
from safetensors.numpy import load_file

from fedgestalt.contracts import BackboneModules
from fedgestalt.federation.training.checkpoints import MODELS_FOLDER
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt_plugins.backbones import IResNet

FOUR = ("berlin", "bonn", "leuven", "ulm")
MOMENTUM = TrainingJob(ensemble=one_network(), rounds=3, server_momentum=0.9, max_update_norm=2.0)
NORM = "network/neck/features."


def training_with(**changes: Any) -> EnsembleSpec:
    (member,) = one_network().members
    training = member.training.model_copy(update=changes)
    return EnsembleSpec(members=(member.model_copy(update={"training": training}),))


ADAM = TrainingJob(
    ensemble=training_with(optimiser="sgd"),
    rounds=3,
    server_optimiser="adam",
    server_learning_rate=0.01,
    server_momentum=0.9,
)
both_optimisers = pytest.mark.parametrize("chosen", [MOMENTUM, ADAM], ids=["momentum", "adam"])


def published(consortium: Consortium, run: Run) -> dict[str, Any]:
    """What the sites hold at the end; the same everywhere."""
    digest = run.outcome["ensemble"]
    states = [
        load_file(consortium.store(site) / "ensembles" / digest / "weights.safetensors")
        for site in consortium.sites
    ]
    for state in states[1:]:
        assert all(np.array_equal(state[name], values) for name, values in states[0].items())
    return states[0]


# --- the server's optimiser ----------------------------------------------------------------------


@both_optimisers
@pytest.mark.parametrize("recipient", ["server", "sites"])
def test_with_an_optimiser_all_come_to_the_same_model(
    tmp_path: Path, four_sites: Consortium, recipient: str, chosen: TrainingJob
) -> None:
    job = chosen.model_copy(update={"reveal_aggregate_to": recipient})
    consortium, plain = Consortium(tmp_path, source=four_sites), Plain(four_sites, job)
    run = consortium.run(job)
    assert run.outcome["status"] == "completed", run.outcome
    said = run.outcome["aggregation"]
    assert (said["server_optimiser"], said["server_momentum"]) == (job.server_optimiser, 0.9)
    assert said["server_learning_rate"] == job.server_learning_rate
    assert run.outcome["ensemble"] == plain.digest(*[Summed(FOUR)] * 3)
    without = Plain(four_sites, job.model_copy(update={"server_momentum": 0.0}))
    assert run.outcome["ensemble"] != without.digest(*[Summed(FOUR)] * 3)
    assert published(consortium, run).keys() == plain.start.keys(), "the velocity is not published"


@both_optimisers
@pytest.mark.parametrize("recipient", ["server", "sites"])
def test_a_job_with_an_optimiser_goes_on_to_the_last_bit(
    tmp_path: Path, four_sites: Consortium, recipient: str, chosen: TrainingJob
) -> None:
    job = chosen.model_copy(update={"reveal_aggregate_to": recipient})
    script = Script().kill("leuven", "fgm_train", time=3).kill("ulm", "fgm_train", time=3)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    first = consortium.run(job)
    assert first.outcome["status"] == "failed", first.outcome
    consortium.on_task = nothing_happens
    resumed = job.model_copy(update={"resume_from": "job-1"})
    run = consortium.run(resumed, job_id="job-2", root=first.root)
    assert [r["round"] for r in run.outcome["rounds"]] == [1, 2, 3]
    assert run.outcome["ensemble"] == Plain(four_sites, job).digest(*[Summed(FOUR)] * 3)


@both_optimisers
def test_a_site_that_missed_a_round_is_given_what_the_optimiser_remembers_with_the_model(
    tmp_path: Path, four_sites: Consortium, chosen: TrainingJob
) -> None:
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("ulm", "fgm_keys", "before", lambda: consortium.cut("ulm"), time=2)
    script.at("bonn", "fgm_apply", "after", lambda: consortium.restore("ulm"), time=2)
    run = consortium.run(chosen)
    assert run.outcome["status"] == "completed", run.outcome
    assert [r["sites"] for r in run.outcome["rounds"]] == [list(s) for s in (FOUR, FOUR[:3], FOUR)]
    summed = [Summed(FOUR), Summed(FOUR[:3]), Summed(FOUR)]
    assert run.outcome["ensemble"] == Plain(four_sites, chosen).digest(*summed)


@pytest.mark.parametrize(
    "change",
    [{"server_momentum": 0.5}, {"server_learning_rate": 0.5}, {"server_optimiser": "adam"}],
    ids=lambda change: next(iter(change)),
)
def test_another_optimiser_does_not_go_on_with_a_job(
    tmp_path: Path, four_sites: Consortium, change: dict[str, Any]
) -> None:
    script = Script().kill("leuven", "fgm_train", time=2).kill("ulm", "fgm_train", time=2)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    first = consortium.run(MOMENTUM)
    consortium.on_task = nothing_happens
    other = MOMENTUM.model_copy(update={**change, "resume_from": "job-1"})
    run = consortium.run(other, job_id="job-2", root=first.root)
    assert "the aggregation of this job is not that of job job-1" in run.outcome["reason"]


@pytest.mark.parametrize(("name", "value"), [("momentum", 0.5), ("learning_rate", 0.5)])
def test_sites_that_were_told_different_settings_open_no_sum(
    tmp_path: Path, three_sites: Consortium, name: str, value: float
) -> None:
    def lie(site: str, task: str, data: Any) -> Any:
        if (site, task) == ("bonn", "fgm_join"):
            data["fedgestalt"][name] = value
        return data

    consortium = Consortium(tmp_path, source=three_sites, on_download=lie)
    run = consortium.run(MOMENTUM)
    assert run.outcome["status"] == "failed"
    assert "the model moves in another way than the job says" in str(run.outcome)
    assert run.signed == []


def test_the_norm_check_looks_at_what_the_momentum_makes_of_a_mean(
    tmp_path: Path, three_sites: Consortium
) -> None:
    """Every mean alone is within the bound; the steps that they add up to are not."""
    plain = Plain(three_sites, MOMENTUM)
    states = plain.states(*[Summed(three_sites.sites)] * 3)
    names = [name for name in states[0] if "running_" not in name]

    def size(change: dict[str, Any]) -> float:
        return float(sum(np.square(change[name], dtype=np.float64).sum() for name in names) ** 0.5)

    steps = [
        {name: after[name] - before[name] for name in names}
        for before, after in itertools.pairwise(states)
    ]
    means = [steps[0]] + [
        {name: new[name] - np.float32(0.9) * old[name] for name in names}
        for old, new in itertools.pairwise(steps)
    ]
    ratios = [size(step) / size(state) for step, state in zip(steps, states, strict=False)]
    own = [size(mean) / size(state) for mean, state in zip(means, states, strict=False)]
    assert max(ratios) > 1.2 * max(own), "or the test tests nothing"
    bound = (max(ratios) + max(own)) / 2
    settings = {"max_update_norm": 10.0}
    run = Consortium(tmp_path, source=three_sites, settings=settings).run(
        MOMENTUM.model_copy(update={"max_update_norm": bound})
    )
    assert run.outcome["status"] == "failed"
    assert "the mean of all updates" in run.outcome["reason"]
    assert "times as large as the model" in run.outcome["reason"]


# --- local objectives ----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"proximal": 0.5}, {"softmax": "present"}], ids=str)
def test_a_local_objective_works_under_masks(
    tmp_path: Path, three_sites: Consortium, changes: dict[str, Any]
) -> None:
    job = TrainingJob(ensemble=training_with(**changes), rounds=2, rule="class-weighted")
    consortium, plain = Consortium(tmp_path, source=three_sites), Plain(three_sites, job)
    run = consortium.run(job)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(three_sites.sites)] * 2)


def test_a_site_with_one_class_alone_refuses_a_restricted_softmax_with_a_sentence(
    tmp_path: Path,
) -> None:
    consortium = Consortium(tmp_path, without={"bonn": (11, 12)})
    run = consortium.run(TrainingJob(ensemble=training_with(softmax="present"), rounds=1))
    assert run.outcome["reason"].startswith(
        "the job cannot start. bonn: member 'network' has a softmax over the site's own classes,"
        " and all training images are of one class"
    )
    assert run.orders("fgm_train") == []


@pytest.mark.parametrize("changes", [{}, {"proximal": 0.5, "softmax": "present"}], ids=str)
def test_a_last_stage_trains_under_masks_and_alone_travels(
    tmp_path: Path, three_sites: Consortium, changes: dict[str, Any]
) -> None:
    (member,) = training_with(**changes).members
    ensemble = EnsembleSpec(members=(member.model_copy(update={"trainable": "last-stage"}),))
    job = TrainingJob(ensemble=ensemble, rounds=2)
    consortium, plain = Consortium(tmp_path, source=three_sites), Plain(three_sites, job)
    run = consortium.run(job)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(three_sites.sites)] * 2)
    whole = Plain(three_sites, TrainingJob(ensemble=one_network("all"))).first_plan().words
    neck = Plain(three_sites, TrainingJob(ensemble=one_network("neck"))).first_plan().words
    assert neck < plain.first_plan().words < whole
    assert run.outcome["rounds"][0]["uploaded_bytes_per_site"] == 4 * plain.first_plan().words


# --- normalisation that stays at the site --------------------------------------------------------


@pytest.fixture
def _licensed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone starts from weights, as far as it says."""
    build = IResNet.build

    def licensed(self: IResNet, options: Any, seed: int) -> BackboneModules:
        return dataclasses.replace(build(self, options, seed), weights_licence="CC0-1.0")

    monkeypatch.setattr(IResNet, "build", licensed)


@pytest.mark.usefixtures("_licensed")
@pytest.mark.parametrize("recipient", ["server", "sites"])
def test_pooled_normalisation_works_under_masks_and_is_shared(
    tmp_path: Path, three_sites: Consortium, recipient: str
) -> None:
    job = ADAM.model_copy(
        update={
            "ensemble": training_with(optimiser="sgd", batch_norm="pooled"),
            "reveal_aggregate_to": recipient,
        }
    )
    consortium, plain = Consortium(tmp_path, source=three_sites), Plain(three_sites, job)
    run = consortium.run(job)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(three_sites.sites)] * 3)
    assert run.outcome["ensemble"] != Plain(three_sites, ADAM).digest(
        *[Summed(three_sites.sites)] * 3
    )
    state = published(consortium, run)
    assert not np.array_equal(state[NORM + "running_mean"], plain.start[NORM + "running_mean"])


FEDBN = TrainingJob(ensemble=training_with(batch_norm="local"), rounds=3)


@pytest.mark.usefixtures("_licensed")
@pytest.mark.parametrize("recipient", ["server", "sites"])
def test_normalisation_stays_at_the_sites_and_the_start_s_is_published(
    tmp_path: Path, four_sites: Consortium, recipient: str
) -> None:
    job = FEDBN.model_copy(update={"reveal_aggregate_to": recipient})
    consortium, plain = Consortium(tmp_path, source=four_sites), Plain(four_sites, job)
    run = consortium.run(job)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(FOUR)] * 3)
    state = published(consortium, run)
    names = {"weight", "bias", "running_mean", "running_second_moment"}
    assert {name.removeprefix(NORM) for name in state if name.startswith(NORM)} == names
    for name, values in plain.start.items():
        assert np.array_equal(state[name], values) == name.startswith(NORM), name
    assert not [t.name for t in plain.first_plan().tensors if t.name.startswith(NORM)]
    haystack = b"|".join(message.payload for message in run.received)
    for site in FOUR:
        new, _ = plain.train(site, plain.start, 1)
        raw = new[NORM + "running_mean"].tobytes()
        assert not [n for n in range(0, len(raw) - 12, 4) if raw[n : n + 12] in haystack]


@pytest.mark.usefixtures("_licensed")
@pytest.mark.parametrize(
    "job", [FEDBN, FEDBN.model_copy(update={"scope": "encoder"})], ids=["all", "encoder"]
)
def test_a_job_that_goes_on_finds_what_stays_at_the_sites_as_it_was(
    tmp_path: Path, four_sites: Consortium, job: TrainingJob
) -> None:
    script = Script().kill("leuven", "fgm_train", time=3).kill("ulm", "fgm_train", "after", 3)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    first = consortium.run(job)
    assert first.outcome["status"] == "failed", first.outcome
    for site in FOUR:
        kept = sorted((consortium.store(site) / MODELS_FOLDER).glob("*.own"))
        assert len(kept) == 2
        assert {load_file(path)[NORM + "weight"].shape for path in kept} == {(8,)}
    consortium.on_task = nothing_happens
    resumed = job.model_copy(update={"resume_from": "job-1"})
    run = consortium.run(resumed, job_id="job-2", root=first.root)
    assert run.outcome["ensemble"] == Plain(four_sites, job).digest(*[Summed(FOUR)] * 3)
