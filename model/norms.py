"""The norms of the published network, which compute in float32 whatever the type of the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import StackConfig

EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, eps 1e-6, in float32, cast back. x: [N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of every row."""
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), EPS).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight. The quotient is cast to the model's type before the weight. x: [N, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of every row."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.shape[-1],), self.weight, EPS)
        unit = F.rms_norm(x.float(), (x.shape[-1],), eps=EPS).to(x.dtype)
        return (unit.float() * self.weight.float()).to(x.dtype)


class HeadNorm(nn.Module):
    """The decoder's QK norm: L2 over each head, times sqrt(D), times a gain per head and channel, [H, D].

    It holds the gain; packed_attention, which can do it on the way, computes the norm.
    """

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, head_width))


def make_norm(config: StackConfig) -> nn.Module:
    """The norm that this stack puts before attention and MLP."""
    return LayerNorm(config.width) if config.norm == "layer" else RMSNorm(config.width)
