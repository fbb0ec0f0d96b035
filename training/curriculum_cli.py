"""`python -m training.train so400m ...`: a curriculum on shards, on one process or under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from model import weights
from model.config import VARIANTS, ModelConfig
from model.errors import WeightsError
from model.network import ATokenNet
from training.batches import Source
from training.chain import Work, run_stages
from training.curriculum import Habits, Tokenize
from training.fresh import fresh
from training.generated import Generated, hash_tokens
from training.measured import at_least
from training.ranks import joined
from training.shard_order import Corpus
from training.shard_source import ShardSource
from training.shards import open_shards
from training.siglip2 import init_from_siglip2
from training.stages import ABLATIONS, CURRICULA, Recipe, Stage, Weights, finetune, override
from training.teachers import TeacherPaths, Teachers, load_teachers, random_teachers

MODALITIES = ("images", "videos", "assets")


def parser() -> argparse.ArgumentParser:
    """All that can be said on the command line."""
    made = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train through the stages of a curriculum; the same command again goes on where it stopped.",
    )
    made.add_argument("recipe", choices=sorted(CURRICULA))
    made.add_argument("--out", type=Path, help="folder of the run (default runs/RECIPE)")
    made.add_argument("--stage", help="this stage only, from --start")
    made.add_argument("--ablation", choices=sorted(ABLATIONS), action="append", default=[])
    made.add_argument("--finetune", metavar="STAGE", help="this stage only, from --start, at a low rate")
    made.add_argument("--steps", type=int, help="of --finetune (default a tenth of the stage's)")
    made.add_argument(
        "--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help="change the recipe"
    )
    add_data(made, "drawn shapes instead")
    start = made.add_argument_group("start")
    start.add_argument("--init", type=Path, metavar="FOLDER", help="SigLIP 2 folder for the encoder of the first stage")
    start.add_argument(
        "--start",
        metavar="[VARIANT=]FILE",
        help="weights to begin with, ours or published ones (.pt); without VARIANT a .pt is taken to be of the size of "
        f"the first stage that is trained; there are {', '.join(VARIANTS)}",
    )
    add_teachers(made)
    how = add_how(made)
    how.add_argument("--shard", action="store_true", help="FSDP2 with one process too, to try it on one GPU")
    how.add_argument("--log-every", type=int, default=50)
    how.add_argument("--look-every", type=int, default=5000, help="steps between pictures and PSNR of some samples")
    return made


def add_data(made: argparse.ArgumentParser, generated: str) -> argparse._ArgumentGroup:
    """Options of shards. generated: what --generated does."""
    data = made.add_argument_group(
        "data", "WebDataset shards, as training.prepare makes them: folders, files, addresses"
    )
    for modality in MODALITIES:
        data.add_argument(f"--{modality}", metavar="SHARDS[@WEIGHT]", action="append", default=[])
    data.add_argument("--generated", action="store_true", help=generated)
    data.add_argument("--workers", type=at_least(1), default=2, help="threads that decode")
    data.add_argument(
        "--lanes",
        type=int,
        default=8,
        help="shards read side by side, a multiple of the processes; the same for all of a run",
    )
    data.add_argument("--most-bad", type=float, default=0.01, help="share of unusable samples past which the run ends")
    return data


def add_teachers(made: argparse.ArgumentParser) -> None:
    """Options of the teachers."""
    teachers = made.add_argument_group("teachers")
    for name, what in (("vgg", "FILE"), ("lpips", "FILE"), ("clip", "FOLDER"), ("siglip2", "FOLDER")):
        teachers.add_argument(f"--{name}", type=Path, metavar=what)
    teachers.add_argument("--random-teachers", action="store_true", help="networks that know nothing, for trials")


def add_how(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options that change how a run is computed, not what comes out."""
    how = made.add_argument_group("how")
    how.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, a third slower")
    how.add_argument("--compile", action="store_true", help="torch.compile of the blocks")
    how.add_argument("--save-every", type=int, default=1000)
    return how


def recipe_of(given: argparse.Namespace) -> Recipe:
    """The named recipe with its ablations, changes and stage.

    Raises ValueError for unknown keys and stages, and for words that make no sense together.
    """
    recipe = CURRICULA[given.recipe]
    for name in given.ablation:
        recipe = ABLATIONS[name](recipe)
    if given.finetune:
        if not given.start:
            raise ValueError("--finetune without --start; wanted the weights to go on from, [VARIANT=]FILE")
        recipe = finetune(recipe, given.finetune, given.steps)
    elif given.steps is not None:
        raise ValueError(f"--steps {given.steps} is of --finetune; else --set stages.STAGE.steps={given.steps}")
    recipe = override(recipe, given.changes)
    if given.stage:
        recipe = replace(recipe, stages=(recipe.stage(given.stage),))
    return recipe


