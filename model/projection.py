"""Gaussians in space to their footprints in a picture: an ellipse, an opacity and a colour each, sorted by depth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.splats import Splats, rotation_matrices

NEAREST = 0.2
"""What lies nearer to the camera's plane is not drawn."""
FILTER = 0.1
"""Variance in square pixels by which every footprint is widened, while its opacity falls: mip-style antialiasing."""
SMALLEST = 1e-6
EDGE = 1.3
"""Slopes beyond so many half pictures are cut when a footprint is made: at grazing views it would explode."""


class Footprints(NamedTuple):
    """V visible Gaussians, near to far. Pixel (0, 0) has its centre at x = 0, y = 0.

    values: [V, 9]: x, y, inverse covariance xx, xy, yy, opacity, red, green, blue. centres: [V, 2], x and y.
    reach: [V, 2], half sides of the rectangle outside of which nothing is drawn; both without gradient.
    """

    values: Tensor
    centres: Tensor
    reach: Tensor


def project(splats: Splats, world_to_camera: Tensor, intrinsics: Tensor, *, height: int, width: int) -> Footprints:
    """Arguments as for rasterizer.render."""
    points = splats.positions()
    camera, k = world_to_camera.to(points), intrinsics.to(points)
    seen = points @ camera[:3, :3].T + camera[:3, 3]
    with torch.no_grad():
        order = seen[:, 2].argsort(stable=True)
        order = order[seen[order, 2] > NEAREST]
    seen = seen[order]
    x, y, z = seen.unbind(1)
    centre = torch.stack(
        [width * ((k[0, 0] * x + k[0, 1] * y) / z + k[0, 2]) - 0.5, height * (k[1, 1] * y / z + k[1, 2]) - 0.5], dim=1
    )
    half = rotation_matrices(splats.rotations()[order]) * splats.scales()[order][:, None, :]
    a, b, c = _covariance(seen, camera[:3, :3] @ half, k, height, width)
    plain = (a * c - b * b).clamp(min=SMALLEST)
    a, c = a + FILTER, c + FILTER
    wide = (a * c - b * b).clamp(min=SMALLEST)
    # What is far smaller than a pixel fades instead of growing to one; below the smallest area it is gone.
    fade = torch.where(plain > SMALLEST, (plain / (wide + SMALLEST) + SMALLEST).sqrt(), 0)
    opacity = splats.opacities()[order, 0] * fade
    determinant = a * c - b * b
    values = torch.cat(
        [
            centre,
            torch.stack([c / determinant, -b / determinant, a / determinant, opacity], dim=1),
            splats.colours()[order],
        ],
        dim=1,
    )
    with torch.no_grad():
        middle = (a + c) / 2
        radius = (3 * (middle + (middle * middle - determinant).clamp(min=0.1).sqrt()).sqrt()).ceil()
        # Beyond it the opacity is below 1 / 255.
        faint = 2 * (255 * opacity).clamp(min=1).log()
        reach = torch.minimum(radius[:, None], (faint[:, None] * torch.stack([a, c], dim=1)).sqrt() + 0.5)
        shown = (opacity >= 1 / 255) & torch.isfinite(values).all(dim=1) & torch.isfinite(reach).all(dim=1)
        shown &= (centre.abs() < 1e7).all(dim=1)
    return Footprints(values[shown], centre.detach()[shown], reach[shown])


def _covariance(seen: Tensor, half: Tensor, k: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """xx, xy, yy of footprints in square pixels, [V] each; half: root of the covariance, at the camera, [V, 3, 3]."""
    x, y, z = seen.unbind(1)
    focal_x, focal_y = width * k[0, 0], height * k[1, 1]
    edge_x, edge_y = EDGE * 0.5 / k[0, 0], EDGE * 0.5 / k[1, 1]
    slope_x = torch.minimum(torch.maximum(x / z, -edge_x), edge_x)
    slope_y = torch.minimum(torch.maximum(y / z, -edge_y), edge_y)
    row_x = (focal_x / z)[:, None] * (half[:, 0] - slope_x[:, None] * half[:, 2])
    row_y = (focal_y / z)[:, None] * (half[:, 1] - slope_y[:, None] * half[:, 2])
    return (row_x * row_x).sum(1), (row_x * row_y).sum(1), (row_y * row_y).sum(1)
