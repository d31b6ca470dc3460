"""What a plugin is: the types that plugins implement and the core calls.

A plugin module may import this module, :mod:`fedgestalt.errors` and :mod:`fedgestalt.hooks`;
nothing else of the core is stable. Every kind of plugin carries the same four facts
(:class:`Described`) and a pydantic model of its options, so that names, licences and settings are
checked in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import nn

Pixels = NDArray[np.uint8]
"""An RGB image, shape (height, width, 3)."""

Progress = Callable[[int, int], None]
"""Called with (done, total) while long work goes on."""

FACE_SIZE = 112
"""Side of an aligned face in pixels (the ArcFace template)."""


class Options(BaseModel):
    """Base of a plugin's options: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FromWeights(Options):
    """Base of the options of a backbone that can begin from a weights file.

    In a job ``weights`` is the name of a file; :meth:`Backbone.build` gets its path on this
    machine.
    """

    weights: Path | None = Field(
        default=None, description="name of a file in each machine's weights folder"
    )
    weights_licence: str = Field(
        default="NOASSERTION", min_length=1, description="SPDX expression of the weights file"
    )
    weights_sha256: str = Field(
        default="",
        pattern="^([0-9a-f]{64})?$",
        description="digest of the weights file; empty: any that everybody has alike",
    )


@runtime_checkable
class Described(Protocol):
    """Facts every plugin states about itself."""

    @property
    def name(self) -> str:
        """Unique within its kind: lower-case letters, digits and hyphens."""

    @property
    def summary(self) -> str:
        """One line for ``fedgestalt plugins``."""

    @property
    def licence(self) -> str:
        """SPDX expression of the code and, where there are any, of weights or data."""


# --- backbones -----------------------------------------------------------------------------------


Channels = Literal["rgb", "bgr"]
"""Order of an image's colours; images are RGB until a network wants them otherwise."""


@dataclass(frozen=True)
class InputSpec:
    """How a backbone wants its pixels.

    An aligned RGB face with values 0..255 becomes ``(x - offset) / scale``, resized to
    ``size`` x ``size``, channels first, in the order ``channels``.
    """

    size: int = FACE_SIZE
    offset: float = 127.5
    scale: float = 127.5
    channels: Channels = "rgb"


@runtime_checkable
class FoldsNorms(Protocol):
    """A module of a trunk that can run faster once it does not train any more."""

    def fold_norms(self) -> None:
        """Fold its own BatchNorm layers into the convolutions before them, in place.

        Only called in evaluation mode, on a copy; submodules are asked by themselves.
        """


@dataclass(frozen=True)
class StageCut:
    """Where a trunk's last stage begins, so that it can train while all before it stays frozen.

    Both parts are made of the trunk's own modules: ``last_stage(early(x))`` is ``trunk(x)``.

    Attributes:
        early: (n, 3, size, size) -> (n, *feature_shape).
        last_stage: (n, *feature_shape) -> what the trunk gives.
        feature_shape: of one feature between the two.
    """

    early: nn.Module
    last_stage: nn.Module
    feature_shape: tuple[int, ...]


@dataclass(frozen=True)
class BackboneModules:
    """A network in two parts, in evaluation mode.

    Attributes:
        trunk: (n, 3, size, size) float -> (n, *feature_shape); frozen unless a member asks.
        neck: (n, *feature_shape) -> (n, embedding_size), not normalised.
        input: what the trunk expects.
        feature_shape: shape of one feature.
        embedding_size: length of one encoding.
        weights_licence: SPDX expression of the start weights; empty if they are random.
        cut: of the trunk; None if it has no last stage that could train alone.
    """

    trunk: nn.Module
    neck: nn.Module
    input: InputSpec
    feature_shape: tuple[int, ...]
    embedding_size: int
    weights_licence: str = ""
    cut: StageCut | None = None


@runtime_checkable
class Backbone(Described, Protocol):
    """A face network."""

    @property
    def options(self) -> type[Options]:
        """Model of the options that :meth:`build` takes."""

    def build(self, options: Any, seed: int) -> BackboneModules:
        """Return the modules; random start weights are a function of ``seed`` alone.

        Raises:
            ConfigError: an option or a weights file does not fit.
        """


# --- preprocessing -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlignedFace:
    """A face on the five-point template.

    Attributes:
        pixels: RGB, (112, 112, 3).
        size: width of the face in the photograph, in its pixels.
        turned: how many quarter turns counter-clockwise brought the photograph upright.
        faces: how many faces the photograph shows, as far as they could be taken for this one.
    """

    pixels: Pixels
    size: float
    turned: int = 0
    faces: int = 1


@runtime_checkable
class Preprocessor(Described, Protocol):
    """Finds the face in a photograph and brings it onto the template."""

    @property
    def options(self) -> type[Options]:
        """Model of the options that :meth:`align` takes."""

    def align(self, photograph: Pixels, options: Any) -> AlignedFace:
        """Return the aligned face of an RGB photograph whose EXIF rotation is applied.

        Raises:
            DataError: no face, or one that is too small to encode.
        """


