"""What is aggregated, and how: classifiers that stay at home, and rows weighted by class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from consortium import Consortium, Plain, Run, Summed, one_network
from safetensors.numpy import load_file

from fedgestalt.federation.training.checkpoints import MODELS_FOLDER
from fedgestalt.jobs import TrainingJob
from fedgestalt.learning.ensemble import SharedState, is_classifier

JOB = TrainingJob(ensemble=one_network("all"), rounds=2)
SITES = ("berlin", "bonn", "leuven")
WEIGHTS, BIASES = "network/head/1.weight", "network/head/1.bias"


def finished(folder: Path, source: Consortium, **changes: Any) -> tuple[Consortium, Run, Plain]:
    """A job that must come to what is computed without it."""
    job = JOB.model_copy(update=changes)
    consortium, plain = Consortium(folder, source=source), Plain(source, job)
    run = consortium.run(job)
    assert run.outcome["status"] == "completed", run.outcome
    assert run.outcome["warnings"] == []
    digest = plain.digest(*[Summed(SITES)] * job.rounds)
    assert run.outcome["ensemble"] == digest
    for site in SITES:
        assert (consortium.store(site) / "ensembles" / digest).is_dir()
    return consortium, run, plain


# --- scope ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(
    tmp_path_factory: pytest.TempPathFactory, three_sites: Consortium
) -> tuple[Consortium, Run, Plain]:
    return finished(tmp_path_factory.mktemp("encoder"), three_sites, scope="encoder")


@pytest.fixture(scope="module")
def everything(
    tmp_path_factory: pytest.TempPathFactory, three_sites: Consortium
) -> tuple[Consortium, Run, Plain]:
    return finished(tmp_path_factory.mktemp("all"), three_sites)


def test_no_classifier_is_in_the_plan(encoders: tuple[Consortium, Run, Plain]) -> None:
    _, run, plain = encoders
    plan = plain.first_plan()
    names = [tensor.name for tensor in plan.tensors]
    assert [name for name in names if "/head/" in name] == []
    assert len(names) > 5
    assert run.signed[0]["plan"] == plan.digest.hex()
    assert [len(fields["exponents"]) for fields in run.orders("fgm_train", "bonn")] == [
        len(names)
    ] * 2


def test_the_upload_is_smaller_by_the_classifiers(
    encoders: tuple[Consortium, Run, Plain], everything: tuple[Consortium, Run, Plain]
) -> None:
    (_, small, plain), (_, large, _) = encoders, everything
    heads = [values.size for name, values in plain.start.items() if is_classifier(name)]
    for one, other in zip(small.outcome["rounds"], large.outcome["rounds"], strict=True):
        saved = other["uploaded_bytes_per_site"] - one["uploaded_bytes_per_site"]
        assert saved == 4 * (sum(heads) + len(heads)), "values, and a count of what was clipped"


def test_the_classifiers_of_the_published_model_are_those_of_the_start(
    encoders: tuple[Consortium, Run, Plain],
) -> None:
    _, run, plain = encoders
    published = load_file(run.folder / "ensemble" / "weights.safetensors")
    for name, values in plain.start.items():
        assert np.array_equal(published[name], values) == is_classifier(name), name


def test_every_site_goes_on_with_a_classifier_of_its_own(
    encoders: tuple[Consortium, Run, Plain],
) -> None:
    """The second round's encoder depends on what each classifier learnt in the first."""
    _, run, plain = encoders
    first, _ = plain.train("bonn", plain.start, 1)
    other, _ = plain.train("leuven", plain.start, 1)
    assert not np.array_equal(first[WEIGHTS], other[WEIGHTS])
    forgetful = Plain(
        Consortium(run.root, source=encoders[0]), JOB.model_copy(update={"scope": "encoder"})
    )
    train = forgetful.train
    forgetful.train = lambda site, state, *rest: train(  # type: ignore[method-assign]
        site, {n: plain.start[n] if is_classifier(n) else v for n, v in state.items()}, *rest
    )
    assert forgetful.digest(Summed(SITES)) == plain.digest(Summed(SITES))
    assert forgetful.digest(*[Summed(SITES)] * 2) != run.outcome["ensemble"]


def test_no_classifier_leaves_its_site_or_enters_the_models_that_it_keeps(
    encoders: tuple[Consortium, Run, Plain],
) -> None:
    consortium, run, plain = encoders
    haystack = b"|".join(message.payload for message in run.received)
    for site in SITES:
        new, _ = plain.train(site, plain.start, 1)
        for values in (new[WEIGHTS], new[WEIGHTS] - plain.start[WEIGHTS]):
            raw = values.tobytes()
            assert not [n for n in range(0, len(raw) - 16, 4) if raw[n : n + 16] in haystack]
        kept = list((consortium.store(site) / MODELS_FOLDER).glob("*.safetensors"))
        assert len(kept) == 2
        for path in kept:
            assert not [name for name in load_file(path) if is_classifier(name)]


# --- rule ----------------------------------------------------------------------------------------

ONLY_AT_BERLIN, AT_TWO, NOWHERE = 11, 12, 13
SHARED = 14
CLASSES = {ONLY_AT_BERLIN: 0, AT_TWO: 1, NOWHERE: 2, SHARED: 3}


