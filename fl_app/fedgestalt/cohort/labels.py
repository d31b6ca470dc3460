"""The label map that a consortium agrees on, and in which rows a cohort differs from it.

In a job, sites compare digests (:attr:`~fedgestalt.cohort.records.Cohort.label_map_digest`): no
name of a syndrome leaves a site. Which rows differ is found at home, against the agreed map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedgestalt.cohort.records import Cohort, Syndrome
from fedgestalt.cohort.scan import scan_label_map
from fedgestalt.cohort.tables import raise_errors


@dataclass(frozen=True)
class LabelMap:
    """Syndromes by id, and the ids of the frequent ones in the order of the classifier's outputs.

    It is what the files ``gmdb_syndromes`` and ``lookup_table`` of a GMDB folder say.
    """

    syndromes: Mapping[int, Syndrome]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """A row in which two label maps differ.

    Attributes:
        syndrome: its id; None for a difference of the class list.
        what: a sentence without a full stop. It holds names of syndromes, so it stays at the site.
    """

    syndrome: int | None
    what: str


def read_label_map(root: Path) -> LabelMap:
    """Read the label map of a folder in GMDB layout; no image need be there.

    Raises:
        DataError: the first fault, with file, row and remedy.
    """
    found = scan_label_map(root, raise_errors)
    return LabelMap(found.syndromes, found.classes)


def label_map_of(cohort: Cohort) -> LabelMap:
    """The label map that a cohort carries."""
    return LabelMap(cohort.syndromes, cohort.classes)


def differences(own: LabelMap, agreed: LabelMap) -> Iterator[Difference]:
    """Yield every row in which ``own`` differs from ``agreed``, by syndrome id, then by class.

    Identifiers in other catalogues differ only where both maps give some of one catalogue and have
    none in common: a site need not have them.
    """
    for number in sorted(own.syndromes.keys() | agreed.syndromes.keys()):
        here, there = own.syndromes.get(number), agreed.syndromes.get(number)
        if here is None and there is not None:
            yield Difference(number, f"syndrome {number} ({there.name!r}) is missing")
        elif here is not None and there is None:
            yield Difference(number, f"syndrome {number} ({here.name!r}) is not in the agreed map")
        elif here is not None and there is not None:
            if here.name != there.name:
                what = f"syndrome {number} is {here.name!r}, in the agreed map {there.name!r}"
                yield Difference(number, what)
            yield from _other_identifiers(here, there)
    if own.classes != agreed.classes:
        pairs = enumerate(zip(own.classes, agreed.classes, strict=False))
        first = next((at for at, (mine, theirs) in pairs if mine != theirs), None)
        if first is None:
            what = f"{len(own.classes)} classes, in the agreed map {len(agreed.classes)}"
        else:
            what = (
                f"class {first} is syndrome {own.classes[first]}, in the agreed map"
                f" {agreed.classes[first]}"
            )
        yield Difference(None, what)


def _other_identifiers(here: Syndrome, there: Syndrome) -> Iterator[Difference]:
    for catalogue in ("OMIM", "MONDO", "ORPHA"):
        mine, theirs = (
            {i for i in syndrome.identifiers if i.startswith(f"{catalogue}:")}
            for syndrome in (here, there)
        )
        if mine and theirs and not mine & theirs:
            what = (
                f"syndrome {here.id} is {', '.join(sorted(mine))}, in the agreed map"
                f" {', '.join(sorted(theirs))}"
            )
            yield Difference(here.id, what)