def run(given: argparse.Namespace) -> bool:
    """Train; returns whether all stages are done. What is missing is named before the first step."""
    recipe = recipe_of(given)
    width = recipe.base.encoder.width
    with joined(shard=given.shard) as ranks:
        say = print if ranks.first else _silent
        teachers, tokenize = teachers_of(given, width, ranks.device.type, _unused(recipe.weights))
        corpora = corpora_of(given)
        work = Work(
            source=partial(_source, given, corpora, recipe.seed, ranks.world),
            shown=partial(_source, given, corpora, recipe.seed + 1, 1),
            teachers=teachers,
            tokenize=tokenize,
            recompute=given.recompute,
            compile=given.compile,
        )
        for stage in recipe.stages:
            work.source(stage).close()  # its data is there, or the run ends here
        habits = Habits(log_every=given.log_every, save_every=given.save_every, look_every=given.look_every)
        folder = given.out or Path("runs") / recipe.name
        return run_stages(
            recipe, folder, work, ranks, habits=habits, start=start_of(recipe, given.init, given.start), log=say
        )


def start_of(recipe: Recipe, init: Path | None, start: str | None = None) -> ATokenNet | None:
    """What the first stage begins with: SigLIP 2 in the encoder, weights, or (None) fresh ones.

    start: [VARIANT=]FILE. Raises WeightsError for a file that is not there or of another size.
    """
    if start and init:
        raise ValueError("--start and --init: wanted one of them, weights or a SigLIP 2 folder")
    if start:
        return _weights_of(start, recipe.model(recipe.stages[0]))
    if init:
        net = fresh(recipe.model(recipe.stages[0]), recipe.seed)
        init_from_siglip2(net, init)
        return net
    return None


def _weights_of(start: str, own: ModelConfig) -> ATokenNet:
    """Weights from [VARIANT=]FILE. own: sizes of the stage that is to begin, for a file that does not say its own."""
    # A path may have a = of its own.
    variant, name = "", start
    if "=" in start and not Path(start).exists():
        variant, _, name = start.partition("=")
    if variant and variant not in VARIANTS:
        raise ValueError(f"--start {start}: variant {variant!r}; there are {', '.join(VARIANTS)}")
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"--start {start}: no such file; wanted weights, as RUN/STAGE.safetensors")
    if variant or path.suffix == ".safetensors":
        return weights.load(path, VARIANTS.get(variant))
    try:
        return weights.load(path, own)
    except WeightsError as error:
        raise WeightsError(
            f"{error}. Without a variant it is taken to be of the size of the stage that begins; if it is of another, "
            f"VARIANT=FILE says so, VARIANT one of {', '.join(VARIANTS)}"
        ) from error


def _unused(losses: Weights) -> list[str]:
    """Teachers that only losses of weight 0 would ask."""
    asked = {"vgg": losses.lpips or losses.gram, "lpips": losses.lpips, "clip": losses.clip}
    return [name for name, weight in asked.items() if not weight]


def teachers_of(
    given: argparse.Namespace, width: int, device: str, unused: Sequence[str] = ()
) -> tuple[Teachers, Tokenize]:
    """The teachers that are named, or random ones where that is asked for.

    width: of the encoder. unused: those that may be left out.
    """
    if given.random_teachers:
        return random_teachers(width, seed=0, device=device), hash_tokens
    paths = TeacherPaths(vgg=given.vgg, lpips=given.lpips, clip=given.clip, siglip2=given.siglip2)
    teachers = load_teachers(paths, width, device, unused)
    from training.text import CaptionTokens

    return teachers, CaptionTokens(given.siglip2)


def corpora_of(given: argparse.Namespace, prefix: str = "") -> dict[str, list[Corpus]]:
    """The shards of each modality. prefix: of the options' names."""
    return {name: [_corpus(text) for text in getattr(given, f"{prefix}{name}")] for name in MODALITIES}


def drawn_of(seed: int, stage: Stage) -> Generated:
    """Drawn shapes of the sizes of a stage."""
    least, most = stage.image_side
    return Generated(seed=seed, sides=(least, min(most, 256)), frames=stage.frames)


def shards_of(
    given: argparse.Namespace, corpora: Mapping[str, Sequence[Corpus]], seed: int, ranks: int, stage: Stage
) -> ShardSource:
    """Samples of a stage from shards, read as the options say."""
    return ShardSource(
        corpora,
        stage,
        seed=seed,
        lanes=given.lanes,
        ranks=ranks,
        workers=given.workers,
        most_bad=given.most_bad,
    )


def _source(
    given: argparse.Namespace, corpora: Mapping[str, Sequence[Corpus]], seed: int, ranks: int, stage: Stage
) -> Source:
    return drawn_of(seed, stage) if given.generated else shards_of(given, corpora, seed, ranks, stage)


def _corpus(text: str) -> Corpus:
    """SHARDS or SHARDS@WEIGHT."""
    pattern, at, weight = text.rpartition("@")
    try:
        number = float(weight) if at else None
    except ValueError:
        pattern, at, number = text, "", None
    return Corpus(name=pattern if at else text, shards=tuple(open_shards([pattern if at else text])), weight=number)


def _silent(_: str) -> None:
    return


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 also where SIGTERM ended it, since everything is saved."""
    run(parser().parse_args(arguments))
    return 0
