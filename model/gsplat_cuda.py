"""The same pictures from gsplat's CUDA kernels, where gsplat 1.5 is installed; elsewhere from model.rasterizer.

Known differences to model.rasterizer, all small: an alpha is at most 0.999 there, not 0.99; a tile is cut at 3.33
standard deviations; and off-centre lenses hold the slope of the projection at other places.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model import rasterizer
from model.errors import ShapeError
from model.projection import BLUR, NEAR, AnySplats, SplatTensors, as_tensors, check_camera
from model.rasterizer import Rendering


@functools.cache
def is_available() -> bool:
    """Whether gsplat's kernels can run. The first call imports gsplat, which may compile them for minutes."""
    if not torch.cuda.is_available() or importlib.util.find_spec("gsplat") is None:
        return False
    try:
        # Without a CUDA compiler the import succeeds and leaves None here.
        return importlib.import_module("gsplat.cuda._backend")._C is not None
    except (ImportError, OSError, RuntimeError):
        return False


def render(
    splats: AnySplats,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    height: int,
    width: int,
    background: Sequence[float] | Tensor = (0.0, 0.0, 0.0),
) -> Rendering:
    """Like model.rasterizer.render, by gsplat for float32 tensors on a CUDA device where it can run."""
    tensors = as_tensors(splats, world_to_camera.device)
    place = tensors.positions
    if not (place.is_cuda and place.dtype == torch.float32 and len(place) and is_available()):
        return rasterizer.render(
            tensors, world_to_camera, intrinsics, height=height, width=width, background=background
        )
    check_camera(world_to_camera, intrinsics, height, width)
    behind = torch.as_tensor(background).to(place)
    if behind.shape != (3,):
        raise ShapeError(f"background {list(behind.shape)}; wanted RGB, [3]")
    given = arguments(tensors, world_to_camera, intrinsics, height=height, width=width)
    colours, alphas, _ = importlib.import_module("gsplat").rasterization(**given)
    alpha = alphas[0, ..., 0]
    return Rendering(colours[0] + (1 - alpha[..., None]) * behind, alpha)


def arguments(
    splats: SplatTensors, world_to_camera: Tensor, intrinsics: Tensor, *, height: int, width: int
) -> dict[str, Any]:
    """What gsplat.rasterization takes for one camera. Its pixel (row, column) has its centre at (column, row) + 0.5."""
    size = splats.positions.new_tensor([[width], [height], [1]])
    return {
        "means": splats.positions,
        "quats": splats.rotations,
        "scales": splats.scales,
        "opacities": splats.opacities[:, 0],
        "colors": splats.colours,
        "viewmats": world_to_camera.detach().to(splats.positions)[None],
        "Ks": (intrinsics.detach().to(splats.positions) * size)[None],
        "width": width,
        "height": height,
        "near_plane": NEAR,
        "eps2d": BLUR,
        "rasterize_mode": "antialiased",
        "packed": False,
    }
