"""Updates and labels that would spoil the model for all: who notices, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Run, tiny_ensemble
from nvflare.apis.shareable import Shareable

from fedgestalt.cohort import Cohort
from fedgestalt.federation.job.transfer import UPLOAD
from fedgestalt.federation.training import executor as trainer_module
from fedgestalt.federation.training.executor import EnsembleTrainer
from fedgestalt.federation.training.rounds import UNKNOWN
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.data import held_out_set, local_seed
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet

JOB = TrainingJob(ensemble=tiny_ensemble(), rounds=2)
HUGE = 1e30
POISON = 1e6


def trainer(
    job: TrainingJob, site: str, change: Callable[[Any, Any], Any]
) -> Callable[[], EnsembleTrainer]:
    """Executors of which ``site``'s changes every tensor (old, new) that its training gives."""

    class Changed(EnsembleTrainer):
        def _join(self, fields: object) -> Any:
            present = super()._join(fields)
            if self.site == site:
                run_round = self._joined.run_round

                def changed(state: Any, *arguments: Any) -> Any:
                    new, metrics = run_round(state, *arguments)
                    return {n: change(state[n], values) for n, values in new.items()}, metrics

                self._joined.run_round = changed  # type: ignore[method-assign]
            return present

    return lambda: Changed(job.executor_arguments()["ensemble"])


def poisoned(old: Any, new: Any) -> Any:
    return old + (new - old) * np.float32(POISON)


def reason(run: Run) -> str:
    assert run.outcome["status"] == "failed"
    assert run.panics == [run.outcome["reason"]]
    return str(run.outcome["reason"])


def summed(run: Run) -> set[str]:
    """Sites that sent a masked update for the sum."""
    return {message.site for message in run.received if message.task == UPLOAD}


# --- updates that are refused --------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused_at_its_site_before_it_is_masked(
    tmp_path: Path, value: float
) -> None:
    change = lambda old, new: new * np.float32(value)  # noqa: E731
    run = Consortium(tmp_path).run(JOB, trainer(JOB, "bonn", change))
    said = reason(run)
    assert said.startswith("site 'bonn': ")
    assert "this site's update holds NaN or infinity" in said
    assert "lower the learning rate" in said
    assert "bonn" not in summed(run)


def test_an_update_that_is_far_too_large_is_refused_at_its_site_before_it_is_masked(
    tmp_path: Path,
) -> None:
    run = Consortium(tmp_path).run(JOB, trainer(JOB, "bonn", poisoned))
    said = reason(run)
    assert said.startswith("site 'bonn': this site's update is ")
    assert "times as large as the model, at most 1 is allowed" in said
    assert "its training has diverged" in said
    assert "bonn" not in summed(run)


CARELESS = {"bonn": {"max_update_norm": HUGE}}


def test_the_server_refuses_a_mean_that_one_site_has_spoilt_and_names_nobody(
    tmp_path: Path,
) -> None:
    run = Consortium(tmp_path, site_settings=CARELESS).run(JOB, trainer(JOB, "bonn", poisoned))
    said = reason(run)
    assert said.startswith("the mean of all updates is ")
    assert "times as large as the model, at most 1 is allowed" in said
    assert "under the masks nobody can tell which" in said
    assert "run the job without one site at a time" in said
    assert "bonn" not in said
    assert summed(run) == {"berlin", "bonn", "leuven"}
    assert not list(tmp_path.rglob("weights.safetensors"))


@pytest.mark.parametrize("rounds", [1, 2])
def test_other_sites_refuse_what_a_careless_server_made_of_it(tmp_path: Path, rounds: int) -> None:
    job = JOB.model_copy(update={"max_update_norm": HUGE, "rounds": rounds})
    consortium = Consortium(tmp_path, site_settings=CARELESS)
    run = consortium.run(job, trainer(job, "bonn", poisoned))
    said = reason(run)
    refusing = said.partition(": ")[0]
    assert refusing in {"site 'berlin'", "site 'leuven'"}
    assert ": the consortium's last update is " in said
    assert "under the masks nobody can tell which" in said
    assert "bonn" not in said
    for site in ("berlin", "leuven"):
        assert not list(consortium.store(site).rglob("weights.safetensors"))
    trained = [message.site for message in run.received if message.task == "fgm_train"]
    assert sorted(trained) == ["berlin", "bonn", "leuven"], "nobody trains on a spoilt model"


def test_an_honest_job_stays_far_below_the_bound(tmp_path: Path) -> None:
    tight = {"max_update_norm": JOB.max_update_norm / 10}
    job = JOB.model_copy(update=tight)
    run = Consortium(tmp_path, settings=tight).run(job)
    assert run.outcome["status"] == "completed", run.outcome


# --- labels --------------------------------------------------------------------------------------

SITES = ("berlin", "bonn", "leuven", "paris", "ulm")
LEARNS = TrainingSpec(
    epochs=4,
    batch_size=8,
    learning_rate=1e-2,
    head_learning_rate=1e-2,
    dropout=0.0,
    variants=2,
)
LABELS_JOB = TrainingJob(
    ensemble=EnsembleSpec(
        members=(
            MemberSpec(
                name="fine-tuned",
                backbone="iresnet",
                options=tiny_ensemble().members[0].options,
                training=LEARNS,
            ),
        )
    ),
    rounds=4,
)


