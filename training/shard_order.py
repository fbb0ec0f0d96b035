"""Which sample is number n: arithmetic over the numbers of samples of shards, so that nothing has to be remembered.

A lane is one of L parts of an epoch; number n is the next of lane n mod L. Where the number of processes divides L,
each process (which draws every world-th number) reads only its own lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from training.shards import Shard

SLOTS = 1000
"""Turns of a lane after which the mixture of corpora repeats; shares are exact to 1 / SLOTS."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Shards of one origin. weight: its share among the corpora of a modality; None, for all of them: by samples."""

    name: str
    shards: tuple[Shard, ...]
    weight: float | None = None

    @property
    def count(self) -> int:
        """Its samples."""
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Place:
    """Where a sample is."""

    shard: Shard
    index: int


class Mixture:
    """The endless order of some corpora, mixed in fixed shares.

    corpora: their places in the list are part of the seed, their names are not. Raises ValueError for shares that make
    no sense, or no samples.
    """

    def __init__(self, corpora: Sequence[Corpus], seed: Sequence[int], lanes: int) -> None:
        self._lanes = lanes
        weights = [corpus.weight for corpus in corpora if corpus.weight is not None]
        names = ", ".join(corpus.name for corpus in corpora)
        if not weights:
            every = Corpus(name=names, shards=tuple(shard for corpus in corpora for shard in corpus.shards))
            self._orders = [_Order(every, seed, lanes)]
            return
        if len(weights) < len(corpora):
            raise ValueError(f"some of {names} have a weight; wanted one for each, or none")
        counts = _slots(weights, names)
        used = [(index, corpus) for index, corpus in enumerate(corpora) if counts[index]]
        owners = np.repeat(np.arange(len(used)), [counts[index] for index, _ in used])
        self._owners = np.random.default_rng([*seed, 1]).permutation(owners)
        # How many of the slots before each one belong to a corpus.
        self._before = [np.cumsum(np.append(0, self._owners == owner)) for owner in range(len(used))]
        self._orders = [_Order(corpus, [*seed, 2, index], lanes) for index, corpus in used]

    def __len__(self) -> int:
        """Corpora that are read beside each other."""
        return len(self._orders)

    def place(self, number: int) -> Place:
        """Where sample `number` is."""
        if len(self._orders) == 1:
            return self._orders[0].place(number)
        turn, lane = divmod(number, self._lanes)
        # Lanes begin at different slots, so that neighbouring numbers are of different corpora.
        first = lane * SLOTS // self._lanes
        owner = int(self._owners[(first + turn) % SLOTS])
        taken = self._taken(owner, first + turn) - self._taken(owner, first)
        return self._orders[owner].place(taken * self._lanes + lane)

    def _taken(self, owner: int, slot: int) -> int:
        rounds, rest = divmod(slot, SLOTS)
        before = self._before[owner]
        return rounds * int(before[-1]) + int(before[rest])


def _slots(weights: Sequence[float], names: str) -> list[int]:
    """SLOTS shared out by weight, the largest remainders rounded up."""
    whole = sum(weights)
    exact = [weight / whole * SLOTS if 0 < whole < math.inf else -1.0 for weight in weights]
    counts = [math.floor(share) for share in exact]
    for index in sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])[: SLOTS - sum(counts)]:
        counts[index] += 1
    if min(exact) < 0 or any(weight and not count for weight, count in zip(weights, counts, strict=True)):
        raise ValueError(f"weights {list(weights)} of {names}; wanted each 0 or at least 1/{SLOTS} of their sum")
    return counts


class _Order:
    """The endless order of one corpus: an epoch has every sample once.

    It is the shards in random order, one after the other, the samples of each in random order; lanes are equal parts.
    """

    def __init__(self, corpus: Corpus, seed: Sequence[int], lanes: int) -> None:
        self._shards = [shard for shard in corpus.shards if shard.count]
        self._total = corpus.count
        if not self._total:
            raise ValueError(f"no samples in {corpus.name}")
        self._seed = list(seed)
        self._lanes = lanes
        self._epoch = lru_cache(maxsize=8)(self._order_of_shards)
        self._inside = lru_cache(maxsize=256)(self._order_inside)

    def place(self, number: int) -> Place:
        epoch, rest = divmod(number, self._total)
        turn, lane = divmod(rest, self._lanes)
        each, longer = divmod(self._total, self._lanes)
        at = lane * each + min(lane, longer) + turn
        order, ends = self._epoch(epoch)
        rank = int(np.searchsorted(ends, at, side="right"))
        index = int(order[rank])
        shard = self._shards[index]
        first = int(ends[rank]) - shard.count
        return Place(shard, int(self._inside(epoch, index)[at - first]))

    def _order_of_shards(self, epoch: int) -> tuple[Indices, Indices]:
        """Shards in the order of an epoch, and the positions at which they end."""
        order = np.random.default_rng([*self._seed, epoch]).permutation(len(self._shards))
        return order, np.cumsum([self._shards[index].count for index in order])

    def _order_inside(self, epoch: int, index: int) -> Indices:
        return np.random.default_rng([*self._seed, epoch, index]).permutation(self._shards[index].count)
