"""Performance claims of secure aggregation, as ratios measured in one process.

How it is measured:

- Everything that is compared runs in turn, A B A B, and a ratio is one of medians over the rounds.
  The vector has 65.2 M words (a face network). A quarter of it is at work, which is still far
  larger than the caches; what is done word by word is scaled linearly, messages are not.
- All sides work on one thread, and time is this process's CPU time, so that other work on the
  machine counts as little as it can. Memory bandwidth and caches are still shared. The critical
  path is elapsed time instead, with ``THREADS`` threads on both sides.
- ``extra_info`` of a benchmark holds the ratio, what it is against, the target, and the medians in
  seconds. The seconds in pytest-benchmark's own table are of whole rounds, all sides together.
- A number of another library is measured here and now, never quoted. ``make bench-peers`` builds
  the environment for that (extra ``peers``).

What belongs to the critical path of a round, and what does not:

- Inside, of one site: the copy of its vector, the masking, and all it does for the messages (keys,
  shares, deliveries, endorsement, unmask shares; RSA-2048 signatures, as FLARE's certificates
  have). Inside, of the server: the same for all *n* sites, recovering the seeds, and one pass that
  adds *n* vectors and takes the streams off. No site is lost.
- The floor is what FedAvg without masks does with as many float32 values: one copy at a site; at
  the server *n* additions, vector by vector and piece by piece, as they arrive.
  ``ratio_weighted`` is against a floor that also multiplies each by its weight, as FedAvg does;
  here the weight is in the words already. ``ratio_one_pass`` is against one that waits for all
  vectors and adds them in one pass, as we do; no library is known to.
- Outside: the network, the (de)serialization of messages and vectors, and files. Turning numbers
  into words and back is outside, too, and has its own benchmark. Both sides sum into new memory,
  as each round does.
- All *n* sites mask one and the same update, one after another in the same buffer, so that memory
  does not grow with *n*: the server adds the last one's vector *n* times.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from secagg_round import (
    WEIGHT,
    Certificate,
    Round,
    Stopwatch,
    altogether,
    messages_only,
    plan_for,
    typical,
    words_of,
)

from fedgestalt.secagg import Recipient, ThreatModel
from fedgestalt.secagg.stream import Calibration, calibrate

WORDS = 65_200_000
SLICE = WORDS // 4
SCALE = WORDS / SLICE
SITES = (4, 8, 16)
ROUNDS = {4: 15, 8: 9, 16: 5}
PIECE = 1 << 19
THREADS = min(2, len(os.sched_getaffinity(0)))
CACHED = (128 << 10, 256 << 10)
PEERS = "needs the extra [peers] in an environment of its own: make bench-peers"

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module", autouse=True)
def calibration() -> Calibration:
    return calibrate(time.perf_counter)


@pytest.fixture(scope="module")
def certificates() -> list[Certificate]:
    return [Certificate() for _ in range(max(SITES))]


@pytest.fixture(scope="module")
def update() -> NDArray[np.float32]:
    values = np.random.default_rng(0).standard_normal(SLICE - 2, dtype=np.float32)
    values *= 0.1
    return values


def report(
    benchmark: Any, against: str, ratio: float, target: float | None, **more: object
) -> None:
    """Write down a ratio in ``extra_info``, seconds rounded to 0.1 ms."""
    benchmark.extra_info |= {"ratio": round(ratio, 3), "against": against, "target": target}
    benchmark.extra_info |= {"words": WORDS, "slice": SLICE}
    benchmark.extra_info |= {
        name: round(value, 4) if isinstance(value, float) else value for name, value in more.items()
    }


def keystream(chunk: int, gcm: bool, octets: int) -> None:
    """AES-256 keystream alone, made into the same chunk over and over."""
    mode = modes.GCM(bytes(12)) if gcm else modes.CTR(bytes(16))
    encryptor = Cipher(algorithms.AES256(bytes(32)), mode).encryptor()
    zeros, target = bytes(chunk), bytearray(chunk + 16)
    for _ in range(octets // chunk):
        encryptor.update_into(zeros, target)


def additions(chunk: int, octets: int) -> None:
    """Additions alone, of two chunks that stay in the cache."""
    total, words = np.zeros(chunk // 4, np.uint32), np.ones(chunk // 4, np.uint32)
    for _ in range(octets // chunk):
        np.add(total, words, out=total)


@pytest.mark.parametrize("sites", SITES)
def test_client_masking(benchmark, calibration, certificates, sites: int) -> None:
    """What one site does in ``mask``: *n* - 1 pair streams and its own, against their limit.

    The limit is 1 / (1 / keystream + 1 / add): as many bytes of keystream by the faster of
    OpenSSL's two ways and as many additions, each alone, in chunks that never leave the cache.
    """
    rounds, gcm = [], calibration.gcm > calibration.ctr
    words, octets = np.zeros(SLICE, np.uint32), 4 * SLICE * sites

    def turn() -> None:
        session = Round(certificates[:sites], SLICE)
        watch = Stopwatch()
        for chunk in CACHED:
            watch(f"keystream {chunk}", keystream, chunk, gcm, octets)
            watch(f"additions {chunk}", additions, chunk, octets)
        watch("mask", session.sites[f"site-{sites // 2:02d}"].mask, words)
        rounds.append(watch.steps)

    benchmark.pedantic(turn, rounds=ROUNDS[sites])
    made = min(typical(rounds, f"keystream {chunk}") for chunk in CACHED)
    added = min(typical(rounds, f"additions {chunk}") for chunk in CACHED)
    masked = typical(rounds, "mask")
    report(
        benchmark,
        "1 / (1 / keystream + 1 / add), at least",
        (made + added) / masked,
        0.70,
        sites=sites,
        mask=masked * SCALE,
        keystream=made * SCALE,
        add=added * SCALE,
        gigabytes_per_second=octets / masked / 1e9,
    )
    assert (made + added) / masked >= 0.70


@pytest.mark.parametrize("sites", SITES)
def test_critical_path(benchmark, certificates, update, sites: int) -> None:
    """One site's and the server's work of a round, against FedAvg without masks. Elapsed time."""
    rounds, fixed = [], []
    words = plan_for(sites, SLICE).encode({"w": update}, WEIGHT)
    masked, copied = np.zeros_like(words), np.zeros_like(update)
    elsewhere = np.ones(SLICE, np.uint32)  # read before each step: all find the caches alike

    def turn() -> None:
        fixed.append(messages_only(certificates[:sites], clock=time.perf_counter))
        session = Round(certificates[:sites], SLICE, clock=time.perf_counter)
        watch, server = session.watch, session.server
        floor, weighted, one_pass = (np.zeros_like(update) for _ in "123")
        for site, one in session.sites.items():
            mask = functools.partial(one.mask, threads=THREADS)
            for step, work, *given in (
                ("copy", np.copyto, masked, words),
                ("floor copy", np.copyto, copied, update),
                ("mask", mask, masked),
                ("floor add", floors.add, floor, [copied]),
                ("weighted add", floors.add_weighted, weighted, [copied]),
            ):
                elsewhere.max()
                watch(step, work, *given)
            server.accept_vector(site, words_of(masked), SLICE)
        elsewhere.max()
        watch("one pass", floors.add, one_pass, [copied] * sites)
        elsewhere.max()
        session.finish(THREADS)
        rounds.append(watch.steps)

    with Floors(THREADS) as floors:
        benchmark.pedantic(turn, rounds=ROUNDS[sites])
    copy, mask, floor_copy = (
        typical(rounds, step) * SCALE for step in ("copy", "mask", "floor copy")
    )
    opening = typical(fixed, "total")
    opened = (typical(rounds, "total") - opening) * SCALE
    messages = altogether(fixed, "messages") / sites
    server_messages = altogether(fixed, "server") + opening
    client, server = copy + mask + messages, opened + server_messages
    floors_by_name = {
        "floor_server": altogether(rounds, "floor add") * SCALE,
        "floor_server_weighted": altogether(rounds, "weighted add") * SCALE,
        "floor_server_one_pass": altogether(rounds, "one pass") * SCALE,
    }
    ratio, ratio_weighted, ratio_one_pass = (
        (client + server) / (floor_copy + seconds) for seconds in floors_by_name.values()
    )
    report(
        benchmark,
        "copy and sum of FedAvg without masks, at most",
        ratio,
        2.3,
        ratio_weighted=ratio_weighted,
        ratio_one_pass=ratio_one_pass,
        sites=sites,
        threads=THREADS,
        client=client,
        client_mask=mask,
        client_messages=messages,
        server=server,
        server_total=opened,
        server_messages=server_messages,
        floor_client=floor_copy,
        **floors_by_name,
    )
    assert ratio <= 2.3


class Floors:
    """Sums of float32 vectors without masks, with as many threads as ours has."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._scratches = threading.local()

    def __enter__(self) -> Floors:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, total: NDArray[np.float32], vectors: Sequence[NDArray[np.float32]]) -> None:
        """Each piece of the sum takes the pieces of all ``vectors`` while it is in the cache."""

        def piece(start: int) -> None:
            part = total[start : start + PIECE]
            for vector in vectors:
                np.add(part, vector[start : start + PIECE], out=part)

        list(self._pool.map(piece, range(0, total.size, PIECE)))

    def add_weighted(
        self, total: NDArray[np.float32], vectors: Sequence[NDArray[np.float32]]
    ) -> None:
        """As :meth:`add`, with a weight."""

        def piece(start: int) -> None:
            part = total[start : start + PIECE]
            if not hasattr(self._scratches, "piece"):
                self._scratches.piece = np.zeros(PIECE, np.float32)
            for vector in vectors:
                scaled = self._scratches.piece[: part.size]
                np.multiply(vector[start : start + PIECE], np.float32(0.25), out=scaled)
                np.add(part, scaled, out=part)

        list(self._pool.map(piece, range(0, total.size, PIECE)))


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_numbers(benchmark, update, direction: str) -> None:
    """Float32 to words and back, each against a copy of the float32 values. No target.

    No value is clipped.
    """
    rounds, plan = [], plan_for(8, SLICE)
    words = plan.encode({"w": update}, WEIGHT)

    def turn() -> None:
        watch = Stopwatch()
        if direction == "encode":
            watch("numbers", plan.encode, {"w": update}, WEIGHT)
        else:
            watch("numbers", plan.decode(words).mean.__getitem__, "w")
        watch("copy", update.copy)
        rounds.append(watch.steps)

    benchmark.pedantic(turn, rounds=20)
    numbers, copy = typical(rounds, "numbers"), typical(rounds, "copy")
    against = "a copy of as many float32 values; no target"
    report(benchmark, against, numbers / copy, None, seconds=numbers * SCALE, copy=copy * SCALE)


