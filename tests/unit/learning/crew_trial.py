"""What :mod:`test_crew` starts in two processes: features, encodings, and faults of one of them."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.console import Steps
from fedgestalt.encode import Request, encode_photographs
from fedgestalt.errors import DataError, FedgestaltError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.blocks import Pictures
from fedgestalt.learning.crew import Crew, join_crew
from fedgestalt.learning.ensemble import Member, build_ensemble
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec

CPU = torch.device("cpu")
IMAGES = 150  # three blocks


def build_member() -> Member:
    options = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
    spec = MemberSpec(name="a", backbone="iresnet", options=options)
    return build_ensemble(EnsembleSpec(members=(spec,)), 2, get_registry()).members[0]


def pictures() -> Pictures:
    def make(start: int, stop: int) -> NDArray[np.uint8]:
        faces = np.random.default_rng(0).integers(0, 256, (IMAGES, 1, 28, 28, 3), np.uint8)
        return faces[start:stop].repeat(4, axis=2).repeat(4, axis=3)

    return Pictures(IMAGES, 1, make)


def faulty(crew: Crew, reads: int) -> Pictures:
    """The second process can read its one block so often, and no more."""
    calls: list[int] = []

    def make(start: int, stop: int) -> NDArray[np.uint8]:
        calls.append(start)
        if crew.rank == 1 and len(calls) > reads:
            raise DataError("the image file cannot be read")
        return pictures().make(start, stop)

    return Pictures(IMAGES, 1, make)


def fault_of(work: Any) -> str:
    try:
        work()
    except FedgestaltError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Run everything; each process writes what it found."""
    torch.set_num_threads(1)
    with join_crew() as crew:
        member = build_member()
        features = trunk_features(member, pictures(), CPU, folder / "cache")
        (folder / "file").write_text("")
        summary = encode_photographs(
            Request(
                folder / "model.zip",
                folder / "photographs",
                folder / "two.npz",
                get_registry().preprocessors.get("yunet-arcface"),
                "cpu",
            ),
            get_registry(),
            Steps(),
            crew,
        )
        found = {
            "size": crew.size,
            "sum": float(features.float().sum()),
            "gathered": crew.gather(crew.rank * 10),
            "faulty": [
                fault_of(functools.partial(trunk_features, member, bad, CPU, folder / "other"))
                for bad in (faulty(crew, 0), faulty(crew, 1))
            ],
            "unwritable": fault_of(
                lambda: trunk_features(member, pictures(), CPU, folder / "file" / "cache")
            ),
            "summary": summary,
        }
    (folder / f"found-{crew.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
