"""The stages one after the other: each starts from the averaged weights of the one before, widened where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from model import weights
from model.network import ATokenNet, build
from training.averages import Average
from training.batches import Kind, Source
from training.curriculum import Habits, StageTrainer, Tokenize
from training.fresh import fresh
from training.glance import glance
from training.modality_rope import use_modality_rope
from training.ranks import Ranks
from training.run_folder import RunFolder, space_left
from training.snapshots import SaveError, Snapshots
from training.stages import Recipe, Stage
from training.stopping import terminated
from training.student import Student
from training.teachers import Teachers
from training.widen import widen_latents

RECIPE_KEY = "recipe"
"""In the header of STAGE.safetensors: the recipe that it was trained with, of this stage alone."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run works with.

    source: of the samples of a stage. shown: of those that are looked at after it, if any; both are closed after use.
    judge: more figures of a network at each look. recompute: activation checkpointing. compile: torch.compile of the
    blocks.
    """

    source: Callable[[Stage], Source]
    shown: Callable[[Stage], Source] | None
    teachers: Teachers
    tokenize: Tokenize
    judge: Callable[[ATokenNet, Stage], dict[str, float]] | None = None
    recompute: bool = False
    compile: bool = False


def run_stages(
    recipe: Recipe,
    folder: Path,
    work: Work,
    ranks: Ranks,
    *,
    habits: Habits | None = None,
    start: ATokenNet | None = None,
    log: Callable[[str], None] = print,
    stop_at: Mapping[str, int] | None = None,
) -> bool:
    """All stages of a recipe that are not done yet; a second call goes on where the first stopped.

    start: the network of step 0 of the first stage (default: fresh weights from the seed). stop_at: step at which to
    leave a stage, by name. Returns whether all are done. Leaves STAGE.safetensors, the averaged weights, and
    STAGE/step-* for each. Raises ValueError where a start does not fit its stage, and before the first step where the
    folder has a stage that was done with another recipe.
    """
    before: ATokenNet | None = start
    for stage in recipe.stages:
        _check_done(folder / f"{stage.name}.safetensors", recipe, stage)
    with terminated() as asked:
        for stage in recipe.stages:
            done = folder / f"{stage.name}.safetensors"
            if done.is_file():
                log(f"{stage.name}: done already, in {done}")
            elif ranks.most(int(asked())):
                log(f"told to stop before stage {stage.name}")
                return False
            else:
                net = _first_step(recipe, stage, before)
                with closing(work.source(stage)) as source:
                    whole = _run_stage(
                        recipe, stage, net, source, folder, work, ranks, habits or Habits(), log, stop_at or {}
                    )
                if not whole:
                    return False
            before = weights.load(done)
    return True


def _of_stage(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What the weights of a stage depend on, as it comes back from JSON; other stages may still be changed."""
    plain: dict[str, Any] = json.loads(json.dumps(replace(recipe, stages=(stage,)).to_json()))
    return plain


