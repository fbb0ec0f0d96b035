"""PSNR and SSIM of 8-bit pictures, the usual definitions.

H, W: rows and columns of pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from media.types import UInt8Array

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    """Peak signal to noise ratio in dB over all values of two uint8 arrays; infinite where they are equal."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(a: UInt8Array, b: UInt8Array) -> float:
    """Structural similarity of uint8 [..., H, W, 3], mean over frames and colours.

    11 x 11 Gaussian window of sigma 1.5, biased moments, whole windows only, range 255. Source: Wang et al. 2004.
    """
    x, y = (torch.from_numpy(v.reshape(-1, *v.shape[-3:]).astype(np.float64)).movedim(-1, 1) for v in (a, b))
    taps = torch.exp(-((torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2))
    taps = taps / taps.sum()

    def blur(v: torch.Tensor) -> torch.Tensor:
        v = v.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(v, taps[None, None, :, None]), taps[None, None, None, :])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ratio = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(ratio.mean())
