"""Long vectors in chunks, over a line that loses, repeats, reorders, delays and damages.

FLARE's own dispatcher stands at the server's end of the line, and every message goes through FOBS.
Chunks have four words here, so that a vector of a few words has several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import random
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.decomposers import common_decomposers
from nvflare.fuel.utils import fobs
from nvflare.private.aux_runner import AuxRunner

from fedgestalt.errors import PeerError, ServerError, SiteError
from fedgestalt.federation.job import transfer
from fedgestalt.federation.job.transfer import (
    DOWNLOAD,
    UPLOAD,
    DownloadDesk,
    Piece,
    Slice,
    UploadDesk,
    Wanted,
    chunk_count,
    download,
    upload,
)
from fedgestalt.federation.job.wire import BODY, FAULT, body, fault_of, to_shareable

SITES = ("berlin", "bonn", "leuven")
NAME, OTHER_NAME = "ab" * 32, "cd" * 32
CHUNK = 4
SIZE = 10
CHUNKS = 3

Words = NDArray[np.uint32]
Mischief = Callable[["Line", str, Shareable, str], Shareable | None]

flare_decomposers.register()
common_decomposers.register()


class Line:
    """Aux messages from sites to the server, and back.

    Attributes:
        mischief: does something with a message other than delivering it.
        carried: topics and senders of all messages so far.
        crowd: the most that were on their way at a time.
    """

    def __init__(self) -> None:
        self.runner = AuxRunner(None)
        self.register_aux_message_handler = self.runner.register_aux_message_handler
        self.mischief: Mischief = Line.deliver
        self.carried: list[tuple[str, str]] = []
        self.late: list[tuple[str, Shareable, str]] = []
        self.crowd = self._under_way = 0
        self.lock = threading.Lock()

    def deliver(self, topic: str, request: Shareable, sender: str) -> Shareable | None:
        request = through_fobs(request)
        request.set_peer_props({ReservedKey.IDENTITY_NAME: sender})
        return through_fobs(self.runner.dispatch(topic, request, FLContext()))

    def send(self, topic: str, request: Shareable, sender: str) -> Shareable | None:
        with self.lock:
            self.carried.append((topic, sender))
            self._under_way += 1
            self.crowd = max(self.crowd, self._under_way)
        try:
            return self.mischief(self, topic, request, sender)
        finally:
            with self.lock:
                self._under_way -= 1


@dataclasses.dataclass
class SiteEngine:
    """FLARE's engine in the job process of one site."""

    line: Line
    site: str

    def send_aux_request(
        self, targets: list[str], topic: str, request: Shareable, timeout: float, fl_ctx: object
    ) -> dict[str, Shareable]:
        assert targets == ["server"]
        assert timeout > 0
        assert fl_ctx is CONTEXT
        reply = self.line.send(topic, request, self.site)
        return {} if reply is None else {"server": reply}


CONTEXT = FLContext()


def through_fobs(message: Shareable) -> Shareable:
    loaded = fobs.loads(fobs.dumps(message))
    assert isinstance(loaded, Shareable)
    return loaded


