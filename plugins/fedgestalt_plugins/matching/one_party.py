"""What the strategies have in common that let the server compare masked rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Part, Question
from fedgestalt.errors import DataError, ServerError

SERVER: Final = "server"
BLOCK: Final = 512
"""Dimensions of the field's encodings: of one member and variant."""

LENGTH_TOLERANCE: Final = 1e-3
"""How far the squared length of an encoding may be from 1."""


def checked(encodings: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return encodings (n, f) as they are.

    Raises:
        DataError: they are no table, there is none, or one is not finite or not of length 1.
    """
    rows = np.asarray(encodings)
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise DataError(f"encodings are not a table of real numbers but {rows.dtype}{rows.shape}")
    if not rows.size:
        raise DataError("there is no encoding to compare")
    squares = np.einsum("nf,nf->n", rows, rows, dtype=np.float64)
    if not np.all(np.abs(squares - 1) <= LENGTH_TOLERANCE):  # so written, NaN fails as well
        raise DataError("an encoding is not finite or not of length 1")
    return rows


def blocks_of(size: int, block: int) -> list[slice]:
    """Cut ``size`` dimensions into blocks of at most ``block``."""
    return [slice(start, min(start + block, size)) for start in range(0, size, block)]


class OneParty(ABC):
    """A strategy whose only computing party is the server; subclasses say how rows are masked."""

    roles: tuple[str, ...] = (SERVER,)

    @abstractmethod
    def mask(self, encodings: NDArray[np.floating], seed: bytes) -> NDArray[np.floating]:
        """Mask (n, f) encodings such that inner products stay.

        Raises:
            DataError: there is none, or one is not finite or not of length 1.
        """

    def enrol(self, encodings: NDArray[np.floating], seed: bytes) -> tuple[Part, ...]:
        """Mask encodings; see :class:`fedgestalt.contracts.MatchingStrategy`."""
        masked = self.mask(encodings, seed)
        count, size = np.shape(encodings)
        return (Part((count, size), masked),)

    def ask(self, queries: NDArray[np.floating], seed: bytes) -> Question:
        """Mask queries."""
        return Question(self.enrol(queries, seed))

    def receive(self, party: int, part: Part) -> Part:
        """Check masked rows.

        Raises:
            DataError: they do not fit, or one is not finite or not of length 1.
        """
        if party != 0 or part.keys or len(part.words) != part.shape[0]:
            raise DataError("a part of the gallery is not what the server gets of masked rows")
        checked(part.words)
        return part

    def compare(self, party: int, gallery: Part, question: Part) -> NDArray[np.floating]:
        """Inner products (q, g) of masked rows.

        Raises:
            DataError: queries and gallery differ in their dimensions.
        """
        rows, queries = gallery.words, question.words
        if party != 0 or queries.ndim != 2 or queries.shape[1] != rows.shape[1]:
            raise DataError("the masked queries have other dimensions than the gallery")
        scores: NDArray[np.floating] = queries @ rows.T
        return scores

    def open(self, question: Question, answers: Sequence[NDArray[Any]]) -> NDArray[np.floating]:
        """The server's answer, checked.

        Raises:
            ServerError: it is missing, has another shape, or holds what is no cosine.
        """
        scores = np.asarray(answers[0]) if len(answers) == 1 else np.empty(0)
        if scores.ndim != 2 or len(scores) != question.parts[0].shape[0]:
            raise ServerError("the answer does not fit the question", where=SERVER)
        if not np.all(np.abs(scores) <= 1 + 2 * LENGTH_TOLERANCE):
            raise ServerError("a score is no cosine similarity", where=SERVER)
        return scores
