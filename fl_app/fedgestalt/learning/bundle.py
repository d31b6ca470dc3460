"""A published model as a MONAI Bundle: a folder or a zip that encodes offline.

The layout is that of the MONAI Bundle specification; MONAI itself is not needed to write or read
one::

    configs/metadata.json         what the model is, in MONAI's keys
    configs/fedgestalt.json       how to build it, and the SHA-256 of every file
    models/trained.safetensors    what the consortium trained
    models/frozen.safetensors     trunks (and necks) that stayed as they were
    models/start/                 weights files that a backbone cannot be built without
    docs/README.md                the model card
    LICENSE

Frozen tensors and weights files are left out where the licence of the start weights does not allow
to pass them on, or the site does not want to; the reader's weights folder must have the files then.
Whatever comes from where, the digest of the whole model must be the one that was published.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open

from fedgestalt import RESEARCH_USE_ONLY, __version__
from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.hooks.registry import Registry, read_options
from fedgestalt.learning.ensemble import (
    Ensemble,
    Member,
    build_ensemble,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.licences import may_be_passed_on
from fedgestalt.learning.model_card import CardFacts, metadata, model_card
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, Spec
from fedgestalt.learning.store import reason_of, write_tensors

SCHEMA: Final = "fedgestalt.bundle/1"
MANIFEST, METADATA = "configs/fedgestalt.json", "configs/metadata.json"
CARD, LICENCE = "docs/README.md", "LICENSE"
TRAINED, FROZEN, START = "models/trained.safetensors", "models/frozen.safetensors", "models/start"

_MANIFEST_BYTES: Final = 1 << 22


class Manifest(Spec):
    """``configs/fedgestalt.json``, beside its schema.

    Attributes:
        notice: that this is for research.
        fedgestalt: version that wrote it.
        digest: of the whole model.
        classes: of the classifier.
        spec: of the ensemble.
        licences: of the start weights, by member.
        frozen: where in the file of frozen tensors a member's are, by member.
        start: names of weights files in the bundle.
        began: digests of the trunks that trained, as they were before, by member.
        files: SHA-256 of each file, hexadecimal.
    """

    notice: str
    fedgestalt: str
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    classes: int = Field(ge=1)
    spec: EnsembleSpec
    licences: dict[str, str]
    frozen: dict[str, str]
    start: tuple[str, ...]
    began: dict[str, str]
    files: dict[str, str]

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        needed = {TRAINED, *(f"{START}/{name}" for name in self.start)}
        if not needed <= self.files.keys():
            message = "a file that is needed is not listed"
            raise ValueError(message)
        return self


@dataclass(frozen=True)
class Bundle:
    """A published model, ready to encode.

    Attributes:
        ensemble: with the published weights.
        digest: of the model, as the consortium knows it.
    """

    ensemble: Ensemble
    digest: str


@dataclass(frozen=True)
class _Frozen:
    """What of the unchanged parts goes into a bundle.

    Attributes:
        tensors: by name in the file.
        prefixes: of each member's tensors; members with one trunk share them.
        start: weights files by name.
        left_out: why a member's are not there.
    """

    tensors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)
    start: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def write_bundle(
    out: Path,
    ensemble: Ensemble,
    digest: str,
    registry: Registry,
    facts: CardFacts,
    licence: str,
    *,
    with_frozen: bool = True,
) -> dict[str, str]:
    """Write a published model to the new folder ``out``, or to a zip if it is named so.

    Args:
        out: must not exist.
        ensemble: with the published weights.
        digest: of the model.
        registry: to look backbones up.
        facts: for the model card.
        licence: text of the licence of what was trained.
        with_frozen: whether parts that training did not change come along.

    Returns:
        Why frozen parts are left out, by member; empty if all are there.

    Raises:
        ConfigError: ``out`` exists.
        SiteError: it cannot be written.
    """
    if out.exists():
        raise ConfigError("exists already", where=str(out), remedy="name a new folder or file")
    frozen = _collect(ensemble, registry, with_frozen)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=out.parent, prefix=".bundle-"))
        try:
            folder = holder / "bundle"
            _fill(folder, ensemble, digest, facts, licence, frozen)
            if out.suffix == ".zip":
                packed = holder / "bundle.zip"
                _pack(folder, packed)
                packed.replace(out)
            else:
                folder.replace(out)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise SiteError(
            f"the bundle cannot be written ({reason_of(error)})",
            where=str(out),
            remedy="free disk space, or choose another place; nothing was left there",
        ) from None
    return frozen.left_out


def _collect(ensemble: Ensemble, registry: Registry, with_frozen: bool) -> _Frozen:
    found, prefix_of = _Frozen(), dict[str, str]()
    for member in ensemble.members:
        name, licence = member.spec.name, member.weights_licence
        state = member.frozen_state()
        if not with_frozen:
            found.left_out[name] = "the site that exported the bundle left them out"
        elif not may_be_passed_on(licence):
            found.left_out[name] = (
                f"their licence ({licence}) does not say that anybody may pass them on"
            )
        else:
            content = "|".join([member.trunk_digest, *sorted(state)])
            prefix = prefix_of.setdefault(content, name)
            found.prefixes[name] = prefix
            found.tensors.update({f"{prefix}/{key}": values for key, values in state.items()})
            if _needs_weights(member.spec, registry):
                file = str(member.spec.options["weights"])
                found.start[file] = ensemble.weights[file]
    return found


def _needs_weights(spec: MemberSpec, registry: Registry) -> bool:
    """Whether the backbone cannot be built without its weights file."""
    info = registry.backbones.get(spec.backbone).options.model_fields.get("weights")
    return info is not None and info.is_required()


def _fill(
    folder: Path,
    ensemble: Ensemble,
    digest: str,
    facts: CardFacts,
    licence: str,
    frozen: _Frozen,
) -> None:
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    write_tensors(folder / TRAINED, read_shared_state(ensemble))
    if frozen.tensors:
        write_tensors(folder / FROZEN, frozen.tensors)
    for name, path in frozen.start.items():
        (folder / START).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / START / name)
    (folder / METADATA).write_text(
        json.dumps(metadata(ensemble, digest, facts), indent=2), encoding="utf-8"
    )
    card = model_card(ensemble, digest, facts, frozen.left_out)
    (folder / CARD).write_text(card, encoding="utf-8")
    (folder / LICENCE).write_text(licence, encoding="utf-8")
    manifest = Manifest(
        notice=RESEARCH_USE_ONLY,
        fedgestalt=__version__,
        digest=digest,
        classes=ensemble.classes,
        spec=ensemble.spec,
        licences=ensemble.licences,
        frozen=frozen.prefixes,
        start=tuple(frozen.start),
        began={m.spec.name: m.trunk_digest for m in ensemble.members if not m.trunk_is_frozen},
        files={
            str(path.relative_to(folder)): _file_digest(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    )
    content = {"schema": SCHEMA, **manifest.model_dump(mode="json")}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2), encoding="utf-8")


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _pack(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # weights do not compress
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))


def read_bundle(place: Path, registry: Registry) -> Bundle:
    """Read a bundle, a folder or a zip; every file and the whole model are checked by digest.

    Raises:
        ConfigError: it is none, or a file is missing or was altered, or a backbone's plugin is not
            the one it was made with.
        SiteError: there is no room to unpack it.
        PluginError: a backbone is not installed.
    """
    if place.is_dir():
        return _open(place, place, registry)
    if not place.exists():
        raise ConfigError("there is no such bundle", where=str(place))
    try:
        with (
            zipfile.ZipFile(place) as archive,
            tempfile.TemporaryDirectory(prefix="fedgestalt-bundle-") as folder,
        ):
            archive.extractall(folder)
            return _open(Path(folder), place, registry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
        raise ConfigError(
            "is neither a folder nor a zip",
            where=str(place),
            remedy="name what `fedgestalt bundle export` wrote",
        ) from None
    except OSError as error:
        raise SiteError(
            f"the bundle cannot be unpacked ({error.strerror})",
            where=str(place),
            remedy="free disk space for temporary files, or unpack it yourself",
        ) from None


def _open(folder: Path, place: Path, registry: Registry) -> Bundle:
    manifest = _read_manifest(folder, place)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise _fault(place, f"{name} is missing")
        if _file_digest(path) != expected:
            raise _fault(place, f"{name} is not the file that was published")
    ensemble = _build(folder, place, manifest, registry)
    state = _read_tensors(folder / TRAINED)
    try:
        write_shared_state(ensemble, state)
    except ConfigError as error:
        raise _fault(place, error.what) from None
    digest = ensemble.digest(state)
    if digest != manifest.digest:
        raise ConfigError(
            "the model does not have the digest it names",
            where=str(place),
            remedy="install the plugin versions and start weights it was trained with, or get the"
            " bundle again",
        )
    return Bundle(ensemble, digest)


def _read_manifest(folder: Path, place: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise _fault(place, f"{MANIFEST} is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _fault(place, f"{MANIFEST} is missing") from None
    except (OSError, ValueError):
        raise _fault(place, f"{MANIFEST} is damaged") from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
        raise _fault(place, f"{MANIFEST} is not {SCHEMA}")
    return read_options(Manifest, content, where=f"{place}: {MANIFEST}")


def _build(folder: Path, place: Path, manifest: Manifest, registry: Registry) -> Ensemble:
    spec, carried = manifest.spec, manifest.frozen
    frozen = _read_tensors(folder / FROZEN) if FROZEN in manifest.files else {}
    members, weights = [], dict[str, Path]()
    for number, member in enumerate(spec.members):
        own = registry
        if member.name in carried and _needs_weights(member, registry):
            own = registry.with_weights(folder / START)
        elif member.name in carried:  # built at random, then overwritten
            options = {n: v for n, v in member.options.items() if n != "weights"}
            shared = member.training.model_copy(update={"batch_norm": "shared"})
            member = member.model_copy(update={"options": options, "training": shared})
        try:
            alone = EnsembleSpec(members=(member,), seed=spec.seed + number)
            built = build_ensemble(alone, manifest.classes, own)
        except (ConfigError, SiteError) as error:
            if member.name not in carried:
                error.remedy = (
                    "the bundle does not contain these start weights: its docs/README.md says why;"
                    " put the file into the folder that FEDGESTALT_WEIGHTS names"
                )
            raise
        (ready,) = built.members
        ready.spec = spec.members[number]
        if member.name in carried:
            _load(ready, frozen, carried[member.name], manifest, place)
            ready.trunk_digest = manifest.began.get(member.name, ready.trunk_digest)
        members.append(ready)
        weights.update(built.weights)
    return Ensemble(spec, tuple(members), manifest.classes, weights)


def _load(
    member: Member,
    frozen: Mapping[str, NDArray[np.float32]],
    prefix: str,
    manifest: Manifest,
    place: Path,
) -> None:
    start = f"{prefix}/"
    own = {n.removeprefix(start): v for n, v in frozen.items() if n.startswith(start)}
    try:
        member.load_frozen_state({n: own[n] for n in member.frozen_state() if n in own})
    except ConfigError as error:
        raise _fault(place, error.what, error.remedy) from None
    member.weights_licence = manifest.licences.get(member.spec.name, "")


def _read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """Tensors of a file, one at a time: the file itself is never in memory beside them."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        raise ConfigError(f"{path.name} is damaged", where=str(path.parent)) from None


def _fault(place: Path, what: str, remedy: str = "get the bundle again") -> ConfigError:
    return ConfigError(what, where=str(place), remedy=remedy)
