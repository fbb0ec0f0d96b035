"""The transformer block: pre-norm attention with 4D RoPE inside each window, then a tanh-GELU MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import StackConfig
from model.kernels import packed_attention
from model.linear import Linear
from model.norms import HeadNorm, make_norm

# Rows of the MLP's hidden layer that are alive at once when no gradient is wanted: the hidden layer is the largest
# activation by far (4304 a token), and 512 rows of it stay in the cache of a CPU core.
MLP_ROWS = 512


class Attention(nn.Module):
    """Self-attention over packed windows. x: [N, C]."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = Linear(config.width, 3 * config.width, bias=config.bias)
        self.to_out = Linear(config.width, config.width, bias=config.bias)
        self.q_rms_norm = HeadNorm(config.heads, config.head_width) if config.qk_norm else None
        self.k_rms_norm = HeadNorm(config.heads, config.head_width) if config.qk_norm else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every token, neither normed nor rotated: three times [N, H, D]."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return q, k, v

    def gains(self) -> tuple[Tensor | None, Tensor | None]:
        """Of the norm of queries and keys, [H, D] each; None where there is none."""
        if self.q_rms_norm is None or self.k_rms_norm is None:
            return None, None
        return self.q_rms_norm.gamma, self.k_rms_norm.gamma

    def forward(self, x: Tensor, rotary: Tensor, starts: Sequence[int] | Tensor) -> Tensor:
        """Attend inside each window. rotary: of rotary_table; starts: of segment_starts. Returns [N, C]."""
        q_gain, k_gain = self.gains()
        out = packed_attention(*self.project(x), starts, rotary=rotary, q_gain=q_gain, k_gain=k_gain)
        return self.to_out(out.flatten(1))


class MLP(nn.Module):
    """Two linear layers with the tanh form of GELU between. x: [N, C]."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        # The published names are mlp.mlp.0 and mlp.mlp.2.
        self.mlp = nn.Sequential(
            Linear(width, hidden, bias=bias), nn.GELU(approximate="tanh"), Linear(hidden, width, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Every row on its own; in pieces where no gradient is wanted."""
        if torch.is_grad_enabled() or len(x) <= MLP_ROWS or x.is_cuda:
            return self._rows(x)
        return torch.cat([self._rows(rows) for rows in x.split(MLP_ROWS)])

    def _rows(self, x: Tensor) -> Tensor:
        up, down = self.mlp[0], self.mlp[2]
        assert isinstance(up, Linear)
        return down(up.forward_gelu(x))


class Block(nn.Module):
    """h + Attn(norm1(h)), then h + MLP(norm2(h)). h: [N, C]."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.attn = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config.width, config.mlp, bias=config.bias)

    def forward(self, h: Tensor, rotary: Tensor, starts: Sequence[int] | Tensor) -> Tensor:
        """One block over packed windows; arguments as for Attention."""
        h = h + self.attn(self.norm1(h), rotary, starts)
        return h + self.mlp(self.norm2(h))
