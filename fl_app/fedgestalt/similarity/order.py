"""The order in which a site's images are sent and compared: queries first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedgestalt.errors import SiteError
from fedgestalt.similarity.evaluation import QUERY_ROLES, roles_of

if TYPE_CHECKING:
    from fedgestalt.cohort import Cohort


class ImageOrder:
    """A site's images as they are sent: queries first.

    Attributes:
        image_ids: in order.
        syndromes: (n,) ids.
        roles: (n,) role sets.
        queries: how many of them are queries.
    """

    def __init__(self, cohort: Cohort) -> None:
        parts = [(split.gallery, split.test) for split in cohort.rare_splits]
        ids = sorted(cohort.images)
        roles = roles_of(ids, cohort.frequent_gallery, cohort.frequent_test, parts)
        is_query = (roles & QUERY_ROLES) > 0
        order = np.argsort(~is_query, kind="stable")
        self.image_ids = [ids[i] for i in order]
        self.roles = roles[order]
        self.syndromes = np.array([r.syndrome for r in cohort.records(self.image_ids)], np.int64)
        self.queries = int(is_query.sum())


def image_order(cohort: Cohort) -> ImageOrder:
    """The order in which a cohort's images are sent.

    Raises:
        SiteError: it has no image.
    """
    if not cohort.images:
        raise SiteError("this site has no image to match")
    return ImageOrder(cohort)
