"""Local training: it learns, it can be repeated, and it changes what it should."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import SiteError
from fedgestalt.hooks import get_registry
from fedgestalt.learning import training as training_module
from fedgestalt.learning.blocks import Pictures, given_pictures
from fedgestalt.learning.ensemble import (
    Ensemble,
    SharedState,
    build_ensemble,
    read_shared_state,
)
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec
from fedgestalt.learning.training import (
    LocalTrainer,
    TrainingSet,
    class_weights,
    shuffled_batches,
)

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
QUICK = TrainingSpec(
    epochs=2, batch_size=4, learning_rate=1e-2, head_learning_rate=1e-2, dropout=0.1, variants=2
)
CPU = torch.device("cpu")


def build(*trainable: Any, **changes: Any) -> Ensemble:
    training = QUICK.model_copy(update=changes)
    members = tuple(
        MemberSpec(name=f"m-{t}", backbone="iresnet", options=TINY, trainable=t, training=training)
        for t in trainable or ("neck", "all", "none")
    )
    return build_ensemble(EnsembleSpec(members=members), 2, get_registry())


def easy_set(images: int = 8, classes: int = 2, seed: int = 0) -> TrainingSet:
    """Two classes: one dark above, the other dark below."""
    faces = np.random.default_rng(seed).integers(0, 120, (images, 112, 112, 3), np.uint8)
    targets = np.arange(images) % 2
    for face, target in zip(faces, targets, strict=True):
        (face[:56] if target else face[56:])[:] += 120
    return TrainingSet(faces, targets.astype(np.int64), classes)


def trainer(ensemble: Ensemble, seed: int = 1, cache: Path | None = None) -> LocalTrainer:
    return LocalTrainer(ensemble, easy_set(), CPU, seed, cache)


def assert_equal(one: SharedState, other: SharedState) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


# --- a round -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", ["neck", "last-stage", "all"])
def test_training_lowers_the_loss(trainable: str) -> None:
    ensemble = build(trainable)
    learner, state = trainer(ensemble), read_shared_state(ensemble)
    losses, accuracy = [], 0.0
    for number in range(1, 6):
        state, metrics = learner.run_round(state, number)
        losses.append(metrics[f"m-{trainable}"].loss)
        accuracy = metrics[f"m-{trainable}"].accuracy
    assert losses[-1] < 0.6 * losses[0]
    assert accuracy >= 0.75


def test_a_round_can_be_repeated() -> None:
    results = []
    for _ in range(2):
        ensemble = build()
        results.append(trainer(ensemble).run_round(read_shared_state(ensemble), 1))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_round_starts_from_the_given_state_whatever_came_before() -> None:
    ensemble = build("neck")
    learner, start = trainer(ensemble), read_shared_state(ensemble)
    first, _ = learner.run_round(start, 1)
    learner.run_round(first, 2)
    again, _ = learner.run_round(start, 1)
    assert_equal(first, again)


@pytest.mark.parametrize(("seed", "round_number"), [(2, 1), (1, 2)])
def test_another_seed_or_round_trains_differently(seed: int, round_number: int) -> None:
    ensemble = build("neck")
    start = read_shared_state(ensemble)
    one, _ = trainer(ensemble, seed=1).run_round(start, 1)
    other, _ = trainer(ensemble, seed=seed).run_round(start, round_number)
    assert any((one[name] != other[name]).any() for name in one)


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_a_round_that_was_given_away_before_is_trained_with_other_draws(trainable: str) -> None:
    ensemble = build(trainable)
    start = read_shared_state(ensemble)
    rounds = [trainer(ensemble).run_round(start, 1, repeat=n)[0] for n in (0, 1, 2)]
    for one, other in itertools.combinations(rounds, 2):
        assert [name for name in one if "weight" in name and (one[name] == other[name]).all()] == []


def test_a_repeat_can_be_repeated_and_draws_what_no_other_round_does() -> None:
    ensemble = build("neck")
    start = read_shared_state(ensemble)
    one, metrics = trainer(ensemble).run_round(start, 1, repeat=2)
    again, same = trainer(ensemble).run_round(start, 1, repeat=2)
    assert_equal(one, again)
    assert metrics == same
    other, _ = trainer(ensemble).run_round(start, 2, repeat=1)
    assert any((one[name] != other[name]).any() for name in one)


def test_the_first_time_a_round_draws_as_it_always_has() -> None:
    ensemble = build()
    start = read_shared_state(ensemble)
    assert_equal(
        trainer(ensemble).run_round(start, 1)[0], trainer(ensemble).run_round(start, 1, repeat=0)[0]
    )


@pytest.mark.parametrize("trainable", ["neck", "last-stage", "all"])
def test_every_trained_tensor_changes(trainable: str) -> None:
    ensemble = build(trainable)
    start = read_shared_state(ensemble)
    new, _ = trainer(ensemble).run_round(start, 1)
    assert [name for name in new if (new[name] == start[name]).all()] == []


@pytest.mark.parametrize("trainable", ["neck", "last-stage"])
def test_what_is_frozen_does_not_change(trainable: str) -> None:
    ensemble = build(trainable, "none")
    neck, none = ensemble.members
    frozen = {f"trunk/{k}": v.clone() for k, v in neck.trunk.state_dict().items()}
    frozen |= {f"none/{k}": v.clone() for k, v in none.state_dict().items()}
    trainer(ensemble).run_round(read_shared_state(ensemble), 1)
    after = {f"trunk/{k}": v for k, v in neck.trunk.state_dict().items()}
    after |= {f"none/{k}": v for k, v in none.state_dict().items()}
    assert frozen.keys() == after.keys()
    for name, tensor in frozen.items():
        assert torch.equal(tensor, after[name]), name


def test_the_given_state_is_not_changed() -> None:
    ensemble = build("neck")
    start = read_shared_state(ensemble)
    copies = {name: values.copy() for name, values in start.items()}
    trainer(ensemble).run_round(start, 1)
    assert_equal(start, copies)


def test_training_does_not_disturb_the_global_generator() -> None:
    ensemble = build()
    state = read_shared_state(ensemble)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    trainer(ensemble).run_round(state, 1)
    assert torch.equal(torch.rand(4), expected)


def test_training_does_not_depend_on_the_global_generator() -> None:
    ensemble = build("neck")
    start, results = read_shared_state(ensemble), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(trainer(ensemble).run_round(start, 1)[0])
    assert_equal(*results)


def test_the_cache_does_not_change_the_result(tmp_path: Path) -> None:
    ensemble = build("neck")
    start = read_shared_state(ensemble)
    plain, _ = trainer(ensemble).run_round(start, 1)
    cached, _ = trainer(ensemble, cache=tmp_path).run_round(start, 1)
    assert_equal(plain, cached)
    assert len(list(tmp_path.iterdir())) == 1


def test_preparing_computes_the_features_of_frozen_trunks_that_train(tmp_path: Path) -> None:
    ensemble = build()
    learner = trainer(ensemble, cache=tmp_path)
    learner.prepare()
    assert list(learner.features) == ["m-neck"]
    assert learner.features["m-neck"].shape[:2] == (8, QUICK.variants)


def test_features_before_a_last_stage_are_cached_as_well(tmp_path: Path) -> None:
    ensemble = build("last-stage")
    learner = trainer(ensemble, cache=tmp_path)
    learner.prepare()
    shape = (8, QUICK.variants, *ensemble.members[0].feature_shape)
    assert learner.features["m-last-stage"].shape == shape
    assert len(list(tmp_path.iterdir())) == 1


def test_members_are_in_evaluation_mode_after_a_round() -> None:
    ensemble = build()
    trainer(ensemble).run_round(read_shared_state(ensemble), 1)
    parts = [part for member in ensemble.members for part in member.children()]
    assert not any(module.training for part in parts for module in part.modules())


def test_members_that_train_have_metrics() -> None:
    ensemble = build()
    _, metrics = trainer(ensemble).run_round(read_shared_state(ensemble), 1)
    assert metrics.keys() == {"m-neck", "m-all"}
    for found in metrics.values():
        assert np.isfinite(found.loss)
        assert 0 <= found.accuracy <= 1


def test_progress_names_the_member_and_its_epochs() -> None:
    ensemble = build("all")
    told: list[tuple[str, int, int]] = []
    trainer(ensemble).run_round(read_shared_state(ensemble), 1, lambda *said: told.append(said))
    assert told == [("m-all", 1, 2), ("m-all", 2, 2)]


@pytest.mark.parametrize("images", [2, 3, 5])
def test_the_smallest_sites_can_train(images: int) -> None:
    ensemble = build("neck", batch_size=2)
    learner = LocalTrainer(ensemble, easy_set(images), CPU, 1)
    new, _ = learner.run_round(read_shared_state(ensemble), 1)
    assert all(np.isfinite(values).all() for values in new.values())


@pytest.mark.parametrize("images", [0, 1])
def test_a_site_with_fewer_than_two_images_is_refused(images: int) -> None:
    with pytest.raises(SiteError, match=f"{images} training images, at least 2 are needed"):
        LocalTrainer(build("neck"), easy_set(images), CPU, 1)


# --- batches -------------------------------------------------------------------------------------


@given(count=st.integers(1, 200), size=st.integers(2, 64), seed=st.integers(0, 2**32))
def test_batches_deal_every_row_once(count: int, size: int, seed: int) -> None:
    batches = list(shuffled_batches(count, size, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))


@given(count=st.integers(2, 200), size=st.integers(2, 64), seed=st.integers(0, 2**32))
def test_batches_are_full_but_for_the_last_which_is_never_of_one(
    count: int, size: int, seed: int
) -> None:
    *full, last = map(len, shuffled_batches(count, size, np.random.default_rng(seed)))
    assert set(full) <= {size}
    assert 2 <= last <= size + 1
    assert last == size + 1 or last == (count % size or size)


@given(count=st.integers(2, 50), size=st.integers(2, 20), seed=st.integers(0, 2**32))
def test_the_order_depends_on_the_generator_alone(count: int, size: int, seed: int) -> None:
    one, other = (shuffled_batches(count, size, np.random.default_rng(seed)) for _ in range(2))
    for rows, same in zip(one, other, strict=True):
        np.testing.assert_array_equal(rows, same)


def test_every_epoch_has_an_order_of_its_own() -> None:
    rng = np.random.default_rng(0)
    first, second = (np.concatenate(list(shuffled_batches(50, 8, rng))) for _ in range(2))
    assert (first != second).any()
    assert (first != np.arange(50)).any()


# --- class weights -------------------------------------------------------------------------------


def test_rare_classes_weigh_more_and_absent_ones_nothing() -> None:
    targets = np.array([0] * 8 + [1] * 2 + [3] * 4)
    np.testing.assert_allclose(class_weights(targets, 5), [0.625, 1.0, 0, 0.75, 0])


@given(targets=st.lists(st.integers(0, 9), min_size=1, max_size=60), extra=st.integers(0, 3))
@settings(deadline=None)
def test_weights_lie_between_a_half_and_one_and_shrink_with_the_class(
    targets: list[int], extra: int
) -> None:
    rows = np.array(targets, np.int64)
    weights = class_weights(rows, 10 + extra)
    counts = np.bincount(rows, minlength=10 + extra)
    assert weights.dtype == torch.float32
    assert weights.shape == (10 + extra,)
    assert ((weights > 0).numpy() == (counts > 0)).all()
    present = counts > 0
    assert weights[present].max() == 1
    assert (weights[present] > 0.5).all()
    order = np.argsort(counts[present])
    assert (np.diff(weights[present].numpy()[order]) <= 0).all()


# --- local objectives ----------------------------------------------------------------------------


def distance(start: SharedState, new: SharedState) -> float:
    """Of the parameters; statistics follow the data."""
    names = [name for name in start if "running_" not in name]
    return float(sum(np.square(new[name] - start[name]).sum() for name in names) ** 0.5)


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_a_proximal_term_keeps_a_site_near_the_model(trainable: str) -> None:
    moved = []
    for mu in (0.0, 1.0, 1e3):
        ensemble = build(trainable, proximal=mu, epochs=6)
        start = read_shared_state(ensemble)
        moved.append(distance(start, trainer(ensemble).run_round(start, 1)[0]))
    assert moved[0] > 1.2 * moved[1]
    assert moved[1] > 1.2 * moved[2]


def test_a_proximal_term_has_the_gradient_of_half_the_squared_distance() -> None:
    """One step of plain gradient descent from a displaced point, against autograd."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimiser = torch.optim.SGD([weight], lr=0.1)
    anchor = training_module._Anchor(optimiser, 0.5)
    with torch.no_grad():
        weight.add_(torch.tensor([3.0, 4.0]))
    free = weight.detach().clone().requires_grad_()
    term = 0.25 * (free - torch.tensor([1.0, -2.0])).square().sum()
    (free.prod() + term).backward()
    weight.prod().backward()
    anchor.pull()
    torch.testing.assert_close(weight.grad, free.grad)


