"""The start model, its shared state, and the digests that sites compare."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedgestalt.errors import ConfigError, PluginError
from fedgestalt.hooks import get_registry
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    build_ensemble,
    is_classifier,
    local_norms,
    read_shared_state,
    shared_state_digest,
    state_digest,
    write_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt_plugins.backbones import IResNet

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}


def member(name: str, trainable: Any = "neck", **options: Any) -> MemberSpec:
    return MemberSpec(name=name, backbone="iresnet", options=TINY | options, trainable=trainable)


def build(*members: MemberSpec, classes: int = 3, seed: int = 1) -> Ensemble:
    chosen = members or (member("neck"), member("all", "all"), member("none", "none"))
    return build_ensemble(EnsembleSpec(members=chosen, seed=seed), classes, get_registry())


def norm(ensemble: Ensemble) -> nn.BatchNorm1d:
    """The BatchNorm at the end of the first member's neck."""
    found = ensemble.members[0].neck.features
    assert isinstance(found, nn.BatchNorm1d)
    return found


def disturb(ensemble: Ensemble) -> None:
    """Change every parameter and buffer, as training might."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for found in ensemble.members:
            for tensor in found.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand(tensor.shape, generator=generator))
                else:
                    tensor.add_(3)


def states(ensemble: Ensemble) -> dict[str, torch.Tensor]:
    return {
        f"{found.spec.name}/{name}": tensor.clone()
        for found in ensemble.members
        for name, tensor in found.state_dict().items()
    }


def assert_same(one: SharedState, other: SharedState) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, other[name], rtol=1e-5, atol=1e-6, err_msg=name)


# --- start model ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_start() -> None:
    one, other = build(seed=4), build(seed=4)
    for name, tensor in states(one).items():
        assert torch.equal(tensor, states(other)[name]), name
    assert one.start_digest == other.start_digest


def test_another_seed_gives_another_start() -> None:
    one, other = read_shared_state(build(seed=4)), read_shared_state(build(seed=5))
    assert any((one[name] != other[name]).any() for name in one if name.startswith("all/trunk"))
    assert any((one[name] != other[name]).any() for name in one if "/head/" in name)


def test_members_of_one_architecture_start_differently() -> None:
    ensemble = build(member("a"), member("b"))
    assert ensemble.members[0].trunk_digest != ensemble.members[1].trunk_digest


def test_building_does_not_disturb_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build()
    assert torch.equal(torch.rand(4), expected)


def test_the_start_does_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = build().start_digest
    torch.manual_seed(2)
    assert build().start_digest == first


def test_the_start_model_is_in_evaluation_mode() -> None:
    assert not any(module.training for found in build().members for module in found.children())


def test_the_head_has_an_output_for_each_class() -> None:
    (found,) = build(member("a"), classes=7).members
    assert found.head(torch.zeros(2, 8)).shape == (2, 7)


def test_the_encoding_has_four_vectors_of_each_member() -> None:
    assert build(member("a"), member("b", embedding_size=5)).encoding_size == 4 * (8 + 5)


def test_an_unknown_backbone_is_named() -> None:
    with pytest.raises(PluginError, match="did you mean 'iresnet'"):
        build(MemberSpec(name="a", backbone="iresnett"))


def test_a_wrong_option_names_the_member() -> None:
    with pytest.raises(ConfigError, match=r"ensemble member 'a': unknown key 'dept'.*'depth'"):
        build(MemberSpec(name="a", backbone="iresnet", options={"dept": 18}))


@pytest.mark.parametrize(
    ("trainable", "parts", "frozen"),
    [
        ("none", [], True),
        ("neck", ["neck", "head"], True),
        ("last-stage", ["neck", "head"], True),
        ("all", ["trunk", "neck", "head"], False),
    ],
)
def test_what_trains_is_what_the_specification_says(
    trainable: str, parts: list[str], frozen: bool
) -> None:
    (found,) = build(member("a", trainable)).members
    assert list(found.trained_parts) == parts
    assert found.trunk_is_frozen is frozen


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_every_parameter_of_a_trained_part_takes_gradients(trainable: str) -> None:
    (found,) = build(member("a", trainable)).members
    for name, part in found.trained_parts.items():
        assert all(parameter.requires_grad for parameter in part.parameters()), name


# --- a last stage that trains --------------------------------------------------------------------


def test_of_a_last_stage_only_what_trains_is_shared() -> None:
    shared = read_shared_state(build(member("a", "last-stage")))
    whole = read_shared_state(build(member("a", "all")))
    stage = {
        name.replace("a/trunk/", "a/neck/last_stage.")
        for name in whole
        if name.startswith(("a/trunk/layer4.", "a/trunk/bn2."))
    }
    assert len(stage) > 20
    neck = {name.replace("/neck/", "/neck/neck.") for name in whole if name.startswith("a/neck/")}
    head = {name for name in whole if name.startswith("a/head/")}
    assert shared.keys() == stage | neck | head


def test_a_network_whose_last_stage_trains_encodes_like_the_whole() -> None:
    (whole,), (staged,) = build(member("a")).members, build(member("a", "last-stage")).members
    images = torch.randn(70, 3, 32, 32)
    with torch.inference_mode():
        features = staged.trunk(images)
        assert features.shape == (70, *staged.feature_shape)
        torch.testing.assert_close(staged.neck(features), whole.neck(whole.trunk(images)))


def test_what_comes_before_a_last_stage_is_frozen() -> None:
    (found,) = build(member("a", "last-stage")).members
    assert not any(parameter.requires_grad for parameter in found.trunk.parameters())
    assert not {id(p) for p in found.trunk.parameters()} & {id(p) for p in found.neck.parameters()}


def test_a_backbone_that_cannot_be_cut_is_refused_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = IResNet.build
    monkeypatch.setattr(IResNet, "build", lambda *args: dataclasses.replace(whole(*args), cut=None))
    with pytest.raises(ConfigError) as fault:
        build(member("a", "last-stage"))
    assert str(fault.value) == (
        "ensemble member 'a': backbone 'iresnet' does not say where its last stage begins;"
        " set trainable to neck or all."
    )


# --- normalisation that stays at the site --------------------------------------------------------

LOCAL = TrainingSpec(batch_norm="local")


def test_normalisation_of_random_weights_cannot_stay_at_the_sites() -> None:
    """The published ensemble would normalise by what no image has set."""
    with pytest.raises(ConfigError, match="those of random weights have seen no image") as fault:
        build(member("a").model_copy(update={"training": LOCAL}))
    assert fault.value.where == "ensemble member 'a'"
    build(member("a", "none").model_copy(update={"training": LOCAL}))


def test_local_norms_are_all_tensors_of_the_layers_with_statistics_of_those_members() -> None:
    names = [
        *("a/neck/fc.weight", "a/neck/fc.bias", "a/neck/features.weight", "a/neck/features.bias"),
        *("a/neck/features.running_mean", "a/neck/features.running_second_moment"),
        *("a/trunk/running_mean", "a/trunk/weight", "a/trunk/conv.weight", "a/head/1.weight"),
        *("b/neck/features.weight", "b/neck/features.running_mean"),
    ]
    local = MemberSpec(name="a", backbone="iresnet", training=LOCAL)
    spec = EnsembleSpec(members=(local, MemberSpec(name="b", backbone="iresnet")))
    assert local_norms(spec, names) == {*names[2:8]}


# --- shared state --------------------------------------------------------------------------------


def test_trained_parts_alone_are_shared() -> None:
    prefixes = {"/".join(name.split("/")[:2]) for name in read_shared_state(build())}
    assert prefixes == {"neck/neck", "neck/head", "all/trunk", "all/neck", "all/head"}


def test_every_parameter_of_a_trained_part_is_shared() -> None:
    ensemble = build(member("a", "all"))
    shared = read_shared_state(ensemble)
    for part, module in ensemble.members[0].trained_parts.items():
        for name, _ in module.named_parameters():
            assert f"a/{part}/{name}" in shared


def test_running_statistics_are_shared_as_mean_and_second_moment() -> None:
    ensemble = build()
    disturb(ensemble)
    found, shared = norm(ensemble), read_shared_state(ensemble)
    assert found.running_mean is not None
    assert found.running_var is not None
    np.testing.assert_allclose(shared["neck/neck/features.running_mean"], found.running_mean)
    second = found.running_var + found.running_mean**2
    np.testing.assert_allclose(
        shared["neck/neck/features.running_second_moment"], second, rtol=1e-6
    )
    assert not any("running_var" in name for name in shared)


def test_the_number_of_batches_is_never_shared() -> None:
    ensemble = build(member("a", "all"))
    assert any("num_batches_tracked" in name for name in states(ensemble))
    assert not any("num_batches_tracked" in name for name in read_shared_state(ensemble))


def test_shared_state_is_float32_and_a_copy() -> None:
    ensemble = build()
    before = read_shared_state(ensemble)
    shared = read_shared_state(ensemble)
    for values in shared.values():
        assert values.dtype == np.float32
        values += 1
    assert_same(read_shared_state(ensemble), before)


def test_shared_state_survives_another_ensemble() -> None:
    source, target = build(), build(seed=2)
    disturb(source)
    write_shared_state(target, read_shared_state(source))
    assert_same(read_shared_state(target), read_shared_state(source))
    expected, found = norm(source), norm(target)
    assert expected.running_var is not None
    assert found.running_var is not None
    torch.testing.assert_close(found.running_var, expected.running_var)


def test_writing_leaves_what_is_not_shared_alone() -> None:
    ensemble = build()
    before = states(ensemble)
    shared = {name: 2 * values + 1 for name, values in read_shared_state(ensemble).items()}
    write_shared_state(ensemble, shared)
    for name, tensor in states(ensemble).items():
        untouched = name.startswith(("none/", "neck/trunk")) or "num_batches" in name
        assert torch.equal(tensor, before[name]) == untouched, name


@given(
    sizes=st.lists(st.integers(2, 40), min_size=2, max_size=5),
    seed=st.integers(0, 2**32),
    shift=st.floats(-3, 3),
)
@settings(max_examples=25, deadline=None)
def test_pooled_second_moments_give_the_variance_of_the_pooled_data(
    pooling_ensemble: Ensemble, sizes: list[int], seed: int, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    sites = [rng.normal(i * shift, 1 + i, (n, 8)) for i, n in enumerate(sizes)]
    found, shared = norm(pooling_ensemble), []
    assert found.running_mean is not None
    assert found.running_var is not None
    for data in sites:
        found.running_mean.copy_(torch.from_numpy(data.mean(0)))
        found.running_var.copy_(torch.from_numpy(data.var(0)))
        shared.append(read_shared_state(pooling_ensemble))
    weights = np.array(sizes) / sum(sizes)
    pooled = {
        name: np.einsum("s,s...->...", weights, np.stack([s[name] for s in shared])).astype("f4")
        for name in shared[0]
    }
    write_shared_state(pooling_ensemble, pooled)
    everything = np.concatenate(sites)
    np.testing.assert_allclose(found.running_mean, everything.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.running_var, everything.var(0), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def pooling_ensemble() -> Ensemble:
    return build(member("a"))


def test_a_second_moment_below_the_square_of_the_mean_is_no_negative_variance() -> None:
    ensemble = build()
    shared = read_shared_state(ensemble)
    shared["neck/neck/features.running_mean"][:] = 2
    shared["neck/neck/features.running_second_moment"][:] = 3.9
    write_shared_state(ensemble, shared)
    running = norm(ensemble).running_var
    assert running is not None
    assert (running == 0).all()


def without_one(shared: SharedState) -> None:
    del shared["neck/neck/fc.weight"]


def with_one_more(shared: SharedState) -> None:
    shared["neck/neck/spy.weight"] = np.zeros(1, np.float32)


def renamed(shared: SharedState) -> None:
    shared["other/neck/fc.weight"] = shared.pop("neck/neck/fc.weight")


def reshaped(shared: SharedState) -> None:
    shared["neck/neck/fc.bias"] = shared["neck/neck/fc.bias"][:, None]


def of_another_size(shared: SharedState) -> None:
    shared["neck/head/1.weight"] = np.zeros((4, 8), np.float32)


@pytest.mark.parametrize("damage", [without_one, with_one_more, renamed, reshaped, of_another_size])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(damage: Any) -> None:
    ensemble = build()
    before = states(ensemble)
    shared = {name: values + 1 for name, values in read_shared_state(ensemble).items()}
    damage(shared)
    with pytest.raises(ConfigError, match=r"tensor '.*/.*'"):
        write_shared_state(ensemble, shared)
    for name, tensor in states(ensemble).items():
        assert torch.equal(tensor, before[name]), name


def test_an_untouched_ensemble_shares_nothing() -> None:
    ensemble = build(member("a", "none"))
    assert read_shared_state(ensemble) == {}
    write_shared_state(ensemble, {})


# --- digests -------------------------------------------------------------------------------------


def bump(module: nn.Module) -> None:
    with torch.no_grad():
        next(iter(module.parameters())).add_(1e-3)


@pytest.mark.parametrize("part", ["trunk", "neck", "head"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_start_digest_changes_with_any_weight(index: int, part: str) -> None:
    ensemble = build()
    before = ensemble.start_digest
    bump(getattr(ensemble.members[index], part))
    assert ensemble.start_digest != before


def test_the_start_digest_changes_with_specification_and_classes() -> None:
    start = build()
    digests = {
        start.start_digest,
        build(seed=2).start_digest,
        build(classes=4).start_digest,
        build(member("neck"), member("all", "all"), member("other", "none")).start_digest,
    }
    assert len(digests) == 4


def test_the_start_digest_does_not_depend_on_the_number_of_batches() -> None:
    ensemble = build()
    before = ensemble.start_digest
    tracked = norm(ensemble).num_batches_tracked
    assert tracked is not None
    tracked.add_(5)
    assert ensemble.start_digest == before


def test_the_digest_of_a_model_changes_with_each_shared_tensor() -> None:
    ensemble = build()
    shared = read_shared_state(ensemble)
    before = ensemble.digest(shared)
    assert ensemble.digest(dict(reversed(shared.items()))) == before
    for name in shared:
        changed = shared | {name: shared[name] + 1}
        assert ensemble.digest(changed) != before, name


def test_the_digest_of_a_model_does_not_depend_on_what_the_modules_hold_meanwhile() -> None:
    ensemble = build()
    shared = read_shared_state(ensemble)
    before = ensemble.digest(shared)
    write_shared_state(ensemble, {name: values + 1 for name, values in shared.items()})
    assert ensemble.digest(shared) == before


@pytest.mark.parametrize(("index", "part"), [(0, "trunk"), (2, "trunk"), (2, "neck")])
def test_the_digest_of_a_model_changes_with_its_frozen_parts(index: int, part: str) -> None:
    ensemble = build()
    shared = read_shared_state(ensemble)
    before = ensemble.digest(shared)
    old = ensemble.members[index]
    bump(getattr(old, part))
    arguments = (old.spec, old.trunk, old.neck, old.head, old.input, old.feature_shape)
    renewed = type(old)(*arguments, old.embedding_size)
    members = [*ensemble.members]
    members[index] = renewed
    assert dataclasses.replace(ensemble, members=tuple(members)).digest(shared) != before


def test_an_outline_names_states_as_its_ensemble_does() -> None:
    ensemble = build()
    shared = read_shared_state(ensemble)
    outline = ensemble.outline()
    assert (outline.spec, outline.classes) == (ensemble.spec, 3)
    for state in (shared, {name: values + 1 for name, values in shared.items()}):
        assert outline.digest(state) == ensemble.digest(state)


def test_an_outline_stays_as_it_is_whatever_the_modules_hold_meanwhile() -> None:
    ensemble = build()
    outline, shared = ensemble.outline(), read_shared_state(ensemble)
    write_shared_state(ensemble, {name: values + 1 for name, values in shared.items()})
    assert ensemble.outline() == outline
    assert outline.digest(shared) == ensemble.digest(shared)


def test_outlines_of_other_ensembles_are_others() -> None:
    chosen = build(), build(seed=2), build(member("neck"), member("all", "all"))
    assert len({made.outline().frozen for made in chosen}) == 3
    assert len({made.outline().digest({}) for made in chosen}) == 3
    assert build(classes=4).outline() != build().outline()


def test_an_outline_holds_digests_alone() -> None:
    """It stays in memory while the networks do not."""
    frozen = build().outline().frozen
    assert len(frozen) == 4  # three trunks, and the neck of the untouched member
    assert all(len(digest) == 64 for digest in frozen)


@pytest.mark.parametrize("name", ["neck", "head", "trunk"])
def test_the_classifier_of_a_member_is_its_head_whatever_the_member_is_called(name: str) -> None:
    shared = read_shared_state(build(member(name, "all"), classes=5))
    found = {tensor for tensor in shared if is_classifier(tensor)}
    assert found == {f"{name}/head/1.weight", f"{name}/head/1.bias"}
    assert {shared[tensor].shape[0] for tensor in found} == {5}


def test_the_digest_of_a_state_is_that_of_its_names_shapes_and_bytes() -> None:
    state = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, np.float32),
        "c": np.zeros((2, 0), np.float32),
    }
    total = hashlib.sha256(b"a|();" + np.float32(7).tobytes())
    total.update(b"b|(2, 3);" + np.arange(6, dtype="<f4").tobytes() + b"c|(2, 0);")
    assert shared_state_digest(state) == total.digest()


def test_the_digest_of_a_state_does_not_depend_on_its_order_in_memory() -> None:
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert shared_state_digest({"a": np.asfortranarray(rows)}) == shared_state_digest({"a": rows})
    assert shared_state_digest({"a": rows.astype(">f4")}) == shared_state_digest({"a": rows})
    wide = np.zeros((2, 6), np.float32)
    wide[:, ::2] = rows
    assert shared_state_digest({"a": wide[:, ::2]}) == shared_state_digest({"a": rows})


def test_the_digest_of_a_state_sees_names_shapes_and_values() -> None:
    values = np.arange(6, dtype=np.float32)
    digests = {
        shared_state_digest({"a": values}),
        shared_state_digest({"b": values}),
        shared_state_digest({"a": values.reshape(2, 3)}),
        shared_state_digest({"a": values.reshape(3, 2)}),
        shared_state_digest({"a": values + 1}),
        shared_state_digest({"a": values[:3], "b": values[3:]}),
        shared_state_digest({}),
    }
    assert len(digests) == 7
    assert {len(digest) for digest in digests} == {32}


def test_the_digest_of_a_module_does_not_depend_on_its_memory_layout() -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = state_digest(layer)
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert state_digest(layer) == before
