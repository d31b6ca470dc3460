"""The records a site holds: images, subjects, syndromes, and which image plays which part."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

UNSOLVED: Final = -1
"""The ``syndrome`` of an image whose subject has no diagnosis."""


@dataclass(frozen=True)
class Syndrome:
    """A label of the consortium's label map.

    Attributes:
        id: the number that the CSV files call ``label``.
        name: what a person reads.
    """

    id: int
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One photograph of one subject.

    Attributes:
        image_id: unique; letters, digits, dot, hyphen, underscore.
        subject: the patient, as the site calls them.
        syndrome: id of the diagnosis, or :data:`UNSOLVED`.
        path: of the image file.
        hpo: terms of the Human Phenotype Ontology that the subject shows, as ``HP:0000154``.
        facts: what else ``image_metadata`` knows, by column; empty cells are left out.
    """

    image_id: str
    subject: str
    syndrome: int
    path: Path
    hpo: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class RareSplit:
    """One of the draws of rare syndromes into gallery and test; image ids."""

    gallery: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class Cohort:
    """A folder in GMDB layout, read and checked.

    Attributes:
        name: for people; the folder's name or the cohort plugin's.
        version: of the metadata files.
        root: the folder.
        images: by image id, of diagnosed subjects.
        syndromes: the consortium's label map by id, the same at every site; a site need not have
            an image of each.
        classes: syndrome ids in the order of the classifier's outputs (the frequent ones).
        train, validation: image ids; together they are the gallery of frequent syndromes.
        frequent_test: image ids; subject-disjoint from the gallery.
        rare_splits: see :class:`RareSplit`; rare syndromes are never trained on.
        unsolved: by image id, of subjects without a diagnosis; discovery alone looks at them.
    """

    name: str
    version: str
    root: Path
    images: Mapping[str, ImageRecord]
    syndromes: Mapping[int, Syndrome]
    classes: tuple[int, ...]
    train: tuple[str, ...]
    validation: tuple[str, ...] = ()
    frequent_test: tuple[str, ...] = ()
    rare_splits: tuple[RareSplit, ...] = field(default=())
    unsolved: Mapping[str, ImageRecord] = field(default_factory=dict)

    @property
    def frequent_gallery(self) -> tuple[str, ...]:
        """Image ids of the diagnosed reference images of frequent syndromes."""
        return self.train + self.validation

    @property
    def subjects(self) -> frozenset[str]:
        """All diagnosed subjects."""
        return frozenset(record.subject for record in self.images.values())

    def records(self, image_ids: Iterable[str]) -> Iterator[ImageRecord]:
        """The records of ``image_ids``, in that order."""
        return (self.images[image_id] for image_id in image_ids)

    def images_per_syndrome(self) -> Counter[int]:
        """How many images each syndrome has here."""
        return Counter(record.syndrome for record in self.images.values())

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over every image's content, label and role; hexadecimal."""
        total = hashlib.sha256(self.label_map_digest.encode())
        roles = {"train": self.train, "val": self.validation, "test": self.frequent_test}
        for index, split in enumerate(self.rare_splits):
            roles |= {f"rare-gallery-{index}": split.gallery, f"rare-test-{index}": split.test}
        for role, members in roles.items():
            total.update(f"{role}:{','.join(sorted(members))};".encode())
        for image_id, record in sorted({**self.images, **self.unsolved}.items()):
            content = hashlib.sha256(record.path.read_bytes()).hexdigest()
            total.update(f"{image_id}|{record.subject}|{record.syndrome}|{content};".encode())
        return total.hexdigest()

    @property
    def label_map_digest(self) -> str:
        """SHA-256 over the label map and the class order; equal at all sites of a consortium."""
        rows = [f"{s.id}|{s.name};" for _, s in sorted(self.syndromes.items())]
        rows.append(",".join(map(str, self.classes)))
        return hashlib.sha256("".join(rows).encode()).hexdigest()
