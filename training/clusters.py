"""How classes lie in a space of features: silhouette, Davies-Bouldin, scatter, dimensions used; PCA; rank correlation.

N items, D values of an item.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


def centred_units(rows: Tensor, mean: Tensor) -> Tensor:
    """float64 [N, D]: rows minus the mean [D], of unit length: their products are the cosines around that mean."""
    return normalize(rows.double() - mean.double(), dim=1)


def silhouette(units: Tensor, labels: Tensor) -> float:
    """Mean over items of (b - a) / max(a, b), -1..1, in cosine distance; an item alone in its class counts 0.

    a: mean distance to the others of the class, b: to those of the nearest other class. units: [N, D], of unit length.
    Source: Rousseeuw 1987.
    """
    members, counts = _members(labels)
    totals = (1 - units @ units.T) @ members  # [N, classes]
    own = members.argmax(1)
    rows = torch.arange(len(units))
    a = totals[rows, own] / (counts[own] - 1).clamp(min=1)
    means = totals / counts
    means[rows, own] = math.inf
    b = means.min(1).values
    widths = (b - a) / torch.maximum(a, b).clamp(min=1e-12)
    return float(torch.where(counts[own] > 1, widths, 0).mean())


def davies_bouldin(units: Tensor, labels: Tensor) -> float:
    """Mean over classes of the worst (spread + spread) / distance of centres, 0 or more; lower is better apart.

    Spread: mean Euclidean distance to the centre. Source: Davies and Bouldin 1979.
    """
    members, counts = _members(labels)
    centres = (members.T @ units) / counts[:, None]
    spreads = (members.T @ (units - centres[members.argmax(1)]).norm(dim=1)) / counts
    apart = torch.cdist(centres, centres)
    ratios = (spreads[:, None] + spreads) / apart.clamp(min=1e-12)
    ratios.fill_diagonal_(-math.inf)
    return float(ratios.max(1).values.mean())


def between_share(units: Tensor, labels: Tensor) -> float:
    """Variance between classes over all variance, 0..1.

    By chance alone it is about (classes - 1) / (N - 1): few items in many classes look better apart.
    """
    members, counts = _members(labels)
    centres = (members.T @ units) / counts[:, None]
    mean = units.mean(0)
    between = float((counts[:, None] * (centres - mean).square()).sum())
    return between / max(float((units - mean).square().sum()), 1e-300)


def _members(labels: Tensor) -> tuple[Tensor, Tensor]:
    """One column a class that occurs, float64 [N, classes] of 0 and 1, and their sizes. At least two classes."""
    names, own = labels.unique(return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} class among {len(labels)} items; two or more can lie apart")
    members = torch.nn.functional.one_hot(own, len(names)).double()
    return members, members.sum(0)


@dataclass(frozen=True)
class Spectrum:
    """Dimensions that a cloud of points fills, both between 1 and min(N - 1, D).

    participation: (sum of variances)^2 / sum of their squares. effective: e to the entropy of the variances' shares.
    """

    participation: float
    effective: float


def spectrum(rows: Tensor) -> Spectrum:
    """Of the variances along principal axes. rows: [N, D], not normalised. NaN where all are alike."""
    variances = torch.linalg.eigvalsh(_gram(rows)).clamp(min=0)
    total = float(variances.sum())
    if total <= 0:
        return Spectrum(math.nan, math.nan)
    shares = variances / total
    entropy = -float(torch.xlogy(shares, shares).sum())
    return Spectrum(1 / float(shares.square().sum()), math.exp(entropy))


def principal(rows: Tensor, count: int = 2) -> tuple[Tensor, list[float]]:
    """Coordinates along the first principal axes, float64 [N, count], and each axis' share of the variance.

    The largest coordinate of an axis is positive, so that a map does not flip from one machine to another.
    """
    values, vectors = torch.linalg.eigh(_gram(rows))
    values, vectors = values.flip(0)[:count].clamp(min=0), vectors.flip(1)[:, :count]
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    places = vectors * peaks.sign() * values.sqrt()
    total = max(float(_gram(rows).trace()), 1e-300)
    return places, [float(value) / total for value in values]


def _gram(rows: Tensor) -> Tensor:
    # Of items, not of values: its eigenvalues are the same but for zeros, and D may be far above N.
    moved = rows.double() - rows.double().mean(0)
    return moved @ moved.T


@dataclass(frozen=True)
class Correlation:
    """Spearman's. low, high: 95 % interval, NaN for fewer than four points; chance: share of permutations as strong."""

    value: float
    low: float
    high: float
    chance: float
    count: int


def rank_correlation(x: Sequence[float], y: Sequence[float], *, seed: int = 0, draws: int = 10_000) -> Correlation:
    """Spearman's rank correlation, its interval by Fisher's z, and a two-sided permutation test.

    Source of the interval: Bonett and Wright 2000, variance (1 + r^2 / 2) / (n - 3).
    """
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (x, y)]
    count = len(x)
    if count < 2 or any(float(np.ptp(values)) == 0 for values in ranks):
        return Correlation(math.nan, math.nan, math.nan, math.nan, count)
    a, b = ((values - values.mean()) / values.std() for values in ranks)
    value = float(np.clip((a * b).mean(), -1, 1))
    low = high = math.nan
    if count > 3:
        # At exactly 1 Fisher's z is infinite, though few points never show that much.
        z = math.atanh(min(max(value, -1 + 1e-6), 1 - 1e-6))
        half = 1.959964 * math.sqrt((1 + value**2 / 2) / (count - 3))
        low, high = math.tanh(z - half), math.tanh(z + half)
    chance = np.random.default_rng(seed)
    drawn = np.stack([chance.permutation(a) for _ in range(draws)]) @ b / count
    strong = int((np.abs(drawn) >= abs(value) - 1e-9).sum())
    return Correlation(value, low, high, (strong + 1) / (draws + 1), count)


def resampled(x: Sequence[float], hits: np.ndarray, *, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the rank correlation of x with the accuracies, by bootstrap over the pictures that were named.

    x: R values. hits: bool [R, M], which of M pictures each space named right: spaces share the pictures, and their
    luck. Draws without a rank correlation (all equal) are left out; NaN if none is left.
    """
    count = hits.shape[1]
    a = _ranks(np.asarray(x, dtype=float))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    found = []
    for accuracies in weights @ hits.T.astype(float):
        b = _ranks(accuracies)
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            found.append(float(np.corrcoef(a, b)[0, 1]))
    if not found:
        return math.nan, math.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(
    hits: np.ndarray, others: np.ndarray, *, seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Accuracy minus that of another space on the same M pictures, with its 95 % interval by bootstrap over them."""
    each = hits.astype(float) - others
    means = np.random.default_rng(seed).choice(each, (draws, len(each))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(each.mean()), float(low), float(high)


def _ranks(values: np.ndarray) -> np.ndarray:
    """1, 2, ...; equals share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[inverse]
