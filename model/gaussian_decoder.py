"""Voxel features to Gaussians: a transformer whose blocks attend inside cubes of 8^3 cells, shifted in every other one.

N voxels, C width, H heads, D head width, G Gaussians a voxel (32).
Source: conformance/gs_decoder_tiny; names and shapes of the tensors: conformance/keys_gs.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blocks import MLP
from model.config import GaussianConfig
from model.errors import RangeError, ShapeError
from model.kernels import packed_attention, segment_starts
from model.linear import Linear
from model.norms import RMSNorm
from model.splats import OUTPUTS, Splats, perturbation, split_outputs

OUT_EPS = 1e-5


class Windows(NamedTuple):
    """Tokens sorted into windows. order, back: int64 [N], a permutation and its inverse; starts: of segment_starts."""

    order: Tensor
    back: Tensor
    lengths: list[int]
    starts: Sequence[int] | Tensor


class WindowedAttention(nn.Module):
    """Self-attention inside each window, with capped scores. x: [N, C]."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = Linear(config.width, 3 * config.width, bias=False)
        self.to_out = Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, windows: Windows, softcap: float) -> Tensor:
        """Returns [N, C], in the order of x."""
        q, k, v = self.to_qkv(x[windows.order]).unflatten(-1, (3, self.heads, -1)).unbind(1)
        out = packed_attention(q, k, v, windows.starts, softcap=softcap)
        return self.to_out(out.flatten(1))[windows.back]


class GaussianBlock(nn.Module):
    """h + Attn(norm1(h)), then h + MLP(norm2(h)). h: [N, C]."""

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width)
        self.attn = WindowedAttention(config)
        self.norm2 = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp, bias=False)

    def forward(self, h: Tensor, windows: Windows, softcap: float) -> Tensor:
        """One block; arguments as for WindowedAttention."""
        h = h + self.attn(self.norm1(h), windows, softcap)
        return h + self.mlp(self.norm2(h))


class GaussianDecoder(nn.Module):
    """The published Gaussian decoder, with the published parameter names."""

    offset_perturbation: Tensor

    def __init__(self, config: GaussianConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("offset_perturbation", perturbation(config))
        self.input_layer = Linear(config.feature_channels, config.width, bias=False)
        self.blocks = nn.ModuleList(GaussianBlock(config) for _ in range(config.blocks))
        self.out_layer = Linear(config.width, config.gaussians * sum(OUTPUTS.values()), bias=True)
        # As published: an untrained decoder fills every cell evenly with faint grey Gaussians.
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)

    def forward(self, feats: Tensor, coords: Tensor, *, uncap_eights: bool = False) -> Tensor:
        """Network outputs, float32 [N, 14 G], before any activation; `splats` says what they mean.

        feats: [N, 768], any float type, in the range of the model (2 f - 1); coords: integers [N, 4], (item, x, y, z),
        in any order. Items never meet. uncap_eights: leave the scores alone when every window of the pack holds 8
        tokens, as the published code does by mistake; it makes items depend on their pack. Raises ShapeError,
        RangeError.
        """
        self._check(feats, coords)
        h = self.input_layer(feats.to(self.input_layer.weight.dtype))
        h = h + position_table(coords[:, 1:], self.config.width).to(h.dtype)
        plain, shifted = (sort_into_windows(coords, self.config, shift) for shift in (0, self.config.window // 2))
        for number, block in enumerate(self.blocks):
            windows = shifted if number % 2 else plain
            uncapped = uncap_eights and set(windows.lengths) == {8}
            h = block(h, windows, 0.0 if uncapped else self.config.softcap)
        return self.out_layer(F.layer_norm(h, h.shape[-1:], eps=OUT_EPS)).float()

    def splats(self, outputs: Tensor, coords: Tensor) -> Splats:
        """Outputs of forward, [N, 14 G], to N * G Gaussians; voxel n owns rows n * G to (n + 1) * G."""
        return split_outputs(outputs, coords[:, 1:], self.offset_perturbation, self.config)

    def _check(self, feats: Tensor, coords: Tensor) -> None:
        if feats.ndim != 2 or feats.shape[1] != self.config.feature_channels or not feats.is_floating_point():
            raise ShapeError(
                f"feats {feats.dtype} {tuple(feats.shape)}; wanted floats [N, {self.config.feature_channels}]"
            )
        if coords.shape != (len(feats), 4) or coords.is_floating_point() or len(feats) == 0:
            raise ShapeError(
                f"coords {coords.dtype} {tuple(coords.shape)} for {len(feats)} voxels; wanted integers [N, 4], N > 0"
            )
        low, high = int(coords.min()), int(coords[:, 1:].max())
        if low < 0 or high >= self.config.grid:
            raise RangeError(f"coords of {low} to {high}; wanted x, y, z of 0 to {self.config.grid - 1}, items from 0")


def position_table(places: Tensor, width: int) -> Tensor:
    """Fixed sine and cosine table, float32 [N, width], of the integers x, y, z, [N, 3]; zeros where 6 leaves a rest."""
    count = width // 6
    rates = 10000.0 ** (-torch.arange(count, dtype=torch.float32, device=places.device) / count)
    angles = places.float()[:, :, None] * rates
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(table, (0, width - 6 * count))


def sort_into_windows(coords: Tensor, config: GaussianConfig, shift: int) -> Windows:
    """Group tokens by item and cube. The shift is added, not wrapped: the first cube of an axis is then cut short."""
    per_axis = (config.grid - 1 + shift) // config.window + 1
    cell = (coords[:, 1:].long() + shift) // config.window
    window = ((coords[:, 0].long() * per_axis + cell[:, 0]) * per_axis + cell[:, 1]) * per_axis + cell[:, 2]
    order = window.argsort(stable=True)
    lengths = window[order].unique_consecutive(return_counts=True)[1].tolist()
    starts = segment_starts([0, *accumulate(lengths)], coords.device)
    return Windows(order, order.argsort(), lengths, starts)
