"""The splat renderer against a slow one in float64 that goes Gaussian by Gaussian over all pixels."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from model import gsplat_cuda
from model.config import GaussianConfig
from model.errors import RangeError, ShapeError
from model.orbit import look_at, orbit
from model.rasterizer import render
from model.splats import SH_DEGREE_0, Splats

CONFIG = GaussianConfig()
CAMERA, INTRINSICS = (tensor.double() for tensor in look_at(30, 20, 1.6, 40))
NAMES = ("xyz01", "features_dc", "scaling", "rotation", "opacity")


def scene(count: int, *, scale: float = 0.03, opacity: float = 1.0, seed: int = 0) -> Splats:
    """Random Gaussians on a shell, float64."""
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    places = torch.nn.functional.normalize(normal(count, 3)) * 0.4 + 0.5
    bias = math.log(math.expm1(scale)) - math.log(math.expm1(CONFIG.initial_scale))
    return Splats(
        places, normal(count, 3), bias + 0.3 * normal(count, 3), normal(count, 4), normal(count, 1) + opacity, CONFIG
    )


def slow(splats: Splats, camera: Tensor, k: Tensor, height: int, width: int, background: float) -> Tensor:
    """The published sums, written down once more: facts about the projection in matrices, no tiles, no rectangles."""
    rotation = camera[:3, :3]
    points = splats.positions() @ rotation.T + camera[:3, 3]
    focal = torch.stack([width * k[0, 0], height * k[1, 1]])
    edge = 1.3 * 0.5 / torch.stack([k[0, 0], k[1, 1]])
    rows, columns = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    colour = torch.zeros(height, width, 3, dtype=torch.float64)
    light = torch.ones(height, width, dtype=torch.float64)
    live = torch.ones(height, width, dtype=torch.bool)
    for number in points[:, 2].argsort(stable=True).tolist():
        x, y, z = points[number]
        if z <= 0.2:
            continue
        cut = torch.stack([x / z, y / z]).clamp(-edge, edge) * z
        jacobian = torch.stack(
            [
                torch.stack([focal[0] / z, 0 * z, -focal[0] * cut[0] / z**2]),
                torch.stack([0 * z, focal[1] / z, -focal[1] * cut[1] / z**2]),
            ]
        )
        plain = jacobian @ rotation @ splats.covariances()[number] @ rotation.T @ jacobian.T
        before = torch.linalg.det(plain)
        if before <= 1e-6:
            continue
        wide = plain + 0.1 * torch.eye(2, dtype=torch.float64)
        fade = (before / (torch.linalg.det(wide).clamp(min=1e-6) + 1e-6) + 1e-6).sqrt()
        inverse = torch.linalg.inv(wide)
        across = columns - (width * (k[0, 0] * x / z + k[0, 2]) - 0.5)
        down = rows - (height * (k[1, 1] * y / z + k[1, 2]) - 0.5)
        power = -0.5 * (inverse[0, 0] * across**2 + 2 * inverse[0, 1] * across * down + inverse[1, 1] * down**2)
        alpha = (splats.opacities()[number, 0] * fade * power.exp()).clamp(max=0.99)
        alpha = torch.where((alpha >= 1 / 255) & live, alpha, 0)
        ends = light * (1 - alpha) < 1e-4
        live = live & ~ends
        alpha = torch.where(ends, 0, alpha)
        colour = colour + (alpha * light)[..., None] * splats.colours()[number]
        light = light * (1 - alpha)
    return colour + background * light[..., None]


@pytest.mark.parametrize(
    ("count", "height", "width", "scale", "opacity"),
    [
        (300, 48, 64, 0.03, 1.0),
        (200, 37, 29, 0.05, 6.0),
        (200, 8, 8, 0.004, 3.0),
        (40, 1, 1, 0.1, 1.0),
        (150, 33, 9, 0.3, 5.0),
        (1, 16, 16, 0.05, 9.0),
        (0, 16, 16, 0.05, 9.0),
    ],
)
def test_colours_agree_with_the_slow_renderer(
    count: int, height: int, width: int, scale: float, opacity: float
) -> None:
    splats = scene(count, scale=scale, opacity=opacity)
    found = render(splats, CAMERA, INTRINSICS, height=height, width=width, background=(0.7, 0.7, 0.7))
    wanted = slow(splats, CAMERA, INTRINSICS, height, width, 0.7)
    error = (found.colour - wanted).abs()
    # Beyond three standard deviations the tight rectangles leave out what the slow one still draws, faintly.
    assert error.max() < 0.03
    assert -10 * error.square().mean().clamp(min=1e-30).log10() > 45
    single = Splats(*(getattr(splats, name).float() for name in NAMES), CONFIG)
    rough = render(single, CAMERA, INTRINSICS, height=height, width=width, background=(0.7, 0.7, 0.7))
    assert -10 * (rough.colour - wanted).square().mean().clamp(min=1e-30).log10() > 45


def test_alpha_is_what_the_background_does_not_show() -> None:
    splats = scene(100)
    black = render(splats, CAMERA, INTRINSICS, height=32, width=32)
    white = render(splats, CAMERA, INTRINSICS, height=32, width=32, background=(1.0, 1.0, 1.0))
    torch.testing.assert_close(white.colour - black.colour, (1 - black.alpha)[..., None].expand(-1, -1, 3))


def leaves(splats: Splats) -> Splats:
    return Splats(*(getattr(splats, name).clone().requires_grad_() for name in NAMES), CONFIG)


def test_gradients_agree_with_those_of_the_slow_renderer() -> None:
    ours, theirs = leaves(scene(60, scale=0.06)), leaves(scene(60, scale=0.06))
    weight = torch.randn(21, 19, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (render(ours, CAMERA, INTRINSICS, height=21, width=19, background=(0.2, 0.2, 0.2)).colour * weight).sum().backward()
    (slow(theirs, CAMERA, INTRINSICS, 21, 19, 0.2) * weight).sum().backward()
    for name in NAMES:
        found, wanted = getattr(ours, name).grad, getattr(theirs, name).grad
        assert found.norm() > 0
        assert (found - wanted).norm() < 0.02 * wanted.norm(), name


def test_gradients_stay_finite_where_gaussians_vanish() -> None:
    splats = scene(40)
    tiny = dataclasses.replace(splats, scaling=splats.scaling - 30)
    odd = leaves(dataclasses.replace(tiny, xyz01=torch.cat([tiny.xyz01[:20], tiny.xyz01[20:] * 50])))
    render(odd, CAMERA, INTRINSICS, height=16, width=16).colour.sum().backward()
    for name in NAMES:
        assert torch.isfinite(getattr(odd, name).grad).all(), name


def test_behind_and_beside_the_camera_nothing_is_drawn() -> None:
    splats = scene(50)
    away = dataclasses.replace(splats, xyz01=splats.xyz01 - torch.tensor([0.0, 50.0, 0.0], dtype=torch.float64))
    camera, intrinsics = (tensor.double() for tensor in look_at(0, 0, 2, 40))
    assert (render(away, camera, intrinsics, height=16, width=16).alpha == 0).all()


def test_of_equal_depth_the_first_is_in_front_and_twice_is_the_same() -> None:
    place = torch.full((2, 3), 0.5, dtype=torch.float64)
    rgb = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    splats = Splats(
        place,
        (rgb - 0.5) / SH_DEGREE_0,
        torch.full((2, 3), 6.0, dtype=torch.float64),
        torch.zeros(2, 4, dtype=torch.float64),
        torch.full((2, 1), 20.0, dtype=torch.float64),
        CONFIG,
    )
    first = render(splats, CAMERA, INTRINSICS, height=9, width=9).colour
    assert first[4, 4, 0] > 0.95
    assert first[4, 4, 1] < 0.05
    assert torch.equal(first, render(splats, CAMERA, INTRINSICS, height=9, width=9).colour)


def cross() -> Splats:
    """Arms along +x (red), +y (green) and +z (blue), each a row of small opaque Gaussians."""
    steps = torch.linspace(0.05, 0.4, 40, dtype=torch.float64)
    places = torch.cat([steps[:, None] * axis for axis in torch.eye(3, dtype=torch.float64)]) + 0.5
    rgb = torch.eye(3, dtype=torch.float64).repeat_interleave(40, dim=0)
    zeros = torch.zeros(120, 4, dtype=torch.float64)
    bias = math.log(math.expm1(0.01)) - math.log(math.expm1(CONFIG.initial_scale))
    scaling = torch.full((120, 3), bias, dtype=torch.float64)
    return Splats(
        places, (rgb - 0.5) / SH_DEGREE_0, scaling, zeros, torch.full((120, 1), 9.0, dtype=torch.float64), CONFIG
    )


@pytest.mark.parametrize(
    ("azimuth", "elevation", "red", "green", "blue"),
    [
        # Where the end of each arm is seen: x to the right, y down, in shares of the picture from its middle.
        (0, 0, (1, 0), (0, 0), (0, -1)),
        (90, 0, (0, 0), (1, 0), (0, -1)),  # from +x: y to the right
        (180, 0, (-1, 0), (0, 0), (0, -1)),
        (0, 80, (1, 0), (0, -1), (0, 0)),  # from above: y is up
    ],
)
def test_look_at_shows_x_to_the_right_and_z_up(
    azimuth: float, elevation: float, red: tuple[int, int], green: tuple[int, int], blue: tuple[int, int]
) -> None:
    camera, intrinsics = (tensor.double() for tensor in look_at(azimuth, elevation, 2, 40))
    picture = render(cross(), camera, intrinsics, height=65, width=65).colour
    grid = torch.stack(torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="xy"), dim=-1).double()
    for channel, (across, down) in enumerate((red, green, blue)):
        if (across, down) == (0, 0):
            continue
        others = picture.sum(dim=-1) - picture[..., channel]
        weight = (picture[..., channel] - others).clamp(min=0)[..., None]
        middle = (grid * weight).sum(dim=(0, 1)) / weight.sum()
        assert middle[0] * across + middle[1] * down > 5, (channel, middle)
        assert abs(middle[0] * down) + abs(middle[1] * across) < 4, (channel, middle)


def test_orbit_is_one_turn_that_starts_where_look_at_does() -> None:
    cameras, _ = orbit(8, azimuth=10, elevation=15, distance=2, fov=40)
    torch.testing.assert_close(cameras[0], look_at(10, 15, 2, 40)[0])
    torch.testing.assert_close(cameras[2], look_at(100, 15, 2, 40)[0])


def test_bad_cameras_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[4, 4\]"):
        render(scene(1), CAMERA[:3], INTRINSICS, height=4, width=4)
    with pytest.raises(RangeError, match="at least 1 x 1"):
        render(scene(1), CAMERA, INTRINSICS, height=0, width=4)


def test_intrinsics_in_pixels_for_gsplat() -> None:
    wanted = torch.tensor([[64 * 1.5, 0, 32], [0, 48 * 1.5, 24], [0, 0, 1]])
    normalised = torch.tensor([[1.5, 0, 0.5], [0, 1.5, 0.5], [0, 0, 1]])
    torch.testing.assert_close(gsplat_cuda.pixel_intrinsics(normalised, 48, 64), wanted)
