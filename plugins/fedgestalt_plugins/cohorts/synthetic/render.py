"""A software renderer for aligned faces.

Shape and atlas are made once for a subject; an image then costs one projection, one z-buffer pass
and one texture look-up. Matrix libraries are avoided on purpose: the pixels do not depend on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from fedgestalt.contracts import FACE_SIZE
from fedgestalt_plugins.cohorts.synthetic.head import Floats, HeadModel, f32
from fedgestalt_plugins.cohorts.synthetic.paint import Appearance, Colour, Painter
from fedgestalt_plugins.cohorts.synthetic.raster import gradients, rasterise

_SUPERSAMPLE: Final = 2
# The ArcFace template: eyes, nose tip, mouth corners, as x + iy in pixels, image left first.
_TEMPLATE: Final = np.array([38.2946, 73.5318, 56.0252, 41.5493, 70.7299]) + 1j * np.array(
    [51.6963, 51.5014, 71.7366, 92.3655, 92.2041]
)
_PIVOT: Final = np.array([[0.0], [7.1], [0.6]], np.float32)  # of the neck, decimetres
_CAMERA_DISTANCE: Final = 9.0


@dataclass(frozen=True)
class View:
    """Pose (radians), light and backdrop of one photograph.

    ``landmark_jitter`` moves the five points that the face is aligned by, (5,) x + iy in
    decimetres; ``backdrop`` is a small RGB image, (h, w, 3), 0..255.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    light: Colour = (0.3, 0.4, 1.0)
    ambient: float = 0.45
    specular: float = 0.12
    gaze: tuple[float, float] = (0.0, 0.0)
    landmark_jitter: NDArray[Any] | float = 0.0
    backdrop: Floats = field(default_factory=lambda: np.full((4, 4, 3), 110, np.float32))

    def rotate(self, points: Floats) -> Floats:
        """``points`` (3, n) turned about the pivot: yaw, then pitch, then roll."""
        turns = np.exp(1j * np.array([self.yaw, self.pitch, self.roll]))
        (cy, cp, cr), (sy, sp, sr) = turns.real.astype("f4"), turns.imag.astype("f4")
        x, y, z = points - _PIVOT
        x, z = cy * x + sy * z, cy * z - sy * x
        y, z = cp * y - sp * z, cp * z + sp * y
        return np.stack([cr * x - sr * y, cr * y + sr * x, z])


@dataclass(frozen=True)
class PreparedHead:
    """What all images of a subject share: vertices (3, n), albedo atlas, looks."""

    vertices: Floats
    atlas: Floats
    look: Appearance


