"""State of a run on disk: everything that the next step depends on, written so that a kill leaves a whole file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import TrainConfig
from training.run_folder import space_left
from training.snapshots import SaveError

NAME = "checkpoint.pt"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """step: steps done. elapsed_s: seconds spent in them, over all sittings. model, ema: state dicts."""

    config: TrainConfig
    step: int
    elapsed_s: float
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    distillation: dict[str, Tensor] = field(default_factory=dict)


def save_checkpoint(folder: Path, state: Checkpoint) -> Path:
    """Write DIR/checkpoint.pt in one atomic replacement. Raises SaveError; the one before is then still there."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / NAME, folder / f"{NAME}.partial"
    values = {
        "config": state.config.to_json(),
        "step": state.step,
        "elapsed_s": state.elapsed_s,
        "model": state.model,
        "ema": state.ema,
        "optimizer": state.optimizer,
        "distillation": state.distillation,
    }
    try:
        torch.save(values, partial)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch has its own for a full disk
        partial.unlink(missing_ok=True)
        raise SaveError(f"{path} could not be written: {error}{space_left(folder)}") from error
    return path


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read DIR/checkpoint.pt. Raises FileNotFoundError where there is none, ValueError for one of another version."""
    path = folder / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no checkpoint to resume from")
    values = torch.load(path, map_location="cpu", weights_only=True)
    try:
        config = TrainConfig.from_json(values["config"])
    except TypeError as error:
        raise ValueError(f"{path} is of a recipe that this version does not know ({error}); remove it") from None
    return Checkpoint(**{**values, "config": config})
