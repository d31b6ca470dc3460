"""A job's features in several processes: the bytes of one, progress, faults, and an end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
import torch

from fedgestalt.cohort import UNSOLVED, ImageRecord, save_jpeg
from fedgestalt.errors import DataError, SiteError
from fedgestalt.hooks import get_registry
from fedgestalt.learning import processes
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state
from fedgestalt.learning.images import FaceFiles
from fedgestalt.learning.processes import FeatureWork, compute_features
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import LocalTrainer, TrainingSet

CPU = torch.device("cpu")
IMAGES = 100  # two blocks
TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
ONCE = TrainingSpec(epochs=1, variants=2)


def ensemble() -> EnsembleSpec:
    kinds = {"neck": "neck", "whole": "all", "same": "none", "again": "none"}
    members = [
        MemberSpec(name=n, backbone="iresnet", options=TINY, trainable=t, training=ONCE)  # type: ignore[arg-type]
        for n, t in kinds.items()
    ]
    return EnsembleSpec(members=tuple(members))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(IMAGES):
        smooth = rng.integers(0, 256, (8, 8, 3), np.uint8)
        face = cv2.resize(smooth, (112, 112), interpolation=cv2.INTER_CUBIC)
        save_jpeg(folder / f"{number:03}.jpg", face)  # type: ignore[arg-type]
    return tuple(sorted(folder.iterdir()))


def faces_of(photographs: tuple[Path, ...]) -> FaceFiles:
    return FaceFiles(tuple(ImageRecord(p.stem, "", UNSOLVED, p) for p in photographs))


def work_on(photographs: tuple[Path, ...], cache: Path, **changes: Any) -> FeatureWork:
    fields = {"seed": 7, "weights": None, "device": "cpu", "threads": 1, **changes}
    return FeatureWork(ensemble=ensemble(), photographs=photographs, cache=cache, **fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_trainer_finds_what_it_would_have_computed(
    photographs: tuple[Path, ...], tmp_path: Path
) -> None:
    told: list[tuple[str, int, int]] = []
    compute_features(work_on(photographs, tmp_path / "two"), 2, lambda *said: told.append(said))
    built = build_ensemble(ensemble(), 2, get_registry())
    data = TrainingSet(faces_of(photographs)[:], np.arange(IMAGES) % 2, 2)
    LocalTrainer(built, data, CPU, 7, tmp_path / "one").prepare()
    assert len(contents(tmp_path / "one")) == 1, "that of the member whose neck trains"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert told
    assert {(name, total) for name, _, total in told} == {("neck", IMAGES)}
    LocalTrainer(built, data, CPU, 7, tmp_path / "two").run_round(read_shared_state(built), 1)
    assert contents(tmp_path / "two") == contents(tmp_path / "one"), "and adds nothing"


@pytest.mark.usefixtures("_one_thread")
def test_an_encoding_finds_what_it_would_have_computed(
    photographs: tuple[Path, ...], tmp_path: Path
) -> None:
    compute_features(work_on(photographs, tmp_path / "two", seed=None), 2)
    built = build_ensemble(ensemble(), 2, get_registry())
    encode(built, faces_of(photographs), CPU, tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 3, "those of all frozen trunks"
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_photograph_that_cannot_be_read_is_a_sentence_and_leaves_nothing(
    photographs: tuple[Path, ...], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photograph")
    with pytest.raises(DataError, match=r"^broken\.jpg: "):
        compute_features(work_on((*photographs, broken), tmp_path / "cache"), 2)
    assert contents(tmp_path / "cache") == {}


def test_where_there_is_nothing_to_compute_nothing_is_started(
    photographs: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_LAUNCHER", ("-c", "raise SystemExit(3)"))
    compute_features(work_on((), tmp_path), 2)
    (_, whole, same, _) = ensemble().members
    for members, seed in (((whole, same), 7), ((whole,), None)):
        work = work_on(photographs, tmp_path, seed=seed)
        compute_features(work.model_copy(update={"ensemble": EnsembleSpec(members=members)}), 2)
    assert contents(tmp_path) == {}


def test_weights_that_are_not_there_are_a_sentence(
    photographs: tuple[Path, ...], tmp_path: Path
) -> None:
    member = MemberSpec(name="a", backbone="arcface-onnx", options={"weights": "absent.onnx"})
    work = work_on(photographs, tmp_path / "cache")
    with pytest.raises(SiteError, match=r"absent\.onnx"):
        compute_features(work.model_copy(update={"ensemble": EnsembleSpec(members=(member,))}), 2)


def test_a_cache_that_cannot_be_written_is_a_sentence(
    photographs: tuple[Path, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="the feature cache cannot be written"):
        compute_features(work_on(photographs, tmp_path / "file" / "cache"), 2)


def test_processes_that_end_without_a_word_are_a_sentence(
    photographs: tuple[Path, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_LAUNCHER", ("-c", "print('hello'); raise SystemExit(3)"))
    with pytest.raises(SiteError, match="ended before they were done; its own log says why"):
        compute_features(work_on(photographs, tmp_path), 2)


def test_the_processes_end_with_the_job(photographs: tuple[Path, ...], tmp_path: Path) -> None:
    """However it ends: nobody can tell them any more."""
    many = photographs * 40
    (tmp_path / "work.json").write_text(work_on(many, tmp_path / "cache").model_dump_json())
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from fedgestalt.learning.processes import FeatureWork, compute_features\n"
        "compute_features(FeatureWork.model_validate_json(Path(sys.argv[1]).read_text()), 2,"
        " lambda *said: print(said, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "work.json")], stdout=subprocess.PIPE
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline(), "they are at work"
        family = psutil.Process(job.pid).children(recursive=True)
        assert len(family) >= 3
        job.kill()
    _, left = psutil.wait_procs(family, timeout=20)
    assert left == []
