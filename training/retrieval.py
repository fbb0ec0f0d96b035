"""What embeddings are good for: classes from words, search in both directions, neighbours. N items, C channels.

Every figure comes with its number of items and the 95 % interval of a share (Wilson).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """`right` of `count`."""

    right: int
    count: int

    @property
    def value(self) -> float:
        """0..1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval, 0..1."""
        z, n, p = 1.959964, self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % ({100 * low:.1f} to {100 * high:.1f}, n = {self.count})"


def _labels(labels: Sequence[int], count: int, classes: int, what: str) -> Tensor:
    """As a tensor; of the wrong number one label would be taken for all."""
    if len(labels) != count or count == 0:
        raise ValueError(f"{len(labels)} {what} for {count} items; wanted one each, of at least one item")
    if min(labels) < 0 or max(labels) >= classes:
        raise ValueError(f"{what} from {min(labels)} to {max(labels)}; wanted 0 to {classes - 1}")
    return torch.tensor(list(labels))


def _unit(rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise ValueError("embeddings that are not finite have no neighbours")
    return F.normalize(rows.float(), dim=-1).cpu()


def _nearest(asked: Tensor, known: Tensor, k: int) -> Tensor:
    """Rows of `known` by cosine, nearest first, int64 [N, k or all]; in pieces, for ImageNet has 6e10 pairs."""
    if k < 1:
        raise ValueError(f"k is {k}; wanted 1 or more")
    known = _unit(known)
    parts = [(rows @ known.T).topk(min(k, len(known)), dim=1).indices for rows in _unit(asked).split(256)]
    return torch.cat(parts)


def class_embeddings(names: Sequence[str], prompts: Sequence[str], embed: Callable[[list[str]], Tensor]) -> Tensor:
    """One embedding a class, [K, C]: the mean over prompts of unit vectors, made a unit vector again."""
    texts = ([prompt.replace("{}", name) for prompt in prompts] for name in names)
    rows = [F.normalize(embed(said).float(), dim=-1).mean(0) for said in texts]
    return F.normalize(torch.stack(rows), dim=-1)


def zero_shot(images: Tensor, classes: Tensor, labels: Sequence[int], k: int = 1) -> Share:
    """How many images have their class among the k nearest. images: [N, C]; classes: [K, C]; labels: N of 0..K-1."""
    wanted = _labels(labels, len(images), len(classes), "labels")
    right = (_nearest(images, classes, k) == wanted[:, None]).any(1)
    return Share(int(right.sum()), len(right))


def retrieval(images: Tensor, texts: Tensor, owners: Sequence[int], k: int) -> tuple[Share, Share]:
    """Recall at k from texts to images, and from images to any of their texts.

    images: [N, C]; texts: [T, C]; owners: the image of each text, so that an image may have several.
    """
    owner = _labels(owners, len(texts), len(images), "owners")
    to_images = (_nearest(texts, images, k) == owner[:, None]).any(1)
    nearest = owner[_nearest(images, texts, k)]
    to_texts = (nearest == torch.arange(len(images))[:, None]).any(1)
    return Share(int(to_images.sum()), len(to_images)), Share(int(to_texts.sum()), len(to_texts))


def neighbours(known: Tensor, labels: Sequence[int], asked: Tensor, wanted: Sequence[int], k: int = 5) -> Share:
    """Accuracy of the majority of the k nearest by cosine; of equal counts the class of the nearest wins."""
    classes = max([*labels, *wanted], default=0) + 1
    near = _labels(labels, len(known), classes, "labels")[_nearest(asked, known, k)]  # [M, k], nearest first
    votes = (near[:, :, None] == near[:, None, :]).sum(2)
    chosen = near.gather(1, votes.argmax(1, keepdim=True))[:, 0]  # argmax gives the first of equals
    right = chosen == _labels(wanted, len(asked), classes, "wanted labels")
    return Share(int(right.sum()), len(right))
