"""The command of a curriculum: on shards, with towers in folders, and what it says of what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model import weights
from tests.training.shard_files import write_images
from tests.training.tiny_run import WIDTH, recipe
from training.fresh import fresh
from training.shard_file import OpenShard
from training.train import main

SMALL = [f"stages.{stage}.{key}" for stage in ("image", "video", "asset", "fsq") for key in ("steps=2", "distill=2")]
CHANGES = [word for change in [*SMALL, "tokens=256"] for word in ("--set", change)]


def test_a_stage_on_shards_and_again_for_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "shards", 8)
    words = [
        "tiny",
        "--out",
        str(tmp_path / "run"),
        "--images",
        str(tmp_path / "shards"),
        "--random-teachers",
        *CHANGES,
    ]
    words += ["--set", 'stages.image.batch={"image_rec": 2}', "--set", "weights.lpips=0", "--set", "weights.gram=0"]
    assert main([*words, "--stage", "image"]) == 0
    said = capsys.readouterr().out
    assert "image 2/2" in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["weights"]["lpips"] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "image_rec/clip" in records[0]
    assert "image_rec/lpips" not in records[0]
    assert main([*words, "--stage", "video", "--start", str(tmp_path / "run" / "image.safetensors")]) == 2
    assert "stage video draws video_rec: no shards of videos are given" in capsys.readouterr().err
    video = ["--stage", "video", "--generated", "--start", str(tmp_path / "run" / "image.safetensors")]
    assert main(["tiny", "--out", str(tmp_path / "two"), "--random-teachers", *CHANGES, *video, "--shard"]) == 0
    assert weights.load(tmp_path / "two" / "video.safetensors").config.latent_channels == 48


def test_shards_without_an_index_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every stage and every look."""
    shards = write_images(tmp_path / "shards", 8)
    (tmp_path / "shards" / "index.json").unlink()
    counted: list[str] = []

    def opened(place: str) -> OpenShard:
        counted.append(place)
        return OpenShard(place)

    monkeypatch.setattr("training.shards.OpenShard", opened)
    words = ["--out", str(tmp_path / "run"), "--images", str(tmp_path / "shards"), "--random-teachers", *CHANGES]
    words += ["--set", 'stages.image.batch={"image_rec": 2}', "--stage", "image", "--look-every", "1"]
    assert main(["tiny", *words]) == 0
    assert sorted(counted) == [shard.place for shard in shards]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "--generated"], "missing teachers:\n  vgg (not given). VGG16 of torchvision: curl"),
        (["tiny", "--random-teachers"], "stage image draws image_rec: no shards of images are given"),
        (["tiny", "--set", "optim.momentum=1"], "unknown key 'optim.momentum': optim has lr"),
        (["tiny", "--stage", "five"], "stage 'five'; tiny has image, video, asset, fsq"),
        (["tiny", "--random-teachers", "--images", "nowhere/*.tar"], "no shards in nowhere/*.tar"),
        (["huge"], "unknown name 'huge'"),
        ([], "unknown name ''"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")] if words[:1] == ["tiny"] else []
    assert main([*words, *out]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert "Traceback" not in said


def test_weights_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = recipe()
    weights.save(fresh(plan.model(plan.stage("image")), 0), tmp_path / "other.safetensors")
    words = ["--generated", "--random-teachers", "--stage", "video", "--start", str(tmp_path / "other.safetensors")]
    assert main(["tiny", "--out", str(tmp_path / "run"), *CHANGES, *words]) == 2
    assert f"blocks of width {WIDTH}" in capsys.readouterr().err


@pytest.mark.parametrize("ablation", ["patchgan", "modality-rope", "no-gram"])
def test_ablations_run(ablation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--generated", "--random-teachers", "--stage", "image", "--ablation", ablation, *CHANGES]
    words += ["--set", 'stages.image.batch={"image_rec": 2}', "--log-every", "1"]
    assert main(["tiny", "--out", str(tmp_path / "run"), *words]) == 0
    said = capsys.readouterr().out
    assert ("critic/fake" in said) == (ablation == "patchgan")
    assert ("image_rec/gram" in said) == (ablation == "modality-rope")
