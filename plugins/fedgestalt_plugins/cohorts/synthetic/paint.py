"""What a subject looks like besides the shape: skin, lips, brows, hair and eyes, as an atlas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np

from fedgestalt_plugins.cohorts.synthetic.head import Floats, HeadModel, f32

Colour = tuple[float, float, float]
"""Red, green, blue; 0..255."""

_EYE_TEXELS: Final = 64
_EYE_REACH: Final = 0.18  # half width of the eye texture in decimetres


@dataclass(frozen=True)
class Appearance:
    """Colours and painted features of one subject; lengths in decimetres.

    ``long_hair`` is 0 for short hair, otherwise the extra half width of the hair behind the head.
    """

    skin: Colour = (215, 175, 150)
    lip: Colour = (185, 105, 105)
    hair: Colour = (60, 45, 35)
    iris: Colour = (95, 80, 60)
    iris_scale: float = 1.0
    blush: float = 0.1
    brow_x: float = 0.0
    brow_y: float = 0.0
    brow_arch: float = 0.4
    brow_thickness: float = 1.0
    brow_density: float = 0.8
    synophrys: float = 0.0
    hairline: float = 8.0
    widow_peak: float = 0.3
    parting: float = 0.0
    baldness: float = 0.0
    hair_volume: float = 0.06
    long_hair: float = 0.0
    texture_seed: int = 0


class Painter:
    """Paints albedo atlases; unchanged after construction."""

    def __init__(self, model: HeadModel) -> None:
        self._model = model
        self._eyeballs = np.concatenate(model.eyes)
        self._eye_height = float(model.vertices[1, self._eyeballs].mean())
        strands = f32(np.random.default_rng(20).normal(size=model.atlas_lips.shape))
        strands = f32(cv2.GaussianBlur(strands, (0, 0), sigmaX=0.8, sigmaY=7.0))
        self.strands: Floats = strands / strands.std()

    def atlas(self, look: Appearance) -> Floats:
        """Albedo (rows + 64, columns, 3): the skin, and below it the texture of both eyes."""
        eye = np.zeros((_EYE_TEXELS, self.strands.shape[1], 3), np.float32)
        eye[:, :_EYE_TEXELS] = _eye(look)
        return np.concatenate([self._skin(look), eye])

    def hair_on_vertices(self, look: Appearance) -> Floats:
        """How much hair covers each vertex, (n,), 0..1."""
        hair = _hair(self._model.vertices, self._model.ears, look, f32(0))
        hair[self._eyeballs] = 0
        return hair

    def _skin(self, look: Appearance) -> Floats:
        model, rng = self._model, np.random.default_rng(look.texture_seed)
        rows, columns = self.strands.shape
        coarse, fine = (
            cv2.resize(rng.normal(size=grid), (columns, rows), interpolation=cv2.INTER_CUBIC)
            for grid in ((10, 12), (56, 64))
        )
        strands = np.roll(self.strands, int(rng.integers(columns)), axis=1)
        x, y, _ = model.atlas_rest
        mottle = (0.045 * coarse + 0.02 * fine).astype(np.float32)[..., None]
        face: Floats = f32(look.skin) * (1 + mottle * f32([0.6, 0.9, 1.0]))
        cheeks = np.exp(-(((np.abs(x) - 0.42) / 0.26) ** 2) - ((y - 6.95) / 0.24) ** 2)
        face *= 1 - cheeks[..., None] * f32([0, 0.3 * look.blush, 0.35 * look.blush])
        face += model.atlas_lips[..., None] * (f32(look.lip) - face)
        self._add_brows(face, look, strands)
        ragged = (0.018 * strands + 0.05 * coarse).astype(np.float32)
        hair = _hair(model.atlas_rest, model.atlas_ears, look, ragged)
        sheen = 0.1 * np.exp(-(((y - 8.25) / 0.12) ** 2))
        tone = (1 + 0.22 * strands + 0.08 * coarse + sheen).astype(np.float32)
        face += hair[..., None] * (f32(look.hair) * tone[..., None] - face)
        return face

    def _add_brows(self, face: Floats, look: Appearance, strands: Floats) -> None:
        """Blend the eyebrows into ``face``, working on the brow rows only."""
        height = self._model.atlas_rest[1].mean(1) - self._eye_height
        rows = np.flatnonzero((height > 0.0) & (height < 0.55))
        window = slice(rows[0], rows[-1] + 1)
        x, y, z = self._model.atlas_rest[:, window]
        across, above = np.abs(x), y - self._eye_height
        along = (across - 0.1 - look.brow_x) / 0.46  # 0 at the nose, 1 at the tail
        inside = np.clip(along, 0, 1)
        centre = 0.205 + look.brow_y + 0.02 * inside - 0.1 * np.maximum(along - 0.55, 0)
        centre += look.brow_arch * 0.06 * np.sin(inside * 2.6)
        half = look.brow_thickness * 0.042 * (1.15 - 0.6 * np.clip(along, 0, 1.2))
        brow = np.exp(-(((above - centre) / half) ** 2) * 1.2) * (z > 0.8)
        brow *= _sigmoid((along + 0.02) * 25) * _sigmoid((0.95 - along) * 22)
        bridge = look.synophrys * np.exp(-(((above - 0.2) / 0.05) ** 2)) * (z > 1.2)
        bridge *= _sigmoid((0.13 - across) * 60)
        cover = np.maximum(brow, bridge) * look.brow_density * (1 + 0.12 * strands[window])
        cover = np.clip(cover, 0, 0.9).astype(np.float32)[..., None]
        face[window] += cover * (np.float32(0.9) * f32(look.hair) - face[window])


def _sigmoid(values: Floats) -> Floats:
    result: Floats = 1.0 / (1.0 + np.exp(-values))
    return result


def _hair(rest: Floats, ears: Floats, look: Appearance, ragged: Floats) -> Floats:
    """Hair cover at rest positions (3, ...); ``ragged`` shifts the hairline, in decimetres."""
    x, y, z = rest
    across = np.abs(x)
    line = look.hairline + look.parting * x - 0.55 * np.maximum(across - 0.45, 0) ** 1.3
    line += 0.1 * look.widow_peak * np.cos(np.pi * np.minimum(across / 0.75, 1))
    top = _sigmoid((y - line + ragged) * 18)
    side = _sigmoid((0.5 - z + ragged) * 14) * _sigmoid((y - 7.08) * 12) * (across < 0.88)
    cover: Floats = np.maximum(top, side) * (1 - ears) * (1 - look.baldness)
    return cover


def _eye(look: Appearance) -> Floats:
    """Texture (64, 64, 3) of an eyeball: sclera, iris, pupil and a catchlight."""
    axis = np.linspace(-_EYE_REACH, _EYE_REACH, _EYE_TEXELS)
    dx, dy = axis[None, :, None], -axis[:, None, None]
    radius, edge = np.hypot(dx, dy), 0.07 * look.iris_scale
    ring = np.exp(-(((radius - edge + 0.006) / 0.012) ** 2))
    eye = np.array([216, 210, 204]) - np.clip((np.abs(dx) - 0.08) / 0.1, 0, 1) * [18, 34, 34]
    eye = eye + _sigmoid((edge - radius) * 160) * (look.iris * (1 - 0.35 * ring) - eye)
    eye += _sigmoid((0.03 - radius) * 200) * (16 - eye)
    eye += _sigmoid((0.013 - np.hypot(dx - 0.02, dy - 0.026)) * 300) * (240 - eye)
    return eye.astype(np.float32)
