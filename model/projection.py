"""Gaussians in space to ellipses on the picture of one camera: which of them show, where, how large, how opaque.

M Gaussians, m of them visible. Pixel (row, column) has its centre at the integers (column, row). Source: mip-splatting,
as the published renderer of AToken's Gaussians does it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from media.types import Gaussians
from model.errors import RangeError, ShapeError
from model.splats import SH_DEGREE_0, rotation_matrices

NEAR = 0.2
BLUR = 0.1
"""Variance in pixels^2 that every ellipse gets on top of its own, against aliasing."""
SMALLEST_ALPHA = 1 / 255
MAX_SIDE = 8192
PUBLISHED_TILE = 16

_SMALLEST_DETERMINANT = 1e-6
_WIDTHS = {"positions": 3, "colours": 3, "opacities": 1, "scales": 3, "rotations": 4}


class SplatTensors(NamedTuple):
    """M Gaussians after activation, all of one dtype (float32 or float64) and on one device.

    positions: [M, 3], in units of the world. colours: RGB [M, 3]. opacities: [M, 1], in 0..1. scales: standard
    deviations along the own axes [M, 3]. rotations: unit quaternions (w, x, y, z), [M, 4].
    """

    positions: Tensor
    colours: Tensor
    opacities: Tensor
    scales: Tensor
    rotations: Tensor


class SplatMethods(Protocol):
    """What computes those tensors, as model.splats.Splats does."""

    def positions(self) -> Tensor: ...  # noqa: D102

    def colours(self) -> Tensor: ...  # noqa: D102

    def opacities(self) -> Tensor: ...  # noqa: D102

    def scales(self) -> Tensor: ...  # noqa: D102

    def rotations(self) -> Tensor: ...  # noqa: D102


AnySplats: TypeAlias = SplatTensors | SplatMethods | Gaussians
"""Gaussians: the record that a PLY file is written from."""


class Ellipses(NamedTuple):
    """m visible Gaussians, nearest first; equal depths keep the order of the input."""

    shapes: Tensor
    """[m, 6]: column and row of the centre, inverse covariance (xx, xy, yy), logarithm of the largest alpha."""
    colours: Tensor
    """[m, 3]."""
    low: Tensor
    """First column and row that it can reach, [m, 2], whole numbers of 0 or more; without gradient."""
    high: Tensor
    """Last column and row, [m, 2], within the picture."""


def as_tensors(splats: AnySplats, device: torch.device) -> SplatTensors:
    """The five tensors, checked. device: where those of a record go; tensors stay where they are.

    Raises ShapeError, and RangeError for a number that is not finite.
    """
    if isinstance(splats, Gaussians):
        given = _from_record(splats, device)
    elif isinstance(splats, SplatTensors):
        given = splats
    else:
        given = SplatTensors(*(getattr(splats, name)() for name in _WIDTHS))
    first = given.positions
    for name, tensor, width in zip(_WIDTHS, given, _WIDTHS.values(), strict=True):
        if (
            tensor.shape != (len(first), width)
            or tensor.dtype != first.dtype
            or tensor.dtype not in (torch.float32, torch.float64)
        ):
            raise ShapeError(
                f"{name} {tensor.dtype} {list(tensor.shape)}; wanted [{len(first)}, {width}], float32 or float64 like "
                "the others"
            )
        if tensor.device != first.device:
            raise ShapeError(f"{name} on {tensor.device}, positions on {first.device}; wanted one device")
        if not tensor.isfinite().all():
            row = int(tensor.isfinite().all(dim=1).logical_not().nonzero()[0])
            raise RangeError(f"{name} row {row} is {tensor[row].tolist()}; only finite numbers can be drawn")
    return given


def check_camera(world_to_camera: Tensor, intrinsics: Tensor, height: int, width: int) -> None:
    """Raise ShapeError or RangeError for what is no camera, or no size of a picture."""
    for name, matrix, side in (("world_to_camera", world_to_camera, 4), ("intrinsics", intrinsics, 3)):
        if matrix.shape != (side, side) or not matrix.is_floating_point():
            raise ShapeError(f"{name} {matrix.dtype} {list(matrix.shape)}; wanted floats [{side}, {side}]")
        if not matrix.isfinite().all():
            raise RangeError(f"{name} has a number that is not finite")
    (fx, skew, _), (zero, fy, _), last = intrinsics.tolist()
    if min(fx, fy) <= 0 or skew != 0 or zero != 0 or last != [0, 0, 1]:
        raise RangeError(f"intrinsics {intrinsics.tolist()}; wanted [[fx, 0, cx], [0, fy, cy], [0, 0, 1]], fx, fy > 0")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise RangeError(f"a picture of {height} x {width}; a side is 1 to {MAX_SIDE} pixels")


def project(
    splats: SplatTensors, world_to_camera: Tensor, intrinsics: Tensor, height: int, width: int, *, exact: bool = False
) -> Ellipses:
    """The ellipses that can change a pixel.

    They reach as far as their alpha is 1/255 or more. exact: as far as in published pictures, which draw every 16 x 16
    tile that the square of three standard deviations meets, and nothing else.
    """
    camera = world_to_camera.to(splats.positions), intrinsics.to(splats.positions)
    size = splats.positions.new_tensor([width, height])
    with torch.no_grad():
        depth = splats.positions @ camera[0][2, :3] + camera[0][2, 3]
        near = (depth > NEAR).nonzero()[:, 0]
        # Depths are above 0, where floats are in the order of their bits: integers sort five times as fast.
        bits = depth[near].view(torch.int32 if depth.dtype == torch.float32 else torch.int64)
        rows = near[torch.sort(bits, stable=True).indices]
        chosen = SplatTensors(*(tensor.index_select(0, rows) for tensor in splats))
        shapes, blurred, determinant = _flatten(chosen, *camera, size)
        alpha = shapes[:, 5].exp()
        if exact:
            half = _published_radius(blurred)[:, None]
            low, high = shapes[:, :2] - half, shapes[:, :2] + half
            limit = (size / PUBLISHED_TILE).ceil() * PUBLISHED_TILE
        else:
            # Where alpha falls to 1/255; the rest is for rounding.
            half = (2 * (alpha / SMALLEST_ALPHA).log().clamp(min=0)[:, None] * blurred[:2].T).sqrt() + 0.01
            low, high = (shapes[:, :2] - half).ceil(), (shapes[:, :2] + half).floor()
            limit = size
        # NaN fails every comparison: what overflows is left out, before anything is differentiated.
        shows = (determinant > _SMALLEST_DETERMINANT) & (alpha >= SMALLEST_ALPHA)
        shows &= ((high >= low) & (high >= 0) & (low < limit)).all(dim=1)
        kept = shows.nonzero()[:, 0]
        low, high = low[kept].clamp(min=0).floor().int(), torch.minimum(high[kept], size - 1).floor().int()
    if any(tensor.requires_grad for tensor in splats) and torch.is_grad_enabled():
        rows = rows[kept]
        chosen = SplatTensors(*(tensor.index_select(0, rows) for tensor in splats))
        return Ellipses(_flatten(chosen, *camera, size)[0], chosen.colours, low, high)
    return Ellipses(shapes[kept], chosen.colours[kept], low, high)


def _flatten(splats: SplatTensors, pose: Tensor, intrinsics: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes [m, 6], covariances after the blur (xx, yy, xy) [3, m], determinants before it [m]."""
    # Gaussians along the last axis: long rows, which are several times as fast as many short ones.
    place = pose[:3, :3] @ splats.positions.T + pose[:3, 3:]
    depth = place[2]
    ray = place[:2] / depth
    own_focal, middle = intrinsics.diagonal()[:2, None], intrinsics[:2, 2:]
    focal = own_focal * size[:, None]
    centre = ray * focal + middle * size[:, None] - 0.5
    # The slope of the projection is held where the ray leaves the picture by more than a third of its half.
    limit = 1.3 * 0.5 / own_focal
    held = ray.clamp(-limit, limit)
    # Own axes, scaled, in the axes of the camera: [3 of the camera, 3 own, m].
    turns = rotation_matrices(splats.rotations.T.contiguous().T).permute(1, 2, 0)
    axes = (pose[:3, :3] @ turns.reshape(3, -1)).unflatten(1, (3, -1)) * splats.scales.T
    factor = focal / depth
    x = factor[0] * (axes[0] - held[0] * axes[2])
    y = factor[1] * (axes[1] - held[1] * axes[2])
    xx, yy, xy = (x * x).sum(0), (y * y).sum(0), (x * y).sum(0)
    # The same as xx yy - xy^2, without the difference of large numbers.
    determinant = torch.linalg.cross(x, y, dim=0).square().sum(0)
    blurred = determinant + BLUR * (xx + yy) + BLUR**2
    fade = (determinant.clamp(min=_SMALLEST_DETERMINANT) / (blurred + 1e-6) + 1e-6).sqrt()
    alpha = splats.opacities[:, 0] * fade
    rows = [*centre, (yy + BLUR) / blurred, -xy / blurred, (xx + BLUR) / blurred, alpha.log()]
    return torch.stack(rows, dim=1), torch.stack([xx + BLUR, yy + BLUR, xy]), determinant


def _published_radius(blurred: Tensor) -> Tensor:
    xx, yy, xy = blurred
    middle = (xx + yy) / 2
    return (3 * (middle + (middle * middle - (xx * yy - xy * xy)).clamp(min=0.1).sqrt()).sqrt()).ceil()


def _from_record(record: Gaussians, device: torch.device) -> SplatTensors:
    tensors = {}
    for name, width in _WIDTHS.items():
        array = np.asarray(getattr(record, name), np.float32)
        if array.shape != ((len(record),) if width == 1 else (len(record), width)):
            raise ShapeError(f"{name} {list(array.shape)} in a record of {len(record)} Gaussians")
        tensors[name] = torch.from_numpy(array).to(device).reshape(-1, width)
    return SplatTensors(
        positions=tensors["positions"],
        colours=(0.5 + SH_DEGREE_0 * tensors["colours"]).clamp(min=0),
        opacities=tensors["opacities"].sigmoid(),
        scales=tensors["scales"].exp(),
        rotations=F.normalize(tensors["rotations"], dim=1),
    )
