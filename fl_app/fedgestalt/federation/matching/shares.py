"""Strategies with several computing parties: parts and answers on their way.

Party 0 is the server, the others are sites. What a site gets travels sealed for it, between sites
that have met under their kernel.

The rules of a gallery of shares:

- Every party keeps its part of every row, with the row's handle and the name of the upload with
  which it came. Parts of one upload alone belong together.
- An owner lists all its rows, in their order, to every party, with the shares of the new ones; a
  party drops what is not listed. What is left and what is new must be what is listed.
- Before owners send, the computing sites state a digest of what they hold of each owner. Where a
  party holds something else than the server, the owner shares all its rows again.
- Before it compares, a computing site checks that it holds of each owner what the server holds.
"""

from __future__ import annotations

import itertools
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import MatchingStrategy, Part, Question
from fedgestalt.errors import DataError, PeerError, ServerError
from fedgestalt.federation.matching.galleries import Gallery, Rows, absent, no_rows
from fedgestalt.federation.matching.messages import UPLOAD_BYTES, Answers, Compute, Handles
from fedgestalt.keys import digest
from fedgestalt.messages import Fault, from_server, from_site
from fedgestalt.similarity.kernel import KernelExchange
from fedgestalt.similarity.labels import HANDLE_BYTES

Encodings = NDArray[np.float32]

_SHARES: Final = "shares"
_ANSWER: Final = "answer"

_HEAD: Final = struct.Struct("<QQQQ")
_WORD: Final = np.dtype("<u8")
_LENGTH: Final = struct.Struct("<Q")


def packed(part: Part) -> bytes:
    """A part, whose words are integers modulo 2^64, as bytes."""
    head = _HEAD.pack(*part.shape, len(part.words), len(part.keys))
    return head + part.keys + part.words.astype(_WORD, copy=False).tobytes()


def unpacked(content: bytes, fault: Fault) -> Part:
    """The part in ``content``; raises ``fault`` if there is none."""
    try:
        rows, size, explicit, keys = _HEAD.unpack_from(content)
        start = _HEAD.size + keys
        words = np.frombuffer(content[start:], _WORD).reshape(explicit, size)
    except (struct.error, ValueError):
        raise fault("a share is not what it should be") from None
    return Part((rows, size), words, content[_HEAD.size : start])


def bundled(pieces: Sequence[bytes]) -> bytes:
    """Several pieces as one."""
    return b"".join(_LENGTH.pack(len(piece)) + piece for piece in pieces)


def unbundled(content: bytes, fault: Fault) -> list[bytes]:
    """The pieces of :func:`bundled`."""
    pieces, start = [], 0
    while start < len(content):
        if start + _LENGTH.size > len(content):
            raise fault("a share is cut short")
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size
        if start + length > len(content):
            raise fault("a share is cut short")
        pieces.append(content[start : start + length])
        start += length
    return pieces


@dataclass(frozen=True)
class Delivery:
    """What an owner gives one computing party.

    Attributes:
        upload: names the shares that came together, ``UPLOAD_BYTES``.
        listed: handles of all rows that the owner has from now on, in the order of all parties;
            new ones last.
        rows: this party's part of the new ones, packed; empty if there are none.
        question: this party's part of its question, packed; empty if it asks nothing.
    """

    upload: bytes
    listed: Handles
    rows: bytes
    question: bytes

    def packed(self) -> bytes:
        """All of it, as bytes."""
        return bundled((self.upload, self.listed.tobytes(), self.rows, self.question))

    @classmethod
    def unpacked(cls, content: bytes, fault: Fault) -> Delivery:
        """What :meth:`packed` made; raises ``fault`` if it is not that."""
        pieces = unbundled(content, fault)
        if len(pieces) != 4 or len(pieces[0]) != UPLOAD_BYTES or len(pieces[1]) % HANDLE_BYTES:
            raise fault("its shares are not those of rows and a question")
        listed = np.frombuffer(pieces[1], np.uint8).reshape(-1, HANDLE_BYTES)
        return cls(pieces[0], listed, pieces[2], pieces[3])


