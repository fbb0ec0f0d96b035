"""Recipes as data: the published shares, changes by name, ablations."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest

from model.config import VARIANTS
from training.stages import ABLATIONS, CURRICULA, Optim, Recipe, Stage, Weights, finetune, override

# The paper's recipe, copied by hand from its text and table 2; nothing here is taken from the code.
LOSSES = {
    "reconstruction": 0.2,
    "semantic": 1.0,
    "kl": 1e-8,
    "l1": 1.0,
    "lpips": 10.0,
    "gram": 1000.0,
    "clip": 1.0,
    "adversarial": 0.0,
    "temperature": 2.0,
}
ADAMW = {
    "lr": 3e-4,
    "final_lr": 3e-5,
    "warmup": 2000,
    "encoder_scale": 0.1,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "clip": 1.0,  # not in the paper; a choice
    "ema": 0.9999,
}
SAMPLES = {"image_rec": 2048, "video_rec": 512, "asset_rec": 256, "video_sem": 1024, "asset_sem": 1024}
STAGES = {  # latent channels, pixels of image sides, of video sides (None: it draws no clips)
    "image": (32, (64, 512), None),
    "video": (48, (64, 1024), (64, 512)),
    "asset": (48, (64, 2048), (64, 1024)),
    "fsq": (48, (64, 2048), (64, 1024)),
}
STACKS = {  # width, blocks, heads and MLP of the encoder and of the decoder
    "so400m": (1152, 27, 16, 4304),
    "base": (768, 12, 12, 3072),
    "tiny": (144, 3, 2, 576),  # ours
}


def test_losses_and_optimiser_are_the_published_ones() -> None:
    assert asdict(Weights()) == LOSSES
    assert asdict(Optim()) == ADAMW
    for name in ("so400m", "base"):
        assert CURRICULA[name].weights == Weights()
        assert CURRICULA[name].optim == Optim()
    # The small one has the same losses; it starts from nothing, and has few steps.
    assert CURRICULA["tiny"].weights == Weights()
    small = {"lr": 1e-3, "final_lr": 1e-4, "warmup": 100, "encoder_scale": 1.0, "ema": 0.99}
    assert asdict(CURRICULA["tiny"].optim) == {**ADAMW, **small}


@pytest.mark.parametrize("name", ["so400m", "base"])
def test_samples_of_the_stages_are_the_published_ones(name: str) -> None:
    recipe = CURRICULA[name]
    assert [stage.name for stage in recipe.stages] == list(STAGES)
    for stage in recipe.stages:
        latent, image_side, video_side = STAGES[stage.name]
        assert stage.latent_channels == latent
        assert stage.bottleneck == ("fsq" if stage.name == "fsq" else "gaussian")
        assert stage.distill == 8192
        assert stage.batch == SAMPLES
        assert stage.image_side == image_side
        if video_side:
            assert stage.video_side == video_side
        assert (stage.frames, stage.strides, stage.clip_frames) == ((16, 32), (1, 12), 64)


def test_samples_of_the_small_recipe() -> None:
    for stage in CURRICULA["tiny"].stages:
        assert stage.latent_channels == STAGES[stage.name][0]
        assert (stage.steps, stage.distill, stage.batch) == (4000, 16, dict.fromkeys(SAMPLES, 16))
        assert stage.image_side == stage.video_side == (64, 160)
        assert (stage.frames, stage.strides, stage.clip_frames) == ((4, 8), (1, 3), 8)


@pytest.mark.parametrize("name", STACKS)
def test_sizes_of_the_networks(name: str) -> None:
    base = CURRICULA[name].base
    for stack in (base.encoder, base.decoder):
        assert (stack.width, stack.blocks, stack.heads, stack.mlp) == STACKS[name]
    assert (base.encoder.norm, base.encoder.bias, base.encoder.qk_norm) == ("layer", True, False)
    assert (base.decoder.norm, base.decoder.bias, base.decoder.qk_norm) == ("rms", False, True)


def test_the_stages_make_the_networks_that_were_published() -> None:
    recipe = CURRICULA["so400m"]
    published = ("so400m-stage1", "so400m-continuous", "so400m-continuous", "so400m-discrete")
    for stage, variant in zip(recipe.stages, published, strict=True):
        assert recipe.model(stage) == VARIANTS[variant], stage.name


def test_shares_of_the_tasks_are_the_published_ninths() -> None:
    image, video, asset, fsq = CURRICULA["so400m"].stages
    assert image.cycle == ("image_rec",)
    assert Counter(video.cycle) == {"image_rec": 2, "video_sem": 1, "video_rec": 6}
    assert Counter(asset.cycle) == {"image_rec": 2, "video_sem": 1, "video_rec": 4, "asset_sem": 1, "asset_rec": 1}
    assert fsq.cycle == asset.cycle
    assert [stage.steps for stage in (image, video, asset, fsq)] == [200_000, 200_000, 50_000, 100_000]
    assert [video.task(step) for step in range(9, 18)] == list(video.cycle)


def test_networks_of_the_stages() -> None:
    recipe = CURRICULA["so400m"]
    models = [recipe.model(stage) for stage in recipe.stages]
    assert [model.latent_channels for model in models] == [32, 48, 48, 48]
    assert (models[3].bottleneck, models[3].codebooks, models[3].codebook_size) == ("fsq", 8, 4096)
    assert models[1].encoder == models[0].encoder


@pytest.mark.parametrize("name", CURRICULA)
def test_a_recipe_comes_back_from_json(name: str) -> None:
    recipe = CURRICULA[name]
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


def test_changes_by_name() -> None:
    changed = override(CURRICULA["tiny"], ["optim.lr=1e-4", "stages.video.steps=7", "rope=modality"])
    assert changed.optim.lr == 1e-4
    assert changed.stage("video").steps == 7
    assert changed.stage("image") == CURRICULA["tiny"].stage("image")
    assert changed.rope == "modality"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.rate=1", r"unknown key 'optim\.rate': optim has lr, final_lr"),
        ("stages.movie.steps=1", r"unknown key 'stages\.movie\.steps': stages has image, video, asset, fsq"),
        ("lr=1", "unknown key 'lr': a recipe has name, base"),
        ("optim.lr", "wanted KEY=VALUE"),
    ],
)
def test_unknown_keys_are_named(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(CURRICULA["tiny"], [change])


def test_unknown_keys_of_a_file_are_named() -> None:
    values = CURRICULA["tiny"].to_json()
    values["optim"]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"unknown key 'momentum' in optim; known: .*warmup"):
        Recipe.from_json(values)


def test_unknown_keys_inside_values_are_named_too() -> None:
    with pytest.raises(ValueError, match="stage image: batch of bogus; tasks: image_rec, video_rec"):
        override(CURRICULA["tiny"], ['stages.image.batch={"image_rec": 2, "bogus": 3}'])
    for place in ("base", "encoder"):
        values = CURRICULA["tiny"].to_json()
        (values["base"] if place == "base" else values["base"]["encoder"])["depth"] = 3
        with pytest.raises(ValueError, match=r"base: .*unexpected keyword argument 'depth'"):
            Recipe.from_json(values)
    values = CURRICULA["tiny"].to_json()
    del values["weights"]
    with pytest.raises(ValueError, match="a recipe without weights"):
        Recipe.from_json(values)


def test_a_stage_needs_tasks_that_have_a_batch() -> None:
    with pytest.raises(ValueError, match="task 'video_rec' has no batch"):
        Stage(
            name="x",
            steps=1,
            cycle=("video_rec",),
            latent_channels=32,
            bottleneck="gaussian",
            distill=0,
            batch={"image_rec": 1},
            image_side=(16, 32),
        )


def test_ablations_change_what_they_name() -> None:
    recipe = CURRICULA["so400m"]
    changed = {name: change(recipe) for name, change in ABLATIONS.items()}
    assert len({other.name for other in changed.values()}) == len(changed)
    assert changed["no-gram"].weights.gram == 0
    assert changed["patchgan"].weights.adversarial > 0
    assert changed["modality-rope"].rope == "modality"
    assert [stage.steps for stage in changed["joint"].stages] == [450_000, 100_000]
    only = finetune(recipe, "asset", steps=1000)
    assert [stage.name for stage in only.stages] == ["asset"]
    assert only.optim.warmup == 50
    assert finetune(recipe, "asset").stages[0].steps == 5000
    with pytest.raises(ValueError, match="stage 'movie'; so400m has image, video, asset, fsq"):
        finetune(recipe, "movie", steps=1)
