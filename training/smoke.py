"""`python -m training.train smoke`: the whole recipe in small, on drawn data with random teachers.

All four stages with every loss, a stop and a resume in the middle, pictures, weights that the tokenizer loads, figures
of drawn items, the loss of Gaussians. What it shows is that everything runs on this machine; what it trains is worth
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from torch.nn.functional import pad

from media.mesh_views import sphere_cameras
from media.types import Image, Video, Voxels
from model import Tokenizer
from model.splat_decoder import SplatDecoder
from training.chain import Work, run_stages
from training.curriculum import Habits, NotFiniteError
from training.eval_items import find_items
from training.eval_report import table
from training.evaluation import evaluate
from training.feature_nets import Networks
from training.generated import Generated, hash_tokens
from training.protocols import PROTOCOLS, Kind
from training.ranks import joined
from training.rendered import RenderedWeights, rendered_loss
from training.samples import voxels_bytes
from training.stages import Recipe, paper, scaled, stacks
from training.teachers import Teachers, random_teachers

STEPS = 9
"""A stage: one whole cycle of tasks."""

WIDTH = 64
SIDES = (32, 48)
EVALUATED: tuple[Kind, ...] = ("image", "video", "asset")


def smoke_recipe() -> Recipe:
    """Two blocks of width 64 on each side, pictures of 32 to 48 pixels."""
    base = stacks(WIDTH, 2, 2, 4 * WIDTH)
    small = scaled(paper(base, "smoke"), steps=STEPS, batch=4, distill=4, sides=SIDES, tokens=1024, warmup=2)
    # Random teachers give features of any size: weights as published would be dominated by one of them.
    return replace(small, weights=replace(small.weights, lpips=1.0, gram=1.0))


def smoke(folder: Path, log: Callable[[str], None] = print) -> int:
    """Run it; returns 0 if every stage ended and its weights load."""
    began = time.monotonic()
    recipe = smoke_recipe()
    source = Generated(sides=SIDES)
    work = Work(
        source=lambda _: source,
        shown=lambda _: Generated(seed=1, sides=SIDES),
        teachers=random_teachers(WIDTH, seed=0),
        tokenize=hash_tokens,
    )
    with joined() as ranks:
        habits = Habits(log_every=3, save_every=3, look_every=0)
        stopped = run_stages(recipe, folder, work, ranks, habits=habits, log=log, stop_at={"asset": 5})
        log(f"stopped on purpose in the third stage (done: {stopped}); going on")
        done = run_stages(recipe, folder, work, ranks, habits=habits, log=log)
    for stage in recipe.stages:
        path = folder / f"{stage.name}.safetensors"
        tokenizer = Tokenizer.load(str(path), device="cpu")
        item = source.draw("image_rec", [0])[0].item
        back = tokenizer.decode(tokenizer.encode([item]))[0]
        log(f"{path.name}: a {item.kind} comes back as a {back.kind}")
    _evaluate(tokenizer, work.teachers, folder / "evaluation", log)
    log(f"smoke run of {len(recipe.stages)} stages: {time.monotonic() - began:.0f} s; look at {folder / 'pictures'}")
    return 0 if done and not stopped else 1


def _evaluate(tokenizer: Tokenizer, teachers: Teachers, folder: Path, log: Callable[[str], None]) -> None:
    """Figures of two drawn pictures, a clip and a voxel pack, as `training.evaluate` gives them, and a 3D loss."""
    drawn = Generated(seed=2, sides=SIDES)
    for name in EVALUATED:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, sample in enumerate(drawn.draw("image_rec", [0, 1])):
        assert isinstance(sample.item, Image)
        PIL.Image.fromarray(sample.item.pixels).save(folder / "image" / f"{number}.png")
    (clip, pack) = (drawn.draw(kind, [0])[0].item for kind in ("video_rec", "asset_rec"))
    assert isinstance(clip, Video)
    assert isinstance(pack, Voxels)
    for number, frame in enumerate(clip.frames):
        PIL.Image.fromarray(frame).save(folder / "video" / f"{number:03d}.png")
    (folder / "asset" / "pack.safetensors").write_bytes(voxels_bytes(pack))
    protocol = replace(PROTOCOLS["plain"], views=2, side=64)
    networks = Networks(lpips=lambda one, other: teachers.lpips(teachers.vgg, one, other))
    splats = SplatDecoder.load("tiny-splats", device="cpu")
    for name in EVALUATED:
        found = find_items(folder / name, name)
        for line in table(
            tokenizer.name, protocol, found, evaluate(tokenizer, protocol, found, networks, splats=splats)
        ):
            log(line)
    log(f"loss of Gaussians, L1 + LPIPS + SSIM of a view: {_rendered(pack, splats, teachers):.4f}")


def _rendered(pack: Voxels, splats: SplatDecoder, teachers: Teachers) -> float:
    """One step's loss of a Gaussian decoder, and its gradients. The view that is wanted is black."""
    cameras = sphere_cameras(1)
    feats, coords = torch.from_numpy(2 * pack.feats - 1), pad(torch.from_numpy(pack.coords).long(), (1, 0))
    net = splats.net.requires_grad_(True)
    loss = rendered_loss(
        net.splats(net(feats, coords), coords),
        torch.zeros(64, 64, 3, dtype=torch.uint8),
        torch.from_numpy(cameras.world_to_camera[0]),
        torch.from_numpy(cameras.intrinsics[0]),
        weights=RenderedWeights(),
        perceptual=(teachers.vgg, teachers.lpips),
    )
    loss.backward()
    if not all(value.grad is None or value.grad.isfinite().all() for value in net.parameters()):
        raise NotFiniteError("the gradients of the loss of Gaussians are not finite")
    return float(loss.detach())
