"""Which triangle is seen at each pixel: a z-buffer over spans, without loops over triangles."""

from __future__ import annotations

import numpy as np

from fedgestalt_plugins.cohorts.synthetic.head import Floats, Integers


def gradients(corners: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Slopes along x and y of values (..., 3 corners, triangles) in the image plane."""
    dx1, dx2, dy1, dy2 = x[1] - x[0], x[2] - x[0], y[1] - y[0], y[2] - y[0]
    inverse_area = 1.0 / (dx1 * dy2 - dx2 * dy1)
    first = (corners[..., 1, :] - corners[..., 0, :]) * inverse_area
    second = (corners[..., 2, :] - corners[..., 0, :]) * inverse_area
    return first * dy2 - second * dy1, second * dx1 - first * dx2


def rasterise(x: Floats, y: Floats, depth: Floats, size: int) -> Integers:
    """Nearest triangle (largest depth) at each pixel centre of a square image, else -1.

    Triangles are cut into pixel rows ("spans") and spans into pixels, with half-open limits so that
    neighbours neither overlap nor leave gaps.

    Args:
        x: (3 corners, triangles) in pixels.
        y: the same, downwards.
        depth: the same, growing towards the viewer.
        size: side of the image in pixels.

    Returns:
        (size * size,) int32, row by row.
    """
    order = np.argsort(y, axis=0)
    xs, ys = np.take_along_axis(x, order, 0), np.take_along_axis(y, order, 0)
    first, last = np.clip(np.ceil(ys[::2] - 0.5), 0, size).astype(np.int32)
    heights = last - first
    owner = np.repeat(np.arange(x.shape[1], dtype=np.int32), heights)
    row = np.arange(len(owner), dtype=np.int32) + (first - np.cumsum(heights) + heights)[owner]
    centre = row.astype(np.float32) + np.float32(0.5)

    def edge(a: int, b: int) -> Floats:
        slope = (xs[b] - xs[a]) / np.maximum(ys[b] - ys[a], 1e-6)
        crossing: Floats = xs[a][owner] + (centre - ys[a][owner]) * slope[owner]
        return crossing

    outer, bent = edge(0, 2), np.where(centre < ys[1][owner], edge(0, 1), edge(1, 2))
    start = np.clip(np.ceil(np.minimum(outer, bent) - 0.5), 0, size).astype(np.int32)
    stop = np.clip(np.ceil(np.maximum(outer, bent) - 0.5), 0, size).astype(np.int32)
    slope_x, slope_y = gradients(depth, x, y)
    span_depth = (depth[0] - slope_x * x[0] - slope_y * y[0])[owner] + slope_y[owner] * centre
    span_depth += slope_x[owner] * (start.astype(np.float32) + np.float32(0.5))
    widths = stop - start
    span = np.repeat(np.arange(len(owner), dtype=np.int32), widths)
    step = np.arange(len(span), dtype=np.int32) - (np.cumsum(widths) - widths)[span]
    pixel = (row * size + start)[span] + step
    pixel_depth = span_depth[span] + slope_x[owner][span] * step.astype(np.float32)
    nearest = np.full(size * size, -np.inf, np.float32)
    np.maximum.at(nearest, pixel, pixel_depth)
    visible = pixel_depth == nearest[pixel]
    result = np.full(size * size, -1, np.int32)
    result[pixel[visible]] = owner[span[visible]]
    return result
