"""What a report shows beside numbers; never stored in ``result.json``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import Pixels


@dataclass(frozen=True)
class Neighbour:
    """One gallery image near a query.

    Attributes:
        face: aligned RGB face; None where the cohort has patients.
        syndrome: its name.
        site: the hospital that holds it.
        score: cosine similarity.
    """

    face: Pixels | None
    syndrome: str
    site: str
    score: float


@dataclass(frozen=True)
class Example:
    """One query with its truth, its ranked syndromes (name, score) and its nearest images."""

    face: Pixels | None
    site: str
    truth: str
    ranked: tuple[tuple[str, float], ...]
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class GramView:
    """The matrix of similarities that the server computed, with what only sites know.

    Attributes:
        gram: (n, n) cosine similarities.
        syndromes: (n,) names.
        sites: (n,) names.
    """

    gram: NDArray[np.float32]
    syndromes: tuple[str, ...]
    sites: tuple[str, ...]
