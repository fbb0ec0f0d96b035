"""One stage of the curriculum: every step a distillation pass and the task of the cycle, summed before the optimiser.

Source: facts-training 1 to 3. What the paper leaves open is decided in docs/decisions.md.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.averages import Average
from training.batches import Kind, Micro, Source, micro_batches, moved, share
from training.objective import (
    Pictures,
    Terms,
    Texts,
    distillation_term,
    perceptual_terms,
    pictures_of,
    reconstruction_terms,
    sigmoid_term,
    total,
)
from training.optimizer import learning_rate, optimizer_of, set_rate
from training.patchgan import Critic
from training.ranks import Ranks, spread
from training.run_folder import RunFolder
from training.snapshots import Snapshots
from training.stages import Recipe, Stage, Task
from training.stopping import terminated
from training.student import Student
from training.teachers import Teachers

Tokenize = Callable[[Sequence[str]], Tensor]
"""Captions to token ids, int64 [B, 64]."""


class NotFiniteError(FloatingPointError):
    """A loss or gradient is not a number: nothing was changed by the step, the last checkpoint is whole."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What a sitting does beside the steps. Every so many steps: log a line, save, look; 0 for never."""

    log_every: int = 50
    save_every: int = 1000
    look_every: int = 5000


@dataclass
class Progress:
    """Where a stage stands. drawn: samples taken so far, of each kind."""

    step: int = 0
    drawn: dict[str, int] = field(default_factory=dict)

    def take(self, kind: Kind, count: int) -> int:
        """Number of the first of the next `count` samples."""
        first = self.drawn.get(kind, 0)
        self.drawn[kind] = first + count
        return first


