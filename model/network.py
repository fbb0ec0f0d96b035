"""The whole network as one module: what a checkpoint is loaded into, and what training trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import fsq, gaussian
from model.config import ModelConfig
from model.decoder import Decoder
from model.encoder import Encoder
from model.experts import Experts
from model.linear import Linear
from model.linear_path import Basis, LinearPath
from model.packed import PackedTokens


class ATokenNet(nn.Module):
    """Encoder, projection to the latent, decoder; parameter names are those of the published checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.proj = Linear(config.encoder.width, 2 * config.latent_channels, bias=False)
        self.decoder = Decoder(config)
        self.linear_path = LinearPath(config) if config.linear_path else None

    def fix_products(self) -> None:
        """From now on an item's results are bit for bit the same whatever shares its pack; inference only.

        Attention and norms are so by themselves; matrix products then sum in one order for any number of rows.
        """
        for module in self.modules():
            if isinstance(module, Linear | Basis | Experts):
                module.fixed = True

    def encode(self, packed: PackedTokens) -> Tensor:
        """Patches to features [N, C]. packed.feats: [N, P] in -1..1, or the first columns if the others are 0."""
        features: Tensor = self.encoder(packed)
        return features

    def posterior(self, features: Tensor, packed: PackedTokens) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each [N, L]; packed.feats: the patches that gave the features."""
        mean, logvar = gaussian.split_moments(self.proj(features))
        if self.linear_path is not None:
            latents = self.linear_path.encode(packed.feats, packed.moving)
            mean, logvar = self.linear_path.correct(latents, mean, logvar)
        return mean, logvar

    def quantize(self, mean: Tensor, moving: Tensor) -> Tensor:
        """FSQ values of the mean, float32 [N, L] of -1, -0.5, 0, 0.5. moving: bool [N]."""
        return fsq.quantize(mean if self.linear_path is None else self.linear_path.levels_of(mean, moving))

    def decode(self, packed: PackedTokens, values: int | None = None) -> Tensor:
        """Latents (or FSQ values) to patches [N, values], about -1..1, no clamp. packed.feats: [N, L].

        values: how many of a patch's P values are wanted, from the first on (an image has one frame); default all.
        """
        values = values or self.config.patch_values
        patches: Tensor = self.decoder(packed, values)
        if self.linear_path is not None:
            patches = patches + self.linear_path.decode(packed.feats, packed, values)
        return patches


def build(config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ATokenNet:
    """A network with fresh weights as torch initialises its layers."""
    with torch.device(device):
        return ATokenNet(config).to(dtype)