class FaceRenderer:
    """Renders prepared heads; unchanged after construction, safe to share."""

    def __init__(self, model: HeadModel) -> None:
        self.model = model
        self._painter = Painter(model)
        self._eyeballs = np.concatenate(model.eyes)
        self._gloss = model.shade.copy()
        self._gloss[self._eyeballs] *= 2

    def prepare(self, coefficients: Mapping[str, float], look: Appearance) -> PreparedHead:
        """Morph the mesh, add the volume of the hair and paint the atlas."""
        vertices = self.model.morph(self.model.vertices, coefficients)
        hair = self._painter.hair_on_vertices(look)
        outward = vertices - np.array([[0], [7.35], [0.35]], np.float32)
        outward /= np.sqrt((outward**2).sum(0))
        vertices += outward * (hair * np.float32(look.hair_volume))
        return PreparedHead(vertices, self._painter.atlas(look), look)

    def render(self, head: PreparedHead, view: View, expression: Mapping[str, float]) -> Floats:
        """Aligned RGB image, float32 (112, 112, 3), values about 0..255."""
        model, size = self.model, FACE_SIZE * _SUPERSAMPLE
        camera = view.rotate(model.morph(head.vertices, expression))
        projected = _project(camera)
        scale, shift = self._alignment(projected, view)
        screen = ((projected * scale + shift) * _SUPERSAMPLE).astype(np.complex64)
        x, y = screen.real[model.triangles], screen.imag[model.triangles]
        area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])
        inside = (x.max(0) > 0) & (x.min(0) < size) & (y.max(0) > 0) & (y.min(0) < size)
        front = np.flatnonzero((area < -1e-4) & inside)
        corners, x, y = model.triangles[:, front], x[:, front], y[:, front]
        is_eye = model.is_eye[front]
        hit = rasterise(x, y, camera[2][corners] - np.float32(0.02) * is_eye, size)
        covered = np.flatnonzero(hit >= 0)
        owner = hit[covered]
        values = self._surface(camera, view)[:, corners]
        slope_x, slope_y = gradients(values, x, y)
        origin = values[:, 0] - slope_x * (x[0] - 0.5) - slope_y * (y[0] - 0.5)
        pixel_y, pixel_x = (part.astype(np.float32) for part in np.divmod(covered, size))
        layers = np.zeros((4, size * size), np.float32)
        for layer, base, along_x, along_y in zip(layers, origin, slope_x, slope_y, strict=True):
            layer[covered] = base[owner] + along_x[owner] * pixel_x + along_y[owner] * pixel_y
        eye = np.zeros(size * size, np.float32)
        eye[covered] = is_eye[owner]  # darkened towards the lids
        lid_shadow = cv2.blur(eye.reshape(size, size), (7, 7)).ravel()
        layers[2] *= 1 - eye * (0.75 - 0.75 * lid_shadow)
        columns, rows, light, gleam = layers.reshape(4, size, size)
        colour = f32(cv2.remap(head.atlas, columns, rows, cv2.INTER_LINEAR))
        colour *= np.clip(light, 0, 2)[..., None]
        colour += np.clip(gleam, 0, 160)[..., None]
        colour, alpha = _shrink(colour), _shrink(f32(hit >= 0).reshape(size, size))
        image: Floats = (
            colour + self._behind(head.look, view, scale, shift) * (1 - alpha)[..., None]
        )
        return image

    def _alignment(self, projected: NDArray[Any], view: View) -> tuple[complex, complex]:
        """Least-squares similarity from the landmarks to the template: scale x turn, and shift."""
        points = [projected[index].mean() for index in self.model.eyes]
        start = np.array(points + list(projected[self.model.landmarks])) + view.landmark_jitter
        centred = start - start.mean()
        scale = (centred.conj() * _TEMPLATE).sum() / (np.abs(centred) ** 2).sum()
        return scale, _TEMPLATE.mean() - scale * start.mean()

    def _surface(self, camera: Floats, view: View) -> Floats:
        """Atlas column and row, diffuse factor and specular offset of each vertex, (4, n)."""
        column, row = self.model.atlas_position.copy()
        column[self._eyeballs] -= np.float32(view.gaze[0] * 5)
        row[self._eyeballs] += np.float32(view.gaze[1] * 5)
        return np.stack([column, row, *self._illuminate(camera, view)])

    def _illuminate(self, camera: Floats, view: View) -> tuple[Floats, Floats]:
        """Diffuse factor and specular offset of each vertex."""
        corner = camera[:, self.model.triangles]
        first, second = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
        normal = np.zeros_like(camera)
        for axis, (a, b) in enumerate(((1, 2), (2, 0), (0, 1))):
            face = first[a] * second[b] - first[b] * second[a]
            for vertex in self.model.triangles:
                normal[axis] += np.bincount(vertex, face, camera.shape[1])
        normal /= np.sqrt((normal**2).sum(0)) + np.float32(1e-9)
        light = f32(view.light) / np.sqrt((f32(view.light) ** 2).sum())
        half = light + f32([0, 0, 1])
        half /= np.sqrt((half**2).sum())
        facing, mirror = ((normal * way[:, None]).sum(0) for way in (light, half))
        diffuse = np.float32(1.25 * (1 - view.ambient)) * np.clip(facing * 0.85 + 0.15, 0, None)
        gleam = np.clip(mirror, 0, 1) ** 18 * np.float32(255 * view.specular)
        return (np.float32(view.ambient) + diffuse) * self.model.shade, gleam * self._gloss

    def _behind(self, look: Appearance, view: View, scale: complex, shift: complex) -> Floats:
        """Backdrop with long hair in front of it, (112, 112, 3)."""
        size = (FACE_SIZE, FACE_SIZE)
        backdrop = f32(cv2.resize(view.backdrop, size, interpolation=cv2.INTER_CUBIC))
        if look.long_hair <= 0:
            return backdrop
        wide, low = 0.8 + look.long_hair, 6.6 - 2.0 * look.long_hair
        side = [(0.7 * wide, low), (wide, low + 0.3), (wide, 7.6), (0.95 * wide, 8.0), (0.6, 8.5)]
        outline = [(x, y, -0.15) for x, y in side] + [(-x, y, -0.15) for x, y in side[::-1]]
        placed = _project(view.rotate(f32(outline).T)) * scale + shift
        polygon = np.stack([placed.real, placed.imag], 1).round().astype(np.int32)
        filled = cv2.fillPoly(np.zeros(size, np.float32), [polygon], 1.0)
        mask = cv2.GaussianBlur(filled, (0, 0), 1.2)[..., None]
        strands = cv2.resize(self._painter.strands[:FACE_SIZE, :80], size)
        tone = np.float32(view.ambient + 0.25) * (1 + np.float32(0.2) * strands)
        covered: Floats = backdrop + mask * (f32(look.hair) * tone[..., None] - backdrop)
        return covered


def _project(camera: Floats) -> NDArray[Any]:
    """Perspective image position as x + iy, y downwards."""
    perspective = np.float32(_CAMERA_DISTANCE) / (np.float32(_CAMERA_DISTANCE) - camera[2])
    position: NDArray[Any] = (camera[0] - np.complex64(1j) * camera[1]) * perspective
    return position


def _shrink(layer: Floats) -> Floats:
    return f32(cv2.resize(layer, (FACE_SIZE, FACE_SIZE), interpolation=cv2.INTER_AREA))
