"""Patches to features: input layer + position table, pre-norm blocks inside each window, final norm."""

from __future__ import annotations

from torch import Tensor, nn

from model.blocks import Block
from model.config import ModelConfig
from model.kernels import segment_starts
from model.linear import InputLinear
from model.norms import make_norm
from model.packed import PackedTokens
from model.pooling import PoolingHead
from model.positions import PositionTable
from model.rope import rotary_table


class Encoder(nn.Module):
    """The published encoder. Source: facts 4."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack = config.encoder
        self.head_width = stack.head_width
        self.pos_embedder = PositionTable(stack.width)
        self.input_layer = InputLinear(config.patch_values, stack.width, bias=stack.bias)
        self.blocks = nn.ModuleList(Block(stack) for _ in range(stack.blocks))
        self.post_layernorm = make_norm(stack)
        self.head = PoolingHead(stack)

    def forward(self, packed: PackedTokens) -> Tensor:
        """Features of every token. packed.feats: patches [N, P or less] in -1..1, the rest 0. Returns [N, C]."""
        h = self.input_layer(packed.feats.to(self.input_layer.weight.dtype))
        h = h + self.pos_embedder(packed.coords, packed.starts, packed.extents)
        rotary, starts = self.rotary(packed), segment_starts(packed.starts, h.device)
        for block in self.blocks:
            h = block(h, rotary, starts)
        features: Tensor = self.post_layernorm(h)
        return features

    def rotary(self, packed: PackedTokens) -> Tensor:
        """Angles of every token, of rotary_table. A training ablation puts another function in its place."""
        return rotary_table(packed.coords, self.head_width)
