"""Every machine has the weights file that a job names in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
from consortium import TINY, Consortium, one_network

from fedgestalt.federation.training.workflow import WEIGHTS_FOLDER
from fedgestalt.jobs import MatchingJob, TrainingJob
from fedgestalt.learning.spec import EnsembleSpec
from fedgestalt_plugins.backbones import IResNet, IResNetOptions

NAME = "tiny.safetensors"
SITES = ("berlin", "bonn", "leuven")


def write(path: Path, seed: int = 7, **changes: int) -> None:
    built = IResNet().build(IResNetOptions(**{**TINY, **changes}), seed)
    state = {**built.trunk.state_dict(), **built.neck.state_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)


def job(licence: str = "CC0-1.0") -> TrainingJob:
    (member,) = one_network().members
    options = {**TINY, "weights": NAME, "weights_licence": licence}
    ensemble = EnsembleSpec(members=(member.model_copy(update={"options": options}),))
    return TrainingJob(ensemble=ensemble, rounds=1)


@pytest.fixture
def consortium(tmp_path: Path, three_sites: Consortium) -> Consortium:
    """Everybody has the file; the server in its workspace."""
    settings = {"weights": str(tmp_path / "weights" / "{site}")}
    for site in SITES:
        write(tmp_path / "weights" / site / NAME)
    write(tmp_path / "root" / "server" / WEIGHTS_FOLDER / NAME)
    return Consortium(tmp_path, source=three_sites, settings=settings)


def test_a_job_trains_and_matches_from_a_file_that_each_has_at_its_own_place(
    consortium: Consortium, tmp_path: Path
) -> None:
    run = consortium.run(job(), root=tmp_path / "root")
    assert run.outcome["status"] == "completed", run.outcome
    said = b"".join(message.payload for message in run.received)
    assert b"weights " + NAME.encode() in said, "its digest was compared"
    assert str(tmp_path / "weights").encode() not in said
    matched = consortium.run(MatchingJob(ensemble=run.outcome["ensemble"]), job_id="job-2")
    assert matched.outcome["status"] == "completed", matched.outcome


def test_another_file_under_the_same_name_is_named_before_anything_is_trained(
    consortium: Consortium, tmp_path: Path
) -> None:
    write(tmp_path / "weights" / "bonn" / NAME, seed=8)
    run = consortium.run(job(), root=tmp_path / "root")
    reason = run.outcome["reason"]
    assert reason.startswith("the job cannot start. bonn: ")
    assert f"weights {NAME} is " in reason
    assert "put the same file under this name into every machine's weights folder" in reason
    assert run.orders("fgm_train") == []


def test_weights_of_another_width_are_named_with_tensor_and_shapes_and_no_folder(
    consortium: Consortium, tmp_path: Path
) -> None:
    write(tmp_path / "weights" / "bonn" / NAME, width=4)
    run = consortium.run(job(), root=tmp_path / "root")
    assert (
        f"bonn: ensemble member 'network', weights file {NAME}: tensor 'conv1.weight' has shape"
        " (4, 3, 3, 3), the network needs (2, 3, 3, 3); set depth, width"
    ) in run.outcome["reason"]
    assert str(tmp_path) not in run.outcome["reason"]
    assert run.orders("fgm_train") == []


def test_a_missing_file_is_named_by_who_lacks_it(consortium: Consortium, tmp_path: Path) -> None:
    (tmp_path / "weights" / "bonn" / NAME).unlink()
    run = consortium.run(job(), root=tmp_path / "root")
    assert "bonn: ensemble member 'network': there is no file" in run.outcome["reason"]
    write(tmp_path / "weights" / "bonn" / NAME)
    shutil.rmtree(tmp_path / "root" / "server" / WEIGHTS_FOLDER)
    run = consortium.run(job(), job_id="job-2", root=tmp_path / "root")
    assert "server, ensemble member 'network': there is no file" in run.outcome["reason"]
    assert str(tmp_path) not in run.outcome["reason"]


def test_a_site_refuses_weights_by_the_licence_that_the_job_states(
    consortium: Consortium, tmp_path: Path
) -> None:
    run = consortium.run(job("LicenseRef-InsightFace-noncommercial"), root=tmp_path / "root")
    for site in SITES:
        assert f"{site}: this site may not use weights under LicenseRef" in run.outcome["reason"]