def test_the_first_step_of_a_round_feels_no_proximal_term() -> None:
    """There is no distance yet: one batch of one epoch trains alike, whatever mu."""
    results = []
    for mu in (0.0, 10.0):
        ensemble = build("neck", proximal=mu, epochs=1, batch_size=8)
        results.append(trainer(ensemble).run_round(read_shared_state(ensemble), 1)[0])
    assert_equal(*results)


def three_classes(softmax: str) -> tuple[SharedState, SharedState]:
    """Start and end of a round at a site that has no image of the class in the middle."""
    training = QUICK.model_copy(update={"softmax": softmax, "head_weight_decay": 0.1})
    member = MemberSpec(
        name="m", backbone="iresnet", options=TINY, trainable="neck", training=training
    )
    ensemble = build_ensemble(EnsembleSpec(members=(member,)), 3, get_registry())
    data = easy_set(classes=3)
    data.targets[:] *= 2
    start = read_shared_state(ensemble)
    return start, LocalTrainer(ensemble, data, CPU, 1).run_round(start, 1)[0]


@pytest.mark.parametrize("name", ["m/head/1.weight", "m/head/1.bias"])
def test_a_restricted_softmax_leaves_rows_of_absent_classes_alone(name: str) -> None:
    start, new = three_classes("present")
    assert np.array_equal(new[name][1], start[name][1])
    assert (new[name][[0, 2]] != start[name][[0, 2]]).all()


