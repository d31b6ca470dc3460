"""Late fusion: the similarity of recorded features joins that of faces, with a stated weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedgestalt.errors import ConfigError, DataError
from fedgestalt.similarity.ranking import Floats


def case_similarities(
    terms: Floats, queries: Sequence[Sequence[int]], gallery: Sequence[Sequence[int]]
) -> Floats:
    """Best-match average of two cases' terms; both directions count alike.

    Each term is compared with the nearest one of the other case; the mean of these over one case
    and that over the other are averaged (Schlicker et al. 2006, funSimAvg).

    Args:
        terms: (t, t) similarities of terms, symmetric.
        queries, gallery: numbers of terms, 0 to t - 1, of each case.

    Returns:
        (queries, gallery); NaN where one of the two has no term.
    """
    there, back = _shares(queries, len(terms)), _shares(gallery, len(terms))
    result: Floats = (there @ _nearest(terms, gallery) + (back @ _nearest(terms, queries)).T) / 2
    return result


def fuse(faces: Floats, phenotypes: Floats, weight: float) -> Floats:
    """``(1 - weight) * faces + weight * phenotypes``, the latter on the scale of the faces.

    For each query, its phenotype similarities are shifted and stretched to the mean and standard
    deviation of its face similarities over the images that have both, so that the weight says what
    it seems to. An image without terms gets the mean, which favours nothing; a query without terms
    keeps its face similarities.

    Args:
        faces: (queries, images); -inf where not released, and stays so.
        phenotypes: (queries, images); NaN where unknown.
        weight: 0..1; with 0, ``faces`` comes back as it is.

    Raises:
        ConfigError: the weight is out of range.
        DataError: the shapes differ.
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"the weight {weight} of HPO terms is not between 0 and 1")
    if faces.shape != phenotypes.shape:
        raise DataError("faces and phenotypes are not of the same images")
    if weight == 0:
        return faces
    both = np.isfinite(faces) & np.isfinite(phenotypes)
    count = np.maximum(both.sum(1, keepdims=True), 1)

    def moments(values: Floats) -> tuple[Floats, Floats]:
        mean = np.where(both, values, 0).sum(1, keepdims=True) / count
        spread = (np.where(both, values - mean, 0) ** 2).sum(1, keepdims=True) / count
        return mean, np.sqrt(spread)

    with np.errstate(invalid="ignore"):  # -inf and NaN are masked right after
        face_mean, face_spread = moments(faces)
        mean, spread = moments(phenotypes)
        scaled = face_mean + (phenotypes - mean) * face_spread / np.maximum(spread, 1e-12)
        fused = (1 - weight) * faces + weight * np.where(both, scaled, face_mean)
    return np.where(np.isfinite(faces) & both.any(1, keepdims=True), fused, faces)


def _shares(cases: Sequence[Sequence[int]], terms: int) -> Floats:
    """(cases, terms): 1 / number of its terms where a case has a term; NaN for a case without."""
    shares = np.zeros((len(cases), terms))
    for row, case in enumerate(cases):
        own = sorted(set(case))
        shares[row, own] = 1 / max(len(own), 1)
        if not own:
            shares[row] = np.nan
    return shares


def _nearest(terms: Floats, cases: Sequence[Sequence[int]]) -> Floats:
    """(terms, cases): similarity of each term to the nearest one of each case; NaN if none."""
    result = np.full((len(terms), len(cases)), np.nan)
    known = [row for row, case in enumerate(cases) if len(case)]
    if known:
        columns = np.concatenate([np.asarray(cases[row], np.int64) for row in known])
        starts = np.cumsum([0, *(len(cases[row]) for row in known[:-1])])
        result[:, known] = np.maximum.reduceat(terms[:, columns], starts, axis=1)
    return result
