"""Trunk features that several processes compute for one job, each on a GPU of its own if there are.

The job's process starts torch's launcher, which starts the processes; they share the blocks of
photographs (:mod:`.crew`) and fill the site's feature cache. The job's process then finds every
file in the cache: beside progress and a fault, nothing comes back. The processes end with the job's
process: when it is gone, their input is closed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import Field

from fedgestalt.cohort import UNSOLVED, ImageRecord
from fedgestalt.errors import (
    ConfigError,
    DataError,
    FedgestaltError,
    PluginError,
    SiteError,
)
from fedgestalt.hooks import get_registry
from fedgestalt.learning.blocks import encoding_pictures, training_pictures
from fedgestalt.learning.crew import Crew, join_crew
from fedgestalt.learning.device import choose_device
from fedgestalt.learning.encoding import trunk_key
from fedgestalt.learning.ensemble import build_ensemble
from fedgestalt.learning.features import reserve_file, trunk_features
from fedgestalt.learning.images import FaceFiles
from fedgestalt.learning.spec import EnsembleSpec, Spec
from fedgestalt.learning.training import MemberProgress, show_nothing

log = logging.getLogger(__name__)

_FAULTS: Final[Mapping[str, type[FedgestaltError]]] = {
    kind.__name__: kind for kind in (ConfigError, DataError, PluginError, SiteError)
}
_LAUNCHER: Final = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
_CLASSES = 2
"""Of classifiers that nobody asks."""
_PROGRESS, _FAULT = "progress", "fault"


class FeatureWork(Spec):
    """Whose features of which photographs; it reaches the processes in a file of the site's own."""

    ensemble: EnsembleSpec
    photographs: tuple[Path, ...] = Field(description="aligned faces")
    seed: int | None = Field(description="of the variants to train on; None: those of an encoding")
    cache: Path = Field(description="folder of the features")
    weights: Path | None = Field(description="folder of the site's weights files")
    device: Literal["auto", "cpu", "cuda"]
    threads: int = Field(ge=1, description="of each process")

    @property
    def members(self) -> tuple[int, ...]:
        """Places of the members whose features a job looks for: those with a frozen trunk."""
        return tuple(
            place
            for place, member in enumerate(self.ensemble.members)
            if member.trainable != "all" and (self.seed is None or member.trainable != "none")
        )


def compute_features(
    work: FeatureWork, processes: int, progress: MemberProgress = show_nothing
) -> None:
    """Fill the cache with what a job will look for there.

    Args:
        work: what to compute.
        processes: how many.
        progress: see :data:`.training.MemberProgress`.

    Raises:
        DataError: a photograph cannot be read, or changed in the meantime.
        SiteError: the cache cannot be written, or a process ended without a word.
    """
    if not work.members or not work.photographs:
        return
    log.info("%d processes compute features", processes)
    file = reserve_file(work.cache, 0)
    try:
        file.write_text(work.model_dump_json(), encoding="utf-8")
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, *_LAUNCHER, str(processes), "-m", __name__, str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(work.threads)},
        )
        try:
            fault = _listen(process, progress)
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    finally:
        file.unlink(missing_ok=True)
    if fault is not None:
        raise fault
    if process.returncode:
        raise SiteError(
            "the processes that compute features ended before they were done",
            remedy="its own log says why; set processes to 1 to compute in the job's own process",
        )


def _listen(process: subprocess.Popen[str], progress: MemberProgress) -> FedgestaltError | None:
    """Follow the processes to their end; returns the fault that they named."""
    fault = None
    for line in process.stdout or ():
        try:
            kind, *said = json.loads(line)
        except (ValueError, TypeError):
            log.info("%s", line.rstrip())
            continue
        if kind == _PROGRESS:
            progress(*said)
        elif kind == _FAULT:
            name, what, where, remedy = said
            fault = _FAULTS.get(name, SiteError)(what, where=where, remedy=remedy)
    return fault


# --- in each of the processes -------------------------------------------------------------------


def work_in_crew(work: FeatureWork, crew: Crew) -> None:
    """Compute this process's share."""
    torch.set_num_threads(work.threads)
    records = (ImageRecord(path.stem, "", UNSOLVED, path) for path in work.photographs)
    with crew.together():
        registry = get_registry().with_weights(work.weights)
        members = build_ensemble(work.ensemble, _CLASSES, registry).members
        faces, device = FaceFiles(tuple(records)), choose_device(work.device)
    trunks: set[str] = set()
    for index in work.members:
        member = members[index]
        if work.seed is None:
            if trunk_key(member) in trunks:
                continue
            trunks.add(trunk_key(member))
            pictures = encoding_pictures(faces)
        else:
            count = member.spec.training.variants
            pictures = training_pictures(faces, count, (work.seed, index))

        def tell(done: int, total: int, name: str = member.spec.name) -> None:
            if crew.leads:
                _say(_PROGRESS, name, done, total)

        trunk_features(member, pictures, device, work.cache, tell)


def _say(*words: object) -> None:
    sys.stdout.write(json.dumps(words) + "\n")
    sys.stdout.flush()


def _end_with_the_job() -> None:
    while os.read(sys.stdin.fileno(), 1):  # unbuffered: the interpreter may end meanwhile
        pass
    os._exit(1)


def main(file: str) -> int:
    """Do what the file says; a fault is told by the leading process."""
    threading.Thread(target=_end_with_the_job, daemon=True).start()
    work = FeatureWork.model_validate_json(Path(file).read_text(encoding="utf-8"))
    with join_crew() as crew:
        try:
            work_in_crew(work, crew)
        except FedgestaltError as fault:
            if crew.leads:
                _say(_FAULT, type(fault).__name__, fault.what, fault.where, fault.remedy)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
