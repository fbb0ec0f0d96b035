"""Records of a run: what is in them, and that a full disk costs them and not the run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.small_disk import largest_file
from tests.training.test_curriculum_cli import CHANGES
from tests.training.tiny_run import only, recipe, trainer, work
from training.chain import run_stages
from training.curriculum import Habits
from training.ranks import Ranks, joined
from training.run_folder import RunFolder
from training.snapshots import SaveError, Snapshots
from training.train import main

FULL = Path("/dev/full")
"""Every write to it fails as on a disk without room."""

needs_full = pytest.mark.skipif(not FULL.exists(), reason="Linux only")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


def test_a_line_has_the_speed_and_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path, {"name": "test"}, 1)
    clock = iter([100.0, 150.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert folder.metrics("image", 10, 7330, {"loss": 2.0, "tokens": 4000.0}) == "image 10/7330  loss 2"
    line = folder.metrics("image", 110, 7330, {"loss": 1.5, "tokens": 4000.0})
    assert line == "image 110/7330  loss 1.5  8,000 tokens/s  1:00:10 left"
    monkeypatch.undo()
    records = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["stage"], record["step"], record["loss"]) for record in records] == [
        ("image", 10, 2.0),
        ("image", 110, 1.5),
    ]
    assert folder.picture("image", "image_rec", 110, torch.zeros(4, 6, 3, dtype=torch.uint8)).is_file()
    folder.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("image/loss")] == [(10, 2.0), (110, 1.5)]
    (grid,) = board.Images("image/image_rec")
    assert (grid.step, grid.width, grid.height) == (110, 6, 4)


@needs_full
def test_a_full_disk_costs_records_not_the_run(ranks: Ranks, tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, {}, 1, said.append)
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    (tmp_path / "pictures").mkdir()
    grid = torch.zeros(4, 6, 3, dtype=torch.uint8)
    for step in (2, 3):
        (tmp_path / "pictures" / f"asset-grid-{step:06d}.png").symlink_to(FULL)
    kept = Snapshots(tmp_path / "asset", ranks)
    done = trainer(recipe(), "asset", ranks).run(
        kept,
        folder,
        Habits(log_every=1, save_every=0, look_every=1),
        log=lambda _: None,
        look=lambda step: folder.picture("asset", "grid", step, grid),
    )
    assert done
    assert kept.steps() == [4]
    assert [line.partition(":")[0] for line in said] == ["metrics.jsonl not written", "pictures not written"]
    for line in said:
        assert "No space left on device" in line
        assert f" MB free in {tmp_path}); the run goes on" in line
    (tmp_path / "metrics.jsonl").unlink()  # there is room again
    folder.metrics("asset", 4, 4, {"loss": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    folder.close()


def test_a_line_that_fits_by_half_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run_folder._board", lambda _: None)
    said: list[str] = []
    folder = RunFolder(tmp_path, {}, 1, said.append)
    folder.metrics("image", 1, 9, {"loss": 3.0})
    with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 20):
        folder.metrics("image", 2, 9, {"loss": 2.0})
    folder.metrics("image", 3, 9, {"loss": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread says it too
def test_tensorboard_without_room_is_left_behind(tmp_path: Path) -> None:
    said: list[str] = []
    folder = RunFolder(tmp_path, {}, 1, said.append)
    deadline = time.monotonic() + 20
    with largest_file(1000):
        while not said:
            assert time.monotonic() < deadline
            folder.picture("image", "noise", 1, torch.randint(256, (64, 64, 3), dtype=torch.uint8))
            time.sleep(0.01)
    folder.metrics("image", 2, 9, {"loss": 2.0})
    folder.close()
    assert sorted(line.partition(":")[0] for line in said) == ["pictures not written", "tensorboard not written"]


@needs_full
def test_a_start_without_room_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").symlink_to(FULL)
    words = ["tiny", "--generated", "--random-teachers", "--stage", "image", *CHANGES, "--out", str(tmp_path)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno 28] No space left on device")
    assert said.count("\n") == 1


def test_weights_that_do_not_fit_are_written_by_the_same_command_later(ranks: Ranks, tmp_path: Path) -> None:
    plan = only(recipe(steps=1), "asset")
    (tmp_path / "asset.partial").mkdir(parents=True)  # no file can be written there
    with pytest.raises(SaveError, match=r"asset.safetensors not written: .* MB free in "):
        run_stages(plan, tmp_path, work(), ranks)
    (tmp_path / "asset.partial").rmdir()
    said: list[str] = []
    assert run_stages(plan, tmp_path, work(), ranks, log=said.append)
    assert said[0] == "asset: going on from step 1"
    assert (tmp_path / "asset.safetensors").is_file()
