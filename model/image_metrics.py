"""How near a picture comes to another: PSNR and SSIM of values in 0..1, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, SIGMA = 11, 1.5
"""Window of SSIM as in its paper (Wang et al. 2004)."""


def psnr(picture: Tensor, reference: Tensor) -> Tensor:
    """dB of equal shapes, over all values; infinite where they are equal."""
    return -10 * (picture - reference).square().mean().log10()


def ssim(picture: Tensor, reference: Tensor) -> Tensor:
    """Mean structural similarity of two [H, W, 3], H and W at least 11; only windows that lie inside count."""
    x, y = (image.permute(2, 0, 1)[:, None] for image in (picture, reference))
    steps = torch.arange(SIDE, dtype=x.dtype, device=x.device) - SIDE // 2
    line = (-steps.square() / (2 * SIGMA**2)).exp()
    line = line / line.sum()

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, line[None, None, :, None]), line[None, None, None, :])

    mean_x, mean_y = blur(x), blur(y)
    # Sample covariance, as in the paper's own code.
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    both = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    scores = ((2 * mean_x * mean_y + c1) * (2 * both + c2)) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return scores.mean()
