"""`python -m training.train smoke`: the whole recipe in small, on drawn data with random teachers.

All four stages with every loss, a stop and a resume in the middle, pictures, weights that the tokenizer loads. What it
shows is that everything runs on this machine; what it trains is worth nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from model import Tokenizer
from training.chain import Work, run_stages
from training.curriculum import Habits
from training.generated import Generated, hash_tokens
from training.ranks import joined
from training.stages import Recipe, paper, scaled, stacks
from training.teachers import random_teachers

STEPS = 9
"""A stage: one whole cycle of tasks."""

WIDTH = 64
SIDES = (32, 48)


def smoke_recipe() -> Recipe:
    """Two blocks of width 64 on each side, pictures of 32 to 48 pixels."""
    base = stacks(WIDTH, 2, 2, 4 * WIDTH)
    small = scaled(paper(base, "smoke"), steps=STEPS, batch=4, distill=4, sides=SIDES, tokens=1024, warmup=2)
    # Random teachers give features of any size: weights as published would be dominated by one of them.
    return replace(small, weights=replace(small.weights, lpips=1.0, gram=1.0))


def smoke(folder: Path, log: Callable[[str], None] = print) -> int:
    """Run it; returns 0 if every stage ended and its weights load."""
    began = time.monotonic()
    recipe = smoke_recipe()
    source = Generated(sides=SIDES)
    work = Work(
        source=lambda _: source,
        shown=lambda _: Generated(seed=1, sides=SIDES),
        teachers=random_teachers(WIDTH, seed=0),
        tokenize=hash_tokens,
    )
    with joined() as ranks:
        habits = Habits(log_every=3, save_every=3, look_every=0)
        stopped = run_stages(recipe, folder, work, ranks, habits=habits, log=log, stop_at={"asset": 5})
        log(f"stopped on purpose in the third stage (done: {stopped}); going on")
        done = run_stages(recipe, folder, work, ranks, habits=habits, log=log)
    for stage in recipe.stages:
        path = folder / f"{stage.name}.safetensors"
        tokenizer = Tokenizer.load(str(path), device="cpu")
        item = source.draw("image_rec", [0])[0].item
        back = tokenizer.decode(tokenizer.encode([item]))[0]
        log(f"{path.name}: a {item.kind} comes back as a {back.kind}")
    log(f"smoke run of {len(recipe.stages)} stages: {time.monotonic() - began:.0f} s; look at {folder / 'pictures'}")
    return 0 if done and not stopped else 1
