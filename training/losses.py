"""The terms of the objective, each a plain function of tensors.

N tokens, B items (windows), P values of a patch, L latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.packed import PackedTokens
from training.config import LossConfig


@dataclass(frozen=True)
class Losses:
    """total: what is minimised; the others are its unweighted terms. Scalars."""

    total: Tensor
    l1: Tensor
    log_mse: Tensor
    kl: Tensor


def item_means(values: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Mean over the tokens of each item. values: [N]; starts: B + 1 item starts. Returns [B]."""
    lengths = torch.tensor(starts, device=values.device).diff()
    return torch.segment_reduce(values, "mean", lengths=lengths)


def kl_rows(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of each token from a unit Gaussian, summed over channels, [N]. mean, logvar: [N, L].

    Source: the closed form of Kingma and Welling 2013, arXiv 1312.6114 (appendix B).
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean over tokens of `kl_rows`: what the bundled models train with. A scalar."""
    return kl_rows(mean, logvar).mean()


def reconstruction(
    decoded: Tensor, packed: PackedTokens, model: ModelConfig, log_floor: float
) -> tuple[Tensor, Tensor]:
    """Mean over items of the absolute error, and of log(square error + log_floor).

    decoded: [N, P]; packed: the patches that went in. Of a still patch only the first frame's values count: the
    others are grey by definition, and nobody sees them. Source: L1 as in AToken, arXiv 2509.14476 (3.4), its mean over
    patches; the logarithm is ours (training/README.md, "The loss").
    """
    still = ~packed.moving
    frame = model.frame_values
    error = decoded - packed.feats
    mse, mae = error.new_zeros(len(error)), error.new_zeros(len(error))
    for rows, part in ((still, error[still, :frame]), (packed.moving, error[packed.moving])):
        mse = mse.masked_scatter(rows, part.square().mean(1))
        mae = mae.masked_scatter(rows, part.abs().mean(1))
    return item_means(mae, packed.starts).mean(), (item_means(mse, packed.starts) + log_floor).log().mean()


def combine(l1: Tensor, log_mse: Tensor, kl: Tensor, config: LossConfig) -> Losses:
    """The weighted sum. Its weights are ours (training/README.md); the curriculum's are in stages.py."""
    total = config.l1 * l1 + config.log_mse * log_mse + config.kl * kl
    return Losses(total=total, l1=l1.detach(), log_mse=log_mse.detach(), kl=kl.detach())
