"""Where the base-4 digits of a discrete token go: many to strong coefficients, none to weak ones.

K coefficients, L digits (the latent channels less the marks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import FSQ_LEVELS

MAX_DIGITS = 6
STEPS_TRIED = 40


@dataclass(frozen=True)
class Allocation:
    """counts: int [K] digits of each component, summing to L; steps: [K] width of a cell (of unit-variance values)."""

    counts: Tensor
    steps: Tensor


def allocate(coefficients: Tensor, weights: Tensor, scales: Tensor, digits: int) -> Allocation:
    """The split of `digits` over components, and the cell widths, that lose least.

    coefficients: samples of unit variance [n, K]; weights: [n]; scales: [K] what a unit of each is worth in pixels.
    Exact dynamic program over the measured error of every component at every number of digits.
    """
    share = (weights / weights.sum())[:, None]

    def loss(left: Tensor) -> Tensor:
        return (share * left.square()).sum(0) * scales.square()

    count = coefficients.shape[1]
    errors = torch.zeros(count, MAX_DIGITS + 1)
    steps = torch.ones(count, MAX_DIGITS + 1)
    errors[:, 0] = loss(coefficients)
    for number in range(1, MAX_DIGITS + 1):
        cells = FSQ_LEVELS**number
        for reach in torch.linspace(1.0, 12.0, STEPS_TRIED).tolist():  # the cells cover +- reach / 2 deviations
            step = reach / cells
            index = (coefficients / step + (cells + 1) / 2).floor().clamp(0, cells - 1)
            error = loss(coefficients - (index - cells / 2) * step)
            better = error < errors[:, number] if reach > 1.0 else torch.ones(count, dtype=torch.bool)
            errors[:, number] = torch.where(better, error, errors[:, number])
            steps[:, number] = torch.where(better, torch.tensor(step), steps[:, number])
    counts = _best_split(errors, digits)
    return Allocation(counts=counts, steps=steps.gather(1, counts[:, None])[:, 0])


def _best_split(errors: Tensor, digits: int) -> Tensor:
    """errors: [K, M + 1] by component and number of digits. Returns int64 [K] summing to `digits`."""
    best = torch.full((digits + 1,), torch.inf)
    best[0] = 0.0
    choices = []
    for row in errors:
        options = torch.full((len(row), digits + 1), torch.inf)
        for number, error in enumerate(row):
            options[number, number:] = best[: digits + 1 - number] + error
        best, choice = options.min(0)
        choices.append(choice)
    left, counts = digits, []
    for choice in reversed(choices):
        counts.append(int(choice[left]))
        left -= counts[-1]
    return torch.tensor(counts[::-1])
