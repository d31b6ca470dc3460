"""Is any known syndrome near a site's queries? Measured with what is released to the site itself.

The yardstick are images of the site's own diagnosed patients: how far is each from the nearest
*other* diagnosed subjects of all hospitals? A query that is farther than nearly all of them is far
from everything. See :mod:`fedgestalt.similarity.nearness` for the statistic and its error rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedgestalt.similarity.nearness import LEVEL, NEIGHBOURS, calibrate, kth_distances
from fedgestalt.similarity.ranking import Floats

NO_DIAGNOSIS: Final = (
    "near: diagnosed patients are about as close as they are to each other. It does not say that"
    " the person is affected: unaffected faces have near neighbours, too"
)


@dataclass(frozen=True)
class Near:
    """What can be said about each query.

    Attributes:
        about: how it was measured, and its error rate; None where it could not be.
        p_values: (queries,) NaN where nothing can be said.
    """

    about: dict[str, Any] | None
    p_values: Floats

    def of(self, query: int) -> dict[str, Any]:
        """The statement on one query; ``near`` is None where nothing can be said."""
        p_value = float(self.p_values[query])
        if self.about is None or np.isnan(p_value):
            return {"near": None, "p_value": None}
        can_tell = self.about["least_p_value"] <= self.about["level"]
        near = p_value > self.about["level"] if can_tell else None
        return {"near": near, "p_value": round(p_value, 6)}


def near_or_not(
    faces: Floats,
    yardstick: Floats,
    gallery: NDArray[np.bool_],
    cases: NDArray[np.str_],
    own_cases: Sequence[str],
    trained: bool,
) -> Near:
    """Compare queries with the yardstick.

    Args:
        faces: (queries, rows) similarities of faces; -inf where not released.
        yardstick: (images, rows) likewise, of the site's own diagnosed patients.
        gallery: (rows,) whether a row is a diagnosed reference image.
        cases: (rows,) whose it is.
        own_cases: (images,) whose the yardstick's are.
        trained: whether the ensemble may have trained on images of the yardstick.
    """
    unknown = Near(None, np.full(len(faces), np.nan))
    columns, mine = cases[gallery], np.array(own_cases, cases.dtype)
    if not len(mine) or len(np.unique(columns)) <= NEIGHBOURS:
        return unknown
    scale = calibrate(yardstick[:, gallery], mine, columns)
    distances = kth_distances(faces[:, gallery], columns)
    p_values = np.where(np.isfinite(distances), scale.p_values(distances), np.nan)
    far = scale.threshold(LEVEL)
    about = {
        "neighbours": NEIGHBOURS,
        "level": LEVEL,
        "least_p_value": 1 / (1 + len(np.unique(mine))),
        "threshold_distance": far if np.isfinite(far) else None,
        "calibrated_on": "gallery" if trained else "validation",
        "subjects": len(np.unique(mine)),
        "says": NO_DIAGNOSIS,
    }
    return Near(about, p_values)
