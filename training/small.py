"""The bundled models from a folder of pictures and films: `python -m training.train tiny-continuous`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model import weights
from model.config import VARIANTS
from model.network import ATokenNet, build
from model.packed import PackedTokens
from training.checkpoint import load_checkpoint
from training.config import RECIPES, TrainConfig
from training.data import Library, load_library, training_batch
from training.linear_fit import fit_linear_decoder
from training.loop import Limits, Trainer
from training.pca import fit_components, moving_patches, still_patches
from training.start import start_at, start_digits

FIT_BATCHES = 400
"""Batches that the linear decoder is fitted to, before training and after it."""

DIGIT_BATCHES = 60


def prepare(config: TrainConfig, data: Path, library: Library) -> ATokenNet:
    """The network of step 0: random layers, PCA of the training patches, digits if it has them, linear decoder."""
    torch.manual_seed(config.seed)
    model = VARIANTS[config.variant]
    net = build(model)
    still = fit_components(still_patches(data, model), model.encoder.width)
    moving = fit_components(moving_patches(data, model), model.encoder.width)
    start_at(net, still, moving, config.loss)
    if net.digits is not None:
        start_digits(net, still, moving, list(fit_batches(config, library, DIGIT_BATCHES, part=0)))
    fit_linear_decoder(net, fit_batches(config, library, FIT_BATCHES, part=1), config.loss.log_floor)
    return net


def fit_batches(config: TrainConfig, library: Library, count: int, part: int) -> Iterator[PackedTokens]:
    """Larger batches for the closed-form fits, made as they are asked for; each part has others."""
    data = replace(config.data, image_tokens=768, clip_tokens=640, sheets=0)
    for step in range(count):
        yield training_batch(config.seed + 1, part * 100_000 + step, library, data, VARIANTS[config.variant])


def export(trainer: Trainer, path: Path) -> None:
    """Write the averaged weights as a file that Tokenizer.load takes, in float16."""
    note = {"recipe": json.dumps(trainer.config.to_json()), "steps": str(trainer.step)}
    weights.save(trainer.ema, path, dtype=torch.float16, metadata=note)
    path.chmod(0o644)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, or go on training; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train one of the small models.")
    parser.add_argument("recipe", choices=sorted(RECIPES), help="which model, and how")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with images/train, videos/train"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on from the checkpoint in this folder")
    parser.add_argument("--minutes", type=float, help="end the schedule after this much time, over all sittings")
    parser.add_argument("--steps", type=int, help="end the schedule after so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-refit", dest="refit", action="store_false", help="leave the linear decoder as trained")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        return _run(given)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    folder: Path = given.resume or given.out or Path("runs") / given.recipe
    library = load_library(given.data)
    if given.resume:
        state = load_checkpoint(folder)
        config = state.config
        trainer = Trainer(config, build(VARIANTS[config.variant]), library)
        trainer.restore(state)
    else:
        config = replace(RECIPES[given.recipe], seed=given.seed)
        if given.steps is not None:
            config = replace(config, steps=given.steps)
        trainer = Trainer(config, prepare(config, given.data, library), library)
    print(json.dumps(config.to_json()), flush=True)
    trainer.run(folder, Limits(minutes=given.minutes), log=lambda line: print(line, flush=True))
    if given.refit:
        fit_linear_decoder(trainer.ema, fit_batches(config, library, FIT_BATCHES, part=2), config.loss.log_floor)
    path = folder / f"{config.variant}.safetensors"
    export(trainer, path)
    print(f"{trainer.step} steps in {trainer.elapsed_s / 60:.1f} minutes; weights in {path}")
    return 0