def test_a_softmax_over_all_classes_pushes_absent_ones_away() -> None:
    start, new = three_classes("all")
    assert (new["m/head/1.bias"][1] < start["m/head/1.bias"][1]).all()


def test_where_every_class_is_present_the_restricted_softmax_is_the_whole_one() -> None:
    results = []
    for softmax in ("all", "present"):
        ensemble = build("neck", softmax=softmax)
        results.append(trainer(ensemble).run_round(read_shared_state(ensemble), 1))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_restricted_softmax_over_one_class_is_refused_before_anything_is_trained() -> None:
    data = easy_set()
    data.targets[:] = 1
    LocalTrainer(build("neck"), data, CPU, 1)
    with pytest.raises(SiteError, match="'m-neck' has a softmax over the site's own classes") as no:
        LocalTrainer(build("neck", softmax="present"), data, CPU, 1)
    assert "softmax: all" in no.value.remedy


def test_a_class_of_a_single_image_trains_like_any_other() -> None:
    ensemble, data = build("neck", batch_size=4), easy_set(images=9, classes=2)
    data.targets[:] = [0] * 8 + [1]
    new, metrics = LocalTrainer(ensemble, data, CPU, 1).run_round(read_shared_state(ensemble), 1)
    assert all(np.isfinite(values).all() for values in new.values())
    assert np.isfinite(metrics["m-neck"].loss)