# --- matching ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disclosure:
    """What each party learns, in sentences that go into reports and documents unchanged."""

    server_learns: str
    sites_learn: str
    asking_site_learns: str


@dataclass(frozen=True, eq=False)
class Part:
    """What one computing party gets of some encodings.

    Attributes:
        shape: (rows, dimensions) of the encodings; no secret.
        words: what was made of them. With one computing party: its rows in the encodings' order,
            so that galleries can be concatenated and cut into blocks.
        keys: secret keys of 32 bytes, one after another; not shown.
    """

    shape: tuple[int, int]
    words: NDArray[Any] = field(repr=False)
    keys: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, eq=False)
class Question:
    """Queries, ready to be compared; made and kept by the asking site.

    Attributes:
        parts: one per computing party.
        secret: what :meth:`MatchingStrategy.open` needs; never leaves the asking site.
    """

    parts: tuple[Part, ...] = field(repr=False)
    secret: bytes = field(default=b"", repr=False)


@runtime_checkable
class MatchingStrategy(Described, Protocol):
    """Compares encodings of different sites such that no computing party sees one.

    A workflow drives every strategy alike, without knowing its name:

    - An owner of encodings calls :meth:`enrol`, an asking site :meth:`ask`. Part *i* goes to
      computing party *i*: party 0 is the server, the others are sites that the job designates.
      A part for a site travels sealed for that site, so that the server cannot open it.
    - A computing party calls :meth:`receive` once per upload and :meth:`compare` once per question
      and upload.
    - With one computing party its answer is the scores: the server can release the best alone.
      With several, each answer is a share and travels sealed for the asking site.
    - The asking site calls :meth:`open` with the answers of all parties, in their order.
    """

    @property
    def roles(self) -> tuple[str, ...]:
        """The computing parties in words, the server first; parties are counted from 0."""

    @property
    def disclosure(self) -> Disclosure:
        """What each party learns."""

    def enrol(self, encodings: NDArray[np.floating], seed: bytes) -> tuple[Part, ...]:
        """Prepare (n, f) encodings for the gallery; one part per computing party.

        ``seed`` is the sites' common secret of 32 bytes.

        Raises:
            DataError: there is none, or one is not finite or not of length 1.
        """

    def ask(self, queries: NDArray[np.floating], seed: bytes) -> Question:
        """Prepare (q, f) queries; like :meth:`enrol`."""

    def receive(self, party: int, part: Part) -> Part:
        """Check, and bring into the form that :meth:`compare` wants, a part of the gallery.

        The words of what it returns have one row per image, from which all parties may drop the
        same rows.

        Raises:
            DataError: it does not fit this party.
        """

    def compare(self, party: int, gallery: Part, question: Part) -> NDArray[Any]:
        """This party's answer for all pairs of queries and rows, last axis (g,).

        Raises:
            DataError: the question does not fit this party or the gallery.
        """

    def open(self, question: Question, answers: Sequence[NDArray[Any]]) -> NDArray[np.floating]:
        """Cosine similarities (q, g), from the answers of all parties.

        Raises:
            ServerError: an answer is missing, has another shape, or is found to be wrong.
        """


# --- ranking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gallery:
    """The images that queries were compared with, one per column of the similarities.

    Images of one syndrome lie together, and among them those of one subject.

    Attributes:
        syndromes: (images,) number of each image's syndrome, from 0, ascending, without gaps.
        subjects: (images,) number of each image's subject, likewise; it changes with the syndrome.
    """

    syndromes: NDArray[np.int64]
    subjects: NDArray[np.int64]

    @property
    def syndrome_starts(self) -> NDArray[np.int64]:
        """(syndromes,) column of each syndrome's first image, for ``numpy.ufunc.reduceat``."""
        return np.flatnonzero(np.diff(self.syndromes, prepend=-1))

    @property
    def subject_starts(self) -> NDArray[np.int64]:
        """(subjects,) column of each subject's first image."""
        return np.flatnonzero(np.diff(self.subjects, prepend=-1))


@runtime_checkable
class RankingStrategy(Described, Protocol):
    """Turns the similarities of queries and gallery images into scores of syndromes."""

    @property
    def pools_subjects(self) -> bool:
        """Whether all photographs of a subject make one query: their mean similarities."""

    def scores(self, similarities: NDArray[np.floating], gallery: Gallery) -> NDArray[np.floating]:
        """Scores (queries, syndromes), larger is nearer, of similarities (queries, images).

        A similarity is -inf where it was not released; a score is -inf where nothing was.
        """


# --- cohorts -------------------------------------------------------------------------------------


@runtime_checkable
class CohortSource(Described, Protocol):
    """A cohort that can be built from what a package ships."""

    @property
    def version(self) -> str:
        """Changes whenever the content changes; names the folder in the cache."""

    @property
    def has_patients(self) -> bool:
        """Whether pictures show real patients; only if not may a report show faces."""

    def build(self, target: Path, progress: Progress) -> None:
        """Write the whole cohort in GMDB layout into the existing, empty folder ``target``.

        Raises:
            DataError: what it is built from is missing or damaged.
        """