class Job:
    """Both desks, and sites that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.line = Line()
        self.up, self.down = UploadDesk(folder), DownloadDesk()
        self.up.register(self.line)
        self.down.register(self.line)
        self.tickets: dict[str, str] = {}
        self.stopped = False
        self.progress: list[tuple[int, int]] = []

    def expect(self, size: int = SIZE, name: str = NAME) -> None:
        self.size = size
        self.tickets = self.up.expect(name, size, SITES)

    def upload(self, words: Words, site: str = "bonn", **other: Any) -> None:
        usual = {"pieces": [words], "size": len(words), "ticket": self.tickets.get(site, "")}
        upload(SiteEngine(self.line, site), CONTEXT, **{**self._usual, **usual, **other})

    def download(self, into: Any, site: str = "bonn", **other: Any) -> None:
        usual = {"into": into, "size": len(into)}
        download(SiteEngine(self.line, site), CONTEXT, **{**self._usual, **usual, **other})

    @property
    def _usual(self) -> dict[str, Any]:
        return {
            "name": NAME,
            "limit_seconds": 20.0,
            "should_stop": lambda: self.stopped,
            "progress": lambda *at: self.progress.append(at),
        }

    def piece(self, chunk: int, content: bytes | None = None, site: str = "bonn") -> dict[str, Any]:
        """The fields of a good request."""
        length = min(CHUNK, SIZE - chunk * CHUNK)
        content = bytes([chunk + 1] * 4 * length) if content is None else content
        ticket = self.tickets[site]
        return Piece(NAME, ticket, chunk, zlib.crc32(content), content).to_fields()

    def ask(self, fields: object, sender: str = "bonn", topic: str = UPLOAD) -> Shareable:
        request = Shareable()
        request[BODY] = fields
        reply = self.line.deliver(topic, request, sender)
        assert reply is not None
        return reply

    def taken(self, site: str = "bonn", size: int = 0) -> Words:
        return self.up.vector(site)(0, size or self.size)

    @property
    def staging_files(self) -> list[Path]:
        """They have no names, so a listing does not show them."""
        found = []
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if entry.readlink().is_relative_to(self.folder):
                    found.append(entry)
        return found

    @property
    def open_files(self) -> int:
        return len(self.staging_files)


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_WORDS", CHUNK)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 4 * CHUNK)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(transfer, "_POLL_SECONDS", 0.002)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path / "staging")
    made.expect()
    yield made
    made.up.close()
    assert made.open_files == 0


def numbers(size: int = SIZE, seed: int = 1) -> Words:
    return np.random.default_rng(seed).integers(0, 2**32, size, np.uint32)


def in_turn(*ways: Mischief) -> Mischief:
    """One for each message, then they are delivered."""
    left, lock = list(ways), threading.Lock()

    def next_way(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
        with lock:
            way = left.pop(0) if left else Line.deliver
        return way(line, topic, request, sender)

    return next_way


# what can happen to a message


def lose(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    return None


def time_out(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    reply: Shareable = make_reply(ReturnCode.TIMEOUT)
    return reply


def fail(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    raise RuntimeError("no cell")


def lose_the_reply(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    line.deliver(topic, request, sender)
    return None


def repeat(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    line.deliver(topic, request, sender)
    return line.deliver(topic, request, sender)


def delay(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    time.sleep(0.01)
    return line.deliver(topic, request, sender)


def come_late(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    """It arrives after later ones, when nobody waits for it any more."""
    with line.lock:
        line.late.append((topic, request, sender))
    return None


def let_the_late_come(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    reply = line.deliver(topic, request, sender)
    with line.lock:
        late, line.late = line.late, []
    for one in late:
        line.deliver(*one)
    return reply


def damage(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
    """One bit of the words changes, on the way up or down."""
    if topic == UPLOAD:
        return line.deliver(topic, _with_damage(through_fobs(request)), sender)
    reply = line.deliver(topic, request, sender)
    return _with_damage(reply) if reply is not None and BODY in reply else reply


def _with_damage(message: Shareable) -> Shareable:
    words = bytearray(message[BODY]["words"])
    words[len(words) // 2] ^= 4
    message[BODY]["words"] = bytes(words)
    return message


WAYS = (
    Line.deliver,
    lose,
    time_out,
    fail,
    lose_the_reply,
    repeat,
    delay,
    come_late,
    let_the_late_come,
    damage,
)


# --- an upload -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 41])
def test_an_upload_arrives_as_it_was(job: Job, size: int) -> None:
    job.expect(size)
    sent = numbers(size)
    job.upload(sent)
    chunks = -(-size // CHUNK)
    assert job.progress == [(n + 1, chunks) for n in range(chunks)]
    np.testing.assert_array_equal(job.taken(), sent)


@given(cuts=st.lists(st.integers(0, 41), max_size=8))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_may_come_in_pieces_of_any_length(job: Job, cuts: list[int]) -> None:
    job.expect(41)
    sent = numbers(41)
    job.upload(sent, pieces=np.split(sent, sorted(cuts)), size=41)
    np.testing.assert_array_equal(job.taken(), sent)


def test_a_chunk_has_two_mebibytes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    monkeypatch.undo()
    job, sent = Job(tmp_path / "staging"), numbers(2**19 + 5)
    job.expect(len(sent))
    job.upload(sent)
    assert job.progress == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(job.taken(), sent)
    job.up.close()


@given(
    ends=st.tuples(st.integers(0, 40), st.integers(1, 41)).filter(lambda ends: ends[0] < ends[1])
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_it_can_be_read(job: Job, ends: tuple[int, int]) -> None:
    job.expect(41)
    job.upload(numbers(41))
    first, end = ends
    np.testing.assert_array_equal(job.up.vector("bonn")(first, end), numbers(41)[first:end])


def test_what_is_read_is_words_that_nobody_can_change(job: Job) -> None:
    job.upload(numbers())
    piece = job.up.vector("bonn")(0, CHUNK)
    assert piece.dtype == np.uint32
    assert not piece.flags.writeable


def test_pieces_are_read_no_further_than_they_can_be_sent(job: Job) -> None:
    job.expect(40 * CHUNK)
    ahead = []

    def pieces() -> Iterator[Words]:
        for number in range(40):
            ahead.append(number - len(job.progress))
            yield numbers(CHUNK, number)

    job.upload(numbers(), pieces=pieces(), size=40 * CHUNK)
    assert max(ahead) <= transfer.MOST_UNDER_WAY


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([numbers(SIZE - 1)], "has only 9"),
        ([numbers(SIZE), numbers(1)], "has more"),
        ([numbers(SIZE + CHUNK)], "has more"),
        ([], "has only 0"),
        ([numbers().astype(np.int64)], "uint32"),
        ([numbers().view(np.float32)], "uint32"),
        ([numbers().reshape(2, 5)], "uint32"),
    ],
)
def test_pieces_that_are_not_the_vector_are_an_error_and_no_upload(
    job: Job, pieces: list[Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        job.upload(numbers(), pieces=pieces, size=SIZE)
    with pytest.raises(PeerError):
        job.taken()


@pytest.mark.parametrize("name", ["", "../secret", "AB", "a" * 129, "a/b", "ab\n", "g"])
def test_a_name_is_hexadecimal_digits(job: Job, name: str) -> None:
    with pytest.raises(ValueError, match="no transfer can be called"):
        job.up.expect(name, SIZE, SITES)
    with pytest.raises(ValueError, match="no transfer can be called"):
        job.down.offer(name, numbers(), SITES)
    assert fault_of(job.ask({**job.piece(0), "name": name}))


@pytest.mark.parametrize("size", [0, -1])
def test_nothing_is_no_vector(job: Job, size: int) -> None:
    with pytest.raises(ValueError, match="words"):
        job.up.expect(NAME, size, SITES)


def test_the_number_of_chunks() -> None:
    assert [chunk_count(size) for size in (1, CHUNK, CHUNK + 1, 3 * CHUNK)] == [1, 1, 2, 3]


# --- what the server accepts ---------------------------------------------------------------------


def test_a_chunk_that_comes_twice_is_accepted_and_counts_once(job: Job) -> None:
    for _ in range(2):
        assert job.ask(job.piece(1)).get_return_code() == ReturnCode.OK
    assert job.up.received("bonn") == (1, CHUNKS)


def test_chunks_may_come_in_any_order(job: Job) -> None:
    for chunk in (2, 0, 1):
        assert not fault_of(job.ask(job.piece(chunk)))
    np.testing.assert_array_equal(job.taken().tobytes(), bytes([1] * 16 + [2] * 16 + [3] * 8))


def test_another_content_counts_until_the_upload_is_complete(job: Job) -> None:
    for chunk in (0, 1):
        job.ask(job.piece(chunk))
    assert not fault_of(job.ask(job.piece(0, b"\x07" * 16)))
    job.ask(job.piece(2))
    assert "over" in fault_of(job.ask(job.piece(0, b"\x09" * 16)))
    assert not fault_of(job.ask(job.piece(0, b"\x07" * 16)))
    assert job.taken()[0] == 0x07070707


def test_the_answer_to_the_last_chunk_may_be_lost_even_if_all_was_taken_since(job: Job) -> None:
    for chunk in range(CHUNKS):
        job.ask(job.piece(chunk))
    job.taken()
    assert not fault_of(job.ask(job.piece(2)))
    assert "over" in fault_of(job.ask(job.piece(2, b"\x09" * 8)))


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: {k: v for k, v in fields.items() if k != key}


def _with(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def changed(fields: dict[str, Any]) -> dict[str, Any]:
        fields = {**fields, **changes}
        if isinstance(words := fields.get("words"), bytes | np.ndarray) and (
            "checksum" not in changes
        ):
            fields["checksum"] = zlib.crc32(words)
        return fields

    return changed


REFUSED = {
    "nothing": lambda fields: None,
    "a text": lambda fields: "words",
    "a list": lambda fields: list(fields.values()),
    "no schema": _without("schema"),
    "another schema": _with(schema="fedgestalt.upload/2"),
    "no name": _without("name"),
    "no ticket": _without("ticket"),
    "no checksum": _without("checksum"),
    "no words": _without("words"),
    "more": _with(more=1),
    "offset": _with(offset=0),
    "another name": _with(name=OTHER_NAME),
    "a number as name": _with(name=7),
    "a name in bytes": _with(name=NAME.encode()),
    "another ticket": _with(ticket="0" * 32),
    "a ticket in capitals": _with(ticket="A" * 32),
    "a ticket that is no text": _with(ticket=7),
    "a negative chunk": _with(chunk=-1),
    "a chunk too many": _with(chunk=CHUNKS),
    "a chunk far beyond": _with(chunk=2**40),
    "a chunk that is true": _with(chunk=True),
    "a fraction as chunk": _with(chunk=0.0),
    "a text as chunk": _with(chunk="0"),
    "a whole chunk at the end": _with(chunk=CHUNKS - 1),
    "a word too few": _with(words=b"\x01" * 12),
    "a byte too few": _with(words=b"\x01" * 15),
    "a byte too many": _with(words=b"\x01" * 17),
    "a word too many": _with(words=b"\x01" * 20),
    "no bytes": _with(words=b""),
    "words": _with(words=np.zeros(4, np.uint32)),
    "an array of bytes": _with(words=np.zeros(16, np.uint8)),
    "words in a text": _with(words="0123456789abcdef"),
    "a checksum that is no number": _with(checksum="0"),
    "a negative checksum": _with(checksum=-1),
    "a large checksum": _with(checksum=2**32),
    "another checksum": _with(checksum=0),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_wrong_request_is_refused_and_changes_nothing(
    job: Job, change: Callable[[dict[str, Any]], Any], chunk: int
) -> None:
    """Whether the chunk (0) is there already or (1) not."""
    job.ask(job.piece(0, b"\x07" * 16))
    good = {**job.piece(chunk)}
    if chunk and change in (REFUSED["a whole chunk at the end"],):
        good["words"] = b"\x05" * 16
    reply = job.ask(change(good))
    assert reply.get_return_code() != ReturnCode.OK
    assert 0 < len(reply[FAULT]) < 300
    assert job.up.received("bonn") == (1, CHUNKS)
    assert all(job.up.received(site) == (0, CHUNKS) for site in SITES if site != "bonn")
    for number in range(1, CHUNKS):
        assert not fault_of(job.ask(job.piece(number)))
    assert job.taken().tobytes() == b"\x07" * 16 + b"\x02" * 16 + b"\x03" * 8


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(
    garbage=_VALUES,
    changes=st.dictionaries(
        st.sampled_from(["schema", "name", "ticket", "chunk", "checksum", "words", "more"]),
        _VALUES,
        min_size=1,
    ),
    topic=st.sampled_from([UPLOAD, DOWNLOAD]),
)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused_and_changes_nothing(
    job: Job, garbage: Any, changes: dict[str, Any], topic: str
) -> None:
    fields = {**job.piece(0), **changes}
    if fields != job.piece(0):
        assert job.ask(fields, topic=topic)[FAULT]
    assert job.ask(garbage, topic=topic)[FAULT]
    assert job.up.received("bonn") == (0, CHUNKS)


def test_a_stranger_is_refused(job: Job) -> None:
    assert "not expected" in fault_of(job.ask(job.piece(0), sender="paris"))
    assert "not expected" in fault_of(job.ask(job.piece(0), sender=""))
    request = Shareable()
    request[BODY] = job.piece(0)
    request.set_peer_props({ReservedKey.IDENTITY_NAME: ["bonn"]})
    reply = job.line.runner.dispatch(UPLOAD, request, FLContext())
    assert "not expected" in fault_of(reply)
    with pytest.raises(PeerError, match="no upload of it is expected") as raised:
        job.taken("paris")
    assert raised.value.site == "paris"


def test_a_site_cannot_write_to_the_file_of_another(job: Job) -> None:
    """FLARE believes whatever name a sender gives, so the ticket decides."""
    job.upload(numbers(), "bonn")
    forged = job.piece(0, b"\x09" * 16, "leuven")
    assert "ticket" in fault_of(job.ask(forged, sender="bonn"))
    assert "ticket" in fault_of(job.ask(forged, sender="berlin"))
    assert job.up.received("berlin") == (0, CHUNKS)
    np.testing.assert_array_equal(job.taken(), numbers())


def test_every_site_and_round_has_a_ticket_of_its_own(job: Job) -> None:
    first = dict(job.tickets)
    job.expect()
    assert len({*first.values(), *job.tickets.values()}) == 2 * len(SITES)
    assert "ticket" in fault_of(job.ask({**job.piece(0), "ticket": first["bonn"]}))


def test_sites_do_not_share_a_file(job: Job) -> None:
    for index, site in enumerate(SITES):
        job.upload(numbers(seed=index), site)
    for index, site in enumerate(SITES):
        np.testing.assert_array_equal(job.taken(site), numbers(seed=index))


# --- taking it, and what is left of it -----------------------------------------------------------


def test_an_upload_that_is_not_complete_is_not_taken(job: Job) -> None:
    for chunk in (0, 2):
        job.ask(job.piece(chunk))
    with pytest.raises(PeerError, match="its upload has 2 of 3 chunks") as raised:
        job.taken()
    assert raised.value.site == "bonn"
    assert not fault_of(job.ask(job.piece(1)))
    assert len(job.taken()) == SIZE


def test_staging_files_are_private_and_nameless(job: Job) -> None:
    job.upload(numbers())
    assert stat.S_IMODE(job.folder.stat().st_mode) == 0o700
    assert list(job.folder.iterdir()) == []
    assert job.open_files == len(SITES)


def test_a_folder_that_was_open_to_others_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir(mode=0o755)
    desk = UploadDesk(tmp_path / "staging")
    desk.expect(NAME, SIZE, SITES)
    assert stat.S_IMODE((tmp_path / "staging").stat().st_mode) == 0o700
    desk.close()


def test_a_new_round_drops_what_was_staged(job: Job) -> None:
    job.upload(numbers())
    old = job.piece(0)
    job.expect(SIZE, OTHER_NAME)
    assert job.open_files == len(SITES)
    assert "name" in fault_of(job.ask(old))
    with pytest.raises(PeerError, match="0 of 3"):
        job.taken()


def test_after_the_end_nothing_is_left_and_nothing_is_accepted(job: Job) -> None:
    job.upload(numbers())
    piece = job.piece(0)
    job.up.close()
    assert job.open_files == 0
    assert not job.folder.exists()
    assert "name" in fault_of(job.ask(piece))
    with pytest.raises(ServerError, match="it refused chunk 0 of 3: no upload of this name"):
        job.upload(numbers())
    job.up.close()


def test_the_end_leaves_the_files_of_others(job: Job) -> None:
    (job.folder / "note").touch()
    job.up.close()
    assert (job.folder / "note").exists()


def test_the_end_may_come_while_an_upload_is_read(job: Job) -> None:
    job.upload(numbers())
    read = job.up.vector("bonn")
    read(0, CHUNK)
    job.up.close()
    with pytest.raises(ServerError, match="dropped while it was read"):
        read(0, CHUNK)


def test_a_staging_file_that_changed_is_noticed(job: Job) -> None:
    job.upload(numbers())
    (file,) = (entry for entry in job.staging_files if entry.stat().st_size)
    with file.open("r+b") as other:
        other.seek(20)
        other.write(bytes(4))
    read = job.up.vector("bonn")
    read(0, CHUNK)
    for part in ((CHUNK, SIZE), (0, SIZE)):
        with pytest.raises(ServerError, match="not what was written"):
            read(*part)
    job.upload(numbers(), "leuven")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda *_: b"")
        with pytest.raises(ServerError, match="not what was written"):
            job.up.vector("leuven")(0, CHUNK)


def test_a_staging_file_that_cannot_be_read_is_a_sentence(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    job.upload(numbers())
    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(ServerError, match="Input/output error"):
        job.up.vector("bonn")(0, CHUNK)


# --- the server's disk ---------------------------------------------------------------------------


class Disk:
    """``os.pwrite`` on a disk with so much room left."""

    def __init__(self, room: int, at_once: int = 1000) -> None:
        self.room, self.at_once, self.write = room, at_once, os.pwrite

    def __call__(self, file: int, content: Any, offset: int) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part = min(len(content), self.room, self.at_once)
        self.room -= part
        return self.write(file, content[:part], offset)


def test_a_full_disk_is_a_sentence_at_the_site_and_the_server_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaint = r"cannot store the upload \(No space left on device\)"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Disk(CHUNK * 4 + 4))
        with pytest.raises(ServerError, match=complaint):
            job.upload(numbers())
        with pytest.raises(PeerError, match="has 1 of 3 chunks"):
            job.taken()
    job.upload(numbers(seed=2), "leuven")
    np.testing.assert_array_equal(job.taken("leuven"), numbers(seed=2))
    job.expect()
    job.upload(numbers(seed=3), "bonn")
    np.testing.assert_array_equal(job.taken("bonn"), numbers(seed=3))


def test_a_chunk_that_was_half_overwritten_is_missing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.ask(job.piece(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", Disk(8))
        assert "No space left" in fault_of(job.ask(job.piece(0, b"\x09" * 16)))
    assert job.up.received("bonn") == (0, CHUNKS)
    job.upload(numbers())
    np.testing.assert_array_equal(job.taken(), numbers())


def test_a_disk_may_take_a_chunk_in_parts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", Disk(1000, at_once=3))
    job.upload(numbers())
    np.testing.assert_array_equal(job.taken(), numbers())


def test_a_disk_that_takes_no_files_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, made, real = Job(tmp_path / "staging"), [0], transfer._nameless_file

    def full(folder: Path) -> int:
        made[0] += 1
        if made[0] > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(folder)

    monkeypatch.setattr(transfer, "_nameless_file", full)
    with pytest.raises(ServerError, match="No space left on device"):
        job.expect()
    assert job.open_files == 0
    (tmp_path / "file").touch()
    with pytest.raises(ServerError, match="staging file"):
        UploadDesk(tmp_path / "file").expect(NAME, SIZE, SITES)


# --- a line on a bad day -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", range(CHUNKS))
def test_an_upload_survives_whatever_happens_to_one_message(
    job: Job, way: Mischief, at: int
) -> None:
    job.line.mischief = in_turn(*[Line.deliver] * at, way)
    job.upload(numbers())
    np.testing.assert_array_equal(job.taken(), numbers())


@given(ways=st.lists(st.sampled_from(WAYS), max_size=24), seed=st.integers(0, 99))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_transfers_survive_many_mishaps(job: Job, ways: list[Mischief], seed: int) -> None:
    if sum(way is damage for way in ways) >= transfer.MOST_DAMAGED:
        ways = [way for way in ways if way is not damage]
    job.expect(25)
    job.line.mischief = in_turn(*ways)
    sent = numbers(25, seed)
    job.upload(sent)
    np.testing.assert_array_equal(job.taken(), sent)
    job.line.mischief = in_turn(*ways)
    job.down.offer(NAME, sent, SITES)
    into = np.zeros(25, np.uint32)
    job.download(into)
    np.testing.assert_array_equal(into, sent)


def test_a_message_that_comes_after_its_repetition_changes_nothing(job: Job) -> None:
    job.line.mischief = in_turn(come_late, Line.deliver, let_the_late_come)
    job.upload(numbers())
    assert not job.line.late
    np.testing.assert_array_equal(job.taken(), numbers())


def test_what_arrives_damaged_is_sent_again_a_few_times(job: Job) -> None:
    job.line.mischief = in_turn(*[damage] * (transfer.MOST_DAMAGED - 1))
    job.expect(CHUNK)
    job.upload(numbers(CHUNK))
    assert len(job.line.carried) == transfer.MOST_DAMAGED
    np.testing.assert_array_equal(job.taken(), numbers(CHUNK))


@pytest.mark.parametrize("way_up", [True, False])
def test_what_always_arrives_damaged_is_given_up(job: Job, way_up: bool) -> None:
    job.line.mischief = damage
    job.down.offer(NAME, numbers(), SITES)
    into = np.zeros(SIZE, np.uint32)
    with pytest.raises(ServerError, match="arrived damaged 5 times"):
        job.upload(numbers()) if way_up else job.download(into)
    assert len(job.line.carried) <= transfer.MOST_DAMAGED * transfer.MOST_UNDER_WAY
    assert job.up.received("bonn") == (0, CHUNKS)
    assert not into.any()


def test_pauses_grow_up_to_a_limit(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(transfer, "LONGEST_PAUSE_SECONDS", 0.1)
    times: list[float] = []

    def note(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
        times.append(time.monotonic())
        return None if len(times) < 14 else line.deliver(topic, request, sender)

    job.line.mischief = note
    job.expect(CHUNK)
    job.upload(numbers(CHUNK), limit_seconds=20)  # without a limit they are 160 seconds
    assert (np.diff(times) >= [0.02, 0.04, 0.08, *[0.1] * 10]).all()


@pytest.mark.parametrize("way", [lose, time_out, fail])
def test_the_limit_ends_an_upload_that_does_not_get_through(job: Job, way: Mischief) -> None:
    job.line.mischief = in_turn(Line.deliver, *[way] * 100_000)
    began = time.monotonic()
    with pytest.raises(SiteError) as raised:
        job.upload(numbers(), limit_seconds=0.3)
    assert 0.3 <= time.monotonic() - began < 3
    said = str(raised.value)
    assert "took longer than 0 seconds; 1 of 3 chunks were through (last: " in said
    assert ("TIMEOUT" if way is time_out else "no answer") in said


class Hold:
    """Holds on to all messages after the first ones, until it is told to let go."""

    def __init__(self, line: Line, free: int) -> None:
        self._free, self._lock = free, threading.Lock()
        self.held, self.let_go, self.gone = (threading.Event() for _ in range(3))
        line.mischief = self

    def __call__(self, line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
        with self._lock:
            self._free -= 1
            hold = self._free < 0
        if hold:
            self.held.set()
            assert self.let_go.wait(30)
        reply = line.deliver(topic, request, sender)
        if hold:
            self.gone.set()
        return reply


def test_the_limit_holds_while_flare_holds_on_to_a_message(job: Job) -> None:
    hold = Hold(job.line, 1)
    with pytest.raises(SiteError, match="1 of 3 chunks were through"):
        job.upload(numbers(), limit_seconds=0.3)
    hold.let_go.set()


@pytest.mark.parametrize("way_up", [True, False])
def test_a_stop_is_heard_while_flare_holds_on_to_a_message(job: Job, way_up: bool) -> None:
    hold = Hold(job.line, 2)
    job.down.offer(NAME, numbers(), SITES)
    into = np.zeros(SIZE, np.uint32)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            job.upload(numbers()) if way_up else job.download(into)
        except SiteError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert hold.held.wait(10)
    while len(job.progress) < 2:
        time.sleep(0.001)
    job.stopped, began = True, time.monotonic()
    thread.join(10)
    assert time.monotonic() - began < 2
    assert "was stopped; 2 of 3 chunks were through" in str(raised[0])
    left_behind = [one for one in threading.enumerate() if one.name == "transfer"]
    assert left_behind
    assert all(one.daemon for one in left_behind)  # they do not keep the process from ending
    written = into.copy()
    hold.let_go.set()
    assert hold.gone.wait(10)
    time.sleep(0.05)
    np.testing.assert_array_equal(into, written)
    assert (into[2 * CHUNK :] == 0).all()


def test_a_stop_before_the_start_sends_nothing(job: Job) -> None:
    job.stopped = True
    with pytest.raises(SiteError, match="0 of 3"):
        job.upload(numbers())
    assert job.line.carried == []


@pytest.mark.parametrize("code", sorted(transfer._FINAL_CODES))
def test_what_flare_itself_refuses_is_not_sent_again(job: Job, code: str) -> None:
    job.line.mischief = lambda *_: make_reply(code)
    with pytest.raises(ServerError, match=f"it refused chunk . of 3: FLARE return code {code}"):
        job.upload(numbers())
    assert len(job.line.carried) <= transfer.MOST_UNDER_WAY


def test_a_server_without_desks_is_noticed_at_once(job: Job) -> None:
    job.line.runner = AuxRunner(None)
    with pytest.raises(ServerError, match="TOPIC_UNKNOWN"):
        job.upload(numbers())
    with pytest.raises(ServerError, match="TOPIC_UNKNOWN"):
        job.download(numbers())


def test_an_error_in_the_desk_is_noticed_at_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.up, "_store", lambda *_: 1 // 0)
    with pytest.raises(ServerError, match="HANDLER_EXCEPTION"):
        job.upload(numbers())


# --- how much is under way -----------------------------------------------------------------------


def test_over_a_quick_line_two_chunks_are_under_way(job: Job) -> None:
    job.expect(100)
    job.line.mischief = delay
    job.upload(numbers(100))
    assert job.line.crowd == transfer.MOST_UNDER_WAY == 2


def test_over_a_slow_line_one_chunk_is_under_way(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "QUICK_SECONDS", 0.0)
    job.expect(100)
    job.line.mischief = delay
    job.upload(numbers(100))
    assert job.line.crowd == 1


def test_a_line_that_becomes_slow_has_one_chunk_under_way_again(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.expect(400)
    job.line.mischief = delay

    def slow(done: int, total: int) -> None:
        if done == 20:
            monkeypatch.setattr(transfer, "QUICK_SECONDS", 0.0)
            monkeypatch.setattr(transfer, "SLOW_SECONDS", 0.005)
        if done == 25:
            assert job.line.crowd == 2
            job.line.crowd = 0

    job.upload(numbers(400), progress=slow)
    assert job.line.crowd == 1


def test_after_a_loss_one_chunk_is_under_way(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.expect(400)
    job.line.mischief = in_turn(*[delay] * 20, lose, *[delay] * 1000)

    def slow(done: int, total: int) -> None:
        if done == 10:
            monkeypatch.setattr(transfer, "QUICK_SECONDS", 0.0)
        if done == 30:
            assert job.line.crowd == 2
            job.line.crowd = 0

    job.upload(numbers(400), progress=slow)
    assert job.line.crowd == 1


# --- a download ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 5, 41])
@pytest.mark.parametrize("kind", [np.uint32, np.float32])
def test_a_download_arrives_as_it_was(job: Job, size: int, kind: type) -> None:
    sent = numbers(size).view(kind)
    job.down.offer(NAME, sent, SITES)
    into = np.zeros(size, kind)
    job.download(into)
    assert into.tobytes() == sent.tobytes()
    assert job.progress == [(n + 1, chunk_count(size)) for n in range(chunk_count(size))]


def test_what_is_offered_is_not_copied(job: Job) -> None:
    sent = numbers()
    job.down.offer(NAME, sent, SITES)
    sent[-1] ^= 1
    into = np.zeros(sent.size, np.uint32)
    job.download(into)
    assert np.array_equal(into, sent)


@pytest.mark.parametrize("kind", [np.uint32, np.float32])
def test_what_is_offered_from_disk_needs_no_memory(job: Job, tmp_path: Path, kind: type) -> None:
    sent = numbers().view(kind)
    before = sent.copy()
    job.down.offer_from_disk(NAME, sent, SITES, tmp_path / "offered")
    sent[...] = 0
    into = np.zeros(sent.size, kind)
    job.download(into)
    assert into.tobytes() == before.tobytes()
    assert not list((tmp_path / "offered").iterdir())


def test_what_was_offered_from_disk_is_closed_with_the_offer(job: Job, tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    before = open_files()
    for _ in range(3):
        job.down.offer_from_disk(NAME, numbers(), SITES, tmp_path)
    assert open_files() == before + 1
    job.down.withdraw()
    assert open_files() == before
    with pytest.raises(ServerError, match="nothing of this name is offered"):
        job.download(numbers())


def test_an_offer_that_finds_no_room_on_disk_is_a_sentence(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ServerError, match=r"cannot store the sum \(No space left on device\)"):
        job.down.offer_from_disk(NAME, numbers(), SITES, tmp_path)


def test_the_last_offer_ends_with_the_next(job: Job) -> None:
    job.down.offer(OTHER_NAME, numbers(), SITES)
    job.down.offer(NAME, numbers(), SITES)
    with pytest.raises(ServerError, match="nothing of this name is offered"):
        job.download(numbers(), name=OTHER_NAME)


def test_what_is_withdrawn_is_gone(job: Job) -> None:
    job.down.offer(NAME, numbers(), SITES)
    job.down.withdraw()
    with pytest.raises(ServerError, match="nothing of this name is offered"):
        job.download(numbers())


def test_nothing_is_offered_to_a_stranger(job: Job) -> None:
    job.down.offer(NAME, numbers(), SITES)
    with pytest.raises(ServerError, match="nothing is offered to this site"):
        job.download(numbers(), site="paris")


@pytest.mark.parametrize(
    "change",
    [
        _without("chunk"),
        _without("name"),
        _with(chunk=CHUNKS),
        _with(chunk=-1),
        _with(chunk=True),
        _with(chunk=0.5),
        _with(name=OTHER_NAME),
        _with(name="../"),
        _with(more=1),
        _with(schema="fedgestalt.upload/1"),
    ],
)
def test_a_wrong_question_is_refused(
    job: Job, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    job.down.offer(NAME, numbers(), SITES)
    good = Wanted(NAME, 0).to_fields()
    assert not fault_of(job.ask(good, topic=DOWNLOAD))
    refused = job.ask(change(good), topic=DOWNLOAD)
    assert fault_of(refused)
    assert BODY not in refused


@pytest.mark.parametrize(
    "into",
    [
        np.zeros(SIZE + 1, np.uint32),
        np.zeros(SIZE - 1, np.uint32),
        np.zeros(SIZE, np.uint16),
        np.zeros(SIZE, np.float64),
        np.zeros(SIZE, ">u4"),
        np.zeros((SIZE, 1), np.uint32),
        np.zeros(2 * SIZE, np.uint32)[::2],
    ],
)
def test_a_download_needs_a_place_of_its_size(job: Job, into: Any) -> None:
    job.down.offer(NAME, numbers(), SITES)
    with pytest.raises(ValueError, match=r"fit|contiguous"):
        job.download(into, size=SIZE)
    assert job.line.carried == []


def _slice(chunk: int = 0, length: int = 16, **changes: Any) -> Shareable:
    content = b"\x01" * length
    fields = Slice(chunk, zlib.crc32(content), content).to_fields()
    reply = to_shareable(Slice(0, 0, b""))
    reply[BODY] = {**fields, **changes}
    return reply


@pytest.mark.parametrize(
    "reply",
    [
        make_reply(ReturnCode.OK),
        _slice(1),
        _slice(0, 8),
        _slice(0, 20),
        _slice(more=1),
        _slice(checksum=None),
        _slice(words=np.ones(4, np.uint32)),
        _slice(schema="other"),
    ],
)
def test_a_server_that_sends_something_else_is_not_believed(job: Job, reply: Shareable) -> None:
    job.line.mischief = lambda *_: through_fobs(reply)
    into = np.zeros(CHUNK, np.uint32)
    with pytest.raises(ServerError, match="server: "):
        job.download(into)
    assert not into.any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", range(CHUNKS))
def test_a_download_survives_whatever_happens_to_one_message(
    job: Job, way: Mischief, at: int
) -> None:
    job.down.offer(NAME, numbers(), SITES)
    job.line.mischief = in_turn(*[Line.deliver] * at, way)
    into = np.zeros(SIZE, np.uint32)
    job.download(into)
    np.testing.assert_array_equal(into, numbers())


# --- many at once --------------------------------------------------------------------------------


def test_many_sites_up_and_down_at_once_on_a_bad_day(tmp_path: Path) -> None:
    sites = [f"site-{number}" for number in range(6)]
    size, job, dice = 203, Job(tmp_path / "staging"), random.Random(5)  # noqa: S311
    tickets, model = job.up.expect(NAME, size, sites), numbers(size, 99)
    job.down.offer(NAME, model, sites)
    ways = [way for way in WAYS if way is not damage]

    def at_random(line: Line, topic: str, request: Shareable, sender: str) -> Shareable | None:
        return dice.choice([*ways, *[Line.deliver] * 10])(line, topic, request, sender)

    job.line.mischief = at_random
    failures: list[BaseException] = []

    def run(index: int, site: str) -> None:
        into = np.zeros(size, np.uint32)
        try:
            job.download(into, site)
            np.testing.assert_array_equal(into, model)
            job.upload(numbers(size, index), site, ticket=tickets[site])
            np.testing.assert_array_equal(job.taken(site, size), numbers(size, index))
        except BaseException as error:  # noqa: BLE001  shown below
            failures.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(sites)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert job.open_files == len(sites)
    job.up.close()


def test_nothing_is_logged_but_sizes(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    sent = np.full(SIZE, 0x41424344, np.uint32)
    job.down.offer(NAME, sent, SITES)
    job.line.mischief = in_turn(fail, damage, lose)
    with caplog.at_level(logging.DEBUG, logger=transfer.__name__):
        job.upload(sent)
        job.download(sent.copy())
    said = " ".join(caplog.messages)
    assert "its upload: 40 bytes in " in said
    assert "3 chunks sent again" in said
    assert "its download: 40 bytes in " in said
    for secret in (NAME, job.tickets["bonn"], "DCBA", "ABCD", str(0x41424344)):
        assert secret not in said


def test_a_refusal_carries_a_sentence_and_nothing_else(job: Job) -> None:
    refused = job.ask({**job.piece(0), "chunk": 99})
    assert set(refused) - {FAULT} == {"__headers__"}
    assert body(refused) is None
