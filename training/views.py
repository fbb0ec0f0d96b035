"""What the semantic part of the bundled models learns from: augmented pictures, clips and voxel sets, once through the
image teacher and then kept, since the teacher costs more than the student.

S = 192 pixels a side of a picture.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from media.types import UInt8Array
from training.data import LANCZOS, Library, over_something
from training.packaged import ImageTeacher

SIDE = 192
CHUNK = 16
GROUNDS = (0.5, 0.15)
"""How often a cut-out stands on white, and on a colour: it is shown so more often than it is cropped."""


@dataclass(frozen=True)
class Views:
    """pictures: uint8 [N, S, S, 3]; features: float16 [N, 1280]; of parts, cells: float16 [N, 1280, S / 32, S / 32] and
    maps: float16 [N, 112, S / 16, S / 16].
    """

    pictures: Tensor
    features: Tensor
    cells: Tensor
    maps: Tensor

    def __len__(self) -> int:
        return len(self.pictures)


def cached_views(library: Library, teacher: Callable[[], ImageTeacher], count: int, seed: int, cache: Path) -> Views:
    """`count` views of the library's pictures through the teacher, from the file `cache` if it is there."""
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        views = draw_views(library, teacher(), count, seed)
        partial = cache.with_suffix(".partial")
        torch.save(vars(views), partial)
        os.replace(partial, cache)
    kept = torch.load(cache, weights_only=True, mmap=True)
    if missing := {field.name for field in fields(Views)} - set(kept):
        raise ValueError(f"{cache} is of an earlier version, without {', '.join(sorted(missing))}; remove it")
    if len(kept["pictures"]) != count:
        raise ValueError(f"{cache} holds {len(kept['pictures'])} views, not {count}; remove it to draw them anew")
    return Views(**kept)


def draw_views(library: Library, teacher: ImageTeacher, count: int, seed: int) -> Views:
    """`count` augmented views and what the teacher says of them."""
    rng = np.random.default_rng(seed)
    views: dict[str, Tensor] = {}
    for first in range(0, count, CHUNK):
        pictures = torch.from_numpy(np.stack([random_view(rng, library) for _ in range(min(CHUNK, count - first))]))
        seen = teacher(pictures)
        said = {"features": seen.features, "cells": seen.cells, "maps": seen.maps}
        for name, part in {"pictures": pictures, **{name: part.half() for name, part in said.items()}}.items():
            if name not in views:  # gigabytes: their place is made once, not joined from parts at the end
                views[name] = torch.empty(count, *part.shape[1:], dtype=part.dtype)
            views[name][first : first + len(part)] = part
    return Views(**views)


def random_view(rng: np.random.Generator, library: Library, side: int = SIDE) -> UInt8Array:
    """One picture as a person may show it: whole on white, or a part; now and then blurred or of other colours."""
    picture = library.pictures[rng.integers(len(library.pictures))]
    kind = rng.random()
    if kind < 0.35:
        pixels = _whole(rng, library, picture, side)
    else:
        pixels = _part(rng, library, picture, side, least=0.35 if kind < 0.75 else 0.1)
    if rng.random() < 0.3:
        pixels = _blurred(rng, pixels)
    if rng.random() < 0.6:
        pixels = _recoloured(rng, pixels)
    return np.ascontiguousarray(pixels)


def _whole(rng: np.random.Generator, library: Library, picture: PIL.Image.Image, side: int) -> UInt8Array:
    """All of it, somewhere on a white square."""
    scale = side / max(picture.size) * rng.uniform(0.6, 1.0)
    width = min(side, max(8, round(picture.width * scale)))
    height = min(side, max(8, round(picture.height * scale * np.exp(rng.uniform(-0.15, 0.15)))))
    small = picture.resize((width, height), LANCZOS, reducing_gap=3.0)
    ground = PIL.Image.new("RGB", (side, side), (255, 255, 255))
    place = (int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1)))
    ground.paste(over_something(rng, library, small, *GROUNDS), place)
    return np.asarray(ground)


def _part(rng: np.random.Generator, library: Library, picture: PIL.Image.Image, side: int, least: float) -> UInt8Array:
    """A window of at least a share of the area, made square."""
    area = picture.width * picture.height * rng.uniform(least, 1.0)
    ratio = np.exp(rng.uniform(-0.3, 0.3))
    width, height = min(picture.width, np.sqrt(area * ratio)), min(picture.height, np.sqrt(area / ratio))
    x, y = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    crop = picture.resize((side, side), LANCZOS, box=(x, y, x + width, y + height), reducing_gap=3.0)
    return np.asarray(over_something(rng, library, crop, *GROUNDS))


def _blurred(rng: np.random.Generator, pixels: UInt8Array) -> UInt8Array:
    """As a small picture that was enlarged."""
    small = int(rng.choice([48, 64, 96]))
    box, bicubic = PIL.Image.Resampling.BOX, PIL.Image.Resampling.BICUBIC
    picture = PIL.Image.fromarray(pixels)
    return np.asarray(picture.resize((small, small), box).resize(picture.size, bicubic))


def _recoloured(rng: np.random.Generator, pixels: UInt8Array) -> UInt8Array:
    levels = pixels.astype(np.float32)
    grey = levels.mean(-1, keepdims=True)
    saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.6, 1.4)
    levels = grey + (levels - grey) * np.float32(saturation)
    levels = (levels - 128) * np.float32(rng.uniform(0.7, 1.3)) + 128 + np.float32(rng.uniform(-30, 30))
    return (levels + 0.5).clip(0, 255).astype(np.uint8)
