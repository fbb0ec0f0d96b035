"""The space in which the bundled models say what they see: directions of the image teacher's features, and words in it.

Pictures: features less their mean, along their C main directions, half whitened, of length 1. Words: a linear map from
the sentence teacher's vectors, fitted to captions of training pictures and to the classifier's names. C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.words import WordTable

WHITENING = 0.5
RIDGE = 3.0


@dataclass(frozen=True)
class JointSpace:
    """mean: [F] of features; axes: [C, F]."""

    mean: Tensor
    axes: Tensor

    @classmethod
    def fit(cls, features: Tensor, channels: int) -> JointSpace:
        """From features [N, F] of training views."""
        features = features.float()
        mean = features.mean(0)
        left = features - mean
        values, vectors = torch.linalg.eigh(left.T @ left / len(left))
        # Fewer views than channels leave directions that nothing moves along: they must not be blown up.
        scales = values[-channels:].flip(0).clamp(min=1e-4 * float(values[-1])).sqrt()
        return cls(mean, vectors[:, -channels:].flip(1).T / scales[:, None] ** WHITENING)

    @classmethod
    def load(cls, path: Path) -> JointSpace:
        """What save wrote."""
        return cls(**load_file(path))

    def save(self, path: Path) -> None:
        """As safetensors: an encoder that goes on learning needs the space that it began with."""
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in vars(self).items()}, partial)
        partial.replace(path)

    def embed_cells(self, cells: Tensor) -> Tensor:
        """[B, F, H, W] to float16 [B, C, H, W], not of length 1: their mean has the direction of the whole."""
        shift = (self.axes @ self.mean)[:, None, None]
        parts = (torch.einsum("bfhw,cf->bchw", part.float(), self.axes) - shift for part in cells.split(64))
        return torch.cat([part.half() for part in parts])

    def embed(self, features: Tensor) -> Tensor:
        """[B, F] to [B, C] of length 1."""
        return F.normalize((features.float() - self.mean) @ self.axes.T, dim=1)

    def embed_directions(self, rows: Tensor) -> Tensor:
        """The same for weights of a classifier, which are directions and not features: [K, F] to [K, C]."""
        return F.normalize((rows - rows.mean(0)) @ self.axes.T, dim=1)


@dataclass(frozen=True)
class Pairs:
    """Texts and where in the space they belong, [B, C]; weight: of each of them."""

    texts: Sequence[str]
    places: Tensor
    weight: float = 1.0


def fit_words(words: Sequence[str], vectors: Tensor, pairs: Sequence[Pairs]) -> WordTable:
    """A table of `words` whose mean over a text is where its picture is, as far as a linear map can say.

    vectors: [V, D] of the words by the sentence teacher. Texts without a known word are left out.
    """
    plain = WordTable(words, vectors, torch.zeros(vectors.shape[1]))
    inputs, places, weights = [], [], []
    for pair in pairs:
        for text, place in zip(pair.texts, pair.places, strict=True):
            rows = plain.known(text)
            if rows:
                inputs.append(vectors[rows].mean(0))
                places.append(place)
                weights.append(pair.weight)
    x, y, weight = torch.stack(inputs).double(), torch.stack(places).double(), torch.tensor(weights).double()[:, None]
    mean_x, mean_y = (weight * x).sum(0) / weight.sum(), (weight * y).sum(0) / weight.sum()
    x, y = x - mean_x, y - mean_y
    matrix = torch.linalg.solve(x.T @ (weight * x) + RIDGE * torch.eye(x.shape[1]).double(), x.T @ (weight * y))
    return WordTable(words, ((vectors.double() - mean_x) @ matrix).float(), mean_y.float())
