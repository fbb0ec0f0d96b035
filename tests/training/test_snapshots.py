"""Checkpoints: written beside the steps, whole or not at all, and there as soon as they are whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.training.on_two_ranks import poison
from tests.training.small_disk import largest_file
from tests.training.tiny_run import recipe, trainer
from training.curriculum import Habits, NotFiniteError, StageTrainer
from training.ranks import Ranks, joined
from training.snapshots import SaveError, Snapshots, progress_of
from training.stages import Task

QUIET = Habits(log_every=0, save_every=0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are not written before it is set."""
    opened = threading.Event()
    write = FileSystemWriter.write_data

    def waits(*given: object) -> object:
        assert opened.wait(20), "nobody opened the gate: is the writing waited for?"
        return write(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(FileSystemWriter, "write_data", waits)
    yield opened
    opened.set()


def same(one: StageTrainer, other: StageTrainer) -> bool:
    """Weights, their means and the moments, bit for bit."""
    pairs = [*zip(one.student.state_dict().values(), other.student.state_dict().values(), strict=True)]
    pairs += zip(one.average.values.values(), other.average.values.values(), strict=True)
    moments = [run.optimizer.state_dict()["state"].values() for run in (one, other)]
    for mine, theirs in zip(*moments, strict=True):
        pairs += [(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq")]
    return all(torch.equal(a, b) for a, b in pairs)


def test_steps_go_on_while_a_checkpoint_is_written(ranks: Ranks, tmp_path: Path, gate: threading.Event) -> None:
    kept = Snapshots(tmp_path, ranks)
    run, straight = (trainer(recipe(), "asset", ranks) for _ in range(2))
    for each in (run, straight):
        each.train_step()
        each.train_step()
    run._save(kept, wait=False)
    run.train_step()
    kept.poll()
    assert kept.steps() == []
    gate.set()
    kept.finish()
    assert kept.steps() == [2]
    again = trainer(recipe(), "asset", ranks)
    again.restore(kept)
    assert same(again, straight)  # as it was when the writing began
    again.train_step()
    assert same(again, run)


@pytest.mark.parametrize("cycle", [("image_rec",), ("video_rec", "video_sem")])
def test_what_has_had_no_gradient_yet_is_no_hindrance(cycle: tuple[Task, ...], ranks: Ranks, tmp_path: Path) -> None:
    """Without distillation nothing reaches the pooling head before a step of words, if there is one."""
    given = recipe()
    (stage,) = (replace(stage, cycle=cycle, distill=0) for stage in given.stages if stage.name == "video")
    given = replace(given, stages=(stage,))
    kept = Snapshots(tmp_path, ranks)
    run, straight, again = (trainer(given, "video", ranks) for _ in range(3))
    straight.train_step()
    run.train_step()
    run._save(kept, wait=True)
    again.restore(kept)
    straight.train_step()
    again.train_step()
    pairs = zip(straight.student.state_dict().values(), again.student.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_written_checkpoint_has_its_name_though_nobody_asks(ranks: Ranks, tmp_path: Path) -> None:
    """A run may be killed at any time after."""
    kept = Snapshots(tmp_path, ranks)
    run = trainer(recipe(), "asset", ranks)
    run.train_step()
    run._save(kept, wait=False)
    deadline = time.monotonic() + 20
    while [path.name for path in tmp_path.iterdir()] != ["step-00000001"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kept.settle()


def test_a_run_that_breaks_keeps_the_checkpoint_before(ranks: Ranks, tmp_path: Path, gate: threading.Event) -> None:
    run = trainer(recipe(steps=9), "asset", ranks)

    def look(step: int) -> None:
        if step == 7:
            poison(run.student.net)
            threading.Timer(0.5, gate.set).start()  # after the step that breaks

    habits = Habits(log_every=0, save_every=5, look_every=1)
    with pytest.raises(NotFiniteError, match="stage asset, step 7"):
        run.run(Snapshots(tmp_path, ranks), habits=habits, look=look)
    assert gate.is_set()
    kept = Snapshots(tmp_path, ranks)
    assert kept.steps() == [5]
    again = trainer(recipe(steps=9), "asset", ranks)
    again.restore(kept)
    assert again.progress.step == 5
    assert again.run(kept, habits=QUIET)


def test_what_a_killed_run_left_half_is_ignored_and_removed(ranks: Ranks, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, ranks)
    trainer(recipe(), "asset", ranks).run(kept, habits=QUIET, stop_at=1)
    for step in (2, 7):
        left = tmp_path / f"step-{step:08d}.partial"
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")
        (left / "progress.json").write_text("{")
    again = trainer(recipe(), "asset", ranks)
    again.restore(kept)
    assert again.progress.step == 1
    again.run(kept, habits=QUIET, stop_at=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    trainer(recipe(), "asset", ranks).restore(kept)


def test_a_checkpoint_of_another_recipe_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    trainer(recipe(), "image", ranks).run(Snapshots(tmp_path, ranks), habits=QUIET, stop_at=1)
    other = trainer(recipe(steps=5), "image", ranks)
    with pytest.raises(ValueError, match="of another recipe"):
        other.restore(Snapshots(tmp_path, ranks))
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        other.restore(Snapshots(tmp_path / "nothing", ranks))


def test_only_the_newest_checkpoints_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, ranks)
    trainer(recipe(), "asset", ranks).run(kept, habits=Habits(log_every=0, save_every=1))
    assert kept.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_full_disk_leaves_the_checkpoint_before(ranks: Ranks, tmp_path: Path) -> None:
    said: list[str] = []
    kept = Snapshots(tmp_path, ranks, said.append)
    run = trainer(recipe(steps=20), "asset", ranks)
    run.run(kept, habits=QUIET, stop_at=1)
    with largest_file(30_000):
        run.train_step()
        run._save(kept, wait=False)
        deadline = time.monotonic() + 20
        while not said:  # said by the next steps, not raised: the run goes on
            assert time.monotonic() < deadline
            kept.poll()
        assert said[0].startswith("checkpoint step-00000002 not written: rank 0: ")
        assert f" MB free in {tmp_path})" in said[0]
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        run.train_step()
        with pytest.raises(SaveError, match=r"step-00000003 not written: .* MB free in "):
            run._save(kept, wait=True)
    assert kept.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    again = trainer(recipe(steps=20), "asset", ranks)
    again.restore(kept)
    assert again.progress.step == 1
    assert progress_of(kept.newest())["step"] == 1
    with largest_file(30_000):
        run._save(kept, wait=False)
        assert kept._under_way is not None
        kept._under_way[0].exception()
    run._save(kept, wait=True)  # there is room again, and the failure before is no reason not to try
    assert kept.steps() == [1, 3]
