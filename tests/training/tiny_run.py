"""A curriculum of seconds: networks of width 32, drawn data, random teachers. Also a script, for several ranks."""

from __future__ import annotations

import argparse
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from training.chain import Work, run_stages
from training.curriculum import Habits, StageTrainer
from training.fresh import fresh
from training.generated import Generated, hash_tokens
from training.ranks import Ranks, joined
from training.stages import Recipe, paper, scaled, stacks
from training.student import Student
from training.teachers import Teachers, random_teachers

WIDTH = 32
SIDES = (16, 32)


def recipe(steps: int = 4, tokens: int = 256) -> Recipe:
    small = scaled(
        paper(stacks(WIDTH, 1, 2, 64), "test"), steps=steps, batch=4, distill=4, sides=SIDES, tokens=tokens, warmup=2
    )
    return replace(small, weights=replace(small.weights, lpips=1.0, gram=1.0))


def trainer(given: Recipe, stage: str, ranks: Ranks, source: Generated | None = None) -> StageTrainer:
    found = given.stage(stage)
    return StageTrainer(given, found, Student(fresh(given.model(found), 0)), *pieces(source), hash_tokens, ranks)


def pieces(source: Generated | None = None) -> tuple[Teachers, Generated]:
    return random_teachers(WIDTH, seed=0), source or Generated(sides=SIDES)


def work() -> Work:
    teachers, source = pieces()
    return Work(
        source=lambda _: source, shown=lambda _: Generated(seed=1, sides=SIDES), teachers=teachers, tokenize=hash_tokens
    )


def only(given: Recipe, stage: str) -> Recipe:
    """One stage from fresh weights."""
    return replace(given, stages=(given.stage(stage),))


def stopped_by_sigterm(command: Sequence[str]) -> tuple[int, str]:
    """Status and further output of a curriculum that is told to stop after its first step."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            deadline = time.monotonic() + 60
            while "image 1/" not in process.stdout.readline():
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)[0]
        finally:
            if process.poll() is None:
                process.kill()
    return process.returncode, rest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with joined() as ranks:
        run_stages(recipe(given.steps), given.folder, work(), ranks, habits=Habits(log_every=1, save_every=0))


if __name__ == "__main__":
    main()
