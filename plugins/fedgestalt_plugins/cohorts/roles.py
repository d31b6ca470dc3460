"""Which subject plays which part: train, validation and test, or gallery and test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedgestalt.cohort import RareSplit

RARE_SPLITS = 10


@dataclass
class Roles:
    """Image ids by role, filled syndrome by syndrome."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    frequent_test: list[str] = field(default_factory=list)
    rare: list[tuple[list[str], list[str]]] = field(
        default_factory=lambda: [([], []) for _ in range(RARE_SPLITS)]
    )

    def add_frequent(
        self,
        subjects: Sequence[Iterable[str]],
        rng: np.random.Generator,
        *,
        test: int,
        validation: int = 0,
    ) -> None:
        """Deal the subjects of a syndrome, each given by its image ids; the rest trains."""
        for turn, index in enumerate(rng.permutation(len(subjects))):
            if turn < test:
                self.frequent_test.extend(subjects[index])
            elif turn < test + validation:
                self.validation.extend(subjects[index])
            else:
                self.train.extend(subjects[index])

    def add_rare(
        self, subjects: Sequence[Iterable[str]], rng: np.random.Generator, *, test: int
    ) -> None:
        """Deal the subjects of a syndrome anew for each rare split."""
        for gallery, tests in self.rare:
            for turn, index in enumerate(rng.permutation(len(subjects))):
                (tests if turn < test else gallery).extend(subjects[index])

    @property
    def rare_splits(self) -> tuple[RareSplit, ...]:
        """The rare splits, or none if no rare syndrome was added."""
        splits = (RareSplit(tuple(gallery), tuple(tests)) for gallery, tests in self.rare)
        return tuple(split for split in splits if split.gallery or split.test)
