"""A bundle gives back the model that was published, or says what is wrong with it."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import save_file

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.contracts import BackboneModules, FromWeights
from fedgestalt.errors import ConfigError, FedgestaltError, SiteError
from fedgestalt.hooks import Registry, get_registry
from fedgestalt.learning import bundle as bundle_module
from fedgestalt.learning.bundle import read_bundle, write_bundle
from fedgestalt.learning.encoding import encode
from fedgestalt.learning.ensemble import (
    Ensemble,
    build_ensemble,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.model_card import CardFacts, DataFacts, facts_of_outcome
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
CPU = torch.device("cpu")
MANIFEST = "configs/fedgestalt.json"


def spec_of(name: str, trainable: str, **options: Any) -> MemberSpec:
    return MemberSpec(
        name=name,
        backbone="iresnet",
        options=TINY | options,
        trainable=trainable,  # type: ignore[arg-type]
    )


def trained(*members: MemberSpec, registry: Registry | None = None) -> tuple[Ensemble, str]:
    """An ensemble that differs from its start in every shared tensor."""
    registry = registry or get_registry()
    ensemble = build_ensemble(EnsembleSpec(members=members), 3, registry)
    rng = np.random.default_rng(0)
    state = {
        name: values + 0.1 * rng.random(values.shape, np.float32)
        for name, values in read_shared_state(ensemble).items()
    }
    write_shared_state(ensemble, state)
    return ensemble, ensemble.digest(read_shared_state(ensemble))


def faces() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def weights_file(folder: Path, seed: int = 77) -> Path:
    """Start weights that are not those of the seed in use."""
    built = build_ensemble(
        EnsembleSpec(members=(spec_of("a", "none"),), seed=seed), 2, get_registry()
    ).members[0]
    state = {**built.trunk.state_dict(), **built.neck.state_dict()}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "w.safetensors")
    return folder / "w.safetensors"


@pytest.fixture(scope="module")
def published() -> tuple[Ensemble, str]:
    return trained(spec_of("a", "neck"), spec_of("b", "all"), spec_of("c", "none"))


@pytest.fixture
def written(tmp_path: Path, published: tuple[Ensemble, str]) -> Path:
    write_bundle(tmp_path / "b", *published, get_registry(), CardFacts(), "ours\n")
    return tmp_path / "b"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["folder", "file.zip"])
def test_a_bundle_encodes_as_the_model_that_was_published(
    tmp_path: Path, published: tuple[Ensemble, str], name: str
) -> None:
    ensemble, digest = published
    left_out = write_bundle(
        tmp_path / name, ensemble, digest, get_registry(), CardFacts(), "ours\n"
    )
    found = read_bundle(tmp_path / name, get_registry())
    assert left_out == {}
    assert found.digest == digest
    np.testing.assert_array_equal(
        encode(found.ensemble, faces(), CPU), encode(ensemble, faces(), CPU)
    )
    assert names(tmp_path) == [name], "nothing else is left"


def test_start_weights_are_in_the_bundle_and_not_needed_where_it_is_read(tmp_path: Path) -> None:
    weights = weights_file(tmp_path)
    registry = get_registry().with_weights(tmp_path)
    options = {"weights": weights.name, "weights_licence": "MIT"}
    ensemble, digest = trained(
        spec_of("a", "neck", **options), spec_of("c", "none", **options), registry=registry
    )
    expected = encode(ensemble, faces(), CPU)
    write_bundle(tmp_path / "b", ensemble, digest, get_registry(), CardFacts(), "")
    weights.unlink()
    found = read_bundle(tmp_path / "b", get_registry())
    assert found.digest == digest
    assert found.ensemble.licences == {"a": "MIT", "c": "MIT"}
    np.testing.assert_array_equal(encode(found.ensemble, faces(), CPU), expected)


def test_no_path_of_the_site_is_in_the_bundle(tmp_path: Path) -> None:
    place = tmp_path / "secret-place"
    place.mkdir()
    for licence in ("MIT", "CC-BY-NC-4.0"):
        options = {"weights": weights_file(place).name, "weights_licence": licence}
        registry = get_registry().with_weights(place)
        ensemble, digest = trained(spec_of("a", "neck", **options), registry=registry)
        write_bundle(tmp_path / licence, ensemble, digest, registry, CardFacts(), "")
        for path in (tmp_path / licence).rglob("*"):
            assert path.is_dir() or b"secret-place" not in path.read_bytes()


def test_members_with_one_trunk_store_it_once(tmp_path: Path) -> None:
    ensemble, digest = trained(spec_of("a", "neck"))
    other = build_ensemble(
        EnsembleSpec(members=(spec_of("a", "neck"), spec_of("b", "neck"))), 3, get_registry()
    )
    other.members[1].load_frozen_state(other.members[0].frozen_state())
    write_bundle(tmp_path / "one", ensemble, digest, get_registry(), CardFacts(), "")
    digest = other.digest(read_shared_state(other))
    write_bundle(tmp_path / "two", other, digest, get_registry(), CardFacts(), "")
    sizes = [(tmp_path / n / "models/frozen.safetensors").stat().st_size for n in ("one", "two")]
    assert sizes[0] == sizes[1]
    assert read_bundle(tmp_path / "two", get_registry()).digest == digest


# --- licences ------------------------------------------------------------------------------------


def test_weights_that_may_not_be_passed_on_are_left_out_and_the_card_says_so(
    tmp_path: Path,
) -> None:
    weights = weights_file(tmp_path)
    registry = get_registry().with_weights(tmp_path)
    options = {"weights": weights.name, "weights_licence": "CC-BY-NC-4.0"}
    ensemble, digest = trained(spec_of("a", "neck", **options), registry=registry)
    left_out = write_bundle(tmp_path / "b", ensemble, digest, registry, CardFacts(), "")
    assert "CC-BY-NC-4.0" in left_out["a"]
    assert not (tmp_path / "b/models/frozen.safetensors").exists()
    card = (tmp_path / "b/docs/README.md").read_text()
    assert "Frozen parts of `a` are not in this bundle" in card
    assert "began as weights under CC-BY-NC-4.0" in card
    assert read_bundle(tmp_path / "b", registry).digest == digest, "where the file is"
    weights.unlink()
    for here in (registry, get_registry().with_weights(None)):
        with pytest.raises(SiteError, match=r"weights.*docs/README.md.*FEDGESTALT_WEIGHTS"):
            read_bundle(tmp_path / "b", here)


def test_other_start_weights_than_those_left_out_are_noticed(tmp_path: Path) -> None:
    registry = get_registry().with_weights(tmp_path)
    options = {"weights": weights_file(tmp_path).name}
    ensemble, digest = trained(spec_of("a", "neck", **options), registry=registry)
    write_bundle(tmp_path / "b", ensemble, digest, registry, CardFacts(), "")
    weights_file(tmp_path, seed=78)
    with pytest.raises(ConfigError, match="does not have the digest it names"):
        read_bundle(tmp_path / "b", registry)


def test_members_that_train_their_last_stage_or_keep_their_norms_come_back(
    tmp_path: Path,
) -> None:
    registry = get_registry().with_weights(tmp_path)
    options = {"weights": weights_file(tmp_path).name, "weights_licence": "MIT"}
    local = TrainingSpec(batch_norm="local")
    members = (
        spec_of("a", "last-stage", **options),
        spec_of("b", "all", **options).model_copy(update={"training": local}),
    )
    ensemble, digest = trained(*members, registry=registry)
    write_bundle(tmp_path / "b", ensemble, digest, registry, CardFacts(), "")
    found = read_bundle(tmp_path / "b", get_registry().with_weights(None))
    assert found.digest == digest
    np.testing.assert_array_equal(
        encode(found.ensemble, faces(), CPU), encode(ensemble, faces(), CPU)
    )


def test_a_site_may_leave_frozen_parts_out(tmp_path: Path, published: tuple[Ensemble, str]) -> None:
    left_out = write_bundle(
        tmp_path / "b", *published, get_registry(), CardFacts(), "", with_frozen=False
    )
    assert left_out.keys() == {"a", "b", "c"}
    assert not (tmp_path / "b/models/frozen.safetensors").exists()
    assert read_bundle(tmp_path / "b", get_registry()).digest == published[1]


class FileOptions(FromWeights):
    weights: Path = Field()


class FileBackbone:
    """Cannot be built without a file."""

    name, summary, licence, options = "filed", "", "MIT", FileOptions

    def build(self, options: FileOptions, seed: int) -> BackboneModules:
        assert options.weights.read_bytes() == b"graph"
        spec = EnsembleSpec(members=(spec_of("a", "none"),), seed=5)
        built = build_ensemble(spec, 2, get_registry()).members[0]
        shape, size = built.feature_shape, built.embedding_size
        return BackboneModules(built.trunk, built.neck, built.input, shape, size, "MIT")


def test_a_file_that_a_backbone_cannot_do_without_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Registry = get_registry().with_weights(tmp_path)
    get = registry.backbones.get
    monkeypatch.setattr(
        registry.backbones, "get", lambda name: FileBackbone() if name == "filed" else get(name)
    )
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(b"graph")
    member = MemberSpec(name="a", backbone="filed", options={"weights": graph.name})
    ensemble = build_ensemble(EnsembleSpec(members=(member,)), 3, registry)
    digest = ensemble.digest(read_shared_state(ensemble))
    for name in ("b", "b.zip"):
        write_bundle(tmp_path / name, ensemble, digest, registry, CardFacts(), "")
    graph.unlink()
    for name in ("b", "b.zip"):
        assert read_bundle(tmp_path / name, registry).digest == digest


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["models/trained.safetensors", "models/frozen.safetensors", "docs/README.md"]
)
def test_a_missing_or_altered_file_is_named(written: Path, file: str) -> None:
    content = (written / file).read_bytes()
    (written / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=f"{file} is not the file that was published"):
        read_bundle(written, get_registry())
    (written / file).unlink()
    with pytest.raises(ConfigError, match=f"{file} is missing; get the bundle again"):
        read_bundle(written, get_registry())


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(digest="0" * 64),
        lambda c: c["spec"]["members"][0].update(name="z"),
        lambda c: c["spec"]["members"][0]["options"].update(embedding_size=9),
        lambda c: c["spec"]["members"][2]["options"].update(width=8),
        lambda c: c["spec"]["members"].pop(),
        lambda c: c["spec"].update(surprise=1),
        lambda c: c["frozen"].update(a="nobody"),
        lambda c: c["files"].pop("models/trained.safetensors"),
        lambda c: c["files"].update({"../outside": "0" * 64}),
        lambda c: c.update(classes=4),
        lambda c: c.update(classes="three"),
        lambda c: c.update(schema="fedgestalt.bundle/9"),
        lambda c: c.update(files=[]),
        lambda c: c.update(start=["../../outside"]),
        lambda c: c.update(start={"a": "weights"}),
        lambda c: c.update(frozen={"a": 1}),
        lambda c: c.pop("licences"),
    ],
)
def test_a_manifest_that_does_not_fit_is_a_sentence(
    written: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    edit(written, change)
    with pytest.raises(ConfigError) as caught:
        read_bundle(written, get_registry())
    assert caught.value.where


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_manifest_that_is_none_is_a_sentence(written: Path, content: bytes) -> None:
    (written / MANIFEST).write_bytes(content)
    with pytest.raises(ConfigError, match=r"fedgestalt\.json is (damaged|not fedgestalt)"):
        read_bundle(written, get_registry())


def test_what_is_no_bundle_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="there is no such bundle"):
        read_bundle(tmp_path / "nothing", get_registry())
    with pytest.raises(ConfigError, match="neither a folder nor a zip"):
        read_bundle(tmp_path / "text", get_registry())
    with pytest.raises(ConfigError, match=r"fedgestalt\.json is missing"):
        read_bundle(tmp_path / "empty", get_registry())


def test_a_cut_zip_is_a_sentence(tmp_path: Path, published: tuple[Ensemble, str]) -> None:
    out = tmp_path / "b.zip"
    write_bundle(out, *published, get_registry(), CardFacts(), "")
    content = out.read_bytes()
    for size in (len(content) // 2, len(content) - 30):
        out.write_bytes(content[:size])
        with pytest.raises(FedgestaltError):
            read_bundle(out, get_registry())
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    out.write_bytes(flipped)
    with pytest.raises(ConfigError):
        read_bundle(out, get_registry())


def test_an_existing_place_is_refused(written: Path, published: tuple[Ensemble, str]) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        write_bundle(written, *published, get_registry(), CardFacts(), "")


@pytest.mark.parametrize("name", ["b", "b.zip"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path,
    published: tuple[Ensemble, str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bundle_module, "_file_digest", full)
    with pytest.raises(SiteError, match="No space left on device"):
        write_bundle(tmp_path / name, *published, get_registry(), CardFacts(), "")
    assert names(tmp_path) == []


# --- card and metadata ---------------------------------------------------------------------------

FACTS = CardFacts(
    rounds=5,
    sites=4,
    images=1234,
    aggregation={"rule": "mean"},
    data=DataFacts("ours", "v1", "d" * 64, 500, 300, 20),
    day=dt.date(2026, 1, 2),
)


def test_the_card_states_what_is_known(tmp_path: Path, published: tuple[Ensemble, str]) -> None:
    write_bundle(tmp_path / "b", *published, get_registry(), FACTS, "ours\n")
    card = (tmp_path / "b/docs/README.md").read_text()
    for expected in (
        RESEARCH_USE_ONLY,
        published[1],
        "rounds: 5",
        "sites: 4; photographs of all sites together: 1,234",
        "rule: mean",
        f"version v1, digest `{'d' * 64}`; 500 photographs of 300 subjects with 20 syndromes",
        "none: random start",
        "## Intended use",
        "## Limits",
        "2026-01-02",
    ):
        assert expected in card, expected
    assert (tmp_path / "b/LICENSE").read_text() == "ours\n"


def test_the_card_says_what_is_not_known(written: Path) -> None:
    card = (written / "docs/README.md").read_text()
    assert "rounds: not stated" in card
    assert "data of the site that exported the bundle: not stated" in card


def test_the_metadata_has_the_keys_of_monai(written: Path, published: tuple[Ensemble, str]) -> None:
    found = json.loads((written / "configs/metadata.json").read_text())
    needed = {
        *("version", "changelog", "monai_version", "pytorch_version", "numpy_version"),
        *("required_packages_version", "name", "task", "description", "authors", "copyright"),
        "network_data_format",
    }
    assert needed <= found.keys()
    assert found["version"] in found["changelog"]
    channels = found["network_data_format"]["outputs"]["pred"]["num_channels"]
    assert channels == published[0].encoding_size
    assert RESEARCH_USE_ONLY in found["description"]


def test_facts_come_from_the_outcome_of_a_job() -> None:
    outcome = {
        "sites": ["a", "b", "c"],
        "rounds": [{"images": 7}, {"images": 9}],
        "aggregation": {"rule": "mean"},
    }
    found = replace(facts_of_outcome(outcome), day=FACTS.day)
    assert found == CardFacts(2, 3, 9, {"rule": "mean"}, None, FACTS.day)
    assert facts_of_outcome({}).rounds is None
    assert facts_of_outcome({"rounds": [{}], "sites": 3}).images is None


def test_a_zip_has_the_files_of_the_folder(
    tmp_path: Path, written: Path, published: tuple[Ensemble, str]
) -> None:
    write_bundle(tmp_path / "b.zip", *published, get_registry(), CardFacts(), "ours\n")
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        names = set(archive.namelist())
    assert names == {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()}
    shutil.rmtree(written)
