"""Weights files: named in a job, found in each machine's own folder, never told where."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import Registry
from fedgestalt.learning.ensemble import Ensemble, build_ensemble, weight_licences
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.weights import weights_digest
from fedgestalt_plugins.backbones import IResNet, IResNetOptions

TINY = {"depth": 18, "width": 2, "embedding_size": 4, "input_size": 32}
NAME = "tiny.safetensors"


def write(folder: Path, name: str = NAME, seed: int = 5, **changes: Any) -> Path:
    """A weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    built = IResNet().build(IResNetOptions(**(TINY | changes)), seed)
    state = {**built.trunk.state_dict(), **built.neck.state_dict()}
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    safetensors.torch.save_file(state, folder / name)
    return folder / name


def build(registry: Registry, **options: Any) -> Ensemble:
    options = {**TINY, "weights": NAME, "weights_licence": "CC0-1.0"} | options
    member = MemberSpec(name="m", backbone="iresnet", options=options)
    return build_ensemble(EnsembleSpec(members=(member,)), 2, registry)


def refusal(registry: Registry, **options: Any) -> str:
    with pytest.raises((ConfigError, SiteError)) as fault:
        build(registry, **options)
    return str(fault.value)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    write(tmp_path / "here")
    return get_registry().with_weights(tmp_path / "here")


def test_a_file_is_found_by_its_name_in_the_machines_own_folder(
    registry: Registry, tmp_path: Path
) -> None:
    write(tmp_path / "there")
    there = get_registry().with_weights(tmp_path / "there")
    one, other = build(registry), build(there)
    assert one.start_digest == other.start_digest, "where a file lies makes no difference"
    assert one.licences == {"m": "CC0-1.0"}
    assert one.weights == {NAME: tmp_path / "here" / NAME}
    assert build(registry, weights=None).start_digest != one.start_digest


def test_the_licence_of_a_file_is_the_one_that_is_stated_and_the_file_is_not_opened(
    registry: Registry, tmp_path: Path
) -> None:
    stated = {**TINY, "weights": "not-there.pt", "weights_licence": "MIT"}
    members = (
        MemberSpec(name="file", backbone="iresnet", options=stated),
        MemberSpec(name="random", backbone="iresnet", options=TINY),
        MemberSpec(name="shipped", backbone="sface"),
    )
    found = weight_licences(EnsembleSpec(members=members), registry)
    assert found == {"file": "MIT", "random": "", "shipped": "Apache-2.0"}


def test_another_file_of_the_same_name_is_another_start(registry: Registry, tmp_path: Path) -> None:
    write(tmp_path / "there", seed=6)
    there = get_registry().with_weights(tmp_path / "there")
    assert build(registry).start_digest != build(there).start_digest


def test_a_folder_is_that_of_one_registry_alone(registry: Registry) -> None:
    assert registry.backbones is get_registry().backbones
    assert registry.weights != get_registry().weights


def test_outside_of_jobs_the_environment_names_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGESTALT_WEIGHTS", str(tmp_path))
    assert Registry([]).weights == tmp_path
    monkeypatch.delenv("FEDGESTALT_WEIGHTS")
    assert Registry([]).weights is None


def test_a_file_that_is_not_there_is_named_without_its_place(
    registry: Registry, tmp_path: Path
) -> None:
    said = refusal(registry, weights="other.pt")
    assert said == (
        "ensemble member 'm': there is no file 'other.pt' in this machine's weights folder;"
        " put it there, the same file everywhere."
    )


def test_a_machine_without_a_folder_says_how_to_get_one() -> None:
    said = refusal(get_registry().with_weights(None))
    assert "this machine has no weights folder; set `weights` in fedgestalt.yaml" in said


@pytest.mark.parametrize("weights", ["/etc/passwd", "../here/" + NAME, "sub/x.pt", "..", "x" * 101])
def test_a_job_cannot_have_any_other_file_opened(registry: Registry, weights: str) -> None:
    assert "is not the name of a file; name the file alone" in refusal(registry, weights=weights)


def test_a_folder_is_no_weights_file(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "here" / "folder").mkdir()
    assert "there is no file 'folder'" in refusal(registry, weights="folder")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"junk", "neither safetensors nor a plain torch state_dict"), (None, "has shape")],
    ids=["junk", "width"],
)
def test_a_fault_of_a_file_names_member_and_file_and_no_folder(
    registry: Registry, tmp_path: Path, content: bytes | None, said: str
) -> None:
    """Weights of another width among them; the sentence goes to the server."""
    path = write(tmp_path / "here", width=4)
    if content:
        path.write_bytes(content)
    found = refusal(registry)
    assert found.startswith(f"ensemble member 'm', weights file {NAME}: ")
    assert said in found
    assert str(tmp_path) not in found


def test_a_fault_of_an_onnx_file_names_no_folder_either(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"no network")
    member = MemberSpec(name="m", backbone="arcface-onnx", options={"weights": "net.onnx"})
    spec = EnsembleSpec(members=(member,))
    with pytest.raises(SiteError, match="cannot be read as an ONNX file") as fault:
        build_ensemble(spec, 2, get_registry().with_weights(tmp_path))
    assert str(tmp_path) not in str(fault.value)


def test_a_job_can_name_the_digest_of_the_file_it_means(registry: Registry, tmp_path: Path) -> None:
    digest = hashlib.sha256((tmp_path / "here" / NAME).read_bytes()).hexdigest()
    assert weights_digest(tmp_path / "here" / NAME) == digest
    build(registry, weights_sha256=digest)
    said = refusal(registry, weights_sha256="0" * 64)
    assert f"the weights file '{NAME}' does not have the digest that the job names" in said
