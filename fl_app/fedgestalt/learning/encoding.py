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
from fedgestalt.learning.augment import TEST_VARIANTS, test_variants
from fedgestalt.learning.ensemble import Ensemble, Member
from fedgestalt.learning.features import no_progress, trunk_features
from fedgestalt.learning.images import Faces

Encodings = NDArray[np.float32]
"""(n, encoding size), rows of length 1."""

_IMAGES_AT_A_TIME = 256


def layout_of(ensemble: Ensemble) -> str:
    """How an encoding is made up: test-time variants and size of each member's vectors."""
    return "-".join(f"{len(TEST_VARIANTS)}x{m.embedding_size}" for m in ensemble.members)


def encode(
    ensemble: Ensemble,
    faces: Faces,
    device: torch.device,
    cache: Path | None = None,
    progress: Progress = no_progress,
) -> Encodings:
    """Encode aligned faces.

    Args:
        ensemble: its current weights count.
        faces: (n, 112, 112, 3).
        device: to compute on.
        cache: folder for the features of frozen trunks; None computes them in passing.
        progress: called with (images done, images), counting each trunk.
    """
    if not len(faces):
        return np.empty((0, ensemble.encoding_size), np.float32)
    by_trunk: dict[str, list[Member]] = {}
    for member in ensemble.members:
        key = member.trunk_digest if member.trunk_is_frozen else member.spec.name
        by_trunk.setdefault(key, []).append(member)
    vectors: dict[str, torch.Tensor] = {}
    total, done = len(faces) * len(by_trunk), 0
    for sharing in by_trunk.values():
        keep = cache if cache is not None and sharing[0].trunk_is_frozen else None
        step = len(faces) if keep else _IMAGES_AT_A_TIME
        parts: dict[str, list[torch.Tensor]] = {m.spec.name: [] for m in sharing}
        for start in range(0, len(faces), step):
            chunk = faces[start : start + step]
            variants = np.stack([np.stack(test_variants(face)) for face in chunk])

            def count(chunk_done: int, _: int, before: int = done + start) -> None:
                progress(before + chunk_done, total)

            features = trunk_features(sharing[0], variants, device, keep, count)
            for member in sharing:
                parts[member.spec.name].append(_necks(member, features, device))
        done += len(faces)
        progress(done, total)
        vectors |= {name: torch.cat(tensors) for name, tensors in parts.items()}
    return _concatenate({m.spec.name: vectors[m.spec.name] for m in ensemble.members})


def _necks(member: Member, features: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Normalised vectors (n, variants, embedding) of one member."""
    neck = member.neck.to(device).eval()
    result = torch.empty((*features.shape[:2], member.embedding_size))
    with torch.inference_mode():
        for start in range(0, len(features), _IMAGES_AT_A_TIME):
            part = features[start : start + _IMAGES_AT_A_TIME].to(device).float()
            vectors = neck(part.flatten(0, 1)).view(*part.shape[:2], -1)
            result[start : start + len(part)] = torch.nn.functional.normalize(vectors, dim=2).cpu()
    return result


def _concatenate(vectors: Mapping[str, torch.Tensor]) -> Encodings:
    joined = torch.cat([tensor.flatten(1) for tensor in vectors.values()], dim=1)
    scale = (len(vectors) * len(TEST_VARIANTS)) ** -0.5
    result: Encodings = (joined * scale).numpy()
    return result


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
