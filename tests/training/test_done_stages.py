"""Stages that are done are taken as they are only where the recipe is the one that they were trained with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model import weights
from tests.training.tiny_run import recipe, work
from training.chain import run_stages
from training.curriculum import Habits
from training.fresh import fresh
from training.ranks import Ranks, joined
from training.stages import Recipe, Stage, override

QUIET = Habits(log_every=0, save_every=0, look_every=0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


def run(plan: Recipe, folder: Path, ranks: Ranks) -> list[str]:
    """Train what is not done yet; returns the stages whose samples were asked for."""
    asked: list[str] = []
    given = work()

    def source(stage: Stage) -> object:
        asked.append(stage.name)
        return given.source(stage)

    assert run_stages(plan, folder, replace(given, source=source, shown=None), ranks, habits=QUIET)  # type: ignore[arg-type]
    return asked


def one_step(*names: str) -> Recipe:
    plan = override(recipe(), [f"stages.{stage.name}.steps=1" for stage in recipe().stages])
    return replace(plan, stages=tuple(plan.stage(name) for name in names))


def test_a_done_stage_of_another_recipe_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    assert run(one_step("image"), tmp_path, ranks) == ["image"]
    assert run(one_step("image"), tmp_path, ranks) == []
    changes = ["weights.gram=0", "optim.lr=5", "stages.image.latent_channels=40", 'stages.image.batch={"image_rec": 2}']
    for change, said in zip(
        changes,
        (
            "weights.gram 1.0, now 0",
            "optim.lr 0.001, now 5",
            "stages.latent_channels 32, now 40",
            "stages.batch.image_rec 4, now 2",
        ),
        strict=True,
    ):
        other = override(one_step("image", "video"), [change])
        with pytest.raises(ValueError, match=rf"image\.safetensors is of another recipe \({said}"):
            run(other, tmp_path, ranks)
    assert not (tmp_path / "video").exists()
    # What comes after it may be another.
    assert run(override(one_step("image", "video"), ["stages.video.steps=2"]), tmp_path, ranks) == ["video"]


def test_weights_that_were_put_there_are_taken_if_they_are_of_the_size(ranks: Ranks, tmp_path: Path) -> None:
    plan = one_step("image")
    for name, channels in (("right", 32), ("wrong", 40)):
        (tmp_path / name).mkdir()
        config = replace(plan.model(plan.stages[0]), latent_channels=channels)
        weights.save(fresh(config, 0), tmp_path / name / "image.safetensors")
    assert run(plan, tmp_path / "right", ranks) == []
    with pytest.raises(ValueError, match=r"image\.safetensors is of other sizes than the stage image"):
        run(plan, tmp_path / "wrong", ranks)
