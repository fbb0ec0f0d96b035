"""Pixels to patches and back, with a record that undoes it exactly.

T, H, W: frames, rows, columns of pixels; (t, h, w): the token grid; P: values of a patch (3072).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from media.types import Fit, Image, Int32Array, Item, Layout, UInt8Array, Video, Voxels
from model.config import VOXEL_GRID, ModelConfig
from model.errors import RangeError, ShapeError

VOXEL_T = 1
"""Voxels live at t = 1, not 0, as published."""


def layout_of(item: Item, config: ModelConfig, fit: Fit = "pad") -> Layout:
    """Sizes and token grid of an item. fit="pad" keeps every pixel; "crop" is the published crop-and-drop.

    Raises ShapeError for arrays that are no item, RangeError for voxels outside of the grid.
    """
    if isinstance(item, Voxels):
        _check_voxels(item, config)
        return Layout(kind="voxels", frames=0, height=0, width=0, grid=(0, 0, 0))
    if not isinstance(item, Image | Video):
        raise ShapeError(f"an item of type {type(item).__name__}; wanted Image, Video or Voxels of media.types")
    count, height, width = _frames(item).shape[:3]
    if isinstance(item, Image):
        return pixel_layout(count, height, width, config, fit)
    return pixel_layout(count, height, width, config, fit, kind="video", fps=item.fps)


def pixel_layout(
    frames: int,
    height: int,
    width: int,
    config: ModelConfig,
    fit: Fit = "pad",
    *,
    kind: Literal["image", "video"] = "image",
    fps: float | None = None,
) -> Layout:
    """Layout of an image or clip of this size; a crop may leave an empty grid.

    As published, a clip of one frame is an image; fit="pad" keeps it a clip, its frame repeated.
    """
    pt, ph, pw = config.patch
    if fit == "pad":
        grid = (-(-frames // pt), -(-height // ph), -(-width // pw))
    else:
        grid = (max(1, frames // pt), height // ph, width // pw)
        height, width = grid[1] * ph, grid[2] * pw
        kind = "image" if frames == 1 else "video"
        frames = 1 if frames == 1 else grid[0] * pt
    return Layout(kind=kind, frames=frames, height=height, width=width, grid=grid, fps=fps if kind == "video" else None)


def patchify(
    item: Item, layout: Layout, config: ModelConfig, *, t: slice | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Patches of an item in token order, float32 [n, P] in -1..1.

    t: the latent frames wanted (default all), so that a long clip need never be in float at once. A patch is (frame,
    row, column, channel), channel fastest. An image fills the first frame of its patches, the others are mid grey
    (0), as the network was trained. Source: facts 2; conformance/pixels.
    """
    rows = leading_patches(item, layout, config, t=t, device=device)
    return torch.nn.functional.pad(rows, (0, config.patch_values - rows.shape[1]))


