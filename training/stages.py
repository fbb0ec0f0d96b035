"""The curriculum as data: four stages, what each draws and how long it runs, and the named recipes.

A recipe is a plain value: an ablation is a function that gives another one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from model.config import VARIANTS, ModelConfig, StackConfig

Task = Literal["image_rec", "video_rec", "asset_rec", "video_sem", "asset_sem"]

TASKS: tuple[Task, ...] = ("image_rec", "video_rec", "asset_rec", "video_sem", "asset_sem")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of the loss terms, as published.

    total = reconstruction * (l1 L1 + lpips LPIPS + gram Gram + clip CLIP) + semantic * semantics + kl * KL; the three
    perceptual terms are of images only. adversarial: of a PatchGAN against the decoder (0 as published, for ablations).
    """

    reconstruction: float = 0.2
    semantic: float = 1.0
    kl: float = 1e-8
    l1: float = 1.0
    lpips: float = 10.0
    gram: float = 1e3
    clip: float = 1.0
    adversarial: float = 0.0
    temperature: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW; linear warm-up over `warmup` steps to lr, cosine to final_lr, anew in each stage.

    encoder_scale: learning rate of the encoder as a share of lr. clip: global norm of the gradients. ema: decay of
    the averaged weights, reached as (step + 1) / (step + 10) so that a short run is no average of its start.
    """

    lr: float = 3e-4
    final_lr: float = 3e-5
    warmup: int = 2000
    encoder_scale: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.9999


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    cycle: tasks in the order of the steps, over and over (the published shares are ninths). latent_channels,
    bottleneck: of its network. distill: images of the distillation pass that every step makes beside its task, 0 for
    none. batch: samples of a step, over all GPUs, by task. image_side, video_side: (least, most) pixels of a side.
    frames, strides: of a reconstruction clip. clip_frames: most frames of an understanding clip, at one a second.
    """

    name: str
    steps: int
    cycle: tuple[Task, ...]
    latent_channels: int
    bottleneck: Literal["gaussian", "fsq"]
    distill: int
    batch: Mapping[Task, int]
    image_side: tuple[int, int]
    video_side: tuple[int, int] = (64, 512)
    frames: tuple[int, ...] = (16, 32)
    strides: tuple[int, int] = (1, 12)
    clip_frames: int = 64

    def __post_init__(self) -> None:
        """Refuse a cycle with unknown tasks, or with tasks that have no batch, and batches of what is no task."""
        if unknown := [name for name in self.batch if name not in TASKS]:
            raise ValueError(f"stage {self.name}: batch of {', '.join(unknown)}; tasks: {', '.join(TASKS)}")
        for task in self.cycle:
            if task not in TASKS or self.batch.get(task, 0) < 1:
                raise ValueError(f"stage {self.name}: task {task!r} has no batch; tasks: {', '.join(TASKS)}")
        if self.steps < 1 or not self.cycle:
            raise ValueError(f"stage {self.name}: {self.steps} steps of {len(self.cycle)} tasks; wanted at least one")

    def task(self, step: int) -> Task:
        """What step `step` reconstructs or describes."""
        return self.cycle[step % len(self.cycle)]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole curriculum. base: sizes of the stacks; the stages say how wide the latent is and how it is quantised.

    tokens: of one forward pass on one GPU; a step makes as many as its batch needs. rope: "4d" as published, or
    "modality": the pairs of t and z go to the axes that a modality has (an ablation). init: a SigLIP 2 folder's name
    or "scratch", for people; nothing is loaded by it.
    """

    name: str
    base: ModelConfig
    stages: tuple[Stage, ...]
    weights: Weights = field(default_factory=Weights)
    optim: Optim = field(default_factory=Optim)
    tokens: int = 32768
    rope: Literal["4d", "modality"] = "4d"
    seed: int = 0

    def model(self, stage: Stage) -> ModelConfig:
        """Sizes of the network of a stage."""
        return replace(
            self.base,
            latent_channels=stage.latent_channels,
            bottleneck=stage.bottleneck,
            codebooks=stage.latent_channels // 6 if stage.bottleneck == "fsq" else 0,
        )

    def stage(self, name: str) -> Stage:
        """A stage by its name; ValueError names those that there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage {name!r}; {self.name} has {', '.join(stage.name for stage in self.stages)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the run folder and the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """Inverse of to_json. Raises ValueError for keys that there are not, and where some are missing."""
        given = dict(values)
        if absent := [name for name in ("base", "stages", "weights", "optim") if name not in given]:
            raise ValueError(f"a recipe without {', '.join(absent)}")
        try:
            given["base"] = ModelConfig.from_json(given["base"])
        except (TypeError, KeyError) as error:  # the dataclass's own, which names the key
            raise ValueError(f"base: {error}") from error
        given["stages"] = tuple(_of(Stage, stage, "stages") for stage in given["stages"])
        given["weights"] = _of(Weights, given["weights"], "weights")
        given["optim"] = _of(Optim, given["optim"], "optim")
        return _of(cls, given, "recipe")


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """The recipe with `key=value` changes: `optim.lr=1e-4`, `weights.gram=0`, `stages.image.steps=1000`, `tokens=4096`.

    Values are JSON, or else text. Raises ValueError for a key that there is not, naming those that there are, and for
    a value of another type.
    """
    tree = recipe.to_json()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r}; wanted KEY=VALUE")
        *path, last = key.split(".")
        place: Any = tree
        hint: Any = Recipe
        walked = ""
        for part in path:
            if walked == "stages":
                place = {stage["name"]: stage for stage in place}
            place, hint = _child(place, part, walked, key), _hint_of(hint, part)
            walked = f"{walked}.{part}" if walked else part
        if walked == "stages":
            raise ValueError(f"{assignment!r}; wanted a key of the stage, as in stages.{last}.steps=1000")
        _child(place, last, walked, key)
        hint = _hint_of(hint, last)
        try:
            value = text if hint is str else json.loads(text)
        except json.JSONDecodeError:
            value = text
        if wanted := _wanted(value, hint):
            raise ValueError(f"{assignment!r}; wanted {wanted}")
        place[last] = value
    try:
        return Recipe.from_json(tree)
    except TypeError as error:  # a value that is an object, without some of its keys
        raise ValueError(f"{', '.join(assignments)}: {error}") from error


