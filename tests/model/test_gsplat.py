"""The call of gsplat without a GPU: its signature takes it, and its own torch projection gives our picture from it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from model import gsplat_cuda
from model.image_metrics import psnr
from model.orbit import look_at
from model.rasterizer import render
from tests.model.test_rasterizer import SCENES, scene

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, about a compiler that is not here
    gsplat = pytest.importorskip("gsplat", reason="gsplat is not installed: it is what the call is compared with")
    from gsplat.cuda import _torch_impl


def composite(given: dict[str, Any]) -> Tensor:
    """Alpha compositing over black by gsplat's rules, from its projection of what we hand it. [H, W, 3]."""
    covariances, _ = _torch_impl._quat_scale_to_covar_preci(given["quats"], given["scales"], True, False)
    size = {name: given[name] for name in ("width", "height")}
    radii, means, depths, conics, compensations = _torch_impl._fully_fused_projection(
        given["means"],
        covariances,
        given["viewmats"],
        given["Ks"],
        eps2d=given["eps2d"],
        near_plane=given["near_plane"],
        calc_compensations=given["rasterize_mode"] == "antialiased",
        **size,
    )
    rows, columns = torch.meshgrid(
        torch.arange(size["height"], dtype=means.dtype) + 0.5,
        torch.arange(size["width"], dtype=means.dtype) + 0.5,
        indexing="ij",
    )
    colour, light = torch.zeros(size["height"], size["width"], 3, dtype=means.dtype), torch.ones_like(rows)
    for i in depths[0].argsort().tolist():
        if not bool((radii[0, i] > 0).all()):
            continue
        dx, dy = columns - means[0, i, 0], rows - means[0, i, 1]
        a, b, c = conics[0, i]
        falloff = torch.exp(-0.5 * (a * dx * dx + c * dy * dy) - b * dx * dy)
        alpha = (given["opacities"][i] * compensations[0, i] * falloff).clamp(max=0.999)
        alpha = torch.where(alpha < 1 / 255, 0.0, alpha)
        alpha = torch.where(light * (1 - alpha) <= 1e-4, 0.0, alpha)
        colour += (light * alpha)[..., None] * given["colors"][i]
        light *= 1 - alpha
    return colour


@pytest.mark.parametrize("name", SCENES)
def test_its_projection_of_our_call_gives_our_picture(name: str) -> None:
    splats = scene(**SCENES[name])
    pose, lens = (matrix.double() for matrix in look_at(30, 20, 1.6, 40))
    size = {"height": 70, "width": 50}
    given = gsplat_cuda.arguments(splats, pose, lens, **size)
    ours = render(splats, pose, lens, **size).colour
    assert ours.std() > 0.02
    assert psnr(composite(given), ours) > 45


def test_its_signature_takes_our_call() -> None:
    pose, lens = (matrix.double() for matrix in look_at(30, 20, 1.6, 40))
    given = gsplat_cuda.arguments(scene(6), pose, lens, height=30, width=50)
    bound = inspect.signature(gsplat.rasterization).bind(**given)
    assert bound.arguments["rasterize_mode"] == "antialiased"
    assert bound.arguments["eps2d"] == 0.1
