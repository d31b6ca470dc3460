"""What a training job keeps between rounds, so that a crash loses the round in progress at most.

The server keeps its state per job outside of FLARE's run folders, which end with the job. Each site
keeps the last models that it applied, by digest, with what it trained beside them and gives to
nobody, and how often an update to each has left it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.learning.ensemble import SharedState, shared_state_digest
from fedgestalt.learning.spec import Spec
from fedgestalt.learning.store import reason_of, write_tensors

MODELS_KEPT: Final = 2
"""How many models a site keeps."""

CHECKPOINTS_FOLDER: Final = Path("fedgestalt") / "checkpoints"
"""In the server's workspace."""
MODELS_FOLDER: Final = "checkpoints"
"""In a site's store."""

_SCHEMA = "fedgestalt.checkpoint/1"
_STATE = "checkpoint.json"
_JOB = re.compile(r"[A-Za-z0-9-]{1,64}")
_OWN = ".own"
"""Ending of the file beside a model with what stays at the site."""
_JOBS_KEPT, _COUNTS_KEPT = 8, 1000
_UNREADABLE = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError),
    SafetensorError,
)
"""What reading a damaged file raises."""


class Checkpoint(Spec):
    """A training job after a complete round, as its server knows it.

    Attributes:
        job: its id.
        round: the last complete one.
        spec: digest of the ensemble's specification.
        aggregation: its settings.
        model: digest of the model, hexadecimal.
        ranges: of the next round; still the first ones where the server does not know the model.
        records: of the rounds so far, for the outcome.
        transcript: of the rounds so far.
    """

    job: str
    round: int = Field(ge=1)
    spec: str
    aggregation: dict[str, Any]
    model: str = Field(pattern="^[0-9a-f]{64}$")
    ranges: dict[str, float]
    records: list[dict[str, Any]]
    transcript: dict[str, Any]


