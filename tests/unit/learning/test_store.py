"""Ensembles on disk come back as they were stored, or not at all."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.errors import ConfigError, FedgestaltError, PluginError, SiteError
from fedgestalt.hooks import Registry, get_registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    build_ensemble,
    read_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.store import load_ensemble, reason_of, save_ensemble, write_tensors

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
MANIFEST, WEIGHTS = "ensemble.json", "weights.safetensors"


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    members = tuple(
        MemberSpec(name=name, backbone="iresnet", options=TINY, trainable=name)  # type: ignore[arg-type]
        for name in ("neck", "none")
    )
    return build_ensemble(EnsembleSpec(members=members), 3, get_registry())


@pytest.fixture(scope="module")
def trained(ensemble: Ensemble) -> SharedState:
    """A state that differs from the start in every tensor."""
    rng = np.random.default_rng(0)
    return {
        name: values + rng.random(values.shape, np.float32)
        for name, values in read_shared_state(ensemble).items()
    }


@pytest.fixture
def stored(tmp_path: Path, ensemble: Ensemble, trained: SharedState) -> Path:
    save_ensemble(tmp_path / "stored", ensemble, trained)
    return tmp_path / "stored"


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    edit(content)
    (folder / MANIFEST).write_text(json.dumps(content))


def test_what_was_stored_is_loaded(
    tmp_path: Path, ensemble: Ensemble, trained: SharedState
) -> None:
    folder = tmp_path / "deep" / "down"
    digest = save_ensemble(folder, ensemble, trained)
    loaded, found = load_ensemble(folder, get_registry())
    assert found == digest == ensemble.digest(trained)
    assert loaded.spec == ensemble.spec
    assert loaded.classes == 3
    for name, values in read_shared_state(loaded).items():
        np.testing.assert_allclose(values, trained[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_storing_does_not_change_the_modules(
    tmp_path: Path, ensemble: Ensemble, trained: SharedState
) -> None:
    before = ensemble.start_digest
    save_ensemble(tmp_path / "a", ensemble, trained)
    assert ensemble.start_digest == before


def test_an_outline_is_enough_to_store_a_state(
    tmp_path: Path, ensemble: Ensemble, trained: SharedState, stored: Path
) -> None:
    digest = save_ensemble(tmp_path / "other", ensemble.outline(), trained)
    assert digest == ensemble.digest(trained)
    for name in (MANIFEST, WEIGHTS):
        assert (tmp_path / "other" / name).read_bytes() == (stored / name).read_bytes()


@given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8), st.lists(st.integers(0, 3), max_size=3), max_size=4
    )
)
def test_tensors_are_written_as_the_library_reads_them(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]]
) -> None:
    rng = np.random.default_rng(0)
    state = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    path = tmp_path_factory.mktemp("tensors") / "file"
    write_tensors(path, {n: np.asfortranarray(values) for n, values in state.items()})
    found = load_file(path)
    assert found.keys() == state.keys()
    for name, values in state.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(28, "No space left on device", "/secret/place"), "No space left on device"),
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            "No space left on device",
        ),
        (
            SafetensorError(
                "Error while serializing: I/O error: No such file or directory (os error 2) at path"
                ' "/secret/place"'
            ),
            "No such file or directory",
        ),
        (SafetensorError("InvalidHeader"), "InvalidHeader"),
        (OSError("No such device (os error 19)"), "No such device"),
    ],
)
def test_the_reason_is_what_the_system_said_without_the_place(error: Exception, why: str) -> None:
    assert reason_of(error) == why


def test_the_manifest_says_what_the_model_is_not(stored: Path) -> None:
    content = json.loads((stored / MANIFEST).read_text())
    assert content["notice"] == RESEARCH_USE_ONLY
    assert content["schema"] == "fedgestalt.ensemble/1"


def test_a_stored_ensemble_is_private_and_nothing_else_is_left(stored: Path) -> None:
    assert stat.S_IMODE(stored.stat().st_mode) == 0o700
    assert {path.name for path in stored.iterdir()} == {MANIFEST, WEIGHTS}
    assert [path.name for path in stored.parent.iterdir()] == ["stored"]


def test_storing_again_replaces(stored: Path, ensemble: Ensemble, trained: SharedState) -> None:
    other = {name: values + 1 for name, values in trained.items()}
    digest = save_ensemble(stored, ensemble, other)
    assert load_ensemble(stored, get_registry())[1] == digest != ensemble.digest(trained)
    assert [path.name for path in stored.parent.iterdir()] == ["stored"]


def test_a_place_that_cannot_be_written_is_a_site_error(
    tmp_path: Path, ensemble: Ensemble, trained: SharedState
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match="the ensemble cannot be stored"):
        save_ensemble(tmp_path / "file" / "stored", ensemble, trained)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_an_ensemble_that_is_not_there_is_a_site_error(stored: Path, name: str) -> None:
    (stored / name).unlink()
    with pytest.raises(SiteError, match="does not hold the ensemble"):
        load_ensemble(stored, get_registry())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, overwrite, empty])
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_damaged_file_is_refused(stored: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(stored / name)
    with pytest.raises(ConfigError, match="the stored ensemble is damaged") as fault:
        load_ensemble(stored, get_registry())
    assert fault.value.where == str(stored)


def test_other_weights_do_not_pass_for_the_stored_ones(stored: Path) -> None:
    weights = load_file(stored / WEIGHTS)
    weights["neck/neck/fc.bias"][0] += 1e-3
    save_file(weights, stored / WEIGHTS)
    with pytest.raises(ConfigError, match="does not have the digest it names"):
        load_ensemble(stored, get_registry())


def test_weights_of_another_model_are_refused(stored: Path) -> None:
    weights = load_file(stored / WEIGHTS)
    del weights["neck/neck/fc.bias"]
    save_file(weights, stored / WEIGHTS)
    with pytest.raises(ConfigError, match=r"'neck/neck/fc\.bias'"):
        load_ensemble(stored, get_registry())


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(digest="0" * 64),
        lambda m: m["spec"].update(seed=2),
        lambda m: m["spec"]["members"][0]["training"].update(epochs=7),
        lambda m: m["spec"]["members"][1]["options"].update(dropout=0.5),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    stored: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    change(stored, edit)
    with pytest.raises(ConfigError, match="does not have the digest it names"):
        load_ensemble(stored, get_registry())


@pytest.mark.parametrize("schema", ["fedgestalt.ensemble/2", "", None])
def test_a_manifest_of_another_schema_is_refused(stored: Path, schema: object) -> None:
    change(stored, lambda manifest: manifest.update(schema=schema))
    with pytest.raises(ConfigError, match=r"its manifest is not fedgestalt\.ensemble/1"):
        load_ensemble(stored, get_registry())


@pytest.mark.parametrize("key", ["schema", "spec", "classes", "digest"])
def test_a_manifest_without_a_key_is_refused(stored: Path, key: str) -> None:
    change(stored, lambda manifest: manifest.pop(key))
    with pytest.raises(FedgestaltError):
        load_ensemble(stored, get_registry())


@pytest.mark.parametrize(
    ("key", "value"), [("classes", "three"), ("classes", None), ("spec", 5), ("spec", [])]
)
def test_a_manifest_with_a_wrong_value_is_refused(stored: Path, key: str, value: object) -> None:
    change(stored, lambda manifest: manifest.update({key: value}))
    with pytest.raises(FedgestaltError):
        load_ensemble(stored, get_registry())


def test_a_manifest_that_is_no_object_is_refused(stored: Path) -> None:
    (stored / MANIFEST).write_text("[]")
    with pytest.raises(ConfigError, match="its manifest is not"):
        load_ensemble(stored, get_registry())


def test_a_backbone_that_is_not_installed_is_named(stored: Path) -> None:
    with pytest.raises(PluginError, match="no backbone is called 'iresnet'"):
        load_ensemble(stored, Registry([]))