class Site:
    """What one site does for a vector of ``WORDS`` words: vectors of a slice, scaled linearly."""

    def __init__(
        self,
        certificates: Sequence[Certificate],
        update: NDArray[np.float32],
        recipient: Recipient = Recipient.SERVER,
    ) -> None:
        self._certificates, self._recipient = certificates, recipient
        self._update = {"w": update}
        self._rounds: list[Mapping[str, Sequence[float]]] = []
        self._fixed: list[Mapping[str, Sequence[float]]] = []

    def turn(self) -> None:
        other = Round(self._certificates, SLICE, self._recipient)
        plan, watch = plan_for(len(self._certificates), SLICE), Stopwatch()
        site = other.sites["site-01"]
        words = watch("encode", plan.encode, self._update, WEIGHT)
        watch("mask", site.mask, words)
        if self._recipient is Recipient.SITES:
            watch("unveil", site.unveil, words, list(other.sites))
            words[-2:] = 0, WEIGHT
            watch("decode", lambda: plan.decode(words).mean["w"])
        self._rounds.append(watch.steps)
        self._fixed.append(messages_only(self._certificates, self._recipient))

    def seconds(self, *steps: str) -> float:
        slices = sum(typical(self._rounds, step) for step in steps)
        return slices * SCALE + altogether(self._fixed, "messages") / len(self._certificates)


