"""`python -m training.study NAME`: one question about the recipe, answered by runs that differ in one thing.

Each study trains its variants over several seeds from the same starts on the same samples, and writes a report with
what came out, its spread, curves, seeds and the command. Without options it takes drawn shapes, random teachers and
tiny networks, and answers for those only; with a recipe, shards and teachers (the options of a curriculum,
study_options.py; also under torchrun) it answers for these.

Two studies train nothing and look at a given model instead: `shift` (shift_study.py) and `geometry`
(geometry_study.py).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.errors import ModelError
from training import geometry_study, shift_study
from training.chain import run_stages
from training.curriculum import Habits, NotFiniteError
from training.curriculum_cli import start_of
from training.measured import command, minutes_since, say
from training.ranks import Ranks, joined
from training.shard_source import BadSamplesError
from training.snapshots import SaveError
from training.stages import Recipe, Stage, joint, with_modality_rope, with_patchgan, without_gram
from training.study_options import FREE, Bench, parser, recipe_of
from training.study_report import Curve, Report, write_report


@dataclass(frozen=True)
class Study:
    """question: in words. variants: a recipe each, by name; the first is what others are compared with."""

    question: str
    variants: Callable[[Recipe], dict[str, Recipe]]


def _one_stage(recipe: Recipe, name: str) -> Recipe:
    return replace(recipe, stages=(recipe.stage(name),))


def _rope(recipe: Recipe) -> dict[str, Recipe]:
    alone = _one_stage(recipe, "asset")
    return {"4d": alone, "modality": with_modality_rope(alone)}


def _gram(recipe: Recipe) -> dict[str, Recipe]:
    alone = _one_stage(recipe, "image")
    return {"gram": alone, "patchgan": with_patchgan(alone), "neither": without_gram(alone)}


def _curriculum(recipe: Recipe) -> dict[str, Recipe]:
    continuous = tuple(stage for stage in recipe.stages if stage.bottleneck == "gaussian")
    # Of the latent and the pictures that the others end with: image quality must not answer for these.
    last = recipe.stage("asset")
    image = replace(
        recipe.stage("image"),
        steps=sum(stage.steps for stage in continuous),
        latent_channels=last.latent_channels,
        image_side=last.image_side,
    )
    return {
        "curriculum": replace(recipe, stages=continuous),
        "joint": replace(joint(recipe), stages=joint(recipe).stages[:1]),
        "image only": replace(recipe, stages=(image,)),
    }


STUDIES: dict[str, Study] = {
    "rope": Study(
        "Does rotation over all four axes learn faster, or end better, than over a modality's own axes?", _rope
    ),
    "gram": Study("Gram term, light PatchGAN, or neither: Frechet distance, critic, collapses?", _gram),
    "curriculum": Study(
        "Does image quality hold when clips and assets are added in stages, against all at once and images only?",
        _curriculum,
    ),
}


MEASUREMENTS: dict[str, Callable[[Sequence[str]], int]] = {
    "shift": shift_study.main,
    "geometry": geometry_study.main,
}
"""Studies of a given model: they take the arguments after their name, and return the exit status."""

FIGURES = ("images", "clips", "assets", "critic")
"""First parts of the names of what a report has; what else is in metrics.jsonl stays there."""


def run_study(given: argparse.Namespace, log: Callable[[str], None] = say) -> Path | None:
    """Train every variant with every seed, or go on with it; returns the path of the report.

    None where SIGTERM ended it before that, and of ranks that are not the first.
    """
    began = time.monotonic()
    study = STUDIES[given.name]
    folder = given.out or Path("runs") / f"study-{given.name}"
    base = recipe_of(given, 0)
    plans = study.variants(base)
    stages = [stage for plan in plans.values() for stage in plan.stages]
    with joined() as ranks, closing(Bench(given, base, stages, ranks)) as bench:
        _claim(folder, {**_plain(given), "frechet": bench.looks.features.words}, ranks)
        curves: list[Curve] = []
        runs: list[Path] = []
        for seed in range(given.seeds):
            for variant, plan in study.variants(recipe_of(given, seed)).items():
                if ranks.first:
                    log(f"{given.name}: {variant}, seed {seed}, from minute {minutes_since(began)}")
                run = folder / f"{variant.replace(' ', '-')}-seed{seed}"
                ended = _train(plan, run, bench, _between_looks(stages, given.looks), log)
                if ended is None:
                    return None
                if ranks.first:
                    curves.append(_curve(variant, seed, run, plan, ended == "collapsed"))
                    runs.append(run)
        if not ranks.first:
            return None
        settings = {
            **_words(given, base, plans, ranks),
            **bench.words(),
            "seeds": ", ".join(str(seed) for seed in range(given.seeds)),
            "minutes": f"{sum(map(_minutes, runs)):.1f} of all runs, from the first line of each to its last look",
            "command": given.command,
        }
        if bench.looks.note:
            settings["Frechet distance"] += f" ({bench.looks.note})"
        return write_report(
            Report(name=given.name, question=study.question, settings=settings, curves=tuple(curves)), folder
        )


def _between_looks(stages: Sequence[Stage], looks: int) -> int:
    """Steps from a look to the next, the same in all stages and variants.

    A divisor of all their steps, so that all are looked at at the same ones, unless that makes twice as many looks.
    """
    most = max(1, min(stage.steps for stage in stages) // looks)
    whole = math.gcd(*(stage.steps for stage in stages))
    return next((steps for steps in range(most, most // 2, -1) if whole % steps == 0), most)


def _claim(folder: Path, settings: dict[str, Any], ranks: Ranks) -> None:
    """Keep the settings with the runs; ValueError where the folder has runs of others (a start is no run yet)."""
    path = folder / "study.json"
    if path.is_file() and any(folder.glob("*-seed*")):
        found = json.loads(path.read_text())
        other = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
        if other:
            raise ValueError(f"{folder} has runs of another {', '.join(other)}; wanted the same, or another --out")
    ranks.wait()
    if ranks.first:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n")


def _plain(given: argparse.Namespace) -> dict[str, Any]:
    """What must be the same when a study goes on, as it comes back from JSON."""
    return json.loads(json.dumps({key: value for key, value in vars(given).items() if key not in FREE}, default=str))


def _words(given: argparse.Namespace, recipe: Recipe, plans: Mapping[str, Recipe], ranks: Ranks) -> dict[str, str]:
    """Networks and steps of the variants, for the report."""
    encoder, decoder = recipe.base.encoder, recipe.base.decoder
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    start = f"an encoder from {given.init}" if given.init else "scratch"
    images = {
        stage.name: f"{stage.batch['image_rec']} to reconstruct (if it is one of images), {stage.distill} to describe"
        for plan in plans.values()
        for stage in plan.stages
    }
    latents = _together({name: _by_stage(plan, lambda stage: stage.latent_channels) for name, plan in plans.items()})
    if any(len({stage.latent_channels for stage in plan.stages}) > 1 for plan in plans.values()):
        latents += " (where a stage widens them, its figures answer for that too)"
    return {
        "recipe": " ".join([recipe.name, *given.changes]),
        "network": f"{encoder.blocks} + {decoder.blocks} blocks of width {encoder.width}, from {start}",
        "steps of a stage": _together(
            {name: _by_stage(plan, lambda stage: stage.steps) for name, plan in plans.items()}
        ),
        "latents of a stage": latents,
        "images of a step": _together(images),
        "machine": f"{ranks.world} processes, {torch.get_num_threads()} threads each, {device}",
    }


def _by_stage(recipe: Recipe, value: Callable[[Stage], int]) -> str:
    return ", ".join(f"{stage.name} {value(stage)}" for stage in recipe.stages)


def _together(said: Mapping[str, str]) -> str:
    """What is said of each name; once, of those that share it, and without names if all do."""
    names: dict[str, list[str]] = {}
    for name, words in said.items():
        names.setdefault(words, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{' and '.join(owners)}: {words}" for words, owners in names.items())


def _minutes(folder: Path) -> float:
    """Of a run, from its first line to its last; a break between two sittings counts."""
    times = [float(record["time"]) for record in _records(folder)]
    return (times[-1] - times[0]) / 60 if times else 0.0


def _records(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run; none where it broke off before the first."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _train(recipe: Recipe, folder: Path, bench: Bench, every: int, log: Callable[[str], None]) -> str | None:
    """Returns how it ended: "done", "collapsed" with numbers that are not finite, or None where it was told to stop."""
    given = bench.given
    habits = Habits(log_every=every, save_every=given.save_every, look_every=every)
    try:
        done = run_stages(
            recipe,
            folder,
            bench.work(recipe.seed),
            bench.ranks,
            habits=habits,
            start=start_of(recipe, given.init),
            log=log if given.verbose else _silent,
        )
    except NotFiniteError:
        return "collapsed"
    return "done" if done else None


def _curve(variant: str, seed: int, folder: Path, recipe: Recipe, collapsed: bool) -> Curve:
    """All figures of the looks, and what the critic said, against steps counted over all stages."""
    points: dict[str, dict[int, float]] = {}
    ends: dict[str, int] = {}
    before: dict[str, int] = {}
    total = 0
    for stage in recipe.stages:
        before[stage.name] = total
        total += stage.steps
        ends[stage.name] = total
    for record in _records(folder):
        step = before[record["stage"]] + record["step"]
        for name, value in record.items():
            if name.partition("/")[0] in FIGURES:
                points.setdefault(name, {})[step] = float(value)  # a run that went on has some steps twice
    return Curve(
        variant=variant,
        seed=seed,
        points={name: sorted(values.items()) for name, values in points.items()},
        ends=ends,
        collapsed=collapsed,
    )


def _silent(_: str) -> None:
    return


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit status, 2 with one line for what cannot be done."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in MEASUREMENTS:
        return MEASUREMENTS[words[0]](words[1:])
    options = parser(
        sorted({*STUDIES, *MEASUREMENTS}),
        f"Of a given model, without training: {', '.join(sorted(MEASUREMENTS))}; each has its own --help.",
    )
    given = options.parse_args(words)
    if given.name in MEASUREMENTS:
        options.error(f"{given.name} comes first, its own options after it")
    given.command = command(words[0], words[1:])
    torch.set_num_threads(given.threads)
    try:
        report = run_study(given)
    except (OSError, ValueError, ModelError, SaveError, BadSamplesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if report is not None:
        print(f"report in {report}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
