"""Two processes give what one gives; an error of one is an error of both."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from crew_trial import CPU, build_member, pictures

from fedgestalt.cohort import read_encodings, save_jpeg
from fedgestalt.console import Steps
from fedgestalt.encode import Request, encode_photographs
from fedgestalt.errors import DataError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.bundle import write_bundle
from fedgestalt.learning.crew import ALONE, Crew, crew_of_this_process, join_crew
from fedgestalt.learning.ensemble import build_ensemble, read_shared_state
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.model_card import CardFacts
from fedgestalt.learning.spec import EnsembleSpec


@dataclass(frozen=True)
class Trial:
    """What two processes left."""

    folder: Path
    found: list[dict[str, Any]]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("crew")
    (folder / "photographs").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):  # three blocks
        smooth = rng.integers(0, 256, (8, 8, 3), np.uint8)
        face = cv2.resize(smooth, (112, 112), interpolation=cv2.INTER_CUBIC)
        save_jpeg(folder / "photographs" / f"{number:02}.jpg", face)  # type: ignore[arg-type]
    (folder / "photographs" / "20.jpg").write_bytes(b"no photograph")
    spec = EnsembleSpec(members=(build_member().spec,))
    ensemble = build_ensemble(spec, 2, get_registry())
    digest = ensemble.digest(read_shared_state(ensemble))
    write_bundle(folder / "model.zip", ensemble, digest, get_registry(), CardFacts(), "")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("crew_trial.py"))
    done = subprocess.run(
        [sys.executable, *launch, script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]
    return Trial(folder, found)


def test_features_have_the_bytes_of_one_process(trial: Trial, tmp_path: Path) -> None:
    trunk_features(build_member(), pictures(), CPU, tmp_path)
    (own,), (theirs,) = list(tmp_path.iterdir()), list((trial.folder / "cache").iterdir())
    assert own.name == theirs.name
    assert own.read_bytes() == theirs.read_bytes()
    assert trial.found[0]["sum"] == trial.found[1]["sum"]


def test_encodings_have_the_bytes_of_one_process(trial: Trial, tmp_path: Path) -> None:
    request = Request(
        trial.folder / "model.zip",
        trial.folder / "photographs",
        tmp_path / "one.npz",
        get_registry().preprocessors.get("yunet-arcface"),
        "cpu",
    )
    alone = encode_photographs(request, get_registry(), Steps(), ALONE)
    one, two = (read_encodings(p) for p in (tmp_path / "one.npz", trial.folder / "two.npz"))
    assert one.image_ids == two.image_ids
    assert one.vectors.tobytes() == two.vectors.tobytes()
    together = trial.found[0]["summary"]
    assert (together["encoded"], together["failed"]) == (alone["encoded"], alone["failed"])
    assert (together["encoded"], together["failed"], together["processes"]) == (39, 1, 2)


def test_everybody_knows_what_everybody_said(trial: Trial) -> None:
    for found in trial.found:
        assert found["size"] == 2
        assert found["gathered"] == [0, 10]


def test_a_fault_of_one_process_is_a_fault_of_both_and_leaves_nothing(trial: Trial) -> None:
    for found in trial.found:
        assert found["faulty"] == ["the image file cannot be read."] * 2
        assert "the feature cache cannot be written" in found["unwritable"]
    assert list((trial.folder / "other").iterdir()) == []


# --- without company -----------------------------------------------------------------------------


def test_a_process_alone_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_crew() as crew:
        assert crew == ALONE == crew_of_this_process()
    assert ALONE.leads
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.gather("a") == ["a"]
    assert ALONE.from_leader(lambda: 7) == 7
    with pytest.raises(DataError, match="mine"), ALONE.together():
        raise DataError("mine")


def test_all_work_is_dealt_out_once() -> None:
    shares = [Crew(rank, 3).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert [crew.leads for crew in (Crew(0, 3), Crew(1, 3))] == [True, False]