# --- agreement with the labels of held-out images ------------------------------------------------


def others() -> TrainingSet:
    """Images that are not trained on; more than fit into one batch."""
    return easy_set(images=40, seed=1)


def mislabelled(data: TrainingSet) -> TrainingSet:
    return TrainingSet(data.faces, 1 - data.targets, data.classes)


def measuring(
    ensemble: Ensemble,
    held_out: TrainingSet | None,
    data: TrainingSet | None = None,
    cache: Path | None = None,
) -> LocalTrainer:
    return LocalTrainer(ensemble, data or easy_set(), CPU, 1, cache, held_out=held_out)


def trained_state(ensemble: Ensemble, rounds: int = 6) -> SharedState:
    learner, state = trainer(ensemble), read_shared_state(ensemble)
    for number in range(1, rounds + 1):
        state, _ = learner.run_round(state, number)
    return state


def agreement(learner: LocalTrainer, state: SharedState, number: int = 7) -> float | None:
    """Of the only trained member."""
    _, metrics = learner.run_round(state, number)
    (found,) = metrics.values()
    return found.agreement


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_a_trained_model_agrees_with_right_labels_and_not_with_permuted_ones(
    trainable: str,
) -> None:
    ensemble = build(trainable)
    state = trained_state(ensemble)
    right = agreement(measuring(ensemble, others()), state)
    wrong = agreement(measuring(ensemble, mislabelled(others())), state)
    assert right is not None
    assert right >= 0.75
    assert wrong == pytest.approx(1 - right)


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_labels_of_training_images_do_not_count(trainable: str) -> None:
    ensemble = build(trainable)
    state = trained_state(ensemble)
    right = agreement(measuring(ensemble, others()), state)
    assert agreement(measuring(ensemble, others(), mislabelled(easy_set())), state) == right


