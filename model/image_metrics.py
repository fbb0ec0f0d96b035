"""How near two pictures are: PSNR and SSIM. Differentiable. Pictures are floats [..., H, W, 3], values 0..1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import ShapeError

WINDOW = 11
SIGMA = 1.5


def psnr(picture: Tensor, wanted: Tensor) -> Tensor:
    """Decibels [...], one number a picture; infinite for equal ones. Raises ShapeError."""
    _check(picture, wanted, 1)
    return -10 * (picture - wanted).square().mean(dim=(-3, -2, -1)).log10()


def ssim(picture: Tensor, wanted: Tensor) -> Tensor:
    """Structural similarity [...], at most 1: mean over the three colours and all whole windows.

    Windows are Gaussian, 11 x 11 with sigma 1.5; variances are those of the window (not of a sample). Raises ShapeError
    for pictures smaller than a window.
    """
    _check(picture, wanted, WINDOW)
    x, y = (image.reshape(-1, *image.shape[-3:]).movedim(-1, 1) for image in (picture, wanted))
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    taps = torch.softmax(-0.5 * (place / SIGMA).square(), dim=0)
    maps = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    blurred = F.conv2d(F.conv2d(maps, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    mean_x, mean_y, xx, yy, xy = blurred.unflatten(0, (5, -1))
    c1, c2 = 0.01**2, 0.03**2
    light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x.square() + yy - mean_y.square() + c2)
    return (light * structure).reshape(*picture.shape[:-3], -1).mean(dim=-1)


def _check(picture: Tensor, wanted: Tensor, side: int) -> None:
    shape = picture.shape
    if shape != wanted.shape or len(shape) < 3 or shape[-1] != 3 or min(shape[-3:-1]) < side:
        raise ShapeError(
            f"pictures {list(shape)} and {list(wanted.shape)}; wanted two of [..., H, W, 3], sides of at least {side}"
        )
    if picture.dtype != wanted.dtype or not picture.is_floating_point():
        raise ShapeError(f"pictures {picture.dtype} and {wanted.dtype}; wanted floats of one dtype")
