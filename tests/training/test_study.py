"""Studies: variants differ in what they name, the report says what came out and how sure it is."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from training.stages import CURRICULA, Recipe
from training.study import STUDIES, _between_looks, main
from training.study_options import parser, recipe_of
from training.study_report import (
    Curve,
    Gap,
    Report,
    difference,
    half_interval,
    mean_and_error,
    over_looks,
    write_report,
)

SMALL = ["--steps", "3", "--seeds", "1", "--width", "32", "--batch", "2", "--shown-count", "4", "--looks", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures, and no teacher of an installed package."""
    monkeypatch.setattr("training.chain.glance", lambda *_: ({}, {}))
    monkeypatch.setattr("training.study_looks.PACKAGES", {"no_such_package": ""})


def options(*words: str) -> argparse.Namespace:
    return parser(list(STUDIES), "").parse_args(words)


def curve(variant: str, seed: int, values: list[float], name: str = "image_rec/psnr") -> Curve:
    return Curve(variant=variant, seed=seed, points={name: [(10 * (i + 1), v) for i, v in enumerate(values)]})


def report_of(*curves: Curve) -> Report:
    return Report(name="x", question="Which?", settings={"seeds": "0, 1"}, curves=curves)


@pytest.mark.parametrize("words", [[], ["--recipe", "base", "--set", "tokens=512"]])
@pytest.mark.parametrize("name", STUDIES)
def test_variants_differ_in_one_thing_and_take_as_many_steps(name: str, words: list[str]) -> None:
    given = options(name, *words)
    variants = STUDIES[name].variants(recipe_of(given, seed=5))
    assert len(variants) >= 2
    assert len({recipe.to_json()["name"] + str(recipe.stages) + recipe.rope for recipe in variants.values()}) == len(
        variants
    )
    steps = {sum(stage.steps for stage in recipe.stages) for recipe in variants.values()}
    assert len(steps) == 1
    last = [recipe.stages[-1] for recipe in variants.values()]
    assert len({(stage.latent_channels, stage.bottleneck, stage.image_side) for stage in last}) == 1
    for recipe in variants.values():
        assert isinstance(recipe, Recipe)
        assert recipe.seed == 5
        assert recipe.base == recipe_of(given, 0).base


def test_recipes_are_those_of_training_with_changes() -> None:
    assert recipe_of(options("rope", "--recipe", "so400m"), 0) == CURRICULA["so400m"]
    changed = recipe_of(options("rope", "--recipe", "tiny", "--steps", "7", "--batch", "3", "--set", "optim.lr=1"), 2)
    assert {(stage.steps, stage.batch["image_rec"], stage.distill) for stage in changed.stages} == {(7, 3, 3)}
    assert (changed.optim.lr, changed.seed) == (1, 2)
    with pytest.raises(ValueError, match="--width is of the recipe study"):
        recipe_of(options("rope", "--recipe", "tiny", "--width", "32"), 0)