@pytest.mark.parametrize("sites", SITES)
def test_against_flower(benchmark, certificates, update, sites: int) -> None:
    """One client's whole work of a round, against the same made of Flower's SecAgg+ utilities.

    Both sides: keys, shares and boxes, float32 to words, one mask with every other client and one
    of its own. Neither side turns messages into bytes of a wire format. Flower as it comes: values
    in -8..8, 22 bits, modulus 2^32.
    """
    peers = pytest.importorskip("secagg_peers", reason=PEERS, exc_type=ImportError)
    ours, theirs = Site(certificates[:sites], update), []
    threshold = ThreatModel.MALICIOUS.threshold(sites)

    def turn() -> None:
        ours.turn()
        watch = Stopwatch()
        flower = watch("messages", peers.FlowerClient, sites, threshold)
        flower.meet()
        watch("messages", flower.share)
        watch("messages", flower.receive)
        watch("mask", flower.mask, update)
        watch.steps["all messages"].append(sum(watch.steps["messages"]))
        theirs.append(watch.steps)

    benchmark.pedantic(turn, rounds=ROUNDS[sites])
    mine = ours.seconds("encode", "mask")
    other = typical(theirs, "mask") * SCALE + typical(theirs, "all messages")
    report(
        benchmark,
        f"a client made of the SecAgg+ utilities of flwr {version('flwr')}, at least",
        other / mine,
        10,
        sites=sites,
        client=mine,
        peer_client=other,
        peer_messages=typical(theirs, "all messages"),
    )
    assert other / mine >= 10


