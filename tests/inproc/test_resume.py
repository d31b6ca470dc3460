"""A job that ended early is gone on with: no round is repeated, no update is summed twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from consortium import (
    Consortium,
    Plain,
    Run,
    Script,
    Summed,
    nothing_happens,
    one_network,
)
from safetensors.numpy import load_file, save_file

import fedgestalt.federation.training.executor as trainer_module
from fedgestalt.errors import SiteError
from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.federation.training.checkpoints import CHECKPOINTS_FOLDER, MODELS_FOLDER
from fedgestalt.federation.training.workflow import EnsembleTrainingWorkflow
from fedgestalt.jobs import TrainingJob

JOB = TrainingJob(ensemble=one_network(), rounds=3)
FIRST, SECOND = "job-1", "job-2"
KEPT = f"round 1 is kept: to go on from it, submit the job again with resume_from={FIRST}."


def two_are_lost(task: str, when: str, time: int = 2) -> Script:
    """Of four sites; the job cannot go on with the others."""
    return Script().kill("leuven", task, when, time).kill("ulm", task, when, time)


def ended_early(consortium: Consortium, job: TrainingJob = JOB, **arguments: Any) -> Run:
    run = consortium.run(job, **arguments)
    assert run.outcome["status"] == "failed", run.outcome
    assert checkpoints(run) == {FIRST}
    consortium.on_task = nothing_happens
    return run


def checkpoints(run: Run) -> set[str]:
    folder = run.root / "server" / CHECKPOINTS_FOLDER
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def go_on(consortium: Consortium, first: Run, job: TrainingJob = JOB, **changes: Any) -> Run:
    changes = {"resume_from": FIRST, **changes}
    return consortium.run(job.model_copy(update=changes), job_id=SECOND, root=first.root)


def trained_rounds(run: Run) -> list[int]:
    return sorted({fields["round"] for fields in run.orders("fgm_train")})


@pytest.fixture
def consortium(tmp_path: Path, four_sites: Consortium) -> Consortium:
    return Consortium(tmp_path, source=four_sites)


# --- between two rounds --------------------------------------------------------------------------


def killed_sites(consortium: Consortium) -> Run:
    consortium.on_task = two_are_lost("fgm_train", "before")
    run = ended_early(consortium)
    assert run.outcome["reason"] == (
        "round 2: 2 sites are there, the job asks for 3 (lost: leuven, ulm); bring the lost sites"
        f" back; {KEPT}"
    )
    return run


def broken_server(consortium: Consortium) -> Run:
    class Breaks(EnsembleTrainingWorkflow):
        def _sites_of_round(self, *arguments: Any) -> set[str]:
            if self._round == 1:
                raise RuntimeError("SUBJECT-0001")
            return super()._sites_of_round(*arguments)

    run = ended_early(consortium, workflow=Breaks)
    assert run.outcome["reason"].startswith("unexpected RuntimeError at the server")
    assert "SUBJECT" not in run.outcome["reason"]
    return run


@pytest.mark.parametrize("end", [killed_sites, broken_server])
def test_a_job_that_ended_between_two_rounds_comes_to_the_same_model(
    consortium: Consortium, plain_four: Plain, end: Callable[[Consortium], Run]
) -> None:
    first = end(consortium)
    assert [r["round"] for r in first.signed] == [1]
    second = go_on(consortium, first)
    assert second.outcome["status"] == "completed", second.outcome
    assert second.outcome["resumed_from"] == FIRST
    assert trained_rounds(first) == ([1, 2] if end is killed_sites else [1])
    assert trained_rounds(second) == [2, 3]
    assert [r["round"] for r in second.outcome["rounds"]] == [1, 2, 3]
    assert [(r["round"], r["job"]) for r in second.signed] == [
        (1, FIRST),
        (2, SECOND),
        (3, SECOND),
    ]
    assert second.signed[0] == first.signed[0]
    assert second.outcome["ensemble"] == plain_four.digest(*[Summed(consortium.sites)] * 3)
    assert second.outcome["warnings"] == []
    assert checkpoints(second) == set()


def test_a_job_that_ends_well_leaves_no_checkpoint(consortium: Consortium) -> None:
    run = consortium.run(JOB.model_copy(update={"rounds": 1}))
    assert run.outcome["status"] == "completed"
    assert (run.root / "server" / CHECKPOINTS_FOLDER).is_dir()
    assert checkpoints(run) == set()


def test_a_job_that_ends_early_twice_is_gone_on_with_twice(
    consortium: Consortium, plain_four: Plain
) -> None:
    first = killed_sites(consortium)
    consortium.on_task = two_are_lost("fgm_train", "before", time=1)
    second = go_on(consortium, first)
    assert second.outcome["status"] == "failed"
    assert second.outcome["reason"].endswith(KEPT), "the second job has kept nothing itself"
    consortium.on_task = two_are_lost("fgm_train", "before", time=2)
    third = go_on(consortium, first)
    assert third.outcome["reason"].endswith(
        f"round 2 is kept: to go on from it, submit the job again with resume_from={SECOND}."
    )
    consortium.on_task = nothing_happens
    assert checkpoints(third) == {FIRST, SECOND}
    job = JOB.model_copy(update={"resume_from": SECOND})
    last = consortium.run(job, job_id="job-3", root=first.root)
    assert last.outcome["status"] == "completed", last.outcome
    assert trained_rounds(last) == [3]
    assert [r["job"] for r in last.signed] == [FIRST, SECOND, "job-3"]
    assert last.outcome["ensemble"] == plain_four.digest(*[Summed(consortium.sites)] * 3)


def test_a_job_whose_publication_failed_publishes_without_training(
    consortium: Consortium, plain_four: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise SiteError("the ensemble cannot be stored (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "save_ensemble", full)
        first = ended_early(consortium, JOB.model_copy(update={"rounds": 1}))
    assert "cannot be stored (No space left on device)" in first.outcome["reason"]
    assert first.outcome["reason"].endswith(KEPT)
    second = go_on(consortium, first, rounds=1)
    assert second.outcome["status"] == "completed", second.outcome
    assert second.orders("fgm_train") == []
    assert second.outcome["ensemble"] == plain_four.digest(Summed(consortium.sites))
    assert checkpoints(second) == set()


def test_a_site_that_has_lost_the_model_downloads_it_and_nobody_else_does(
    consortium: Consortium, plain_four: Plain
) -> None:
    first = killed_sites(consortium)
    shutil.rmtree(consortium.store("bonn") / MODELS_FOLDER)
    second = go_on(consortium, first)
    model = first.signed[0]["model_after"]
    fetched = {
        m.site
        for m in second.received
        if m.task == DOWNLOAD and m.reply["fedgestalt"]["name"] == model
    }
    assert fetched == {"bonn"}
    assert second.outcome["ensemble"] == plain_four.digest(*[Summed(consortium.sites)] * 3)


# --- in mid-round --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "when", "sent"),
    [
        ("fgm_shares", "after", ()),
        (UPLOAD, "before", ("berlin", "bonn", "leuven", "ulm")),
        ("fgm_unmask", "before", ("berlin", "bonn", "leuven", "ulm")),
        ("fgm_apply", "before", ("berlin", "bonn", "leuven", "ulm")),
        ("fgm_apply", "after", ("berlin", "bonn", "leuven", "ulm")),
    ],
)
def test_an_update_that_has_left_its_site_is_not_summed_again(
    consortium: Consortium, plain_four: Plain, task: str, when: str, sent: tuple[str, ...]
) -> None:
    """A site whose vector may have left trains the round with other random draws."""
    job = JOB.model_copy(update={"rounds": 2})
    consortium.on_task = two_are_lost(task, when)
    first = ended_early(consortium, job)
    assert first.outcome["reason"].endswith(KEPT)
    second = go_on(consortium, first, job)
    assert second.outcome["status"] == "completed", second.outcome
    everybody = Summed(consortium.sites)
    again = Summed(consortium.sites, repeats=dict.fromkeys(sent, 1))
    assert second.outcome["ensemble"] == plain_four.digest(everybody, again)
    unchanged = plain_four.digest(everybody, everybody)
    assert (second.outcome["ensemble"] == unchanged) == (not sent)


def test_only_a_site_whose_vector_may_have_left_draws_anew(
    consortium: Consortium, plain_four: Plain
) -> None:
    """Two sites are killed when they have trained and masked nothing yet."""
    job = JOB.model_copy(update={"rounds": 2})
    consortium.on_task = two_are_lost("fgm_vector", "before")
    first = ended_early(consortium, job)
    second = go_on(consortium, first, job)
    again = Summed(consortium.sites, repeats={"berlin": 1, "bonn": 1})
    digest = plain_four.digest(Summed(consortium.sites), again)
    assert second.outcome["ensemble"] == digest


def test_a_site_that_does_not_know_what_has_left_it_sends_nothing(consortium: Consortium) -> None:
    job = JOB.model_copy(update={"rounds": 2})
    consortium.on_task = two_are_lost("fgm_apply", "before")
    first = ended_early(consortium, job)
    (consortium.store("bonn") / MODELS_FOLDER / "sent.json").write_text("{")
    second = go_on(consortium, first, job)
    assert second.outcome["status"] == "failed"
    assert second.outcome["reason"].startswith(
        "site 'bonn': its record of sent updates is damaged; look at sent.json in its store's"
    )
    assert UPLOAD not in {message.task for message in second.received}
    assert checkpoints(second) == {FIRST}


# --- what cannot be gone on with -----------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(
    tmp_path_factory: pytest.TempPathFactory, four_sites: Consortium
) -> tuple[Consortium, Run]:
    """A job that ended after its first round."""
    consortium = Consortium(tmp_path_factory.mktemp("stopped"), source=four_sites)
    return consortium, killed_sites(consortium)


def refused(stopped: tuple[Consortium, Run], **changes: Any) -> str:
    """What the second job says instead of asking any site for anything."""
    consortium, first = stopped
    run = go_on(consortium, first, **changes)
    assert run.outcome["status"] == "failed"
    assert not run.sent
    assert FIRST in checkpoints(run)
    assert run.outcome["reason"].count(". ") == 0, "one sentence"
    return str(run.outcome["reason"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"ensemble": one_network(seed=2)},
            "resume_from: the ensemble of this job is not that of job job-1; submit it with the"
            " same settings.",
        ),
        *(
            (
                {key: value},
                "resume_from: the aggregation of this job is not that of job job-1; submit it with"
                " the same settings.",
            )
            for key, value in {
                "scope": "encoder",
                "rule": "class-weighted",
                "reveal_aggregate_to": "sites",
                "threat_model": "honest-but-curious",
                "max_images_per_site": 99,
            }.items()
        ),
        (
            {"resume_from": "job-7"},
            "resume_from: this server has no checkpoint of job job-7; name a training job that"
            " completed a round on this server and did not end well, or begin anew.",
        ),
        ({"resume_from": "../job-1"}, "resume_from: '../job-1' is no job id."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_job_is_not_gone_on_with(
    stopped: tuple[Consortium, Run], changes: dict[str, Any], says: str
) -> None:
    assert refused(stopped, **changes) == says


def test_too_few_rounds_are_refused(consortium: Consortium) -> None:
    consortium.on_task = two_are_lost("fgm_train", "before", time=3)
    first = ended_early(consortium)
    assert refused((consortium, first), rounds=1) == (
        "resume_from: job job-1 has completed 2 rounds, this job asks for 1 in all; raise rounds."
    )


def no_json(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"schema": ')


def no_number(folder: Path) -> None:
    content = json.loads((folder / "checkpoint.json").read_text())
    content["checkpoint"]["round"] = "one"
    (folder / "checkpoint.json").write_text(json.dumps(content))


def no_model(folder: Path) -> None:
    (model,) = folder.glob("*.safetensors")
    model.unlink()


def another_model(folder: Path) -> None:
    (model,) = folder.glob("*.safetensors")
    state = load_file(model)
    state[sorted(state)[0]] += 1
    save_file(state, model)


def half_a_model(folder: Path) -> None:
    (model,) = folder.glob("*.safetensors")
    model.write_bytes(model.read_bytes()[:-5])


@pytest.mark.parametrize("damage", [no_json, no_number, no_model, another_model, half_a_model])
def test_a_damaged_checkpoint_is_refused(
    stopped: tuple[Consortium, Run], damage: Callable[[Path], None]
) -> None:
    folder = stopped[1].root / "server" / CHECKPOINTS_FOLDER / FIRST
    sound = {path: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    try:
        said = refused(stopped)
    finally:
        for path, content in sound.items():
            path.write_bytes(content)
    assert said == f"{folder}: the checkpoint of job job-1 is damaged."


def test_a_job_that_failed_in_its_first_round_says_nothing_of_going_on(
    consortium: Consortium,
) -> None:
    consortium.on_task = two_are_lost("fgm_train", "before", time=1)
    run = consortium.run(JOB)
    assert run.outcome["status"] == "failed"
    assert "resume_from" not in run.outcome["reason"]
    assert checkpoints(run) == set()
