"""How a synthetic population is drawn; light, so that listing plugins stays fast."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from fedgestalt.errors import ConfigError

GENERATOR = "v1"
"""Changes with any change to the renderer, the head model or the catalogue of syndromes."""


@dataclass(frozen=True)
class Parameters:
    """Size and difficulty of a cohort.

    Attributes:
        seed: of everything random.
        severity: mean strength of the syndromes; 0 makes all subjects controls.
        severity_spread: standard deviation of the strength between subjects.
        identity: scale of the differences between faces that are not due to a syndrome.
        nuisance: scale of pose, expression, light and camera faults.
        frequent_subjects: subjects for each frequent syndrome, at least 2.
        rare_subjects: subjects for each rare syndrome, at least 2.
    """

    seed: int = 11
    severity: float = 0.75
    severity_spread: float = 0.18
    identity: float = 0.32
    nuisance: float = 1.0
    frequent_subjects: int = 24
    rare_subjects: int = 10

    def __post_init__(self) -> None:
        if min(self.frequent_subjects, self.rare_subjects) < 2:
            raise ConfigError(
                "a synthetic syndrome needs at least 2 subjects",
                remedy="raise frequent_subjects and rare_subjects",
            )

    @property
    def version(self) -> str:
        """Version of the cohort: generator and a digest of these parameters."""
        text = repr(dataclasses.astuple(self))
        return f"{GENERATOR}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
