"""The bundled models from a folder of pictures and films: `python -m training.train tiny-continuous`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from media.types import Voxels
from model import weights
from model.config import VARIANTS
from model.network import ATokenNet, build
from model.packed import PackedTokens
from training.checkpoint import NAME as CHECKPOINT
from training.checkpoint import load_checkpoint
from training.config import RECIPES, TrainConfig
from training.data import Library, load_library, training_batch
from training.distill import Distillation, Lessons
from training.expert_fit import fit_path_experts
from training.lessons import load_lessons
from training.linear_fit import fit_linear_decoder
from training.loop import Limits, Trainer
from training.measured import at_least
from training.pca import fit_components, moving_patches, still_patches
from training.ranks import Ranks, joined
from training.shown import cached_sets
from training.start import start_at

FIT_BATCHES, REFIT_BATCHES = 300, 150
"""Batches that the linear decoder is fitted to, before training and after each stage."""

EXPERT_BATCHES = 240


def prepare(config: TrainConfig, data: Path, library: Library) -> ATokenNet:
    """The network of step 0: random layers, PCA of the training patches, experts on top of it, linear decoder."""
    torch.manual_seed(config.seed)
    model = VARIANTS[config.variant]
    net = build(model)
    count = max(model.encoder.width, model.components)
    still = fit_components(still_patches(data, model), count)
    moving = fit_components(moving_patches(data, model), count)
    start_at(net, still, moving, config.loss)
    if net.linear_path is not None:
        draws = fit_batches(config, library, EXPERT_BATCHES, part=3)
        fit_path_experts(net.linear_path, draws, config.loss.log_floor, config.seed)
    fit_linear_decoder(net, fit_batches(config, library, FIT_BATCHES, part=1), config.loss.log_floor)
    return net


def fit_batches(config: TrainConfig, library: Library, count: int, part: int) -> Iterator[PackedTokens]:
    """Larger batches for the closed-form fits, made as they are asked for; each part has others."""
    data = replace(config.data, image_tokens=768, clip_tokens=640, sheets=0, pieces=0)
    for step in range(count):
        yield training_batch(config.seed + 1, part * 100_000 + step, library, data, VARIANTS[config.variant])


def export(net: ATokenNet, config: TrainConfig, steps: int, path: Path, dtype: torch.dtype) -> None:
    """Write a network as a file that Tokenizer.load takes."""
    note = {"recipe": json.dumps(config.to_json()), "steps": str(steps)}
    partial = path.with_suffix(".partial")
    weights.save(net, partial, dtype=dtype, metadata=note)
    partial.chmod(0o644)
    partial.replace(path)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text}; wanted more than 0 minutes")
    return minutes


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on training; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train one of the small models.")
    parser.add_argument("recipe", choices=sorted(RECIPES), help="which model, and how")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with images/train, videos/train, meshes/train"
    )
    parser.add_argument(
        "--more", type=Path, action="append", default=[], metavar="DIR", help="a folder of more pictures"
    )
    parser.add_argument(
        "--drawings", type=Path, action="append", default=[], metavar="DIR", help="one of drawings, for the embedding"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE); the same again goes on")
    parser.add_argument("--lessons", type=Path, default=Path("runs/lessons"), help="folder for what the teachers say")
    parser.add_argument("--no-semantics", dest="semantics", action="store_false", help="without teachers")
    parser.add_argument(
        "--encoder", type=Path, metavar="FILE", help="encoder of this model: to begin with, or tiny-discrete's for good"
    )
    parser.add_argument("--minutes", type=_minutes, help="end the schedule after this much time, over all sittings")
    parser.add_argument("--steps", type=at_least(1), help="end each stage after so many steps")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="leave the linear decoder as trained")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    if given.drawings and not given.semantics:
        parser.error("--drawings are for the embedding alone: give them without --no-semantics")
    if given.encoder is not None and not given.encoder.is_file():
        parser.error(f"--encoder {given.encoder}: no such file")
    torch.set_num_threads(given.threads)
    try:
        with joined() as ranks:
            return _run(given, ranks)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace, ranks: Ranks) -> int:
    folder: Path = given.out or Path("runs") / given.recipe
    stages = [replace(stage, seed=given.seed) for stage in RECIPES[given.recipe]]
    if given.steps is not None:
        stages = [replace(stage, steps=given.steps) for stage in stages]
    library = load_library(given.data, given.more)
    lessons = _lessons(given, stages, ranks)
    if lessons is None:
        # Without teachers a stage of meaning alone has nothing to learn; its time is the others'.
        left = [stage for stage in stages if stage.data.anything]
        share = sum(stage.minutes for stage in left) / sum(stage.minutes for stage in stages)
        stages = [replace(stage, minutes=stage.minutes / share) for stage in left]
    if any(stage.data.pieces for stage in stages):
        library = replace(library, sets=_sets(given, lessons))
    before: ATokenNet | None = None
    heads: dict[str, Tensor] = {}
    for stage in stages:
        done = folder / f"{stage.stage}.safetensors"
        if not done.is_file() and not _run_stage(given, stage, before, heads, library, lessons, folder, ranks):
            if ranks.first:
                print(f"told to stop in stage {stage.stage}, which is saved: the same command goes on")
            return 0
        ranks.wait()
        _check_recipe(done, stage)
        before = weights.load(done)
        if (folder / stage.stage / CHECKPOINT).is_file():
            heads = load_checkpoint(folder / stage.stage).distillation or heads
    assert before is not None
    path = folder / f"{given.recipe}.safetensors"
    if given.encoder is not None and not stages[-1].train_encoder:
        take_encoder(before, weights.load(given.encoder))
    if ranks.first:
        export(before, stages[-1], int(_header(done)["steps"]), path, torch.float16)
        print(f"weights in {path}")
    return 0


def _run_stage(
    given: argparse.Namespace,
    config: TrainConfig,
    before: ATokenNet | None,
    heads: Mapping[str, Tensor],
    library: Library,
    lessons: Lessons | None,
    folder: Path,
    ranks: Ranks,
) -> bool:
    """Train a stage, or go on; returns whether it came to its end."""
    place = folder / config.stage
    resumed = (place / CHECKPOINT).is_file()
    if resumed:
        net = build(VARIANTS[config.variant])
    elif before is not None:
        net = before
    else:
        net = prepare(config, given.data, library)
        if given.encoder is not None:
            net.encoder.load_state_dict(weights.load(given.encoder).encoder.state_dict())
    distillation = None
    if lessons is not None and config.semantic.tokens:
        torch.manual_seed(config.seed)
        distillation = Distillation(config.semantic, lessons, net.config.encoder.width)
        if heads and before is not None:
            # New ones would pull at the encoder while they learn.
            distillation.load_state_dict(heads)
    trainer = Trainer(config, net, library, distillation)
    if resumed:
        state = load_checkpoint(place)
        if state.config != config:
            raise ValueError(f"{place} was begun with another recipe; wanted {config.stage} as it is now")
        trainer.restore(state)
    say = _say if ranks.first else _silent
    say(json.dumps(config.to_json()))
    minutes = None if given.minutes is None else given.minutes * config.minutes
    trainer.run(place, Limits(minutes=minutes), log=say)
    if trainer.told_to_stop or not ranks.first:
        return not trainer.told_to_stop
    if given.refit:
        fit_linear_decoder(trainer.ema, fit_batches(config, library, REFIT_BATCHES, part=2), config.loss.log_floor)
    export(trainer.ema, config, trainer.step, folder / f"{config.stage}.safetensors", torch.float32)
    _say(f"{config.stage}: {trainer.step} steps in {trainer.elapsed_s / 60:.1f} minutes")
    return True


def _check_recipe(done: Path, config: TrainConfig) -> None:
    """Raises ValueError if the weights of a stage are those of another recipe; how long it ran does not count."""
    found = json.loads(_header(done).get("recipe", "{}"))
    wanted = json.loads(json.dumps(config.to_json()))
    other = sorted(key for key in {*found, *wanted} - {"steps", "minutes", "seed"} if found.get(key) != wanted.get(key))
    if other:
        raise ValueError(f"{done} was made by another recipe ({', '.join(other)} differ); give another --out")


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _lessons(given: argparse.Namespace, stages: Sequence[TrainConfig], ranks: Ranks) -> Lessons | None:
    """What the teachers say; one process asks them, the others read it."""
    if not given.semantics or not any(stage.semantic.tokens for stage in stages):
        return None
    width = VARIANTS[stages[0].variant].encoder.width
    if ranks.first:
        load_lessons(given.data, given.more, given.lessons, width, given.seed, given.drawings)
    ranks.wait()
    return load_lessons(given.data, given.more, given.lessons, width, given.seed, given.drawings)


def _sets(given: argparse.Namespace, lessons: Lessons | None) -> tuple[Voxels, ...]:
    """Voxels of the training meshes."""
    if lessons is not None:
        return lessons.sets.voxels if lessons.sets else ()
    meshes = given.data / "meshes" / "train"
    return cached_sets(meshes, None, given.lessons / "voxels.pt").voxels if meshes.is_dir() else ()


@torch.no_grad()
def take_encoder(net: ATokenNet, other: ATokenNet) -> None:
    """The encoder of another model, and with it its embedding, for one whose codes do not depend on it."""
    if net.proj.weight[: net.config.latent_channels].any():
        raise ValueError("this model's latents depend on its own encoder")
    net.encoder.load_state_dict(other.encoder.state_dict())


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(_: str) -> None:
    return
