"""Finite scalar quantisation: every latent channel to one of four levels, six channels to one code of 0..4095.

N tokens, L latent channels (48), K codebooks (8). No learned state. Everything here is float32.
Source: facts 9; conformance/fsq.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import FSQ_LEVELS

_HALF = (FSQ_LEVELS - 1) * (1 + 1e-3) / 2
_SHIFT = math.atanh(0.5 / _HALF)

THRESHOLDS = tuple(math.atanh((edge + 0.5) / _HALF) - _SHIFT for edge in (-1.5, -0.5, 0.5))
"""Where the level of z changes: about -1.1497, -0.3462, 0.4573."""

CENTRES = tuple(math.atanh((level + 0.5) / _HALF) - _SHIFT for level in (-2, -1, 0, 1))
"""A z in the middle of each level, lowest first."""


def bound(z: Tensor) -> Tensor:
    """Squash z into the range of the levels, (-2.0015, 1.0015). z: [N, L]. Returns float32."""
    return torch.tanh(z.float() + _SHIFT) * _HALF - 0.5


def quantize(z: Tensor) -> Tensor:
    """z to the values the decoder receives: -1, -0.5, 0 or 0.5. Gradients pass straight through the rounding.

    Quantising a result again is not the identity (-1 becomes -0.5): never do it. z: [N, L]. Returns float32 [N, L].
    """
    bounded = bound(z)
    rounded = bounded + (bounded.round() - bounded).detach() if z.requires_grad else bounded.round()
    return rounded / (FSQ_LEVELS // 2)


def values_to_codes(values: Tensor, codebooks: int) -> Tensor:
    """Quantised values to codes; the first channel of a codebook is the least significant digit.

    values: [N, L] of -1, -0.5, 0, 0.5. Returns int32 [N, K], 0..4095.
    """
    digits = (values * (FSQ_LEVELS // 2) + FSQ_LEVELS // 2).round().int().unflatten(-1, (codebooks, -1))
    places = FSQ_LEVELS ** torch.arange(digits.shape[-1], dtype=torch.int32, device=values.device)
    return (digits * places).sum(-1, dtype=torch.int32)


def codes_to_values(codes: Tensor, latent_channels: int) -> Tensor:
    """Exact inverse of values_to_codes. codes: int [N, K], 0..4095. Returns float32 [N, L]."""
    digits_per_code = latent_channels // codes.shape[-1]
    places = FSQ_LEVELS ** torch.arange(digits_per_code, dtype=torch.int32, device=codes.device)
    digits = codes.int()[..., None] // places % FSQ_LEVELS
    return (digits.flatten(-2).float() - FSQ_LEVELS // 2) / (FSQ_LEVELS // 2)
