"""Several optimisers as one: matrices want another than vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Optimizers:
    """Steps all of its parts; the little of torch.optim.Optimizer that a training loop asks for."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of all parts, in order."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """What load_state_dict takes."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state of as many parts in the same order."""
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)
