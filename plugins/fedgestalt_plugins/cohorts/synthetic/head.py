"""The head model: a mesh with additive morph targets, masks and a texture layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgestalt.errors import DataError

Floats = NDArray[Any]
"""float32 unless said otherwise."""

Integers = NDArray[Any]
"""int32 or uint16."""


def f32(values: Any) -> Floats:
    """``values`` as float32."""
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class HeadModel:
    """n vertices, m triangles; lengths in decimetres, coordinates first and vertices last.

    x points to the subject's left, y up, z to the front.

    Attributes:
        vertices: (3, n) rest position.
        triangles: (3, m) vertex indices, counter-clockwise from outside.
        is_eye: (m,) bool.
        targets: name -> (3, n) displacement at weight 1.
        ears: (n,) membership, 0..1.
        shade: (n,) ambient occlusion with the shadows of mouth and upper lid, 0..1.
        atlas_position: (2, n) column and row in the albedo atlas.
        atlas_rest: (3, rows, columns) rest position of the skin texels.
        atlas_lips, atlas_ears: (rows, columns) membership, 0..1.
        eyes: vertices of the eyeballs, image left first.
        landmarks: (3,) vertices of nose tip and mouth corners, image left first.
        identity_axes: names of the targets for negative and for positive draws.
        identity_scale: (axes,) relative standard deviation of each axis.
    """

    vertices: Floats
    triangles: Integers
    is_eye: NDArray[np.bool_]
    targets: Mapping[str, Floats]
    ears: Floats
    shade: Floats
    atlas_position: Floats
    atlas_rest: Floats
    atlas_lips: Floats
    atlas_ears: Floats
    eyes: tuple[Integers, Integers]
    landmarks: Integers
    identity_axes: tuple[tuple[str, str], ...]
    identity_scale: Floats

    @classmethod
    def load(cls, path: Path) -> HeadModel:
        """Read ``head_model.npz``; its arrays are described in ``HEAD_MODEL.md``.

        Raises:
            DataError: the file is missing or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls._from_arrays(data)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                "the head model is missing or damaged",
                where=path.name,
                remedy="install fedgestalt again",
            ) from error

    @classmethod
    def _from_arrays(cls, data: Mapping[str, Any]) -> HeadModel:
        names = [str(name) for name in data["target_names"]]
        deltas = (data["target_deltas"] * data["target_scale"]).transpose(0, 2, 1)
        deltas = np.ascontiguousarray(deltas, np.float32)
        masks = ("mask_ears", "vertex_shade", "atlas_lips", "atlas_ears")
        ears, shade, atlas_lips, atlas_ears = (data[m] / np.float32(255) for m in masks)
        return cls(
            vertices=np.ascontiguousarray(data["vertices"].T),
            triangles=np.ascontiguousarray(data["triangles"].T.astype(np.int32)),
            is_eye=data["triangle_part"] == 1,
            targets=dict(zip(names, deltas, strict=True)),
            ears=ears,
            shade=shade,
            atlas_position=np.ascontiguousarray(data["vertex_atlas_position"].T),
            atlas_rest=data["atlas_rest_position"] * data["atlas_rest_scale"],
            atlas_lips=atlas_lips,
            atlas_ears=atlas_ears,
            eyes=(data["eye_right_vertices"], data["eye_left_vertices"]),
            landmarks=data["landmark_vertices"],
            identity_axes=tuple((names[a], names[b]) for a, b in data["identity_axes"]),
            identity_scale=data["identity_scale"],
        )

    def morph(self, base: Floats, coefficients: Mapping[str, float]) -> Floats:
        """``base`` (3, n) plus the weighted morph targets."""
        result = base.copy()
        for name, weight in coefficients.items():
            result += np.float32(weight) * self.targets[name]
        return result
