"""Matching on secret shares: three computing parties, of which none alone learns anything.

The rules:

- Encodings become integers modulo 2^64 with 23 fractional bits.
- An integer x is shared by a random r: the server, party 0, gets r, the first computing site
  ``2 x - r``, the second ``x - r``. Each alone is random. A keystream gives r, so the server gets a
  key and nothing else.
- Each party multiplies its share of the queries Q, made with R, and of the rows G, made with S. The
  products add up, with weights 1, 1 and -2, to twice the scores, whatever R and S are:
  ``R S^T + (2 Q - R)(2 G - S)^T - 2 (Q - R)(G - S)^T = 2 Q G^T``.
  These are values of a line at three places, as in Shamir's sharing, with places for which no
  division modulo 2^64 is needed: a party holds one matrix and multiplies once.
- An answer is the weighted product and ``Zi - Zi+1`` (modulo 3), which cancel in the sum. ``Zi``
  is a keystream of a key that parties *i* and *i - 1* have from the owner of the rows, bound to
  digests of all three parts of the question and to the number of rows. So the answers are random
  but for their sum: the asking site learns scores and nothing else about the rows, even if it asks
  in bad faith. (All parties may drop the same rows. Without their number, a question that is asked
  before and after would find different rows behind the same keystream.)
- The asking site hides each query q twice, behind secret random odd factors c and d: it asks
  ``c q`` and ``c d q``, and takes a sum of answers (u, w) only if ``w = d u`` and ``u / c``, twice
  the score, is even and within [-2, 2] but for rounding.
- Keys come from the operating system, fresh for each upload and question, and serve one purpose
  each.

What a wrong answer can do. What a party sees is independent of c and d, so all it can do is to add
errors of its choice, (e, e') to (u, w). With e = 0 and e' != 0 it is always found. Else let 2^v
divide e and 2^(v + 1) not. In units of 2^-47 the score changes by ``e / c`` (u is twice a product
of numbers with 23 fractional bits), each odd multiple of 2^v alike likely; the check holds if
``e' = d e``, with probability 2^(v - 63), whatever c is. The score stays in range for at most m(v)
of the 2^(63 - v) odd multiples: none for v > 48, 1 for v = 48 (a change by 2, from one end to the
other), 2 for v = 47 (a change by 1), 2^(47 - v) + 1 and a few per mille below. Together at most
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
BITS: Final = 23
_WEIGHTS: Final = np.array([1, 1, -2], np.int64).view(np.uint64)
_DIGESTS: Final = PARTIES * 32
_ROWS_AT_A_TIME: Final = 256

Words = NDArray[np.uint64]


@dataclass(frozen=True)
class SecretShared:
    """Matching strategy ``secret-shared``; see the module docstring.

    A computing party holds 8 bytes per dimension of each row (49 kB for 6144 dimensions); an owner
    uploads as much to each of the two sites. Error of a score: about 5e-8.

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
            "How many images and queries each site sends, opaque handles, and how many dimensions"
            " an encoding has. No similarity, embedding, photo or label. Together with one of the"
            " two computing sites it could read all encodings and queries."
        ),
        sites_learn=(
            "Each of the two computing sites: the same as the server, and nothing else; the two"
            " together, or one with the server, could read all encodings and queries. Any other"
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
        line, *zeros = (self.entropy(KEY_BYTES) for _ in range(1 + PARTIES))
        shares = _shares(_fixed_point(rows), line)
        return tuple(
            Part(
                _shape(rows),
                shares[party],
                zeros[party] + zeros[(party + 1) % PARTIES] + (b"" if party else line),
            )
            for party in range(PARTIES)
        )

    def ask(self, queries: NDArray[np.floating], seed: bytes) -> Question:  # noqa: ARG002
        """Share (q, f) queries, each hidden twice; see :meth:`enrol`."""
        rows = checked(queries)
        secret = self.entropy(16 * len(rows))
        cover, check = _factors(secret)
        hidden = cover[:, None] * _fixed_point(rows)
        both = np.concatenate([hidden, check[:, None] * hidden])
        keys = [self.entropy(KEY_BYTES) for _ in range(PARTIES)]
        shares = _shares(both, keys[0])
        digests = b"".join(map(_digest, keys, shares))
        parts = [
            Part(_shape(rows), *p) for p in zip(shares, (k + digests for k in keys), strict=True)
        ]
        return Question(tuple(parts), secret)

    def receive(self, party: int, part: Part) -> Part:
        """Make the party's matrix (n, f), for many questions; rows may be dropped from it.

        Raises:
            DataError: the part does not fit this party.
        """
        _check(party, part, part.shape[0], (2 if party else 3) * KEY_BYTES)
        zeros, seed = part.keys[: 2 * KEY_BYTES], part.keys[2 * KEY_BYTES :]
        words = part.words if party else _stream(seed, part.shape)
        return Part(part.shape, words, zeros)

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
        _check(party, question, 2 * count, KEY_BYTES + _DIGESTS)
        key, digests = question.keys[:KEY_BYTES], question.keys[KEY_BYTES:]
        if digests[32 * party : 32 * party + 32] != _digest(key, question.words):
            raise DataError("a part of a question does not go with its digest")
        asked = question.words if party else _stream(key, (2 * count, size))
        products = np.empty((rows, 2 * count), np.uint64)

        def multiply(start: int) -> None:
            part = slice(start, start + _ROWS_AT_A_TIME)
            np.einsum("gk,qk->gq", gallery.words[part], asked, out=products[part])

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(multiply, range(0, rows, _ROWS_AT_A_TIME)))
        answer = products.T * _WEIGHTS[party]
        bound = digests + rows.to_bytes(8, "big")
        for own, combine in enumerate((np.add, np.subtract)):
            zero_key = derive(gallery.keys[KEY_BYTES * own :][:KEY_BYTES], "answer/2", bound)
            combine(answer, random_words(zero_key, 2 * count, rows), out=answer)
        return np.ascontiguousarray(answer).reshape(2, count, rows)

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
        twice = (inverse[:, None] * first).view(np.int64)
        scores: NDArray[np.float64] = twice * 2.0 ** -(2 * BITS + 1)
        fits = (second == check[:, None] * first) & (twice % 2 == 0)
        fits &= np.abs(scores) <= 1 + 2 * LENGTH_TOLERANCE
        if not fits.all():
            raise ServerError(
                "the answer of one of the three computing parties is wrong, or the owner of a row"
                " dealt unlike shares",
                where="a computing party",
                remedy="no score of this question can be used",
            )
        return scores