class Party:
    """One computing party of one job: it compares every question with every owner's rows.

    Args:
        strategy: with several roles.
        number: which party.
        gallery: the shares that it holds.
    """

    def __init__(self, strategy: MatchingStrategy, number: int, gallery: Gallery) -> None:
        self._strategy, self._number, self._gallery = strategy, number, gallery
        self._questions: dict[str, Part] = {}

    def take(
        self, site: str, came: Delivery, fault: Fault, labels: NDArray[np.uint8] | None = None
    ) -> None:
        """Take a site's parts of its new rows and, if it asks, of its question.

        What the site does not list any more goes.

        Args:
            site: the owner.
            came: what it sent.
            fault: if it is not what this party should get.
            labels: of the new rows, sealed; the server alone keeps them.

        Raises:
            FedgestaltError: ``fault``; or the rows cannot be kept.
        """
        try:
            added = self._received(came, labels, fault)
            if came.question:
                self._questions[site] = unpacked(came.question, fault)
        except DataError as error:
            raise fault(error.what) from None
        own = self._gallery.part(site).handles
        gone = absent(own, came.listed[: len(came.listed) - len(added)])
        self._gallery.enrol(site, gone, added)
        if not np.array_equal(self._gallery.part(site).handles, came.listed):
            raise fault("its new shares do not complete those that are held of it")

    def _received(self, came: Delivery, labels: NDArray[np.uint8] | None, fault: Fault) -> Rows:
        if not came.rows:
            return no_rows()
        part = self._strategy.receive(self._number, unpacked(came.rows, fault))
        count = part.shape[0]
        if count > len(came.listed):
            raise fault(f"it sent shares of {count} rows and lists {len(came.listed)}")
        if labels is not None and len(labels) != count:
            raise fault(f"it sent shares of {count} rows and labels of {len(labels)}")
        keys = np.frombuffer(came.upload + part.keys, np.uint8)
        return Rows(
            part.words,
            came.listed[len(came.listed) - count :],
            np.empty((count, 0), np.uint8) if labels is None else labels,
            np.tile(keys, (count, 1)),
        )

    @property
    def queries(self) -> dict[str, int]:
        """How many queries each site asks."""
        return {site: question.shape[0] for site, question in self._questions.items()}

    def answers(self, order: Sequence[str], faults: Mapping[str, Fault]) -> dict[str, bytes]:
        """By asking site, this party's answers on all owners' rows in ``order``."""
        found = {}
        for site, question in self._questions.items():
            try:
                found[site] = bundled([self._answer(owner, question) for owner in order])
            except DataError as error:
                raise faults[site](error.what) from None
        return found

    def _answer(self, owner: str, question: Part) -> bytes:
        rows = self._gallery.part(owner)
        parts = []
        for some in _by_upload(rows):
            keys = some.keys[0, UPLOAD_BYTES:].tobytes()
            part = Part((len(some), some.rows.shape[1]), some.rows, keys)
            parts.append(self._strategy.compare(self._number, part, question))
        return np.concatenate(parts, axis=-1).tobytes()


def holdings(gallery: Gallery) -> dict[str, bytes]:
    """By owner, a digest of which shares a party holds: handles and uploads, in their order."""
    found = {}
    for site in gallery.sites:
        rows = gallery.part(site)
        named = np.concatenate([rows.uploads, rows.handles], axis=1)
        found[site] = digest("matching shares", site.encode(), named.tobytes())
    return found


def _by_upload(rows: Rows) -> list[Rows]:
    """The rows, cut where another upload begins."""
    cuts = np.flatnonzero((rows.uploads[1:] != rows.uploads[:-1]).any(axis=1)) + 1
    ends = [0, *cuts.tolist(), len(rows)]
    return [rows.chosen(slice(start, end)) for start, end in itertools.pairwise(ends)]


