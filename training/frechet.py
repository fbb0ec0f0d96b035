"""Frechet distance of two sets of features, as in FID and FVD: each is taken for a Gaussian. All in float64.

N items, D features of each. Source: Heusel et al. 2017, arXiv 1706.08500 (Eq. 6). No file, no network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EMPTY = torch.zeros(0, dtype=torch.float64)


@dataclass
class FeatureStats:
    """Count, mean [D] and scatter [D, D] of rows that came so far; the same whatever order and parts they came in.

    scatter: the sum over rows of (row - mean)(row - mean)^T. Sums of squares would lose the digits of features whose
    mean is far from 0, so that parts are joined by their means (Chan et al. 1979). Plain tensors on the CPU: ranks may
    send it as it is, and merge.
    """

    count: int = 0
    mean: Tensor = field(default_factory=EMPTY.clone)
    scatter: Tensor = field(default_factory=EMPTY.clone)

    def update(self, features: Tensor) -> None:
        """Add rows [N, D] of any float type. Raises ValueError for other shapes and for values that are not finite."""
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"features {features.dtype} {tuple(features.shape)}; wanted floats [N, D]")
        if not bool(features.isfinite().all()):
            raise ValueError(f"features of {len(features)} items that are not all finite")
        if len(features) == 0:
            return
        rows = features.detach().to("cpu", torch.float64)
        if self.count == 0:
            dim = rows.shape[1]
            self.mean, self.scatter = rows.new_zeros(dim), rows.new_zeros(dim, dim)
        self._check(rows.shape[1])
        mean = rows.mean(0)
        # One more row stands for the step between the means, so that the matrix is passed over once.
        step = (mean - self.mean) * math.sqrt(self.count * len(rows) / (self.count + len(rows)))
        away = torch.cat([rows - mean, step[None]])
        self.scatter.addmm_(away.T, away)
        self.count += len(rows)
        self.mean += (mean - self.mean) * (len(rows) / self.count)

    def merge(self, other: FeatureStats) -> None:
        """Add the rows of another. Raises ValueError where D differs."""
        if other.count == 0:
            return
        if self.count == 0:
            self.count, self.mean, self.scatter = other.count, other.mean.clone(), other.scatter.clone()
            return
        self._check(len(other.mean))
        count = self.count + other.count
        step = other.mean - self.mean
        self.scatter += other.scatter + torch.outer(step, step) * (self.count * other.count / count)
        self.mean += step * (other.count / count)
        self.count = count

    @property
    def covariance(self) -> Tensor:
        """Of a sample (divided by N - 1), float64 [D, D]. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"{self.count} items; a covariance needs at least 2")
        return self.scatter / (self.count - 1)

    def _check(self, dim: int) -> None:
        if dim != len(self.mean):
            raise ValueError(f"features of {dim} values after features of {len(self.mean)}")


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """A squared distance in its two parts. mean: of the means; covariance: of the shapes.

    warning: that a covariance has no full rank since there are too few items, empty if it has. Such a distance can be
    compared only with others of the same number of items: it is biased upward.
    """

    mean: float
    covariance: float
    warning: str = ""

    @property
    def total(self) -> float:
        """What is called FID or FVD."""
        return self.mean + self.covariance


def frechet_distance(a: FeatureStats, b: FeatureStats) -> Frechet:
    """|mean_a - mean_b|^2 + trace(A + B - 2 (A B)^(1/2)), with A and B the covariances.

    The trace of the root is the sum of the singular values of A^(1/2) B^(1/2), which squares no eigenvalue and is exact
    where A = B. Raises ValueError for fewer than two items, and where D differs.
    """
    for stats in (a, b):
        if stats.count < 2:
            raise ValueError(f"{stats.count} items; a Frechet distance needs at least 2 on each side")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} values; wanted those of one network")
    root = torch.linalg.svdvals(_half(a).T @ _half(b)).sum()
    covariance = a.covariance.trace() + b.covariance.trace() - 2 * root
    fewest, dim = min(a.count, b.count), len(a.mean)
    warning = f"{fewest} items for {dim} features: the covariance is singular" if fewest <= dim else ""
    # The distance of equal shapes may come out a rounding below 0.
    return Frechet(
        mean=float((a.mean - b.mean).square().sum()), covariance=max(0.0, float(covariance)), warning=warning
    )


def _half(stats: FeatureStats) -> Tensor:
    """A factor H with H H^T the covariance, [D, rank]: what rounding leaves of directions without any spread is cut."""
    values, vectors = torch.linalg.eigh(stats.covariance)
    is_real = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, is_real] * values[is_real].sqrt()
