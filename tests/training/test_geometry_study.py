"""Latent geometry: classes that lie apart score better than noise, measures are what they say, the report says all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from media.types import UInt8Array
from model import weights
from model.config import VARIANTS
from model.network import build
from tests.training.conftest import random_components
from training.clusters import (
    between_share,
    centred_units,
    davies_bouldin,
    paired_difference,
    principal,
    rank_correlation,
    resampled,
    silhouette,
    spectrum,
)
from training.config import LossConfig
from training.geometry_report import MEASURES, Outcome, correlations
from training.geometry_study import Labelled, Representation, maps_of, measure, pixel_rows, read_labelled, resized
from training.start import start_at
from training.study import main
from training.tsne import tsne

CLASSES, EACH = 3, 12
LABELS = [number % CLASSES for number in range(CLASSES * EACH)]


def labelled(count: int = len(LABELS)) -> Labelled:
    return Labelled(np.zeros((count, 8, 8, 3), np.uint8), LABELS[:count], ("a", "b", "c"))


def clouds(apart: float, seed: int, values: int = 20) -> Tensor:
    """A cloud a class, their middles so many deviations from the origin, each along an axis of its own."""
    rows = torch.randn(len(LABELS), values, generator=torch.Generator().manual_seed(seed))
    rows[range(len(LABELS)), LABELS] += apart
    return rows


def space(apart: float, name: str = "x") -> Representation:
    return Representation(name, "", clouds(apart, 0), clouds(apart, 1))


def test_classes_apart_are_named_right_and_score_better_than_noise() -> None:
    known, asked = labelled(), labelled()
    apart, noise = measure(space(100.0), known, asked), measure(space(0.0), known, asked)
    for share in apart.accuracy.values():
        assert (share.right, share.count) == (len(LABELS), len(LABELS))
    assert apart.hits.all()
    assert noise.accuracy[5, True].value < 0.7
    assert apart.silhouette > 0.95 > 0.2 > noise.silhouette
    assert apart.davies_bouldin < 0.2 < 1 < noise.davies_bouldin
    assert apart.between > 0.9 > 0.3 > noise.between
    # Three clouds at the corners of a triangle fill two dimensions; noise fills what it has.
    assert apart.participation == pytest.approx(2, abs=0.2)
    assert noise.participation > 8


def test_taking_the_mean_off_helps_where_all_point_one_way() -> None:
    shifted = Representation("x", "", clouds(4.0, 0) + 300, clouds(4.0, 1) + 300)
    outcome = measure(shifted, labelled(), labelled())
    assert outcome.accuracy[5, True].right >= outcome.accuracy[5, False].right
    assert outcome.accuracy[5, True] == measure(space(4.0), labelled(), labelled()).accuracy[5, True]


def test_silhouette_is_the_definition() -> None:
    units = centred_units(torch.randn(9, 4, generator=torch.Generator().manual_seed(3)), torch.zeros(4))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 5, 0])
    widths = []
    for i in range(9):
        mean = {
            name: float(
                np.mean([1 - float(units[i] @ units[j]) for j in range(9) if j != i and int(labels[j]) == name] or [0])
            )
            for name in (0, 1, 5)
        }
        a = mean.pop(int(labels[i]))
        b = min(mean.values())
        widths.append(0.0 if int(labels[i]) == 5 else (b - a) / max(a, b))
    assert silhouette(units, labels) == pytest.approx(np.mean(widths))


def test_davies_bouldin_and_scatter_by_hand() -> None:
    rows = torch.tensor([[0.0, 1.0], [0.0, -1.0], [6.0, 2.0], [6.0, -2.0]]).double()
    labels = torch.tensor([0, 0, 1, 1])
    assert davies_bouldin(rows, labels) == pytest.approx((1 + 2) / 6)
    assert between_share(rows, labels) == pytest.approx(36 / (36 + 10))
    with pytest.raises(ValueError, match="1 class"):
        davies_bouldin(rows, torch.zeros(4, dtype=torch.int64))


def test_dimensions_that_are_filled() -> None:
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    flat = torch.nn.functional.pad(corners, (0, 40))
    assert spectrum(flat).participation == pytest.approx(5)
    assert spectrum(flat + 7).effective == pytest.approx(5)
    line = torch.arange(6.0)[:, None] * torch.ones(1, 3)
    assert spectrum(line).participation == pytest.approx(1)
    assert math.isnan(spectrum(torch.ones(4, 3)).participation)
    places, shares = principal(line)
    assert shares[0] == pytest.approx(1)
    assert places[:, 0].abs().tolist() == pytest.approx(
        [(i - 2.5) * s for i, s in zip(range(6), [-(3**0.5)] * 3 + [3**0.5] * 3, strict=True)]
    )


def test_rank_correlation_is_spearmans() -> None:
    chance = np.random.default_rng(0)
    x, y = chance.integers(0, 6, 12).astype(float), chance.normal(size=12)
    found = rank_correlation(x, y, seed=1)
    wanted = spearmanr(x, y)
    assert found.value == pytest.approx(wanted.statistic)
    assert found.chance == pytest.approx(wanted.pvalue, abs=0.03)
    assert found.low < found.value < found.high
    perfect = rank_correlation([1, 2, 3, 4, 5, 6], [1, 4, 9, 16, 25, 36])
    assert perfect.value == pytest.approx(1)
    assert perfect.chance < 0.02
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]).value)
    assert math.isnan(rank_correlation([1, 2, 3], [1, 2, 3]).low)


def test_intervals_over_pictures() -> None:
    chance = np.random.default_rng(0)
    sure = np.stack([np.arange(400) < 100 * number for number in (1, 2, 3, 4)])
    assert resampled([1, 2, 3, 4], sure) == pytest.approx((1, 1))
    low, high = resampled([1, 2, 3, 4], chance.random((4, 40)) < 0.5)
    assert low < 0 < high
    hits, others = sure[2], sure[1]
    value, low, high = paired_difference(hits, others)
    assert value == pytest.approx(0.25)
    assert 0.2 < low < value < high < 0.3
    assert paired_difference(hits, hits) == (0, 0, 0)


def test_a_map_keeps_neighbours() -> None:
    rows = clouds(30.0, 0)
    units = centred_units(rows, rows.mean(0))
    places = tsne((2 - 2 * units @ units.T).clamp(min=0), principal(units)[0], perplexity=8)
    assert places.shape == (len(LABELS), 2)
    labels = torch.tensor(LABELS)
    near = torch.cdist(places, places).fill_diagonal_(math.inf).argmin(1)
    assert (labels[near] == labels).all()
    again = tsne((2 - 2 * units @ units.T).clamp(min=0), principal(units)[0], perplexity=8)
    assert torch.equal(places, again)
    with pytest.raises(ValueError, match="N > 3"):
        tsne(torch.zeros(3, 3), torch.zeros(3, 2))


def test_maps_hold_training_and_test_pictures() -> None:
    maps = maps_of(space(9.0), labelled(), labelled())
    assert maps.pca.shape == maps.tsne.shape == (2 * len(LABELS), 2)
    assert maps.labels.tolist() == [*LABELS, *LABELS]
    assert maps.is_test.tolist() == [False] * len(LABELS) + [True] * len(LABELS)


def test_the_control_is_in_no_correlation() -> None:
    spaces = [measure(space(apart, str(apart)), labelled(), labelled()) for apart in (0.0, 1.0, 2.0, 6.0)]
    control = Outcome(**{**vars(spaces[0]), "is_control": True, "silhouette": 9.0})
    found = correlations([*spaces, control], seed=0)
    assert set(found) == set(MEASURES)
    assert found["silhouette"].ranks.count == 4
    assert found["silhouette"].ranks.value == pytest.approx(1)
    assert found["davies_bouldin"].ranks.value == pytest.approx(-1)


def test_pictures_are_made_smaller_by_means() -> None:
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3)
    small = pixel_rows(picture, 2)
    assert small.shape == (1, 12)
    assert small[0, 0].item() == pytest.approx(np.round(picture[0, :2, :2, 0].mean()) / 255, abs=1 / 255)
    assert resized(picture[0], 8, PIL.Image.Resampling.BICUBIC).shape == (8, 8, 3)


def coloured(count: int, seed: int) -> tuple[UInt8Array, np.ndarray]:
    """Pictures of 16 x 16 whose class is their colour."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    pictures = chance.integers(0, 60, (count, 16, 16, 3))
    pictures[np.arange(count), :, :, labels] += 180
    return pictures.astype(np.uint8), labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for part, count in (("train", 12), ("test", 6)):
        pictures, labels = coloured(count, count)
        path = tmp_path / "images" / f"labelled_{part}.npz"
        np.savez(path, images=pictures, labels=labels, class_names=np.array(["red", "green", "blue"]))
    return tmp_path


