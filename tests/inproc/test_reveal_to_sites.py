"""``reveal_aggregate_to: sites``: the sites have the model, and the server never does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from consortium import Consortium, Plain, Run, Script, Summed, nothing_happens, one_network
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedgestalt.federation.job import transfer
from fedgestalt.federation.job.transfer import DOWNLOAD, UPLOAD
from fedgestalt.federation.training.checkpoints import CHECKPOINTS_FOLDER, MODELS_FOLDER
from fedgestalt.federation.training.secure_round import Opened
from fedgestalt.federation.training.workflow import EnsembleTrainingWorkflow
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.ensemble import SharedState

TO_SITES = TrainingJob(ensemble=one_network(), rounds=2, reveal_aggregate_to="sites")
TO_SERVER = TO_SITES.model_copy(update={"reveal_aggregate_to": "server"})
PIECE_BYTES = 16


@pytest.fixture(scope="module")
def plain(four_sites: Consortium) -> Plain:
    return Plain(four_sites, TO_SITES)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, four_sites: Consortium
) -> dict[str, tuple[Consortium, Run]]:
    """The same job, once revealed to the sites alone and once to the server as well."""
    runs = {}
    for job in (TO_SITES, TO_SERVER):
        folder = tmp_path_factory.mktemp(job.reveal_aggregate_to)
        consortium = Consortium(folder, source=four_sites)
        runs[job.reveal_aggregate_to] = consortium, consortium.run(job)
        assert runs[job.reveal_aggregate_to][1].outcome["status"] == "completed"
    return runs


def pieces_of(values: NDArray) -> set[bytes]:
    """Byte strings of several places, unless they are nearly alike (zeros say nothing)."""
    raw = np.ascontiguousarray(values).tobytes()
    starts = range(0, max(1, len(raw) - PIECE_BYTES), max(4, len(raw) // 4000 * 4))
    pieces = {raw[start : start + PIECE_BYTES] for start in starts}
    return {piece for piece in pieces if len(piece) == PIECE_BYTES and len(set(piece)) > 6}


def seen_by_the_server(run: Run) -> bytes:
    """Every byte that reached it, and every byte of every file of its workspace."""
    files = [path for path in (run.root / "server").rglob("*") if path.is_file()]
    return b"|".join([m.payload for m in run.received] + [path.read_bytes() for path in files])


def stored(consortium: Consortium) -> dict[str, list[str]]:
    return {
        site: [path.name for path in consortium.store(site).glob("ensembles/*")]
        for site in consortium.sites
    }


def secrets(plain: Plain, sites: tuple[str, ...]) -> dict[str, set[bytes]]:
    """What the server must not see: models, their changes, and the sums that they come from."""
    states = plain.states(*[Summed(sites)] * 2)
    found: dict[str, set[bytes]] = {}
    for before, after in itertools.pairwise(states):
        for name, values in after.items():
            found.setdefault("model", set()).update(pieces_of(values))
            found.setdefault("change", set()).update(pieces_of(values - before[name]))
    found["sum"] = pieces_of(plain.first_sum())
    return found


def test_the_server_has_the_model_neither_in_messages_nor_in_files(
    finished: dict[str, tuple[Consortium, Run]], plain: Plain
) -> None:
    consortium, run = finished["sites"]
    haystack = seen_by_the_server(run)
    assert len(haystack) > 20_000
    for what, pieces in secrets(plain, tuple(consortium.sites)).items():
        assert len(pieces) > 20, what
        assert not [piece for piece in pieces if piece in haystack], what
    assert not list((run.root / "server").rglob("*.safetensors"))
    assert not list((run.root / "server").rglob("ensemble*"))


@pytest.mark.parametrize("job", [TO_SITES, TO_SERVER], ids=["sites", "server"])
def test_what_the_server_opens_is_the_sum_only_if_it_may_learn_it(
    tmp_path: Path, four_sites: Consortium, plain: Plain, job: TrainingJob
) -> None:
    opened: list[NDArray[np.uint32]] = []

    class Looking(EnsembleTrainingWorkflow):
        def _apply(self, number: int, sum_: Opened) -> dict[str, object]:
            opened.append(sum_._words[0].copy())
            return super()._apply(number, sum_)

    consortium = Consortium(tmp_path, source=four_sites)
    run = consortium.run(job.model_copy(update={"rounds": 1}), workflow=Looking)
    assert run.outcome["status"] == "completed", run.outcome
    (words,) = opened
    alike = np.count_nonzero(words == plain.first_sum())
    assert alike == (words.size if job is TO_SERVER else 0)


def test_the_same_search_finds_the_model_of_a_job_that_reveals_it_to_the_server(
    finished: dict[str, tuple[Consortium, Run]], plain_four: Plain
) -> None:
    consortium, run = finished["server"]
    haystack = seen_by_the_server(run)
    pieces = secrets(plain_four, tuple(consortium.sites))["model"]
    assert len([piece for piece in pieces if piece in haystack]) > 20
    assert (run.folder / "ensemble" / "weights.safetensors").exists()


def test_a_checkpoint_of_the_server_holds_no_model(tmp_path: Path, four_sites: Consortium) -> None:
    script = Script().kill("leuven", "fgm_train", time=2).kill("ulm", "fgm_train", time=2)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(TO_SITES)
    assert run.outcome["status"] == "failed"
    folder = run.root / "server" / CHECKPOINTS_FOLDER / "job-1"
    assert [path.name for path in folder.iterdir()] == ["checkpoint.json"]


def test_the_outcome_says_nothing_that_only_the_sum_tells(
    finished: dict[str, tuple[Consortium, Run]],
) -> None:
    _, run = finished["sites"]
    for record in run.outcome["rounds"]:
        assert record.keys() == {"round", "sites", "uploaded_bytes_per_site", "seconds"}
    assert run.outcome["labels_judged"] is False
    assert run.outcome["aggregation"]["reveal_aggregate_to"] == "sites"
    for record in run.signed:
        assert (record["weight"], record["clipped"]) == (None, None)
    progress = (run.folder / "progress.jsonl").read_text()
    assert "loss" not in progress
    assert "images" not in progress


def test_all_sites_hold_the_same_model_and_it_is_the_plain_mean(
    finished: dict[str, tuple[Consortium, Run]], plain: Plain
) -> None:
    consortium, run = finished["sites"]
    digest = plain.digest(*[Summed(consortium.sites)] * 2)
    assert run.outcome["ensemble"] == digest
    assert stored(consortium) == {site: [digest] for site in consortium.sites}
    expected: SharedState = plain.states(*[Summed(consortium.sites)] * 2)[-1]
    for site in consortium.sites:
        weights = consortium.store(site) / "ensembles" / digest / "weights.safetensors"
        held = load_file(weights)
        assert all(np.array_equal(held[name], values) for name, values in expected.items())


def test_the_first_round_gives_the_model_that_it_would_give_with_the_server(
    finished: dict[str, tuple[Consortium, Run]],
) -> None:
    """Later the server, which does not know the last update, cannot choose narrower ranges."""
    (_, to_sites), (_, to_server) = finished["sites"], finished["server"]
    assert to_sites.signed[0]["model_after"] == to_server.signed[0]["model_after"]
    assert to_sites.signed[0]["plan"] == to_server.signed[0]["plan"]
    assert to_sites.signed[1]["plan"] == to_sites.signed[0]["plan"]
    assert to_server.signed[1]["plan"] != to_server.signed[0]["plan"]
    assert to_sites.signed[0]["sum"] != to_server.signed[0]["sum"], "one mask is still on it"


# --- lost sites ----------------------------------------------------------------------------------


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_WORDS", 64)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4 * 64)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("lost", ["berlin", "leuven"])
@pytest.mark.parametrize(
    ("task", "when", "time", "counts"),
    [
        ("fgm_train", "after", 1, False),
        ("fgm_keys", "after", 1, False),
        ("fgm_shares", "after", 1, False),
        (UPLOAD, "before", 2, False),
        ("fgm_survivors", "before", 1, True),
        ("fgm_unmask", "after", 1, True),
        (DOWNLOAD, "before", 2, True),
        ("fgm_apply", "after", 1, True),
        ("fgm_publish", "before", 1, True),
    ],
)
def test_a_lost_site_does_not_keep_the_sum_from_the_others(
    tmp_path: Path,
    four_sites: Consortium,
    plain: Plain,
    lost: str,
    task: str,
    when: str,
    time: int,
    counts: bool,
) -> None:
    """Berlin, the first, is the one that deals the sites' common secret."""
    script = Script().kill(lost, task, when, time)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(TO_SITES.model_copy(update={"rounds": 1}))
    assert script.done == [(lost, task)]
    assert run.outcome["status"] == "completed", run.outcome
    others = [site for site in four_sites.sites if site != lost]
    in_session = task not in {"fgm_train", "fgm_keys", "fgm_shares"}
    summed = Summed(
        four_sites.sites if counts else others, four_sites.sites if in_session else others
    )
    assert run.outcome["rounds"][0]["sites"] == sorted(summed.survivors)
    assert run.outcome["ensemble"] == plain.digest(summed)
    held = stored(consortium)
    assert {site: held[site] for site in others} == {s: [plain.digest(summed)] for s in others}


