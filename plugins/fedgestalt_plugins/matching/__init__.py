"""Built-in matching strategies."""

from collections.abc import Iterable

from fedgestalt.contracts import MatchingStrategy
from fedgestalt.hooks import hookimpl
from fedgestalt_plugins.matching.flake import Flake
from fedgestalt_plugins.matching.isometry import Isometry, isometry_by_blocks
from fedgestalt_plugins.matching.plaintext import Plaintext
from fedgestalt_plugins.matching.secret_shared import SecretShared


@hookimpl
def fedgestalt_matching_strategies() -> Iterable[MatchingStrategy]:
    """Return the strategies of this package."""
    return [Isometry(), isometry_by_blocks(), Flake(), Plaintext(), SecretShared()]