def _shape(rows: NDArray[np.floating]) -> tuple[int, int]:
    return rows.shape[0], rows.shape[1]


def _fixed_point(rows: NDArray[np.floating]) -> Words:
    return np.rint(rows.astype(np.float64) * 2.0**BITS).astype(np.int64).view(np.uint64)


def _factors(secret: bytes) -> Words:
    """The odd factors (2, q) of a question: what covers the queries, what checks the answers."""
    return np.frombuffer(secret, "<u8").reshape(2, -1) | np.uint64(1)


def _stream(key: bytes, shape: tuple[int, ...]) -> Words:
    return random_words(derive(key, "share/1"), *shape)


def _shares(values: Words, seed: bytes) -> tuple[Words, Words, Words]:
    """What travels to each party; to the server nothing, which makes its share of ``seed``."""
    second = values - _stream(seed, values.shape)
    return np.empty((0, values.shape[1]), np.uint64), values + second, second


def _digest(key: bytes, words: Words) -> bytes:
    """Of one party's part of a question, 32 bytes; the key hides what the words are."""
    told = hashlib.sha256(key)
    told.update(np.ascontiguousarray(words).data)
    return told.digest()


def _check(party: int, part: Part, rows: int, key_bytes: int) -> None:
    """Raise DataError if a part does not fit this party."""
    explicit, size = part.words, part.shape[1]
    if (
        not 0 <= party < PARTIES
        or len(part.keys) != key_bytes
        or explicit.dtype != np.uint64
        or explicit.shape != (rows if party else 0, size)
        or not rows * size
    ):
        raise DataError(f"a share is not what computing party {party} gets of {rows} rows")
