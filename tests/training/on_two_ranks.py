"""What two processes do, in one launch, since a launch costs seconds. Each part leaves files for test_ranks.py."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.training.tiny_run import only, recipe, trainer, work
from training.chain import run_stages
from training.curriculum import Habits, NotFiniteError, StageTrainer
from training.ranks import Ranks, joined, local
from training.snapshots import Snapshots
from training.stages import Recipe

STEPS = {"image": 2, "asset": 8, "fsq": 8}
"""Of each stage: the eighth of a cycle is the first with words of assets."""

HALT = 5


def plan(stage: str) -> Recipe:
    """With every term: the critic beside Gram."""
    every = recipe(STEPS[stage])
    return only(replace(every, weights=replace(every.weights, adversarial=0.1)), stage)


def go(stage: str, folder: Path, ranks: Ranks, stop_at: int | None = None) -> None:
    """Train a stage, or go on with it."""
    unseen = replace(work(), shown=None)
    stop = {} if stop_at is None else {stage: stop_at}
    run_stages(plan(stage), folder, unseen, ranks, habits=Habits(log_every=1, save_every=0), stop_at=stop)


def poison(net: nn.Module) -> None:
    """From now on gradients are infinite, and the loss is not."""

    def spoil(_: nn.Module, __: object, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient * math.inf)

    net.encoder.blocks[0].register_forward_hook(spoil)  # type: ignore[union-attr, index]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with joined() as ranks:
        for stage in STEPS:
            go(stage, folder / "two", ranks)
        go("asset", folder / "down", ranks, stop_at=HALT)
        go("asset", folder / "up", ranks)
        told = {"parts": _parts(trainer(recipe(), "asset", ranks))}
        for how in ("loss", "gradient"):
            told[how] = _broken(how, folder / how, ranks)
        (folder / f"told-{ranks.rank}.json").write_text(json.dumps(told))


def _parts(run: StageTrainer) -> dict[str, list[object]]:
    """Of each parameter: how it is laid out, values of this rank, values of all."""
    return {
        name: [str(value.placements) if isinstance(value, DTensor) else "whole", local(value).numel(), value.numel()]
        for name, value in (*run.student.named_parameters(), *((f"mean {k}", v) for k, v in run.average.values.items()))
    }


def _broken(how: str, folder: Path, ranks: Ranks) -> list[object]:
    """One rank of two has what is not a number in step 4; what this rank raises, and whether weights were changed."""
    run = trainer(recipe(8), "asset", ranks)
    before: list[Tensor] = []

    def look(_: int) -> None:
        before.extend(local(value).clone() for value in run.student.parameters())
        if ranks.first:
            return
        if how == "gradient":
            poison(run.student.net)
        else:
            for weight in run.teachers.text.parameters():  # type: ignore[attr-defined]
                weight.fill_(math.nan)

    try:
        run.run(Snapshots(folder, ranks), habits=Habits(log_every=0, save_every=3, look_every=4), look=look)
    except NotFiniteError as error:
        now = [local(value) for value in run.student.parameters()]
        return [str(error), all(map(torch.equal, before, now))]
    return ["ran on", False]


if __name__ == "__main__":
    main()
