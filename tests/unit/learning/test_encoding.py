"""One vector per image says the same as the cosines of all members and variants."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedgestalt.hooks import get_registry
from fedgestalt.learning import augment, encoding, trunk
from fedgestalt.learning.encoding import encode, untouched_part
from fedgestalt.learning.ensemble import (
    Ensemble,
    Member,
    build_ensemble,
    read_shared_state,
    write_shared_state,
)
from fedgestalt.learning.features import trunk_features
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec
from fedgestalt.learning.trunk import FastTrunk

TINY = {"depth": 18, "width": 4, "embedding_size": 8, "input_size": 32}
CPU = torch.device("cpu")


def spec_of(name: str, trainable: Any, **options: Any) -> MemberSpec:
    return MemberSpec(name=name, backbone="iresnet", options=TINY | options, trainable=trainable)


def build(*members: MemberSpec) -> Ensemble:
    return build_ensemble(EnsembleSpec(members=members), 2, get_registry())


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return build(
        spec_of("neck", "neck"), spec_of("all", "all", embedding_size=5), spec_of("none", "none")
    )


@pytest.fixture(scope="module")
def faces() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)


@pytest.fixture(scope="module")
def encodings(ensemble: Ensemble, faces: NDArray[np.uint8]) -> NDArray[np.float32]:
    return encode(ensemble, faces, CPU)


def gram(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    product: NDArray[np.float32] = rows @ rows.T
    return product


def vectors(member: Member, face: NDArray[np.uint8]) -> list[NDArray[np.float64]]:
    """The four vectors of one member for one image, one at a time and not normalised."""
    found = []
    for variant in augment.test_variants(face):
        feature = trunk_features(member, variant[None, None], CPU)[0].float()
        with torch.inference_mode():
            found.append(member.neck(feature)[0].double().numpy())
    return found


def cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_rows_are_single_precision_and_of_length_one(
    ensemble: Ensemble, encodings: NDArray[np.float32]
) -> None:
    assert encodings.dtype == np.float32
    assert encodings.shape == (5, ensemble.encoding_size)
    np.testing.assert_allclose(np.linalg.norm(encodings, axis=1), 1, atol=1e-5)


def test_an_inner_product_is_the_mean_of_the_twelve_cosines(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    single = [[v for m in ensemble.members for v in vectors(m, face)] for face in faces[:3]]
    for one in range(3):
        for other in range(3):
            cosines = [cosine(a, b) for a, b in zip(single[one], single[other], strict=True)]
            assert len(cosines) == 12
            assert encodings[one] @ encodings[other] == pytest.approx(np.mean(cosines), abs=0.02)


def test_the_blocks_of_a_row_are_the_members_in_order(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    whole = np.concatenate([v for m in ensemble.members for v in vectors(m, faces[0])])
    block = slice(4 * 8, 4 * 8 + 5)
    assert cosine(whole[block], encodings[0, block].astype(np.float64)) > 0.99


def test_different_faces_have_different_encodings(encodings: NDArray[np.float32]) -> None:
    assert (gram(encodings)[~np.eye(5, dtype=bool)] < 0.9999).all()


def test_a_face_and_its_mirror_image_are_alike_in_all_but_order(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    (mirrored,) = encode(ensemble, faces[:1, :, ::-1], CPU)
    plain, turned = (row[: 4 * 8].reshape(4, 8) for row in (encodings[0], mirrored))
    np.testing.assert_allclose(turned[[1, 0, 3, 2]], plain, atol=0.02)


def test_encodings_do_not_depend_on_the_size_of_batches(
    ensemble: Ensemble,
    faces: NDArray[np.uint8],
    encodings: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "ENCODED_AT_A_TIME", 2)
    monkeypatch.setattr(trunk, "BATCH", 3)
    again = encode(ensemble, faces, CPU)
    assert ((again * encodings).sum(1) > 0.999).all()


def test_an_encoding_does_not_depend_on_the_other_images(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    (alone,) = encode(ensemble, faces[3:4], CPU)
    assert alone @ encodings[3] > 0.999


def test_encodings_do_not_depend_on_the_cache(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32], tmp_path: Path
) -> None:
    for _ in range(2):
        np.testing.assert_array_equal(encode(ensemble, faces, CPU, tmp_path), encodings)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_order_of_members_does_not_change_similarities(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    turned = dataclasses.replace(ensemble, members=ensemble.members[::-1])
    other = encode(turned, faces, CPU)
    np.testing.assert_allclose(gram(other), gram(encodings), atol=1e-5)
    assert not np.allclose(other, encodings, atol=1e-3)


def test_current_weights_count(faces: NDArray[np.uint8]) -> None:
    ensemble = build(spec_of("all", "all"))
    before = encode(ensemble, faces, CPU)
    shared = read_shared_state(ensemble)
    rng = np.random.default_rng(1)
    for name in shared:
        if "/trunk/" in name and name.endswith("conv1.weight"):
            shared[name] = rng.normal(size=shared[name].shape).astype(np.float32)
    write_shared_state(ensemble, shared)
    assert ((encode(ensemble, faces, CPU) * before).sum(1) < 0.99).any()


def test_weights_that_train_are_never_cached(faces: NDArray[np.uint8], tmp_path: Path) -> None:
    encode(build(spec_of("all", "all")), faces, CPU, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_encoding_changes_no_weight_and_not_the_global_generator(
    ensemble: Ensemble, faces: NDArray[np.uint8]
) -> None:
    before = ensemble.start_digest
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    encode(ensemble, faces, CPU)
    assert torch.equal(torch.rand(4), expected)
    assert ensemble.start_digest == before


def test_a_trunk_that_members_share_runs_once(
    faces: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble = build(spec_of("one", "neck"))
    (one,) = ensemble.members
    other_spec = one.spec.model_copy(update={"name": "other", "trainable": "none"})
    arguments = (one.neck, one.head, one.input, one.feature_shape, one.embedding_size)
    both = dataclasses.replace(ensemble, members=(one, Member(other_spec, one.trunk, *arguments)))
    runs = []
    run = FastTrunk.in_batches

    def count(self: FastTrunk, pictures: NDArray[np.uint8]) -> Any:
        runs.append(len(pictures))
        return run(self, pictures)

    monkeypatch.setattr(FastTrunk, "in_batches", count)
    rows = encode(both, faces, CPU)
    assert runs == [5]
    np.testing.assert_allclose(rows[:, :32], rows[:, 32:])


def test_members_of_one_architecture_may_see_different_sizes(faces: NDArray[np.uint8]) -> None:
    ensemble = build(spec_of("one", "none"))
    (one,) = ensemble.members
    (large,) = build(spec_of("large", "none", input_size=48)).members
    both = dataclasses.replace(ensemble, members=(one, large))
    rows = encode(both, faces, CPU)
    alone = encode(dataclasses.replace(ensemble, members=(large,)), faces, CPU)
    np.testing.assert_allclose(rows[:, 32:] * 2**0.5, alone, atol=1e-5)


def test_no_image_has_no_encoding(ensemble: Ensemble) -> None:
    rows = encode(ensemble, np.empty((0, 112, 112, 3), np.uint8), CPU)
    assert rows.shape == (0, ensemble.encoding_size)
    assert rows.dtype == np.float32


@pytest.mark.parametrize("cached", [False, True])
def test_progress_counts_images_for_each_trunk(
    ensemble: Ensemble, faces: NDArray[np.uint8], tmp_path: Path, cached: bool
) -> None:
    told: list[tuple[int, int]] = []
    cache = tmp_path if cached else None
    encode(ensemble, faces, CPU, cache, lambda done, total: told.append((done, total)))
    assert told[-1] == (15, 15)
    assert {total for _, total in told} == {15}
    assert told == sorted(told)


# --- the untouched part --------------------------------------------------------------------------


def test_the_untouched_part_is_the_encoding_by_untouched_members_alone(
    ensemble: Ensemble, faces: NDArray[np.uint8], encodings: NDArray[np.float32]
) -> None:
    part = untouched_part(ensemble, encodings)
    assert part is not None
    alone = dataclasses.replace(ensemble, members=ensemble.members[2:])
    np.testing.assert_allclose(part, encode(alone, faces, CPU), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, atol=1e-5)


def test_all_of_an_untouched_ensemble_is_its_untouched_part(faces: NDArray[np.uint8]) -> None:
    ensemble = build(spec_of("a", "none"), spec_of("b", "none", embedding_size=3))
    rows = encode(ensemble, faces, CPU)
    part = untouched_part(ensemble, rows)
    assert part is not None
    np.testing.assert_allclose(part, rows, atol=1e-5)


def test_an_ensemble_that_trains_throughout_has_no_untouched_part() -> None:
    ensemble = build(spec_of("a", "neck"), spec_of("b", "all"))
    assert untouched_part(ensemble, np.ones((2, ensemble.encoding_size), np.float32)) is None
