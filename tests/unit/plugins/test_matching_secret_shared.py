"""Secret shares: what each party sees is random, and a wrong answer is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.contracts import Part
from fedgestalt.errors import DataError, ServerError
from fedgestalt_plugins.matching import secret_shared
from fedgestalt_plugins.matching.one_party import LENGTH_TOLERANCE
from fedgestalt_plugins.matching.secret_shared import (
    BITS,
    PARTIES,
    SecretShared,
    _factors,
    _fixed_point,
)

SEED = bytes(32)
ONE = 1 << (2 * BITS + 1)
"""A score of 1, doubled as in the sum of the answers."""


def entropy(seed: int = 0) -> Callable[[int], bytes]:
    """Predictable, for tests."""
    return np.random.default_rng(seed).bytes


def unit_rows(count: int, size: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, size))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Parties:
    """A gallery of three rows, and one question whose answers are (1, 1/2, 0) and what is left."""

    def __init__(self, seed: int = 0, rows: np.ndarray | None = None) -> None:
        self.strategy = SecretShared(entropy=entropy(seed))
        if rows is None:
            rows = np.zeros((4, 16), np.float32)
            rows[0, 0] = rows[2, 1] = 1
            rows[1, :4] = 0.5
            rows[3, 0] = -1
        self.rows = rows
        self.gallery = self.strategy.enrol(rows, SEED)
        self.question = self.strategy.ask(rows[:1], SEED)

    def answers(self) -> list[np.ndarray]:
        return [
            self.strategy.compare(
                party, self.strategy.receive(party, self.gallery[party]), self.question.parts[party]
            )
            for party in range(PARTIES)
        ]

    def scores(self, answers: list[np.ndarray]) -> np.ndarray:
        return self.strategy.open(self.question, answers)


def test_production_takes_entropy_of_the_operating_system_afresh() -> None:
    strategy = SecretShared()
    first, second = (strategy.enrol(unit_rows(2, 8), SEED) for _ in range(2))
    assert first[0].keys != second[0].keys
    assert not np.array_equal(first[1].words, second[1].words)
    assert strategy.ask(unit_rows(1, 8), SEED).secret != strategy.ask(unit_rows(1, 8), SEED).secret


@given(
    size=st.integers(1, 40),
    queries=st.integers(1, 4),
    rows=st.integers(1, 150),
    seed=st.integers(0, 2**32),
)
def test_three_answers_sum_up_to_the_fixed_point_products(
    size: int, queries: int, rows: int, seed: int
) -> None:
    strategy = SecretShared(entropy=entropy(seed), threads=1 + seed % 2)
    asked, stored = unit_rows(queries, size, seed), unit_rows(rows, size, seed + 1)
    question, gallery = strategy.ask(asked, SEED), strategy.enrol(stored, SEED)
    answers = [
        strategy.compare(p, strategy.receive(p, gallery[p]), question.parts[p])
        for p in range(PARTIES)
    ]
    products = _fixed_point(asked).view(np.int64) @ _fixed_point(stored).T.view(np.int64)
    assert np.array_equal(strategy.open(question, answers), 2 * products / ONE)


def test_the_error_of_a_score_is_as_stated() -> None:
    rows = unit_rows(60, 6144)
    parties = Parties(rows=rows)
    exact = rows[:1].astype(np.float64) @ rows.T.astype(np.float64)
    error = parties.scores(parties.answers()) - exact
    assert error.std() < 8e-8
    assert np.abs(error).max() < 3e-7


# --- what a party sees ---------------------------------------------------------------------------


CHI_SQUARE_LIMIT = 255 + 6 * 510**0.5
"""Of 255 degrees of freedom, six standard deviations above the mean; p = 5e-8."""


def is_uniform(octets: bytes) -> bool:
    """Chi-square on bytes, and on the top bytes of words, where small numbers show."""
    values = np.frombuffer(octets, np.uint8)
    for some in (values, values[7::8]):
        expected = len(some) / 256
        counts = np.bincount(some, minlength=256)
        if ((counts - expected) ** 2).sum() / expected > CHI_SQUARE_LIMIT:
            return False
    return True


def view(party: int, gallery: Part, question: Part) -> Iterator[bytes]:
    """Everything that a party gets, and what it makes of it."""
    for part in (gallery, question):
        yield part.words.tobytes()
    strategy = SecretShared()
    received = strategy.receive(party, gallery)
    yield received.words.tobytes()
    yield strategy.compare(party, received, question).tobytes()


@pytest.mark.parametrize("party", range(PARTIES))
def test_a_partys_whole_view_is_uniform(party: int) -> None:
    rows = np.repeat(unit_rows(1, 512), 60, axis=0)  # as telling as rows can be
    strategy = SecretShared(entropy=entropy(party))
    gallery, question = strategy.enrol(rows, SEED)[party], strategy.ask(rows, SEED).parts[party]
    seen = list(view(party, gallery, question))
    assert any(seen)
    assert all(is_uniform(octets) for octets in seen if octets)


def test_the_same_test_fails_on_what_is_not_masked() -> None:
    rows = np.repeat(unit_rows(1, 512), 60, axis=0)
    assert not is_uniform(rows.tobytes())
    assert not is_uniform(_fixed_point(rows).tobytes())


@pytest.mark.parametrize("party", range(PARTIES))
def test_the_keys_of_a_party_are_uniform_and_two_of_the_three_zeros(party: int) -> None:
    strategy = SecretShared(entropy=entropy(9))
    keys = [strategy.enrol(unit_rows(1, 4), SEED)[party].keys for _ in range(400)]
    assert is_uniform(b"".join(keys))
    parts = strategy.enrol(unit_rows(1, 4), SEED)
    zeros = [{part.keys[i : i + 32] for i in (0, 32)} for part in parts]
    assert len(set.union(*zeros)) == PARTIES
    assert len(zeros[party]) == PARTIES - 1
    seed = parts[0].keys[64:]
    assert all(seed not in part.keys for part in parts[1:])


@pytest.mark.parametrize("party", range(PARTIES))
def test_a_question_shows_a_party_its_own_key_and_digests_alone(party: int) -> None:
    parts = SecretShared(entropy=entropy(9)).ask(unit_rows(1, 4), SEED).parts
    assert len(parts[party].keys) == 32 + 96
    assert len({part.keys[:32] for part in parts}) == PARTIES
    assert len({part.keys[32:] for part in parts}) == 1
    for other in {0, 1, 2} - {party}:
        assert parts[other].keys[:32] not in parts[party].keys


def test_the_server_gets_keys_alone() -> None:
    parties = Parties()
    for part in (parties.gallery[0], parties.question.parts[0]):
        assert not part.words.size


def test_the_views_of_one_party_on_two_galleries_are_alike_with_the_same_entropy() -> None:
    """What party 0 sees does not depend on the rows at all."""
    one, two = (
        SecretShared(entropy=entropy(4)).enrol(unit_rows(3, 8, s), SEED)[0] for s in range(2)
    )
    assert one.keys == two.keys
    assert one.words.tobytes() == two.words.tobytes()


def test_any_two_parties_together_can_read_everything_as_the_disclosure_says() -> None:
    parties = Parties()
    server, first, second = (
        parties.strategy.receive(p, parties.gallery[p]).words for p in range(PARTIES)
    )
    rows = _fixed_point(parties.rows)
    assert np.array_equal(server + first, 2 * rows)
    assert np.array_equal(server + second, rows)
    assert np.array_equal(first - second, rows)
    assert "Together with one" in parties.strategy.disclosure.server_learns


def test_one_answer_and_two_answers_are_uniform_to_the_asking_site() -> None:
    parties = Parties(rows=np.repeat(unit_rows(1, 64), 3000, axis=0))
    answers = parties.answers()
    for party in range(PARTIES):
        assert is_uniform(answers[party].tobytes())
        assert is_uniform((answers[party] + answers[(party + 1) % PARTIES]).tobytes())


def test_a_part_of_another_question_is_refused_by_the_party() -> None:
    """Zeros are bound to digests of all parts: nothing can be asked again with the same zeros."""
    parties, again = Parties(), Parties().strategy.ask(unit_rows(1, 16), SEED)
    for party in range(PARTIES):
        ours, theirs = parties.question.parts[party], again.parts[party]
        for words, own_key in ((theirs.words, ours.keys[:32]), (ours.words, theirs.keys[:32])):
            if party == 0 and own_key == ours.keys[:32]:
                continue  # the server gets no words
            mixed = Part(ours.shape, words, own_key + ours.keys[32:])
            received = parties.strategy.receive(party, parties.gallery[party])
            with pytest.raises(DataError, match="does not go with its digest"):
                parties.strategy.compare(party, received, mixed)


@pytest.mark.parametrize("party", range(PARTIES))
def test_the_zeros_of_two_questions_have_nothing_in_common(party: int) -> None:
    parties = Parties(rows=np.repeat(unit_rows(1, 64), 3000, axis=0))
    first = parties.answers()[party]
    keys = parties.question.parts[party].keys
    other = keys[:32] + keys[32:][::-1]  # other digests, the same share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secret_shared, "_digest", lambda *_: other[32 + 32 * party :][:32])
        question = Part((1, 64), parties.question.parts[party].words, other)
        received = parties.strategy.receive(party, parties.gallery[party])
        second = parties.strategy.compare(party, received, question)
    assert is_uniform((second - first).tobytes())


def less(part: Part, rows: list[int]) -> Part:
    """A party's matrix after it has dropped all rows but these."""
    return Part((len(rows), part.shape[1]), part.words[rows], part.keys)


