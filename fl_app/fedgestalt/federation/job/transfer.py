"""Long vectors between a site's job process and the server's, in chunks of 2 MiB.

A site uploads into a staging file on the server's disk; the server offers a vector that the sites
fetch by slices. Neither grows the server's memory by a vector for each site.

FLARE passes each chunk through its streams, so the small windows of our kits hold for it. Over a
line that is not slow a second chunk is under way, so that none waits for the other's answer.

FLARE does not vouch for the sender of such a message: a site's job process may put any name into
it. Tasks do reach the right site. So each site gets a ticket with its task, and only who shows it
can write to that site's staging file. What is offered is the same for all sites; a stranger would
have to know its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import hmac
import logging
import os
import queue
import re
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellCode

from fedgestalt.errors import FedgestaltError, PeerError, ServerError, SiteError
from fedgestalt.federation.job.wire import FAULT, body, fault_of, fault_reply, to_shareable
from fedgestalt.messages import Message, hexadecimal, integer

log = logging.getLogger(__name__)

Words = NDArray[np.uint32]
Vector = NDArray[np.uint32] | NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with the number of chunks that are through, and of all."""

UPLOAD: Final = "fgm.upload"
DOWNLOAD: Final = "fgm.download"

CHUNK_WORDS: Final = 2**19
WORD_BYTES: Final = 4
CHUNK_BYTES: Final = CHUNK_WORDS * WORD_BYTES
"""Of larger ones FLARE holds more in the server's memory, several times each. For every answer it
keeps a thread at the site for minutes: smaller ones would mean more of them."""

MOST_UNDER_WAY: Final = 2
QUICK_SECONDS: Final = 1.2
SLOW_SECONDS: Final = 3.0
"""A chunk that is back within the first lets a second be under way, one that takes longer than the
second does not. A window of each waits for the line, and so does the answer to "are you alive?"."""

PATIENCE_SECONDS: Final = 20.0
"""How long FLARE may make no progress with one chunk before we send it again."""
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 15.0
MOST_DAMAGED: Final = 5
"""How often one chunk may arrive damaged."""

_POLL_SECONDS: Final = 0.25
_TICKET_BYTES: Final = 16
_NAME_LIMIT: Final = 128
_IS_NAME = re.compile(rf"[0-9a-f]{{1,{_NAME_LIMIT}}}").fullmatch
_AGAIN: Final = "fedgestalt.again"
_SERVER: Final = "server"
_CRC_LIMIT: Final = 2**32 - 1
_CHUNK_LIMIT: Final = 2**32
_REMEDY: Final = "server and sites must run the same version"
_FINAL_CODES: Final = frozenset(
    {
        CellCode.ABORT_RUN,
        CellCode.INVALID_SESSION,
        CellCode.UNAUTHENTICATED,
        ReturnCode.BAD_PEER_CONTEXT,
        ReturnCode.BAD_REQUEST_DATA,
        ReturnCode.HANDLER_EXCEPTION,
        ReturnCode.MISSING_PEER_CONTEXT,
        ReturnCode.TOPIC_UNKNOWN,
    }
)
"""FLARE's own refusals; it would give them again."""


def _name() -> Any:
    """Declare a field with a transfer's name: lower-case hexadecimal digits."""

    def check(value: object) -> str:
        if isinstance(value, str) and _IS_NAME(value):
            return ""
        return f"is not 1 to {_NAME_LIMIT} hexadecimal digits"

    return dataclasses.field(metadata={"check": check})


def _words() -> Any:
    """Declare a field with a chunk's bytes; how many is checked where the vector is known."""

    def check(value: object) -> str:
        return "" if isinstance(value, bytes) else f"is {type(value).__name__}, not bytes"

    return dataclasses.field(metadata={"check": check})


@dataclass(frozen=True)
class Piece(Message):
    """Site to server: one chunk of an upload."""

    schema: ClassVar[str] = "fedgestalt.upload/1"
    name: str = _name()
    ticket: str = hexadecimal(2 * _TICKET_BYTES)
    chunk: int = integer(0, _CHUNK_LIMIT)
    checksum: int = integer(0, _CRC_LIMIT)
    words: bytes = _words()


@dataclass(frozen=True)
class Wanted(Message):
    """Site to server: which chunk of what is offered it wants."""

    schema: ClassVar[str] = "fedgestalt.download/1"
    name: str = _name()
    chunk: int = integer(0, _CHUNK_LIMIT)


