"""Distillation and sigmoid loss against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.semantic import LOGIT_BIAS, LOGIT_SCALE, distillation_rows, sigmoid_rows, similarities


def rows(count: int, seed: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_published_constants() -> None:
    assert pytest.approx(127.0, abs=0.1) == LOGIT_SCALE
    assert LOGIT_BIAS == -15.5625


def test_similarities_are_scaled_cosines() -> None:
    images, texts = rows(2, 0), rows(3, 1)
    scores = similarities(images, texts, 10.0)
    cosine = float(images[1] @ texts[2] / images[1].norm() / texts[2].norm())
    assert float(scores[1, 2]) == pytest.approx(10 * cosine)
    torch.testing.assert_close(similarities(7 * images, texts, 10.0), scores)


def test_distillation_by_hand() -> None:
    teacher, student = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 4.0]]).double()
    p = math.exp(1) / (math.exp(1) + 1)
    q = 1 / (1 + math.exp(2))
    wanted = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert float(distillation_rows(student, teacher, 2.0)) == pytest.approx(wanted)


def test_distillation_is_zero_only_for_the_same_distribution() -> None:
    teacher = rows(4, 0)
    assert distillation_rows(teacher + 3.0, teacher).abs().max() < 1e-12  # a bias cancels
    assert (distillation_rows(teacher * 1.5, teacher) > 1e-4).all()


def test_sigmoid_loss_against_a_loop() -> None:
    images, texts = rows(3, 0), rows(5, 1)
    same = torch.zeros(3, 5, dtype=torch.bool)
    same[0, 0] = same[1, 1] = same[1, 4] = same[2, 2] = True
    found = sigmoid_rows(images, texts, same, 5.0, -1.0)
    for i in range(3):
        total = 0.0
        for j in range(5):
            logit = 5 * float(images[i] @ texts[j] / images[i].norm() / texts[j].norm()) - 1
            total += math.log1p(math.exp(-logit if same[i, j] else logit))
        assert float(found[i]) == pytest.approx(total)


def test_rows_of_the_diagonal_give_the_sigmoid_loss_of_siglip() -> None:
    """Targets +1 on the diagonal and -1 off it; at the published scale a logit of the wrong pair costs nothing."""
    images, texts = rows(4, 5), rows(4, 6)
    logits = 127 * (images / images.norm(dim=1, keepdim=True)) @ (texts / texts.norm(dim=1, keepdim=True)).T - 15.5625
    signs = 2 * torch.eye(4, dtype=torch.float64) - 1
    wanted = (-(signs * logits).sigmoid().log()).sum(1).mean()
    found = sigmoid_rows(images, texts, torch.eye(4, dtype=torch.bool), 127.0, -15.5625).mean()
    torch.testing.assert_close(found, wanted)


def test_equal_captions_are_positives() -> None:
    """Two clips of one caption: to push them apart from each other's text would be to push each from its own."""
    texts = torch.eye(3, 6)[[0, 0, 1]].double()
    images = (texts + 0.05 * rows(3, 7)).requires_grad_()
    same = (texts[:, None] == texts[None]).all(-1)
    assert same.sum() == 5
    right = sigmoid_rows(images, texts, same).mean()
    wrong = sigmoid_rows(images, texts, torch.eye(3, dtype=torch.bool)).mean()
    assert float(right.detach()) < 0.01 < 10 < float(wrong.detach())


def test_the_teacher_is_a_constant_and_rows_are_of_single_images() -> None:
    student, teacher = rows(3, 8).requires_grad_(), rows(3, 9).requires_grad_()
    distillation_rows(student, teacher)[1].backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad[1].abs().min() > 0
    assert student.grad[[0, 2]].abs().max() == 0


def test_half_precision_is_lifted() -> None:
    """At a scale of 127 the steps of bfloat16 are half a logit."""
    images, texts = (torch.nn.functional.normalize(rows(8, seed, 64), dim=1).bfloat16() for seed in (1, 2))
    scores = similarities(images, texts)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, similarities(images.float(), texts.float()))


def test_gradients_in_float64() -> None:
    texts, teacher = rows(4, 1), rows(3, 2, 4)
    same = torch.eye(3, 4, dtype=torch.bool)
    images = rows(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distillation_rows(similarities(x, texts, 4.0), teacher), (images,))
    assert torch.autograd.gradcheck(lambda x: sigmoid_rows(x, texts, same, 4.0, -1.0), (images,))