def test_means_errors_and_intervals() -> None:
    values = [1.0, 2.0, 4.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert half_interval(1.0, 3) == pytest.approx(4.303)
    assert math.isnan(mean_and_error([1.0])[1])
    report = report_of(curve("a", 0, [20.0]), curve("a", 1, [30.0]), curve("b", 0, [21.0]), curve("b", 1, [31.0]))
    # Seed by seed, though the seeds are 10 dB apart.
    assert difference(report, "image_rec/psnr", "b") == Gap(1.0, 0.0, 2, 2)


def test_collapses_are_seen() -> None:
    assert curve("a", 0, [10, 20, 16]).has_collapsed()
    assert not curve("a", 0, [10, 20, 18]).has_collapsed()
    assert Curve(variant="a", seed=0, points={}, collapsed=True).has_collapsed()
    # What clips take from images at the start of their stage is no collapse; a fall inside a stage is one.
    ends = {"image": 20, "video": 40}
    for values, fell in (([10, 20, 15, 16], False), ([10, 20, 20, 16], True), ([20, 10, 20, 20], True)):
        points = {"images/psnr": [(10 * (i + 1), float(value)) for i, value in enumerate(values)]}
        assert Curve(variant="a", seed=0, points=points, ends=ends).has_collapsed() == fell


def test_a_report_says_what_is_known(tmp_path: Path) -> None:
    critic = Curve(
        variant="b",
        seed=1,
        points={"image_rec/psnr": [(10, 24.0)], "critic/real": [(10, 0.5)], "critic/fake": [(10, -0.25)]},
    )
    curves = [curve("a", 0, [20.0, 21.0]), curve("a", 1, [20.0, 22.0]), curve("b", 0, [20.0, 23.0]), critic]
    text = write_report(report_of(*curves), tmp_path).read_text()
    assert "| image_rec/psnr | 21.5 (0.5), 2 of 2 | 23.5 (0.5), 2 of 2 |" in text
    assert "- b, image_rec/psnr: +2, 95 % interval +2 to +2: a difference" in text
    assert "- a: 0 of 2" in text
    assert "- seed 1: +0.50, -0.25" in text
    assert np.asarray(PIL.Image.open(tmp_path / "curves.png")).std() > 5


def test_speed_is_in_steps_to_a_level_of_the_same_seed(tmp_path: Path) -> None:
    slow, fast = curve("a", 0, [20, 21, 22, 23], "images/psnr"), curve("b", 0, [21, 23, 23, 24], "images/psnr")
    assert slow.steps_to("images/psnr", 21.5) == 25
    assert math.isnan(slow.steps_to("images/psnr", 24))
    assert slow.steps_to("images/psnr", 19) == 10
    assert curve("a", 0, [9, 5], "images/fd").steps_to("images/fd", 7) == 15  # less is better
    later = [curve("a", 1, [20, 21, 22, 23], "images/psnr"), curve("b", 1, [20, 20, 20, 20], "images/psnr")]
    text = write_report(report_of(slow, fast, *later), tmp_path).read_text()
    assert "| images/psnr, middle | 20 (0), 2 of 2 | 10, 1 of 2 |" in text
    assert "| images/psnr, last | 40 (0), 2 of 2 | 20, 1 of 2 |" in text
    assert "- b, images/psnr, steps to last: -20; 1 of 2 pairs, no verdict" in text
    assert "- b, images/psnr, mean over looks: -0.125, 95 % interval" in text
    assert "have 2 intervals of 95 %: if nothing differed, 0.1 of them would be expected to leave out 0" in text


def test_what_is_looked_at_later_is_compared_where_both_are(tmp_path: Path) -> None:
    steps = range(10, 70, 10)
    curves = []
    for seed in (0, 1):
        clips = [(step, 20.0 + step / 10 + seed) for step in steps]
        images = [(step, 30.0 - seed) for step in steps]
        late = {"images/psnr": images, "clips/psnr": clips[3:]}
        curves.append(Curve(variant="curriculum", seed=seed, points=late, ends={"image": 30, "video": 60}))
        curves.append(
            Curve(variant="joint", seed=seed, points={"images/psnr": images, "clips/psnr": clips}, ends={"video": 60})
        )
    text = write_report(report_of(*curves), tmp_path).read_text()
    assert "- joint, clips/psnr, mean over looks from step 40: +0, 95 % interval +0 to +0: no difference shown" in text
    assert "| clips/psnr, last | not from the first look | not from the first look |" in text
    assert "- joint, clips/psnr, steps to" not in text
    assert "- joint, images/psnr, steps to last: +0" in text


def test_runs_that_broke_off_have_no_last_look(tmp_path: Path) -> None:
    ends = {"image": 30}
    curves = [
        Curve(
            variant=variant,
            seed=seed,
            points={
                "images/psnr": [(10, 20.0), (20, 22.0), (30, 23.0)][:looks],
                "critic/real": [(10 * looks, 1.0)],
                "critic/fake": [(10 * looks, -1.0)],
            },
            ends=ends,
            collapsed=looks < 3,
        )
        for variant, seed, looks in (("a", 0, 3), ("a", 1, 3), ("b", 0, 3), ("b", 1, 2))
    ]
    assert math.isnan(curves[3].final("images/psnr"))
    assert math.isnan(curves[3].middle("images/psnr"))
    found, words = over_looks([(curves[3], curves[1])], "images/psnr")
    assert (found.mean, words) == (0, ", to step 20 where one broke off")
    text = write_report(report_of(*curves), tmp_path).read_text()
    assert "| images/psnr | 23 (0), 2 of 2 | 23, 1 of 2 |" in text
    assert "- b, images/psnr: +0; 1 of 2 pairs, no verdict" in text
    assert "- b: 1 of 2" in text
    assert "- seed 1: broke off before" in text


def test_looks_of_all_variants_are_at_the_same_steps() -> None:
    for words, wanted in ((["--steps", "200"], 25), (["--steps", "211"], 35), (["--recipe", "base"], 6250)):
        given = options("curriculum", *words)
        stages = [
            stage for plan in STUDIES["curriculum"].variants(recipe_of(given, 0)).values() for stage in plan.stages
        ]
        assert _between_looks(stages, given.looks) == wanted


def test_values_of_another_type_are_said() -> None:
    cases = {
        "stages=3": "wanted a list",
        "stages.image=3": r"wanted a key of the stage, as in stages\.image\.steps=1000",
        "optim.lr=abc": "'optim.lr=abc'; wanted a number",
        "optim.lr=NaN": "wanted a number",
        "optim=1": "wanted keys of its own",
        "stages.image.steps=1.5": "wanted a whole number",
        "stages.image.image_side=[64]": "wanted a list of 2",
        "stages.image.batch.image_rec=true": "wanted a whole number",
        "base.linear_path=1": "wanted true or false",
        "rope=5d": "wanted one of 4d, modality",
        'stages=[{"name": "x"}]': "missing",
    }
    for change, message in cases.items():
        with pytest.raises(ValueError, match=message):
            recipe_of(options("rope", "--set", change), 0)
    changes = ["name=7", "optim.lr=1", "stages.image.frames=[4]", 'stages.image.cycle=["image_rec"]']
    changed = recipe_of(options("rope", *(word for change in changes for word in ("--set", change))), 0)
    assert (changed.name, changed.optim.lr, changed.stage("image").frames) == ("7", 1, (4,))


def test_stages_are_compared_with_the_first_of_the_same_run(tmp_path: Path) -> None:
    ends = {"image": 20, "asset": 40}
    runs = [
        Curve(variant="a", seed=seed, points={"images/psnr": [(10, 5), (20, level), (40, level + 1)]}, ends=ends)
        for seed, level in enumerate([20, 25])
    ]
    text = write_report(report_of(*runs), tmp_path).read_text()
    line = "- a, images/psnr: image 22.5 (2.5), asset 23.5 (2.5); last against first: +1, 95 % interval +1 to +1"
    assert line in text
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["curves"][1]["points"]["images/psnr"][2] == [40, 26]


@pytest.mark.timeout(200)
def test_the_command_trains_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rope", *SMALL, "--out", str(tmp_path)]
    assert main(words) == 0
    assert f"report in {tmp_path / 'report.md'}" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    for figure in ("images/psnr", "clips/psnr", "assets/psnr", "images/fd"):
        assert f"| {figure} | " in text
    assert "of one seed no interval is known" in text
    assert "random networks" in text
    assert "images, videos, assets: drawn shapes" in text
    assert f"- command: python -m training.study {' '.join(words)}" in text
    # Again: nothing is trained anew, and another seed is added to the first.
    records = (tmp_path / "4d-seed0" / "metrics.jsonl").read_bytes()
    assert main([*words, "--seeds", "2"]) == 0
    assert (tmp_path / "4d-seed0" / "metrics.jsonl").read_bytes() == records
    assert "- 4d: 0 of 2" in (tmp_path / "report.md").read_text()
    assert main([*words, "--batch", "3"]) == 2
    assert f"{tmp_path} has runs of another batch; wanted the same" in capsys.readouterr().err


@pytest.mark.timeout(200)
def test_stages_of_the_curriculum_are_in_the_report(tmp_path: Path) -> None:
    assert main(["curriculum", *SMALL, "--steps", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "- curriculum, images/psnr: image " in text
    assert "- curriculum, clips/psnr: video " in text
    assert "- joint, " in text
    assert "curriculum: image 2, video 2, asset 2; joint: asset 6; image only: image 6" in text
    assert "curriculum: image 32, video 48, asset 48; joint: asset 48; image only: image 48 (where a stage" in text
    assert "of all runs, from the first line of each to its last look" in text


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--steps 0": "0; wanted a whole number, 1 or more",
        "--vgg vgg.pth": "missing teachers:\n  vgg (nothing at vgg.pth)",
        "--set optim.momentum=1": "unknown key 'optim.momentum'",
        "--images nowhere/*.tar": "no shards in nowhere/*.tar",
        "--shown-images nowhere": "nowhere: no such shard",
        "--init nowhere": "config.json: no such file",
        "--set stages=3": "'stages=3'; wanted a list",
    }
    for words, message in cases.items():
        try:
            status = main(["gram", "--out", str(tmp_path), *words.split()])
        except SystemExit as left:
            status = left.code
        assert status == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "study.json").exists()
