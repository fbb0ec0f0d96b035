"""What a model's tokens are like over a set of items: how codebooks are used, how latents are spread.

n tokens, K codebooks of S codes, L latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from media.types import Tokens
from model.config import ModelConfig
from training.frechet import FeatureStats


@dataclass
class CodeCounts:
    """How often each code of each codebook came: int64 [K, S]."""

    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, config: ModelConfig) -> CodeCounts:
        """None yet, for the codebooks of a discrete model."""
        return cls(np.zeros((config.codebooks, config.codebook_size), np.int64))

    def update(self, codes: npt.NDArray[np.integer]) -> None:
        """Add codes [n, K]."""
        size = self.counts.shape[1]
        for book, column in enumerate(np.asarray(codes, np.int64).T):
            self.counts[book] += np.bincount(column, minlength=size)

    @property
    def used(self) -> list[float]:
        """Share of each codebook that came at all, 0..1; n / S at most."""
        return [float(share) for share in (self.counts > 0).mean(1)]

    @property
    def perplexity(self) -> list[float]:
        """exp(entropy) of each codebook, 1..S: with so many codes, all alike, as much could be said."""
        shares = self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1)
        logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
        return [float(value) for value in np.exp(-(shares * logs).sum(1))]


@dataclass
class TokenStats:
    """codes: of a discrete model; latents: the posterior means of a continuous one."""

    codes: CodeCounts | None
    tokens: int = 0
    latents: FeatureStats = field(default_factory=FeatureStats)

    @classmethod
    def of(cls, config: ModelConfig) -> TokenStats:
        """None yet, for such a model."""
        return cls(CodeCounts.of(config) if config.codebooks else None)

    def update(self, tokens: Tokens) -> None:
        """Add the tokens of one item."""
        self.tokens += len(tokens)
        if self.codes is not None and tokens.codes is not None:
            self.codes.update(tokens.codes)
        elif tokens.latents is not None:
            self.latents.update(torch.from_numpy(np.asarray(tokens.latents, np.float32)))

    def latents_record(self, model: str, protocol: str) -> dict[str, Any]:
        """What a diffusion model needs to scale latents: mean and standard deviation of each channel, [L] each.

        (latents - mean) / std has mean 0 and variance 1 over the tokens that were seen. count: of those.
        """
        return {
            "mean": self.latents.mean.tolist(),
            "std": self.latents.covariance.diagonal().sqrt().tolist(),
            "count": self.latents.count,
            "model": model,
            "protocol": protocol,
        }


def sidecar_name(model: str) -> str:
    """NAME.latents.json for a model as Tokenizer.load takes it: of its file or folder, not of its size, so that two
    models may lie in one folder."""
    path = Path(model.rpartition("=")[2])
    name = path.stem if path.suffix in {".safetensors", ".pt"} else path.name
    return f"{name or 'model'}.latents.json"
