"""A little of the real work: what it measures, and that it leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from consortium import tiny_ensemble
from doctor_trial import TINY_JOB, Hospital, by_state, left_alone, named
from safetensors.numpy import load_file

from fedgestalt.cohort import Cohort, read_cohort
from fedgestalt.doctor import dry_run
from fedgestalt.doctor.work import Work, traffic, work_of
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.federation.training.checkpoints import SiteCheckpoints
from fedgestalt.federation.training.model import GlobalModel
from fedgestalt.federation.training.rounds import (
    Aggregation,
    exponents_of,
    first_ranges,
    number_plan,
    row_weights,
    shapes_of,
    with_metrics,
)
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.data import training_set
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import Ensemble, build_ensemble, read_shared_state
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.images import load_faces
from fedgestalt.learning.store import save_ensemble
from fedgestalt.learning.training import LocalTrainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cohort(cohort_folder: Path) -> Cohort:
    return read_cohort(cohort_folder)


@pytest.fixture
def ensemble(cohort: Cohort) -> Ensemble:
    spec = dry_run.one_epoch(tiny_ensemble())
    return build_ensemble(spec, len(cohort.classes), get_registry())


@pytest.fixture
def work(ensemble: Ensemble, cohort: Cohort) -> Work:
    return work_of(TINY_JOB, ensemble, cohort, CPU)


def figures(checks: list[Any]) -> dict[str, Any]:
    (found,) = checks
    assert found.state == "ok", found
    return dict(found.figures)


def test_nothing_is_left_behind(site: Hospital) -> None:
    site.store.mkdir(mode=0o700)
    (site.store / "cache").mkdir()
    before = torch.get_num_threads(), torch.get_rng_state()
    with left_alone(site.store, site.data, site.kit):
        checks = site.examined(dry_run=True)
    assert {one.state for one in checks} == {"ok"}, checks
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_the_threads_of_the_policy_are_used(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def noted(*_: Any) -> list[Any]:
        used.append(torch.get_num_threads())
        return []

    monkeypatch.setattr(dry_run, "training", noted)
    monkeypatch.setattr(dry_run, "encoding", noted)
    before = torch.get_num_threads()
    site.policy(threads=before + 1)
    site.examined(dry_run=True)
    assert used == [before + 1] * 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("scope", ["all", "encoder"])
@pytest.mark.parametrize("rule", ["mean", "class-weighted"])
def test_an_update_has_the_words_that_a_trained_update_has_under_its_plan(
    ensemble: Ensemble, cohort: Cohort, scope: Any, rule: Any
) -> None:
    job = TrainingJob(ensemble=tiny_ensemble(), rounds=5, scope=scope, rule=rule)
    data, state = training_set(cohort), read_shared_state(ensemble)
    new, metrics = LocalTrainer(ensemble, data, CPU, 1).run_round(state, 1)
    chosen = Aggregation.named(
        scope=scope,
        rule=rule,
        recipient="server",
        threat_model="malicious",
        max_weight=100,
        optimiser="sgd",
        learning_rate=1.0,
        momentum=0.0,
    )
    shared = chosen.shared(state, ensemble.spec)
    exponents = exponents_of(first_ranges(shared, ensemble.spec))
    plan = number_plan(shapes_of(shared), exponents, 3, chosen, ensemble.spec, data.classes)
    update = with_metrics({name: new[name] - state[name] for name in shared}, metrics)
    sent = plan.encode(update, len(data.targets), row_weights(plan, data.targets))
    moved = traffic(job, work_of(job, ensemble, cohort, CPU))
    assert moved["sent_bytes_per_round"] == sent.nbytes
    assert moved["received_bytes_per_round"] == sent.nbytes
    assert moved["sent_bytes"] == moved["received_bytes"] == 5 * sent.nbytes


def test_the_models_that_a_training_leaves_take_the_bytes_that_they_really_take(
    ensemble: Ensemble, work: Work, tmp_path: Path
) -> None:
    state = read_shared_state(ensemble)
    save_ensemble(tmp_path / "ensemble", ensemble, state)
    rounds = SiteCheckpoints(tmp_path / "checkpoints")
    for number in range(5):
        model = GlobalModel({name: values + number for name, values in state.items()})
        rounds.keep(model.digest, model.state)
    files = map(load_file, tmp_path.rglob("*.safetensors"))
    left = sum(tensor.nbytes for file in files for tensor in file.values())
    assert work.disk_bytes - work.feature_bytes == left


def test_masked_rows_and_features_take_the_bytes_that_they_really_take(
    ensemble: Ensemble, cohort: Cohort, work: Work, tmp_path: Path
) -> None:
    faces = load_faces(cohort.records(cohort.images))
    rows = encode(ensemble, faces, CPU, tmp_path)
    assert work.masked_rows_bytes == rows.astype(np.float64).nbytes
    training = load_faces(cohort.records(cohort.train))
    trained = ensemble.members[0]
    variants = np.stack([training] * trained.spec.training.variants, axis=1)
    trunk_features(trained, variants, CPU, tmp_path)
    assert work.feature_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


def test_a_job_of_twice_the_rounds_takes_twice_the_time_of_its_rounds(
    ensemble: Ensemble, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_pace", lambda *_: dry_run.Pace(once=0.5, epoch=0.25))
    job = TrainingJob(ensemble=tiny_ensemble(), rounds=4)
    found = figures(dry_run.training(job, ensemble, cohort, CPU))
    count = len(cohort.train)
    assert found["training_images"] == count
    assert found["seconds_once"] == 2 * 0.5 * count  # two networks train, one epoch each
    assert found["seconds_per_round"] == 2 * 0.25 * count
    assert found["seconds"] == 2 * 0.5 * count + 4 * 2 * 0.25 * count


def test_the_epochs_of_the_job_count_and_not_those_of_the_dry_run(
    ensemble: Ensemble, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "_pace", lambda *_: dry_run.Pace(once=0.0, epoch=1.0))
    spec = tiny_ensemble()
    longer = spec.members[0].training.model_copy(update={"epochs": 7})
    first = spec.members[0].model_copy(update={"training": longer})
    job = TrainingJob(ensemble=spec.model_copy(update={"members": (first, *spec.members[1:])}))
    assert [m.training.epochs for m in dry_run.one_epoch(job.ensemble).members] == [1, 1, 1]
    found = figures(dry_run.training(job, ensemble, cohort, CPU))
    assert found["seconds_per_round"] == (7 + 1) * len(cohort.train)


def test_only_as_many_photographs_are_read_as_a_batch_takes(
    ensemble: Ensemble, cohort: Cohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = dry_run.training_set

    def noted(part: Cohort) -> Any:
        seen.append(len(part.train))
        return real(part)

    monkeypatch.setattr(dry_run, "training_set", noted)
    figures(dry_run.training(TINY_JOB, ensemble, cohort, CPU))
    assert len(cohort.train) > 8
    assert seen == [8]


def test_a_site_with_one_training_image_can_match_and_is_told_so(
    ensemble: Ensemble, cohort: Cohort
) -> None:
    lonely = replace(cohort, train=cohort.train[:1])
    (found,) = dry_run.training(TINY_JOB, ensemble, lonely, CPU)
    assert found.state == "warning"
    assert "can match" in found.remedy


def test_more_images_than_the_default_job_takes_are_a_warning(
    ensemble: Ensemble, cohort: Cohort
) -> None:
    job = TrainingJob(ensemble=tiny_ensemble(), max_images_per_site=2)
    (found,) = dry_run.training(job, ensemble, cohort, CPU)
    assert found.state == "warning"
    assert "max_images_per_site" in found.remedy


def test_a_loss_that_is_not_finite_is_a_problem(ensemble: Ensemble, cohort: Cohort) -> None:
    with torch.no_grad():
        next(ensemble.members[0].head.parameters()).fill_(float("nan"))
    (found,) = dry_run.training(TINY_JOB, ensemble, cohort, CPU)
    assert found.state == "problem"
    assert "not finite" in found.what


def test_start_weights_under_a_licence_that_the_site_does_not_take_are_a_warning() -> None:
    settings = SiteSettings(data="/data", store="/store", weight_licences=("MIT",))
    weights: Any = SimpleNamespace(licences={"fine-tuned": "Apache-2.0", "scratch": ""})
    (found,) = dry_run.licences(settings, weights)
    assert found.state == "warning"
    assert "Apache-2.0" in found.what
    (found,) = dry_run.licences(
        settings.model_copy(update={"weight_licences": ("Apache-2.0",)}), weights
    )
    assert found.state == "ok"


def test_a_job_whose_networks_are_not_installed_is_a_problem_of_one_check(site: Hospital) -> None:
    spec = tiny_ensemble()
    unknown = spec.members[0].model_copy(update={"backbone": "iresnit"})
    members = (unknown, *spec.members[1:])
    site.job = TrainingJob(ensemble=spec.model_copy(update={"members": members}))
    checks = site.examined(dry_run=True)
    assert by_state(checks)["problem"] == {"dry-run.model"}
    assert "did you mean 'iresnet'?" in named(checks, "dry-run.model").remedy
    assert by_state(checks)["skipped"] == {"dry-run.training"}


def test_a_slow_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(clock))
    assert dry_run._fastest(lambda: "done") == ("done", 9.0)


def test_of_several_measurements_the_fastest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.9, 1.0, 1.2, 2.0, 2.5])
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: next(clock))
    assert dry_run._fastest(lambda: None)[1] == pytest.approx(0.2)
