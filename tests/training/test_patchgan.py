"""The critic: what it sees, that it learns to tell pictures apart, and where its judgement leads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from training.patchgan import Critic, PatchGAN
from training.ranks import Ranks, joined

COUNT = 6


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


def pictures(seed: int, count: int = 3, side: int = 48) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


ORIGINALS, OTHERS = pictures(0), pictures(1).mean((2, 3), keepdim=True).expand(-1, -1, 48, 48)
"""Noise, and plain colours."""


def test_a_score_sees_a_patch_of_70_pixels() -> None:
    """But for group norm, whose mean and deviation are of the whole picture."""
    torch.manual_seed(0)
    net = PatchGAN()
    for index, layer in enumerate(net.layers):
        if isinstance(layer, nn.GroupNorm):
            net.layers[index] = nn.Identity()
    given = torch.zeros(1, 3, 224, 224, requires_grad=True)
    scores = net(given)
    assert scores.shape == (1, 1, 26, 26)
    scores[0, 0, 13, 13].backward()
    assert given.grad is not None
    rows, columns = given.grad[0].abs().sum(0).nonzero().T
    for places in (rows, columns):
        assert int(places.max() - places.min()) + 1 == 70


def test_pictures_do_not_mix() -> None:
    torch.manual_seed(0)
    net = PatchGAN()
    both = net(torch.cat([ORIGINALS, OTHERS]))
    torch.testing.assert_close(both[:3], net(ORIGINALS), atol=1e-5, rtol=1e-4)


def test_it_learns_to_tell_two_sets_apart(ranks: Ranks) -> None:
    critic = Critic(ranks, 0)
    first = critic.learn(ORIGINALS, OTHERS, 3)
    critic.step()
    for _ in range(20):
        last = critic.learn(ORIGINALS, OTHERS, 3)
        critic.step()
    assert last["critic/real"] > 0.5
    assert last["critic/fake"] < -0.5
    assert last["critic/loss"] < 0.5 * first["critic/loss"]


def test_the_hinge_loss_by_hand(ranks: Ranks) -> None:
    """Of three of a step's six pictures."""
    critic = Critic(ranks, 0)
    with torch.no_grad():
        critic.net.get_parameter("layers.11.bias").add_(0.9)  # so that some originals are past the hinge
    found = critic.learn(ORIGINALS, OTHERS, COUNT)
    with torch.no_grad():
        real, fake = critic.net(ORIGINALS), critic.net(OTHERS)
    assert bool((real > 1).any())
    assert bool((real < 1).any())
    wanted = 0.0
    for one, other in zip(real, fake, strict=True):
        wanted += sum(max(0.0, 1 - score) for score in one.flatten().tolist()) / one.numel()
        wanted += sum(max(0.0, 1 + score) for score in other.flatten().tolist()) / other.numel()
    assert found["critic/loss"] == pytest.approx(wanted / COUNT, rel=1e-4)
    assert found["critic/real"] == pytest.approx(float(real.mean()) * 3 / COUNT, rel=1e-4)
    assert found["critic/fake"] == pytest.approx(float(fake.mean()) * 3 / COUNT, rel=1e-4)


def test_judgement_leads_towards_higher_scores(ranks: Ranks) -> None:
    critic = Critic(ranks, 0)
    for _ in range(20):
        critic.learn(ORIGINALS, OTHERS, 3)
        critic.step()
    seen = OTHERS.clone().requires_grad_()
    judged = critic.judge(seen)
    scores = critic.net(seen).detach().mean((1, 2, 3))
    torch.testing.assert_close(judged.detach(), -scores)
    judged.sum().backward()
    assert seen.grad is not None
    assert all(parameter.grad is None for parameter in critic.net.parameters())
    assert all(parameter.requires_grad for parameter in critic.net.parameters())
    with torch.no_grad():
        after = critic.net(seen - 0.05 * seen.grad.sign()).mean((1, 2, 3))
    assert bool((after > scores).all())


def test_gradients_in_float64(ranks: Ranks) -> None:
    torch.manual_seed(0)
    critic = Critic(ranks, 0)
    critic.net = PatchGAN(8).double()
    given = pictures(2, 1, 32).double()

    def loss(*_: Tensor) -> Tensor:
        """Of the weights, which gradcheck moves in place."""
        real, fake = critic.net(given), critic.net(-given)
        hinges: Tensor = (1 - real).relu().mean() + (1 + fake).relu().mean()
        return hinges

    assert torch.autograd.gradcheck(critic.judge, (given.clone().requires_grad_(),), fast_mode=True)
    assert torch.autograd.gradcheck(loss, tuple(critic.net.parameters()), fast_mode=True)
    critic.learn(given, -given, 1)
    found = [parameter.grad.clone() for parameter in critic.net.parameters() if parameter.grad is not None]
    wanted = torch.autograd.grad(loss(), list(critic.net.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
