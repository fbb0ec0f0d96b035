"""Who learns how fast, the schedule, the clip of the gradients, and the averaged weights, all by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.tiny_run import recipe, trainer
from training.averages import Average
from training.fresh import fresh
from training.optimizer import learning_rate, optimizer_of, set_rate
from training.ranks import Ranks, joined
from training.stages import Optim
from training.student import Student

PLAN = recipe()
MATRICES = [
    "encoder.input_layer",
    "encoder.blocks.0.attn.to_qkv",
    "encoder.blocks.0.attn.to_out",
    "encoder.blocks.0.mlp.mlp.0",
    "encoder.blocks.0.mlp.mlp.2",
    "encoder.head.attention.to_q",
    "encoder.head.attention.to_kv",
    "encoder.head.attention.to_out",
    "encoder.head.mlp.mlp.0",
    "encoder.head.mlp.mlp.2",
    "proj",
    "decoder.input_layer",
    "decoder.blocks.0.attn.to_qkv",
    "decoder.blocks.0.attn.to_out",
    "decoder.blocks.0.mlp.mlp.0",
    "decoder.blocks.0.mlp.mlp.2",
    "decoder.out_layer",
]
"""Whose weights decay. Norms, biases, position tables and the probe do not."""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.fixture
def student() -> Student:
    return Student(fresh(PLAN.model(PLAN.stage("image")), 0))


# Groups


def test_every_parameter_is_in_the_group_of_its_name(student: Student) -> None:
    optimizer = optimizer_of(student, Optim())
    placed = {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.95)
        for parameter in group["params"]:
            assert id(parameter) not in placed
            placed[id(parameter)] = (group["scale"], group["weight_decay"])
    decaying = {f"net.{name}.weight" for name in MATRICES}
    names = dict(student.named_parameters())
    assert decaying < set(names)
    assert len(placed) == len(names)
    for name, parameter in names.items():
        scale = 0.1 if name.startswith("net.encoder.") else 1.0
        assert placed[id(parameter)] == (scale, 0.1 if name in decaying else 0.0), name


def test_what_has_no_gradient_is_left_out(student: Student) -> None:
    student.net.encoder.requires_grad_(False)
    optimizer = optimizer_of(student, Optim())
    assert {group["scale"] for group in optimizer.param_groups} == {1.0}


def test_the_encoder_moves_a_tenth_as_far(student: Student) -> None:
    """The first step of AdamW is the rate itself against the sign of the gradient, after the decay."""
    config = Optim(lr=0.01)
    optimizer = optimizer_of(student, config)
    set_rate(optimizer, 0.02)
    cases = {
        "net.encoder.blocks.0.attn.to_qkv.weight": (0.002, 0.1),
        "net.encoder.blocks.0.attn.to_qkv.bias": (0.002, 0.0),
        "net.decoder.blocks.0.attn.to_qkv.weight": (0.02, 0.1),
        "net.decoder.out_norm.weight": (0.02, 0.0),
    }
    before = {name: student.get_parameter(name).detach().clone() for name in cases}
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for name, (rate, decay) in cases.items():
        after = student.get_parameter(name).detach()
        torch.testing.assert_close(after, before[name] * (1 - rate * decay) - rate, rtol=0, atol=1e-6)


# Schedule


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1.5e-7),
        (999, 1.5e-4),
        (1999, 3e-4),
        (2000, 3e-4),
        (51_500, 3e-5 + 2.7e-4 * (1 + math.sqrt(0.5)) / 2),
        (101_000, 1.65e-4),
        (199_999, 3e-5),
        (300_000, 3e-5),
    ],
)
def test_the_published_schedule(step: int, rate: float) -> None:
    assert learning_rate(Optim(), step, 200_000) == pytest.approx(rate, rel=1e-6)


def test_the_rate_of_every_step_is_set(ranks: Ranks) -> None:
    plan = replace(recipe(), optim=Optim(lr=0.008, final_lr=0.002, warmup=2, encoder_scale=0.25))
    run = trainer(plan, "image", ranks)
    for rate in (0.004, 0.008, 0.008, 0.005):
        run.train_step()
        for group in run.optimizer.param_groups:
            assert group["scale"] in (0.25, 1.0)
            assert group["lr"] == pytest.approx(rate * group["scale"])


# Clip


@pytest.mark.parametrize("most", [0.01, 1e6])
def test_gradients_are_clipped_by_their_norm(most: float, ranks: Ranks) -> None:
    plan = replace(recipe(), optim=replace(recipe().optim, clip=most))
    run = trainer(plan, "image", ranks)
    norms: list[float] = []

    def note(*_: Any) -> None:
        squares = [float(p.grad.double().square().sum()) for p in run.student.parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(squares)))

    run.optimizer.register_step_pre_hook(note)
    found = [run.train_step()["norm"] for _ in range(2)]
    assert min(found) > 0.1
    assert norms == pytest.approx([min(most, norm) for norm in found], rel=1e-3)


# Averaged weights


def test_three_updates_and_a_late_one_by_hand() -> None:
    """Decays of 1/10, 2/11, 3/12 at first, in the end that of the recipe."""
    layer = nn.Linear(1, 1, bias=False).double()
    values = [5.0, -2.0, 8.0, 100.0]
    layer.weight.data.fill_(1.0)
    average = Average(layer, 0.9999)
    found = []
    for step, value in zip((0, 1, 2, 1_000_000), values, strict=True):
        layer.weight.data.fill_(value)
        average.update(step)
        found.append(float(average.values["weight"]))
    first = 0.1 * 1 + 0.9 * 5
    second = 2 / 11 * first - 9 / 11 * 2
    third = 0.25 * second + 0.75 * 8
    assert found == pytest.approx([first, second, third, 0.9999 * third + 0.0001 * 100], rel=1e-9)
    assert layer.weight.item() == 100


def test_a_stage_averages_with_the_decay_of_its_recipe(ranks: Ranks) -> None:
    plan = replace(recipe(), optim=replace(recipe().optim, ema=0.15))
    run = trainer(plan, "image", ranks)
    wanted: dict[str, Tensor] = {name: value.detach().clone() for name, value in run.student.named_parameters()}
    for decay in (0.1, 0.15, 0.15):
        run.train_step()
        for name, value in run.student.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * value.detach()
    for name, mean in run.average.values.items():
        torch.testing.assert_close(mean, wanted[name])
