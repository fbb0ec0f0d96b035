"""What a run is: frozen dataclasses and one table of named recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
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
class SemanticConfig:
    """What a step learns of meaning, beside its reconstruction; nothing if tokens is 0.

    tokens: of pictures a step. sides: pixels, multiples of 32, one drawn a step. place, texts, dense, cells: weights of
    the cosine to the teacher's place, of the distillation over texts, of the teacher's map, and of the cosine to its
    place of each part. mixed: how often a part of each picture is of another. clip_chance, set_chance: of one clip, and
    of set_tokens voxels of one mesh, in a step; each counts other_share of the pictures.
    """

    tokens: int = 0
    sides: tuple[int, ...] = (128, 160, 192, 224)
    place: float = 1.0
    texts: float = 0.2
    dense: float = 1.0
    cells: float = 1.0
    mixed: float = 0.4
    other_share: float = 0.2
    clip_chance: float = 0.0
    set_chance: float = 0.0
    set_tokens: int = 512


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and Muon for matrices of the blocks; linear warm-up, then a cosine down to `final` of each rate.

    matrix_lr: of Muon; 0 leaves the matrices to AdamW. edge_scale: learning rate of the layers that touch pixels or
    latents, as a share of lr; the linear path is left to the closed-form fits before and after. ema: decay of the
    averaged weights, which are what is shipped.
    """

    lr: float = 1.5e-3
    matrix_lr: float = 0.02
    edge_scale: float = 0.3
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
    many crops as reach that. clip_tokens: the same for clips; clip_frames, clip_grids: their sizes. panned: share of
    clips made by moving a window over a photograph, the rest are cut from films. sheets: stand-ins for voxel sets a
    step. pieces: of meshes' voxel sets a step, each of piece_tokens, one drawn. Without any of these a step has no
    reconstruction.
    """

    grids: tuple[tuple[int, int], ...] = ((8, 8), (8, 8), (6, 8), (12, 12), (16, 16))
    image_tokens: int = 512
    clip_tokens: int = 192
    clip_frames: tuple[int, ...] = (8, 16)
    clip_grids: tuple[tuple[int, int], ...] = ((4, 4), (6, 6), (8, 8))
    panned: float = 0.5
    sheets: int = 1
    pieces: int = 0
    piece_tokens: tuple[int, ...] = (64, 128, 256)

    @property
    def anything(self) -> bool:
        """Whether a step has something to reconstruct."""
        return bool(self.image_tokens or self.clip_tokens or self.sheets or self.pieces)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of a run.

    variant: entry of model.config.VARIANTS. steps: length of the cosine. seed: of data and weights. minutes: share of
    a run's time. train_encoder: False freezes the way to the latent (codes do not pass gradients).
    """

    stage: str
    variant: str
    steps: int = 12000
    minutes: float = 1.0
    seed: int = 0
    train_encoder: bool = True
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    semantic: SemanticConfig = field(default_factory=SemanticConfig)

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
        for name in ("clip_frames", "piece_tokens"):
            data[name] = tuple(data[name])
        fields["data"] = DataConfig(**data)
        semantic = fields["semantic"]
        fields["semantic"] = SemanticConfig(**{**semantic, "sides": tuple(semantic["sides"])})
        return cls(**fields)


# Reconstruction starts at its end: the first stage, which is most of the time, goes to the embedding alone.
_NOTHING = DataConfig(image_tokens=0, clip_tokens=0, sheets=0)
_IMAGES = DataConfig(grids=((8, 8), (6, 8), (8, 12)), image_tokens=128, clip_tokens=0, sheets=0)
_SEMANTIC = SemanticConfig(tokens=1536)
# The later stages go on from a trained encoder: the rates of the first one would undo a part of it.
_LATER = OptimConfig(lr=3e-4, matrix_lr=0.003)

RECIPES: dict[str, tuple[TrainConfig, ...]] = {
    "tiny-continuous": (
        TrainConfig(
            stage="image",
            variant="tiny-continuous",
            steps=40_000,
            minutes=0.8,
            data=_NOTHING,
            semantic=replace(_SEMANTIC, clip_chance=0.25, set_chance=0.25),
        ),
        TrainConfig(
            stage="video",
            variant="tiny-continuous",
            minutes=0.1,
            optim=_LATER,
            data=replace(_IMAGES, clip_tokens=96),
            semantic=replace(_SEMANTIC, clip_chance=0.3),
        ),
        TrainConfig(
            stage="asset",
            variant="tiny-continuous",
            minutes=0.1,
            optim=_LATER,
            data=replace(_IMAGES, clip_tokens=64, pieces=1, piece_tokens=(64, 128)),
            semantic=replace(_SEMANTIC, clip_chance=0.25, set_chance=0.25),
        ),
    ),
    "tiny-discrete": (
        TrainConfig(
            stage="fsq",
            variant="tiny-discrete",
            train_encoder=False,
            loss=LossConfig(kl=0.0),
            optim=OptimConfig(matrix_lr=0.0),
            data=DataConfig(image_tokens=512, clip_tokens=192, sheets=0, pieces=1),
        ),
    ),
}
"""The published order of stages. Codes come last: their decoder learns anew, the encoder is the same."""
