"""AdamW in four groups (encoder or not, decays or not) and the published schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from training.stages import Optim
from training.student import Student

NO_DECAY = ("bias", "gamma", "norm", "position_embedding", "probe")
"""Parts of the names of parameters that do not decay: a choice, the paper does not say."""


def optimizer_of(student: Student, config: Optim) -> torch.optim.AdamW:
    """Groups carry `scale`, their share of the learning rate. Parameters without gradient are left out."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            scale = config.encoder_scale if name.startswith("net.encoder.") else 1.0
            decay = 0.0 if any(part in name for part in NO_DECAY) else config.weight_decay
            groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
        lr=config.lr,
        betas=config.betas,
    )


def begin_state(optimizer: torch.optim.Optimizer) -> None:
    """Give what has had no gradient yet the state that it would begin with: a checkpoint then always has all of it."""
    for group in optimizer.param_groups:
        for value in group["params"]:
            if not optimizer.state[value]:
                moments = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[value] = {"step": torch.tensor(0.0), **moments}


def learning_rate(config: Optim, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to final_lr at the last of `steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
    return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Every group gets its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