def labelled(folder: Path, mislabelled: tuple[str, ...] = (), **test_subjects: int) -> Run:
    consortium = Consortium(
        folder,
        sites=SITES,
        frequent=6,
        mislabelled=mislabelled,
        test_subjects=dict.fromkeys(SITES, 4) | test_subjects,
        spread=10.0,
    )
    run = consortium.run(LABELS_JOB)
    assert run.outcome["status"] == "completed", run.outcome
    return run


def doubtful(run: Run) -> set[str]:
    """Sites that doubt their own labels."""
    replies = run.replies("fgm_publish").items()
    return {site for site, fields in replies if fields["doubtful_labels"]}


def agreements(run: Run) -> list[float]:
    """Round by round."""
    return [r["members"]["fine-tuned"]["agreement"] for r in run.outcome["rounds"]]


@pytest.mark.parametrize("site", ["bonn", "ulm"])
def test_a_site_with_wrong_labels_is_named_and_not_left_out(tmp_path: Path, site: str) -> None:
    run = labelled(tmp_path, (site,))
    (warning,) = run.outcome["warnings"]
    assert warning.startswith(f"site '{site}': the consortium's model agrees with far fewer")
    assert "check its lookup table and diagnoses" in warning
    assert "It was not left out." in warning
    assert [r["images"] for r in run.outcome["rounds"]] == [5 * 6 * 2 * 2] * 4
    assert doubtful(run) == {site}


def test_sites_with_right_labels_cause_no_warning(tmp_path: Path) -> None:
    run = labelled(tmp_path)
    assert run.outcome["warnings"] == []
    assert doubtful(run) == set()
    first, *_, last = agreements(run)
    assert last > 0.6 > first, "the model must have learnt for a doubt to be real"


def test_a_site_without_held_out_images_does_not_spoil_the_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[str, list[float | None]] = {}
    run_round = LocalTrainer.run_round

    def listening(self: LocalTrainer, *arguments: Any) -> Any:
        new, metrics = run_round(self, *arguments)
        site = next(s for s in SITES if self.seed == local_seed(LABELS_JOB.ensemble.seed, s))
        measured.setdefault(site, []).append(metrics["fine-tuned"].agreement)
        return new, metrics

    monkeypatch.setattr(LocalTrainer, "run_round", listening)
    run = labelled(tmp_path, leuven=0)
    assert run.outcome["warnings"] == []
    assert doubtful(run) == set()
    assert measured.pop("leuven") == [None] * 4
    means = np.array([*measured.values()], np.float64).mean(0)
    np.testing.assert_allclose(agreements(run), means, atol=1e-3)
    assert means[-1] > 0.6


def test_a_site_without_held_out_images_does_not_hide_one_with_wrong_labels(
    tmp_path: Path,
) -> None:
    run = labelled(tmp_path, ("bonn",), leuven=0)
    assert doubtful(run) == {"bonn"}
    (warning,) = run.outcome["warnings"]
    assert warning.startswith("site 'bonn': ")


def test_a_site_with_wrong_labels_and_no_held_out_images_gets_no_warning(tmp_path: Path) -> None:
    run = labelled(tmp_path, ("bonn",), bonn=0)
    assert run.outcome["warnings"] == []
    assert doubtful(run) == set()


def test_if_no_site_has_held_out_images_the_agreement_is_unknown(tmp_path: Path) -> None:
    run = labelled(tmp_path, ("bonn",), **dict.fromkeys(SITES, 0))
    assert agreements(run) == [UNKNOWN] * 4
    assert UNKNOWN == -1
    assert run.outcome["warnings"] == []
    assert doubtful(run) == set()


@pytest.mark.parametrize(("images", "blamed"), [(2, set()), (12, {"ulm"})])
def test_a_site_with_few_held_out_images_is_not_blamed_for_bad_luck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, blamed: set[str]
) -> None:
    def unlucky(cohort: Cohort) -> TrainingSet:
        found = held_out_set(cohort)
        if cohort.name != "ulm":
            return found
        targets = (found.targets[:images] + 1) % found.classes
        return TrainingSet(found.faces[:images], targets, found.classes)

    monkeypatch.setattr(trainer_module, "held_out_set", unlucky)
    run = labelled(tmp_path)
    assert doubtful(run) == blamed
    assert len(run.outcome["warnings"]) == len(blamed)


# --- clocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "side"), [(3600, "ahead of"), (-3600, "behind")])
def test_a_site_whose_clock_is_wrong_is_named_and_takes_part(
    tmp_path: Path, seconds: int, side: str
) -> None:
    def tamper(site: str, task: str, data: Shareable) -> Shareable:
        if (site, task) == ("leuven", "fgm_join"):
            data["fedgestalt"]["clock"] += seconds * 1000
        return data

    run = Consortium(tmp_path, on_upload=tamper).run(JOB)
    assert run.outcome["status"] == "completed", run.outcome
    (warning,) = run.outcome["warnings"]
    assert warning.startswith("site 'leuven': its clock is 3")
    assert f"seconds {side} the server's" in warning