class StageTrainer:
    """A stage in progress."""

    def __init__(
        self,
        recipe: Recipe,
        stage: Stage,
        student: Student,
        teachers: Teachers,
        source: Source,
        tokenize: Tokenize,
        ranks: Ranks,
    ) -> None:
        self.recipe = recipe
        self.stage = stage
        self.model = student.net.config
        self.student = spread(student.train(), ranks)
        self.teachers = teachers
        self.source = source
        self.tokenize = tokenize
        self.ranks = ranks
        self.optimizer = optimizer_of(self.student, recipe.optim)
        self.average = Average(self.student, recipe.optim.ema)
        self.critic = Critic(ranks, recipe.seed) if recipe.weights.adversarial else None
        self._judged: Pictures | None = None
        self.progress = Progress()

    def run(
        self,
        snapshots: Snapshots,
        folder: RunFolder | None = None,
        habits: Habits | None = None,
        log: Callable[[str], None] = print,
        stop_at: int | None = None,
        look: Callable[[int], object] | None = None,
    ) -> bool:
        """Steps until the stage ends, step `stop_at`, or SIGTERM; saves at the end. Returns whether it is done.

        look: called on all ranks with the number of steps done, every `look_every` steps but the last.
        """
        habits = habits or Habits()
        last = self.stage.steps if stop_at is None else min(stop_at, self.stage.steps)
        since: dict[str, list[float]] = {}
        try:
            with terminated() as asked:
                while self.progress.step < last:
                    for name, value in self.train_step().items():
                        since.setdefault(name, []).append(value)
                    step = self.progress.step
                    if folder and habits.log_every and (step % habits.log_every == 0 or step in (1, last)):
                        # Means since the last line: with a line for every 50 steps, no task of the cycle is left out.
                        values = {name: sum(parts) / len(parts) for name, parts in since.items()}
                        log(folder.metrics(self.stage.name, step, self.stage.steps, values))
                        since = {}
                    snapshots.poll()
                    if habits.save_every and step % habits.save_every == 0:
                        self._save(snapshots, wait=False)
                    if look and habits.look_every and step % habits.look_every == 0 and step < self.stage.steps:
                        look(step)
                    if self.ranks.most(int(asked())):
                        log(f"told to stop: saving step {step}")
                        break
            self._save(snapshots, wait=True)
        finally:
            snapshots.settle()  # of a run that ends by an error the last checkpoint is written to its end
        return self.progress.step >= self.stage.steps

    def restore(self, snapshots: Snapshots) -> None:
        """Go on where the last whole checkpoint was written."""
        values = snapshots.load(self.student, self.average, self.optimizer, self.critic)
        wanted = {"recipe": self.recipe.to_json(), "stage": self.stage.name}
        for name, value in wanted.items():
            if values[name] != _plain(value):
                raise ValueError(
                    f"{snapshots.newest()} is of another {name}; wanted the {name} that this run was begun with"
                )
        self.progress = Progress(step=int(values["step"]), drawn=dict(values["drawn"]))

    def train_step(self) -> dict[str, float]:
        """One step of the optimiser. Returns unweighted terms, the total, norm and rate.

        Raises NotFiniteError before the optimiser moves anything.
        """
        step, stage = self.progress.step, self.stage
        set_rate(self.optimizer, learning_rate(self.recipe.optim, step, stage.steps))
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        tokens = 0
        if stage.distill:
            tokens += self._task_pass("distill", stage.distill, sums)
        task = stage.task(step)
        tokens += self._task_pass(task, stage.batch[task], sums)
        norm = self._clip()
        values = self.ranks.sums({**sums, "tokens": float(tokens)})
        if not all(math.isfinite(value) for value in (*values.values(), norm)):
            raise NotFiniteError(f"stage {stage.name}, step {step}: {values}, gradient norm {norm}")
        self.optimizer.step()
        if self.critic is not None and task == "image_rec":
            self.critic.step()
        self.average.update(step)
        self.progress.step += 1
        return {**values, "norm": norm, "lr": float(self.optimizer.param_groups[0]["lr"])}

    def _task_pass(self, kind: Task | Kind, count: int, sums: dict[str, float]) -> int:
        """Forward and backward of all samples of one task of this step; returns the tokens of this rank."""
        first = self.progress.take(kind, count)
        numbers = share(first, count, self.ranks.rank, self.ranks.world)
        if not numbers:
            raise ValueError(f"{count} samples of {kind} for {self.ranks.world} processes; wanted one for each")
        samples = self.source.draw(kind, numbers)
        self._announce(kind)
        texts = self._texts([sample.caption for sample in samples]) if kind in ("distill", *_CAPTIONED) else None
        micros = list(micro_batches(samples, numbers, self.model, self.recipe.tokens))
        # Ranks must make equally many passes, since parameters are gathered in each: the last is repeated for nothing.
        passes = self.ranks.most(len(micros))
        done = 0
        for index in range(passes):
            micro = micros[min(index, len(micros) - 1)]
            terms = self._terms(kind, micro, texts, first, count)
            # FSDP takes the mean over ranks; terms are shares of the whole step already, so they are summed.
            loss = total(terms, self.recipe.weights) * self.ranks.world * (index < len(micros))
            loss.backward()
            judged, self._judged = self._judged, None
            if self.critic is not None and judged is not None and index < len(micros):
                for name, value in self.critic.learn(judged.given, judged.seen, count).items():
                    sums[name] = sums.get(name, 0.0) + value
            if index < len(micros):
                done += len(micro.packed)
                for name, term in {**terms, "loss": loss / self.ranks.world}.items():
                    label = name if name == "loss" or kind == "distill" else f"{kind}/{name}"
                    sums[label] = sums.get(label, 0.0) + float(term.detach())
        return done

    def _announce(self, kind: Task | Kind) -> None:
        """Tell the source what the next step draws in the place of `kind`."""
        if self.progress.step + 1 >= self.stage.steps:
            return
        after = kind if kind == "distill" else self.stage.task(self.progress.step + 1)
        count = self.stage.distill if after == "distill" else self.stage.batch[after]
        self.source.ahead(after, share(self.progress.drawn.get(after, 0), count, self.ranks.rank, self.ranks.world))

    def _terms(self, kind: str, micro: Micro, texts: Texts | None, first: int, count: int) -> Terms:
        device = self.ranks.device
        packed = moved(micro.packed, device)
        decode = kind.endswith("_rec")
        noise = self._noise(kind, micro).to(device) if decode and self.model.bottleneck == "gaussian" else None
        with torch.autocast(device.type, torch.bfloat16, enabled=self.ranks.half):
            outputs = self.student(packed, micro.items, noise, decode=decode, embed=not decode)
        if decode:
            terms = reconstruction_terms(outputs, micro, packed.feats, self.model, count)
            if kind == "image_rec":
                pictures = pictures_of(outputs, packed, packed.feats, self.model)
                terms |= perceptual_terms(pictures, self.teachers, self.recipe.weights, count)
                if self.critic is not None:
                    terms["adversarial"] = self.critic.judge(pictures.seen).sum() / count
                    self._judged = pictures
            return terms
        assert outputs.embeddings is not None
        assert texts is not None
        if kind == "distill":
            return distillation_term(
                outputs.embeddings, micro, texts, self.teachers, self.recipe.weights.temperature, count
            )
        own = [number - first for number in micro.numbers]
        return sigmoid_term(outputs.embeddings, own, texts, count)

    def _noise(self, kind: str, micro: Micro) -> Tensor:
        """Standard normal noise [N, L] that depends on the seed and the sample alone, not on who computes it."""
        rows = []
        for number, start, stop in zip(micro.numbers, micro.items, micro.items[1:], strict=False):
            seed = hash_of(self.recipe.seed, self.stage.name, kind, number)
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(stop - start, self.model.latent_channels, generator=generator))
        return torch.cat(rows)

    def _texts(self, captions: Sequence[str]) -> Texts:
        ids = self.ranks.gather(self.tokenize(captions).to(self.ranks.device))
        with torch.no_grad():
            return Texts(embeddings=self.teachers.text(ids), ids=ids)

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.recipe.optim.clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _save(self, snapshots: Snapshots, *, wait: bool) -> None:
        progress = {
            "recipe": self.recipe.to_json(),
            "stage": self.stage.name,
            "step": self.progress.step,
            "drawn": self.progress.drawn,
        }
        snapshots.save(self.progress.step, self.student, self.average, self.optimizer, progress, self.critic, wait=wait)
        if wait:
            snapshots.finish(wait=True)


_CAPTIONED: tuple[Task, ...] = ("video_sem", "asset_sem")


def hash_of(*parts: Any) -> int:
    """A seed from values, the same on every machine."""
    return zlib.crc32(repr(parts).encode())


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))
