"""Built-in ranking strategies."""

from collections.abc import Iterable

from fedgestalt.contracts import RankingStrategy
from fedgestalt.hooks import hookimpl
from fedgestalt_plugins.ranking.strategies import ClassMean, NearestImage, NeighbourVote, Patient


@hookimpl
def fedgestalt_ranking_strategies() -> Iterable[RankingStrategy]:
    """Return the strategies of this package."""
    return [NearestImage(), Patient(), ClassMean(), NeighbourVote()]
