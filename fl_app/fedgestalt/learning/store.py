"""Ensembles on disk: ``ensemble.json`` and ``weights.safetensors``, checked by digest."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.errors import ConfigError, ServerError, SiteError
from fedgestalt.hooks.registry import Registry, read_options
from fedgestalt.keys import seal, unseal
from fedgestalt.learning.ensemble import (
    Ensemble,
    Outline,
    SharedState,
    build_ensemble,
    write_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec

_SCHEMA = "fedgestalt.ensemble/1"
_LENGTH_BYTES = 8
_MANIFEST, _WEIGHTS = "ensemble.json", "weights.safetensors"


def save_ensemble(folder: Path, ensemble: Ensemble | Outline, state: SharedState) -> str:
    """Store an ensemble's specification and shared state; returns its digest.

    Frozen parts come from the installed plugins again, checked by digest.

    Raises:
        SiteError: the folder cannot be written.
    """
    digest = ensemble.digest(state)
    manifest = {
        "schema": _SCHEMA,
        "notice": RESEARCH_USE_ONLY,
        "fedgestalt": __version__,
        "digest": digest,
        "classes": ensemble.classes,
        "spec": ensemble.spec.model_dump(mode="json"),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".ensemble-"))
        try:
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            write_tensors(temporary / _WEIGHTS, state)
            if folder.exists():
                shutil.rmtree(folder)
            temporary.replace(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise _cannot_store(error) from None
    return digest


def write_tensors(path: Path, state: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a file in the format of safetensors, tensor by tensor.

    The library's own writer copies all tensors first: a whole model in memory more.

    Args:
        path: of the file.
        state: float32 values by name.

    Raises:
        OSError: it cannot be written.
    """
    header, start = {}, 0
    for name, values in sorted(state.items()):
        end = start + 4 * values.size
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in sorted(state.items()):
            file.write(np.ascontiguousarray(values, "<f4").data)


def reason_of(error: Exception) -> str:
    """What the system said about a file; safetensors wraps it in a sentence of its own."""
    said = getattr(error, "strerror", None) or str(error)
    return said.rpartition(": ")[2].partition(" (os error")[0]


def load_ensemble(folder: Path, registry: Registry) -> tuple[Ensemble, str]:
    """Load an ensemble; returns it with its digest.

    Raises:
        SiteError: there is none in ``folder``.
        ConfigError: it is damaged, or the installed plugins give another model than was stored.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        state = load_file(folder / _WEIGHTS)
    except FileNotFoundError:
        raise SiteError("this site does not hold the ensemble that the job names") from None
    except (OSError, ValueError, SafetensorError):
        raise ConfigError("the stored ensemble is damaged", where=str(folder)) from None
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        raise ConfigError(f"its manifest is not {_SCHEMA}", where=str(folder))
    spec_fields, classes = manifest.get("spec"), manifest.get("classes")
    if not isinstance(spec_fields, dict) or not isinstance(classes, int):
        raise ConfigError("the stored ensemble is damaged", where=str(folder))
    spec = read_options(EnsembleSpec, spec_fields, where=str(folder))
    ensemble = build_ensemble(spec, classes, registry)
    write_shared_state(ensemble, state)
    digest = ensemble.digest(state)
    if digest != manifest.get("digest"):
        raise ConfigError(
            "the stored ensemble does not have the digest it names",
            where=str(folder),
            remedy="install the plugin versions it was trained with, or fetch it again",
        )
    return ensemble, digest


def ensemble_to_words(folder: Path, key: bytes) -> NDArray[np.uint32]:
    """A stored ensemble, sealed, as words for a transfer.

    Args:
        folder: see :func:`save_ensemble`.
        key: 32 bytes, for this alone.

    Raises:
        SiteError: there is none in ``folder``.
    """
    try:
        manifest, weights = ((folder / name).read_bytes() for name in (_MANIFEST, _WEIGHTS))
    except OSError as error:
        raise SiteError(f"the ensemble cannot be read ({error.strerror})") from None
    plain = len(manifest).to_bytes(_LENGTH_BYTES, "little") + manifest + weights
    sealed = seal(key, plain, _SCHEMA.encode())
    padded = len(sealed).to_bytes(_LENGTH_BYTES, "little") + sealed
    return np.frombuffer(padded + bytes(-len(padded) % 4), np.uint32)


def ensemble_from_words(
    words: NDArray[np.uint32], key: bytes, folder: Path, registry: Registry
) -> None:
    """Store an ensemble that came sealed; ``folder`` is named by its digest.

    Raises:
        ServerError: it does not open, or is another ensemble.
        SiteError: it cannot be stored.
    """
    content = words.tobytes()
    size = int.from_bytes(content[:_LENGTH_BYTES], "little")
    plain = unseal(key, content[_LENGTH_BYTES : _LENGTH_BYTES + size], _SCHEMA.encode())
    if plain is None:
        raise ServerError("the sealed ensemble does not open: it was altered", where="server")
    start = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "little")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".ensemble-"))
    except OSError as error:
        raise _cannot_store(error) from None
    try:
        (temporary / _MANIFEST).write_bytes(plain[_LENGTH_BYTES:start])
        (temporary / _WEIGHTS).write_bytes(plain[start:])
        if load_ensemble(temporary, registry)[1] != folder.name:
            raise ServerError("the sealed ensemble is not the one that the job names")
        temporary.replace(folder)
    except OSError as error:
        raise _cannot_store(error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cannot_store(error: Exception) -> SiteError:
    return SiteError(
        f"the ensemble cannot be stored ({reason_of(error)})",
        remedy="free disk space; ensembles stored earlier are untouched",
    )