def test_the_command_measures_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    words = ["geometry", "--data", str(folder), "--out", str(out), "--side", "32", "--device", "cpu"]
    assert main(words) == 0
    assert f"report in {out / 'report.md'}" in capsys.readouterr().out
    record = json.loads((out / "report.json").read_text())
    assert record["arguments"]["side"] == 32
    assert record["environment"]["torch"]
    names = [one["name"] for one in record["representations"]]
    assert names == [
        *("pixels, 8 x 8", "pixels, 16 x 16", "latents, mean", "latents, mean and deviation"),
        *("latents, 4 x 4 places", "latents, every place", "features, mean", "embedding", "noise (control)"),
    ]
    by_name = {one["name"]: {(a["k"], a["centred"]): a for a in one["accuracy"]} for one in record["representations"]}
    assert by_name["pixels, 8 x 8"][1, True]["right"] == 6
    assert by_name["features, mean"][1, True]["right"] == 6
    assert by_name["embedding"][1, True]["right"] == 6
    assert by_name["noise (control)"][1, True]["count"] == 6
    assert set(record["rank_correlations"]) == set(MEASURES)
    text = (out / "report.md").read_text()
    for name in names:
        assert text.count(f"| {name} | ") == 3
    assert "12 to learn from, 6 to name, 3 classes" in text
    for name in ("scatter.png", "map-pca.png", "map-tsne.png"):
        assert f"({name})" in text
        assert np.asarray(PIL.Image.open(out / name)).std() > 5


