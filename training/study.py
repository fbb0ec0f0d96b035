"""`python -m training.study NAME`: one question about the recipe, answered by runs that differ in one thing.

Each study trains its variants over several seeds from the same starts on the same samples, and writes a report with
what came out, its spread, curves, seeds and the command. At the default size it shows how a study is done and answers
for tiny networks only; the same command with a larger recipe, real shards and real teachers answers for those.

Two studies train nothing and look at a given model instead: `shift` (shift_study.py) and `geometry`
(geometry_study.py).
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.network import ATokenNet
from training import geometry_study, shift_study
from training.batches import Source, pack_samples
from training.chain import Work, run_stages
from training.curriculum import Habits
from training.frechet import FeatureStats, frechet_distance
from training.generated import Generated, hash_tokens
from training.measured import Parser
from training.perceptual import resample_224
from training.pictures import images_of
from training.ranks import joined
from training.stages import Recipe, Stage, joint, paper, scaled, stacks, with_modality_rope, with_patchgan, without_gram
from training.study_report import Curve, Report, write_report
from training.teachers import Teachers, random_teachers

SIDES = (32, 64)
FD_IMAGES = 64
FD_SIDE = 64


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study may be given. steps: of a stage; looks: in a stage, for the curves; width: of the networks."""

    folder: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 300
    looks: int = 6
    width: int = 64
    batch: int = 8

    def recipe(self, seed: int) -> Recipe:
        """The curriculum in small: two blocks on each side."""
        base = stacks(self.width, 2, 2, 4 * self.width)
        small = scaled(
            paper(base, "study", seed=seed),
            steps=self.steps,
            batch=self.batch,
            distill=self.batch,
            sides=SIDES,
            tokens=2048,
            warmup=min(50, self.steps // 4),
        )
        return replace(small, optim=replace(small.optim, ema=0.98))


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
    image = replace(recipe.stage("image"), steps=sum(stage.steps for stage in continuous))
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


def run_study(name: str, setting: Setting, log: Callable[[str], None] = print) -> Path:
    """Train every variant with every seed; returns the path of the report."""
    study = STUDIES[name]
    began = time.monotonic()
    curves: list[Curve] = []
    for seed in setting.seeds:
        for variant, recipe in study.variants(setting.recipe(seed)).items():
            folder = setting.folder / f"{variant.replace(' ', '-')}-seed{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            log(f"{name}: {variant}, seed {seed}")
            collapsed = _train(recipe, folder, seed, setting)
            curves.append(_curve(variant, seed, folder, recipe, collapsed))
    report = Report(
        name=name,
        question=study.question,
        settings={
            "network": f"2 + 2 blocks of width {setting.width}, from scratch",
            "steps of a stage": str(setting.steps),
            "samples of a task and step": str(setting.batch),
            "data": "drawn shapes (training/generated.py), sample n the same for all variants of a seed",
            "teachers": "random networks: they show textures and places, no meaning",
            "seeds": ", ".join(map(str, setting.seeds)),
            "minutes": f"{(time.monotonic() - began) / 60:.1f}",
            "command": f"python -m training.study {name} --steps {setting.steps} --seeds {len(setting.seeds)}",
        },
        curves=tuple(curves),
    )
    return write_report(report, setting.folder)


def _train(recipe: Recipe, folder: Path, seed: int, setting: Setting) -> bool:
    """Returns whether the run broke off with numbers that are not finite."""
    teachers = random_teachers(setting.width, seed=0)
    source = Generated(seed=seed, sides=SIDES)
    shown = Generated(seed=10_000, sides=SIDES)
    work = Work(
        source=lambda _: source,
        shown=lambda _: shown,
        teachers=teachers,
        tokenize=hash_tokens,
        judge=_FrechetOfImages(teachers, Generated(seed=20_000, sides=(FD_SIDE, FD_SIDE))),
    )
    every = max(1, setting.steps // setting.looks)
    with joined() as ranks:
        try:
            habits = Habits(log_every=every, save_every=0, look_every=every)
            run_stages(recipe, folder, work, ranks, habits=habits, log=lambda _: None)
        except FloatingPointError:
            return True
    return False


class _FrechetOfImages:
    """Frechet distance of originals and reconstructions of the same images, on features of the random VGG.

    Not FID: its network was trained on nothing. It sees colours and textures, and compares variants of one study only.
    """

    def __init__(self, teachers: Teachers, source: Source) -> None:
        self.teachers = teachers
        self.samples = source.draw("image_rec", range(FD_IMAGES))

    @torch.no_grad()
    def __call__(self, net: ATokenNet, stage: Stage) -> dict[str, float]:
        packed = pack_samples(self.samples, range(FD_IMAGES), net.config).packed
        mean, _ = net.posterior(net.encode(packed), packed)
        latents = net.quantize(mean, packed.moving) if net.config.bottleneck == "fsq" else mean
        decoded = net.decode(packed.with_feats(latents), net.config.frame_values)
        stats = []
        for patches in (packed.feats, decoded):
            pictures = torch.cat([resample_224(p, FD_SIDE) for p in images_of(patches, packed, net.config)])
            maps = self.teachers.vgg(pictures.clamp(-1, 1))
            found = FeatureStats()
            found.update(torch.cat([m.mean((2, 3)) for m in maps[:3]], dim=1))
            stats.append(found)
        error = (decoded.clamp(-1, 1) - packed.feats).square().mean() / 4
        return {
            "images/fd": frechet_distance(*stats).total,
            "images/psnr": -10 * math.log10(max(float(error), 1e-10)),
        }


def _curve(variant: str, seed: int, folder: Path, recipe: Recipe, collapsed: bool) -> Curve:
    """All figures of the looks, and what the critic said, against steps counted over all stages."""
    points: dict[str, list[tuple[int, float]]] = {}
    before = {}
    total = 0
    for stage in recipe.stages:
        before[stage.name] = total
        total += stage.steps
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        step = before[record["stage"]] + record["step"]
        for name, value in record.items():
            if name.endswith(("/psnr", "/fd")) or name.startswith("critic/"):
                points.setdefault(name, []).append((step, float(value)))
    return Curve(variant=variant, seed=seed, points=points, collapsed=collapsed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in MEASUREMENTS:
        return MEASUREMENTS[words[0]](words[1:])
    parser = Parser(
        prog="python -m training.study",
        description="One question about the recipe, answered by training.",
        epilog=f"Of a given model, without training: {', '.join(sorted(MEASUREMENTS))}; each has its own --help.",
    )
    parser.add_argument("name", choices=sorted({*STUDIES, *MEASUREMENTS}))
    parser.add_argument("--out", type=Path, help="folder of the report (default runs/study-NAME)")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=300, help="of a stage")
    parser.add_argument("--width", type=int, default=64, help="of the networks")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(words)
    if given.name in MEASUREMENTS:
        parser.error(f"{given.name} comes first, its own options after it")
    if min(given.seeds, given.steps) < 1:
        print(f"error: {given.seeds} seeds, {given.steps} steps; wanted 1 or more", file=sys.stderr)
        return 2
    torch.set_num_threads(given.threads)
    folder = given.out or Path("runs") / f"study-{given.name}"
    setting = Setting(folder=folder, seeds=tuple(range(given.seeds)), steps=given.steps, width=given.width)
    print(f"report in {run_study(given.name, setting)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
