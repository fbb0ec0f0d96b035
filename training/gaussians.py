"""Train a small Gaussian decoder on meshes: voxels in, pictures of the Gaussians against pictures of the mesh.

`python -m training.gaussians MESHES OUT.safetensors` draws every mesh once, then steps until the time is over.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_views import SIDE, VIEWS, normalize, on_black, render_views, sphere_cameras
from media.multiview import voxelize
from media.types import Voxels
from model import Tokenizer, weights
from model.gaussian_decoder import GaussianDecoder
from model.image_metrics import psnr, ssim
from model.rasterizer import render
from training.gaussian_start import colour_start
from training.perceptual import LPIPS, load_lpips
from training.rendered import RenderedWeights, rendered_loss
from training.teachers import COMMANDS, verify
from training.vgg import VGG16, load_vgg

LIMITS = Limits.local()
TARGETS, TARGET_SIDE = 24, 512
HELD_OUT, SCORED_SIDE = 6, 256
CROP = 256
"""Side of the pictures that are compared: a whole view, halved, or a piece of it as it was drawn, so that training sees
objects from far and from near."""
MOST_VOXELS = 12_000
"""Larger objects are left out: a step would take too long on two cores."""


@dataclass(frozen=True, kw_only=True)
class Object:
    """One mesh, ready to train on. feats: float32 [n, 768] in -1..1, from the renders and after the tokenizer.

    coords: int64 [n, 4], (0, x, y, z). pictures: uint8 [V, S, S, 3], on black, from cameras that made no voxel.
    """

    name: str
    feats: Tensor
    decoded: Tensor
    coords: Tensor
    pictures: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor


def prepare(path: Path, tokenizer: Tokenizer, views: int, side: int, turn: float) -> Object:
    """Read, draw and voxelize one mesh; targets: so many views. Raises MediaError."""
    data = path.read_bytes()
    format = asset_format(data) or ""
    mesh = load_mesh_archive(open_archive(data, LIMITS), LIMITS) if format == "zip" else load_mesh(data, format, LIMITS)
    mesh = normalize(mesh)
    voxels = voxelize(render_views(mesh, sphere_cameras(VIEWS), SIDE))
    # Twice the size, halved: an edge of the target is as soft as one of the Gaussians.
    shown = render_views(mesh, sphere_cameras(views, turn=turn), 2 * side)
    pictures = np.stack([_halved(on_black(image)) for image in shown.images])
    (back,) = tokenizer.decode(tokenizer.encode([voxels]))
    assert isinstance(back, Voxels)
    return Object(
        name=path.name,
        feats=2 * torch.from_numpy(voxels.feats) - 1,
        decoded=2 * torch.from_numpy(back.feats) - 1,
        coords=torch.nn.functional.pad(torch.from_numpy(voxels.coords).long(), (1, 0)),
        pictures=torch.from_numpy(pictures),
        world_to_camera=torch.from_numpy(shown.cameras.world_to_camera),
        intrinsics=torch.from_numpy(shown.cameras.intrinsics),
    )


@dataclass(frozen=True, kw_only=True)
class Shot:
    """What one step looks at. picture: uint8 [S, S, 3]; world_to_camera: [4, 4]; intrinsics: [3, 3], 0..1."""

    picture: Tensor
    world_to_camera: Tensor
    intrinsics: Tensor


def take_shot(item: Object, chance: np.random.Generator, side: int = CROP) -> Shot:
    """A random view of at most `side` pixels: as often all of it in fewer pixels as a piece of it in all of them."""
    view = int(chance.integers(len(item.pictures)))
    picture, intrinsics = item.pictures[view], item.intrinsics[view]
    whole = len(picture)
    if whole > side:
        if chance.random() < 0.5:
            picture = torch.from_numpy(_halved(picture.numpy()))
        else:
            # Around the middle of a pixel that shows something: a piece of black teaches nothing.
            shown = picture.any(dim=2).nonzero()
            middle = shown[int(chance.integers(len(shown)))] if len(shown) else torch.tensor([whole // 2] * 2)
            top, left = (middle - side // 2).clamp(0, whole - side).tolist()
            picture = picture[top : top + side, left : left + side]
            intrinsics = intrinsics.clone()
            intrinsics[:2] *= whole / side
            intrinsics[0, 2] -= left / side
            intrinsics[1, 2] -= top / side
    return Shot(picture=picture, world_to_camera=item.world_to_camera[view], intrinsics=intrinsics)


Perceptual = tuple[VGG16, LPIPS]
"""Networks of the LPIPS term."""


def loss_of(
    net: GaussianDecoder, item: Object, feats: Tensor, shot: Shot, perceptual: Perceptual | None = None
) -> Tensor:
    """Of one rendered view: L1, SSIM and, where its networks are given (none ships), LPIPS."""
    splats = net.splats(net(feats, item.coords), item.coords)
    return rendered_loss(
        splats, shot.picture, shot.world_to_camera, shot.intrinsics, weights=RenderedWeights(), perceptual=perceptual
    )


def perceptual_of(vgg: Path | None, lpips: Path | None) -> Perceptual | None:
    """Networks of the LPIPS term from their files, or None without both.

    Raises FileNotFoundError for one that is not there or not given with the other, and how to get it; ValueError for
    one of another size or checksum.
    """
    paths = {"vgg": vgg, "lpips": lpips}
    if not any(paths.values()):
        return None
    absent = [name for name, path in paths.items() if path is None or not path.is_file()]
    if absent or vgg is None or lpips is None:
        raise FileNotFoundError(
            "; ".join(f"--{name} {paths[name] or 'not given'}: no such file. {COMMANDS[name]}" for name in absent)
        )
    verify(vgg)
    verify(lpips)
    return load_vgg(vgg), load_lpips(lpips)


@torch.inference_mode()
def score(net: GaussianDecoder, items: Sequence[Object]) -> dict[str, float]:
    """Mean PSNR and SSIM over all views of all objects, from what the tokenizer gives back."""
    found = []
    for item in items:
        splats = net.splats(net(item.decoded, item.coords), item.coords)
        side = item.pictures.shape[1]
        for view, picture in enumerate(item.pictures):
            seen = render(splats, item.world_to_camera[view], item.intrinsics[view], height=side, width=side).colour
            seen, wanted = seen.clamp(0, 1), picture.float() / 255
            found.append((float(psnr(seen, wanted)), float(ssim(seen, wanted))))
    mean = np.mean(found, axis=0)
    return {"psnr": round(float(mean[0]), 3), "ssim": round(float(mean[1]), 4)}


def train(
    items: Sequence[Object],
    *,
    seconds: float,
    steps: int,
    rate: float,
    seed: int,
    log: Path | None = None,
    perceptual: Perceptual | None = None,
) -> tuple[GaussianDecoder, int]:
    """Train from the colour start until the time or the steps are over; returns the decoder and the steps taken.

    log: a file that gets the lines, too. perceptual: adds the LPIPS term.
    """
    net = colour_start(seed=seed)
    chance = np.random.default_rng(seed)
    optimizer = AdamW(net.parameters(), lr=rate, weight_decay=0.01)
    begin, losses = time.monotonic(), []
    taken = 0
    while taken < steps and time.monotonic() - begin < seconds:
        item = items[int(chance.integers(len(items)))]
        feats = item.feats if chance.random() < 0.3 else item.decoded
        loss = loss_of(net, item, feats, take_shot(item, chance), perceptual)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {taken}: the loss of {item.name} is {float(loss.detach())}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            # Whichever runs out first, time or steps, ends the cosine.
            group["lr"] = rate * _share(taken, max(taken / steps, (time.monotonic() - begin) / seconds))
        optimizer.step()
        taken += 1
        losses.append(float(loss.detach()))
        if taken % 50 == 0:
            line = {"step": taken, "loss": round(float(np.mean(losses[-50:])), 5), "s": round(time.monotonic() - begin)}
            print(json.dumps(line), flush=True)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return net.eval(), taken


def _share(taken: int, progress: float) -> float:
    """Of the rate: a warm-up of 30 steps, then a cosine down to a hundredth."""
    return min(1.0, (taken + 1) / 30) * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def _halved(picture: np.ndarray) -> np.ndarray:
    side = len(picture) // 2
    blocks = picture.reshape(side, 2, side, 2, 3).astype(np.uint16)
    return ((blocks.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m training.gaussians`."""
    parser = argparse.ArgumentParser(description="Train a small Gaussian decoder on a folder of meshes.")
    parser.add_argument("meshes", type=Path, help="folder with train/ and eval/, of mesh files")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", default="tiny-continuous")
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vgg", type=Path, metavar="FILE", help="torchvision's VGG16, with --lpips: adds that term")
    parser.add_argument("--lpips", type=Path, metavar="FILE", help="published heads of VGG")
    given = parser.parse_args(arguments)
    try:
        perceptual = perceptual_of(given.vgg, given.lpips)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    tokenizer = Tokenizer.load(given.tokenizer, device="cpu")
    sets: dict[str, list[Object]] = {"train": [], "eval": []}
    for name, items in sets.items():
        views, side, turn = (TARGETS, TARGET_SIDE, 0.3) if name == "train" else (HELD_OUT, SCORED_SIDE, 0.6)
        for path in sorted((given.meshes / name).iterdir()):
            if path.name.startswith("large_bunny"):  # the eval bunny in finer triangles
                continue
            try:
                item = prepare(path, tokenizer, views, side, turn)
            except MediaError as error:
                print(f"{path.name} is left out: {error}", flush=True)
                continue
            if name == "eval" or len(item.coords) <= MOST_VOXELS:
                items.append(item)
    start = score(colour_start(seed=given.seed), sets["eval"])
    print(json.dumps({"objects": {name: len(items) for name, items in sets.items()}, "start": start}), flush=True)
    net, taken = train(
        sets["train"],
        seconds=given.seconds,
        steps=given.steps,
        rate=given.rate,
        seed=given.seed,
        perceptual=perceptual,
    )
    end = score(net, sets["eval"])
    print(json.dumps({"steps": taken, "end": end}), flush=True)
    note = (
        f"small, trained on {len(sets['train'])} meshes: over {len(sets['eval'])} others it gives {end['psnr']:.1f} dB "
        f"at {SCORED_SIDE} pixels from views that made no voxel; not to be compared with the published decoder"
    )
    weights.save(net, given.output, dtype=torch.float16, metadata={weights.NOTE_KEY: note})


if __name__ == "__main__":
    main()
