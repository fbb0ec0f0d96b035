"""Gaussian splats to a picture: tiles of 8 x 8 pixels, each blending its Gaussians from near to far. Differentiable.

The same sums as the published renderer (a rasteriser with mip-style 2D filter), in plain torch, on any device.
M: Gaussians. P: pairs of a tile and a Gaussian that may touch it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import gsplat_cuda
from model.errors import RangeError, ShapeError
from model.projection import Footprints, project
from model.splats import Splats

TILE = 8
CHUNK = 32
"""Gaussians that a tile blends at once."""
GROUP_VALUES = 1 << 21
"""Tile, Gaussian and pixel combinations of one step: its temporaries stay near 8 MB."""
FAINTEST = 1 / 255
MOST = 0.99
LAST_LIGHT = 1e-4
"""A pixel that lets less of what lies behind through is done."""


class Rendering(NamedTuple):
    """colour: [H, W, 3], not cut to 0..1. alpha: [H, W], how much of the background is covered."""

    colour: Tensor
    alpha: Tensor


def render(
    splats: Splats,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    height: int,
    width: int,
    background: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Rendering:
    """Draw Gaussians from one camera, in the float type of the splats.

    world_to_camera: [4, 4], OpenCV axes. intrinsics: [3, 3], normalised (u and v are 0..1 across the picture).
    background: RGB. On CUDA in float32 gsplat draws, if it is installed. Gradients reach all attributes of the splats.
    Raises ShapeError, RangeError.
    """
    if world_to_camera.shape != (4, 4) or intrinsics.shape != (3, 3):
        raise ShapeError(
            f"world_to_camera {tuple(world_to_camera.shape)} and intrinsics {tuple(intrinsics.shape)}; "
            "wanted [4, 4] and [3, 3]"
        )
    if height < 1 or width < 1:
        raise RangeError(f"a picture of {width} x {height} pixels; wanted at least 1 x 1")
    library = gsplat_cuda.find() if splats.xyz01.is_cuda and splats.xyz01.dtype == torch.float32 else None
    if library is not None:
        return Rendering(
            *gsplat_cuda.render(
                library, splats, world_to_camera, intrinsics, height=height, width=width, background=background
            )
        )
    found = project(splats, world_to_camera, intrinsics, height=height, width=width)
    return _blend(found, height, width, background)


def _blend(found: Footprints, height: int, width: int, background: tuple[float, float, float]) -> Rendering:
    rows, columns = -(-height // TILE), -(-width // TILE)
    values = found.values
    owners, starts, counts = _tiles_of(found, rows, columns)
    colour = values.new_zeros(rows * columns, TILE * TILE, 3)
    light = values.new_ones(rows * columns, TILE * TILE)
    order = counts.argsort(descending=True, stable=True)
    busy = order[: int((counts > 0).sum())]
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    at = 0
    while at < len(busy):
        room = max(1, GROUP_VALUES // (CHUNK * TILE * TILE))
        tiles = busy[at : at + room]
        at += len(tiles)
        arguments = (values, owners, starts[tiles], counts[tiles], _pixels_of(tiles, columns, values))
        if torch.is_grad_enabled() and values.requires_grad:
            # Recomputed in the backward pass: the pairs of a whole picture would fill the memory.
            shone, left = checkpoint(_blend_tiles, *arguments, use_reentrant=False)
        else:
            shone, left = _blend_tiles(*arguments)
        parts.append((tiles, shone, left))
    if parts:
        index = torch.cat([tiles for tiles, _, _ in parts])
        colour = colour.index_copy(0, index, torch.cat([shone for _, shone, _ in parts]))
        light = light.index_copy(0, index, torch.cat([left for _, _, left in parts]))
    else:
        colour = colour + values.sum()  # of nothing: 0, but with a gradient for whoever asks
    colour = colour + light[..., None] * values.new_tensor(background)

    def picture(flat: Tensor) -> Tensor:
        grid = flat.unflatten(0, (rows, columns)).unflatten(2, (TILE, TILE)).transpose(1, 2)
        return grid.flatten(0, 1).flatten(1, 2)[:height, :width]

    return Rendering(picture(colour), 1 - picture(light))


def _tiles_of(found: Footprints, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussians of all tiles, near to far, [P]; where each tile's begin, and how many they are, [rows * columns]."""
    with torch.no_grad():
        low_x, high_x = _tile_range(found.centres[:, 0], found.reach[:, 0], columns)
        low_y, high_y = _tile_range(found.centres[:, 1], found.reach[:, 1], rows)
        wide, tall = (high_x - low_x).clamp(min=0), (high_y - low_y).clamp(min=0)
        pairs = wide * tall
        owners = torch.repeat_interleave(torch.arange(len(pairs), device=pairs.device), pairs)
        within = torch.arange(len(owners), device=pairs.device) - (pairs.cumsum(0) - pairs)[owners]
        across = wide[owners]
        tile = (low_y[owners] + within // across) * columns + low_x[owners] + within % across
        # Stable: the Gaussians come sorted by depth, and stay so inside each tile.
        tile, order = tile.sort(stable=True)
        counts = torch.bincount(tile, minlength=rows * columns)
        return owners[order], counts.cumsum(0) - counts, counts


def _tile_range(centre: Tensor, reach: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """First tile and the one behind the last that an interval of pixels touches."""
    low = ((centre - reach).ceil() / TILE).floor().clamp(0, tiles).long()
    high = (((centre + reach).floor() / TILE).floor() + 1).clamp(0, tiles).long()
    return low, high


def _pixels_of(tiles: Tensor, columns: int, like: Tensor) -> Tensor:
    """Coordinates (x, y) of the pixels of each tile, [tiles, 2, TILE * TILE]; a pixel's centre is a whole number."""
    inside = torch.arange(TILE * TILE, device=tiles.device)
    x = (tiles % columns * TILE)[:, None] + inside % TILE
    y = (tiles // columns * TILE)[:, None] + inside // TILE
    return torch.stack([x, y], dim=1).to(like.dtype)


def _blend_tiles(
    values: Tensor, owners: Tensor, starts: Tensor, counts: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Colour [tiles, TILE^2, 3] and light that is left [tiles, TILE^2]; counts fall from tile to tile."""
    light = values.new_ones(len(starts), TILE * TILE)
    live = torch.ones_like(light, dtype=torch.bool)
    colour = values.new_zeros(len(starts), TILE * TILE, 3)
    place = torch.arange(CHUNK, device=starts.device)
    for begin in range(0, int(counts[0]), CHUNK):
        # Tiles that still have Gaussians and a pixel that can change.
        some = ((counts > begin) & live.any(dim=1)).nonzero()[:, 0]
        if len(some) == 0:
            break
        there = place + begin < counts[some, None]
        index = (starts[some, None] + begin + place).clamp(max=len(owners) - 1)
        # index_select: its gradient adds up in place, that of values[...] sorts all pairs first.
        rows = values.index_select(0, owners[index].flatten()).unflatten(0, index.shape)
        x, y, xx, xy, yy, opacity, *rgb = rows.unsqueeze(-2).unbind(-1)
        across, down = pixels[some, 0, None, :] - x, pixels[some, 1, None, :] - y
        power = -0.5 * (xx * across * across + yy * down * down) - xy * across * down
        alpha = (opacity * power.clamp(max=0).exp()).clamp(max=MOST)
        counted = (alpha >= FAINTEST) & (power <= 0) & there[:, :, None] & live[some, None, :]
        alpha = torch.where(counted, alpha, 0)
        before = light[some]
        passed = torch.cat([before[:, None], (1 - alpha).cumprod(dim=1) * before[:, None]], dim=1)
        keep = passed[:, 1:] >= LAST_LIGHT
        weight = alpha * passed[:, :-1] * keep
        shone = torch.bmm(weight.transpose(1, 2), torch.cat(rgb, dim=-1))
        colour = colour.index_add(0, some, shone)
        light = light.index_copy(0, some, passed.gather(1, keep.sum(dim=1, keepdim=True))[:, 0])
        live = live.index_copy(0, some, live[some] & keep.all(dim=1))
    return colour, light
