"""Matching on secret shares: three computing parties, of which none alone learns anything.

The rules:

- Encodings become integers modulo 2^64: queries with 24 fractional bits, gallery rows with 23.
- An integer x is shared as ``x = x0 + x1 + x2``. Party *i* gets shares *i* and *i + 1* (modulo 3).
  Shares 0 and 1 are keystreams and travel as keys; share 2 travels in full. So the server, party 0,
  gets keys alone.
- For shared queries Q and rows G, party *i* answers
  ``Qi (Gi + Gi+1)^T + Qi+1 Gi^T + Zi - Zi+1``. The products sum up to ``Q G^T`` (Araki et al. 2016,
  "High-Throughput Semi-Honest Secure Three-Party Computation"), the Z cancel.
- ``Zi`` is a keystream of a key that parties *i* and *i - 1* have from the owner of the rows, bound
  to share *i* of the question. It makes the three answers random but for their sum: the asking
  site learns scores and nothing else about the rows.
- The asking site hides each query q twice, behind secret random odd factors c and d: it asks
  ``c q`` and ``c d q``, and takes an answer (u, w) only if ``w = d u`` and the score ``u / c`` is
  within [-1, 1] but for rounding.
- Keys come from the operating system, fresh for each upload and question, and serve one purpose
  each.

What a wrong answer can do. What a party sees is independent of c and d, so all it can do is to add
errors of its choice, (e, e') to (u, w). With e = 0 and e' != 0 it is always found. Else let 2^v
divide e and 2^(v + 1) not. The score changes by ``e / c``, each odd multiple of 2^v alike likely;
the check holds if ``e' = d e``, with probability 2^(v - 63), whatever c is. The score stays in
range for at most m(v) of the 2^(63 - v) odd multiples: none for v > 48, 1 for v = 48 (a change by
2, from one end to the other), 2 for v = 47 (a change by 1), 2^(47 - v) + 1 below. Together at most
``m(v) 2^(2v - 126)``, largest for v = 48: **a wrong score is accepted with a probability of at most
2^-30**, and of 2^-31 unless it goes from -1 to 1 or back. Several wrong scores are no likelier than
one. Who was wrong cannot be told.

Who must not collude: any two of the three parties together read everything, rows and queries. One
of them with any number of asking sites and owners learns what these know already, and scores that
these asked for. An asking site with the right to f questions can compute rows of f dimensions from
their scores: a query budget bounds that, not this protocol. An owner that deals unlike shares makes
its own rows unusable.

Nothing here reads or writes; a part of a site, and every answer, travels sealed (see
:class:`fedgestalt.contracts.MatchingStrategy`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Disclosure, Part, Question
from fedgestalt.errors import DataError, ServerError
from fedgestalt_plugins.matching.keystream import KEY_BYTES, derive, random_words
from fedgestalt_plugins.matching.one_party import LENGTH_TOLERANCE, SERVER, checked

PARTIES: Final = 3
QUERY_BITS: Final = 24
ROW_BITS: Final = 23
_EXPLICIT: Final = 2  # the share that travels in full
_ROWS_AT_A_TIME: Final = 64

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class SecretShared:
    """Matching strategy ``secret-shared``; see the module docstring.

    A computing party holds 16 bytes per dimension of each row (98 kB for 6144 dimensions); an owner
    uploads 8 to each of the two sites. Error of a score: about 4e-8.

    Attributes:
        entropy: returns that many secret random bytes; only tests replace it.
        threads: how many share the work of :meth:`compare`.
    """

    name: str = "secret-shared"
    summary: str = "three computing parties on secret shares: none alone sees rows or scores"
    licence: str = "Apache-2.0"
    roles: tuple[str, ...] = (SERVER, "first computing site", "second computing site")
    disclosure: Disclosure = Disclosure(
        server_learns=(
            "How many images and queries each site sends, and how many dimensions an encoding has."
            " No similarity, embedding, photo or label. Together with one of the two computing"
            " sites it could read all encodings and queries."
        ),
        sites_learn=(
            "Each of the two computing sites: the same sizes as the server, and nothing else; the"
            " two together, or one with the server, could read all encodings and queries. Any other"
            " site: nothing. All sites share the label key."
        ),
        asking_site_learns=(
            "For its own queries: the score of every image in the gallery, not of the best alone."
            " With a few hundred queries it could compute the gallery's encodings nearly, with as"
            " many as an encoding has dimensions exactly, so each site needs a query budget."
        ),
    )
    entropy: Callable[[int], bytes] = field(default=secrets.token_bytes, repr=False)
    threads: int = 2

    def enrol(self, encodings: NDArray[np.floating], seed: bytes) -> tuple[Part, ...]:  # noqa: ARG002
        """Share (n, f) encodings among the parties; the sites' common seed is not used.

        Raises:
            DataError: there is none, or one is not finite or not of length 1.
        """
        rows = checked(encodings)
        return self._share(_fixed_point(rows, ROW_BITS), rows.shape)

    def ask(self, queries: NDArray[np.floating], seed: bytes) -> Question:  # noqa: ARG002
        """Share (q, f) queries, each hidden twice; see :meth:`enrol`."""
        rows = checked(queries)
        secret = self.entropy(16 * len(rows))
        cover, check = _factors(secret)
        hidden = cover[:, None] * _fixed_point(rows, QUERY_BITS)
        both = np.concatenate([hidden, check[:, None] * hidden])
        return Question(self._share(both, rows.shape), secret)

    def receive(self, party: int, part: Part) -> Part:
        """Make the party's matrix (n, 2 f), shares ``Gi + Gi+1`` beside ``Gi``, for many questions.

        Raises:
            DataError: the part does not fit this party.
        """
        own, other = _shares(party, part, part.shape[0])
        size = part.shape[1]
        matrix = np.empty((len(own), 2 * size), np.uint64)
        np.add(own, other, out=matrix[:, :size])
        matrix[:, size:] = own
        return Part(part.shape, matrix, part.keys)

    def compare(self, party: int, gallery: Part, question: Part) -> Words:
        """This party's answer (2, q, n), random but for the sum over the parties.

        Args:
            party: 0, 1 or 2.
            gallery: as :meth:`receive` returned it.
            question: as it came.

        Raises:
            DataError: the question does not fit this party or the gallery.
        """
        count, (rows, size) = question.shape[0], gallery.shape
        if question.shape[1] != size:
            raise DataError(f"the question has {question.shape[1]} dimensions, the gallery {size}")
        asked = np.concatenate(_shares(party, question, 2 * count), axis=1)
        products = np.empty((rows, 2 * count), np.uint64)

        def multiply(start: int) -> None:
            part = slice(start, start + _ROWS_AT_A_TIME)
            np.einsum("gk,qk->gq", gallery.words[part], asked, out=products[part])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(multiply, range(0, rows, _ROWS_AT_A_TIME)))
        answer = products.T.copy()
        keys, bindings = _split(gallery.keys), _bindings(party, question)
        for key, binding, combine in zip(keys, bindings, (np.add, np.subtract), strict=True):
            zero = random_words(derive(key, "answer/1", binding), 2 * count, rows)
            combine(answer, zero, out=answer)
        return answer.reshape(2, count, rows)

    def open(self, question: Question, answers: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """Cosine similarities (q, n).

        Raises:
            ServerError: an answer is missing, has another shape, or one of them is wrong.
        """
        count = question.parts[0].shape[0]
        shapes = {(a.shape, a.dtype) for a in answers}
        ((shape, kind),) = shapes if len(shapes) == 1 else {((), np.dtype(object))}
        if len(answers) != PARTIES or kind != np.uint64 or shape[:-1] != (2, count):
            raise ServerError("the three answers do not fit the question", where=SERVER)
        first, second = answers[0] + answers[1] + answers[2]
        cover, check = _factors(question.secret)
        inverse = np.array([pow(int(c), -1, 1 << 64) for c in cover], np.uint64)
        scores: NDArray[np.float64] = (inverse[:, None] * first).view(np.int64) * 2.0 ** -(
            QUERY_BITS + ROW_BITS
        )
        fits = (second == check[:, None] * first) & (np.abs(scores) <= 1 + 2 * LENGTH_TOLERANCE)
        if not fits.all():
            raise ServerError(
                "the answer of one of the three computing parties is wrong, or the owner of a row"
                " dealt unlike shares",
                where="a computing party",
                remedy="no score of this question can be used",
            )
        return scores

    def _share(self, values: Words, shape: tuple[int, ...]) -> tuple[Part, ...]:
        keys = [self.entropy(KEY_BYTES) for _ in range(PARTIES)]
        explicit = values.copy()
        for key in keys[:_EXPLICIT]:
            explicit -= _stream(key, values.shape)
        nothing = np.empty((0, values.shape[1]), np.uint64)
        return tuple(
            Part(
                (shape[0], shape[1]),
                nothing if party == 0 else explicit,
                keys[party] + keys[(party + 1) % PARTIES],
            )
            for party in range(PARTIES)
        )


def _fixed_point(rows: NDArray[np.floating], bits: int) -> Words:
    return np.rint(rows.astype(np.float64) * 2.0**bits).astype(np.int64).view(np.uint64)


def _factors(secret: bytes) -> Words:
    """The odd factors (2, q) of a question: what covers the queries, what checks the answers."""
    return np.frombuffer(secret, "<u8").reshape(2, -1) | np.uint64(1)


def _stream(key: bytes, shape: tuple[int, ...]) -> Words:
    return random_words(derive(key, "share/1"), *shape)


def _split(keys: bytes) -> tuple[bytes, bytes]:
    return keys[:KEY_BYTES], keys[KEY_BYTES:]


def _shares(party: int, part: Part, rows: int) -> tuple[Words, Words]:
    """A party's two shares, each (rows, f): its own and the next party's.

    Raises:
        DataError: the part does not fit this party.
    """
    explicit, size = part.words, part.shape[1]
    needed = 0 if party == 0 else rows
    if (
        not 0 <= party < PARTIES
        or len(part.keys) != 2 * KEY_BYTES
        or explicit.dtype != np.uint64
        or explicit.shape != (needed, size)
        or not rows * size
    ):
        raise DataError(f"a share is not what computing party {party} gets of {rows} rows")
    first, second = (
        explicit if (party + step) % PARTIES == _EXPLICIT else _stream(key, (rows, size))
        for step, key in enumerate(_split(part.keys))
    )
    return first, second


def _bindings(party: int, question: Part) -> list[bytes]:
    """What binds the zeros of an answer to the two shares of the question, 32 bytes each.

    Whoever asks cannot make two answers with the same zeros and different shares: bound to what
    both parties that use a zero have, they need not agree on a number.
    """
    digests = []
    for step, key in enumerate(_split(question.keys)):
        told = hashlib.sha256(key + np.array(question.shape, "<u8").tobytes())
        if (party + step) % PARTIES == _EXPLICIT:
            told.update(np.ascontiguousarray(question.words).data)
        digests.append(told.digest())
    return digests