def test_rows_can_be_dropped_and_the_scores_of_the_others_stay() -> None:
    parties = Parties()
    received = [parties.strategy.receive(p, part) for p, part in enumerate(parties.gallery)]
    answers = [
        parties.strategy.compare(p, less(part, [1, 3]), parties.question.parts[p])
        for p, part in enumerate(received)
    ]
    assert np.array_equal(parties.scores(answers), parties.scores(parties.answers())[:, [1, 3]])


@pytest.mark.parametrize("party", range(PARTIES))
def test_a_question_that_comes_again_finds_other_zeros_where_rows_were_dropped(party: int) -> None:
    """Else the difference of two answers would show one party's products of unlike rows."""
    parties = Parties(rows=np.repeat(unit_rows(1, 64), 300, axis=0))
    received = parties.strategy.receive(party, parties.gallery[party])
    blank = Part(received.shape, np.zeros_like(received.words), received.keys)
    question = parties.question.parts[party]
    zeros = parties.strategy.compare(party, blank, question)
    again = parties.strategy.compare(party, less(blank, list(range(1, 300))), question)
    assert np.array_equal(zeros, parties.strategy.compare(party, blank, question))
    assert not np.isin(again, zeros).any()


def test_an_asking_site_with_enough_questions_computes_the_gallery_as_the_disclosure_says() -> None:
    rows, size = unit_rows(5, 12), 12
    strategy = SecretShared(entropy=entropy())
    gallery = [strategy.receive(p, part) for p, part in enumerate(strategy.enrol(rows, SEED))]
    question = strategy.ask(np.eye(size, dtype=np.float32), SEED)
    answers = [strategy.compare(p, gallery[p], question.parts[p]) for p in range(PARTIES)]
    assert np.abs(strategy.open(question, answers).T - rows).max() < 1e-6
    assert "query budget" in strategy.disclosure.asking_site_learns


