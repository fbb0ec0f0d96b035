"""The training loop of a stage: batch, forward, loss, step, average; nothing else.

Several processes (torchrun) draw batches of their own and take the mean of their gradients.

N tokens, L latent channels.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from model.network import ATokenNet
from model.packed import PackedTokens
from training.checkpoint import Checkpoint, save_checkpoint
from training.config import OptimConfig, TrainConfig
from training.data import Library, training_batch
from training.distill import Distillation
from training.linear_fit import decoder_input
from training.losses import Losses, combine, gaussian_kl, reconstruction
from training.optimizers import Optimizers
from training.run_folder import append_line, space_left
from training.snapshots import SaveError
from training.stopping import terminated

EDGES = ("input_layer", "out_layer", "proj.", "position_embedding")
"""Names of the layers that touch pixels or latents, or say where a token stands."""


@dataclass(frozen=True)
class Limits:
    """When a sitting stops and what it leaves. minutes: of the whole run, over all sittings; None for no limit.

    save_every_s: seconds between checkpoints. log_every: steps between log lines.
    """

    minutes: float | None = None
    save_every_s: float = 120.0
    log_every: int = 50


NOTHING = Losses(*[torch.zeros(())] * len(fields(Losses)))
"""The losses of a step without a reconstruction."""


class Trainer:
    """A run in progress: network, averaged network, optimiser and place in the schedule."""

    def __init__(
        self, config: TrainConfig, net: ATokenNet, library: Library, distillation: Distillation | None = None
    ) -> None:
        self.config = config
        self.net = net.train().requires_grad_(True)
        self.library = library
        self.distillation = distillation
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.step = 0
        self.elapsed_s = 0.0
        self.said: dict[str, float] = {}
        self.told_to_stop = False
        if not config.train_encoder:
            _freeze_way_in(net)
        if net.linear_path is not None:
            net.linear_path.requires_grad_(False)
        if distillation is None:
            # The pooling head gets no gradient from a reconstruction.
            net.encoder.head.requires_grad_(False)
        if self.world > 1:
            for value in (*net.parameters(), *(distillation.parameters() if distillation else ())):
                dist.broadcast(value.data, 0)
        self.optimizer = _optimizer(net, config.optim, distillation)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)

    def restore(self, state: Checkpoint) -> None:
        """Go on where a checkpoint was written."""
        self.net.load_state_dict(state.model)
        self.ema.load_state_dict(state.ema)
        self.optimizer.load_state_dict(state.optimizer)
        if self.distillation is not None:
            self.distillation.load_state_dict(state.distillation)
        self.step, self.elapsed_s = state.step, state.elapsed_s

    def state(self) -> Checkpoint:
        """What restore needs."""
        return Checkpoint(
            config=self.config,
            step=self.step,
            elapsed_s=self.elapsed_s,
            model=self.net.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            distillation={} if self.distillation is None else self.distillation.state_dict(),
        )

    def run(
        self, folder: Path, limits: Limits, log: Callable[[str], None] = print, stop_at: int | None = None
    ) -> list[float]:
        """Train to the end of the schedule, the time limit, step `stop_at`, or SIGTERM (told_to_stop is then true).

        Returns the losses of this sitting. Leaves a checkpoint in the folder and a line for every `log_every` steps in
        its log.jsonl. A checkpoint that cannot be written is logged, and SaveError if it is the last.
        """
        folder.mkdir(parents=True, exist_ok=True)
        losses: list[float] = []
        saved_s = self.elapsed_s
        last = self.config.steps if stop_at is None else min(stop_at, self.config.steps)
        with terminated() as asked:
            while self.step < last and self._progress(limits) < 1 and not self.told_to_stop:
                started = time.perf_counter()
                result = self.train_step(self._progress(limits))
                self.elapsed_s += time.perf_counter() - started
                losses.append(float(result.total.detach()))
                terms = {"loss": losses[-1], **self.said}
                if broken := {name: value for name, value in terms.items() if not math.isfinite(value)}:
                    raise FloatingPointError(f"{broken} at step {self.step}: the run is broken, nothing is saved")
                if self.step % limits.log_every == 0 and self.rank == 0:
                    line = self._line(result, losses[-limits.log_every :])
                    log(line)
                    try:
                        append_line(folder / "log.jsonl", line + "\n")
                    except OSError as error:  # a full disk costs a line, not the run
                        log(f"not in log.jsonl: {error}{space_left(folder)}")
                if self.elapsed_s - saved_s > limits.save_every_s:
                    try:
                        self._save(folder)
                    except SaveError as error:  # costs this checkpoint, not the run
                        log(str(error))
                    saved_s = self.elapsed_s
                self.told_to_stop = self._any(asked())
        self._save(folder)
        return losses

    def _save(self, folder: Path) -> None:
        if self.rank == 0:
            save_checkpoint(folder, self.state())

    def _any(self, value: bool) -> bool:
        """Whether it is true of any process: all must end at the same step."""
        if self.world == 1:
            return value
        agreed = torch.tensor(int(value))
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return bool(agreed)

    def train_step(self, progress: float) -> Losses:
        """One step. progress: 0 to 1, place in the cosine. The batch and the noise depend on (seed, step) alone."""
        number = self.step * self.world + self.rank
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * learning_rate(self.config.optim, self.step, progress)
        losses = NOTHING
        if self.config.data.anything:
            packed = training_batch(self.config.seed, number, self.library, self.config.data, self.net.config)
            noise = torch.Generator().manual_seed(self.config.seed * 1_000_003 + number)
            losses = self.losses(packed, noise)
            losses.total.backward()
        self.said = {}
        if self.distillation is not None:
            # Apart from the reconstruction, so that only one of the two graphs is in memory.
            semantic, self.said = self.distillation.loss(self.net, np.random.default_rng([self.config.seed, 1, number]))
            semantic.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.net.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return losses

    def losses(self, packed: PackedTokens, noise: torch.Generator) -> Losses:
        """Encode, draw from the posterior (or quantise), decode, compare."""
        kl = torch.zeros(())
        with torch.set_grad_enabled(self.config.train_encoder):
            if self.net.config.bottleneck == "gaussian":
                mean, logvar = self.net.posterior(self.net.encode(packed), packed)
                latents = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=noise)
                kl = gaussian_kl(mean, logvar)
            else:
                latents = decoder_input(self.net, packed)
        decoded = self.net.decode(packed.with_feats(latents))
        l1, log_mse = reconstruction(decoded, packed, self.net.config, self.config.loss.log_floor)
        return combine(l1, log_mse, kl, self.config.loss)

    def _progress(self, limits: Limits) -> float:
        spent = 0.0 if limits.minutes is None else self.elapsed_s / (60 * limits.minutes)
        progress = max(self.step / self.config.steps, spent)
        if self.world == 1:
            return progress
        # Clocks differ: all processes must stop at the same step.
        agreed = torch.tensor(progress, dtype=torch.float64)
        dist.broadcast(agreed, 0)
        return float(agreed)

    def _average_gradients(self) -> None:
        if self.world == 1:
            return
        gradients = [value.grad for group in self.optimizer.param_groups for value in group["params"]]
        held = [gradient for gradient in gradients if gradient is not None]
        flat = torch.cat([gradient.flatten() for gradient in held])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([gradient.numel() for gradient in held])
        for gradient, part in zip(held, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.optim.ema, self.step / (self.step + 9))
        pairs = zip(self.ema.parameters(), self.net.parameters(), strict=True)
        moving = [(mean, now) for mean, now in pairs if now.requires_grad]
        torch._foreach_lerp_([mean for mean, _ in moving], [now.detach() for _, now in moving], 1 - decay)

    def _line(self, result: Losses, recent: list[float]) -> str:
        reconstruction = {
            "loss": round(sum(recent) / len(recent), 5),
            "l1": round(float(result.l1), 5),
            "log_mse": round(float(result.log_mse), 4),
            "kl": round(float(result.kl), 3),
        }
        return json.dumps(
            {
                "step": self.step,
                "minutes": round(self.elapsed_s / 60, 2),
                **(reconstruction if self.config.data.anything else {}),
                **{name: round(value, 4) for name, value in self.said.items()},
                "lr": self.optimizer.param_groups[0]["lr"],
            }
        )


def learning_rate(config: OptimConfig, step: int, progress: float) -> float:
    """Linear warm-up by step, cosine by progress (0 to 1), down to lr * final."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return config.lr * warm * (config.final + (1 - config.final) * cosine)