def _hint_of(hint: Any, part: str) -> Any:
    """The type of a part of what `hint` is the type of."""
    if is_dataclass(hint):
        return get_type_hints(hint)[part]
    return get_args(hint)[1 if get_origin(hint) is Mapping else 0]


def _wanted(value: Any, hint: Any) -> str:
    """What a value from JSON should be, in words, or nothing if it is that."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return "" if value in parts else f"one of {', '.join(map(str, parts))}"
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            return "a list"
        if parts[-1] is not ... and len(value) != len(parts):
            return f"a list of {len(parts)}"
        pairs = [(item, parts[0]) for item in value]
    elif get_origin(hint) is Mapping or is_dataclass(hint):
        if not isinstance(value, dict):
            return "keys of its own, as in KEY.ITS_KEY=VALUE"
        known = get_type_hints(hint) if is_dataclass(hint) else dict.fromkeys(value, parts[1])
        pairs = [(item, known[key]) for key, item in value.items() if key in known]
    elif hint is float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if right else "a number"
    elif hint is int:
        return "" if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    else:
        words = "true or false" if hint is bool else "text"
        return "" if isinstance(value, hint) else words
    return next((wanted for wanted in (_wanted(*pair) for pair in pairs) if wanted), "")


def _child(place: Any, part: str, walked: str, key: str) -> Any:
    if not isinstance(place, dict) or part not in place:
        known = ", ".join(place) if isinstance(place, dict) else "nothing"
        raise ValueError(f"unknown key {key!r}: {walked or 'a recipe'} has {known}")
    return place[part]


def _of(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    known = {item.name for item in fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(f"unknown key {name!r} in {where}; known: {', '.join(sorted(known))}")
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except TypeError as error:  # some keys are missing, which it names
        raise ValueError(f"{where}: {error}") from error


_VIDEO_CYCLE: tuple[Task, ...] = (
    *("video_rec", "image_rec", "video_rec", "video_sem", "video_rec"),
    *("video_rec", "image_rec", "video_rec", "video_rec"),
)
"""Ninths 2 : 1 : 6, spread out."""

_ASSET_CYCLE: tuple[Task, ...] = (
    *("video_rec", "image_rec", "asset_rec", "video_rec", "video_sem"),
    *("video_rec", "image_rec", "asset_sem", "video_rec"),
)
"""Ninths 2 : 1 : 4 : 1 : 1, spread out."""

_BATCH: dict[Task, int] = {
    "image_rec": 2048,
    "video_rec": 512,
    "asset_rec": 256,
    "video_sem": 1024,  # not known; "smaller" than the 8192 of images
    "asset_sem": 1024,
}


def paper(base: ModelConfig, name: str, seed: int = 0) -> Recipe:
    """The published curriculum for stacks of any size. Source: facts-training 1 and 2; gaps are said there."""
    common: dict[str, Any] = {"distill": 8192, "batch": _BATCH}
    stages = (
        Stage(
            name="image",
            steps=200_000,
            cycle=("image_rec",),
            latent_channels=32,
            bottleneck="gaussian",
            image_side=(64, 512),
            **common,
        ),
        Stage(
            name="video",
            steps=200_000,
            cycle=_VIDEO_CYCLE,
            latent_channels=48,
            bottleneck="gaussian",
            image_side=(64, 1024),
            video_side=(64, 512),
            **common,
        ),
        Stage(
            name="asset",
            steps=50_000,
            cycle=_ASSET_CYCLE,
            latent_channels=48,
            bottleneck="gaussian",
            image_side=(64, 2048),
            video_side=(64, 1024),
            **common,
        ),
        Stage(
            name="fsq",
            steps=100_000,
            cycle=_ASSET_CYCLE,
            latent_channels=48,
            bottleneck="fsq",
            image_side=(64, 2048),
            video_side=(64, 1024),
            **common,
        ),
    )
    return Recipe(name=name, base=base, stages=stages, seed=seed)


def stacks(width: int, blocks: int, heads: int, mlp: int) -> ModelConfig:
    """Encoder and decoder of one size, in the published form, with the latent of the first stage."""
    sizes: dict[str, Any] = {"width": width, "blocks": blocks, "heads": heads, "mlp": mlp}
    return ModelConfig(
        latent_channels=32,
        bottleneck="gaussian",
        encoder=StackConfig(norm="layer", bias=True, qk_norm=False, **sizes),
        decoder=StackConfig(norm="rms", bias=False, qk_norm=True, **sizes),
    )


def scaled(
    recipe: Recipe, *, steps: int, batch: int, distill: int, sides: tuple[int, int], tokens: int, warmup: int
) -> Recipe:
    """The same curriculum for a small machine: `steps` a stage, `batch` samples of every task, sides within `sides`."""
    stages = tuple(
        replace(
            stage,
            steps=steps,
            distill=distill,
            batch=dict.fromkeys(stage.batch, batch),
            image_side=sides,
            video_side=sides,
            frames=(4, 8),
            strides=(1, 3),
            clip_frames=8,
        )
        for stage in recipe.stages
    )
    return replace(
        recipe,
        stages=stages,
        tokens=tokens,
        optim=replace(recipe.optim, lr=1e-3, final_lr=1e-4, warmup=warmup, encoder_scale=1.0, ema=0.99),
    )


def without_gram(recipe: Recipe) -> Recipe:
    """Ablation: no term sees textures."""
    return replace(recipe, name=f"{recipe.name}-no-gram", weights=replace(recipe.weights, gram=0.0))


def with_patchgan(recipe: Recipe, weight: float = 0.1) -> Recipe:
    """Ablation: a light PatchGAN in the place of the Gram term, on the same network."""
    weights = replace(recipe.weights, gram=0.0, adversarial=weight)
    return replace(recipe, name=f"{recipe.name}-patchgan", weights=weights)


def with_modality_rope(recipe: Recipe) -> Recipe:
    """Ablation: 2D rotation for images, 3D for clips (t, x, y) and assets (x, y, z), instead of 4D for all."""
    return replace(recipe, name=f"{recipe.name}-modality-rope", rope="modality")


def joint(recipe: Recipe) -> Recipe:
    """Ablation: the continuous stages as one, all tasks from the first step, for as many steps."""
    last = recipe.stage("asset")
    steps = sum(stage.steps for stage in recipe.stages if stage.bottleneck == "gaussian")
    stages = (replace(last, steps=steps), *(stage for stage in recipe.stages if stage.bottleneck == "fsq"))
    return replace(recipe, name=f"{recipe.name}-joint", stages=stages)


def finetune(recipe: Recipe, stage: str, steps: int | None = None, lr: float = 3e-5) -> Recipe:
    """Go on from a published checkpoint: one stage of the recipe alone, at a low rate.

    steps: default a tenth of the stage's. lr: where the published schedule ends. Both are our choice.
    """
    whole = recipe.stage(stage)
    only = replace(whole, steps=max(1, whole.steps // 10) if steps is None else steps)
    optim = replace(recipe.optim, lr=lr, final_lr=lr / 10, warmup=min(recipe.optim.warmup, max(1, only.steps // 20)))
    return replace(recipe, name=f"{recipe.name}-finetune", stages=(only,), optim=optim)


CURRICULA: dict[str, Recipe] = {
    "so400m": paper(replace(VARIANTS["so400m-stage1"]), "so400m"),
    "base": paper(stacks(768, 12, 12, 3072), "base"),
    "tiny": scaled(
        paper(stacks(144, 3, 2, 576), "tiny"),
        steps=4000,
        batch=16,
        distill=16,
        sides=(64, 160),
        tokens=2048,
        warmup=100,
    ),
}
ABLATIONS = {
    "no-gram": without_gram,
    "patchgan": with_patchgan,
    "modality-rope": with_modality_rope,
    "joint": joint,
}