class SharingSite:
    """A site's side of one job: its own rows and question, and what it computes for the others.

    Args:
        site: its name.
        strategy: with several roles.
        exchange: in which the sites have met.
        computing: the computing sites, parties 1 and on.
        gallery: opens the shares that this site holds if it computes.

    Raises:
        ServerError: they are not as many different sites as the strategy asks for.
    """

    def __init__(
        self,
        site: str,
        strategy: MatchingStrategy,
        exchange: KernelExchange,
        computing: Sequence[str],
        gallery: Callable[[], Gallery] = Gallery,
    ) -> None:
        if len(set(computing)) != len(strategy.roles) - 1 or len(computing) != len(set(computing)):
            raise ServerError(
                f"{len(strategy.roles) - 1} different computing sites are needed", where=site
            )
        self._site, self._strategy, self._exchange = site, strategy, exchange
        self._computing, self._open_gallery = tuple(computing), gallery
        self._question: Question | None = None
        self._mine: Delivery | None = None
        self._own: dict[str, bytes] = {}

    def enrol(
        self, new: Encodings, queries: Encodings, listed: Handles, seed: bytes
    ) -> tuple[Delivery, dict[str, bytes]]:
        """What the server gets, and a box for each other computing site.

        Args:
            new: (n, d) rows to share.
            queries: (q, d) rows to ask about.
            listed: handles of all rows that this site has from now on, the new ones last.
            seed: of the sites.
        """
        galleries = questions = [b""] * len(self._strategy.roles)
        upload = bytes(UPLOAD_BYTES)
        if len(new):
            upload = secrets.token_bytes(UPLOAD_BYTES)
            galleries = [packed(part) for part in self._strategy.enrol(new, seed)]
        if len(queries):
            self._question = self._strategy.ask(queries, seed)
            questions = [packed(part) for part in self._question.parts]
        deliveries = [
            Delivery(upload, listed, rows, question)
            for rows, question in zip(galleries, questions, strict=True)
        ]
        boxes = {}
        for party, site in enumerate(self._computing, 1):
            if site == self._site:
                self._mine = deliveries[party]
            else:
                boxes[site] = self._exchange.seal_for(site, _SHARES, deliveries[party].packed())
        return deliveries[0], boxes

    def compute(self, message: Compute, queries: Mapping[str, int]) -> dict[str, bytes]:
        """The answers of this computing site, sealed for who asks.

        Args:
            message: what the others have sealed for it.
            queries: how many queries each site has announced to all.

        Raises:
            ServerError: this site computes nothing, the owners are not in order, or the server
                holds other shares.
            PeerError: a share is none, or a site asks more than it has announced.
        """
        if self._mine is None:
            raise ServerError("it asks a site to compute that does not", where=self._site)
        gallery = self._open_gallery()
        party = Party(self._strategy, self._computing.index(self._site) + 1, gallery)
        party.take(self._site, self._mine, from_site(self._site))
        for site, box in message.boxes.items():
            content = self._exchange.open_from(site, _SHARES, box)
            party.take(site, Delivery.unpacked(content, from_site(site)), from_site(site))
        self._check_order(message, gallery)
        for site, count in party.queries.items():
            if count != queries.get(site, 0):
                raise PeerError(
                    f"it asks {count} queries and has announced {queries.get(site, 0)}", site=site
                )
        found = party.answers(message.order, {site: from_site(site) for site in party.queries})
        self._own = {site: answer for site, answer in found.items() if site == self._site}
        return {
            site: self._exchange.seal_for(site, _ANSWER, answer)
            for site, answer in found.items()
            if site != self._site
        }

    def _check_order(self, message: Compute, gallery: Gallery) -> None:
        named = len(set(message.order)) == len(message.order) == len(message.digests)
        if not named or not {*message.boxes, self._site} <= set(message.order):
            raise ServerError("the order of owners is not theirs", where=self._site)
        held = holdings(gallery)
        for owner, stated in zip(message.order, message.digests, strict=True):
            if held.get(owner) != stated:
                raise ServerError(
                    f"this site and the server hold different shares of the rows of {owner}",
                    where=self._site,
                    remedy="submit the job again: they are enrolled again; nothing was compared",
                )

    def open(self, message: Answers) -> NDArray[np.float32]:
        """Scores (queries, rows), in the order of the message.

        Raises:
            ServerError: an answer is missing or wrong.
            PeerError: a computing site's answer does not open.
        """
        if self._question is None:
            return np.empty((0, len(message.handles)), np.float32)
        answers = [message.answer]
        for site in self._computing:
            if site == self._site:
                answers.append(self._own[site])
            elif site not in message.boxes:
                raise ServerError(f"no answer of {site} came", where=self._site)
            else:
                answers.append(self._exchange.open_from(site, _ANSWER, message.boxes[site]))
        return opened(self._strategy, self._question, message.counts, answers, from_server)


def opened(
    strategy: MatchingStrategy,
    question: Question,
    counts: Sequence[int],
    answers: Sequence[bytes],
    fault: Fault,
) -> NDArray[np.float32]:
    """Scores (queries, rows) from the answers of all parties.

    Args:
        strategy: with several roles.
        question: this site's.
        counts: how many rows each owner has, in the order of the answers.
        answers: by party, one piece for each owner.
        fault: for answers that do not fit.

    Raises:
        ServerError: an answer is wrong.
    """
    queries = question.parts[0].shape[0]
    pieces = [unbundled(answer, fault) for answer in answers]
    if any(len(some) != len(counts) for some in pieces):
        raise fault("the answers are not about all owners' rows")
    scores = []
    for owner, count in enumerate(counts):
        try:
            shares = [
                np.frombuffer(some[owner], np.uint64).reshape(-1, queries, count) for some in pieces
            ]
        except ValueError:
            raise fault("an answer does not fit the question") from None
        scores.append(strategy.open(question, shares))
    joined: NDArray[np.float32] = np.concatenate(scores, axis=1).astype(np.float32)
    return joined
