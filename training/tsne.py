"""Exact t-SNE in plain torch, for maps of a few thousand items. N items.

Source: van der Maaten and Hinton 2008; step size and start as Belkina et al. 2019 and Kobak and Berens 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, EARLY = 750, 250
EXAGGERATION = 12.0
PERPLEXITY = 30.0


@torch.no_grad()
def tsne(distances: Tensor, start: Tensor, perplexity: float = PERPLEXITY) -> Tensor:
    """A map, float64 [N, 2], whose neighbours are those of the distances [N, N], squared; start: [N, 2], as of PCA.

    Nothing in it is random. perplexity: about how many neighbours count; at most a third of the items.
    """
    count = len(distances)
    if distances.shape != (count, count) or start.shape != (count, 2) or count < 4:
        raise ValueError(f"distances {list(distances.shape)}, start {list(start.shape)}; wanted [N, N], [N, 2], N > 3")
    near = _affinities(distances.double(), min(perplexity, (count - 1) / 3))
    p = ((near + near.T) / (2 * count)).clamp(min=1e-12)
    places = start.double() - start.double().mean(0)
    places = places / places[:, 0].std().clamp(min=1e-12) * 1e-4
    rate = max(50.0, count / EXAGGERATION / 4)
    speed, gains = torch.zeros_like(places), torch.ones_like(places)
    for step in range(STEPS):
        wanted = p * EXAGGERATION if step < EARLY else p
        kernel = 1 / (1 + torch.cdist(places, places).square())
        kernel.fill_diagonal_(0)
        pull = (wanted - (kernel / kernel.sum()).clamp(min=1e-12)) * kernel
        slope = 4 * (pull.sum(1, keepdim=True) * places - pull @ places)
        gains = torch.where(slope.sign() != speed.sign(), gains + 0.2, gains * 0.8).clamp(min=0.01)
        speed = (0.5 if step < EARLY else 0.8) * speed - rate * gains * slope
        places = places + speed
        places = places - places.mean(0)
    return places


def _affinities(distances: Tensor, perplexity: float) -> Tensor:
    """Rows of Gaussian weights [N, N] that sum to 1 and whose entropy is log(perplexity), by bisection."""
    count = len(distances)
    own = torch.eye(count, dtype=torch.bool)
    scaled = distances / distances[~own].mean().clamp(min=1e-300)
    low, high = torch.full((count, 1), -20.0).double(), torch.full((count, 1), 20.0).double()
    target = torch.tensor(perplexity, dtype=torch.float64).log()
    for _ in range(60):
        middle = (low + high) / 2
        logits = (-scaled * middle.exp()).masked_fill(own, -torch.inf)
        weights = logits.softmax(1)
        entropy = -torch.xlogy(weights, weights).sum(1, keepdim=True)
        too_wide = entropy > target
        low, high = torch.where(too_wide, middle, low), torch.where(too_wide, high, middle)
    return weights
