"""Every matching strategy keeps the contract, ranks as in the clear and says what it discloses."""

from __future__ import annotations

import numpy as np
import pytest

from fedgestalt.contracts import MatchingStrategy, Part, Question
from fedgestalt.errors import ConfigError, DataError, ServerError
from fedgestalt.hooks import get_registry
from fedgestalt_plugins.matching.flake import common_matrix, flake_mask
from fedgestalt_plugins.matching.isometry import Isometry, isometry_by_blocks
from fedgestalt_plugins.matching.keystream import derive, gaussian, random_words
from fedgestalt_plugins.matching.plaintext import PERMISSION

SEED = bytes(range(32))
NAMES = ("flake", "isometry", "isometry-blocks", "plaintext", "secret-shared")
GRAM_ERROR = {
    "flake": 1e-12,
    "isometry": 1e-12,
    "isometry-blocks": 1e-6,
    "plaintext": 1e-6,
    "secret-shared": 5e-7,
}
# queries, gallery, syndromes, dimensions: as the built-in cohorts synthetic, orl and orl-warp
COHORTS = {"synthetic": (60, 240, 40, 1536), "orl": (80, 320, 40, 768), "warp": (50, 300, 20, 600)}


@pytest.fixture(autouse=True)
def _in_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PERMISSION, "1")


@pytest.fixture(params=NAMES)
def strategy(request: pytest.FixtureRequest) -> MatchingStrategy:
    return get_registry().matching.get(request.param)


