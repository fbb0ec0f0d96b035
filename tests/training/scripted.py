"""Small TorchScript files that are called as the published feature networks are, with 16 features."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.feature_nets import I3D, INCEPTION

SMALL_INCEPTION = replace(INCEPTION, features=16)
SMALL_I3D = replace(I3D, features=16)


class Pictures(nn.Module):
    """uint8 [B, 3, H, W] to grey levels of a 4 x 4 grid, and refuses what the published network is not given."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8
        assert return_features
        return nn.functional.adaptive_avg_pool2d(x.float().mean(1), 4).flatten(1)


class Clips(nn.Module):
    """Floats [B, 3, T, H, W] to grey levels of a 4 x 4 grid, times a hundred."""

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert float(x.abs().max()) <= 1
        return nn.functional.adaptive_avg_pool2d(x.mean([1, 2]) * 100, 4).flatten(1)


class NoSwitch(nn.Module):
    """Some other network."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean([2, 3])


def script(module: nn.Module, path: Path) -> Path:
    """Write it as TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), str(path))
    return path
