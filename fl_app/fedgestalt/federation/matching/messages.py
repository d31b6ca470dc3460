"""Messages of the matching job, beside those of :mod:`fedgestalt.similarity.kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedgestalt.messages import Fault, Message, array, hexadecimal, integer, several, text
from fedgestalt.similarity.labels import HANDLE_BYTES, SEALED_BYTES


@dataclass(frozen=True)
class MatchStart(Message):
    """Server to sites: the facts of a matching session.

    ``released_rows`` 0 asks for an evaluation release: every row for every query.
    """

    schema: ClassVar[str] = "fedgestalt.matching.start/1"
    roster: tuple[str, ...] = several(text())
    ensemble: str = hexadecimal()
    strategy: str = text(64)
    released_rows: int = integer(0, 2**31)


@dataclass(frozen=True)
class OfferKeys(Message):
    """Server to sites: all agree; offer a key for the kernel agreement."""

    schema: ClassVar[str] = "fedgestalt.matching.offer-keys/1"


@dataclass(frozen=True)
class MaskedRows(Message):
    """Site to server: its images as masked encodings, queries first.

    ``handles`` and ``labels`` hold ``HANDLE_BYTES`` and ``SEALED_BYTES`` per row.
    """

    schema: ClassVar[str] = "fedgestalt.matching.masked-rows/1"
    kernel: str = hexadecimal(32)
    queries: int = integer(0, 2**31)
    rows: NDArray[np.float64] = array("float64", 2)
    handles: NDArray[np.uint8] = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)

    def check_sizes(self, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together."""
        count = len(self.rows)
        if self.handles.shape != (count, HANDLE_BYTES) or self.labels.shape != (
            count,
            SEALED_BYTES,
        ):
            raise fault(f"{count} rows do not go with its handles and labels")
        if not count or self.queries > count:
            raise fault(f"{self.queries} queries in {count} rows")
        lengths = (self.rows**2).sum(1)
        if np.abs(lengths - 1).max() > 1e-3:
            raise fault("a masked row is not of length 1")


@dataclass(frozen=True)
class ReleasedRows(Message):
    """Server to one site: the best rows for each of its queries.

    Attributes:
        handles, labels: by row, for the rows named in ``columns``; zeros elsewhere.
        columns: (queries, m) row numbers, best first.
        scores: (queries, m) cosine similarities.
    """

    schema: ClassVar[str] = "fedgestalt.matching.released-rows/1"
    handles: NDArray[np.uint8] = array("uint8", 2)
    labels: NDArray[np.uint8] = array("uint8", 2)
    columns: NDArray[np.int32] = array("int32", 2)
    scores: NDArray[np.float32] = array("float32", 2)

    def check_sizes(self, queries: int, fault: Fault) -> None:
        """Raise ``fault`` if the parts do not belong together or to this site's queries."""
        count = len(self.handles)
        if self.handles.shape != (count, HANDLE_BYTES) or self.labels.shape != (
            count,
            SEALED_BYTES,
        ):
            raise fault("released handles and labels do not fit the rows")
        if self.columns.shape != self.scores.shape or len(self.columns) != queries:
            raise fault(f"scores for {len(self.columns)} queries came, {queries} were asked")
        if (
            self.columns.size
            and not 0 <= int(self.columns.min()) <= int(self.columns.max()) < count
        ):
            raise fault("a row number is out of range")


@dataclass(frozen=True)
class Ranked(Message):
    """Site to server: its queries are ranked; what came out stays at the site."""

    schema: ClassVar[str] = "fedgestalt.matching.ranked/1"
    kernel: str = hexadecimal(32)
