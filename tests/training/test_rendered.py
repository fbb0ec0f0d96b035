"""The rendered loss: its terms, its gradients, and that it falls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import GaussianConfig
from model.image_metrics import ssim
from model.orbit import look_at
from model.rasterizer import render
from model.splats import Splats
from training.perceptual import LPIPS
from training.rendered import RenderedWeights, rendered_loss
from training.vgg import VGG16

CAMERA, LENS = look_at(30, 20, 2, 45)
SIDE = 32


def splats(seed: int, dtype: torch.dtype = torch.float32) -> Splats:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(40, width, generator=generator).to(dtype) for width in (3, 3, 3, 4, 1)]
    place = (0.5 + 0.15 * draw[0]).clamp(0.1, 0.9)
    sizes = (place, draw[1], 3 + 0.1 * draw[2], 0.1 * draw[3], 3 + draw[4])
    return Splats(*(values.requires_grad_() for values in sizes), config=GaussianConfig())


@pytest.fixture
def picture() -> torch.Tensor:
    seen = render(splats(0), CAMERA, LENS, height=SIDE, width=SIDE).colour.detach()
    return (seen.clamp(0, 1) * 255).round().to(torch.uint8)


def test_it_is_least_where_the_view_is_the_picture(picture: torch.Tensor) -> None:
    assert picture.float().std() > 20
    same = rendered_loss(splats(0), picture, CAMERA, LENS, weights=RenderedWeights())
    other = rendered_loss(splats(1), picture, CAMERA, LENS, weights=RenderedWeights())
    assert float(same.detach()) < 0.01 < 0.05 < float(other.detach())


def test_every_term_counts(picture: torch.Tensor) -> None:
    torch.manual_seed(0)
    vgg, heads = VGG16((8, 8, 8, 8, 8)), LPIPS((8, 8, 8, 8, 8))
    for weight in heads.heads():
        weight.data.uniform_(0, 1)
    terms = {}
    for name in ("l1", "lpips", "ssim", "regulariser"):
        weights = RenderedWeights(**{**dict.fromkeys(("l1", "lpips", "ssim", "regulariser"), 0.0), name: 1.0})
        given = splats(1)
        terms[name] = rendered_loss(given, picture, CAMERA, LENS, weights=weights, perceptual=(vgg, heads))
        terms[name].backward()
        assert given.scaling.grad is not None
        assert given.scaling.grad.abs().sum() > 0, name
    mixed = RenderedWeights(l1=1.0, lpips=0.5, ssim=0.25, regulariser=0.125)
    whole = rendered_loss(splats(1), picture, CAMERA, LENS, weights=mixed, perceptual=(vgg, heads))
    by_hand = terms["l1"] + 0.5 * terms["lpips"] + 0.25 * terms["ssim"] + 0.125 * terms["regulariser"]
    torch.testing.assert_close(whole, by_hand)


def test_terms_by_hand(picture: torch.Tensor) -> None:
    given = splats(1)
    seen = render(given, CAMERA, LENS, height=SIDE, width=SIDE).colour
    wanted = picture.float() / 255
    by_hand = {
        "l1": (seen - wanted).abs().mean(),
        "ssim": 1 - ssim(seen.clamp(0, 1), wanted),
        "regulariser": given.scales().mean() + 1 - given.opacities().mean(),
    }
    for name, term in by_hand.items():
        weights = RenderedWeights(**{**dict.fromkeys(("l1", "lpips", "ssim", "regulariser"), 0.0), name: 1.0})
        torch.testing.assert_close(rendered_loss(given, picture, CAMERA, LENS, weights=weights), term)
    # As published, without a network for the third term.
    whole = rendered_loss(given, picture, CAMERA, LENS, weights=RenderedWeights())
    torch.testing.assert_close(whole, by_hand["l1"] + 0.2 * by_hand["ssim"])


def test_lpips_is_of_the_same_view(picture: torch.Tensor) -> None:
    torch.manual_seed(0)
    vgg, heads = VGG16((8, 8, 8, 8, 8)), LPIPS((8, 8, 8, 8, 8))
    for weight in heads.heads():
        weight.data.uniform_(0, 1)
    given = splats(1)
    seen = render(given, CAMERA, LENS, height=SIDE, width=SIDE).colour.movedim(2, 0)[None]
    expected = heads(vgg, 2 * seen - 1, 2 * (picture.float() / 255).movedim(2, 0)[None] - 1)[0]
    only = RenderedWeights(l1=0.0, ssim=0.0)  # LPIPS counts 0.2, as published
    torch.testing.assert_close(
        rendered_loss(given, picture, CAMERA, LENS, weights=only, perceptual=(vgg, heads)), 0.2 * expected
    )


@pytest.mark.parametrize("name", ["xyz01", "features_dc", "scaling", "rotation", "opacity"])
def test_gradients_against_differences(name: str, picture: torch.Tensor) -> None:
    """In float64, along the direction of the gradient, where the change is largest, and along another."""
    torch.manual_seed(0)
    vgg, heads = VGG16((8, 8, 8, 8, 8)).double(), LPIPS((8, 8, 8, 8, 8)).double()
    for weight in heads.heads():
        weight.data.uniform_(0, 1)
    given = splats(1, torch.float64)
    weights = RenderedWeights(regulariser=0.1)

    def loss(moved: Splats) -> torch.Tensor:
        return rendered_loss(moved, picture, CAMERA, LENS, weights=weights, perceptual=(vgg, heads))

    loss(given).backward()
    values = getattr(given, name)
    generator = torch.Generator().manual_seed(1)
    for direction in (values.grad, torch.randn(values.shape, generator=generator, dtype=torch.float64)):
        step = direction / direction.norm()
        with torch.no_grad():
            up, down = (loss(replace(given, **{name: values + sign * 1e-5 * step})) for sign in (1, -1))
        assert float(up - down) / 2e-5 == pytest.approx(float((values.grad * step).sum()), rel=1e-4), name


def test_descent_brings_the_view_nearer(picture: torch.Tensor) -> None:
    given = splats(1)
    optimizer = torch.optim.Adam([given.features_dc, given.xyz01], lr=0.02)
    losses = []
    for _ in range(25):
        loss = rendered_loss(given, picture, CAMERA, LENS, weights=RenderedWeights())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
