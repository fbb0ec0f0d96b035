"""Latents to patches: input layer + position table, pre-norm blocks inside each window, norm, output layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.blocks import Block
from model.config import ModelConfig
from model.errors import RangeError
from model.kernels import packed_attention, segment_starts
from model.linear import Linear
from model.norms import make_norm
from model.packed import PackedTokens
from model.positions import PositionTable
from model.rope import rotary_table


class Decoder(nn.Module):
    """The published decoder. Source: facts 10."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        stack = config.decoder
        self.head_width = stack.head_width
        self.window = config.window
        self.pos_embedder = PositionTable(stack.width)
        self.input_layer = Linear(config.latent_channels, stack.width, bias=stack.bias)
        self.blocks = nn.ModuleList(Block(stack) for _ in range(stack.blocks))
        self.out_norm = make_norm(stack)
        self.out_layer = Linear(stack.width, config.patch_values, bias=stack.bias)

    def forward(self, packed: PackedTokens, values: int | None = None) -> Tensor:
        """Patches of every token. packed.feats: latents or FSQ values [N, L].

        values: how many of a patch's P values are wanted, from the first on; default all. Returns [N, values], about
        -1..1, no clamp.
        """
        h = self._embed(packed)
        rotary, starts = self.rotary(packed), segment_starts(packed.starts, h.device)
        for block in self.blocks:
            h = block(h, rotary, starts)
        return self._output(h, values)

    def rotary(self, packed: PackedTokens) -> Tensor:
        """Angles of every token, of rotary_table. A training ablation puts another function in its place."""
        return rotary_table(packed.coords, self.head_width)

    def forward_cached(self, latents: Tensor, coords: Tensor, *, stride: int, cache: int) -> Tensor:
        """Decode one item window after window; each sees the last frames of the one before through its keys.

        latents: [n, L]; coords: int [n, 4] in order of t. stride, cache: latent frames of a window, and of the keys
        and values kept from before; together at most one published window. cache=0 is the published behaviour.
        Returns [n, P]. Source: facts 3; conformance/core_kv_cache.
        """
        if stride < 1 or cache < 0 or stride + cache > self.window:
            raise RangeError(f"stride {stride} and cache {cache}; wanted together 1 to {self.window} latent frames")
        number = (coords[:, 0] - coords[0, 0]) // stride
        past = [_Past.empty(block, latents) for block in self.blocks]
        patches = []
        for window in range(int(number[-1]) + 1):
            rows = number == window
            local = coords[rows].clone()
            local[:, 0] -= coords[0, 0] + window * stride - (cache if window else 0)
            extent = (int(local[:, 1].max()) + 1, int(local[:, 2].max()) + 1)
            moving = torch.zeros(len(local), dtype=torch.bool, device=local.device)
            packed = PackedTokens(
                feats=latents[rows], coords=local, starts=(0, len(local)), extents=(extent,), moving=moving
            )
            h = self._embed(packed)
            for index, block in enumerate(self.blocks):
                h, past[index] = self._block_cached(block, h, local, past[index], cache)
            patches.append(self._output(h, None))
        return torch.cat(patches)

    def _embed(self, packed: PackedTokens) -> Tensor:
        h: Tensor = self.input_layer(packed.feats.to(self.input_layer.weight.dtype))
        return h + self.pos_embedder(packed.coords, packed.starts, packed.extents)

    def _output(self, h: Tensor, values: int | None) -> Tensor:
        return self.out_layer.forward_leading(self.out_norm(h), values or self.out_layer.out_features)

    def _block_cached(
        self, block: nn.Module, h: Tensor, coords: Tensor, past: _Past, cache: int
    ) -> tuple[Tensor, _Past]:
        assert isinstance(block, Block)
        q, k, v = block.attn.project(block.norm1(h))
        # Keys are kept before norm and rotation, because their local time changes from window to window.
        all_coords = torch.cat([past.coords, coords])
        keys, values = torch.cat([past.keys, k]), torch.cat([past.values, v])
        q_gain, k_gain = block.attn.gains()
        out = packed_attention(
            q,
            keys,
            values,
            (0, len(q)),
            key_starts=(0, len(keys)),
            rotary=rotary_table(coords, self.head_width),
            key_rotary=rotary_table(all_coords, self.head_width),
            q_gain=q_gain,
            k_gain=k_gain,
        )
        h = h + block.attn.to_out(out.flatten(1))
        h = h + block.mlp(block.norm2(h))
        kept = all_coords[:, 0] > all_coords[:, 0].max() - cache
        kept_coords = all_coords[kept].clone()
        if cache:
            kept_coords[:, 0] -= kept_coords[:, 0].min()
        return h, _Past(coords=kept_coords, keys=keys[kept], values=values[kept])


@dataclass
class _Past:
    """coords: int [m, 4], local; keys, values: [m, H, D] of the last `cache` latent frames."""

    coords: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def empty(cls, block: nn.Module, like: Tensor) -> _Past:
        assert isinstance(block, Block)
        weight = block.attn.to_out.weight
        nothing = weight.new_zeros(0, block.attn.heads, weight.shape[0] // block.attn.heads)
        return cls(
            coords=torch.zeros(0, 4, dtype=torch.int32, device=like.device), keys=nothing, values=nothing.clone()
        )
