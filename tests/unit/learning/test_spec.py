"""Specifications: strict, immutable, and the same wherever they are read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgestalt.errors import ConfigError
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec, default_ensemble

options = st.dictionaries(
    st.text(max_size=5), st.integers() | st.booleans() | st.text(max_size=5), max_size=3
)
members = st.builds(
    MemberSpec,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True),
    backbone=st.text(max_size=5),
    options=options,
    trainable=st.sampled_from(["none", "neck", "last-stage", "all"]),
    training=st.builds(
        TrainingSpec,
        epochs=st.integers(1, 99),
        learning_rate=st.floats(1e-9, 10),
        dropout=st.floats(0, 0.99),
    ),
)
ensembles = st.builds(
    EnsembleSpec,
    members=st.lists(members, min_size=1, max_size=3, unique_by=lambda m: m.name).map(tuple),
    seed=st.integers(0, 2**60),
)


def spec(**changes: Any) -> EnsembleSpec:
    return EnsembleSpec(members=(MemberSpec(name="a", backbone="iresnet", **changes),))


@given(original=ensembles)
@settings(deadline=None)
def test_a_specification_and_its_digest_survive_json(original: EnsembleSpec) -> None:
    read = EnsembleSpec.model_validate_json(original.model_dump_json())
    assert read == original
    assert read.digest == original.digest


@given(original=ensembles)
@settings(deadline=None)
def test_a_specification_survives_a_job_folder(original: EnsembleSpec) -> None:
    fields = original.model_dump(mode="json")
    assert read_options(EnsembleSpec, fields, where="job").digest == original.digest


@given(one=ensembles, other=ensembles)
@settings(deadline=None)
def test_specifications_with_equal_digests_are_equal(
    one: EnsembleSpec, other: EnsembleSpec
) -> None:
    assert (one.digest != other.digest) or (one == other)


@pytest.mark.parametrize(
    "changed",
    [
        spec(trainable="all"),
        spec(options={"depth": 18}),
        spec(training=TrainingSpec(epochs=3)),
        spec(training=TrainingSpec(label_smoothing=0.1)),
        spec().model_copy(update={"seed": 2}),
        EnsembleSpec(members=(MemberSpec(name="b", backbone="iresnet"),)),
        EnsembleSpec(members=(MemberSpec(name="a", backbone="sface"),)),
    ],
)
def test_every_change_shows_in_the_digest(changed: EnsembleSpec) -> None:
    assert changed.digest != spec().digest


def test_the_order_of_members_shows_in_the_digest() -> None:
    start = default_ensemble()
    turned = start.model_copy(update={"members": start.members[::-1]})
    assert turned.digest != start.digest


def test_two_members_cannot_have_the_same_name() -> None:
    fields = {"members": [{"name": "a", "backbone": "x"}, {"name": "a", "backbone": "y"}]}
    with pytest.raises(ConfigError, match="two members have the same name"):
        read_options(EnsembleSpec, fields, where="job")


@pytest.mark.parametrize(
    "fields",
    [
        {"members": []},
        {"members": [{"name": "A", "backbone": "x"}]},
        {"members": [{"name": "", "backbone": "x"}]},
        {"members": [{"name": "a" * 32, "backbone": "x"}]},
        {"members": [{"name": "a/b", "backbone": "x"}]},
        {"members": [{"name": "a"}]},
        {"members": [{"name": "a", "backbone": "x", "trainable": "head"}]},
        {"members": [{"name": "a", "backbone": "x"}], "seed": -1},
        {"members": [{"name": "a", "backbone": "x"}], "rounds": 3},
    ],
)
def test_a_specification_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^job: "):
        read_options(EnsembleSpec, fields, where="job")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),
        ("learning_rate", 0),
        ("head_learning_rate", -1),
        ("weight_decay", -1),
        ("dropout", 1),
        ("label_smoothing", 1),
        ("variants", 0),
        ("variants", 65),
        ("momentum", 0.9),
    ],
)
def test_training_that_makes_no_sense_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=key):
        read_options(TrainingSpec, {key: value}, where="job")


def test_a_specification_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().seed = 5  # type: ignore[misc]


def test_a_member_is_found_by_its_name() -> None:
    start = default_ensemble()
    for member in start.members:
        assert start.member(member.name) is member
    with pytest.raises(ConfigError, match="no member 'absent'"):
        start.member("absent")


def test_the_default_ensemble_has_an_untouched_member_and_one_that_trains() -> None:
    trainable = {member.trainable for member in default_ensemble().members}
    assert "none" in trainable
    assert trainable - {"none"}


def test_the_default_ensemble_names_installed_backbones_with_sound_options() -> None:
    for member in default_ensemble().members:
        backbone = get_registry().backbones.get(member.backbone)
        read_options(backbone.options, member.options, where=member.name)


@given(seed=st.integers(0, 1000))
def test_the_seed_of_the_default_ensemble_is_the_given_one(seed: int) -> None:
    assert default_ensemble(seed).seed == seed
    assert default_ensemble(seed).members == default_ensemble().members
