"""Encodings with test-time augmentation: every member, mirrored or not, grey or not.

The field's score of two images is the mean of the cosine distances of their vectors over members
and variants. With ``U = concat(u_m) / sqrt(number of vectors)`` that mean is one inner product, so
one vector per image, and one Gram matrix, say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedgestalt.contracts import Progress
from fedgestalt.learning.augment import TEST_VARIANTS
from fedgestalt.learning.blocks import ahead, block_ranges, encoding_pictures
from fedgestalt.learning.device import trunk_dtype
from fedgestalt.learning.ensemble import Ensemble, Member
from fedgestalt.learning.features import give_pages_back, no_progress, trunk_features
from fedgestalt.learning.images import FaceSource
from fedgestalt.learning.trunk import FastTrunk

Encodings = NDArray[np.float32]
"""(n, encoding size), rows of length 1."""

ENCODED_AT_A_TIME = 16
"""Images; progress is told after each such block."""


def layout_of(ensemble: Ensemble) -> str:
    """How an encoding is made up: test-time variants and size of each member's vectors."""
    return "-".join(f"{len(TEST_VARIANTS)}x{m.embedding_size}" for m in ensemble.members)


class Encoder:
    """Encodes faces block by block; the ensemble's weights are those of when it was made.

    Args:
        ensemble: its current weights count.
        device: to compute on.
        without: members whose features are given with every block.
    """

    def __init__(
        self, ensemble: Ensemble, device: torch.device, without: Mapping[str, object] | None = None
    ) -> None:
        self.ensemble, self.device = ensemble, device
        self._trunk_of = {m.spec.name: trunk_key(m) for m in ensemble.members}
        dtype, known = trunk_dtype(device), without or {}
        self._trunks: dict[str, FastTrunk] = {}
        for member in ensemble.members:
            key = trunk_key(member)
            if member.spec.name not in known and key not in self._trunks:
                self._trunks[key] = FastTrunk(member.trunk, member.input, device, dtype)
            member.neck.to(device).eval()

    @property
    def needs_pictures(self) -> bool:
        """Whether there is a trunk to run."""
        return bool(self._trunks)

    def encode(
        self, pictures: NDArray[np.uint8], features: Mapping[str, torch.Tensor] | None = None
    ) -> Encodings:
        """Encodings of the test-time variants of some images.

        Args:
            pictures: (n, variants, 112, 112, 3).
            features: (n, variants, *feature_shape) of members whose trunks are not run.
        """
        made = (
            {key: trunk(pictures) for key, trunk in self._trunks.items()} if len(pictures) else {}
        )
        given = features or {}
        parts = []
        for member in self.ensemble.members:
            name = member.spec.name
            found = given[name] if name in given else made[self._trunk_of[name]]
            parts.append(_neck(member, found, self.device).flatten(1))
        scale = (len(parts) * len(TEST_VARIANTS)) ** -0.5
        result: Encodings = (torch.cat(parts, dim=1) * scale).numpy()
        return result


def trunk_key(member: Member) -> str:
    """Equal for members that share a trunk."""
    return member.trunk_digest if member.trunk_is_frozen else member.spec.name


def encode(
    ensemble: Ensemble,
    faces: FaceSource,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> Encodings:
    """Encode aligned faces; images that lie on disk are loaded in blocks.

    Args:
        ensemble: its current weights count.
        faces: n of them.
        device: to compute on.
        cache: folder for the features of frozen trunks; None computes them in passing.
        progress: called with (images done, images), counting each trunk.

    Raises:
        DataError: an image cannot be read, or changed in the meantime.
        SiteError: the cache cannot be written.
    """
    result = np.empty((len(faces), ensemble.encoding_size), np.float32)
    if not len(faces):
        return result
    pictures = encoding_pictures(faces)
    by_trunk: dict[str, list[Member]] = {}
    for member in ensemble.members:
        by_trunk.setdefault(trunk_key(member), []).append(member)
    total, done = len(faces) * len(by_trunk), 0
    known: dict[str, torch.Tensor] = {}
    for sharing in by_trunk.values():
        if cache is not None and sharing[0].trunk_is_frozen:

            def count(images: int, _: int, before: int = done) -> None:
                progress(before + images, total)

            features = trunk_features(sharing[0], pictures, device, cache, count)
            known |= dict.fromkeys((m.spec.name for m in sharing), features)
            done += len(faces)
    encoder = Encoder(ensemble, device, known)
    left = len(by_trunk) - done // len(faces)

    def make(start: int, stop: int) -> NDArray[np.uint8]:
        return pictures.make(start, stop) if encoder.needs_pictures else _NO_PICTURES

    for start, stop, block in ahead(make, block_ranges(len(faces), ENCODED_AT_A_TIME)):
        given = {name: features[start:stop] for name, features in known.items()}
        result[start:stop] = encoder.encode(block, given)
        for features in known.values():
            give_pages_back(features)
        progress(done + stop * left, total)
    return result


_NO_PICTURES = np.empty((0, len(TEST_VARIANTS), 1, 1, 3), np.uint8)


def _neck(member: Member, features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normalised vectors (n, variants, embedding) of one member."""
    with torch.inference_mode():
        flat = features.to(device).float().flatten(0, 1)
        vectors = member.neck(flat).view(*features.shape[:2], -1)
        return torch.nn.functional.normalize(vectors, dim=2).cpu()


def untouched_part(ensemble: Ensemble, encodings: Encodings) -> Encodings | None:
    """The share of members that do not train, as encodings of their own; None if all train."""
    ends = np.cumsum([member.embedding_size * len(TEST_VARIANTS) for member in ensemble.members])
    blocks = np.split(encodings, ends[:-1], axis=1)
    kept = [b for b, m in zip(blocks, ensemble.members, strict=True) if not m.trained_parts]
    if not kept:
        return None
    joined = np.concatenate(kept, axis=1)
    result: Encodings = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    return result
