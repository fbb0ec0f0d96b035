"""The continuous bottleneck: a diagonal Gaussian per token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2 L] of the projection to (mean, logvar), each [N, L]. logvar is not clamped, as published."""
    mean, logvar = moments.chunk(2, dim=-1)
    return mean, logvar


def sample(mean: Tensor, logvar: Tensor, seed: int, first_token: int = 0) -> Tensor:
    """Draw mean + exp(logvar / 2) * noise for tokens first_token, first_token + 1, ... of one item.

    mean, logvar: [n, L], L a multiple of 4; seed: 0 or more. The noise comes from a counter-based generator keyed by
    the seed and addressed by token and channel, drawn on the CPU: nothing else in the batch, no tiling and no device
    has a say in it. Returns float32 [n, L].
    """
    rows, channels = mean.shape
    stream = np.random.Philox(key=seed).advance(first_token * channels // 4)  # a step of the counter gives four words
    words = stream.random_raw(rows * channels).reshape(rows, channels)
    # Box-Muller, one draw a word: the high half gives the radius (never log 0), the low half the angle.
    radius = np.sqrt(-2 * np.log(((words >> np.uint64(32)) + 1) / 2.0**32))
    noise = radius * np.cos((words & np.uint64(0xFFFFFFFF)) * (2 * np.pi / 2.0**32))
    return mean.float() + (logvar.float() / 2).exp() * torch.from_numpy(noise.astype(np.float32)).to(mean.device)
