"""Every kind of conformance case: those of the model, and those that need media beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from safetensors.numpy import load_file

from media.cameras import read_transforms
from media.multiview import Views, choose_patches, prepare_images, surface_points, voxelize
from media.ply import encode_ply
from model.config import GaussianConfig
from model.splats import Splats
from model.verify_cases import KINDS, Arrays, Kind, read_json


def _run_multiview(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    names, cameras = read_transforms(read_json(folder / "transforms.json"))
    views = Views(
        images=[np.asarray(PILImage.open(folder / name)) for name in names],
        depths=[np.load(folder / f"{Path(name).stem}_depth.npy") for name in names],
        cameras=cameras,
    )
    voxels = voxelize(views)
    # Cells whose face lies within rounding of a point may be there or not.
    either = load_file(folder / "ambiguity.safetensors")["ambiguous_coords"]
    sure = ~(voxels.coords[:, None] == either).all(axis=2).any(axis=1)
    coords = voxels.coords[sure]
    choice = choose_patches(coords, cameras)
    return {
        "coords": coords,
        "feats_u8": np.rint(voxels.feats[sure] * 255).astype(np.uint8),
        "view_row_col": np.stack([choice.view, choice.row, choice.column], axis=1),
        "chosen_uv": choice.uv,
        "images_256_u8": prepare_images(views.images),
        "intrinsics": cameras.intrinsics,
        "world_to_camera": cameras.world_to_camera,
        "surface_points": np.concatenate(list(surface_points(views)))[::16],
    }


def _run_ply(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    splats = Splats(
        **{name: torch.from_numpy(array).to(device) for name, array in inputs.items()}, config=GaussianConfig()
    )
    header, _, body = encode_ply(splats.to_record()).partition(b"end_header\n")
    names = [line.split()[-1].decode() for line in header.splitlines() if line.startswith(b"property float ")]
    table = np.frombuffer(body, "<f4").reshape(-1, len(names))
    covariances = splats.covariances().reshape(-1, 9)[:, [0, 1, 2, 4, 5, 8]]
    activated = {
        "xyz": splats.positions(),
        "scaling": splats.scales(),
        "rotation": splats.rotations(),
        "opacity": splats.opacities(),
        "covariance6": covariances,
    }
    return {name: table[:, column] for column, name in enumerate(names)} | {
        f"activated.{name}": tensor.cpu().numpy() for name, tensor in activated.items()
    }


ALL_KINDS: dict[str, Kind] = {**KINDS, "multiview_pack": _run_multiview, "gaussian_ply": _run_ply}
