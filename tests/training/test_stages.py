"""Recipes as data: the published shares, changes by name, ablations."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from training.stages import ABLATIONS, CURRICULA, Recipe, Stage, finetune, override


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
