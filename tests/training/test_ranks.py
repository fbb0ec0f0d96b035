"""Two processes do what one does, and hand over to it and back; what one of them meets stops both."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model import weights
from tests.training.on_two_ranks import HALT, STEPS, go, plan
from tests.training.tiny_run import recipe, stopped_by_sigterm, trainer
from training.fresh import fresh
from training.ranks import Ranks, joined
from training.snapshots import Snapshots

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.fixture(scope="module")
def folder(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two: one, two, up (begun by one, ended by two), down."""
    found = tmp_path_factory.mktemp("ranks")
    for stage in STEPS:
        go(stage, found / "one", ranks)
    go("asset", found / "up", ranks, stop_at=HALT)
    command = [*LAUNCHER, "tests.training.on_two_ranks", str(found)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    go("asset", found / "down", ranks)
    return found


@pytest.mark.parametrize(
    ("stage", "how"), [("image", "two"), ("asset", "two"), ("fsq", "two"), ("asset", "up"), ("asset", "down")]
)
def test_how_many_processes_has_no_say(stage: str, how: str, folder: Path) -> None:
    """FSDP2 over gloo: the same weights but for rounding, and every term of every step, the critic's too."""
    given = plan(stage)
    start, one, other = (
        torch.cat([value.detach().flatten() for value in net.parameters()])
        for net in (
            fresh(given.model(given.stage(stage)), given.seed),
            *(weights.load(folder / name / f"{stage}.safetensors") for name in ("one", how)),
        )
    )
    # A gradient near 0 is rounding, and Adam makes a whole step of it: the way is compared, not every weight.
    assert (one - other).norm() < 1e-3 * (one - start).norm()
    records = [_records(folder / name, stage) for name in ("one", how)]
    assert len(records[0]) == STEPS[stage]
    if stage != "image":
        assert {"video_sem/sigmoid", "asset_sem/sigmoid", "critic/loss"} <= {name for row in records[0] for name in row}
    for wanted, got in zip(*records, strict=True):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-6)
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def _records(run: Path, stage: str) -> list[dict[str, float]]:
    """What each step of a stage logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.pop("stage") == stage and "loss" in row]
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def _told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def test_parameters_and_averages_are_cut_not_copied(folder: Path) -> None:
    first, second = (told["parts"] for told in _told(folder))
    assert any(name.startswith("mean ") for name in first)
    for name, (layout, held, whole) in first.items():
        assert layout == second[name][0] == "(Shard(dim=0),)", name
        assert held + second[name][1] == whole, name
    assert sum(held for _, held, _ in first.values()) < 0.55 * sum(whole for *_, whole in first.values())


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_a_number_on_one_stops_both(how: str, folder: Path) -> None:
    for message, unchanged in (told[how] for told in _told(folder)):
        assert message.startswith("stage asset, step 4: ")
        assert ("'loss': nan" in message) == (how == "loss")
        assert message.endswith("gradient norm nan")
        assert unchanged
    assert [path.name for path in (folder / how).iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_one_process_takes_the_way_of_many(half: bool, ranks: Ranks) -> None:
    """FSDP2 round a single process (`--shard`): on one GPU it is the way to see that it runs."""
    plain = trainer(recipe(), "asset", ranks)
    cut = trainer(recipe(), "asset", replace(ranks, sharded=True, half=half))
    assert all(isinstance(value, DTensor) for value in cut.student.parameters())
    for _ in range(3):
        wanted, got = plain.train_step(), cut.train_step()
        assert got["loss"] == pytest.approx(wanted["loss"], rel=5e-2 if half else 1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_blocks_in_bfloat16_and_all_that_is_kept_in_float32(sharded: bool, ranks: Ranks, tmp_path: Path) -> None:
    """The precision of GPUs, on a CPU."""
    run = trainer(recipe(), "asset", replace(ranks, sharded=sharded, half=True))
    seen: list[torch.dtype] = []

    def note(_: nn.Module, __: object, out: Tensor) -> None:
        seen.append(out.dtype)

    run.student.net.encoder.blocks[0].attn.to_qkv.register_forward_hook(note)
    for _ in range(2):
        assert all(math.isfinite(value) for value in run.train_step().values())
    assert set(seen) == {torch.bfloat16}
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    for value in (*run.student.parameters(), *run.average.values.values(), *moments):
        assert value.dtype == torch.float32
    kept = Snapshots(tmp_path, ranks)
    run._save(kept, wait=True)
    again = trainer(recipe(), "asset", replace(ranks, sharded=not sharded, half=True))
    again.restore(kept)
    assert again.progress.step == 2


@pytest.mark.timeout(120)
def test_sigterm_at_torchrun_leaves_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    """Its own status is 1, with its own traceback: that is torch's way to end."""
    command = [*LAUNCHER, "tests.training.tiny_run", str(tmp_path), "--steps", "300"]
    status, rest = stopped_by_sigterm(command)
    assert "told to stop: saving step" in rest
    assert status == 1, rest
    found = Snapshots(tmp_path / "image", ranks)
    again = trainer(recipe(300), "image", ranks)
    again.restore(found)
    assert [again.progress.step] == found.steps()
    assert len(list((tmp_path / "image").iterdir())) == 1
