"""Items of any kind and size, end to end in one sequence with no padding.

N tokens, B items, W windows. Two levels of segment: blocks attend inside a window (a clip's 16 frames; an image or
a voxel set is one window), pooling attends over the item.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import RangeError, ShapeError


@dataclass(frozen=True)
class Span:
    """One window of one item. start, stop: its rows in the item. rows, columns: largest x and y plus 1."""

    item: int
    start: int
    stop: int
    rows: int
    columns: int

    def __len__(self) -> int:
        return self.stop - self.start


def plan_windows(coords: Tensor, item: int, window: int) -> list[Span]:
    """Split one item along t.

    coords: int [n, 4] on the CPU, t not decreasing; window: latent frames of a window. Window k holds the tokens
    with window * k <= t < window * (k + 1), counted from t = 0 of the item, so that neighbours in a pack have no say.
    Raises RangeError for negative coordinates or a t that goes back.
    """
    if len(coords) == 0:
        return []
    if int(coords.min()) < 0:
        raise RangeError(f"coords down to {int(coords.min())}; wanted 0 or more")
    number = coords[:, 0] // window
    if bool((number.diff() < 0).any()):
        raise RangeError("t goes back from one token to the next; wanted tokens of an item ordered by t")
    edges = [0, *(number.diff().nonzero()[:, 0] + 1).tolist(), len(coords)]
    spans = []
    for start, stop in itertools.pairwise(edges):
        rows, columns = (coords[start:stop, 1:3].amax(0) + 1).tolist()
        spans.append(Span(item=item, start=start, stop=stop, rows=rows, columns=columns))
    return spans


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """What a stack runs on: whole windows of any number of items.

    feats: [N, C]. coords: int32 [N, 4], t x y z with t counted inside the window. starts: W + 1 window starts.
    extents: (rows, columns) of each window. moving: bool [N], True for tokens of clips.
    """

    feats: Tensor
    coords: Tensor
    starts: tuple[int, ...]
    extents: tuple[tuple[int, int], ...]
    moving: Tensor

    def __post_init__(self) -> None:
        """Check the invariants that every stack relies on."""
        n = self.feats.shape[0]
        if self.coords.shape != (n, 4) or self.moving.shape != (n,):
            raise ShapeError(f"{n} rows of feats with coords {tuple(self.coords.shape)}; wanted [{n}, 4]")
        if self.starts[0] != 0 or self.starts[-1] != n or len(self.extents) != len(self.starts) - 1:
            raise ShapeError(f"windows from {self.starts[0]} to {self.starts[-1]}; wanted 0 to {n}")

    def __len__(self) -> int:
        return int(self.feats.shape[0])

    def with_feats(self, feats: Tensor) -> PackedTokens:
        """The same tokens with other features, for the next stack. feats: [N, C']."""
        return PackedTokens(
            feats=feats, coords=self.coords, starts=self.starts, extents=self.extents, moving=self.moving
        )


def pack(
    spans: Sequence[Span], feats: Sequence[Tensor], coords: Sequence[Tensor], moving: Sequence[bool], window: int
) -> PackedTokens:
    """Lay windows end to end.

    feats[i] [len, C] and coords[i] int [len, 4] (t of the item) belong to spans[i]; moving[i] says whether its item
    is a clip. Rows that end early are filled with 0 up to the longest. Everything is on one device.
    """
    width = max(rows.shape[1] for rows in feats)
    local = torch.cat(list(coords)).int()
    local[:, 0] %= window
    lengths = [len(span) for span in spans]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return PackedTokens(
        feats=torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in feats]),
        coords=local,
        starts=tuple(starts),
        extents=tuple((span.rows, span.columns) for span in spans),
        moving=torch.tensor(list(moving)).repeat_interleave(torch.tensor(lengths)).to(local.device),
    )


def chunk_spans(spans: Sequence[Span], budget: int) -> Iterator[list[Span]]:
    """Cut a list of windows into passes of at most `budget` tokens; a window larger than that goes alone."""
    chunk: list[Span] = []
    tokens = 0
    for span in spans:
        if chunk and tokens + len(span) > budget:
            yield chunk
            chunk, tokens = [], 0
        chunk.append(span)
        tokens += len(span)
    if chunk:
        yield chunk