def test_latents_with_common_coordinates_tell_what_pixels_tell(folder: Path, tmp_path: Path) -> None:
    """Those of one linear codec; tokens of several experts have none in common (docs/decisions.md, 18)."""
    torch.manual_seed(0)
    net = build(replace(VARIANTS["tiny-continuous"], experts=0, marks=0, components=0))
    start_at(net, random_components(768, 144, 0), random_components(3072, 144, 1), LossConfig())
    weights.save(net, tmp_path / "linear.safetensors")
    words = ["geometry", "--data", str(folder), "--out", str(tmp_path / "out"), "--side", "32", "--device", "cpu"]
    assert main([*words, "--model", str(tmp_path / "linear.safetensors")]) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    by_name = {one["name"]: {(a["k"], a["centred"]): a for a in one["accuracy"]} for one in record["representations"]}
    assert by_name["latents, mean"][1, True]["right"] == 6


def test_fewer_pictures_are_spread_over_all(folder: Path) -> None:
    some = read_labelled(folder / "images" / "labelled_train.npz", 4)
    assert some.labels == [0, 0, 0, 0]
    assert len(read_labelled(folder / "images" / "labelled_train.npz", 100).labels) == 12


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"images": np.zeros((3, 16, 8, 3), np.uint8)}, "wanted [N, S, S, 3]"),
        ({"images": np.zeros((12, 16, 16, 3), np.float32)}, "images float32"),
        ({"labels": np.arange(11) % 3}, "a whole number each"),
        ({"labels": np.full(12, 3)}, "wanted 0 to 2"),
        ({"labels": np.zeros(12, int)}, "12 training pictures of 1 classes"),
        ({"class_names": np.array(["red", "green", "grey"])}, "are not those of the training pictures"),
        ({"class_names": None}, "class_names"),
        (None, "no such file"),
    ],
)
def test_bad_pictures_are_one_line(
    change: dict[str, np.ndarray | None] | None, line: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "images" / "labelled_train.npz"
    if change is None:
        path.unlink()
    else:
        content = {**np.load(path), **change}
        np.savez(path, **{key: value for key, value in content.items() if value is not None})
    assert main(["geometry", "--data", str(folder), "--out", str(folder / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert line in said


@pytest.mark.parametrize("words", [["--model", "nobody"], ["--model", "model/bundled/splats/tiny-splats.safetensors"]])
def test_a_wrong_model_is_one_line(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["geometry", "--data", str(folder), "--out", str(folder / "out"), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
