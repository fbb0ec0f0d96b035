"""What a study is given on the command line: its recipe, data and teachers, by the options that a curriculum has."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from training.batches import Kind, Source
from training.chain import Work
from training.curriculum_cli import (
    MODALITIES,
    add_data,
    add_how,
    add_teachers,
    corpora_of,
    drawn_of,
    shards_of,
    start_of,
    teachers_of,
)
from training.measured import Parser, at_least
from training.ranks import Ranks
from training.shard_order import Corpus
from training.shard_source import MODALITY
from training.stages import CURRICULA, TASKS, Recipe, Stage, override, paper, scaled, stacks
from training.study_data import Filled, Held, Ordered, Pieces, lacking, only
from training.study_looks import MOST_HEAVY, Looks, features_of, wanted_of

SIDES = (32, 64)
STEPS = 200
WIDTH = 64
BATCH = 8
SHOWN_SEED = 10_000
HELD_SEED = 20_000
"""Seeds of samples that are not those of a run."""

TEACHERS = ("vgg", "lpips", "clip", "siglip2")
FREE = ("out", "seeds", "threads", "workers", "save_every", "recompute", "compile", "verbose", "command")
"""Options that may be others when a study goes on."""


def parser(names: Sequence[str], epilog: str) -> Parser:
    """All that can be said of a study that trains."""
    made = Parser(
        prog="python -m training.study",
        description="One question about the recipe, answered by training; the same command again goes on.",
        epilog=epilog,
    )
    made.add_argument("name", choices=sorted(names))
    made.add_argument("--out", type=Path, help="folder of the runs and the report (default runs/study-NAME)")
    made.add_argument("--recipe", choices=["study", *CURRICULA], default="study", help="default: study, of minutes")
    made.add_argument("--seeds", type=at_least(1), default=3, help="how many")
    made.add_argument("--steps", type=at_least(1), help=f"of every stage (default {STEPS} of study, else the recipe's)")
    made.add_argument("--batch", type=at_least(1), help="samples of every task, and images to describe, of a step")
    made.add_argument("--width", type=at_least(8), help=f"of the networks of study (default {WIDTH})")
    made.add_argument("--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help="of the recipe")
    made.add_argument("--threads", type=at_least(1), default=1)
    data = add_data(made, "drawn shapes for what has no shards (the default where none are given)")
    data.add_argument(
        "--hold",
        type=at_least(1),
        metavar="N",
        help="train on N samples of a kind, decoded once for each set of sizes that stages have",
    )
    data.add_argument("--piece", type=at_least(1), metavar="N", help="cut assets to N neighbouring voxels")
    looks = made.add_argument_group("looks", "what is measured on the way, and on what")
    looks.add_argument(
        "--looks", type=at_least(1), default=6, help="in a stage, or a few more: at the same steps in all"
    )
    for modality in MODALITIES:
        looks.add_argument(
            f"--shown-{modality}",
            metavar="SHARDS",
            action="append",
            default=[],
            help=f"{modality} held aside (default: those trained on, cut otherwise)",
        )
    looks.add_argument(
        "--shown-count",
        type=at_least(1),
        default=64,
        help=f"images; a quarter of it clips and assets, {MOST_HEAVY} at most; of each no more than the shards have",
    )
    looks.add_argument("--inception", type=Path, metavar="FILE", help="network of rFID, as of training.evaluate")
    start = made.add_argument_group("start")
    start.add_argument("--init", type=Path, metavar="FOLDER", help="SigLIP 2 folder for the encoder of the first stage")
    add_teachers(made)
    how = add_how(made)
    how.add_argument("--verbose", action="store_true", help="a line at each look")
    return made


def recipe_of(given: argparse.Namespace, seed: int) -> Recipe:
    """The recipe before its variants. Raises ValueError for unknown keys, and a width that a recipe has already."""
    if given.recipe == "study":
        recipe = _small(given.steps or STEPS, given.width or WIDTH)
    elif given.width:
        raise ValueError(f"--width is of the recipe study; change {given.recipe} with --set")
    else:
        recipe = CURRICULA[given.recipe]
        if given.steps:
            recipe = replace(recipe, stages=tuple(replace(stage, steps=given.steps) for stage in recipe.stages))
    if given.batch:
        recipe = replace(recipe, stages=tuple(_of_batch(stage, given.batch) for stage in recipe.stages))
    return replace(override(recipe, given.changes), seed=seed)


def _of_batch(stage: Stage, count: int) -> Stage:
    return replace(stage, batch=dict.fromkeys(stage.batch, count), distill=count if stage.distill else 0)


def _small(steps: int, width: int) -> Recipe:
    """The curriculum in small: two blocks on each side."""
    base = stacks(width, 2, 2, 4 * width)
    small = scaled(
        paper(base, "study"),
        steps=steps,
        batch=BATCH,
        distill=BATCH,
        sides=SIDES,
        tokens=2048,
        warmup=min(50, steps // 4),
    )
    return replace(small, optim=replace(small.optim, ema=0.98))


def _no_more_than(wanted: Mapping[Kind, int], corpora: Mapping[str, Sequence[Corpus]]) -> dict[Kind, int]:
    """Counts that make no sample come twice; what has no shards is drawn, without end."""
    return {
        kind: min(count, _distinct(corpora[MODALITY[kind]])) if MODALITY[kind] in corpora else count
        for kind, count in wanted.items()
    }


def _distinct(corpora: Sequence[Corpus]) -> int:
    """Samples until one comes again: all of them, or with weights until the first corpus is through (about)."""
    whole = sum(corpus.weight or 0 for corpus in corpora)
    if not whole:
        return max(1, sum(corpus.count for corpus in corpora))
    return max(1, min(int(corpus.count * whole / corpus.weight) for corpus in corpora if corpus.weight))


class Bench:
    """What all runs of a study share. What is missing or does not fit is named when it is made, before the first step.

    recipe: before its variants; stages: all that are trained.
    """

    def __init__(self, given: argparse.Namespace, recipe: Recipe, stages: Sequence[Stage], ranks: Ranks) -> None:
        self.given = given
        self.ranks = ranks
        self._open = ExitStack()
        try:
            self._prepare(recipe, stages)
        except BaseException:
            self.close()
            raise

    def _prepare(self, recipe: Recipe, stages: Sequence[Stage]) -> None:
        given, ranks = self.given, self.ranks
        start_of(recipe, given.init)  # it is there and fits, or the study ends here
        self.random = given.random_teachers or not any(getattr(given, name) for name in TEACHERS)
        chosen = argparse.Namespace(**{**vars(given), "random_teachers": self.random})
        self.teachers, self.tokenize = teachers_of(chosen, recipe.base.encoder.width, ranks.device.type)
        self.corpora = {name: found for name, found in corpora_of(given).items() if found}
        shown = {name: found for name, found in corpora_of(given, "shown_").items() if found}
        if stray := [name for name in shown if name not in self.corpora]:
            raise ValueError(f"--shown-{stray[0]} without --{stray[0]}: looks are at what is trained on")
        absent = {name for stage in stages for name in lacking(stage, list(self.corpora))}
        self.drawn = [name for name in MODALITIES if name in absent]
        if self.drawn and self.corpora and not given.generated:
            raise ValueError(f"no shards of {', '.join(self.drawn)} are given; --generated draws shapes in their place")
        self.used = [
            name for name in MODALITIES if name in {MODALITY[task] for stage in stages for task in stage.cycle}
        ]
        self.apart = [name for name in self.used if name in shown]
        self._held: dict[tuple[object, ...], Held] = {}
        for stage in stages:
            self.source(stage, 0).close()  # its data is there, or the study ends here
        # Every stage and variant is looked at with the same samples: those of the first stage's sizes.
        look = replace(recipe.stage("asset"), image_side=recipe.stage("image").image_side)
        source = self._cut(self._samples({**self.corpora, **shown}, SHOWN_SEED, 1, look))
        self._shown = self._hold(source, given.shown_count)
        self.wanted = wanted_of(given.shown_count)
        self.looks = Looks(
            Ordered(self._shown, None),
            features_of(given.inception, self.teachers, self.random, ranks.device),
            counts=_no_more_than(self.wanted, {**self.corpora, **shown}),
            tokens=recipe.tokens,
            device=ranks.device,
        )

    def work(self, seed: int) -> Work:
        """Of the runs of a seed."""
        return Work(
            source=partial(self.source, seed=seed),
            # Pictures of one seed are enough to see; drawing assets takes longer than all figures.
            shown=None if seed else lambda _: Ordered(self._shown, None),
            teachers=self.teachers,
            tokenize=self.tokenize,
            judge=self.looks,
            recompute=self.given.recompute,
            compile=self.given.compile,
        )

    def source(self, stage: Stage, seed: int) -> Source:
        """Sample n of a stage and seed, the same for all variants."""
        if not self.given.hold:
            return self._cut(self._samples(self.corpora, seed, self.ranks.world, stage))
        sizes = (stage.image_side, stage.video_side, stage.frames, stage.strides, stage.clip_frames)
        if sizes not in self._held:
            # The same whichever stage of these sizes comes first.
            every = replace(stage, name="held", cycle=TASKS, batch=dict.fromkeys(TASKS, 1), distill=1)
            source = self._cut(self._samples(self.corpora, HELD_SEED, self.ranks.world, every))
            self._held[sizes] = self._hold(source, self.given.hold)
        return Ordered(self._held[sizes], seed)

    def close(self) -> None:
        """Let go of the samples."""
        self._open.close()

    def _hold(self, source: Source, count: int) -> Held:
        held = Held(source, count)
        self._open.callback(held.close)
        return held

    def words(self) -> dict[str, str]:
        """Data, teachers and networks, for the report."""
        given = self.given
        known = [name for name in self.used if name in self.corpora]
        parts = [f"{name} from {', '.join(getattr(given, name))}" for name in known]
        if self.drawn:
            parts.append(f"{', '.join(self.drawn)}: drawn shapes (training/generated.py)")
        if given.hold:
            most = _no_more_than(dict.fromkeys(TASKS, given.hold), self.corpora)
            few = [f"{MODALITY[kind]} have {count}" for kind, count in most.items() if count < given.hold]
            again = f" ({', '.join(dict.fromkeys(few))}, which come again among them)" if few else ""
            parts.append(f"{given.hold} samples of a kind{again}, over and over, in an order of the seed")
        if given.piece and "assets" in self.used:
            parts.append(f"assets cut to {given.piece} neighbouring voxels")
        data = "; ".join([*parts, "sample n the same for all variants of a seed"])
        same = [name for name in known if name not in self.apart]
        shown = [f"{name} held aside, from {', '.join(getattr(given, f'shown_{name}'))}" for name in self.apart]
        shown += [f"{name} of those trained on, cut otherwise" for name in same]
        shown += [f"{name} drawn anew" for name in self.drawn]
        counts = []
        for kind, number in self.looks.counts.items():
            fewer = f" ({self.wanted[kind]} were wanted, the shards have no more)" if number < self.wanted[kind] else ""
            if MODALITY[kind] in self.used:
                counts.append(f"{number} {MODALITY[kind]}{fewer}")
        paths = ", ".join(str(getattr(given, name)) for name in TEACHERS)
        return {
            "data": data,
            "looks": f"{', '.join(counts)}, the same for all runs; {'; '.join(shown)}",
            "Frechet distance": self.looks.features.words,
            "teachers": "random networks: they show textures and places, no meaning" if self.random else paths,
        }

    def _cut(self, source: Source) -> Source:
        return Pieces(source, self.given.piece) if self.given.piece else source

    def _samples(self, corpora: dict[str, list[Corpus]], seed: int, ranks: int, stage: Stage) -> Source:
        drawn = drawn_of(seed, stage)
        part = only(stage, list(corpora)) if corpora else None
        if part is None:
            return drawn
        return Filled(shards_of(self.given, corpora, seed, ranks, part), list(corpora), drawn)
