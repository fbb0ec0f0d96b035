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
from training.study import STUDIES, main
from training.study_options import parser, recipe_of
from training.study_report import Curve, Report, difference, half_interval, mean_and_error, write_report

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
    mean, half = difference(report, "image_rec/psnr", "b")
    assert (mean, half) == (1.0, 0.0)  # seed by seed, though the seeds are 10 dB apart


def test_collapses_are_seen() -> None:
    assert curve("a", 0, [10, 20, 16]).has_collapsed()
    assert not curve("a", 0, [10, 20, 18]).has_collapsed()
    assert Curve(variant="a", seed=0, points={}, collapsed=True).has_collapsed()


def test_a_report_says_what_is_known(tmp_path: Path) -> None:
    critic = Curve(
        variant="b",
        seed=1,
        points={"image_rec/psnr": [(10, 24.0)], "critic/real": [(10, 0.5)], "critic/fake": [(10, -0.25)]},
    )
    curves = [curve("a", 0, [20.0, 21.0]), curve("a", 1, [20.0, 22.0]), curve("b", 0, [20.0, 23.0]), critic]
    text = write_report(report_of(*curves), tmp_path).read_text()
    assert "| image_rec/psnr | 21.5 (0.5) | 23.5 (0.5) |" in text
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
    assert slow.over_looks("images/psnr") == 21.5
    later = [curve("a", 1, [20, 21, 22, 23], "images/psnr"), curve("b", 1, [20, 20, 20, 20], "images/psnr")]
    text = write_report(report_of(slow, fast, *later), tmp_path).read_text()
    assert "| images/psnr, middle | 20 (0), 2 of 2 | 10, 1 of 2 |" in text
    assert "| images/psnr, last | 40 (0), 2 of 2 | 20, 1 of 2 |" in text
    assert "- b, images/psnr, steps to last: -20; of one seed no interval is known" in text
    assert "- b, images/psnr, mean over looks: -0.125, 95 % interval" in text


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


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "--steps 0": "0; wanted a whole number, 1 or more",
        "--vgg vgg.pth": "missing teachers:\n  vgg (nothing at vgg.pth)",
        "--set optim.momentum=1": "unknown key 'optim.momentum'",
        "--images nowhere/*.tar": "no shards in nowhere/*.tar",
        "--shown-images nowhere": "nowhere: no such shard",
    }
    for words, message in cases.items():
        try:
            status = main(["gram", "--out", str(tmp_path), *words.split()])
        except SystemExit as left:
            status = left.code
        assert status == 2
        assert message in capsys.readouterr().err