def _check_done(path: Path, recipe: Recipe, stage: Stage) -> None:
    """Raise ValueError if this stage was done with another recipe, naming what differs.

    Of weights that were put there by hand, which name no recipe, the sizes are compared.
    """
    if not path.is_file():
        return
    config = weights.read_config(path)  # says what is wrong with a damaged file
    wanted = _of_stage(recipe, stage)
    with safe_open(path, framework="pt") as file:
        header = (file.metadata() or {}).get(RECIPE_KEY)
    if header is None:
        if config != recipe.model(stage):
            raise ValueError(f"{path} is of other sizes than the stage {stage.name}; wanted another --out")
        return
    found = json.loads(header)
    if other := _differences(found, wanted):
        raise ValueError(
            f"{path} is of another recipe ({', '.join(other[:4])}); wanted the recipe that this run was begun with, or "
            "another --out"
        )


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    """Places at which two plain values differ, with both."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = dict.fromkeys([*wanted, *found])
        parts = [(f"{where}.{name}" if where else name, found.get(name), wanted.get(name)) for name in names]
    elif isinstance(found, list) and isinstance(wanted, list) and found and isinstance(found[0], dict):
        parts = [(where, one, other) for one, other in zip(found, wanted, strict=True)]
    else:
        return [] if found == wanted else [f"{where} {found}, now {wanted}"]
    return [line for name, one, other in parts for line in _differences(one, other, name)]


def _first_step(recipe: Recipe, stage: Stage, before: ATokenNet | None) -> ATokenNet:
    """The network at step 0 of a stage."""
    config = recipe.model(stage)
    net = fresh(config, recipe.seed)
    if before is None:
        return net
    if before.config == config:
        net.load_state_dict(before.state_dict())
        return net
    net.load_state_dict(widen_latents(before.state_dict(), before.config, config, recipe.seed))
    return net


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    net: ATokenNet,
    source: Source,
    folder: Path,
    work: Work,
    ranks: Ranks,
    habits: Habits,
    log: Callable[[str], None],
    stop_at: Mapping[str, int],
) -> bool:
    if recipe.rope == "modality":
        use_modality_rope(net)
    student = Student(net, recompute=work.recompute)
    trainer = StageTrainer(recipe, stage, student, work.teachers, source, work.tokenize, ranks)
    if work.compile:
        student.compile_blocks()
    snapshots = Snapshots(folder / stage.name, ranks, log)
    if snapshots.steps():
        trainer.restore(snapshots)
        log(f"{stage.name}: going on from step {trainer.progress.step}")
    records = RunFolder(folder, recipe.to_json(), ranks.world, log) if ranks.first else None
    say = log if ranks.first else _silent

    def look(step: int) -> ATokenNet:
        """Judge and draw the averaged weights; on the first rank, which returns them as a network."""
        values = averaged_weights(student, trainer.average)
        seen = build(recipe.model(stage)).eval()
        if records is not None:
            seen.load_state_dict({name.removeprefix("net."): value for name, value in values.items()})
            if recipe.rope == "modality":
                use_modality_rope(seen)
            scores: dict[str, float] = {}
            grids: dict[str, Tensor] = {}
            if work.shown is not None:
                with closing(work.shown(stage)) as shown:
                    scores, grids = glance(seen, shown, kinds_of(stage))
            if work.judge is not None:
                scores |= work.judge(seen, stage)
            say(records.metrics(stage.name, step, stage.steps, scores))
            for name, grid in grids.items():
                records.picture(stage.name, name, step, grid)
        return seen

    if not trainer.run(snapshots, records, habits, say, stop_at.get(stage.name), look):
        return False
    final = look(stage.steps)
    if records is not None:
        note = f"stage {stage.name} of {recipe.name}, {stage.steps} steps, seed {recipe.seed}, rope {recipe.rope}"
        partial = folder / f"{stage.name}.partial"
        header = {weights.NOTE_KEY: note, RECIPE_KEY: json.dumps(_of_stage(recipe, stage))}
        try:
            weights.save(final, partial, metadata=header)
        except (OSError, SafetensorError) as error:
            raise SaveError(f"{stage.name}.safetensors not written: {error}{space_left(folder)}") from error
        partial.rename(folder / f"{stage.name}.safetensors")
        records.close()
    ranks.wait()
    return True


def averaged_weights(student: Student, average: Average) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on the first rank; others get nothing."""
    with average.in_place():
        whole = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        # Of one process the state is the parameters themselves, which get their own values back after the block.
        return {name: value.clone() for name, value in whole.items() if isinstance(value, Tensor)}


def kinds_of(stage: Stage) -> list[Kind]:
    """What a stage can be judged by: the kinds that it reconstructs."""
    kinds: tuple[Kind, ...] = ("image_rec", "video_rec", "asset_rec")
    return [kind for kind in kinds if kind in stage.cycle]


def _silent(_: str) -> None:
    return
