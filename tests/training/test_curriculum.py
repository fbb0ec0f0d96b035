"""One stage: how a step is cut has no say, resuming is exact, what is broken stops before the weights."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.blocks import Block
from tests.training.on_two_ranks import poison
from tests.training.tiny_run import pieces, recipe, stopped_by_sigterm, trainer, work
from training import chain
from training.chain import averaged_weights, run_stages
from training.curriculum import Habits, NotFiniteError, StageTrainer
from training.fresh import fresh
from training.generated import hash_tokens
from training.ranks import Ranks, joined
from training.snapshots import Snapshots
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


def test_a_start_that_does_not_fit_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    start = fresh(stacks(64, 1, 2, 64), 0)
    with pytest.raises(ValueError, match=r"a checkpoint of 1 \+ 1 blocks of width 64 .* does not fit a stage"):
        run_stages(recipe(), tmp_path, work(), ranks, start=start)


@pytest.mark.parametrize("at", ["step", "look"])
def test_sigterm_at_the_end_of_a_stage_begins_no_other(
    at: str, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its last step, and in what is done with its weights afterwards."""
    target, name = (StageTrainer, "train_step") if at == "step" else (chain, "averaged_weights")
    whole = getattr(target, name)

    def terminated(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*given, **named)

    monkeypatch.setattr(target, name, terminated)
    assert not run_stages(recipe(steps=1), tmp_path, work(), ranks, habits=QUIET, log=lambda _: None)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["image.safetensors"]
    monkeypatch.undo()
    assert run_stages(recipe(steps=1), tmp_path, work(), ranks, habits=QUIET, log=lambda _: None)


def test_sigterm_saves_and_ends_cleanly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.training.tiny_run", str(tmp_path), "--steps", "100000"]
    status, rest = stopped_by_sigterm(command)
    assert status == 0, rest
    assert "told to stop: saving step" in rest
    assert "Traceback" not in rest
    steps = [path.name for path in (tmp_path / "image").iterdir()]
    assert len(steps) == 1
    assert steps[0].startswith("step-")


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


def test_a_gradient_that_is_not_a_number_stops_too(ranks: Ranks) -> None:
    run = trainer(recipe(), "asset", ranks)
    run.train_step()
    poison(run.student.net)
    before = {name: value.clone() for name, value in run.student.state_dict().items()}
    with pytest.raises(NotFiniteError, match=r"'loss': \d.* gradient norm (inf|nan)"):
        run.train_step()
    assert run.progress.step == 1
    for name, value in before.items():
        assert torch.equal(value, run.student.state_dict()[name])


def _blocks(student: Student) -> list[Block]:
    return [block for block in (*student.net.encoder.blocks, *student.net.decoder.blocks) if isinstance(block, Block)]


@pytest.mark.filterwarnings("ignore")  # torch's own, on the way to its compiler
@pytest.mark.parametrize(
    "how", ["recompute", *(pytest.param(how, marks=pytest.mark.slow) for how in ("compile", "both"))]
)
def test_less_memory_or_compiled_it_is_the_same_step(how: str, ranks: Ranks) -> None:
    plan = recipe()
    stage = plan.stage("asset")
    plain = trainer(plan, "asset", ranks)
    student = Student(fresh(plan.model(stage), 0), recompute=how != "compile")
    if how != "recompute":
        student.compile_blocks()
    other = StageTrainer(plan, stage, student, *pieces(), hash_tokens, ranks)
    for _ in range(3):
        one, two = plain.train_step(), other.train_step()
        for name, value in one.items():
            assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_inside_of_a_block_runs_again_for_the_gradients(recompute: bool, ranks: Ranks) -> None:
    plan = recipe()
    stage = plan.stage("image")
    student = Student(fresh(plan.model(stage), 0), recompute=recompute)
    calls: Counter[str] = Counter()
    for block in _blocks(student):
        block.register_forward_hook(lambda *_: calls.update(["block"]))
        block.norm1.register_forward_hook(lambda *_: calls.update(["inside"]))
    StageTrainer(plan, stage, student, *pieces(), hash_tokens, ranks).train_step()
    assert calls["block"] >= 2
    assert calls["inside"] == calls["block"] * (2 if recompute else 1)


@pytest.mark.parametrize("wanted", [False, True])
def test_every_block_of_a_run_is_compiled(
    wanted: bool, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that only counts: the true one takes a minute (pytest -m slow)."""
    compiled: list[Callable[..., object]] = []
    calls: Counter[str] = Counter()

    def counting(function: Callable[..., object], **options: object) -> Callable[..., object]:
        assert options == {"dynamic": True}
        compiled.append(function)

        def call(*given: object, **named: object) -> object:
            calls.update(["compiled"])
            return function(*given, **named)

        return call

    monkeypatch.setattr(torch, "compile", counting)
    plan = recipe()
    plan = replace(plan, stages=(plan.stage("asset"),))
    run_stages(plan, tmp_path, replace(work(), compile=wanted), ranks, habits=QUIET, stop_at={"asset": 1})
    assert len(compiled) == wanted * len(_blocks(Student(fresh(plan.model(plan.stages[0]), 0))))
    assert (calls["compiled"] >= len(compiled)) if wanted else not calls
