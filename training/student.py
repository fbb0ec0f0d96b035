"""The network in training: one forward that encodes, draws from the posterior or quantises, decodes and pools.

One module with one forward, so that FSDP, compilation and autocast see the whole pass. N tokens, B items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.blocks import Block
from model.network import ATokenNet
from model.packed import PackedTokens
from training.losses import item_means, kl_rows


@dataclass(frozen=True)
class Outputs:
    """What was asked for, the rest None.

    decoded: [N, values]; kl: [B], mean over tokens of the sum over channels; embeddings: [B, C] of length 1.
    """

    decoded: Tensor | None
    kl: Tensor | None
    embeddings: Tensor | None


class Student(nn.Module):
    """An ATokenNet with the forward of training."""

    def __init__(self, net: ATokenNet, *, recompute: bool = False) -> None:
        super().__init__()
        self.net = net
        if recompute:
            for block in (*net.encoder.blocks, *net.decoder.blocks):
                if isinstance(block, Block):
                    _recompute(block)

    def compile_blocks(self) -> None:
        """torch.compile of every block, one graph for all lengths; the rest is too small to gain."""
        for block in (*self.net.encoder.blocks, *self.net.decoder.blocks):
            block.compile(dynamic=True)

    def forward(
        self, packed: PackedTokens, items: Sequence[int], noise: Tensor | None, *, decode: bool, embed: bool
    ) -> Outputs:
        """packed.feats: patches. items: B + 1 token starts.

        noise: standard normal [N, L], None to decode the mean; a discrete network needs none. decode, embed: which
        outputs are wanted.
        """
        net = self.net
        features = net.encode(packed)
        decoded = kl = embeddings = None
        if decode:
            mean, logvar = net.posterior(features, packed)
            if net.config.bottleneck == "fsq":
                latents = net.quantize(mean, packed.moving)
            else:
                mean, logvar = mean.float(), logvar.float()
                latents = mean if noise is None else mean + (logvar / 2).exp() * noise
                kl = item_means(kl_rows(mean, logvar), tuple(items))
            values = net.config.patch_values if bool(packed.moving.any()) else net.config.frame_values
            decoded = net.decode(packed.with_feats(latents), values).float()
        if embed:
            embeddings = F.normalize(net.encoder.head(features, list(items)).float(), dim=-1)
        return Outputs(decoded, kl, embeddings)


def _recompute(block: Block) -> None:
    """Keep only a block's input; its inside is computed again for the gradients."""
    plain = block.forward

    def forward(h: Tensor, rotary: Tensor, starts: Sequence[int] | Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return plain(h, rotary, starts)
        out: Tensor = checkpoint(plain, h, rotary, starts, use_reentrant=False)
        return out

    block.forward = forward  # type: ignore[method-assign]
