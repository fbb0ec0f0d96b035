"""Processes that train together: how they find each other, share the network, and add up numbers.

One process is a group of one, so that nothing else in training asks how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model.blocks import Block
from training.student import Student


@dataclass(frozen=True)
class Ranks:
    """rank of world processes, on one device each.

    saving: their group for checkpoints, which threads use. sharded: parameters are cut over the ranks (FSDP2). half:
    blocks compute in bfloat16.
    """

    rank: int
    world: int
    device: torch.device
    saving: dist.ProcessGroup
    sharded: bool
    half: bool

    @property
    def first(self) -> bool:
        """Whether this process writes logs."""
        return self.rank == 0

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Numbers added up over all ranks; every rank gives the same names."""
        if self.world == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return dict(zip(values, numbers.tolist(), strict=True))

    def most(self, value: int) -> int:
        """The largest of an integer over all ranks."""
        if self.world == 1:
            return value
        number = torch.tensor(value, device=self.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks in the order of the samples: row i of rank r is sample i * world + r. No gradient.

        rows: [n, ...]; ranks may differ by one in n.
        """
        if self.world == 1:
            return rows
        longest = self.most(len(rows))
        counts: list[Tensor] = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor(len(rows), device=self.device))
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded.contiguous())
        total = sum(int(count) for count in counts)
        return torch.stack(parts, 1).flatten(0, 1)[:total]


@contextmanager
def joined(*, shard: bool = False) -> Iterator[Ranks]:
    """Join the group of torchrun, or be one of one; leave it at the end.

    shard: cut parameters over ranks even where there is one.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    mine = not dist.is_initialized()
    if mine and dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    elif mine:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        # A checkpoint is written in a thread beside the steps: with one group their messages would cross.
        saving = dist.new_group(backend="gloo")
        world = dist.get_world_size()
        yield Ranks(dist.get_rank(), world, device, saving, sharded=shard or world > 1, half=cuda)
    finally:
        if mine:
            dist.destroy_process_group()


def spread(student: Student, ranks: Ranks) -> Student:
    """The student on its device; where that is wanted, parameters are cut over the ranks (FSDP2), a block at a time.

    With `half` the blocks compute in bfloat16 and gradients are summed in float32; without, everything is float32.
    """
    student.to(ranks.device)
    if not ranks.sharded:
        return student
    mesh = DeviceMesh(ranks.device.type, list(range(ranks.world)))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if ranks.half
        else MixedPrecisionPolicy(cast_forward_inputs=False)
    )
    net = student.net
    for block in (*net.encoder.blocks, *net.decoder.blocks):
        if isinstance(block, Block):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    return student


def local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds; all of it if it is not cut."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name."""
    return dict(module.named_parameters())
