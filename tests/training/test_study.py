"""Studies: variants differ in what they name, the report says what came out and how sure it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from training.stages import Recipe
from training.study import STUDIES, Setting, main
from training.study_report import Curve, Report, difference, half_interval, mean_and_error, write_report

SETTING = Setting(folder=Path("unused"))


def curve(variant: str, seed: int, values: list[float], name: str = "image_rec/psnr") -> Curve:
    return Curve(variant=variant, seed=seed, points={name: [(10 * (i + 1), v) for i, v in enumerate(values)]})


def report_of(*curves: Curve) -> Report:
    return Report(name="x", question="Which?", settings={"seeds": "0, 1"}, curves=curves)


@pytest.mark.parametrize("name", STUDIES)
def test_variants_differ_in_one_thing_and_take_as_many_steps(name: str) -> None:
    variants = STUDIES[name].variants(SETTING.recipe(seed=5))
    assert len(variants) >= 2
    assert len({recipe.to_json()["name"] + str(recipe.stages) + recipe.rope for recipe in variants.values()}) == len(
        variants
    )
    steps = {sum(stage.steps for stage in recipe.stages) for recipe in variants.values()}
    assert len(steps) == 1
    for recipe in variants.values():
        assert isinstance(recipe, Recipe)
        assert recipe.seed == 5
        assert recipe.base == SETTING.recipe(0).base


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


@pytest.mark.timeout(200)
def test_the_command_trains_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rope", "--steps", "3", "--seeds", "1", "--width", "32", "--out", str(tmp_path)]) == 0
    assert f"report in {tmp_path / 'report.md'}" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    for figure in ("image_rec/psnr", "video_rec/psnr", "asset_rec/psnr", "images/fd"):
        assert f"| {figure} | " in text
    assert "of one seed no interval is known" in text
    assert "random networks" in text
    assert main(["rope", "--steps", "0", "--out", str(tmp_path)]) == 2
    assert "0 steps; wanted 1 or more" in capsys.readouterr().err
