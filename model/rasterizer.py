"""Gaussians to pictures, in plain torch, with gradients: tiles of pixels, each with the ellipses that can change it.

m ellipses, P pairs of a tile and an ellipse, V cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.blending import Tiles, blend
from model.errors import RangeError, ShapeError
from model.projection import PUBLISHED_TILE, AnySplats, Ellipses, as_tensors, check_camera, project

MAX_PAIRS = 1 << 25

_TILES = (4, 8, 16, 32)
# What a pair costs besides its pixels, in pixels: fits tests/bench/splat_render.py.
_PAIR_COST = 32


class Rendering(NamedTuple):
    """What one camera sees."""

    colour: Tensor
    """[H, W, 3], over the background, not clamped."""
    alpha: Tensor
    """[H, W], 0..1: the share of a pixel that is not background."""


def render(
    splats: AnySplats,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    height: int,
    width: int,
    background: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
    exact: bool = False,
) -> Rendering:
    """Draw Gaussians as one camera sees them; gradients reach all five tensors and the background.

    world_to_camera: [4, 4], axes of OpenCV. intrinsics: [3, 3], 0..1 across the picture from its top left corner, no
    skew. No gradients for the camera. exact: cut Gaussians where published pictures do (16 x 16 tiles within three
    standard deviations) instead of where they fade below 1/255. Raises ShapeError or RangeError.
    """
    check_camera(world_to_camera, intrinsics, height, width)
    tensors = as_tensors(splats, world_to_camera.device)
    behind = torch.as_tensor(background).to(tensors.positions)
    if behind.shape != (3,):
        raise ShapeError(f"background {list(behind.shape)}; wanted RGB, [3]")
    ellipses = project(tensors, world_to_camera.detach(), intrinsics.detach(), height, width, exact=exact)
    tiles = _sort_into_tiles(ellipses, height, width, PUBLISHED_TILE if exact else None)
    blended = blend(torch.cat([ellipses.shapes, ellipses.colours], dim=1), tiles, height, width)
    return Rendering(blended[..., :3] + (1 - blended[..., 3:]) * behind, blended[..., 3])


def render_many(
    splats: AnySplats,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    height: int,
    width: int,
    background: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
) -> Tensor:
    """Colours [V, H, W, 3] of V cameras, world_to_camera [V, 4, 4] and intrinsics [V, 3, 3]; else like render."""
    if world_to_camera.ndim != 3 or len(intrinsics) != len(world_to_camera) or not len(intrinsics):
        raise ShapeError(
            f"world_to_camera {list(world_to_camera.shape)}, intrinsics {list(intrinsics.shape)}; wanted [V, 4, 4] and "
            "[V, 3, 3], V > 0"
        )
    tensors = as_tensors(splats, world_to_camera.device)
    cameras = zip(world_to_camera, intrinsics, strict=True)
    return torch.stack(
        [render(tensors, *camera, height=height, width=width, background=background).colour for camera in cameras]
    )


@torch.no_grad()
def _sort_into_tiles(ellipses: Ellipses, height: int, width: int, side: int | None) -> Tiles:
    low, high = ellipses.low, ellipses.high
    # float64 counts exactly, and what does not fit into an integer too.
    pairs = {s: float((high // s - low // s + 1).double().prod(dim=1).sum()) for s in ((side,) if side else _TILES)}
    side = min(pairs, key=lambda s: pairs[s] * (s * s + _PAIR_COST))
    if pairs[side] > MAX_PAIRS:
        raise RangeError(
            f"{len(low)} Gaussians cover {pairs[side]:.0f} tiles of {side} x {side} pixels; at most {MAX_PAIRS}: "
            "draw a smaller picture, or fewer or smaller Gaussians"
        )
    across, down = -(-width // side), -(-height // side)
    first, last = low // side, high // side
    columns, rows = (last - first + 1).unbind(1)
    count = (columns * rows).long()
    ellipse = torch.repeat_interleave(count)
    begin = first[:, 1] * across + first[:, 0]
    # A pair's place in the rectangle of its ellipse, counted along rows.
    within = torch.arange(len(ellipse), device=low.device, dtype=torch.int32) - (count.cumsum(0) - count).int()[ellipse]
    wide = columns[ellipse]
    row = within // wide
    tile, order = torch.sort(begin[ellipse] + row * across + (within - row * wide), stable=True)
    counts = torch.bincount(tile, minlength=across * down)
    starts = counts.cumsum(0) - counts
    place = torch.sort(counts, descending=True, stable=True).indices[: int((counts > 0).sum())]
    return Tiles(side, place, starts[place], counts[place], ellipse[order])
