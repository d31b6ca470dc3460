"""Strategies with several computing parties: parts and answers on their way.

Party 0 is the server, the others are sites. What a site gets travels sealed for it, between sites
that have met in the kernel exchange.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import MatchingStrategy, Part, Question
from fedgestalt.errors import DataError, PeerError, ServerError
from fedgestalt.federation.matching.messages import Answers, Compute
from fedgestalt.messages import Fault, from_server, from_site
from fedgestalt.similarity.kernel import KernelExchange

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


class Party:
    """One computing party of one job: it compares every question with every owner's rows.

    Args:
        strategy: with several roles.
        number: which party.
    """

    def __init__(self, strategy: MatchingStrategy, number: int) -> None:
        self._strategy, self._number = strategy, number
        self._galleries: dict[str, Part] = {}
        self._questions: dict[str, Part] = {}

    def take(self, site: str, gallery: bytes, question: bytes, fault: Fault) -> None:
        """Take a site's parts of its rows and, if it asks, of its question.

        Raises:
            FedgestaltError: ``fault`` if they are not what this party should get.
        """
        try:
            part = unpacked(gallery, fault)
            self._galleries[site] = self._strategy.receive(self._number, part)
            if question:
                self._questions[site] = unpacked(question, fault)
        except DataError as error:
            raise fault(error.what) from None

    @property
    def queries(self) -> dict[str, int]:
        """How many queries each site asks."""
        return {site: question.shape[0] for site, question in self._questions.items()}

    def answers(self, order: Sequence[str], faults: Mapping[str, Fault]) -> dict[str, bytes]:
        """By asking site, this party's answers on all owners' rows in ``order``."""
        found = {}
        for site, question in self._questions.items():
            pieces = []
            for owner in order:
                try:
                    gallery = self._galleries[owner]
                    pieces.append(self._strategy.compare(self._number, gallery, question).tobytes())
                except DataError as error:
                    raise faults[site](error.what) from None
            found[site] = bundled(pieces)
        return found


class SharingSite:
    """A site's side of one job: its own rows and question, and what it computes for the others.

    Args:
        site: its name.
        strategy: with several roles.
        exchange: in which the sites have met.
        computing: the computing sites, parties 1 and on.

    Raises:
        ServerError: they are not as many different sites as the strategy asks for.
    """

    def __init__(
        self,
        site: str,
        strategy: MatchingStrategy,
        exchange: KernelExchange,
        computing: Sequence[str],
    ) -> None:
        if len(set(computing)) != len(strategy.roles) - 1 or len(computing) != len(set(computing)):
            raise ServerError(
                f"{len(strategy.roles) - 1} different computing sites are needed", where=site
            )
        self._site, self._strategy, self._exchange = site, strategy, exchange
        self._computing = tuple(computing)
        self._question: Question | None = None
        number = self._computing.index(site) + 1 if site in computing else 0
        self._party = Party(strategy, number) if number else None
        self._own: dict[str, bytes] = {}

    def enrol(
        self, rows: Encodings, queries: Encodings, seed: bytes
    ) -> tuple[tuple[bytes, bytes], dict[str, bytes]]:
        """The server's parts of rows and question, and a box for each other computing site."""
        galleries = [packed(part) for part in self._strategy.enrol(rows, seed)]
        questions = [b""] * len(galleries)
        if len(queries):
            self._question = self._strategy.ask(queries, seed)
            questions = [packed(part) for part in self._question.parts]
        boxes = {}
        for party, site in enumerate(self._computing, 1):
            if site == self._site and self._party:
                self._party.take(site, galleries[party], questions[party], from_site(site))
            else:
                content = bundled((galleries[party], questions[party]))
                boxes[site] = self._exchange.seal_for(site, _SHARES, content)
        return (galleries[0], questions[0]), boxes

    def compute(self, message: Compute, queries: Mapping[str, int]) -> dict[str, bytes]:
        """The answers of this computing site, sealed for who asks.

        Args:
            message: what the others have sealed for it.
            queries: how many queries each site has announced to all.

        Raises:
            ServerError: this site computes nothing, or the owners are not in order.
            PeerError: a share is none, or a site asks more than it has announced.
        """
        if self._party is None:
            raise ServerError("it asks a site to compute that does not", where=self._site)
        for site, box in message.boxes.items():
            content = self._exchange.open_from(site, _SHARES, box)
            pieces = unbundled(content, from_site(site))
            if len(pieces) != 2:
                raise PeerError("its shares are not those of rows and a question", site=site)
            self._party.take(site, pieces[0], pieces[1], from_site(site))
        owners = {*message.boxes, self._site}
        if set(message.order) != owners or len(message.order) != len(owners):
            raise ServerError("the order of owners is not theirs", where=self._site)
        for site, count in self._party.queries.items():
            if count != queries.get(site, 0):
                raise PeerError(
                    f"it asks {count} queries and has announced {queries.get(site, 0)}", site=site
                )
        faults = {site: from_site(site) for site in owners}
        found = self._party.answers(message.order, faults)
        self._own = {site: answer for site, answer in found.items() if site == self._site}
        return {
            site: self._exchange.seal_for(site, _ANSWER, answer)
            for site, answer in found.items()
            if site != self._site
        }

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
