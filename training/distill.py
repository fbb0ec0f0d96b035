"""The semantic part of a step of the bundled models: where the image teacher puts a picture, clip or mesh, and what it
sees at each patch.

B items, C channels of an embedding, T texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from media.types import Image, Item
from model.network import ATokenNet
from model.packed import PackedTokens
from training.config import SemanticConfig
from training.data import pack_items
from training.joint_space import JointSpace
from training.packaged import MAP_CHANNELS, MAP_STRIDE
from training.semantic import distillation_rows, similarities
from training.shown import ShownClips, ShownSets, some_of
from training.views import Views

CELL = 2
"""Patches a side of a cell of the teacher's last map."""

TEXT_SCALE = 20.0
"""Factor of the cosines before the temperature: the space is not SigLIP's, its cosines spread wider."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Everything that the teachers have said. texts: [T, C] in the space, of length 1. views: one or more sets."""

    space: JointSpace
    texts: Tensor
    views: tuple[Views, ...]
    clips: ShownClips | None = None
    sets: ShownSets | None = None

    @cached_property
    def cells(self) -> list[Tensor]:
        """Places of parts of each set of views, float16 [N, C, S / 32, S / 32]; gigabytes to go through, once a run."""
        return [self.space.embed_cells(views.cells) for views in self.views]


