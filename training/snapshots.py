"""Checkpoints of a curriculum run: written beside the steps, whole or not at all, for any number of processes.

DIR/step-00001200/ is a torch distributed checkpoint; while it is written it is called step-00001200.partial. A kill or
a full disk leaves the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from training.averages import Average
from training.patchgan import Critic
from training.ranks import Ranks
from training.student import Student

PROGRESS = "progress.json"
KEEP = 2
"""Whole checkpoints that are kept."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the one before is whole."""


class Snapshots:
    """Writer and reader of a folder of checkpoints."""

    def __init__(self, folder: Path, ranks: Ranks, log: Callable[[str], None] = print) -> None:
        self.folder = folder
        self.ranks = ranks
        self.log = log
        self._under_way: tuple[Future[Any], Path] | None = None

    def save(
        self,
        step: int,
        student: Student,
        average: Average,
        optimizer: Optimizer,
        progress: Mapping[str, Any],
        critic: Critic | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Begin to write; the step after may start at once (the state is copied first).

        progress: plain values. wait: return when it is on disk, or raise SaveError. Without it a failure is logged, and
        raised by nobody: the run is worth more than one checkpoint.
        """
        self.finish(wait=wait)
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        partial = path.with_name(f"{path.name}.partial")
        try:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                (partial / PROGRESS).write_text(json.dumps(dict(progress)))
            failed = False
        except OSError as error:
            self.log(f"checkpoint at step {step} not written: {error}")
            failed = True
        if self.ranks.most(int(failed)):
            if wait:
                raise SaveError(f"checkpoint at step {step} not written; see the line before")
            return
        state = _state(student, average, optimizer, critic)
        # async_save copies to the CPU before it returns and writes in a thread of its own.
        future = async_save(state, checkpoint_id=partial, process_group=self.ranks.saving)
        assert isinstance(future, Future)
        self._under_way = (future, path)
        if wait:
            self.finish(wait=True)

    def finish(self, *, wait: bool = False) -> None:
        """Wait for the checkpoint that is being written and give it its name. wait: as for save."""
        if self._under_way is None:
            return
        future, path = self._under_way
        self._under_way = None
        partial = path.with_name(f"{path.name}.partial")
        reason = ""
        try:
            future.result()
        except CheckpointException as error:  # not an Exception; it holds what went wrong on each rank
            reason = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        except OSError as error:
            reason = str(error)
        if self.ranks.most(int(bool(reason))):
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            self.log(f"checkpoint {path.name} not written: {reason or 'another rank failed'}")
            if wait:
                raise SaveError(f"checkpoint {path.name} not written: {reason or 'another rank failed'}")
            return
        if self.ranks.first:
            partial.rename(path)
            for old in self.steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        self.ranks.wait()

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, rising."""
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.suffix != ".partial"
        )

    def load(
        self, student: Student, average: Average, optimizer: Optimizer, critic: Critic | None = None
    ) -> dict[str, Any]:
        """Go on from the last whole checkpoint; returns its progress. FileNotFoundError where there is none."""
        path = self.newest()
        state = _state(student, average, optimizer, critic)
        load(state, checkpoint_id=path)
        set_model_state_dict(student, state["model"])
        average.load(state["average"])
        set_optimizer_state_dict(student, optimizer, state["optimizer"])
        if critic is not None:
            critic.load(state["critic"])
        return progress_of(path)

    def newest(self) -> Path:
        """The folder of the last whole checkpoint."""
        steps = self.steps()
        if not steps:
            raise FileNotFoundError(f"{self.folder}: no checkpoint to go on from")
        return self.folder / f"step-{steps[-1]:08d}"


def progress_of(path: Path) -> dict[str, Any]:
    """The plain values that were stored with a checkpoint."""
    values: dict[str, Any] = json.loads((path / PROGRESS).read_text())
    return values


def _state(student: Student, average: Average, optimizer: Optimizer, critic: Critic | None) -> dict[str, Any]:
    extra = {} if critic is None else {"critic": critic.state()}
    return {
        **extra,
        "model": get_model_state_dict(student),
        "average": dict(average.values),
        "optimizer": get_optimizer_state_dict(student, optimizer),
    }
