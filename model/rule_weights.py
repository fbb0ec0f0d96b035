"""Weights by rule: pseudo-random numbers that any implementation can make, so that a case need not carry a file."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def rule_tensor(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """The tensor of this name, the `number`-th of all sorted names. float32.

    Source: conformance README, section 3; conformance/core_full_width.
    """
    count = math.prod(shape)
    with np.errstate(over="ignore"):  # all arithmetic wraps at 32 bits
        x = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32((number * 974711 + 1) % 2**32)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(2246822519)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(3266489917)
        x = x ^ (x >> np.uint32(16))
    r = ((x.astype(np.float64) + 0.5) / 2.0**32 - 0.5) * math.sqrt(12)
    if name.endswith("gamma"):
        value = 1.5 + 0.25 * r
    elif "norm" in name and name.endswith("weight"):
        value = 1 + 0.2 * r
    elif name.endswith("bias"):
        value = 0.1 * r
    elif "position_embedding" in name:
        value = 0.5 * r
    elif name.endswith("probe"):
        value = r
    else:
        value = 1.5 * r / math.sqrt(shape[-1])
    return torch.from_numpy(value.astype(np.float32).reshape(shape))