@pytest.fixture(scope="module")
def uneven_sites(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Sites that do not all have images of all classes; berlin has the most images."""
    without = {
        "berlin": (NOWHERE,),
        "bonn": (ONLY_AT_BERLIN, NOWHERE),
        "leuven": (ONLY_AT_BERLIN, AT_TWO, NOWHERE),
    }
    folder = tmp_path_factory.mktemp("uneven")
    return Consortium(folder, sites=SITES, frequent=4, without=without)


@pytest.fixture(scope="module")
def weighted(
    tmp_path_factory: pytest.TempPathFactory, uneven_sites: Consortium
) -> tuple[Run, Plain]:
    folder = tmp_path_factory.mktemp("weighted")
    _, run, plain = finished(folder, uneven_sites, rule="class-weighted", rounds=1)
    return run, plain


def published(run: Run) -> SharedState:
    return load_file(run.folder / "ensemble" / "weights.safetensors")


def deltas(plain: Plain, name: str) -> dict[str, Any]:
    """What each site's training changes in a tensor."""
    news = {site: plain.train(site, plain.start, 1)[0] for site in SITES}
    return {site: new[name].astype(np.float64) - plain.start[name] for site, new in news.items()}


def tolerance(plain: Plain, name: str) -> float:
    """Of one site's rounding, at the smallest weight, three times."""
    plan = plain.first_plan()
    (tensor,) = [t for t in plan.tensors if t.name == name]
    least = min(len(plain.data(site).targets) for site in SITES)
    return 3 * 2.0**tensor.exponent / plan.level * plan.max_weight / least + 1e-7


@pytest.mark.parametrize("name", [WEIGHTS, BIASES])
def test_a_row_that_one_site_alone_has_moves_by_that_sites_change(
    weighted: tuple[Run, Plain], name: str
) -> None:
    run, plain = weighted
    row = CLASSES[ONLY_AT_BERLIN]
    moved = published(run)[name][row] - plain.start[name][row]
    change = deltas(plain, name)
    assert np.abs(change["berlin"][row]).max() > 100 * tolerance(plain, name)
    np.testing.assert_allclose(moved, change["berlin"][row], atol=tolerance(plain, name), rtol=0)
    others = np.stack([change["bonn"][row], change["leuven"][row]])
    assert np.abs(others).max() > 100 * tolerance(plain, name), "they push it, and must not"


@pytest.mark.parametrize("name", [WEIGHTS, BIASES])
def test_a_row_that_two_sites_have_moves_by_their_mean_weighted_by_their_images(
    weighted: tuple[Run, Plain], name: str
) -> None:
    run, plain = weighted
    counts = {site: len(plain.data(site).targets) for site in SITES}
    assert len(set(counts.values())) == 3
    change = deltas(plain, name)
    for syndrome, holders in ((AT_TWO, SITES[:2]), (SHARED, SITES)):
        row = CLASSES[syndrome]
        total = sum(counts[site] for site in holders)
        expected = sum(change[site][row] * counts[site] for site in holders) / total
        moved = published(run)[name][row] - plain.start[name][row]
        np.testing.assert_allclose(moved, expected, atol=tolerance(plain, name), rtol=0)


@pytest.mark.parametrize("name", [WEIGHTS, BIASES])
def test_a_row_that_nobody_has_does_not_change(weighted: tuple[Run, Plain], name: str) -> None:
    run, plain = weighted
    row = CLASSES[NOWHERE]
    assert np.array_equal(published(run)[name][row], plain.start[name][row])
    assert all(np.abs(change[row]).max() > 0 for change in deltas(plain, name).values())


def test_all_but_the_classifiers_is_averaged_as_ever(
    weighted: tuple[Run, Plain], tmp_path: Path, uneven_sites: Consortium
) -> None:
    _, usual, _ = finished(tmp_path, uneven_sites, rounds=1)
    by_class, by_site = published(weighted[0]), published(usual)
    for name, values in by_site.items():
        assert np.array_equal(by_class[name], values) == (not is_classifier(name)), name
    larger = [run.outcome["rounds"][0]["uploaded_bytes_per_site"] for run in (usual, weighted[0])]
    assert larger[1] - larger[0] == 4 * len(CLASSES), "one count for each class"


def test_without_classifiers_the_rule_makes_no_difference(
    tmp_path: Path, uneven_sites: Consortium
) -> None:
    runs = [
        finished(tmp_path / rule, uneven_sites, rule=rule, scope="encoder", rounds=1)[1]
        for rule in ("mean", "class-weighted")
    ]
    assert runs[0].outcome["ensemble"] == runs[1].outcome["ensemble"]
    assert runs[0].signed[0]["plan"] == runs[1].signed[0]["plan"]


@pytest.mark.parametrize("scope", ["all", "encoder"])
@pytest.mark.parametrize("rule", ["mean", "class-weighted"])
def test_every_scope_and_rule_works_without_the_server_learning_the_sum(
    tmp_path: Path, uneven_sites: Consortium, scope: str, rule: str
) -> None:
    finished(tmp_path, uneven_sites, scope=scope, rule=rule, reveal_aggregate_to="sites")