@pytest.mark.parametrize(
    ("cut", "mended"),
    [
        (("fgm_vector", "sent"), ("fgm_unmask", "before")),
        (("fgm_survivors", "sent"), ("fgm_unmask", "after")),
    ],
)
def test_a_survivor_that_is_back_for_the_sum_stays_in_the_job(
    tmp_path: Path,
    four_sites: Consortium,
    plain: Plain,
    cut: tuple[str, str],
    mended: tuple[str, str],
) -> None:
    """Even if it has signed no survivors: its boxes held what takes the last mask off."""
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("berlin", *cut, lambda: consortium.cut("berlin"))
    script.at("bonn", *mended, lambda: consortium.restore("berlin"))
    run = consortium.run(TO_SITES)
    assert run.outcome["status"] == "completed", run.outcome
    assert len(script.done) == 2
    digest = plain.digest(*[Summed(four_sites.sites)] * 2)
    assert stored(consortium) == {site: [digest] for site in four_sites.sites}


def test_a_site_that_missed_a_sum_cannot_be_given_the_model_and_is_left_out(
    tmp_path: Path, four_sites: Consortium, plain: Plain
) -> None:
    script = Script()
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    script.at("ulm", "fgm_keys", "before", lambda: consortium.cut("ulm"))
    script.at("bonn", "fgm_apply", "after", lambda: consortium.restore("ulm"))
    run = consortium.run(TO_SITES)
    others = four_sites.sites[:3]
    assert run.outcome["status"] == "completed", run.outcome
    assert [r["sites"] for r in run.outcome["rounds"]] == [list(others)] * 2
    assert run.outcome["ensemble"] == plain.digest(*[Summed(others)] * 2)
    assert run.outcome["warnings"][-1].startswith("ulm did not store the model")
    assert len(run.orders("fgm_train", "ulm")) == 1
    assert stored(consortium)["ulm"] == []


