"""Mask streams: the bytes are the specification, however they are made, cut and shared out."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedgestalt.secagg import stream
from fedgestalt.secagg.stream import (
    AES,
    CHACHA20,
    Stream,
    add_streams,
    calibrate,
)

Words = NDArray[np.uint32]

KEY, OTHER_KEY, THIRD_KEY = bytes(range(32)), bytes(range(32, 64)), bytes(range(64, 96))
SEGMENT_BYTES = 4 * 1024 * 1024
SEGMENT = SEGMENT_BYTES // 4
WHOLE = 3 * SEGMENT
SEGMENT_NUMBERS = range(3)

# Zero keys. AES: test case 14 of the GCM specification (McGrew and Viega 2005). ChaCha20: RFC 8439,
# appendix A.1, vectors 1, 2 and 5; vector 5 has the nonce 00 ... 00 02.
AES_ANSWER = "cea7403d4d606b6e074ec5d3baf39d18"
CHACHA20_ANSWERS = {
    0: "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    16: "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    (2 << 88) * SEGMENT: "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
    "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
}


@cache
def aes_segment(key: bytes, segment: int) -> Words:
    """From the definition: every counter block encrypted by itself."""
    blocks = np.zeros((SEGMENT_BYTES // 16, 4), ">u4")
    blocks[:, :3] = np.frombuffer(segment.to_bytes(12, "little"), ">u4")
    blocks[:, 3] = np.arange(2, 2 + len(blocks))
    encryptor = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()  # noqa: S305
    return np.frombuffer(encryptor.update(blocks.tobytes()), "<u4")


@cache
def chacha20_segment(key: bytes, segment: int) -> Words:
    """From RFC 8439, section 2.3, for all blocks at once."""
    count = SEGMENT_BYTES // 64
    start = np.empty((16, count), np.uint32)
    start[:4] = np.frombuffer(b"expand 32-byte k", "<u4")[:, None]
    start[4:12] = np.frombuffer(key, "<u4")[:, None]
    start[12] = np.arange(count)
    start[13:] = np.frombuffer(segment.to_bytes(12, "little"), "<u4")[:, None]
    x = start.copy()
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for a, b, c, d in 10 * (columns + diagonals):
        for add, other, turn, by in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[add] += x[other]
            x[turn] ^= x[add]
            x[turn] = x[turn] << by | x[turn] >> 32 - by
    return (x + start).T.ravel()


@cache
def specified(cipher: str, key: bytes = KEY) -> Words:
    """The first three segments of a stream."""
    segment_of = {AES: aes_segment, CHACHA20: chacha20_segment}[cipher]
    return np.concatenate([segment_of(key, number) for number in SEGMENT_NUMBERS])


def made(cipher: str, first: int, count: int, *, key: bytes = KEY, threads: int = 1) -> Words:
    words = np.zeros(count, np.uint32)
    add_streams(words, [Stream(key)], cipher=cipher, first_word=first, threads=threads)
    return words


def some_vector(count: int) -> Words:
    return np.arange(count, dtype=np.uint32) * np.uint32(2654435761)


@dataclass
class Machine:
    """Pretends that starting a cipher is what takes time.

    Attributes:
        cost: seconds per start, of "CTR", "GCM" and "ChaCha20".
        first: the first start of each takes this many times as long.
        on_start: called at every start.
    """

    cost: dict[str, float]
    first: float = 1
    on_start: Callable[[], object] = lambda: None
    started: Counter[str] = field(default_factory=Counter)
    now: float = 1000.0

    def clock(self) -> float:
        return self.now

    def slow(self, name: str, initialize: Callable[..., None]) -> Callable[..., None]:
        def start(*arguments: Any) -> None:
            self.now += self.cost[name] * (1 if self.started[name] else self.first)
            self.started[name] += 1
            self.on_start()
            initialize(*arguments)

        return start


BuildMachine = Callable[..., Machine]


@pytest.fixture
def build_machine(monkeypatch: pytest.MonkeyPatch) -> BuildMachine:
    kinds = (modes.CTR, modes.GCM, algorithms.ChaCha20)
    originals = {kind: kind.__init__ for kind in kinds}

    def build(ctr: float, gcm: float, chacha20: float, **more: Any) -> Machine:
        machine = Machine({"CTR": ctr, "GCM": gcm, "ChaCha20": chacha20}, **more)
        for kind, original in originals.items():
            monkeypatch.setattr(kind, "__init__", machine.slow(kind.__name__, original))
        return machine

    return build


@pytest.fixture(params=["ctr", "gcm", "chacha20"])
def cipher(request: pytest.FixtureRequest, build_machine: BuildMachine) -> str:
    """Each of the ways to make keystream, by the name of its cipher."""
    if request.param == "chacha20":
        return CHACHA20
    gcm_is_better = request.param == "gcm"
    calibrate(build_machine(2, 1 if gcm_is_better else 3, 2).clock)
    return AES


the_way_stays = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)


def test_names_and_sizes_that_sites_must_share() -> None:
    assert (stream.AES, stream.CHACHA20) == ("aes-256-ctr", "chacha20")
    assert stream.SEGMENT_BYTES == SEGMENT_BYTES


def test_aes_gives_the_published_answer(cipher: str) -> None:
    if cipher == AES:
        assert made(AES, 0, 4, key=bytes(32)).tobytes().hex() == AES_ANSWER
    assert specified(AES, bytes(32))[:4].tobytes().hex() == AES_ANSWER


@pytest.mark.parametrize("first", CHACHA20_ANSWERS)
def test_chacha20_gives_the_published_answers(first: int) -> None:
    answer = CHACHA20_ANSWERS[first]
    assert made(CHACHA20, first, 16, key=bytes(32)).tobytes().hex() == answer
    segment, word = divmod(first, SEGMENT)
    words = chacha20_segment(bytes(32), segment)[word : word + 16]
    assert words.tobytes().hex() == answer


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_all_words_are_those_of_the_specification(cipher: str, threads: int) -> None:
    for _ in range(3):
        assert np.array_equal(made(cipher, 0, WHOLE, threads=threads), specified(cipher))


@pytest.mark.parametrize("segment", [255, 256, 2**32 + 5, 2**96 - 1])
def test_high_segments_are_those_of_the_specification(cipher: str, segment: int) -> None:
    segment_of = {AES: aes_segment, CHACHA20: chacha20_segment}[cipher]
    words = made(cipher, segment * SEGMENT, SEGMENT)
    assert np.array_equal(words, segment_of.__wrapped__(KEY, segment))


near_a_border = st.builds(
    lambda border, by: min(max(border + by, 0), WHOLE),
    st.sampled_from([0, 1 << 15, 1 << 16, SEGMENT - (1 << 15), SEGMENT, 2 * SEGMENT, WHOLE]),
    st.integers(-40, 40),
)
places = near_a_border | st.integers(0, WHOLE)


@the_way_stays
@given(st.tuples(places, places).map(sorted), st.sampled_from([1, 2, 3]))
def test_every_part_equals_the_slice_of_the_whole(
    cipher: str, ends: list[int], threads: int
) -> None:
    first, end = ends
    words = made(cipher, first, end - first, threads=threads)
    assert np.array_equal(words, specified(cipher)[first:end])


def test_every_word_near_a_beginning_can_be_the_first(cipher: str) -> None:
    for start in (0, SEGMENT):
        for first in range(start, start + 40):
            assert np.array_equal(made(cipher, first, 50), specified(cipher)[first : first + 50]), (
                first
            )


@the_way_stays
@given(
    st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.booleans()), max_size=5),
    st.integers(0, 2 * SEGMENT),
    st.integers(0, 200_000),
)
def test_subtracting_undoes_adding(
    cipher: str, streams: list[tuple[bytes, bool]], first: int, count: int
) -> None:
    vector = some_vector(count)
    there = [Stream(key, subtract) for key, subtract in streams]
    back = [Stream(key, not subtract) for key, subtract in streams]
    add_streams(vector, there, cipher=cipher, first_word=first)
    add_streams(vector, back, cipher=cipher, first_word=first)
    assert np.array_equal(vector, some_vector(count))


@pytest.mark.parametrize("threads", [1, 3])
def test_several_streams_are_each_added_or_subtracted(cipher: str, threads: int) -> None:
    first, count = SEGMENT - 70_001, SEGMENT + 150_003
    streams = [Stream(KEY), Stream(OTHER_KEY, subtract=True), Stream(THIRD_KEY)]
    vector = some_vector(count)
    add_streams(vector, iter(streams), cipher=cipher, first_word=first, threads=threads)
    plus, minus, third = (specified(cipher, s.key)[first : first + count] for s in streams)
    assert np.array_equal(vector, some_vector(count) + plus - minus + third)
    alone = some_vector(count)
    for one in reversed(streams):
        add_streams(alone, [one], cipher=cipher, first_word=first)
    assert np.array_equal(vector, alone)


def test_no_streams_and_no_words_change_nothing(cipher: str) -> None:
    vector = some_vector(1000)
    add_streams(vector, [], cipher=cipher)
    assert np.array_equal(vector, some_vector(1000))
    for first in (0, 17, SEGMENT):
        add_streams(vector[:0], [Stream(KEY)], cipher=cipher, first_word=first, threads=2)


def test_a_part_of_a_larger_array_leaves_the_rest_alone(cipher: str) -> None:
    vector = some_vector(100_000)
    add_streams(vector[101:-103], [Stream(KEY)], cipher=cipher, first_word=5)
    expected = some_vector(100_000)
    expected[101:-103] += specified(cipher)[5 : 100_000 - 204 + 5]
    assert np.array_equal(vector, expected)


def test_aes_from_the_beginning_is_what_is_added_unless_told_otherwise() -> None:
    vector = np.zeros(1000, np.uint32)
    add_streams(vector, [Stream(KEY)])
    assert np.array_equal(vector, specified(AES)[:1000])


def test_different_keys_give_unrelated_streams(cipher: str) -> None:
    assert (made(cipher, 0, 50_000) == made(cipher, 0, 50_000, key=OTHER_KEY)).sum() < 5


def test_threads_work_at_the_same_time(build_machine: BuildMachine) -> None:
    meet = threading.Barrier(2)
    machine = build_machine(1, 1, 1, on_start=lambda: meet.wait(timeout=60))
    vector = np.zeros(2 * SEGMENT, np.uint32)
    add_streams(vector, [Stream(KEY)], cipher=CHACHA20, threads=2)
    assert machine.started == {"ChaCha20": 2}


def test_what_fails_in_a_thread_is_raised(build_machine: BuildMachine) -> None:
    machine = build_machine(1, 1, 1)

    def fail_at_the_second() -> None:
        if machine.started["ChaCha20"] == 2:
            raise MemoryError

    machine.on_start = fail_at_the_second
    with pytest.raises(MemoryError):
        add_streams(np.zeros(WHOLE, np.uint32), [Stream(KEY)], cipher=CHACHA20, threads=2)


def test_there_are_no_more_threads_than_asked_for(build_machine: BuildMachine) -> None:
    seen: set[int] = set()
    build_machine(1, 1, 1, on_start=lambda: (seen.add(threading.get_ident()), time.sleep(0.01)))
    vector = np.zeros(WHOLE, np.uint32)
    add_streams(vector, [Stream(KEY)], cipher=CHACHA20)
    assert seen == {threading.get_ident()}
    seen.clear()
    add_streams(vector, [Stream(KEY)], cipher=CHACHA20, threads=2)
    assert len(seen) <= 2


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("first", [0, 70_001])
def test_vectors_that_lie_elsewhere_are_added_as_well(first: int, threads: int) -> None:
    count = 2 * SEGMENT + 150_003
    others = [some_vector(count), some_vector(count)[::-1].copy()]
    asked: list[int] = []

    def read(first: int, end: int) -> Any:
        asked.append(end - first)
        return others[0][first:end]

    vector = some_vector(count)
    add_streams(
        vector,
        [Stream(KEY)],
        vectors=[read, lambda first, end: others[1][first:end]],
        first_word=first,
        threads=threads,
    )
    stream = specified(AES, KEY)[first : first + count]
    assert np.array_equal(vector, some_vector(count) + others[0] + others[1] + stream)
    assert sum(asked) == count
    assert max(asked) == 2**19


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("uint32", {"vector": np.zeros(8, np.int32)}),
    ("uint32", {"vector": np.zeros(8, np.float32)}),
    ("uint32", {"vector": np.zeros(8, np.dtype(np.uint32).newbyteorder())}),
    ("contiguous", {"vector": np.zeros(8, np.uint32)[::2]}),
    ("one axis", {"vector": np.zeros((2, 4), np.uint32)}),
    ("written", {"vector": np.frombuffer(bytes(32), np.uint32)}),
    ("unknown cipher 'rot13'", {"cipher": "rot13"}),
    ("words -1 to", {"first_word": -1}),
    ("words", {"first_word": (SEGMENT << 96) - 7}),
    ("0 threads", {"threads": 0}),
]


@pytest.mark.parametrize(("message", "wrong"), WRONG)
def test_wrong_arguments_are_refused_and_change_nothing(
    message: str, wrong: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = {"vector": np.zeros(8, np.uint32), "streams": [Stream(KEY)]}
    arguments |= wrong
    with pytest.raises(ValueError, match=message):
        add_streams(**arguments)
    assert not arguments["vector"].any()


def test_the_last_words_of_all_can_be_used() -> None:
    assert made(AES, (SEGMENT << 96) - 8, 8).any()


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        Stream(bytes(length))


def test_a_stream_does_not_show_its_key() -> None:
    key = b"a key that must not be in a log!"
    assert repr(Stream(key)) == "Stream(subtract=False)"
    assert key.decode() not in f"{Stream(key, subtract=True)}"


@pytest.mark.parametrize(
    ("costs", "used", "fast"),
    [
        ((4, 1, 2), "GCM", True),
        ((1, 4, 2), "CTR", True),
        ((8, 4, 2), "GCM", False),
        ((4, 8, 2), "CTR", False),
        ((4, 2, 2), "GCM", True),
    ],
)
def test_calibration_picks_the_faster_way_to_the_aes_bytes(
    costs: tuple[float, float, float], used: str, fast: bool, build_machine: BuildMachine
) -> None:
    machine = build_machine(*costs, first=100)
    found = calibrate(machine.clock)
    rates = (found.ctr, found.gcm, found.chacha20)
    assert rates == pytest.approx([SEGMENT_BYTES / seconds for seconds in costs])
    assert found.aes_is_fast is fast
    machine.started.clear()
    made(AES, 0, 100)
    assert machine.started == {used: 1}


def test_before_calibration_aes_bytes_are_made_by_ctr(
    build_machine: BuildMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.find_spec(stream.__name__)
    assert spec is not None
    assert spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, stream.__name__, fresh)
    spec.loader.exec_module(fresh)
    machine = build_machine(2, 1, 2)
    fresh.add_streams(np.zeros(8, np.uint32), [fresh.Stream(KEY)])
    assert machine.started == {"CTR": 1}


def test_gcm_never_begins_inside_a_segment(build_machine: BuildMachine) -> None:
    machine = build_machine(2, 1, 2)
    calibrate(machine.clock)
    machine.started.clear()
    made(AES, 1000, 2 * SEGMENT)
    assert machine.started == {"CTR": 1, "GCM": 2}


def test_calibration_with_a_clock_that_stands_still_changes_nothing(
    build_machine: BuildMachine,
) -> None:
    machine = build_machine(1, 2, 2)
    calibrate(machine.clock)
    with pytest.raises(ValueError, match="did not advance"):
        calibrate(lambda: 5.0)
    machine.started.clear()
    made(AES, 0, 100)
    assert machine.started == {"CTR": 1}


def test_calibration_measures_this_machine() -> None:
    started = time.perf_counter()
    found = calibrate(time.perf_counter)
    assert time.perf_counter() - started < 10
    for rate in (found.ctr, found.gcm, found.chacha20):
        assert 1e6 < rate < 1e12