def _optimizer(net: ATokenNet, config: OptimConfig, distillation: Distillation | None) -> Optimizers:
    """Groups by how fast they may move (blocks, edges) and whether they decay; the blocks' matrices to Muon."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        edge = any(part in name for part in EDGES)
        # A norm with a row of gains for each head is no matrix.
        matrix = parameter.ndim == 2 and not edge and "norm" not in name
        if matrix and config.matrix_lr:
            matrices.append(parameter)
        else:
            # Matrices of the blocks decay towards the identity of their branch; the solution at the edges must not.
            key = (config.edge_scale if edge else 1.0, config.weight_decay if matrix else 0.0)
            groups.setdefault(key, []).append(parameter)
    if distillation is not None:
        groups.setdefault((1.0, 0.0), []).extend(distillation.parameters())
    parts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()],
            lr=config.lr,
            betas=config.betas,
            fused=True,
        )
    ]
    if matrices:
        group = {"params": matrices, "scale": config.matrix_lr / config.lr}
        parts.append(torch.optim.Muon([group], lr=config.matrix_lr, weight_decay=config.weight_decay))
    return Optimizers(parts)


def _freeze_way_in(net: ATokenNet) -> None:
    net.encoder.requires_grad_(False)
    net.proj.requires_grad_(False)
