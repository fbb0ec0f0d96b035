"""What a run is: frozen dataclasses and one table of named recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the loss terms.

    l1: mean absolute error. log_mse: log of each item's own mean square error, so that a busy picture counts no more
    than a calm one. log_floor: added to the error before the log (pixels are -1..1). kl: divergence of the posterior
    from a unit Gaussian, summed over the channels of a token, mean over tokens.
    """

    l1: float = 0.0
    log_mse: float = 1.0
    log_floor: float = 2e-4
    kl: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and a cosine down to lr * final.

    edge_scale: learning rate of the layers that touch pixels or latents, as a share of lr. linear_scale: the same for
    the linear path; 0 leaves it to the closed-form fits before and after. ema: decay of the averaged weights, which are
    what is shipped.
    """

    lr: float = 1.5e-3
    edge_scale: float = 0.3
    linear_scale: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    warmup_steps: int = 100
    final: float = 0.02
    ema: float = 0.995


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a step sees.

    grids: token grids (rows, columns) of image crops, one drawn a step. image_tokens: tokens of images a step, as
    many crops as fit. clip_tokens: the same for clips; clip_frames, clip_grids: their sizes. panned: share of clips
    made by moving a window over a photograph, the rest are cut from films. sheets: stand-ins for voxel sets a step.
    """

    grids: tuple[tuple[int, int], ...] = ((8, 8), (8, 8), (6, 8), (12, 12), (16, 16))
    image_tokens: int = 512
    clip_tokens: int = 192
    clip_frames: tuple[int, ...] = (8, 16)
    clip_grids: tuple[tuple[int, int], ...] = ((4, 4), (6, 6), (8, 8))
    panned: float = 0.5
    sheets: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. variant: entry of model.config.VARIANTS. steps: length of the cosine. seed: of data and weights.

    train_encoder: False freezes the way to the latent (codes do not pass gradients).
    """

    variant: str
    steps: int = 12000
    seed: int = 0
    train_encoder: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain values, printed at the start of a run and stored in its checkpoints."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Inverse of to_json; unknown keys are a TypeError."""
        fields = dict(values)
        fields["loss"] = LossConfig(**fields["loss"])
        fields["optim"] = OptimConfig(**{**fields["optim"], "betas": tuple(fields["optim"]["betas"])})
        data = dict(fields["data"])
        for name in ("grids", "clip_grids"):
            data[name] = tuple((int(rows), int(columns)) for rows, columns in data[name])
        data["clip_frames"] = tuple(data["clip_frames"])
        fields["data"] = DataConfig(**data)
        return cls(**fields)


RECIPES: dict[str, TrainConfig] = {
    # Measured on held-aside training pictures after 300 steps: a higher rate at the edges gains, the rest holds.
    "tiny-continuous": TrainConfig(variant="tiny-continuous", optim=OptimConfig(lr=1.5e-3, edge_scale=0.3)),
    "tiny-discrete": TrainConfig(variant="tiny-discrete", train_encoder=False, loss=LossConfig(kl=0.0)),
}
