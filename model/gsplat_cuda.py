"""The same pictures through gsplat, where it is installed and the Gaussians lie on a CUDA device: much faster.

gsplat has no CPU path and brings its own kernels (`pip install gsplat==1.5.3`, a CUDA compiler at its first use). Not
proven here for want of a GPU: tests/model/test_gpu.py compares both, tests/bench/gpu_todo.md says when.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor

from model.projection import FILTER, NEAREST
from model.splats import Splats


@cache
def find() -> ModuleType | None:
    """gsplat if it can be imported, looked for once."""
    try:
        import gsplat
    except Exception:  # its own start may fail in many ways; the plain renderer serves then
        return None
    module: ModuleType = gsplat
    return module


def pixel_intrinsics(intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Normalised [3, 3] to pixels, [3, 3]. In gsplat as here a pixel's centre lies half a pixel from its corner."""
    return intrinsics * intrinsics.new_tensor([[width], [height], [1]])


def render(
    gsplat: ModuleType,
    splats: Splats,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    height: int,
    width: int,
    background: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """colour [H, W, 3], alpha [H, W]; arguments as for rasterizer.render."""
    points = splats.positions()
    colours, alphas, _ = gsplat.rasterization(
        means=points,
        quats=splats.rotations(),
        scales=splats.scales(),
        opacities=splats.opacities()[:, 0],
        colors=splats.colours(),
        viewmats=world_to_camera.to(points)[None],
        Ks=pixel_intrinsics(intrinsics.to(points), height, width)[None],
        width=width,
        height=height,
        near_plane=NEAREST,
        eps2d=FILTER,
        rasterize_mode="antialiased",
        packed=False,
        backgrounds=points.new_tensor(background)[None],
    )
    return colours[0], alphas[0, ..., 0]