def unit_rows(count: int, size: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    rows += 0.5  # encodings are not centred
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def scores_by(strategy: MatchingStrategy, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Scores (q, g): every role played in turn, as a workflow does."""
    parties = range(len(strategy.roles))
    galleries = [
        strategy.receive(p, part)
        for p, part in zip(parties, strategy.enrol(gallery, SEED), strict=True)
    ]
    question = strategy.ask(queries, SEED)
    answers = [strategy.compare(p, galleries[p], question.parts[p]) for p in parties]
    return strategy.open(question, answers)


# --- all strategies ------------------------------------------------------------------------------


def test_these_are_the_built_in_strategies() -> None:
    ours = [e.plugin.name for e in get_registry().matching if e.distribution == "fedgestalt"]
    assert sorted(ours) == sorted(NAMES)


def test_every_strategy_gives_the_inner_products(strategy: MatchingStrategy) -> None:
    rows = unit_rows(40, 600)
    plain = rows.astype(np.float64) @ rows.T.astype(np.float64)
    assert np.abs(scores_by(strategy, rows, rows) - plain).max() < GRAM_ERROR[strategy.name]


@pytest.mark.parametrize("cohort", COHORTS)
def test_every_strategy_ranks_as_in_the_clear(strategy: MatchingStrategy, cohort: str) -> None:
    queries, gallery, syndromes, size = COHORTS[cohort]
    rng = np.random.default_rng(len(cohort))
    centres = rng.normal(size=(syndromes, size))
    labels = rng.integers(syndromes, size=queries + gallery)
    rows = centres[labels] + 2 * rng.normal(size=(queries + gallery, size))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    scores = scores_by(strategy, rows[:queries], rows[queries:])
    plain = rows[:queries].astype(np.float64) @ rows[queries:].T.astype(np.float64)
    top = 30
    assert np.array_equal(np.argsort(-scores, 1)[:, :top], np.argsort(-plain, 1)[:, :top])


def test_every_role_has_a_name_and_the_server_is_the_first(strategy: MatchingStrategy) -> None:
    assert strategy.roles[0] == "server"
    assert (
        len(set(strategy.roles))
        == len(strategy.roles)
        == len(strategy.enrol(unit_rows(1, 8), SEED))
    )


def test_the_disclosure_says_something_for_every_party(strategy: MatchingStrategy) -> None:
    said = strategy.disclosure
    for sentence in (said.server_learns, said.sites_learn, said.asking_site_learns):
        assert len(sentence) > 30
        assert sentence.endswith(".")


def test_secrets_are_not_shown(strategy: MatchingStrategy) -> None:
    question = strategy.ask(unit_rows(1, 8), SEED)
    assert "keys" not in repr(question.parts[0])
    assert "secret=" not in repr(question)
    assert "entropy" not in repr(strategy)


BAD = {
    "not a number": (np.full((2, 8), np.nan, np.float32), "not finite or not of length 1"),
    "infinite": (np.full((2, 8), np.inf, np.float32), "not finite or not of length 1"),
    "too long": (3 * unit_rows(2, 8), "not finite or not of length 1"),
    "empty": (np.empty((0, 8), np.float32), "there is no encoding"),
    "without dimensions": (np.empty((2, 0), np.float32), "there is no encoding"),
    "one row alone": (unit_rows(2, 8)[0], "not a table of real numbers"),
    "integers": (np.eye(2, dtype=np.int64), "not a table of real numbers"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_encodings_are_refused_in_a_sentence(strategy: MatchingStrategy, bad: str) -> None:
    rows, sentence = BAD[bad]
    with pytest.raises(DataError, match=sentence):
        strategy.enrol(rows, SEED)
    with pytest.raises(DataError, match=sentence):
        strategy.ask(rows, SEED)


def test_queries_of_other_dimensions_are_refused(strategy: MatchingStrategy) -> None:
    gallery = strategy.receive(0, strategy.enrol(unit_rows(3, 16), SEED)[0])
    question = strategy.ask(unit_rows(1, 8), SEED)
    with pytest.raises(DataError, match="dimensions"):
        strategy.compare(0, gallery, question.parts[0])


def test_a_part_of_another_party_is_refused(strategy: MatchingStrategy) -> None:
    part = strategy.enrol(unit_rows(3, 16), SEED)[0]
    for party in {-1, 1, len(strategy.roles)}:
        with pytest.raises(DataError):
            strategy.receive(party, part)


def test_answers_that_do_not_fit_are_refused(strategy: MatchingStrategy) -> None:
    question = strategy.ask(unit_rows(2, 8), SEED)
    good = np.zeros((2, 2, 3), np.uint64) if len(strategy.roles) > 1 else np.zeros((2, 3))
    for answers in (
        [],
        [good] * 4,
        [good[:1]] * len(strategy.roles),
        [good.astype(object)[:1]] * 3,
    ):
        with pytest.raises(ServerError, match="not fit"):
            strategy.open(question, answers)


# --- one computing party -------------------------------------------------------------------------

MASKS = ("flake", "isometry", "isometry-blocks")


@pytest.mark.parametrize("name", ["isometry", "isometry-blocks", "flake", "plaintext"])
@pytest.mark.parametrize("fault", [np.nan, 2.0, -2.0])
def test_a_score_that_is_no_cosine_is_refused(name: str, fault: float) -> None:
    strategy = get_registry().matching.get(name)
    with pytest.raises(ServerError, match="no cosine"):
        strategy.open(Question((Part((1, 8), unit_rows(1, 8)),)), [np.array([[0.5, fault]])])


@pytest.mark.parametrize("name", MASKS)
def test_a_masked_row_that_is_not_of_length_one_is_refused(name: str) -> None:
    strategy = get_registry().matching.get(name)
    (part,) = strategy.enrol(unit_rows(3, 16), SEED)
    with pytest.raises(DataError, match="not of length 1"):
        strategy.receive(0, Part(part.shape, part.words * 2))


def sum_survives(name: str) -> float:
    """Correlation of the sums of coordinates before and after masking."""
    rows = unit_rows(500, 512, 3)
    (part,) = get_registry().matching.get(name).enrol(rows, SEED)
    return float(np.corrcoef(rows.sum(1), part.words.sum(1))[0, 1])


def test_the_server_sees_the_sum_of_coordinates_through_flake_and_not_through_an_isometry() -> None:
    assert sum_survives("plaintext") > 0.999
    assert sum_survives("flake") > 0.99
    assert abs(sum_survives("isometry")) < 0.6
    assert abs(sum_survives("isometry-blocks")) < 0.6


@pytest.mark.parametrize("name", MASKS)
def test_masked_coordinates_say_nothing_of_one_image_alone(name: str) -> None:
    strategy, one = get_registry().matching.get(name), unit_rows(1, 512, 5)
    views = [strategy.enrol(one, i.to_bytes(32, "big"))[0].words[0] for i in range(20)]
    size = len(views[0])
    if name != "flake":  # whose masked coordinates keep a common sum
        assert abs(np.mean(views)) < 5 / np.sqrt(20 * size) / np.sqrt(size)
    seen = [np.corrcoef(view[:512], one[0])[0, 1] for view in views]
    assert abs(np.mean(seen)) < 5 / np.sqrt(20 * 512)


def test_masked_by_blocks_the_server_can_compare_each_block_and_otherwise_not() -> None:
    rows = unit_rows(30, 1024, 7)
    rows[:, :512] = rows[0, :512]  # alike in the first block
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def alike_in_first_block(name: str) -> bool:
        (part,) = get_registry().matching.get(name).enrol(rows, SEED)
        first = part.words[:, : part.words.shape[1] // 2]
        first = first / np.linalg.norm(first, axis=1, keepdims=True)
        return bool((first @ first.T).min() > 0.999)

    assert alike_in_first_block("isometry-blocks")
    assert alike_in_first_block("flake")
    assert not alike_in_first_block("isometry")


def test_blocks_and_the_whole_are_both_orthogonal_in_either_precision() -> None:
    rows = np.eye(100, dtype=np.float32)
    for block in (0, 30):
        for single in (False, True):
            masked = Isometry(block=block, single_precision=single).mask(rows, SEED)
            assert masked.dtype == (np.float32 if single else np.float64)
            assert np.abs(masked @ masked.T - rows).max() < (1e-6 if single else 1e-12)
    assert isometry_by_blocks().block == 512


# --- flake ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64])
def test_flake_is_the_published_formula_for_any_left_inverse(size: int) -> None:
    common = common_matrix(size, SEED)
    assert common.shape[0] > size
    assert 0 < common.min() <= common.max() < 1
    values, vectors = np.linalg.eigh(common @ common.T)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inverse = np.linalg.pinv(common)
    outside = np.eye(len(common)) - common @ inverse  # maps N to 0
    other = inverse + np.random.default_rng(0).normal(size=inverse.shape) @ outside
    for left in (inverse, other):
        assert np.abs(left @ common - np.eye(size)).max() < 1e-9
        assert np.abs(left @ root - flake_mask(common)).max() < 1e-5


# --- plaintext -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_plaintext_refuses_outside_of_tests(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(PERMISSION)
    else:
        monkeypatch.setenv(PERMISSION, value)
    strategy = get_registry().matching.get("plaintext")
    for prepare in (strategy.enrol, strategy.ask):
        with pytest.raises(ConfigError, match="works in tests alone; use 'isometry'"):
            prepare(unit_rows(2, 8), SEED)


# --- keystream -----------------------------------------------------------------------------------


def test_random_words_are_uniform_and_a_function_of_key_and_place() -> None:
    words = random_words(SEED, 300, 500)
    assert np.array_equal(words.ravel()[:1000], random_words(SEED, 1000))
    counts = np.bincount(words.view(np.uint8).ravel(), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2).sum() / expected < 255 + 6 * 510**0.5


def test_the_draws_are_standard_normal() -> None:
    sample = gaussian(SEED, 200_001)
    assert len(sample) == 200_001
    assert abs(sample.mean()) < 0.02
    assert abs(sample.std() - 1) < 0.02
    assert abs((sample**4).mean() - 3) < 0.2


def test_keys_of_different_purposes_differ() -> None:
    keys = {derive(SEED, purpose, context) for purpose in "ab" for context in (b"", b"1", b"2")}
    assert len(keys) == 6
    assert {len(key) for key in keys} == {32}