# --- wrong answers -------------------------------------------------------------------------------


def refused(parties: Parties, answers: list[np.ndarray]) -> None:
    with pytest.raises(ServerError, match="one of the three computing parties is wrong"):
        parties.scores(answers)


@pytest.mark.parametrize("party", range(PARTIES))
@pytest.mark.parametrize("part", [0, 1], ids=["scores", "checks"])
@pytest.mark.parametrize("bit", [0, 1, 20, 40, 46, 47, 48, 62, 63])
def test_an_error_in_one_word_of_one_answer_is_found(party: int, part: int, bit: int) -> None:
    parties = Parties()
    for row in range(4):
        answers = parties.answers()
        answers[party][part, :, row] += np.uint64(1 << bit)
        refused(parties, answers)


@pytest.mark.parametrize("party", range(PARTIES))
def test_a_party_that_uses_other_rows_is_found(party: int) -> None:
    parties = Parties()
    answers = parties.answers()
    received = parties.strategy.receive(party, parties.gallery[party])
    wrong = received.words.copy()
    wrong[1] = wrong[0]
    answers[party] = parties.strategy.compare(
        party, Part(received.shape, wrong, received.keys), parties.question.parts[party]
    )
    refused(parties, answers)


@pytest.mark.parametrize("party", range(PARTIES))
def test_answers_to_another_question_and_swapped_rows_are_found(party: int) -> None:
    parties, other = Parties(), Parties(seed=1)
    answers = parties.answers()
    answers[party] = other.answers()[party]
    refused(parties, answers)
    answers = parties.answers()
    answers[party] = answers[party][:, :, ::-1].copy()
    refused(parties, answers)


def test_errors_with_a_guessed_ratio_pass_as_rarely_as_stated() -> None:
    """The worst errors by valuation v, over all factors that matter: at most 2^-30.

    Only ``1 / c`` and ``d`` modulo 2^(64 - v) count, so where few are left they can all be tried.
    """
    bound = int((1 + 2 * LENGTH_TOLERANCE) * ONE)
    worst = 0.0
    for v in range(46, 64):
        changes = np.arange(1, 1 << (64 - v), 2).astype(object) << v
        signed = [c - (1 << 64) if c >> 63 else c for c in changes]
        for score in (-ONE, -ONE // 2, 0, 1, ONE // 3, ONE):
            in_range = sum(abs(score + change) <= bound for change in signed)
            worst = max(worst, in_range / len(signed) / len(signed))  # and e' = d e
    assert worst == 2**-30


def test_the_stated_error_passes_if_both_factors_are_guessed() -> None:
    """The bound is not for show: who knew c and d could turn a score of 1 into -1."""
    parties = Parties()
    cover, check = _factors(parties.question.secret)
    error = np.uint64(2 * ONE) * cover
    answers = parties.answers()
    answers[1][0, :, 0] -= error
    answers[1][1, :, 0] -= check * error
    assert parties.scores(answers)[0, 0] == -1


def test_a_score_out_of_range_is_found_even_if_the_check_holds() -> None:
    parties = Parties()
    cover, check = _factors(parties.question.secret)
    error = np.uint64(ONE // 2) * cover
    answers = parties.answers()
    answers[2][0, :, 0] += error
    answers[2][1, :, 0] += check * error
    refused(parties, answers)


def test_an_owner_that_deals_unlike_shares_makes_its_rows_unusable() -> None:
    parties = Parties()
    other = parties.strategy.enrol(parties.rows, SEED)
    parties.gallery = (other[0], *parties.gallery[1:])
    refused(parties, parties.answers())
