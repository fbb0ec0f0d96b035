"""What a step works on: numbered samples from a source, packed under a token budget, split over ranks.

A source is an endless list for each kind of sample: sample n of a kind is always the same, whoever asks for it. So a
run is resumed by its counters alone, and any number of processes shares the work without talking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from media.types import Item, Voxels
from model.config import ModelConfig
from model.packed import PackedTokens, pack, plan_windows
from model.patchify import coords_of, layout_of, leading_patches

Kind = Literal["distill", "image_rec", "video_rec", "asset_rec", "video_sem", "asset_sem"]
"""distill: images with captions. *_rec: what is reconstructed. *_sem: clips and assets with captions."""


@dataclass(frozen=True)
class Sample:
    """One item and what is said of it ("" where nothing is)."""

    item: Item
    caption: str = ""


class Source(Protocol):
    """Where samples come from."""

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """The samples with these numbers, in this order."""
        ...

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """Samples that the next draw of this kind asks for: they may be made while the step goes on."""
        ...

    def left_out(self) -> int:
        """Samples so far that could not be used, and that others took the place of."""
        ...

    def order(self) -> dict[str, str]:
        """What the order of samples depends on, in words, by what it is; a run goes on only with the same."""
        ...

    def close(self) -> None:
        """No more is drawn."""
        ...


@dataclass(frozen=True, kw_only=True)
class Micro:
    """One forward pass. packed: its tokens. items: token starts of its items, and the end. numbers: their samples.

    samples: the items themselves and their captions.
    """

    packed: PackedTokens
    items: tuple[int, ...]
    numbers: tuple[int, ...]
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.numbers)


def tokens_of(item: Item, model: ModelConfig) -> int:
    """How long an item is once it is patchified."""
    if isinstance(item, Voxels):
        return len(item.coords)
    t, h, w = layout_of(item, model).grid
    return t * h * w


def pack_samples(samples: Sequence[Sample], numbers: Sequence[int], model: ModelConfig) -> Micro:
    """Whole items end to end, by the functions that serving uses. Raises ValueError for none."""
    if not samples:
        raise ValueError("no sample to pack; wanted at least one")
    spans, feats, coords, moving, items = [], [], [], [], [0]
    for index, sample in enumerate(samples):
        layout = layout_of(sample.item, model)
        places = torch.from_numpy(coords_of(sample.item, layout))
        patches = leading_patches(sample.item, layout, model)
        for span in plan_windows(places, index, model.window):
            spans.append(span)
            feats.append(patches[span.start : span.stop])
            coords.append(places[span.start : span.stop])
            moving.append(sample.item.kind == "video")
        items.append(items[-1] + len(places))
    return Micro(
        packed=pack(spans, feats, coords, moving, model.window),
        items=tuple(items),
        numbers=tuple(numbers),
        samples=tuple(samples),
    )


def micro_batches(
    samples: Sequence[Sample], numbers: Sequence[int], model: ModelConfig, budget: int
) -> Iterator[Micro]:
    """Cut samples into passes of at most `budget` tokens, in order; an item larger than that goes alone."""
    first, tokens = 0, 0
    for index, sample in enumerate(samples):
        length = tokens_of(sample.item, model)
        if index > first and tokens + length > budget:
            yield pack_samples(samples[first:index], numbers[first:index], model)
            first, tokens = index, 0
        tokens += length
    yield pack_samples(samples[first:], numbers[first:], model)


def share(first: int, count: int, rank: int, world: int) -> range:
    """Numbers of one rank out of `count` from `first`: every world-th, so that no two ranks see the same."""
    return range(first + rank, first + count, world)


def moved(packed: PackedTokens, device: torch.device) -> PackedTokens:
    """The same tokens on a device."""
    if packed.feats.device == device:
        return packed
    tensors: dict[str, Tensor] = {
        name: getattr(packed, name).to(device, non_blocking=True) for name in ("feats", "coords", "moving")
    }
    return PackedTokens(starts=packed.starts, extents=packed.extents, **tensors)