def test_a_site_that_comes_up_late_is_not_asked(
    tmp_path: Path, four_sites: Consortium, plain: Plain
) -> None:
    script = Script()
    consortium = Consortium(
        tmp_path,
        source=four_sites,
        on_task=script,
        late=("ulm",),
        workflow_settings={"start_limit_seconds": 0.0},
    )
    script.at("bonn", "fgm_apply", "before", lambda: consortium.come_up("ulm"))
    run = consortium.run(TO_SITES)
    assert run.outcome["ensemble"] == plain.digest(*[Summed(four_sites.sites[:3])] * 2)
    assert not [task for site, task, _ in run.sent if site == "ulm"]


# --- going on ------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path, four_sites: Consortium) -> tuple[Consortium, Run]:
    """A job that ended after its first round."""
    script = Script().kill("leuven", "fgm_train", time=2).kill("ulm", "fgm_train", time=2)
    consortium = Consortium(tmp_path, source=four_sites, on_task=script)
    run = consortium.run(TO_SITES)
    assert run.outcome["status"] == "failed"
    consortium.on_task = nothing_happens
    return consortium, run


RESUMED = TO_SITES.model_copy(update={"resume_from": "job-1"})


def test_the_sites_go_on_from_the_model_that_they_hold(
    stopped: tuple[Consortium, Run], plain: Plain
) -> None:
    consortium, first = stopped
    run = consortium.run(RESUMED, job_id="job-2", root=first.root)
    assert run.outcome["status"] == "completed", run.outcome
    digest = plain.digest(*[Summed(consortium.sites)] * 2)
    assert stored(consortium) == {site: [digest] for site in consortium.sites}
    sessions = {record["session"] for record in run.signed}
    downloads = [m.reply["fedgestalt"]["name"] for m in run.received if m.task == DOWNLOAD]
    assert set(downloads) <= sessions, "no model was fetched from the server"


