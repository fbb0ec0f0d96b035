"""The one command: `python -m training.train tiny-continuous --data ../shared/data --minutes 40`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from model import weights
from model.config import VARIANTS
from model.network import ATokenNet, build
from training.checkpoint import load_checkpoint
from training.config import RECIPES, TrainConfig
from training.data import Library, load_library, training_batch
from training.loop import Limits, Trainer
from training.neighbours import fit_neighbours
from training.pca import fit_components, moving_patches, still_patches
from training.start import start_at, start_digits

START_BATCHES = 120
"""Batches that the closed-form start is fitted to. Their seed is not the run's."""


def prepare(config: TrainConfig, data: Path, library: Library) -> ATokenNet:
    """The network of step 0: random layers, PCA of the training patches, digits if it has them, neighbours."""
    torch.manual_seed(config.seed)
    model = VARIANTS[config.variant]
    net = build(model)
    still = fit_components(still_patches(data, model), model.encoder.width)
    moving = fit_components(moving_patches(data, model), model.encoder.width)
    start_at(net, still, moving, config.loss)
    batches = [training_batch(config.seed + 1, step, library, config.data, model) for step in range(START_BATCHES)]
    if net.digits is not None:
        start_digits(net, still, moving, batches)
    fit_neighbours(net, batches, config.loss.log_floor)
    return net


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
    path = folder / f"{config.variant}.safetensors"
    export(trainer, path)
    print(f"{trainer.step} steps in {trainer.elapsed_s / 60:.1f} minutes; weights in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
