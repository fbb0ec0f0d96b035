"""The first command of a newcomer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.train import main

TERMS = ("distill", "image_rec/l1", "image_rec/lpips", "image_rec/gram", "image_rec/clip", "image_rec/kl",
         "video_rec/l1", "asset_rec/l1", "video_sem/sigmoid", "asset_sem/sigmoid")  # fmt: skip


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["smoke", "--out", str(tmp_path)]) == 2
    assert "holds something else than a smoke run" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.timeout(180)
def test_all_stages_with_every_loss_and_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "asset: going on from step 5" in said
    folder = tmp_path / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"image", "video", "asset", "fsq"}
    seen = {name for record in records for name in record}
    assert set(TERMS) <= seen
    assert all(np.isfinite(value) for record in records for value in record.values() if not isinstance(value, str))
    assert {"config.json", "environment.json", "fsq.safetensors"} <= {path.name for path in folder.iterdir()}
    for coded, count in (("images", 2), ("clips", 1), ("voxel packs, against renders of their own voxels", 1)):
        (row,) = re.findall(rf"\| fsq \| plain \| {coded} \| {count} \| (.*) \|", said)
        tokens, psnr, ssim, lpips, *_ = (float(cell) for cell in row.replace("| -", "").split(" | "))
        assert tokens > 0
        assert psnr > 5
        assert 0 < ssim < 1
        assert lpips > 0
    (gaussians,) = re.findall(r"loss of Gaussians, L1 \+ LPIPS \+ SSIM of a view: (\S+)", said)
    assert float(gaussians) > 0
    pictures = sorted((folder / "pictures").iterdir())
    assert len(pictures) == 1 + 2 + 3 + 3
    assert all(np.asarray(PIL.Image.open(path)).std() > 5 for path in pictures)
    assert re.search(r"asset 9/9 .*  [\d,]+ tokens/s  0:00:00 left", said)
    board = EventAccumulator(str(folder / "tensorboard")).Reload().Tags()
    stages = {"image": TERMS[:6], "video": TERMS[6:9:2], "asset": TERMS[6:], "fsq": TERMS[6:]}
    for stage, terms in stages.items():
        assert {f"{stage}/{name}" for name in ("loss", "norm", "lr", "distill", *terms)} <= set(board["scalars"])
    grids = {"image": 1, "video": 2, "asset": 3, "fsq": 3}
    kinds = ("image_rec", "video_rec", "asset_rec")
    assert set(board["images"]) == {f"{stage}/{kind}" for stage, count in grids.items() for kind in kinds[:count]}
