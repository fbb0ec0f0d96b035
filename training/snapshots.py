"""Checkpoints of a curriculum run: written beside the steps, whole or not at all, for any number of processes.

DIR/step-00001200/ is a torch distributed checkpoint; while it is written it is called step-00001200.partial, and what
writes it gives it its name as the last thing. A kill or a full disk leaves the one before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from training.averages import Average
from training.optimizer import begin_state
from training.patchgan import Critic
from training.ranks import Ranks
from training.run_folder import space_left
from training.student import Student

PROGRESS = "progress.json"
KEEP = 2
"""Whole checkpoints that are kept."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the one before is whole."""


class _Writer(FileSystemWriter):
    """Writes a checkpoint under another name, and gives it its own once all ranks have written all of it.

    In the thread that writes: a run that is killed between two steps has it already.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_partial(path))
        self._whole = path

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The last call of a save, on the first rank alone; what it raises is raised on all of them."""
        super().finish(metadata, results)
        _partial(self._whole).rename(self._whole)


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
        self.finish()  # the one before may have failed for want of room that there is by now: no reason to raise
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        reason = ""
        try:
            if self.ranks.first:
                for left in self.folder.glob("*.partial"):  # of a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                _partial(path).mkdir(parents=True)
                (_partial(path) / PROGRESS).write_text(json.dumps(dict(progress)))
        except OSError as error:
            reason = f"{error}{space_left(self.folder)}"
        if self.ranks.most(int(bool(reason))):
            self._lost(path, reason, wait)
            return
        state = _state(student, average, optimizer, critic)
        # async_save copies to the CPU before it returns and writes in a thread of its own.
        future = async_save(state, storage_writer=_Writer(path), process_group=self.ranks.saving)
        assert isinstance(future, Future)
        self._under_way = (future, path)
        if wait:
            self.finish(wait=True)

    def poll(self) -> None:
        """After each step, on all ranks: if the writing has ended, say what failed and remove what is too old."""
        if self._under_way is not None and not self.ranks.most(int(not self._under_way[0].done())):
            self.finish()

    def finish(self, *, wait: bool = False) -> None:
        """Wait for the checkpoint that is being written. wait: as for save."""
        if self._under_way is None:
            return
        future, path = self._under_way
        self._under_way = None
        reason = self._outcome(future)
        if self.ranks.most(int(bool(reason))):
            self._lost(path, reason, wait)
            return
        if self.ranks.first:
            for old in self.steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        self.ranks.wait()

    def settle(self) -> None:
        """As finish, for a run that ends by an error: other ranks are not asked, for they may be elsewhere."""
        if self._under_way is None:
            return
        future, path = self._under_way
        self._under_way = None
        if reason := self._outcome(future):
            self.log(f"checkpoint {path.name} not written: {reason}")

    def _outcome(self, future: Future[Any]) -> str:
        """Wait; returns why it failed, or nothing."""
        error = future.exception()
        if error is None:
            return ""
        reason = str(error)
        if isinstance(error, CheckpointException):  # it holds what went wrong on each rank
            reason = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
        # torch says of a full disk that a position was unexpected.
        return f"{reason}{space_left(self.folder)}"

    def _lost(self, path: Path, reason: str, wait: bool) -> None:
        if self.ranks.first:
            shutil.rmtree(_partial(path), ignore_errors=True)
        message = f"checkpoint {path.name} not written: {reason or 'another rank failed'}"
        if wait:
            raise SaveError(message)
        self.log(message)

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


def _partial(path: Path) -> Path:
    """The name of a checkpoint while it is written."""
    return path.with_name(f"{path.name}.partial")


def _state(student: Student, average: Average, optimizer: Optimizer, critic: Critic | None) -> dict[str, Any]:
    begin_state(optimizer)
    extra = {} if critic is None else {"critic": critic.state()}
    return {
        **extra,
        "model": get_model_state_dict(student),
        "average": dict(average.values),
        "optimizer": get_optimizer_state_dict(student, optimizer),
    }
