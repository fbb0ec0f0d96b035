"""Gaussians to pictures, against a loop over Gaussians and all pixels that shares no code with the renderer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from media.types import Gaussians
from model import gsplat_cuda
from model.config import GaussianConfig
from model.errors import RangeError, ShapeError
from model.image_metrics import psnr
from model.orbit import look_at, orbit
from model.projection import SplatTensors, project
from model.rasterizer import render, render_many
from model.splats import Splats

GREY = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)


def scene(count: int, *, seed: int = 0, scale: float = 0.05, opacity: float = 0.6, reach: float = 0.4) -> SplatTensors:
    """Gaussians of all shapes, float64."""
    rng = torch.Generator().manual_seed(seed)

    def draw(width: int) -> Tensor:
        return torch.rand(count, width, generator=rng, dtype=torch.float64)

    return SplatTensors(
        positions=(2 * draw(3) - 1) * reach,
        colours=draw(3),
        opacities=(opacity + 0.8 * (draw(1) - 0.5)).clamp(0, 1),
        scales=scale * torch.exp(2 * draw(3) - 1),
        rotations=torch.nn.functional.normalize(draw(4) - 0.5),
    )


def camera(azimuth: float = 30, distance: float = 1.6) -> tuple[Tensor, Tensor]:
    pose, lens = look_at(azimuth, 20, distance, 40)
    return pose.double(), lens.double()


def loop(
    splats: SplatTensors, pose: Tensor, lens: Tensor, height: int, width: int, background: Tensor, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Colour and alpha, one Gaussian after the other, over all pixels."""
    columns = torch.arange(width, dtype=torch.float64)
    rows = torch.arange(height, dtype=torch.float64)
    colour = torch.zeros(height, width, 3, dtype=torch.float64)
    light = torch.ones(height, width, dtype=torch.float64)
    stopped = torch.zeros(height, width, dtype=torch.bool)
    homogeneous = torch.cat([splats.positions, torch.ones_like(splats.positions[:, :1])], dim=1)
    in_camera = (pose @ homogeneous.T).T
    for i in sorted(range(len(homogeneous)), key=lambda i: in_camera[i, 2].item()):
        tx, ty, tz = in_camera[i, :3]
        if tz <= 0.2:
            continue
        w, x, y, z = splats.rotations[i]
        turn = torch.stack(
            [
                torch.stack([w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)]),
                torch.stack([2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)]),
                torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z]),
            ]
        ) / (w * w + x * x + y * y + z * z)
        sigma = turn @ torch.diag(splats.scales[i] ** 2) @ turn.T
        fx, fy = width * lens[0, 0], height * lens[1, 1]
        edge_x, edge_y = 1.3 * 0.5 / lens[0, 0], 1.3 * 0.5 / lens[1, 1]
        hx = torch.clamp(tx / tz, -edge_x, edge_x) * tz
        hy = torch.clamp(ty / tz, -edge_y, edge_y) * tz
        zero = torch.zeros((), dtype=torch.float64)
        jacobian = torch.stack(
            [torch.stack([fx / tz, zero, -fx * hx / tz**2]), torch.stack([zero, fy / tz, -fy * hy / tz**2])]
        )
        jw = jacobian @ pose[:3, :3]
        cov = jw @ sigma @ jw.T
        det0 = cov[0, 0] * cov[1, 1] - cov[0, 1] ** 2
        if det0 <= 1e-6:
            continue
        cov = cov + 0.1 * torch.eye(2, dtype=torch.float64)
        det1 = cov[0, 0] * cov[1, 1] - cov[0, 1] ** 2
        strength = splats.opacities[i, 0] * torch.sqrt(det0 / (det1 + 1e-6) + 1e-6)
        centre_x = width * (lens[0, 0] * tx / tz + lens[0, 2]) - 0.5
        centre_y = height * (lens[1, 1] * ty / tz + lens[1, 2]) - 0.5
        dx, dy = (columns - centre_x)[None, :], (rows - centre_y)[:, None]
        power = -0.5 * (cov[1, 1] * dx**2 - 2 * cov[0, 1] * dx * dy + cov[0, 0] * dy**2) / det1
        alpha = torch.clamp(strength * torch.exp(power), max=0.99)
        touched = (power <= 0) & (alpha >= 1 / 255)
        if exact:
            middle = (cov[0, 0] + cov[1, 1]) / 2
            radius = math.ceil(3 * math.sqrt(middle + math.sqrt(max(0.1, middle**2 - det1))))
            in_x = ((columns // 16 * 16 + 16) > centre_x - radius) & (columns // 16 * 16 <= centre_x + radius)
            in_y = ((rows // 16 * 16 + 16) > centre_y - radius) & (rows // 16 * 16 <= centre_y + radius)
            touched = touched & in_x[None, :] & in_y[:, None]
        after = light * (1 - alpha)
        stopped = stopped | (touched & (after < 1e-4))
        adds = touched & ~stopped
        colour = colour + torch.where(adds, light * alpha, 0.0)[..., None] * splats.colours[i]
        light = torch.where(adds, after, light)
    return colour + light[..., None] * background, 1 - light


def with_leaves(splats: SplatTensors) -> SplatTensors:
    return SplatTensors(*(tensor.detach().clone().requires_grad_() for tensor in splats))


SCENES: dict[str, dict[str, Any]] = {
    "faint": {"count": 60, "opacity": 0.2},
    "opaque, deep": {"count": 150, "opacity": 1.2, "scale": 0.12},
    "tiny": {"count": 80, "scale": 0.004, "opacity": 0.8},
    "some behind the camera and off screen": {"count": 120, "reach": 2.5, "scale": 0.1},
    "huge": {"count": 12, "scale": 3.0},
}


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 19), (1, 1)])
def test_pictures_and_gradients_are_those_of_the_loop(name: str, height: int, width: int) -> None:
    weights = torch.rand(height, width, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, wanted = (with_leaves(scene(**SCENES[name])) for _ in range(2))
    backgrounds = [GREY.clone().requires_grad_() for _ in range(2)]
    # The loop divides quaternions by their length, the renderer relies on it being 1: only turns are comparable.
    turned = found._replace(rotations=torch.nn.functional.normalize(found.rotations))
    got = render(turned, *camera(), height=height, width=width, background=backgrounds[0])
    colour, alpha = loop(wanted, *camera(), height, width, backgrounds[1])
    assert (got.colour - colour).abs().max() < 1e-10
    assert (got.alpha - alpha).abs().max() < 1e-10
    for one, two in ((got.colour, got.alpha), (colour, alpha)):
        ((one * weights[..., :3]).sum() + (two * weights[..., 3]).sum()).backward()
    for field, one, two in zip(
        (*found._fields, "background"), (*found, backgrounds[0]), (*wanted, backgrounds[1]), strict=True
    ):
        assert one.grad is not None
        reference = torch.zeros_like(one) if two.grad is None else two.grad
        assert (one.grad - reference).abs().max() <= 1e-9 * (1 + reference.abs().max()), field
    if name != "tiny" and (height, width) != (1, 1):
        assert alpha.max() > 0.5, "an empty picture proves nothing"


def test_float32_is_as_good() -> None:
    splats = scene(400, scale=0.03)
    narrow = SplatTensors(*(tensor.float() for tensor in splats))
    wanted, _ = loop(splats, *camera(), 64, 64, GREY)
    got = render(narrow, *camera(), height=64, width=64, background=GREY).colour
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 1e-4
    assert psnr(got, wanted.float()) > 90


def test_exact_cuts_where_published_pictures_do() -> None:
    splats, size = scene(60, opacity=1.2, scale=0.03), (70, 50)
    wanted, alpha = loop(splats, *camera(), *size, GREY, exact=True)
    got = render(splats, *camera(), height=size[0], width=size[1], background=GREY, exact=True)
    assert (got.colour - wanted).abs().max() < 1e-10
    assert (got.alpha - alpha).abs().max() < 1e-10
    whole = render(splats, *camera(), height=size[0], width=size[1], background=GREY).colour
    assert 1e-4 < (whole - wanted).abs().max() < 0.03, "the two cuts differ, but not by much"
    assert psnr(whole, wanted) > 45


def test_gradcheck_of_all_five_tensors() -> None:
    splats = with_leaves(scene(7, seed=3, scale=0.1, opacity=0.5))

    def draw(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(render(SplatTensors(*tensors), *camera(), height=7, width=5, background=GREY))  # type: ignore[return-value]

    assert torch.autograd.gradcheck(draw, tuple(splats), eps=1e-7, atol=1e-6)


def test_equal_depths_keep_the_order_of_the_input() -> None:
    both = scene(2)._replace(
        positions=torch.zeros(2, 3, dtype=torch.float64),
        colours=torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double(),
        opacities=torch.full((2, 1), 0.8).double(),
        scales=torch.full((2, 3), 0.2).double(),
    )
    first = render(both, *camera(), height=9, width=9).colour[4, 4]
    swapped = render(both._replace(colours=both.colours.flip(0)), *camera(), height=9, width=9).colour[4, 4]
    assert first[0] > 3 * first[1] > 0
    assert swapped.tolist() == first[[1, 0, 2]].tolist()


def test_nothing_to_draw_leaves_the_background() -> None:
    for count in (0, 3):
        splats = with_leaves(scene(count)._replace(positions=torch.full((count, 3), 50.0, dtype=torch.float64)))
        got = render(splats, *camera(), height=5, width=4, background=GREY)
        assert torch.equal(got.colour, GREY.expand(5, 4, 3))
        assert not got.alpha.any()
        got.colour.sum().backward()
        assert all(tensor.grad is not None and not tensor.grad.any() for tensor in splats)


def test_vanishing_overflowing_and_degenerate_gaussians_leak_no_nan() -> None:
    usual = scene(9, seed=2)
    odd = SplatTensors(*(tensor.clone().float() for tensor in usual))
    odd.scales[0] = 0
    odd.scales[1] = 1e-6
    odd.scales[2] = 1e25
    odd.positions[3] = 1e30
    odd.opacities[4] = 0
    odd.rotations[5] = 0
    eye = camera()[0].inverse()[:3, 3].float()
    odd.positions[6] = eye
    splats = with_leaves(odd)
    got = render(splats, *camera(), height=16, width=16)
    got.colour.square().sum().backward()
    assert got.colour.isfinite().all()
    for name, tensor in zip(splats._fields, splats, strict=True):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all(), name
        assert not tensor.grad[[0, 1, 2, 3, 4, 6]].any(), name
    assert splats.positions.grad is not None
    assert splats.positions.grad[7:].any()


def test_two_runs_are_bit_equal_and_gradients_do_not_change_the_picture() -> None:
    def run() -> tuple[Tensor, Tensor]:
        splats = with_leaves(SplatTensors(*(tensor.float() for tensor in scene(300))))
        picture = render(splats, *camera(), height=40, width=40).colour
        picture.square().sum().backward()
        assert splats.positions.grad is not None
        return picture.detach(), splats.positions.grad

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    splats = SplatTensors(*(tensor.float() for tensor in scene(300)))
    assert torch.allclose(first[0], render(splats, *camera(), height=40, width=40).colour, atol=1e-6)


def test_an_axis_cross_lies_where_the_cameras_say() -> None:
    """Arms along +x (red, long), +y (green, middle), +z (blue, short)."""
    arms = [(axis, length) for axis, length in enumerate((0.45, 0.3, 0.2)) for _ in range(40)]
    count = len(arms)
    positions, colours = torch.zeros(count, 3), torch.zeros(count, 3)
    for number, (axis, length) in enumerate(arms):
        positions[number, axis] = length * (number % 40 + 1) / 40
        colours[number, axis] = 1
    cross = SplatTensors(
        positions, colours, torch.full((count, 1), 0.9), torch.full((count, 3), 0.01), torch.eye(4)[:1].repeat(count, 1)
    )

    def ends(azimuth: float, elevation: float) -> list[tuple[int, int]]:
        """How far each arm reaches to the right and up, in pixels from the middle."""
        picture = render(cross, *look_at(azimuth, elevation, 2.0, 40), height=65, width=65).colour
        reach = []
        for colour in range(3):
            rows, columns = (picture[..., colour] > 0.2).nonzero(as_tuple=True)
            right, up = columns - 32, 32 - rows
            reach.append(tuple(int(part[part.abs().argmax()]) for part in (right, up)))
        return reach

    red, green, blue = ends(0, 0)
    assert red[0] > 17, "from -y: x is right"
    assert abs(red[1]) <= 2
    assert max(map(abs, green)) <= 3, "y goes away from the camera"
    assert 7 < blue[1] < red[0] - 5, "z is up, and shorter"
    red, green, blue = ends(90, 0)
    assert green[0] > 10, "from +x: y is right"
    assert blue[1] > 7
    red, green, _ = ends(180, 0)
    assert red[0] < -17, "from +y: x is left"
    red, green, blue = ends(0, 90)
    assert red[0] > 17, "from above: x is right"
    assert green[1] > 10, "and y is up"
    red, green, blue = ends(0, 30)
    assert green[1] > 4, "from above the front: what is behind lies higher"
    assert blue[1] > green[1]


def test_an_orbit_goes_round_counterclockwise_and_draws_what_single_cameras_draw() -> None:
    poses, lenses = orbit(4, elevation=0, distance=1.5, angle=40)
    eyes = torch.stack([pose.inverse()[:3, 3] for pose in poses])
    assert eyes.numpy() == pytest.approx(1.5 * np.array([[0, -1, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0]]), abs=1e-6)
    assert (lenses == look_at(0, 0, 1.5, 40)[1]).all()
    splats = SplatTensors(*(tensor.float() for tensor in scene(30)))
    pictures = render_many(splats, poses, lenses, height=20, width=24, background=GREY)
    assert pictures.shape == (4, 20, 24, 3)
    for picture, pose, lens in zip(pictures, poses, lenses, strict=True):
        assert torch.equal(picture, render(splats, pose, lens, height=20, width=24, background=GREY).colour)


def test_decoded_splats_and_their_record_draw_the_same_picture() -> None:
    rng = torch.Generator().manual_seed(0)
    splats = Splats(
        xyz01=torch.rand(200, 3, generator=rng) * 0.6 + 0.2,
        features_dc=torch.randn(200, 3, generator=rng),
        scaling=torch.randn(200, 3, generator=rng) + 2,
        rotation=torch.randn(200, 4, generator=rng),
        opacity=torch.randn(200, 1, generator=rng) + 2,
        config=GaussianConfig(),
    )
    size: dict[str, Any] = {"height": 48, "width": 48}
    pose, lens = look_at(20, 10, 1.6, 40)
    picture = render(splats, pose, lens, **size).colour
    assert picture.max() > 0.3
    by_hand = SplatTensors(
        splats.positions(), splats.colours(), splats.opacities(), splats.scales(), splats.rotations()
    )
    assert torch.equal(picture, render(by_hand, pose, lens, **size).colour)
    assert (picture - render(splats.to_record(), pose, lens, **size).colour).abs().max() < 1e-3


def test_what_cannot_be_drawn_is_refused() -> None:
    splats, (pose, lens), size = scene(5), camera(), {"height": 8, "width": 8}
    spoilt = splats.scales.clone()
    spoilt[3, 1] = math.nan
    skewed, flat = lens.clone(), splats._replace(opacities=spoilt[:, 0])
    skewed[0, 1] = 0.1
    for error, message, call in (
        (ShapeError, r"opacities torch.float64 \[5\]; wanted \[5, 1\]", (flat, pose, lens)),
        (ShapeError, "scales torch.float32", (splats._replace(scales=spoilt.float()), pose, lens)),
        (RangeError, "scales row 3 is .*nan", (splats._replace(scales=spoilt), pose, lens)),
        (ShapeError, r"world_to_camera torch.float64 \[3, 3\]", (splats, lens, lens)),
        (RangeError, "world_to_camera has a number", (splats, pose * math.inf, lens)),
        (RangeError, "fx, fy > 0", (splats, pose, -lens)),
        (RangeError, "wanted .*fx, 0, cx", (splats, pose, skewed)),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            render(*call, **size)
    for bad in ({"height": 0, "width": 8}, {"height": 8, "width": 8193}):
        with pytest.raises(RangeError, match="1 to 8192"):
            render(splats, pose, lens, **bad)
    with pytest.raises(ShapeError, match="wanted RGB"):
        render(splats, pose, lens, **size, background=(0, 0))
    with pytest.raises(ShapeError, match=r"wanted \[V, 4, 4\]"):
        render_many(splats, pose[None], lens[None].repeat(2, 1, 1), **size)
    huge = scene(2)
    crowd = SplatTensors(*(tensor.repeat(1000, 1) for tensor in huge._replace(scales=huge.scales * 0 + 50)))
    with pytest.raises(RangeError, match=r"2000 Gaussians cover .* at most 33554432"):
        render(crowd, pose, lens, height=8192, width=8192)
    record = Gaussians(**{
        name: np.zeros((3, width) if width > 1 else (4,), np.float32)
        for name, width in (("positions", 3), ("colours", 3), ("opacities", 1), ("scales", 3), ("rotations", 4))
    })  # fmt: skip
    with pytest.raises(ShapeError, match=r"opacities \[4\] in a record of 3"):
        render(record, pose, lens, **size)


def test_cameras_that_are_none_are_refused() -> None:
    for given in ((0, 91, 1, 40), (0, 0, 0, 40), (0, 0, 1, 180), (math.nan, 0, 1, 40)):
        with pytest.raises(RangeError, match=r"wanted|finite"):
            look_at(*given)
    with pytest.raises(RangeError, match="0 cameras"):
        orbit(0, elevation=0, distance=1, angle=40)


def test_gsplat_is_given_the_same_camera() -> None:
    splats, (pose, lens), size = scene(6), camera(), {"height": 30, "width": 50}
    given = gsplat_cuda.arguments(splats, pose, lens, **size)
    assert given["opacities"].shape == (6,)
    place = given["viewmats"][0, :3] @ torch.cat([splats.positions, torch.ones(6, 1).double()], dim=1).T
    pixel = given["Ks"][0] @ place
    ellipses = project(splats, pose, lens, **size)
    depth_order = place[2].argsort()
    # The centre of the first pixel is 0.5 there and 0 here.
    wanted = (pixel[:2] / pixel[2] - 0.5)[:, depth_order].T
    assert len(ellipses.shapes) == 6
    assert ellipses.shapes[:, :2].numpy() == pytest.approx(wanted.numpy())


def test_without_a_gpu_the_torch_renderer_draws() -> None:
    splats = scene(6)
    wanted = render(splats, *camera(), height=9, width=8, background=GREY)
    got = gsplat_cuda.render(splats, *camera(), height=9, width=8, background=GREY)
    assert torch.equal(got.colour, wanted.colour)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


def _on(device: str, splats: SplatTensors) -> SplatTensors:
    return with_leaves(SplatTensors(*(tensor.float().to(device) for tensor in splats)))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", SCENES)
def test_a_gpu_draws_what_a_cpu_draws(name: str) -> None:
    pose, lens = look_at(30, 20, 1.6, 40)
    both = [_on(device, scene(**SCENES[name])) for device in ("cpu", "cuda")]
    pictures = [render(s, pose.to(s[0].device), lens.to(s[0].device), height=70, width=50).colour for s in both]
    for picture in pictures:
        picture.square().sum().backward()
    assert psnr(pictures[1].cpu(), pictures[0]) > 60
    for one, two in zip(*both, strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert (one.grad - two.grad.cpu()).norm() <= 1e-2 * one.grad.norm() + 1e-6


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("name", SCENES)
def test_gsplat_draws_what_the_torch_renderer_draws(name: str) -> None:
    if not gsplat_cuda.is_available():
        pytest.skip("gsplat is not installed, or could not be compiled")
    pose, lens = (matrix.to("cuda") for matrix in look_at(30, 20, 1.6, 40))
    both = [_on("cuda", scene(**SCENES[name])) for _ in range(2)]
    size: dict[str, Any] = {"height": 70, "width": 50, "background": GREY.float()}
    pictures = [draw(s, pose, lens, **size) for draw, s in zip((render, gsplat_cuda.render), both, strict=True)]
    assert psnr(pictures[1].colour, pictures[0].colour) > 45
    for picture in pictures:
        (picture.colour.square().sum() + picture.alpha.sum()).backward()
    for one, two in zip(*both, strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert torch.nn.functional.cosine_similarity(one.grad.flatten(), two.grad.flatten(), dim=0) > 0.95
