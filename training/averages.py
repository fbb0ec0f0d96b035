"""Averaged weights (EMA): what is evaluated and shipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.ranks import local


class Average:
    """A moving average of the parameters of a module, cut over ranks as they are."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.values: dict[str, Tensor] = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step `step` (0, 1, ...); early steps weigh less of the past."""
        decay = min(self.decay, (step + 1) / (step + 10))
        now = dict(self.module.named_parameters())
        means = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(means, [local(now[name]).detach() for name in self.values], 1 - decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over another average of the same parameters."""
        for name, value in self.values.items():
            local(value).copy_(local(values[name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has the averaged weights."""
        now = dict(self.module.named_parameters())
        with torch.no_grad():
            kept = {name: local(value).clone() for name, value in now.items()}
            for name, value in self.values.items():
                local(now[name]).copy_(local(value))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    local(now[name]).copy_(value)
