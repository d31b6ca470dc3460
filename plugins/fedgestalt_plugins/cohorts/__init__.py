"""Built-in cohorts. Listing them imports neither OpenCV nor data; building one does."""

from collections.abc import Iterable

from fedgestalt.contracts import CohortSource
from fedgestalt.hooks import hookimpl
from fedgestalt_plugins.cohorts.orl import Orl
from fedgestalt_plugins.cohorts.orl_warp import OrlWarp
from fedgestalt_plugins.cohorts.synthetic import SyntheticCohort


@hookimpl
def fedgestalt_cohorts() -> Iterable[CohortSource]:
    """Return the cohorts of this package."""
    return [SyntheticCohort(), Orl(), OrlWarp()]
