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


def rasterize(corners: Float64, side: int, holes: Holes | None = None) -> Seen:
    """Draw triangles. corners: [F, 3, 3], x and y in pixels (a pixel is sampled at whole numbers), z planar depth.

    Triangles that reach nearer than the camera's plane are left out.
    """
    inverse = np.zeros(side * side)
    triangle = np.full(side * side, -1, np.int32)
    with np.errstate(all="ignore"):
        low = np.ceil(corners[:, :, :2].min(axis=1))
        high = np.floor(corners[:, :, :2].max(axis=1))
    ahead = (corners[:, :, 2].min(axis=1) > NEAREST) & np.isfinite(corners).all(axis=(1, 2))
    seen = ahead & (high >= 0).all(axis=1) & (low <= side - 1).all(axis=1) & (low <= high).all(axis=1)
    index = np.flatnonzero(seen)
    low, high = (ends[index].clip(0, side - 1).astype(np.int64) for ends in (low, high))
    wide, tall = (high - low + 1).T
    pairs = wide * tall
    start = 0
    ends = np.cumsum(pairs)
    while start < len(index):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK_PAIRS, side="right")))
        _draw(
            corners,
            index[start:stop],
            low[start:stop],
            wide[start:stop],
            pairs[start:stop],
            side,
            holes,
            inverse,
            triangle,
        )
        start = stop
    return _resolve(corners, triangle, side)


def _draw(
    corners: Float64,
    index: Int64,
    low: Int64,
    wide: Int64,
    pairs: Int64,
    side: int,
    holes: Holes | None,
    inverse: Float64,
    triangle: Int32Array,
) -> None:
    owner = np.repeat(np.arange(len(index)), pairs)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    x = low[owner, 0] + within % wide[owner]
    y = low[owner, 1] + within // wide[owner]
    flat = _flat_weights(corners[index], owner, x, y)
    inside = (flat >= 0).all(axis=1)
    owner, x, y, flat = owner[inside], x[inside], y[inside], flat[inside]
    # 1 / z is linear in the picture.
    near = (flat / corners[index][owner, :, 2]).sum(axis=1)
    if holes is not None:
        solid = holes.are_solid(index[owner].astype(np.int32), flat / corners[index][owner, :, 2] / near[:, None])
        owner, x, y, near = owner[solid], x[solid], y[solid], near[solid]
    pixel = y * side + x
    before = inverse[pixel]
    np.maximum.at(inverse, pixel, near)
    won = (near == inverse[pixel]) & (near > before)
    triangle[pixel[won]] = index[owner[won]]


def _flat_weights(corners: Float64, owner: Int64, x: Int64, y: Int64) -> Float64:
    """Weights of the corners in the picture; NaN or negative outside, all NaN for a triangle without area."""
    (ax, ay), (bx, by), (cx, cy) = (corners[:, corner, :2].T for corner in range(3))
    with np.errstate(all="ignore"):
        area = 1 / ((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))
    # Planes a + b x + c y of two weights; the third is what is left.
    with np.errstate(all="ignore"):
        first = ((bx * cy - cx * by) * area)[owner] + ((by - cy) * area)[owner] * x + ((cx - bx) * area)[owner] * y
        second = ((cx * ay - ax * cy) * area)[owner] + ((cy - ay) * area)[owner] * x + ((ax - cx) * area)[owner] * y
        third = 1 - first - second
    # A hair of slack: no gap may show between neighbours.
    flat = np.stack([first, second, third], axis=1)
    flat[np.abs(flat) < 1e-9] = 0
    return flat


def _resolve(corners: Float64, triangle: Int32Array, side: int) -> Seen:
    pixel = np.flatnonzero(triangle >= 0)
    owners = triangle[pixel]
    used, owner = np.unique(owners, return_inverse=True)
    flat = _flat_weights(corners[used], owner, pixel % side, pixel // side)
    over = flat / corners[owners][:, :, 2]
    near = over.sum(axis=1)
    depth = np.full(side * side, -1, np.float32)
    depth[pixel] = 1 / near
    weights = np.zeros((side * side, 3), np.float32)
    weights[pixel] = over / near[:, None]
    return Seen(triangle.reshape(side, side), depth.reshape(side, side), weights.reshape(side, side, 3))
