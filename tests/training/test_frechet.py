"""Frechet distance: against closed forms and scipy, and the same however the rows came."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from training.frechet import FeatureStats, frechet_distance


def rows(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def stats_of(*parts: Tensor) -> FeatureStats:
    stats = FeatureStats()
    for part in parts:
        stats.update(part)
    return stats


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureStats:
    return FeatureStats(count, mean.double(), covariance.double() * (count - 1))


def test_diagonal_gaussians_have_a_closed_form() -> None:
    a, b = torch.tensor([4.0, 1.0, 0.25]), torch.tensor([1.0, 9.0, 0.25])
    found = frechet_distance(
        gaussian(torch.tensor([0.0, 1.0, 2.0]), a.diag()), gaussian(torch.tensor([3.0, 1.0, -2.0]), b.diag())
    )
    assert found.mean == pytest.approx(9 + 16)
    assert found.covariance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()))
    assert found.total == pytest.approx(found.mean + found.covariance)
    assert found.warning == ""


def test_commuting_covariances_in_any_basis() -> None:
    basis = torch.linalg.qr(rows(6, 6, 0)).Q
    a, b = torch.rand(6, dtype=torch.float64) + 0.1, torch.rand(6, dtype=torch.float64) + 0.1
    found = frechet_distance(
        gaussian(torch.zeros(6), basis @ a.diag() @ basis.T), gaussian(torch.zeros(6), basis @ b.diag() @ basis.T)
    )
    assert found.covariance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


@pytest.mark.parametrize(("count", "dim"), [(200, 12), (40, 39), (12, 30)])
def test_against_the_root_of_scipy(count: int, dim: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = rows(count, dim, 1), rows(count + 5, dim, 2, shift=0.3)
    mx, my = x.mean(0).numpy(), y.mean(0).numpy()
    cx, cy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    # Of a singular product scipy's root is right only near it: a nudge, as users of it do.
    nudge = np.eye(dim) * (1e-10 if count <= dim else 0)
    root = linalg.sqrtm((cx + nudge) @ (cy + nudge)).real
    found = frechet_distance(stats_of(x), stats_of(y))
    assert found.mean == pytest.approx(float(((mx - my) ** 2).sum()), rel=1e-9)
    assert found.covariance == pytest.approx(float(np.trace(cx + cy - 2 * root)), rel=1e-3 if count <= dim else 1e-8)
    assert ("12 items for 30 features" in found.warning) == (count <= dim)


def test_order_and_parts_do_not_matter() -> None:
    x = rows(101, 8, 3)
    whole = stats_of(x)
    np.testing.assert_allclose(whole.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    one_by_one = stats_of(*x.flip(0).split(1))
    first, second = stats_of(x[:7], x[7:30]), stats_of(*x[30:].split(13))
    # What a rank sends to another.
    sent = pickle.loads(pickle.dumps(second))
    first.merge(sent)
    nothing = FeatureStats()
    nothing.merge(first)
    first.merge(FeatureStats())
    for other in (one_by_one, first, nothing):
        assert other.count == 101
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other.scatter, whole.scatter, rtol=1e-11, atol=1e-11)
    assert frechet_distance(one_by_one, whole).total < 1e-9
    copy = nothing.mean.clone()
    first.update(x)
    assert torch.equal(nothing.mean, copy), "a merged copy shares nothing"


def test_digits_survive_a_mean_far_from_zero() -> None:
    x = rows(500, 4, 4)
    torch.testing.assert_close(stats_of(*(x + 1e7).split(50)).covariance, stats_of(x).covariance, rtol=1e-6, atol=1e-6)


def test_equal_sets_are_at_zero_and_far_ones_are_not() -> None:
    x = rows(20, 64, 5)
    same = frechet_distance(stats_of(x), stats_of(x))
    assert (same.mean, same.covariance) == (0, pytest.approx(0, abs=1e-9))
    assert "20 items for 64 features: the covariance is singular" in same.warning
    there = frechet_distance(stats_of(x), stats_of(2 * x))
    back = frechet_distance(stats_of(2 * x), stats_of(x))
    # Of twice the values: the distance of the spreads is the spread of one.
    assert there.covariance == pytest.approx(float(stats_of(x).covariance.trace()))
    assert there.total == pytest.approx(back.total)
    assert frechet_distance(stats_of(torch.ones(3, 2)), stats_of(torch.ones(4, 2) * 3)).total == pytest.approx(8)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="1 items; a Frechet distance needs at least 2"):
        frechet_distance(stats_of(rows(1, 4, 0)), stats_of(rows(9, 4, 0)))
    with pytest.raises(ValueError, match="features of 4 and of 5 values"):
        frechet_distance(stats_of(rows(9, 4, 0)), stats_of(rows(9, 5, 0)))
    with pytest.raises(ValueError, match="features of 5 values after features of 4"):
        stats_of(rows(9, 4, 0), rows(9, 5, 0))
    with pytest.raises(ValueError, match="2 items that are not all finite"):
        stats_of(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"\(3,\); wanted floats \[N, D\]"):
        stats_of(torch.zeros(3))
