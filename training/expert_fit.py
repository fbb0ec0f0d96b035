"""Experts of the linear path from patches: k subspaces, fitted in turns of choosing and of principal components.

With digits, then in turns of choosing by what the digits give back, of principal components, and of sharing out digits.

n patches, D components of each, E experts, K coefficients of an expert. Source: Kambhatla and Leen 1997 (VQPCA).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from model.experts import CHUNK, DigitExperts, Experts
from model.linear_path import LinearPath
from model.packed import PackedTokens
from training.digits import allocate
from training.losses import item_means

ROUNDS, LAST_ROUNDS = 28, 6
THINNED = 4
FIRST_ROUNDS = 12
SHAPES = 12
"""Directions in which patches are told apart before the first choice."""

DIGIT_ROUNDS, DIGIT_PATCHES = 4, 8000
DIGIT_FLOOR = 1e-3
"""Error that even a blank crop counts as having beside what digits lose."""

FEWEST = 4
"""An expert with fewer patches than so many for each coefficient starts again, where the others lose most."""


@torch.no_grad()
def fit_path_experts(path: LinearPath, batches: Iterable[PackedTokens], log_floor: float, seed: int) -> None:
    """Both sets of experts of a path, to training batches; its bases must be orthonormal components already.

    A patch weighs by 1 / (its crop's error through as many components as there are latents + log_floor), as it does in
    the loss.
    """
    drawn: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    for packed in batches:
        for clips in drawn:
            basis, _ = path.of_kind(clips)
            patches = packed.feats[:, : basis.values]
            found = basis.analyse(patches)
            kept = found[:, : path.seen].square().sum(1)
            error = ((patches - basis.mean).square().sum(1) - kept) / basis.values
            lengths = torch.tensor(packed.starts).diff()
            weights = (1 / (item_means(error, packed.starts).clamp(min=0) + log_floor)).repeat_interleave(lengths)
            rows = packed.moving == clips
            drawn[clips].append((found[rows], weights[rows]))
    for clips, parts in drawn.items():
        _, experts = path.of_kind(clips)
        found, weights = (torch.cat(part) for part in zip(*parts, strict=True))
        if experts is not None and len(found):
            if isinstance(experts, DigitExperts):
                weights = 1 / (1 / weights + DIGIT_FLOOR)
            fit_experts(experts, found, weights, seed)
            if isinstance(experts, DigitExperts):
                fit_digits(experts, found, weights)


@torch.no_grad()
def fit_experts(experts: Experts, components: Tensor, weights: Tensor, seed: int, rounds: int = ROUNDS) -> list[float]:
    """Set centre, rows and scale. components: [n, D]; weights: [n]. Returns the weighted error after each round.

    The first rounds see one patch in THINNED, where that is enough for every expert.
    """
    weights = weights / weights.mean()
    thin = THINNED if len(components) >= THINNED * experts.count * FEWEST * FEWEST * experts.coefficients else 1
    some, their = components[::thin], weights[::thin]
    chosen = _first_choice(some, experts.count, seed)
    errors = []
    for number in range(rounds):
        errors.append(_round(experts, some, their, chosen))
        if number == rounds - LAST_ROUNDS - 1 and thin > 1:
            some, their = components, weights
            chosen = expert_losses(experts, some).argmin(1)
    return errors


@torch.no_grad()
def fit_digits(experts: DigitExperts, components: Tensor, weights: Tensor, rounds: int = DIGIT_ROUNDS) -> list[float]:
    """Set step, component and power, and fit the rest to them. Returns the weighted error after each round."""
    weights = weights / weights.mean()
    chosen = expert_losses(experts, components).argmin(1)
    errors = []
    for _ in range(rounds):
        for number in range(experts.count):
            members = (chosen == number).nonzero()[:, 0]
            if len(members) >= FEWEST * experts.coefficients:
                _set_expert(experts, number, components[members], weights[members])
                some = members[:: max(1, len(members) // DIGIT_PATCHES)]
                _set_digits(experts, number, components[some], weights[some])
        least, chosen = expert_losses(experts, components, given_back=True).min(1)
        errors.append(float((least * weights).mean()))
    return errors


def _set_digits(experts: DigitExperts, number: int, components: Tensor, weights: Tensor) -> None:
    scale = experts.scale[number]
    coefficients = (components - experts.centre[number]) @ experts.rows[number].T / scale
    shared = allocate(coefficients, weights, scale, experts.coefficients)
    experts.step[number] = shared.steps
    experts.component[number] = torch.arange(len(shared.counts)).repeat_interleave(shared.counts).int()
    experts.power[number] = torch.cat([torch.arange(int(count)) for count in shared.counts]).int()


def _round(experts: Experts, components: Tensor, weights: Tensor, chosen: Tensor) -> float:
    """Principal components of each expert's patches, then each patch to its best expert, in place; the error."""
    fewest = FEWEST * experts.coefficients
    for number in range(experts.count):
        members = chosen == number
        if int(members.sum()) >= fewest:
            _set_expert(experts, number, components[members], weights[members])
    least, best = expert_losses(experts, components).min(1)
    chosen.copy_(best)
    least = least * weights
    error = float(least.mean())
    counts = chosen.bincount(minlength=experts.count)
    for number in (counts < fewest).nonzero()[:, 0].tolist():
        worst = int(torch.zeros(experts.count).index_add_(0, chosen, least).argmax())
        members = (chosen == worst).nonzero()[:, 0]
        chosen[members[::2]] = number
        least[members] = 0
    return error


@torch.no_grad()
def expert_losses(experts: Experts, components: Tensor, *, given_back: bool = False) -> Tensor:
    """Square error of every patch with every expert, [n, E], with coefficients as they are or as they are given back.

    components: [n, D].
    """
    parts = []
    for part in components.split(CHUNK):
        projected = experts.project(part)
        given = experts.given_back(projected) if given_back else projected
        parts.append(part.square().sum(1, keepdim=True) + experts.losses(part, projected, given))
    return torch.cat(parts)


def _set_expert(experts: Experts, number: int, components: Tensor, weights: Tensor) -> None:
    share = (weights / weights.sum())[:, None]
    centre = (share * components).sum(0)
    left = components - centre
    values, vectors = torch.linalg.eigh((left.T @ (share * left)).double())
    values, vectors = values.flip(0)[: experts.coefficients], vectors.flip(1)[:, : experts.coefficients]
    experts.centre[number] = centre
    experts.rows[number] = vectors.T.float()
    experts.scale[number] = values.clamp(min=1e-8).sqrt().float()


def _first_choice(components: Tensor, count: int, seed: int) -> Tensor:
    """k-means of how strong each component is in a patch, whatever its sign: which way its edges run."""
    generator = torch.Generator().manual_seed(seed)
    strength = components[:, 1:].abs().sqrt()
    strength = strength - strength.mean(0)
    strength /= strength.std(0).clamp(min=1e-6)
    some = torch.randperm(len(strength), generator=generator)
    shapes = torch.linalg.svd(strength[some[:20_000]], full_matrices=False).Vh[:SHAPES]
    places = strength @ shapes.T
    centres = places[some[:count]]
    chosen = torch.cdist(places, centres).argmin(1)
    for _ in range(FIRST_ROUNDS):
        sums = torch.zeros_like(centres).index_add_(0, chosen, places)
        counts = chosen.bincount(minlength=len(centres)).clamp(min=1)
        chosen = torch.cdist(places, sums / counts[:, None]).argmin(1)
    return chosen
