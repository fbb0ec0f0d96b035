"""A light PatchGAN, for the ablation against the Gram term: a critic of patches and its hinge losses.

Source: Isola et al. 2017, arXiv 1611.07004 (patches of 70 pixels); hinge form as usual in image tokenizers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from training.ranks import Ranks

LR = 2e-4


class PatchGAN(nn.Module):
    """Pictures [B, 3, H, W] in -1..1 to scores of patches of 70 pixels, 8 apart: [B, 1, H / 8 - 2, W / 8 - 2]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        # Group norm has no state and does not mix pictures, as batch norm would.
        for _ in range(2):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
                nn.GroupNorm(8, 2 * width),
                nn.LeakyReLU(0.2),
            ]
            width *= 2
        layers += [nn.Conv2d(width, 2 * width, 4, padding=1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(2 * width, 1, 4, padding=1))

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        scores: Tensor = self.layers(pictures)
        return scores


class Critic:
    """The critic of a run with its own optimiser. What it says of originals and of reconstructions is kept for logs."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        torch.manual_seed(seed)
        self.ranks = ranks
        self.net = PatchGAN().to(ranks.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=LR, betas=(0.5, 0.9))

    def judge(self, seen: Tensor) -> Tensor:
        """The generator's term: minus the mean score of each picture, [B]; no gradient reaches the critic."""
        self.net.requires_grad_(False)
        scores = -self.net(seen).mean((1, 2, 3))
        self.net.requires_grad_(True)
        return scores

    def learn(self, given: Tensor, seen: Tensor, count: int) -> dict[str, float]:
        """Add up the gradients of the hinge loss of some of a step's `count` pictures.

        Returns the loss and mean scores, each as a share of the step's.
        """
        real, fake = self.net(given.detach()), self.net(seen.detach())
        loss = (F.relu(1 - real).mean((1, 2, 3)) + F.relu(1 + fake).mean((1, 2, 3))).sum() / count
        loss.backward()
        real, fake = real.detach(), fake.detach()
        return {
            "critic/loss": float(loss.detach()),
            "critic/real": float(real.mean((1, 2, 3)).sum()) / count,
            "critic/fake": float(fake.mean((1, 2, 3)).sum()) / count,
        }

    def step(self) -> None:
        """Move, after all pictures of a step."""
        if self.ranks.world > 1:
            for parameter in self.net.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; made complete, so that one can be read into it."""
        if not self.optimizer.state:
            for parameter in self.net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            kept = {name: value.clone() for name, value in self.net.state_dict().items()}
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.net.load_state_dict(kept)
            for moments in self.optimizer.state.values():
                moments["step"].zero_()
        return {"critic": self.net.state_dict(), "critic_optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of state."""
        self.net.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["critic_optimizer"])
