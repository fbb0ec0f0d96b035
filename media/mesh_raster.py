"""Which triangle each pixel of a picture sees, and how deep it lies: a z-buffer in numpy, without a window or a GPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from media.types import Float32Array, Int32Array

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CHUNK_PAIRS = 1 << 17
"""Triangles times pixels of one step."""
NEAREST = 1e-3


class Seen(NamedTuple):
    """S: side. triangle: int32 [S, S], -1 where there is none. depth: float32 [S, S], planar, -1 where there is none.
    weights: float32 [S, S, 3], of the triangle's corners, true in space.
    """

    triangle: Int32Array
    depth: Float32Array
    weights: Float32Array


class Holes:
    """What says which spots of a surface are cut out; the plain one cuts out none."""

    def are_solid(self, triangles: Int32Array, weights: Float64) -> npt.NDArray[np.bool_]:
        """Whether the spots, [n] triangles with [n, 3] weights, hide what lies behind."""
        return np.ones(len(triangles), bool)


def rasterize(points: Float64, faces: Int32Array, side: int, holes: Holes | None = None) -> Seen:
    """Draw triangles. points: [P, 3], x and y in pixels (a pixel is sampled at whole numbers), z planar depth.

    faces: [F, 3]. Triangles that reach nearer than the camera's plane are left out.
    """
    inverse = np.zeros(side * side)
    drawn = np.full(side * side, -1, np.int32)
    index, low, high = _meet_samples(points, faces, side)
    corners = points[faces[index]]
    wide, tall = (high - low + 1).T
    pairs = wide * tall
    start = 0
    ends = np.cumsum(pairs)
    while start < len(index):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK_PAIRS, side="right")))
        part = slice(start, stop)
        owner, pixel, near, flat = _covered(corners[part], low[part], wide[part], pairs[part], side)
        if holes is not None:
            weights = (flat / corners[part][:, :, 2].T[:, owner] / near).T
            solid = holes.are_solid(index[part][owner].astype(np.int32), weights)
            owner, pixel, near = owner[solid], pixel[solid], near[solid]
        before = inverse[pixel]
        np.maximum.at(inverse, pixel, near)
        won = (near == inverse[pixel]) & (near > before)
        drawn[pixel[won]] = owner[won] + start
        start = stop
    return _resolve(corners, index, drawn, side)


def _meet_samples(points: Float64, faces: Int32Array, side: int) -> tuple[Int64, Int64, Int64]:
    """Triangles whose boxes hold a sample, [n], and the first and the last column and row there, [n, 2].

    Column by column, and before anything is gathered: most triangles of a large mesh fall between the samples.
    """
    fine = np.isfinite(points).all(axis=1) & (points[:, 2] > NEAREST)
    seen = fine[faces[:, 0]] & fine[faces[:, 1]] & fine[faces[:, 2]]
    index = np.flatnonzero(seen)
    lows, highs = [], []
    for axis in (0, 1):
        a, b, c = (points[:, axis][faces[index, corner]] for corner in range(3))
        lows.append(np.ceil(np.minimum(np.minimum(a, b), c)))
        highs.append(np.floor(np.maximum(np.maximum(a, b), c)))
    meets = np.ones(len(index), bool)
    for first, last in zip(lows, highs, strict=True):
        meets &= (last >= 0) & (first <= side - 1) & (first <= last)
    low, high = (np.stack([end[meets] for end in ends], axis=1).clip(0, side - 1) for ends in (lows, highs))
    return index[meets], low.astype(np.int64), high.astype(np.int64)


def _covered(
    corners: Float64, low: Int64, wide: Int64, pairs: Int64, side: int
) -> tuple[Int64, Int64, Float64, Float64]:
    """Every sample inside of a triangle: which triangle, which pixel, 1 / z there, and the weights in the picture."""
    owner = np.repeat(np.arange(len(corners)), pairs)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    x = low[owner, 0] + within % wide[owner]
    y = low[owner, 1] + within // wide[owner]
    flat = _flat_weights(corners, owner, x, y)
    inside = (flat >= 0).all(axis=0)
    owner, flat = owner[inside], flat[:, inside]
    # 1 / z is linear in the picture.
    near = (flat / corners[:, :, 2].T[:, owner]).sum(axis=0)
    return owner, y[inside] * side + x[inside], near, flat


def _flat_weights(corners: Float64, owner: Int64, x: Int64, y: Int64) -> Float64:
    """Weights of the corners in the picture, [3, n]; NaN or negative outside, all NaN without area."""
    (ax, ay), (bx, by), (cx, cy) = (corners[:, corner, :2].T for corner in range(3))
    with np.errstate(all="ignore"):
        area = 1 / ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
    # Planes a + b x + c y of two weights; the third is what is left.
    with np.errstate(all="ignore"):
        first = ((bx * cy - cx * by) * area)[owner] + ((by - cy) * area)[owner] * x + ((cx - bx) * area)[owner] * y
        second = ((cx * ay - ax * cy) * area)[owner] + ((cy - ay) * area)[owner] * x + ((ax - cx) * area)[owner] * y
        third = 1 - first - second
    # A hair of slack: no gap may show between neighbours.
    flat = np.stack([first, second, third])
    flat[np.abs(flat) < 1e-9] = 0
    return flat


def _resolve(corners: Float64, index: Int64, drawn: Int32Array, side: int) -> Seen:
    pixel = np.flatnonzero(drawn >= 0)
    used, owner = np.unique(drawn[pixel], return_inverse=True)
    over = _flat_weights(corners[used], owner, pixel % side, pixel // side) / corners[used][:, :, 2].T[:, owner]
    near = over.sum(axis=0)
    triangle = np.full(side * side, -1, np.int32)
    triangle[pixel] = index[drawn[pixel]]
    depth = np.full(side * side, -1, np.float32)
    depth[pixel] = 1 / near
    weights = np.zeros((side * side, 3), np.float32)
    weights[pixel] = (over / near).T
    return Seen(triangle.reshape(side, side), depth.reshape(side, side), weights.reshape(side, side, 3))
