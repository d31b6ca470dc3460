"""Built-in matching strategies."""

from collections.abc import Iterable

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.hooks import hookimpl
from fedgestalt_plugins.matching.isometry import Isometry


@hookimpl
def fedgestalt_matching_strategies() -> Iterable[MatchingStrategy]:
    """Return the strategies of this package."""
    return [Isometry()]