@dataclass(frozen=True)
class Slice(Message):
    """Server to site: the chunk that it wanted."""

    schema: ClassVar[str] = "fedgestalt.slice/1"
    chunk: int = integer(0, _CHUNK_LIMIT)
    checksum: int = integer(0, _CRC_LIMIT)
    words: bytes = _words()


class _DamagedError(Exception):
    """A chunk does not have its checksum; the next try may be better."""


def chunk_count(size: int) -> int:
    """How many chunks a vector of ``size`` words has."""
    return -(-size // CHUNK_WORDS)


# --- the server's side ---------------------------------------------------------------------------


class UploadDesk:
    """Takes the uploads of one job's sites; any thread may call it.

    The staging files have no names: nothing is left of them when the process ends, however it ends.

    Args:
        folder: where they are; made if need be, and removed by :meth:`close` if it is empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name, self._staged = "", dict[str, _Staging]()
        self._lock = threading.Lock()

    def register(self, engine: Any) -> None:
        """Answer the sites from now on."""
        engine.register_aux_message_handler(UPLOAD, self._on_piece)

    def expect(self, name: str, size: int, sites: Collection[str]) -> dict[str, str]:
        """Begin a round of uploads; data of the round before are dropped.

        Args:
            name: of the round, the same for all sites; 1 to 128 lower-case hexadecimal digits.
            size: of every site's vector, in words of 4 bytes.
            sites: who may upload.

        Returns:
            A secret for each site, which must come to that site alone, with its task.

        Raises:
            ServerError: the staging files cannot be made.
        """
        _check_offer(name, size)
        self._drop("", {})
        tickets = {site: secrets.token_hex(_TICKET_BYTES) for site in sites}
        staged = dict[str, _Staging]()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            for site in sites:
                staged[site] = _Staging(_nameless_file(self._folder), size, tickets[site])
        except OSError as error:
            for staging in staged.values():
                staging.close()
            raise ServerError(
                f"no staging file can be made ({error.strerror})", where="server"
            ) from None
        self._drop(name, staged)
        return tickets

    def received(self, site: str) -> tuple[int, int]:
        """How many chunks of a site's upload are there, and how many it has."""
        with self._lock:
            staging = self._staged.get(site)
        return staging.received if staging else (0, 0)

    def vector(self, site: str) -> Callable[[int, int], Words]:
        """A site's upload, complete: gives its words from the first number to before the second.

        Any thread may call what is returned, until the next round or :meth:`close`. It raises
        ServerError if what is read is not what was written.

        Raises:
            PeerError: the upload is not complete.
        """
        with self._lock:
            staging = self._staged.get(site)
        if staging is None:
            raise PeerError("no upload of it is expected", site=site)
        have, all_ = staging.received
        if have < all_:
            raise PeerError(
                f"its upload has {have} of {all_} chunks", site=site, remedy="look at its log"
            )
        return staging.read

    def close(self) -> None:
        """Remove everything; every later request is refused."""
        self._drop("", {})
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _drop(self, name: str, staged: dict[str, _Staging]) -> None:
        with self._lock:
            old, self._staged, self._name = self._staged, staged, name
        for staging in old.values():
            staging.close()

    def _on_piece(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        try:
            self._store(_sender(fl_ctx), Piece.from_fields(body(request), _refusal))
        except _DamagedError as error:
            return _again(str(error))
        except FedgestaltError as error:
            return fault_reply(error)
        return make_reply(ReturnCode.OK)

    def _store(self, sender: str, piece: Piece) -> None:
        with self._lock:
            name, staging = self._name, self._staged.get(sender)
        if not name or piece.name != name:
            raise _refusal("no upload of this name is expected")
        if staging is None:
            raise _refusal("this site's upload is not expected")
        staging.write(piece)


class _Staging:
    """One site's upload; its file is closed, and thereby gone, after :meth:`close`."""

    def __init__(self, file: int, size: int, ticket: str) -> None:
        self._file: int | None = file
        self._size, self._ticket = size, ticket
        self._sums: list[int | None] = [None] * chunk_count(size)
        self._have = 0
        self._lock = threading.Lock()

    @property
    def received(self) -> tuple[int, int]:
        with self._lock:
            return self._have, len(self._sums)

    def write(self, piece: Piece) -> None:
        if not hmac.compare_digest(piece.ticket, self._ticket):
            raise _refusal("the ticket is not this site's")
        _check_chunk(piece.chunk, len(piece.words), self._size)
        if zlib.crc32(piece.words) != piece.checksum:
            raise _DamagedError(f"chunk {piece.chunk} arrived damaged")
        with self._lock:
            known = self._sums[piece.chunk]
            if self._have == len(self._sums) or self._file is None:
                if known != piece.checksum:
                    raise _refusal("the upload is over and does not change any more")
                return  # its answer was lost
            try:
                _write_all(self._file, piece.words, piece.chunk * CHUNK_BYTES)
            except OSError as error:
                if known is not None:  # half of it may have been overwritten
                    self._sums[piece.chunk] = None
                    self._have -= 1
                raise ServerError(
                    f"the server cannot store the upload ({error.strerror})",
                    remedy="free disk space there",
                ) from None
            self._sums[piece.chunk] = piece.checksum
            self._have += known is None

    def read(self, first: int, end: int) -> Words:
        """Words ``first`` to before ``end``, of whole chunks that are checked."""
        chunks = range(first // CHUNK_WORDS, chunk_count(end))
        words = [self._checked(chunk) for chunk in chunks]
        start = first - chunks.start * CHUNK_WORDS
        return (words[0] if len(words) == 1 else np.concatenate(words))[start : start + end - first]

    def _checked(self, chunk: int) -> Words:
        low, high = _bounds(chunk, self._size)
        content = self._read(low * WORD_BYTES, (high - low) * WORD_BYTES)
        if zlib.crc32(content) != self._sums[chunk]:
            raise ServerError("a staging file is not what was written to it", where="server")
        return np.frombuffer(content, np.uint32)

    def _read(self, offset: int, count: int) -> bytes:
        with self._lock:  # the number of a file that was closed may be another file's by now
            if self._file is None:
                raise ServerError("the upload was dropped while it was read", where="server")
            try:
                return os.pread(self._file, count, offset)
            except OSError as error:
                raise ServerError(
                    f"a staging file cannot be read ({error.strerror})", where="server"
                ) from None

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            os.close(file)


class DownloadDesk:
    """Offers one vector at a time to one job's sites; any thread may call it."""

    def __init__(self) -> None:
        self._offer: _Offer | None = None

    def register(self, engine: Any) -> None:
        """Answer the sites from now on."""
        engine.register_aux_message_handler(DOWNLOAD, self._on_wanted)

    def offer(self, name: str, vector: Vector, sites: Collection[str]) -> None:
        """Offer ``vector``, which must not change until :meth:`withdraw`; the last offer ends.

        Args:
            name: of the offer; 1 to 128 lower-case hexadecimal digits.
            vector: one axis, contiguous, of 4-byte values; it is not copied.
            sites: who may fetch it.
        """
        _check_offer(name, vector.size)
        words = _as_words(vector)
        self._replace(_Offer(name, words.size, frozenset(sites), _InMemory(words)))

    def offer_from_disk(
        self, name: str, vector: Vector, sites: Collection[str], folder: Path
    ) -> None:
        """As :meth:`offer`, from a file without a name: the memory of ``vector`` may go.

        Args:
            name, vector, sites: see :meth:`offer`.
            folder: where the file is; made if need be.

        Raises:
            ServerError: the file cannot be written.
        """
        _check_offer(name, vector.size)
        words = _as_words(vector)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = _OnDisk(_nameless_file(folder))
            try:
                _write_all(file.descriptor, words.data.cast("B"), 0)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise ServerError(
                f"the server cannot store the sum ({error.strerror})",
                where="server",
                remedy="free disk space there",
            ) from None
        self._replace(_Offer(name, words.size, frozenset(sites), file))

    def withdraw(self) -> None:
        """End the offer; every later request is refused."""
        self._replace(None)

    def _replace(self, offer: _Offer | None) -> None:
        old, self._offer = self._offer, offer
        if old is not None:
            old.source.close()

    def _on_wanted(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:  # noqa: ARG002
        try:
            wanted = Wanted.from_fields(body(request), _refusal)
            offer = self._offer
            if offer is None or wanted.name != offer.name:
                raise _refusal("nothing of this name is offered")
            if _sender(fl_ctx) not in offer.sites:
                raise _refusal("nothing is offered to this site")
            _check_chunk(wanted.chunk, None, offer.size)
            content = offer.source.read(*_bounds(wanted.chunk, offer.size))
        except FedgestaltError as error:
            return fault_reply(error)
        return to_shareable(Slice(wanted.chunk, zlib.crc32(content), content))


class _InMemory:
    """What is offered, as it lies in the server's memory."""

    def __init__(self, words: Words) -> None:
        self.words = words

    def read(self, first: int, last: int) -> bytes:
        return self.words[first:last].tobytes()

    def close(self) -> None:
        pass


class _OnDisk:
    """What is offered, in a file that is gone after :meth:`close`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._open, self._lock = True, threading.Lock()

    def read(self, first: int, last: int) -> bytes:
        count = (last - first) * WORD_BYTES
        with self._lock:  # the number of a file that was closed may be another file's by now
            if not self._open:
                raise _refusal("nothing of this name is offered")
            try:
                content = os.pread(self.descriptor, count, first * WORD_BYTES)
            except OSError as error:
                raise _refusal(f"what is offered cannot be read ({error.strerror})") from None
        if len(content) != count:
            raise _refusal("what is offered was cut short")
        return content

    def close(self) -> None:
        with self._lock:
            if self._open:
                os.close(self.descriptor)
            self._open = False


@dataclass(frozen=True)
class _Offer:
    name: str
    size: int
    sites: frozenset[str]
    source: _InMemory | _OnDisk


def _sender(fl_ctx: FLContext) -> str:
    """Who FLARE says has sent a message; empty if it does not."""
    peer = fl_ctx.get_peer_context()
    name = peer.get_identity_name() if peer else None
    return name if isinstance(name, str) else ""


def _refusal(what: str) -> FedgestaltError:
    return ServerError(what)


def _again(what: str) -> Shareable:
    reply = fault_reply(ServerError(what))
    reply[_AGAIN] = True
    return reply


def _check_offer(name: str, size: int) -> None:
    if not _IS_NAME(name) or not 0 < size <= _CHUNK_LIMIT * CHUNK_WORDS:
        raise ValueError(f"no transfer can be called {name!r} and have {size} words")


def _check_chunk(chunk: int, length: int | None, size: int) -> None:
    """Raise if a vector of ``size`` words has no such chunk, or not with ``length`` bytes."""
    if chunk >= chunk_count(size):
        raise _refusal(f"chunk {chunk} is beyond the {chunk_count(size)} of the vector")
    first, last = _bounds(chunk, size)
    if length is not None and length != (last - first) * WORD_BYTES:
        raise _refusal(f"chunk {chunk} has {length} bytes, not {(last - first) * WORD_BYTES}")


def _bounds(chunk: int, size: int) -> tuple[int, int]:
    """Words of a chunk: the first, and the first of the next."""
    return chunk * CHUNK_WORDS, min(size, (chunk + 1) * CHUNK_WORDS)


def _as_words(vector: Vector) -> Words:
    """The same memory as words."""
    native = vector.dtype in (np.dtype(np.uint32), np.dtype(np.float32))
    if not native or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise ValueError("a transfer takes contiguous vectors of uint32 or float32")
    return vector.view(np.uint32)


def _nameless_file(folder: Path) -> int:
    """Descriptor of a new file whose name is already gone; private to this process."""
    path = folder / f"{secrets.token_hex(16)}.staged"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
    except BaseException:
        os.close(file)
        raise
    return file


def _write_all(file: int, content: bytes | memoryview, offset: int) -> None:
    """Write everything, or raise OSError; a disk that is nearly full takes a part first."""
    left = memoryview(content)
    while left:
        written = os.pwrite(file, left, offset)
        left, offset = left[written:], offset + written


# --- a site's side -------------------------------------------------------------------------------


def upload(
    engine: Any,
    fl_ctx: FLContext,
    name: str,
    pieces: Iterable[Words],
    size: int,
    *,
    ticket: str,
    limit_seconds: float,
    should_stop: Callable[[], bool],
    progress: Progress,
) -> None:
    """Upload a vector; when this returns, the server has all of it.

    Args:
        engine: FLARE's.
        fl_ctx: FLARE's.
        name: see :meth:`UploadDesk.expect`.
        pieces: the vector in order, in arrays of any length; read as the transfer goes on.
        size: of the vector, in words.
        ticket: this site's, from :meth:`UploadDesk.expect`.
        limit_seconds: for the whole of it.
        should_stop: asked several times a second.
        progress: see :data:`Progress`.

    Raises:
        SiteError: it was not through in time, or was stopped.
        ServerError: the server refused it.
    """
    _check_offer(name, size)

    def requests() -> Iterator[tuple[int, Message]]:
        for chunk, content in enumerate(_cut(pieces, size)):
            yield chunk, Piece(name, ticket, chunk, zlib.crc32(content), content)

    def on_reply(chunk: int, fields: object) -> None:
        pass

    courier = _Courier(engine, fl_ctx, UPLOAD, "its upload", limit_seconds, should_stop)
    courier.carry(requests(), chunk_count(size), on_reply, progress)
    courier.report(size)


def download(
    engine: Any,
    fl_ctx: FLContext,
    name: str,
    size: int,
    into: Vector,
    *,
    limit_seconds: float,
    should_stop: Callable[[], bool],
    progress: Progress,
) -> None:
    """Fetch a vector that the server offers.

    Args:
        engine: FLARE's.
        fl_ctx: FLARE's.
        name: see :meth:`DownloadDesk.offer`.
        size: of the vector, in words.
        into: where it goes: one axis of ``size`` 4-byte values, contiguous. Whatever went wrong,
            nothing is written to it after the call.
        limit_seconds: for the whole of it.
        should_stop: asked several times a second.
        progress: see :data:`Progress`.

    Raises:
        SiteError: it was not through in time, or was stopped.
        ServerError: the server refused it, or sent something else.
    """
    _check_offer(name, size)
    words = _as_words(into)
    if len(words) != size:
        raise ValueError(f"{size} words do not fit into {len(words)}")

    def on_reply(chunk: int, fields: object) -> None:
        piece = Slice.from_fields(fields, _from_server)
        first, last = _bounds(chunk, size)
        if piece.chunk != chunk or len(piece.words) != (last - first) * WORD_BYTES:
            raise _from_server(
                f"it sent {len(piece.words)} bytes of chunk {piece.chunk} for chunk {chunk}"
            )
        if zlib.crc32(piece.words) != piece.checksum:
            raise _DamagedError(f"chunk {chunk} arrived damaged")
        words[first:last] = np.frombuffer(piece.words, np.uint32)

    requests = ((chunk, Wanted(name, chunk)) for chunk in range(chunk_count(size)))
    courier = _Courier(engine, fl_ctx, DOWNLOAD, "its download", limit_seconds, should_stop)
    courier.carry(requests, chunk_count(size), on_reply, progress)
    courier.report(size)


def _from_server(what: str) -> FedgestaltError:
    return ServerError(what, where="server", remedy=_REMEDY)


def _cut(pieces: Iterable[Words], size: int) -> Iterator[bytes]:
    """The content of each chunk.

    Raises:
        ValueError: the pieces are no words, or not ``size`` of them.
    """
    buffer, filled, taken = np.empty(min(CHUNK_WORDS, size), np.uint32), 0, 0
    for piece in pieces:
        if piece.dtype != np.uint32 or piece.ndim != 1:
            raise ValueError("an upload takes vectors of uint32")
        if taken + len(piece) > size:
            raise ValueError(f"an upload of {size} words has more")
        taken += len(piece)
        rest = piece
        while len(rest):
            part, rest = rest[: len(buffer) - filled], rest[len(buffer) - filled :]
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            if filled == len(buffer):
                yield buffer.tobytes()
                filled = 0
    if taken < size:
        raise ValueError(f"an upload of {size} words has only {taken}")
    if filled:
        yield buffer[:filled].tobytes()


@dataclass
class _Letter:
    """A request that has no good answer yet."""

    message: Message
    failures: int = 0
    damages: int = 0


class _Courier:
    """Sends numbered requests to the server until each has a good answer.

    Everything but the waiting for FLARE happens in the caller's thread: what a thread that was left
    behind still gets is not looked at.
    """

    def __init__(
        self,
        engine: Any,
        fl_ctx: FLContext,
        topic: str,
        what: str,
        limit_seconds: float,
        should_stop: Callable[[], bool],
    ) -> None:
        self._engine, self._fl_ctx, self._topic, self._what = engine, fl_ctx, topic, what
        self._limit, self._should_stop = limit_seconds, should_stop
        self._began = time.monotonic()
        self._answers: queue.SimpleQueue[tuple[int, float, Shareable | None]] = queue.SimpleQueue()
        self._letters: dict[int, _Letter] = {}
        self._due: list[tuple[float, int]] = []
        self._under_way, self._allowed = 0, 1
        self._done = self._total = self._repeats = 0
        self._last_fault = ""

    def carry(
        self,
        requests: Iterator[tuple[int, Message]],
        total: int,
        on_reply: Callable[[int, object], None],
        progress: Progress,
    ) -> None:
        """Send all ``total`` requests.

        Args:
            requests: with their numbers; read as the transfer goes on.
            total: how many they are.
            on_reply: called with the number and the unchecked fields of the answer.
            progress: see :data:`Progress`.
        """
        self._total, more = total, True
        while more or self._letters:
            self._check_limits()
            while self._under_way < self._allowed:
                if self._due and self._due[0][0] <= time.monotonic():
                    self._send(heapq.heappop(self._due)[1])
                elif more and len(self._letters) < MOST_UNDER_WAY:
                    number, message = next(requests, (-1, None))
                    if message is None:
                        more = False
                    else:
                        self._letters[number] = _Letter(message)
                        self._send(number)
                else:
                    break
            if not self._letters:
                continue
            try:
                number, seconds, reply = self._answers.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            self._under_way -= 1
            if self._is_good(number, reply, on_reply):
                del self._letters[number]
                self._adapt(seconds)
                self._done += 1
                progress(self._done, total)

    def report(self, size: int) -> None:
        """Log how much went through."""
        seconds = time.monotonic() - self._began
        log.info(
            "%s: %d bytes in %.1f seconds, %d chunks sent again",
            self._what,
            size * WORD_BYTES,
            seconds,
            self._repeats,
        )

    def _check_limits(self) -> None:
        through = f"{self._done} of {self._total} chunks were through"
        if self._should_stop():
            raise SiteError(f"{self._what} was stopped; {through}")
        if time.monotonic() - self._began >= self._limit:
            why = f" (last: {self._last_fault})" if self._last_fault else ""
            raise SiteError(
                f"{self._what} took longer than {self._limit:.0f} seconds; {through}{why}",
                remedy="look at its connection to the server, or allow more time",
            )

    def _send(self, number: int) -> None:
        left = self._began + self._limit - time.monotonic()
        arguments = (number, self._letters[number].message, min(PATIENCE_SECONDS, max(1.0, left)))
        # A daemon: FLARE may hold on to it for longer than we want to wait.
        threading.Thread(target=self._ask, args=arguments, name="transfer", daemon=True).start()
        self._under_way += 1

    def _ask(self, number: int, message: Message, timeout: float) -> None:
        began, reply = time.monotonic(), None
        try:
            replies = self._engine.send_aux_request(
                targets=[_SERVER],
                topic=self._topic,
                request=to_shareable(message),
                timeout=timeout,
                fl_ctx=self._fl_ctx,
            )
            reply = (replies or {}).get(_SERVER)
        except Exception as error:  # noqa: BLE001  FLARE's; as good as no answer
            log.warning("a chunk could not be sent: %s", type(error).__name__)
        self._answers.put((number, time.monotonic() - began, reply))

    def _is_good(
        self, number: int, reply: Shareable | None, on_reply: Callable[[int, object], None]
    ) -> bool:
        """Whether a request is done with; if not, it is due again later.

        Raises:
            ServerError: it never will be.
        """
        letter = self._letters[number]
        try:
            if reply is not None and reply.get_return_code() == ReturnCode.OK:
                on_reply(number, body(reply))
                return True
            if reply is not None and reply.get(_AGAIN):
                raise _DamagedError(fault_of(reply).rstrip("."))
        except _DamagedError as error:
            letter.damages += 1
            self._last_fault = str(error)
            if letter.damages >= MOST_DAMAGED:
                raise ServerError(
                    f"{self._last_fault} {letter.damages} times",
                    where="server",
                    remedy="look for what changes data between this site and the server",
                ) from None
        else:
            self._last_fault = _code_of(reply)
            if reply is not None and (FAULT in reply or self._last_fault in _FINAL_CODES):
                said = fault_of(reply).rstrip(".")
                what = f"it refused chunk {number} of {self._total}: {said}"
                raise ServerError(what, where="server")
        pause = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0**letter.failures)
        letter.failures += 1
        self._repeats += 1
        self._allowed = 1
        heapq.heappush(self._due, (time.monotonic() + pause, number))
        return False

    def _adapt(self, seconds: float) -> None:
        """Let more or fewer be under way, after one that took so long."""
        if seconds < QUICK_SECONDS:
            self._allowed = min(MOST_UNDER_WAY, self._allowed + 1)
        elif seconds > SLOW_SECONDS:
            self._allowed = max(1, self._allowed - 1)


def _code_of(reply: Shareable | None) -> str:
    return "no answer" if reply is None else str(reply.get_return_code())
