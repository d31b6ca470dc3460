"""The hooks a plugin module may implement. Each returns the plugins of one kind that it brings."""

from collections.abc import Iterable

import pluggy

from fedgestalt.contracts import (
    Backbone,
    CohortSource,
    MatchingStrategy,
    Preprocessor,
    RankingStrategy,
)

ENTRY_POINT_GROUP = "fedgestalt"

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@hookspec
def fedgestalt_backbones() -> Iterable[Backbone]:  # type: ignore[empty-body]
    """Face networks."""


@hookspec
def fedgestalt_preprocessors() -> Iterable[Preprocessor]:  # type: ignore[empty-body]
    """Face detection and alignment."""


@hookspec
def fedgestalt_matching_strategies() -> Iterable[MatchingStrategy]:  # type: ignore[empty-body]
    """Ways to compare patients of different hospitals."""


@hookspec
def fedgestalt_ranking_strategies() -> Iterable[RankingStrategy]:  # type: ignore[empty-body]
    """Ways to rank syndromes by the similarities of a query."""


@hookspec
def fedgestalt_cohorts() -> Iterable[CohortSource]:  # type: ignore[empty-body]
    """Cohorts that a package brings along."""
