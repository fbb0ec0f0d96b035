"""Samples of a study: from shards where there are some, drawn where there are none; few ones held; pieces of assets."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from media.types import Voxels
from training.batches import Kind, Sample, Source
from training.shard_source import MODALITY
from training.stages import Stage


def lacking(stage: Stage, modalities: Sequence[str]) -> list[str]:
    """Modalities that a stage draws and that are not among those given."""
    kinds: list[Kind] = [*stage.cycle, *(["distill"] if stage.distill else [])]  # type: ignore[list-item]
    return [name for name in dict.fromkeys(MODALITY[kind] for kind in kinds) if name not in modalities]


def only(stage: Stage, modalities: Sequence[str]) -> Stage | None:
    """What a stage draws of some modalities alone, or None if that is nothing."""
    cycle = tuple(task for task in stage.cycle if MODALITY[task] in modalities)
    return replace(stage, cycle=cycle, distill=stage.distill if "images" in modalities else 0) if cycle else None


class Filled:
    """A Source of some modalities, and another one for the rest."""

    def __init__(self, source: Source, modalities: Sequence[str], rest: Source) -> None:
        self._source, self._modalities, self._rest = source, modalities, rest

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source."""
        return self._of(kind).draw(kind, numbers)

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """See Source."""
        self._of(kind).ahead(kind, numbers)

    def left_out(self) -> int:
        """See Source."""
        return self._source.left_out() + self._rest.left_out()

    def order(self) -> dict[str, str]:
        """See Source."""
        return self._source.order() | self._rest.order()

    def close(self) -> None:
        """See Source."""
        self._source.close()
        self._rest.close()

    def _of(self, kind: Kind) -> Source:
        return self._source if MODALITY[kind] in self._modalities else self._rest


class Pieces:
    """A Source whose assets of more than `most` voxels are cut to the `most` that are next to a random one."""

    def __init__(self, source: Source, most: int) -> None:
        self._source, self._most = source, most

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source."""
        samples = self._source.draw(kind, numbers)
        return [self._cut(sample, number) for sample, number in zip(samples, numbers, strict=True)]

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """See Source."""
        self._source.ahead(kind, numbers)

    def left_out(self) -> int:
        """See Source."""
        return self._source.left_out()

    def order(self) -> dict[str, str]:
        """See Source."""
        return {**self._source.order(), "pieces": f"of {self._most} voxels"}

    def close(self) -> None:
        """See Source."""
        self._source.close()

    def _cut(self, sample: Sample, number: int) -> Sample:
        item = sample.item
        if not isinstance(item, Voxels) or len(item.coords) <= self._most:
            return sample
        centre = item.coords[int(np.random.default_rng(number).integers(len(item.coords)))]
        away = np.abs(item.coords - centre).max(1)
        kept = np.sort(np.argsort(away, kind="stable")[: self._most])
        return replace(sample, item=Voxels(coords=item.coords[kept], feats=item.feats[kept]))


class Held:
    """`count` samples of each kind, made when they are first wanted and then kept: each is decoded once."""

    def __init__(self, source: Source, count: int) -> None:
        self.count = count
        self._source = source
        self._kept: dict[tuple[Kind, int], Sample] = {}

    def take(self, kind: Kind, indices: Sequence[int]) -> list[Sample]:
        """Samples by their place among the held ones."""
        new = [index for index in dict.fromkeys(indices) if (kind, index) not in self._kept]
        for index, sample in zip(new, self._source.draw(kind, new), strict=True):
            self._kept[kind, index] = sample
        return [self._kept[kind, index] for index in indices]

    def left_out(self) -> int:
        """Of the source that they come from, once for all who take them."""
        return self._source.left_out()

    def order(self) -> dict[str, str]:
        """Of the source that they come from, and how many."""
        return {**self._source.order(), "held": f"{self.count} of a kind"}

    def close(self) -> None:
        """No more is taken."""
        self._source.close()
        self._kept.clear()


class Ordered:
    """A Source over held samples: over and over, each time in another order, which the seed gives.

    seed: None for the order in which they are held. Closing it leaves them held.
    """

    def __init__(self, held: Held, seed: int | None) -> None:
        self._held, self._seed = held, seed
        self._orders: dict[tuple[Kind, int], list[int]] = {}

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source."""
        return self._held.take(kind, [self._place(kind, number) for number in numbers])

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """See Source. They are taken when they are asked for."""

    def left_out(self) -> int:
        """See Source."""
        return self._held.left_out()

    def order(self) -> dict[str, str]:
        """See Source."""
        return self._held.order()

    def close(self) -> None:
        """See Source."""
        self._orders.clear()

    def _place(self, kind: Kind, number: int) -> int:
        turn, index = divmod(number, self._held.count)
        if self._seed is None:
            return index
        if (kind, turn) not in self._orders:
            rng = np.random.default_rng([self._seed, zlib.crc32(kind.encode()), turn])
            self._orders[kind, turn] = rng.permutation(self._held.count).tolist()
        return self._orders[kind, turn][index]
