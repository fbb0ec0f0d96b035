"""The best linear correction of a decoded patch from its own and its neighbours' components, by least squares.

N tokens, D components (L of a neighbour), R rank of the neighbours' part, V values of a basis (768 or 3072).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.linear_path import NEIGHBOUR_RANK, Basis, neighbour_differences
from model.network import ATokenNet
from model.packed import PackedTokens
from training.losses import item_means

RIDGE = 1e-4
"""Added to the diagonal of the Gram matrix, as a share of its mean."""


@dataclass
class _Sums:
    """Weighted sums. gram: [D + 8 L, D + 8 L] of the inputs, own components first; cross: [D + 8 L, V]."""

    gram: Tensor
    cross: Tensor
    mean_in: Tensor
    mean_out: Tensor
    weight: float = 0.0


@torch.no_grad()
def fit_linear_decoder(net: ATokenNet, batches: Iterable[PackedTokens], log_floor: float) -> None:
    """Fit gather, spread and a correction of synthesis and bias, in both bases, to what the network leaves over.

    Works before training, when the stacks are silent, and after it. batches: training batches; several hundred, or
    the fit learns them by heart. Every crop weighs as it does in the loss: by 1 / (its error + log_floor).
    """
    path = net.linear_path
    if path is None:
        raise ValueError("a network without linear_path has nothing to fit")
    sums: dict[bool, _Sums] = {}
    for packed in batches:
        latents = decoder_input(net, packed)
        components = path.recall(latents, packed.moving)
        differences = neighbour_differences(components[:, : path.seen], packed)
        left = packed.feats - net.decode(packed.with_feats(latents))
        inputs = torch.cat([components, differences], dim=1)
        for moving, basis in ((False, path.still), (True, path.moving)):
            rows = packed.moving == moving
            if bool(rows.any()):
                error = left[:, : basis.values].square().mean(1)
                weights = 1 / (item_means(error, packed.starts) + log_floor)
                weight = weights.repeat_interleave(torch.tensor(packed.starts).diff())[rows, None]
                # The neighbours' part is fitted anew, not on top of the old one: its rank is limited.
                old = (differences[rows] @ basis.gather.T) @ basis.spread.T
                _add(sums, moving, inputs[rows], left[rows, : basis.values] + old, weight)
    for moving, basis in ((False, path.still), (True, path.moving)):
        if moving in sums:
            _solve(basis, sums[moving])


def decoder_input(net: ATokenNet, packed: PackedTokens) -> Tensor:
    """The latents that serving would decode, [N, L]: posterior means, or quantised values."""
    own = net.proj.weight[: net.config.latent_channels]
    if net.linear_path is not None and not own.any():
        # Without a correction by the encoder its blocks have no say in the latents, and need not run.
        mean = net.linear_path.encode(packed.feats, packed.moving)
    else:
        mean, _ = net.posterior(net.encode(packed), packed)
    return net.quantize(mean, packed.moving) if net.config.bottleneck == "fsq" else mean


def _add(sums: dict[bool, _Sums], moving: bool, x: Tensor, y: Tensor, weight: Tensor) -> None:
    if moving not in sums:
        nx, ny = x.shape[1], y.shape[1]
        sums[moving] = _Sums(
            gram=torch.zeros(nx, nx, dtype=torch.float64),
            cross=torch.zeros(nx, ny, dtype=torch.float64),
            mean_in=torch.zeros(nx, dtype=torch.float64),
            mean_out=torch.zeros(ny, dtype=torch.float64),
        )
    total = sums[moving]
    total.gram += x.T @ (weight * x)
    total.cross += x.T @ (weight * y)
    total.mean_in += (weight * x).sum(0)
    total.mean_out += (weight * y).sum(0)
    total.weight += float(weight.sum())


def _solve(basis: Basis, sums: _Sums) -> None:
    own = basis.synthesis.shape[1]
    mean_in, mean_out = sums.mean_in / sums.weight, sums.mean_out / sums.weight
    gram = sums.gram / sums.weight - torch.outer(mean_in, mean_in)
    cross = sums.cross / sums.weight - torch.outer(mean_in, mean_out)
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    best = torch.linalg.solve(gram, cross)  # [D + 8 L, V]
    # Reduced rank: of what the neighbours add to the own components, keep the R directions that explain most.
    from_own = torch.linalg.solve(gram[:own, :own], gram[:own, own:])  # [D, 8 L]
    added = gram[own:, own:] - gram[own:, :own] @ from_own
    full = best[own:]  # [8 L, V]
    explained = torch.linalg.cholesky(added).T @ full  # [8 L, V]
    left = torch.linalg.eigh(explained @ explained.T).eigenvectors[:, -NEIGHBOUR_RANK:]
    spread = torch.linalg.qr(explained.T @ left).Q  # [V, R], the strongest right singular vectors
    gather = spread.T @ full.T  # [R, 8 L]
    reduced = gather.T @ spread.T
    own_part = best[:own] + from_own @ (full - reduced)
    basis.gather.copy_(gather)
    basis.spread.copy_(spread)
    basis.synthesis.add_(own_part.T.float())
    basis.bias.add_((mean_out - mean_in @ torch.cat([own_part, reduced])).float())
