"""One stage: how a step is cut has no say, resuming is exact, what is broken stops before the weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model import weights
from tests.training.tiny_run import pieces, recipe, trainer, work
from training import snapshots as snapshots_module
from training.chain import averaged_weights, run_stages
from training.curriculum import Habits, NotFiniteError, StageTrainer
from training.fresh import fresh
from training.generated import hash_tokens
from training.ranks import Ranks, joined
from training.snapshots import SaveError, Snapshots
from training.stages import ABLATIONS, stacks
from training.student import Student

QUIET = Habits(log_every=0, save_every=0)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.mark.parametrize("stage", ["image", "asset", "fsq"])
def test_how_a_step_is_cut_into_passes_has_no_say(stage: str, ranks: Ranks) -> None:
    whole, cut = trainer(recipe(), stage, ranks), trainer(recipe(tokens=8), stage, ranks)
    for _ in range(5):  # up to the first task with captions
        one, other = whole.train_step(), cut.train_step()
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-6), name


def test_losses_fall(ranks: Ranks) -> None:
    run = trainer(recipe(steps=60), "image", ranks)
    values = [run.train_step() for _ in range(60)]
    for name in ("distill", "image_rec/l1", "image_rec/lpips"):
        first, last = (np.mean([step[name] for step in part]) for part in (values[:10], values[-10:]))
        assert last < 0.92 * first, name


@pytest.mark.parametrize(("stage", "ablation"), [("video", None), ("fsq", None), ("image", "patchgan")])
def test_resuming_equals_never_having_stopped(stage: str, ablation: str | None, ranks: Ranks, tmp_path: Path) -> None:
    plan = recipe(steps=6)
    if ablation:
        plan = ABLATIONS[ablation](plan)
    straight = trainer(plan, stage, ranks)
    assert straight.run(Snapshots(tmp_path / "a", ranks), habits=QUIET)
    first = trainer(plan, stage, ranks)
    assert not first.run(Snapshots(tmp_path / "b", ranks), habits=QUIET, stop_at=4)
    second = trainer(plan, stage, ranks)
    second.restore(Snapshots(tmp_path / "b", ranks))
    assert second.progress.step == 4
    assert second.run(Snapshots(tmp_path / "b", ranks), habits=QUIET)
    for name, value in straight.student.state_dict().items():
        assert torch.equal(value, second.student.state_dict()[name]), name
    for name, value in straight.average.values.items():
        assert torch.equal(value, second.average.values[name]), name
    if straight.critic and second.critic:
        for name, value in straight.critic.net.state_dict().items():
            assert torch.equal(value, second.critic.net.state_dict()[name]), name
    moments = [list(run.optimizer.state_dict()["state"].values()) for run in (straight, second)]
    for one, other in zip(*moments, strict=True):
        assert torch.equal(one["exp_avg_sq"], other["exp_avg_sq"])


def test_what_is_not_a_number_stops_before_the_weights(ranks: Ranks) -> None:
    run = trainer(recipe(), "asset", ranks)
    run.train_step()
    run.train_step()
    for weight in run.teachers.text.parameters():  # type: ignore[attr-defined]
        weight.fill_(math.nan)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    with pytest.raises(NotFiniteError, match="stage asset, step 2"):
        run.train_step()
    for name, value in before.items():
        assert torch.equal(value, run.student.state_dict()[name])
    assert run.progress.step == 2


def test_a_checkpoint_of_another_recipe_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    trainer(recipe(), "image", ranks).run(Snapshots(tmp_path, ranks), habits=QUIET, stop_at=1)
    other = trainer(recipe(steps=5), "image", ranks)
    with pytest.raises(ValueError, match="of another recipe"):
        other.restore(Snapshots(tmp_path, ranks))
    with pytest.raises(FileNotFoundError, match="no checkpoint to go on from"):
        other.restore(Snapshots(tmp_path / "nothing", ranks))


def test_only_the_newest_checkpoints_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    kept = Snapshots(tmp_path, ranks)
    trainer(recipe(), "image", ranks).run(kept, habits=Habits(log_every=0, save_every=1))
    assert kept.steps() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_full_disk_leaves_the_checkpoint_before(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    kept = Snapshots(tmp_path, ranks, said.append)
    run = trainer(recipe(steps=20), "image", ranks)
    run.run(kept, habits=QUIET, stop_at=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
        run.run(kept, habits=Habits(log_every=0, save_every=1), stop_at=1)
        run.train_step()
        run._save(kept, wait=False)
        kept.finish()  # said, not raised: the run goes on
        assert any("step-00000002 not written" in line for line in said)
        run.train_step()
        with pytest.raises(SaveError, match="step-00000003 not written"):
            run._save(kept, wait=True)
    assert kept.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    again = trainer(recipe(steps=20), "image", ranks)
    again.restore(kept)
    assert again.progress.step == 1
    assert snapshots_module.progress_of(kept.newest())["step"] == 1


def test_a_start_that_does_not_fit_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    start = fresh(stacks(64, 1, 2, 64), 0)
    with pytest.raises(ValueError, match=r"a checkpoint of 1 \+ 1 blocks of width 64 .* does not fit a stage"):
        run_stages(recipe(), tmp_path, work(), ranks, start=start)


def test_sigterm_saves_and_ends_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.tiny_run", str(tmp_path), "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            deadline = time.monotonic() + 60
            while "image 1/" not in process.stdout.readline():
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            rest = process.communicate(timeout=60)[0]
        finally:
            if process.poll() is None:
                process.kill()
    assert process.returncode == 0, rest
    assert "told to stop: saving step" in rest
    assert "Traceback" not in rest
    steps = [path.name for path in (tmp_path / "image").iterdir()]
    assert len(steps) == 1
    assert steps[0].startswith("step-")


def _ranks_run(folder: Path, world: int, *words: str) -> None:
    command = [sys.executable, "-m", "tests.training.tiny_run", str(folder), "--stages", "asset", *words]
    if world > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}", "--standalone"]
        command = [*launcher, "-m", *command[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_two_processes_equal_one_and_hand_over_to_it(tmp_path: Path) -> None:
    """FSDP2 over gloo: the same weights but for rounding; a checkpoint of two goes on with one."""
    _ranks_run(tmp_path / "one", 1)
    _ranks_run(tmp_path / "two", 2, "--stop-at", "2")
    shutil.copytree(tmp_path / "two", tmp_path / "handed")
    _ranks_run(tmp_path / "two", 2)
    _ranks_run(tmp_path / "handed", 1)
    nets = [weights.load(tmp_path / name / "asset.safetensors") for name in ("one", "two", "handed")]
    plan = recipe()
    start = fresh(plan.model(plan.stage("asset")), plan.seed)
    one, *others = [torch.cat([value.flatten() for value in net.parameters()]) for net in (nets[0], *nets[1:])]
    way = (one - torch.cat([value.flatten() for value in start.parameters()])).norm()
    for other in others:
        # A gradient near 0 is rounding, and Adam makes a whole step of it: the way is compared, not every weight.
        assert (one - other).norm() < 1e-3 * way
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()[:4]]
        for name in ("one", "two", "handed")
    ]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-5)


def test_the_averaged_weights_are_what_is_written(ranks: Ranks) -> None:
    run = trainer(recipe(), "image", ranks)
    for _ in range(3):
        run.train_step()
    now = {name: value.detach().clone() for name, value in run.student.named_parameters()}
    written = averaged_weights(run.student, run.average)
    for name, value in run.student.named_parameters():
        assert torch.equal(value, now[name])
        assert torch.equal(written[name], run.average.values[name])
    assert any(not torch.equal(written[name], value) for name, value in now.items())


@pytest.mark.filterwarnings("ignore")  # torch's own, on the way to its compiler
@pytest.mark.parametrize("how", ["recompute", pytest.param("compile", marks=pytest.mark.slow)])
def test_less_memory_or_compiled_it_is_the_same_step(how: str, ranks: Ranks) -> None:
    plan = recipe()
    stage = plan.stage("asset")
    plain = trainer(plan, "asset", ranks)
    student = Student(fresh(plan.model(stage), 0), recompute=how == "recompute")
    if how == "compile":
        student.compile_blocks()
    other = StageTrainer(plan, stage, student, *pieces(), hash_tokens, ranks)
    for _ in range(3):
        one, two = plain.train_step(), other.train_step()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