class Distillation(nn.Module):
    """Draws what a step looks at and compares. Its layers, from features to the teacher's maps, are not shipped."""

    def __init__(self, config: SemanticConfig, lessons: Lessons, channels: int) -> None:
        super().__init__()
        self.config = config
        self.lessons = lessons
        self.shares = np.array([len(views) for views in lessons.views]) / sum(map(len, lessons.views))
        maps = torch.cat([views.maps[:: max(1, len(views) // 1000)].float() for views in lessons.views])
        self.map_mean = maps.mean((0, 2, 3))[:, None, None]
        self.map_deviation = maps.std((0, 2, 3))[:, None, None] + 1e-3
        self.map_layer = nn.Linear(channels, MAP_CHANNELS)
        self.cell_layer = nn.Linear(CELL**2 * channels, len(lessons.space.axes))
        self.clip_places = lessons.space.embed(lessons.clips.features) if lessons.clips else None
        self.set_places = lessons.space.embed(lessons.sets.features) if lessons.sets else None

    def loss(self, net: ATokenNet, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum, and its terms unweighted."""
        packed, wanted, cells, maps = self._pictures(rng, net)
        features = net.encode(packed)
        embeddings = F.normalize(net.encoder.head(features, list(packed.starts)), dim=1)
        place, texts = self._place(embeddings, wanted), self._texts(embeddings, wanted)
        dense = F.smooth_l1_loss(self.map_layer(features), maps)
        local = self._cells(features, cells)
        total = (
            self.config.place * place
            + self.config.texts * texts
            + self.config.dense * dense
            + self.config.cells * local
        )
        terms = {"place": place, "texts": texts, "dense": dense, "cells": local}
        said = {name: float(term.detach()) for name, term in terms.items()}
        for name, shown in (("clip", self._clips(rng)), ("set", self._sets(rng))):
            if shown is not None:
                items, there = shown
                packed = pack_items(items, net.config)
                found = F.normalize(net.encoder.head(net.encode(packed), list(packed.starts)), dim=1)
                term = self._place(found, there)
                total = total + self.config.place * self.config.other_share * term
                said[name] = float(term.detach())
        return total, said

    def _place(self, embeddings: Tensor, wanted: Tensor) -> Tensor:
        """One less the cosine, mean over items."""
        return 1 - (embeddings * wanted).sum(1).mean()

    def _texts(self, embeddings: Tensor, wanted: Tensor) -> Tensor:
        """The published distillation, over captions and names."""
        given = similarities(embeddings, self.lessons.texts, TEXT_SCALE)
        teacher = similarities(wanted, self.lessons.texts, TEXT_SCALE)
        return distillation_rows(given, teacher).mean()

    def _cells(self, features: Tensor, cells: Tensor) -> Tensor:
        """One less the cosine between 2 x 2 features and where the teacher puts that part, mean over parts."""
        count, _, grid, _ = cells.shape
        blocks = features.view(count, grid, CELL, grid, CELL, -1).transpose(2, 3).flatten(3)
        found = F.normalize(self.cell_layer(blocks), dim=-1)
        return 1 - (found * F.normalize(cells, dim=1).permute(0, 2, 3, 1)).sum(-1).mean()

    def _pictures(self, rng: np.random.Generator, net: ATokenNet) -> tuple[PackedTokens, Tensor, Tensor, Tensor]:
        """Views of one size, packed; places [B, C], of their parts [B, C, G, G]; maps of their patches [N, 112]."""
        side = int(rng.choice(self.config.sides))
        grid = side // MAP_STRIDE
        chosen = int(rng.choice(len(self.shares), p=self.shares))
        views = self.lessons.views[chosen]
        rows = torch.from_numpy(rng.integers(0, len(views), max(1, self.config.tokens // grid**2)))
        pictures = views.pictures[rows].permute(0, 3, 1, 2).float()
        maps, cells = views.maps[rows].float(), self.lessons.cells[chosen][rows].float()
        if rng.random() < self.config.mixed:
            _mix(rng, pictures, maps, cells)
        maps = (F.adaptive_avg_pool2d(maps, grid) - self.map_mean) / self.map_deviation
        places = F.normalize(cells.mean((2, 3)), dim=1)
        cells = F.adaptive_avg_pool2d(cells, grid // CELL)
        if side != pictures.shape[-1]:
            pictures = F.interpolate(pictures, size=(side, side), mode="bilinear", antialias=True)
        mirrored = torch.from_numpy(rng.random(len(rows)) < 0.5)[:, None, None, None]
        pictures = torch.where(mirrored, pictures.flip(3), pictures)
        maps = torch.where(mirrored, maps.flip(3), maps)
        cells = torch.where(mirrored, cells.flip(3), cells)
        levels = pictures.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
        packed = pack_items([Image(pixels=picture) for picture in levels], net.config)
        return packed, places, cells, maps.permute(0, 2, 3, 1).flatten(0, 2)

    def _clips(self, rng: np.random.Generator) -> tuple[list[Item], Tensor] | None:
        clips = self.lessons.clips
        if clips is None or self.clip_places is None or rng.random() >= self.config.clip_chance:
            return None
        number = int(rng.integers(len(clips.frames)))
        return [clips.item(number)], self.clip_places[[number]]

    def _sets(self, rng: np.random.Generator) -> tuple[list[Item], Tensor] | None:
        sets = self.lessons.sets
        if sets is None or self.set_places is None or rng.random() >= self.config.set_chance:
            return None
        number = int(rng.integers(len(sets.voxels)))
        return [some_of(rng, sets.voxels[number], self.config.set_tokens)], self.set_places[[number]]


def _mix(rng: np.random.Generator, pictures: Tensor, *maps: Tensor) -> None:
    """Paste a rectangle of the picture before into each, in place, with what the teacher said of that part.

    What it would say of the mixture differs at the seams. All [B, ., S', S'], in steps of the coarsest map.
    """
    steps = maps[-1].shape[-1]
    height, width = (int(size) for size in rng.integers(steps // 3, steps * 2 // 3 + 1, 2))
    y, x = int(rng.integers(steps - height + 1)), int(rng.integers(steps - width + 1))
    for values in (pictures, *maps):
        scale = values.shape[-1] // steps
        rows, columns = slice(scale * y, scale * (y + height)), slice(scale * x, scale * (x + width))
        values[:, :, rows, columns] = values.roll(1, 0)[:, :, rows, columns]