def test_a_site_that_has_lost_the_model_says_so_before_anything_is_trained(
    stopped: tuple[Consortium, Run],
) -> None:
    consortium, first = stopped
    for path in (consortium.store("bonn") / MODELS_FOLDER).glob("*.safetensors"):
        path.unlink()
    run = consortium.run(RESUMED, job_id="job-2", root=first.root)
    assert run.outcome["reason"] == (
        "the job cannot start. bonn: it does not hold the model of round 1, and where the server"
        " does not learn the sum nobody can give it; leave it out, or begin a new job; nothing was"
        " trained or compared."
    )
    assert run.orders("fgm_train") == []


def test_a_round_that_fails_again_and_again_does_not_cost_the_model(
    stopped: tuple[Consortium, Run], plain: Plain
) -> None:
    """Each try leaves another model at the sites that got as far as applying it."""
    consortium, run = stopped
    for number in (2, 3, 4):
        script = Script().kill("leuven", "fgm_apply").kill("ulm", "fgm_apply")
        consortium.on_task = script
        run = consortium.run(RESUMED, job_id=f"job-{number}", root=run.root)
        assert "2 sites have applied the sum, 3 are needed" in run.outcome["reason"]
        assert run.outcome["reason"].endswith("resume_from=job-1.")
    consortium.on_task = nothing_happens
    run = consortium.run(RESUMED, job_id="job-5", root=run.root)
    again = Summed(consortium.sites, repeats=dict.fromkeys(consortium.sites, 3))
    assert run.outcome["ensemble"] == plain.digest(Summed(consortium.sites), again)


# --- what a site asks for ------------------------------------------------------------------------


def test_a_site_that_lets_no_server_learn_the_sum_takes_part_in_no_other_job(
    tmp_path: Path, four_sites: Consortium
) -> None:
    policy = {"bonn": {"reveal_aggregate_to": "sites"}}
    consortium = Consortium(tmp_path, source=four_sites, site_settings=policy)
    run = consortium.run(TO_SERVER)
    assert run.outcome["reason"] == (
        "the job cannot start. bonn: this site lets no server learn the sum of updates; change the"
        " job, or ask the site to change reveal_aggregate_to in its fedgestalt.yaml; nothing was"
        " trained or compared."
    )
    assert run.orders("fgm_train") == []
    assert consortium.run(TO_SITES.model_copy(update={"rounds": 1})).outcome["status"] == (
        "completed"
    )