@pytest.mark.parametrize("trainable", ["neck", "all"])
def test_the_agreement_is_that_of_the_model_before_the_round(trainable: str) -> None:
    ensemble = build(trainable, epochs=8)
    state = trained_state(ensemble)
    wrong = mislabelled(others())
    learner = measuring(ensemble, wrong, mislabelled(easy_set()))
    first = agreement(measuring(ensemble, wrong), state)
    assert agreement(learner, state, 1) == first
    for number in (1, 2):
        state, _ = learner.run_round(state, number)
    second = agreement(learner, state, 3)
    assert first is not None
    assert second is not None
    assert first <= 0.25
    assert second > first


@pytest.mark.parametrize("held_out", [None, easy_set(images=0)], ids=["none", "empty"])
def test_a_site_without_held_out_images_measures_nothing_and_trains_as_usual(
    held_out: TrainingSet | None,
) -> None:
    ensemble = build()
    start = read_shared_state(ensemble)
    new, metrics = measuring(ensemble, held_out).run_round(start, 1)
    assert [found.agreement for found in metrics.values()] == [None, None]
    assert_equal(new, measuring(ensemble, others()).run_round(start, 1)[0])


def test_a_single_held_out_image_is_enough() -> None:
    ensemble = build()
    learner = measuring(ensemble, easy_set(images=1, seed=1))
    _, metrics = learner.run_round(read_shared_state(ensemble), 1)
    assert {found.agreement for found in metrics.values()} <= {0.0, 1.0}


def test_the_agreement_is_a_share_and_can_be_repeated() -> None:
    ensemble = build()
    state = read_shared_state(ensemble)
    first, again = (measuring(ensemble, others()).run_round(state, number)[1] for number in (1, 2))
    for name, metrics in first.items():
        assert metrics.agreement is not None
        assert 0 <= metrics.agreement <= 1
        assert metrics.agreement * 40 == pytest.approx(round(metrics.agreement * 40))
        assert metrics.agreement == again[name].agreement


@pytest.mark.parametrize("trainable", ["neck", "all"])
@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_the_batch_size_does_not_change_the_agreement(
    monkeypatch: pytest.MonkeyPatch, trainable: str, size: int
) -> None:
    ensemble = build(trainable, epochs=1)
    state = trained_state(ensemble, rounds=1)
    data = others()
    targets = data.targets.copy()
    targets[:13] = 1 - targets[:13]
    uneven = TrainingSet(data.faces, targets, data.classes)
    expected = agreement(measuring(ensemble, uneven), state)
    monkeypatch.setattr(training_module, "_HELD_OUT_BATCH", size)
    assert agreement(measuring(ensemble, uneven), state) == expected


def test_the_agreement_draws_no_random_numbers_and_changes_nothing() -> None:
    ensemble = build()
    start = read_shared_state(ensemble)
    with_it, metrics = measuring(ensemble, others()).run_round(start, 1)
    without, plain = measuring(ensemble, None).run_round(start, 1)
    assert_equal(with_it, without)
    for name, found in metrics.items():
        assert (found.loss, found.accuracy) == (plain[name].loss, plain[name].accuracy)


def test_computing_the_agreement_leaves_all_generators_and_the_model_as_they_were() -> None:
    ensemble = build()
    learner = measuring(ensemble, others())
    numpy_before, torch_before = np.random.get_state(), torch.get_rng_state()
    for member in ensemble.members:
        before = {name: tensor.clone() for name, tensor in member.state_dict().items()}
        assert learner._agreement(member) is not None
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert not any(module.training for module in member.trunk.modules())
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert str(np.random.get_state()) == str(numpy_before)


def test_features_of_held_out_images_are_computed_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, ...]] = []
    trunk_features = training_module.trunk_features

    def counting(member: Any, variants: Any, *arguments: Any) -> torch.Tensor:
        images = variants if isinstance(variants, Pictures) else given_pictures(variants)
        computed.append((images.images, images.variants))
        return trunk_features(member, variants, *arguments)

    monkeypatch.setattr(training_module, "trunk_features", counting)
    ensemble = build()
    learner = measuring(ensemble, others(), cache=tmp_path)
    state = read_shared_state(ensemble)
    for number in (1, 2):
        state, _ = learner.run_round(state, number)
    assert sorted(computed) == [(8, QUICK.variants), (40, 1)], "of the member with a frozen trunk"
    assert len(list(tmp_path.iterdir())) == 2
