"""The command of a curriculum: on shards, with towers in folders, and what it says of what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model import weights
from model.config import VARIANTS
from model.network import ATokenNet
from tests.training.shard_files import picture, write_images
from tests.training.tiny_run import WIDTH, recipe
from training.fresh import fresh
from training.shard_file import OpenShard, Record
from training.shards import ShardWriter
from training.stages import CURRICULA
from training.train import main
from training.widen import widen_latents

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
        (
            ["tiny", "--generated", "--set", "weights.clip=0", "--set", "weights.lpips=0", "--set", "weights.gram=0"],
            "missing teachers:\n  siglip2 (not given). SigLIP 2, both towers",
        ),
        (["tiny", "--random-teachers"], "stage image draws image_rec: no shards of images are given"),
        (["tiny", "--set", "optim.momentum=1"], "unknown key 'optim.momentum': optim has lr"),
        (["tiny", "--stage", "five"], "stage 'five'; tiny has image, video, asset, fsq"),
        (["tiny", "--finetune", "asset"], "--finetune without --start; wanted the weights to go on from"),
        (["tiny", "--steps", "5"], "--steps 5 is of --finetune"),
        (
            ["tiny", "--finetune", "asset", "--start", "huge=x.pt", "--generated", "--random-teachers"],
            "variant 'huge'; there are so400m-continuous",
        ),
        (
            ["tiny", "--finetune", "asset", "--start", "so400m-continuous=no.pt", "--generated", "--random-teachers"],
            "no.pt: no such file",
        ),
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


def test_bad_samples_are_in_the_metrics_and_another_order_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ShardWriter(tmp_path / "shards", "images") as writer:
        for number in range(8):
            media = picture(number) if number % 4 else b"\x89PNG broken"
            writer.write(Record(f"s{number}", "png", media, "a picture"))
    words = ["tiny", "--out", str(tmp_path / "run"), "--images", str(tmp_path / "shards"), "--random-teachers"]
    changes = ["stages.image.steps=2", "stages.image.distill=2", 'stages.image.batch={"image_rec": 8}', "tokens=512"]
    changes += ["weights.lpips=0", "weights.gram=0", "weights.clip=0"]
    words += ["--stage", "image", "--log-every", "1", *(word for change in changes for word in ("--set", change))]
    assert main([*words, "--most-bad", "0.9"]) == 0
    # Two epochs of eight, of which two are bad, four to describe, and those that came in the place of others.
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = [record["left_out"] for record in records if "left_out" in record]
    assert len(counts) == 2
    assert sum(counts) >= 4
    said = capsys.readouterr().out
    assert f"left_out {counts[0]:.4g}" in said
    assert f"stage image: {sum(counts):.0f} of {20 + sum(counts):.0f} samples that were drawn cannot be used" in said
    (tmp_path / "run" / "image.safetensors").unlink()  # only checkpoints are left, as of a run that was stopped
    assert main([*words, "--most-bad", "0.9", "--lanes", "4"]) == 2
    assert "saw its samples in another order (lanes: 8, now 4); wanted the shards" in capsys.readouterr().err
    wider = ["--most-bad", "0.9", "--set", "stages.image.latent_channels=40"]
    assert main([*words, *wider]) == 2
    assert "is of another recipe" in capsys.readouterr().err
    assert main([*words, "--most-bad", "0.8", "--workers", "1"]) == 0
    assert "image: going on from step 2" in capsys.readouterr().out


def published(path: Path, stage: str) -> ATokenNet:
    """Weights of a stage of the recipe tiny, written as the published ones are: a plain state dict."""
    plan = CURRICULA["tiny"]
    net = fresh(plan.model(plan.stage(stage)), 5)
    assert "encoder.blocks.0.attn.to_qkv.weight" in net.state_dict()  # as in the published files
    torch.save(net.state_dict(), path)
    return net


STILL = ["optim.lr=0", "optim.final_lr=0", "tokens=512"]
"""Nothing moves at a rate of 0: what is written is what the first step began with."""


@pytest.mark.parametrize("stage", ["image", "fsq"])
def test_finetuning_goes_on_from_a_published_checkpoint(stage: str, tmp_path: Path) -> None:
    net = published(tmp_path / "stage.pt", stage)
    words = ["--finetune", stage, "--steps", "1", "--start", str(tmp_path / "stage.pt"), "--generated"]
    changes = [*STILL, f"stages.{stage}.distill=2", f'stages.{stage}.batch={{"image_rec": 2, "video_rec": 2}}']
    changes += [f'stages.{stage}.cycle=["image_rec"]', "weights.lpips=0", "weights.gram=0"]
    words += ["--random-teachers", *(word for change in changes for word in ("--set", change))]
    assert main(["tiny", "--out", str(tmp_path / "run"), *words]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["name"], len(config["stages"]), config["stages"][0]["steps"]) == ("tiny-finetune", 1, 1)
    written = weights.load(tmp_path / "run" / f"{stage}.safetensors").state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_start_of_another_stage_is_named_by_its_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = CURRICULA["tiny"]
    first, second = plan.model(plan.stage("image")), plan.model(plan.stage("video"))
    net = published(tmp_path / "a=b.pt", "image")
    words = ["tiny", "--out", str(tmp_path / "run"), "--finetune", "video", "--steps", "1", "--generated"]
    changes = [
        *STILL,
        "stages.video.distill=0",
        'stages.video.cycle=["video_rec"]',
        'stages.video.batch={"video_rec": 1}',
    ]
    words += ["--random-teachers", *(word for change in changes for word in ("--set", change))]
    assert main([*words, "--start", str(tmp_path / "a=b.pt")]) == 2
    said = capsys.readouterr().err
    assert "has shape [64, 144]; wanted [96, 144]" in said
    assert "VARIANT=FILE says so" in said
    monkeypatch.setitem(VARIANTS, "small-stage1", first)
    assert main([*words, "--start", f"small-stage1={tmp_path / 'a=b.pt'}"]) == 0
    written = weights.load(tmp_path / "run" / "video.safetensors").state_dict()
    for name, value in widen_latents(net.state_dict(), first, second, plan.seed).items():
        torch.testing.assert_close(written[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("ablation", ["patchgan", "modality-rope", "no-gram"])
def test_ablations_run(ablation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--generated", "--random-teachers", "--stage", "image", "--ablation", ablation, *CHANGES]
    words += ["--set", 'stages.image.batch={"image_rec": 2}', "--log-every", "1"]
    assert main(["tiny", "--out", str(tmp_path / "run"), *words]) == 0
    said = capsys.readouterr().out
    assert ("critic/fake" in said) == (ablation == "patchgan")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == f"tiny-{ablation}"
    assert ("image_rec/gram" in said) == (ablation == "modality-rope")


def test_joint_training_begins_with_every_modality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no stage of images before it: the network is fresh and has its 48 channels from the first step."""
    batch = 'stages.asset.batch={"image_rec": 1, "video_rec": 1, "asset_rec": 1, "video_sem": 2, "asset_sem": 2}'
    changes = [
        "stages.asset.steps=9",
        "stages.asset.distill=1",
        "tokens=256",
        "stages.asset.image_side=[32, 32]",
        batch,
    ]
    changes += ["weights.lpips=0", "weights.gram=0", "weights.clip=0"]
    words = ["--generated", "--random-teachers", "--stage", "asset", "--ablation", "joint", "--log-every", "1"]
    words += [word for change in changes for word in ("--set", change)]
    assert main(["tiny", "--out", str(tmp_path / "run"), *words]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    tasks = [name.partition("/")[0] for record in records[:9] for name in record if name.endswith(("/l1", "/sigmoid"))]
    assert sorted(set(tasks)) == ["asset_rec", "asset_sem", "image_rec", "video_rec", "video_sem"]
    assert tasks[:3] == ["video_rec", "image_rec", "asset_rec"]
    assert weights.load(tmp_path / "run" / "asset.safetensors").config.latent_channels == 48
    assert main(["tiny", "--stage", "image", "--ablation", "joint"]) == 2
    assert "stage 'image'; tiny-joint has asset, fsq" in capsys.readouterr().err