@pytest.mark.parametrize("sites", SITES)
def test_against_tenseal(benchmark, certificates, update, sites: int) -> None:
    """One client's whole work before the upload, against CKKS encryption of the same values.

    CKKS as FLARE provisions and calls it: degree 8192, moduli of 60, 40 and 40 bits, scale 2^40,
    symmetric, values weighted in float64, not serialized; ``CIPHERTEXTS`` ciphertexts, scaled
    linearly. Its server sees no sum, so our server sees none either (one more mask; ``Recipient``
    is ``SITES``). What it costs does not depend on *n*, while our masks do. ``ratio_round`` adds
    what a client does after the download: decryption there, taking the common masks off and
    decoding here.
    """
    peers = pytest.importorskip("secagg_peers", reason=PEERS, exc_type=ImportError)
    ours, theirs = Site(certificates[:sites], update, Recipient.SITES), []
    context = peers.ckks_context()
    values = update[: peers.CIPHERTEXTS * peers.VALUES_PER_CIPHERTEXT]

    def turn() -> None:
        ours.turn()
        watch = Stopwatch()
        encrypted = watch("encrypt", peers.encrypt, context, values)
        watch("decrypt", peers.decrypt, context, encrypted)
        theirs.append(watch.steps)

    benchmark.pedantic(turn, rounds=ROUNDS[sites])
    mine, scale = ours.seconds("encode", "mask"), WORDS / values.size
    encryption, decryption = (typical(theirs, step) * scale for step in ("encrypt", "decrypt"))
    whole = ours.seconds("encode", "mask", "unveil", "decode")
    report(
        benchmark,
        f"CKKS encryption by tenseal {version('tenseal')}, at least",
        encryption / mine,
        100,
        ratio_round=(encryption + decryption) / whole,
        sites=sites,
        peer_slice=values.size,
        client=mine,
        client_round=whole,
        peer_encryption=encryption,
        peer_decryption=decryption,
    )
    assert encryption / mine >= 100
