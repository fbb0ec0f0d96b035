"""From stage to stage: whose weights a stage starts with, and which rotation it turns by."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import weights
from model.config import ModelConfig
from model.network import ATokenNet
from tests.training.small_siglip2 import save_siglip2
from tests.training.tiny_run import recipe, work
from training.chain import Work, run_stages
from training.curriculum import Habits
from training.fresh import fresh
from training.ranks import Ranks, joined
from training.siglip2 import init_from_siglip2
from training.stages import CURRICULA, Recipe, override, with_modality_rope
from training.train import main
from training.widen import widen_latents

PLAN = recipe(steps=1)
STILL = replace(PLAN, optim=replace(PLAN.optim, lr=0.0, final_lr=0.0))
"""One step a stage that moves nothing: what a stage leaves is what it started with."""
MODELS = {stage.name: PLAN.model(stage) for stage in PLAN.stages}
QUIET = Habits(log_every=1, save_every=0, look_every=0)
ONE_STEP = ["steps=1", "distill=2", 'batch={"image_rec": 1, "video_rec": 1, "video_sem": 1}']


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


def other(config: ModelConfig) -> ATokenNet:
    """Weights that no run draws by itself."""
    return fresh(config, 77)


def run(plan: Recipe, folder: Path, ranks: Ranks, start: ATokenNet | None = None, given: Work | None = None) -> None:
    given = given or replace(work(), shown=None)
    assert run_stages(plan, folder, given, ranks, habits=QUIET, start=start, log=lambda _: None)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_every_stage_starts_where_the_one_before_ended(tmp_path: Path, ranks: Ranks) -> None:
    start = other(MODELS["image"])
    run(STILL, tmp_path, ranks, start)
    states = {name: weights.load(tmp_path / f"{name}.safetensors").state_dict() for name in MODELS}
    assert_same(states["image"], start.state_dict())
    names = list(MODELS)
    for before, after in itertools.pairwise(names):
        assert_same(states[after], widen_latents(states[before], MODELS[before], MODELS[after], STILL.seed))
    # Once more without widen_latents: all but the latent is the same to the end.
    for name, value in start.state_dict().items():
        if name not in ("proj.weight", "decoder.input_layer.weight"):
            assert torch.equal(states["fsq"][name], value), name


def test_without_a_start_the_seed_decides(tmp_path: Path, ranks: Ranks) -> None:
    plan = replace(STILL, stages=STILL.stages[:1], seed=3)
    run(plan, tmp_path, ranks)
    assert_same(weights.load(tmp_path / "image.safetensors").state_dict(), fresh(MODELS["image"], 3).state_dict())


def test_a_stage_hands_on_its_averaged_weights(tmp_path: Path, ranks: Ranks) -> None:
    """What has moved is handed on, too: the video stage stands still behind an image stage that does not."""
    plan = replace(PLAN, stages=PLAN.stages[:1])
    run(plan, tmp_path / "first", ranks)
    net = weights.load(tmp_path / "first" / "image.safetensors")
    moved = net.state_dict()
    assert not torch.equal(moved["decoder.out_layer.weight"], fresh(MODELS["image"], 0).decoder.out_layer.weight)
    (tmp_path / "second").mkdir()
    weights.save(net, tmp_path / "second" / "image.safetensors")  # by hand: a done stage of another recipe is refused
    run(replace(STILL, stages=PLAN.stages[:2]), tmp_path / "second", ranks)
    after = weights.load(tmp_path / "second" / "video.safetensors").state_dict()
    assert_same(after, widen_latents(moved, MODELS["image"], MODELS["video"], STILL.seed))


# By the command

STANDS = ["--set", "optim.lr=0", "--set", "optim.final_lr=0", "--generated", "--random-teachers"]
SMALL = ["--set", "base.encoder.blocks=2", "--set", "base.encoder.mlp=48", "--set", "tokens=256"]


def words_of(stage: str) -> list[str]:
    changes = [f"stages.{stage}.{change}" for change in ONE_STEP]
    return ["tiny", "--stage", stage, *STANDS, *SMALL, *(word for change in changes for word in ("--set", change))]


def model_of(stage: str) -> ModelConfig:
    plan = override(CURRICULA["tiny"], SMALL[1::2])
    return plan.model(plan.stage(stage))


def test_start_is_what_the_stage_starts_with(tmp_path: Path) -> None:
    start = other(model_of("image"))
    weights.save(start, tmp_path / "start.safetensors")
    words = ["--start", str(tmp_path / "start.safetensors"), "--out", str(tmp_path / "run")]
    assert main([*words_of("video"), *words]) == 0
    wanted = widen_latents(start.state_dict(), model_of("image"), model_of("video"), 0)
    assert_same(weights.load(tmp_path / "run" / "video.safetensors").state_dict(), wanted)


def test_init_is_the_encoder_that_the_first_stage_starts_with(tmp_path: Path) -> None:
    save_siglip2(tmp_path / "siglip2", CURRICULA["tiny"].base.encoder.width)
    words = ["--init", str(tmp_path / "siglip2"), "--out", str(tmp_path / "run")]
    assert main([*words_of("image"), *words]) == 0
    found = weights.load(tmp_path / "run" / "image.safetensors").state_dict()
    wanted = fresh(model_of("image"), 0)
    plain = {name: value.clone() for name, value in wanted.state_dict().items()}
    init_from_siglip2(wanted, tmp_path / "siglip2")
    assert_same(found, wanted.state_dict())
    changed = {name for name, value in plain.items() if not torch.equal(found[name], value)}
    assert "encoder.blocks.1.attn.to_qkv.weight" in changed
    assert all(name.startswith("encoder.") for name in changed)


# Rotation


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_modality_rotation_is_trained_and_looked_at(tmp_path: Path, ranks: Ranks) -> None:
    """With the same seed and weights that stand still: only the rotation differs, in the step and in the look."""
    plan = replace(STILL, stages=(STILL.stage("image"),))
    for name, given in (("4d", plan), ("again", plan), ("modality", with_modality_rope(plan))):
        run(given, tmp_path / name, ranks, given=work())
    step, look = records(tmp_path / "4d")
    same_step, same_look = records(tmp_path / "again")
    other_step, other_look = records(tmp_path / "modality")
    for name in ("distill", "image_rec/l1", "image_rec/lpips", "loss"):
        assert same_step[name] == step[name]
        assert other_step[name] != step[name], name
    assert same_look["image_rec/psnr"] == look["image_rec/psnr"]
    assert other_look["image_rec/psnr"] != look["image_rec/psnr"]
    saved = [weights.load(tmp_path / name / "image.safetensors").state_dict() for name in ("4d", "modality")]
    assert_same(*saved)