class ServerCheckpoints:
    """The checkpoints of all training jobs of one server.

    Args:
        folder: outside of all run folders; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, checkpoint: Checkpoint, state: SharedState | None) -> None:
        """Replace the job's checkpoint, at once or not at all.

        Args:
            checkpoint: see there.
            state: the model, where the server knows it.

        Raises:
            SiteError: the folder cannot be written.
        """
        folder = self._folder / checkpoint.job
        model = _model_in(folder, checkpoint.model)
        content = {"schema": _SCHEMA, "with_model": state is not None}
        content |= {"checkpoint": checkpoint.model_dump(mode="json")}
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            if state is not None:
                _write(model, lambda path: write_tensors(path, state))
            _write(folder / _STATE, lambda path: path.write_text(json.dumps(content), "utf-8"))
        except (OSError, SafetensorError) as error:
            raise SiteError(
                f"the checkpoint of round {checkpoint.round} cannot be written"
                f" ({reason_of(error)})",
                where="server",
                remedy="free disk space; the checkpoint before it is untouched",
            ) from None
        with suppress(OSError):  # what is left over does no harm
            for path in set(folder.iterdir()) - {model, folder / _STATE}:
                path.unlink()
            jobs = sorted(self._folder.iterdir(), key=_age)
            for path in jobs[:-_JOBS_KEPT]:
                shutil.rmtree(path)

    def load(self, job: str) -> tuple[Checkpoint, SharedState | None]:
        """The last checkpoint of a job, with its model where the server knew it.

        Raises:
            ConfigError: there is none, or it is damaged.
        """
        if not _JOB.fullmatch(job):
            raise ConfigError(f"{job[:80]!r} is no job id", where="resume_from")
        folder = self._folder / job
        if not (folder / _STATE).exists():
            raise ConfigError(
                f"this server has no checkpoint of job {job}",
                where="resume_from",
                remedy="name a training job that completed a round on this server and did not end"
                " well, or begin anew",
            )
        try:
            content = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            if content["schema"] != _SCHEMA:
                raise ValueError
            checkpoint = Checkpoint.model_validate(content["checkpoint"])
            with_model = content["with_model"]
            state = load_file(_model_in(folder, checkpoint.model)) if with_model else None
            if state is not None and shared_state_digest(state).hex() != checkpoint.model:
                raise ValueError
        except _UNREADABLE:
            raise ConfigError(
                f"the checkpoint of job {job} is damaged", where=str(folder)
            ) from None
        return checkpoint, state

    def has(self, job: str) -> bool:
        """Whether there is a checkpoint of a job."""
        return (self._folder / job / _STATE).exists()

    def drop(self, job: str) -> None:
        """Forget a job that ended well."""
        shutil.rmtree(self._folder / job, ignore_errors=True)


class SiteCheckpoints:
    """The models that one site applied last, and what has left it.

    Args:
        folder: in the site's store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sent = folder / "sent.json"

    def keep(
        self,
        digest: bytes,
        state: Mapping[str, NDArray[np.float32]],
        own: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Keep a model; the oldest ones go.

        Args:
            digest: of the model.
            state: its tensors.
            own: those that this site trains and never gives away, as they were with this model.

        Raises:
            SiteError: the store cannot be written.
        """
        target = _model_in(self._folder, digest.hex())
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if own:
                _write(target.with_suffix(_OWN), lambda path: write_tensors(path, own))
            _write(target, lambda path: write_tensors(path, state))
            older = sorted(set(self._folder.glob("*.safetensors")) - {target}, key=_age)
            for path in older[: 1 - MODELS_KEPT]:
                path.unlink(missing_ok=True)
                path.with_suffix(_OWN).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise SiteError(
                f"the model of the round cannot be stored ({reason_of(error)})",
                remedy="free disk space for its store; models stored earlier are untouched",
            ) from None

    def find(self, digest: bytes) -> SharedState | None:
        """The model with this digest, or None; it counts as one of the last from then on."""
        path = _model_in(self._folder, digest.hex())
        with suppress(*_UNREADABLE):
            state: SharedState = load_file(path)
            if shared_state_digest(state) == digest:
                os.utime(path)
                return state
        return None

    def find_own(self, digest: bytes) -> SharedState | None:
        """What the site itself had trained beside the model with this digest, or None."""
        with suppress(*_UNREADABLE):
            own: SharedState = load_file(_model_in(self._folder, digest.hex()).with_suffix(_OWN))
            return own
        return None

    def times_sent(self, digest: bytes) -> int:
        """How often an update to the model with this digest has left the site.

        Raises:
            SiteError: its record of that is damaged.
        """
        return self._counts().get(digest.hex(), 0)

    def note_sent(self, digest: bytes) -> None:
        """An update to the model with this digest is about to leave the site.

        Raises:
            SiteError: this cannot be written down, or the record is damaged; nothing may leave
                then.
        """
        counts = self._counts()
        counts[digest.hex()] = counts.pop(digest.hex(), 0) + 1
        latest = dict(list(counts.items())[-_COUNTS_KEPT:])
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _write(self._sent, lambda path: path.write_text(json.dumps(latest), "utf-8"))
        except OSError as error:
            raise SiteError(
                f"its record of what leaves it cannot be written ({error.strerror})",
                remedy="free disk space for its store; nothing was sent",
            ) from None

    def _counts(self) -> dict[str, int]:
        try:
            content = json.loads(self._sent.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except _UNREADABLE:
            content = None
        counts = content.values() if isinstance(content, dict) else (None,)
        if not isinstance(content, dict) or not all(isinstance(n, int) and n > 0 for n in counts):
            raise SiteError(
                "its record of sent updates is damaged",
                remedy="look at sent.json in its store's checkpoints; remove it only if no job that"
                " ended early is to be resumed",
            )
        return content


def _model_in(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file at once or not at all."""
    partial = path.with_suffix(".partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