def leading_patches(
    item: Item, layout: Layout, config: ModelConfig, *, t: slice | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """The same without the values that are 0 in every patch: an image or voxel set has a quarter of them."""
    if isinstance(item, Voxels):
        return 2 * torch.from_numpy(np.array(item.feats, np.float32)).to(device) - 1
    pt, ph, pw = config.patch
    first, last, _ = (t or slice(None)).indices(layout.grid[0])
    frames = _frames(item)
    if layout.kind == "image" or len(frames) < layout.frames:
        pixels = frames  # fewer frames than a patch has: the rest stays grey
    else:
        pixels = _pad_last(frames[first * pt : min(last * pt, layout.frames)], (last - first) * pt, axis=0)
    h, w = layout.grid[1:]
    for axis, size, padded in ((1, layout.height, h * ph), (2, layout.width, w * pw)):
        margin = (pixels.shape[axis] - size) // 2  # of the centre crop; 0 with fit="pad"
        pixels = _pad_last(pixels.take(range(margin, margin + size), axis) if margin else pixels, padded, axis)
    depth = min(pt, len(pixels))
    # [t, dt, h, dy, w, dx, 3] to [t, h, w, dt, dy, dx, 3], while the values are still bytes.
    tiles = pixels.reshape(len(pixels) // depth, depth, h, ph, w, pw, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    rows = torch.from_numpy(np.array(tiles, order="C").reshape((last - first) * h * w, depth * ph * pw * 3)).to(device)
    return rows.float().div_(127.5).sub_(1)


def coords_of(item: Item, layout: Layout) -> Int32Array:
    """int32 [n, 4], t x y z: raster order for pixels (t slowest, then patch row x, patch column y), else the voxels."""
    if isinstance(item, Voxels):
        t = np.full((len(item.coords), 1), VOXEL_T, np.int32)
        return np.concatenate([t, item.coords.astype(np.int32)], axis=1)
    return raster_coords(layout.grid)


def raster_coords(grid: tuple[int, int, int], first_t: int = 0) -> Int32Array:
    """Coordinates of a full token grid (t, h, w): int32 [t h w, 4], t counted from first_t."""
    t, x, y = (axis.reshape(-1) for axis in np.indices(grid, dtype=np.int32))
    return np.stack([t + np.int32(first_t), x, y, np.zeros_like(t)], axis=1)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], config: ModelConfig) -> Tensor:
    """Inverse of patchify for a full grid. patches: [t h w, P], or the leading values of whole frames.

    Returns [T, H, W, 3] of the padded size.
    """
    t, h, w = grid
    _, ph, pw = config.patch
    pt = patches.shape[1] // config.frame_values
    tiles = patches.reshape(t, h, w, pt, ph, pw, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return tiles.reshape(t * pt, h * ph, w * pw, 3)


def to_uint8(pixels: Tensor, *, truncate: bool = False) -> UInt8Array:
    """-1..1 to 0..255, clamped. Rounds; truncate=True is the published conversion, which loses a level now and then."""
    # The cast truncates, so half a level more makes it round.
    levels = (pixels.float() + 1).div_(2).mul_(255) if truncate else pixels.float().mul(127.5).add_(128)
    array: UInt8Array = levels.clamp_(0, 255).to(torch.uint8).cpu().numpy()
    return array


def _frames(item: Image | Video) -> UInt8Array:
    pixels = item.pixels[None] if isinstance(item, Image) and item.pixels.ndim == 3 else getattr(item, "frames", None)
    if pixels is None or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape or pixels.dtype != np.uint8:
        given = getattr(item, "pixels", pixels)
        shape, dtype = (given.shape, given.dtype) if given is not None else (None, None)
        raise ShapeError(
            f"{item.kind} of shape {shape}, {dtype}; wanted uint8 [H, W, 3] or [T, H, W, 3], none of them 0"
        )
    return pixels


def _pad_last(pixels: UInt8Array, size: int, axis: int) -> UInt8Array:
    """Repeat the last frame, row or column up to `size`; cut what is over."""
    missing = size - pixels.shape[axis]
    if missing <= 0:
        return pixels.take(range(size), axis) if missing else pixels
    last = pixels.take([-1], axis)
    return np.concatenate([pixels, last.repeat(missing, axis)], axis)


def _check_voxels(item: Voxels, config: ModelConfig) -> None:
    n, values = len(item.coords), config.frame_values
    if item.coords.shape != (n, 3) or item.feats.shape != (n, values) or n == 0:
        raise ShapeError(
            f"voxel coords {item.coords.shape} and feats {item.feats.shape}; wanted [n, 3] and [n, {values}]"
        )
    if item.coords.min() < 0 or item.coords.max() >= VOXEL_GRID:
        raise RangeError(f"voxel coords from {item.coords.min()} to {item.coords.max()}; wanted 0 to {VOXEL_GRID - 1}")
    if not np.isfinite(item.feats).all():
        raise RangeError("voxel feats that are not finite; wanted 0 to 1")
