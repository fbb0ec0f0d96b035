"""Samples of studies: shards beside drawn shapes, held ones, pieces; and the whole command on shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from media.types import Image, Voxels
from tests.training.scripted import SMALL_INCEPTION, Pictures, script
from tests.training.shard_files import write_images
from tests.training.test_study import SMALL, quick
from tests.training.tiny_run import recipe
from training import study_looks
from training.batches import Kind, Sample
from training.generated import Generated
from training.shard_order import Corpus
from training.shards import Shard
from training.study import main
from training.study_data import Filled, Held, Ordered, Pieces, lacking, only
from training.study_looks import features_of
from training.study_options import _distinct
from training.teachers import random_teachers

__all__ = ["quick"]  # used by every test here


class Counted(Generated):
    """Keeps what it was asked for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.asked: list[int] = []

    def draw(self, kind: Kind, numbers: list[int]) -> list[Sample]:  # type: ignore[override]
        self.asked += numbers
        return super().draw(kind, numbers)


def pixels(sample: Sample) -> bytes:
    assert isinstance(sample.item, Image)
    return sample.item.pixels.tobytes()


def test_what_a_stage_lacks_and_what_is_left_of_it() -> None:
    stage = recipe().stage("asset")
    assert lacking(stage, ["images"]) == ["videos", "assets"]
    part = only(stage, ["images"])
    assert part is not None
    assert set(part.cycle) == {"image_rec"}
    assert part.distill == stage.distill
    clips = only(stage, ["videos"])
    assert clips is not None
    assert clips.distill == 0
    assert only(replace(stage, cycle=("image_rec",)), ["videos"]) is None


def test_what_is_missing_is_drawn() -> None:
    given, rest = Counted(1), Counted(2)
    filled = Filled(given, ["images"], rest)
    filled.draw("distill", [3])
    filled.draw("asset_sem", [4])
    assert (given.asked, rest.asked) == ([3], [4])


def test_held_samples_are_made_once_and_come_in_an_order_of_the_seed() -> None:
    source = Counted()
    held = Held(source, 5)
    orders = {}
    for seed in (1, 2):
        orders[seed] = [pixels(sample) for sample in Ordered(held, seed).draw("image_rec", range(10))]
        assert sorted(orders[seed][:5]) == sorted(orders[seed][5:])  # every one once before any comes again
        assert orders[seed][:5] != orders[seed][5:]
    assert orders[1] != orders[2]
    assert sorted(source.asked) == list(range(5))
    assert [pixels(sample) for sample in Ordered(held, 1).draw("image_rec", range(4, 8))] == orders[1][4:8]
    first = [pixels(sample) for sample in Ordered(held, None).draw("image_rec", [0])]
    assert first == [pixels(sample) for sample in Generated().draw("image_rec", [0])]


def test_pieces_are_neighbours_with_their_own_features() -> None:
    (whole,) = Generated().draw("asset_rec", [0])
    (piece,) = Pieces(Generated(), 20).draw("asset_rec", [0])
    assert isinstance(whole.item, Voxels)
    assert isinstance(piece.item, Voxels)
    assert len(piece.item.coords) == 20 < len(whole.item.coords)
    assert np.ptp(piece.item.coords, axis=0).max() <= 12
    known = {tuple(place): row.tobytes() for place, row in zip(whole.item.coords, whole.item.feats, strict=True)}
    for place, row in zip(piece.item.coords, piece.item.feats, strict=True):
        assert known[tuple(place)] == row.tobytes()
    (same,) = Pieces(Generated(), 10**6).draw("asset_rec", [0])
    assert isinstance(same.item, Voxels)
    assert np.array_equal(same.item.coords, whole.item.coords)


@pytest.mark.parametrize("inception", [True, False])
def test_features_are_one_row_a_picture_of_any_size(
    inception: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_looks, "INCEPTION", SMALL_INCEPTION)
    path = script(Pictures(), tmp_path / "inception.pt") if inception else None
    features = features_of(path, random_teachers(32, seed=0), True, torch.device("cpu"))
    pictures = [torch.rand(1, 3, *sides) * 2 - 1 for sides in ((32, 48), (48, 32), (32, 48))]
    rows = features.of(pictures)
    for row, picture in zip(rows, pictures, strict=True):
        torch.testing.assert_close(row, features.of([picture])[0], rtol=1e-4, atol=1e-5)
    assert features.name == ("rfid" if inception else "fd")
    assert ("inception.pt" if inception else "a random VGG") in features.words


def test_samples_until_one_comes_again() -> None:
    def corpus(count: int, weight: float | None = None) -> Corpus:
        return Corpus(name="x", shards=(Shard(place="x", count=count),), weight=weight)

    assert _distinct([corpus(4), corpus(39)]) == 43
    assert _distinct([corpus(4, 1), corpus(39, 3)]) == 16


def test_nothing_stays_open_where_a_study_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[int] = []
    monkeypatch.setattr(Held, "close", lambda self: closed.append(self.count))
    words = ["gram", *SMALL, "--hold", "6", "--out", str(tmp_path)]
    (tmp_path / "gram-seed0").mkdir()
    (tmp_path / "study.json").write_text("{}")
    assert main(words) == 2
    assert sorted(closed) == [4, 6]
    closed.clear()
    assert main([*words, "--inception", "nowhere"]) == 2
    assert sorted(closed) == [4, 6]
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.timeout(200)
def test_a_study_on_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(study_looks, "INCEPTION", SMALL_INCEPTION)
    write_images(tmp_path / "train", 8)
    write_images(tmp_path / "apart", 4)
    words = [*SMALL, "--images", str(tmp_path / "train"), "--out", str(tmp_path / "run"), "--hold", "6"]
    words += ["--shown-images", str(tmp_path / "apart"), "--workers", "1"]
    path = script(Pictures(), tmp_path / "inception.pt")
    assert main(["gram", *words, "--inception", str(path)]) == 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"- data: images from {tmp_path / 'train'}; 6 samples of a kind" in text
    assert f"4 images, the same for all runs; images held aside, from {tmp_path / 'apart'}" in text
    assert "Frechet distance: rFID network inception.pt" in text
    assert "| images/rfid | " in text
    assert "What the critic says at the end" in text
    assert "4 images (8 were wanted, the shards have no more), the same" not in text
    assert main(["gram", *words, "--shown-count", "8", "--hold", "9", "--out", str(tmp_path / "more")]) == 0
    text = (tmp_path / "more/report.md").read_text()
    assert "4 images (8 were wanted, the shards have no more), the same" in text
    assert "9 samples of a kind (images have 8, which come again among them), over" in text
    capsys.readouterr()
    out = ["--out", str(tmp_path / "other")]
    assert main(["rope", *words, *out]) == 2
    assert "no shards of videos, assets are given; --generated draws shapes in their place" in capsys.readouterr().err
    assert main(["rope", *words, *out, "--generated", "--shown-assets", str(tmp_path / "apart")]) == 2
    assert "--shown-assets without --assets" in capsys.readouterr().err
    assert main(["rope", *words, *out, "--generated"]) == 0
    text = (tmp_path / "other" / "report.md").read_text()
    assert f"- data: images from {tmp_path / 'train'}; videos, assets: drawn shapes (training/generated.py)" in text
