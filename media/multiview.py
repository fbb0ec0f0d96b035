"""Posed pictures with depth to voxels: the surface cells of a 64^3 grid, each with a patch of its nearest view.

As published, quirks included: the weights were trained on them. Only the random thinning of surface points beyond
500,000 is left out. The grid spans the cube [-0.5, 0.5]^3 of the world, z up. V: views, S: side of a depth map,
N: voxels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from media.cameras import Cameras
from media.errors import MediaError
from media.types import Float32Array, Int32Array, UInt8Array, Voxels

GRID = 64
PICTURE_SIDE = 256
PATCH = 16
PATCHES = PICTURE_SIDE // PATCH
FAR = 1e6
"""Depths above it mean that nothing was hit, like negative ones: renderers write 1e10 or infinity there."""

_HALF_CELL = np.float32(0.5 / GRID)


@dataclass(frozen=True, kw_only=True)
class Views:
    """V views of one object.

    images: V times uint8 [s, s, 3] or [s, s, 4], RGB or RGB with straight alpha, upright; their sides may differ.
    depths: V times floating [S, S], planar (along the camera's axis, not along the ray) in units of the world;
    negative or above 1e6 where there is no surface. Published files hold float16.
    """

    images: Sequence[UInt8Array]
    depths: Sequence[npt.NDArray[np.floating]]
    cameras: Cameras


class Choice(NamedTuple):
    """Where each voxel's patch comes from. Rows and columns outside of 0..15 lie outside of the picture."""

    view: Int32Array  # [N]
    row: Int32Array  # [N]
    column: Int32Array  # [N]
    uv: Float32Array  # [N, 2], the voxel's centre in that picture, 0..1 across it


def voxelize(views: Views) -> Voxels:
    """Occupied cells, in the order of x, then y, then z, with 16 x 16 RGB of the nearest view each.

    Raises MediaError for bad cameras, pictures or depth maps, counts that differ, and an object that fills no voxel.
    """
    _check(views)
    surface, outside = 0, 0
    low, high = np.full(3, np.inf, np.float32), np.full(3, -np.inf, np.float32)
    occupied = np.zeros(GRID**3, bool)
    for points in surface_points(views):
        is_inside = (np.abs(points) <= 0.5).all(axis=1)
        inside = points if is_inside.all() else points.T.compress(is_inside, axis=1).T
        _mark(occupied, inside)
        surface, outside = surface + len(points), outside + len(points) - len(inside)
        if len(points):
            low, high = np.minimum(low, points.min(axis=0)), np.maximum(high, points.max(axis=0))
    if not occupied.any():
        raise _empty(len(views.depths), surface, low, high)
    coords = np.stack(np.unravel_index(np.flatnonzero(occupied), (GRID,) * 3), axis=1).astype(np.int32)
    choice = choose_patches(coords, views.cameras)
    feats, beside = _gather(prepare_images(views.images), choice)
    notes = []
    if outside:
        notes.append(f"{outside} of {surface} surface pixels lie outside of the cube and are ignored")
    if beside:
        notes.append(f"{beside} of {len(coords)} voxels lie outside of their nearest view's picture and are black")
    return Voxels(coords=coords, feats=feats, notes=tuple(notes))


def surface_points(views: Views) -> Iterator[Float32Array]:
    """Points of the world that the depth maps show, float32 [n, 3], one array a view, in raster order.

    A pixel stands for its top left corner, as published, though renderers sample depth at its centre.
    """
    for depth, extrinsic, intrinsic in zip(
        views.depths, views.cameras.world_to_camera, views.cameras.intrinsics, strict=True
    ):
        to_world = np.linalg.inv(extrinsic.astype(np.float64))
        ray = (to_world[:3, :3] @ np.linalg.inv(intrinsic.astype(np.float64))).astype(np.float32)
        origin = to_world[:3, 3].astype(np.float32)
        with np.errstate(over="ignore"):
            depth = depth.astype(np.float32)
        rows, columns = np.nonzero((depth >= 0) & (depth <= FAR))
        distance = depth[rows, columns]
        u, v = (index.astype(np.float32) / np.float32(len(depth)) for index in (columns, rows))
        # Each axis in one piece: rows of three are reduced ten times more slowly.
        points = np.empty((3, len(distance)), np.float32).T
        for axis in range(3):
            points[:, axis] = (u * ray[axis, 0] + v * ray[axis, 1] + ray[axis, 2]) * distance + origin[axis]
        yield points


def choose_patches(coords: Int32Array, cameras: Cameras) -> Choice:
    """The view that has a voxel's centre at the smallest planar depth (the first of equals), and the patch there.

    As published there is no test whether that view sees the voxel at all. Patches are picked by rounding 15 u, half
    to even, not by the cell 16 u.
    """
    centres = _centre(coords)
    nearest = np.full((len(coords), 3), np.inf, np.float32)
    view = np.zeros(len(coords), np.int32)
    for number, (extrinsic, intrinsic) in enumerate(zip(cameras.world_to_camera, cameras.intrinsics, strict=True)):
        projection = intrinsic @ extrinsic[:3]
        seen = centres @ projection[:, :3].T + projection[:, 3]
        closer = seen[:, 2] < nearest[:, 2]
        nearest[closer], view[closer] = seen[closer], number
    # A centre in the plane of its camera has no finite place; any number outside of the picture will do.
    with np.errstate(all="ignore"):
        uv = nearest[:, :2] / nearest[:, 2:]
        places = np.clip(np.nan_to_num(np.rint((PATCHES - 1) * uv), nan=-1), -PATCHES, 2 * PATCHES).astype(np.int32)
    return Choice(view, places[:, 1], places[:, 0], uv)


def prepare_images(images: Sequence[UInt8Array]) -> UInt8Array:
    """Resize to uint8 [V, 256, 256, 3] as published: Lanczos on colours weighted by alpha, then alpha is dropped."""
    out = np.empty((len(images), PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
    for target, pixels in zip(out, images, strict=True):
        picture = PILImage.fromarray(np.ascontiguousarray(pixels))
        resized = picture.resize((PICTURE_SIDE, PICTURE_SIDE), PILImage.Resampling.LANCZOS)
        target[:] = np.asarray(resized)[..., :3]
    return out


def _check(views: Views) -> None:
    views.cameras.check()
    counts = (len(views.images), len(views.depths), len(views.cameras))
    if len(set(counts)) > 1 or not counts[0]:
        raise MediaError(
            "view_mismatch",
            f"{counts[0]} images, {counts[1]} depth maps, {counts[2]} cameras; a view is one of each",
        )
    for view, (pixels, depth) in enumerate(zip(views.images, views.depths, strict=True)):
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or 0 in pixels.shape:
            raise MediaError(
                "invalid_parameter",
                f"view {view}: an image must be uint8 [s, s, 3 or 4], not {pixels.dtype} {pixels.shape}",
            )
        if not np.issubdtype(depth.dtype, np.floating) or depth.ndim != 2 or 0 in depth.shape:
            raise MediaError(
                "invalid_parameter", f"view {view}: depth must be floating [S, S], not {depth.dtype} {depth.shape}"
            )
        for what, shape in (("image", pixels.shape), ("depth map", depth.shape)):
            if shape[0] != shape[1]:
                raise MediaError("view_mismatch", f"view {view}: the {what} is {shape[1]}x{shape[0]}; only squares fit")
        if depth.shape != views.depths[0].shape:
            raise MediaError(
                "view_mismatch",
                f"view {view}: the depth map's side is {len(depth)}, that of view 0 is {len(views.depths[0])}",
            )
        if np.isnan(depth).any():
            row, column = np.argwhere(np.isnan(depth))[0]
            raise MediaError("non_finite_input", f"view {view}: depth row {row}, column {column} is NaN")


def _centre(index: Int32Array) -> Float32Array:
    # Exact in float32.
    return (2 * index + 1).astype(np.float32) / np.float32(2 * GRID) - np.float32(0.5)


def _mark(occupied: npt.NDArray[np.bool_], points: Float32Array) -> None:
    """Set the cells of points inside the cube. A point on a face is in both cells, at an edge in four."""
    # A cell is hit by |centre - p| <= half a cell in float32, as published. The floor finds it, or, where the sum is
    # rounded up onto a face, the one after it; it is never too low.
    guess = np.minimum(np.floor((points + np.float32(0.5)) * GRID).astype(np.int32), GRID - 1)
    first = guess - ((guess > 0) & (np.abs(points - _centre(guess - 1)) <= _HALF_CELL))
    last = guess - (np.abs(points - _centre(guess)) > _HALF_CELL)
    occupied[_flat(first)] = True
    shared = (first != last).any(axis=1)
    ends = np.stack([first[shared], last[shared]])
    for corner in product((0, 1), repeat=3):
        occupied[_flat(np.stack([ends[end, :, axis] for axis, end in enumerate(corner)], axis=1))] = True


def _flat(cells: Int32Array) -> Int32Array:
    return (cells[:, 0] * GRID + cells[:, 1]) * GRID + cells[:, 2]


def _gather(pictures: UInt8Array, choice: Choice) -> tuple[Float32Array, int]:
    """Patches in 0..1, float32 [N, 768], and how many voxels have none and are black."""
    cut = pictures.reshape(-1, PATCHES, PATCH, PATCHES, PATCH, 3).swapaxes(2, 3).reshape(-1, PATCH * PATCH * 3)
    table = np.concatenate([cut.astype(np.float32) / np.float32(255), np.zeros((1, cut.shape[1]), np.float32)])
    inside = (np.minimum(choice.row, choice.column) >= 0) & (np.maximum(choice.row, choice.column) < PATCHES)
    rows = np.where(inside, (choice.view * PATCHES + choice.row) * PATCHES + choice.column, len(table) - 1)
    return table[rows], int((~inside).sum())


def _empty(views: int, surface: int, low: Float32Array, high: Float32Array) -> MediaError:
    if not surface:
        return MediaError("empty_object", f"none of the {views} depth maps shows a surface (a depth of 0 to {FAR:g})")
    spans = ", ".join(f"{name} {a:.3g} to {b:.3g}" for name, a, b in zip("xyz", low, high, strict=True))
    return MediaError(
        "empty_object",
        f"the object fills no voxel: its {surface} surface pixels lie at {spans}, all outside of -0.5 to 0.5",
    )
