"""A tokenizer run over a folder by a protocol: items in, coded as a user would, what came back into a tally.

T frames, H x W pixels, V views, n voxels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from media.errors import MediaError
from media.mesh_views import sphere_cameras
from media.types import Image, UInt8Array, Voxels
from media.voxel_file import load_voxels
from model import Tokenizer
from model.gaussian_decoder import GaussianDecoder
from model.rasterizer import render
from model.splat_decoder import SplatDecoder
from training.eval_items import LIMITS, VOXEL_SUFFIXES, Found, read_clip, read_image
from training.feature_nets import Networks
from training.gaussians import Object, prepare
from training.protocols import Protocol, resized
from training.tally import Result, Tally
from training.token_stats import TokenStats

BATCH = 8
"""Pictures or frames of one pass."""

TURN = 0.6
"""Of the held-out cameras around z, as in training.gaussians."""

CODINGS = ("clips", "frames as images", "frames as images of half the sides")
"""How a clip may be coded. A patch of a clip spans four frames: as images its frames take four times the tokens, as
images of half the sides as many as the clip."""


def evaluate(
    tokenizer: Tokenizer,
    protocol: Protocol,
    found: Found,
    networks: Networks,
    *,
    frames_as_images: bool = False,
    splats: SplatDecoder | None = None,
) -> list[Result]:
    """Run a protocol over what find_items found; one result a coding. splats: draws assets.

    Raises ValueError for files that cannot be read, and where nothing draws assets.
    """
    if found.kind == "image":
        return [_images(tokenizer, protocol, found, networks)]
    if found.kind == "video":
        codings = CODINGS if frames_as_images else CODINGS[:1]
        return _clips(tokenizer, protocol, found, networks, codings)
    if splats is None:
        raise ValueError("assets need a Gaussian decoder to be drawn")
    return [_assets(tokenizer, protocol, found, networks, splats.net)]


def _images(tokenizer: Tokenizer, protocol: Protocol, found: Found, networks: Networks) -> Result:
    tally = Tally(networks, "image", TokenStats.of(tokenizer.config), "images")
    for start in range(0, len(found.paths), BATCH):
        originals = [read_image(path, protocol) for path in found.paths[start : start + BATCH]]
        tally.pictures(originals, _coded(tokenizer, originals, tally.stats))
    return tally.result()


def _clips(
    tokenizer: Tokenizer, protocol: Protocol, found: Found, networks: Networks, codings: Sequence[str]
) -> list[Result]:
    tallies = [Tally(networks, "video", TokenStats.of(tokenizer.config), coding) for coding in codings]
    for path in found.paths:
        clip = read_clip(path, protocol)
        for tally in tallies:
            if tally.coding == CODINGS[0]:
                tokens = tokenizer.encode_video(iter(clip), [_output(tokenizer)])
                tally.stats.update(tokens)
                pieces = tokenizer.decode_stream(tokens)
            else:
                half = tally.coding == CODINGS[2]
                pieces = _as_images(tokenizer, clip, tally.stats, protocol.filter if half else None)
            tally.clip(path.name, clip, pieces)
    return [tally.result() for tally in tallies]


def _as_images(tokenizer: Tokenizer, clip: UInt8Array, stats: TokenStats, half: str | None) -> Iterator[UInt8Array]:
    """A clip coded frame by frame. half: the filter that halves the sides before and doubles them again after."""
    height, width = clip.shape[1:3]
    for start in range(0, len(clip), BATCH):
        frames = clip[start : start + BATCH]
        if half is not None:
            frames = resized(frames, -(-height // 2), -(-width // 2), half)
        backs = np.stack(_coded(tokenizer, list(frames), stats))
        yield backs if half is None else resized(backs, height, width, half)


def _assets(tokenizer: Tokenizer, protocol: Protocol, found: Found, networks: Networks, net: GaussianDecoder) -> Result:
    packs = [path for path in found.paths if path.suffix.lower() in VOXEL_SUFFIXES]
    if packs and len(packs) < len(found.paths):
        raise ValueError(
            f"{packs[0].name} is a voxel pack among meshes; a pack is compared with renders of its own voxels, "
            "a mesh with renders of the mesh: score them apart"
        )
    coding = "voxel packs, against renders of their own voxels" if packs else "meshes"
    tally = Tally(networks, "asset", TokenStats.of(tokenizer.config), coding)
    for path in found.paths:
        try:
            if packs:
                item = _pack(path, tokenizer, net, protocol)
            else:
                item = prepare(path, tokenizer, protocol.views, protocol.side, TURN)
        except MediaError as error:
            raise ValueError(f"{path}: {error.detail}") from None
        voxels = Voxels(coords=item.coords[:, 1:].int().numpy(), feats=((item.feats + 1) / 2).numpy())
        tally.stats.update(tokenizer.encode([voxels], [_output(tokenizer)])[0])
        tally.pictures(list(item.pictures.numpy()), list(views_of(net, item, item.decoded)))
    return tally.result()


@torch.inference_mode()
def views_of(net: GaussianDecoder, item: Object, feats: Tensor) -> UInt8Array:
    """What the cameras of an object see of its voxels through the Gaussian decoder, uint8 [V, S, S, 3].

    feats: [n, 768] in -1..1, the object's own or those that came back.
    """
    device = net.offset_perturbation.device
    splats = net.splats(net(feats.to(device), item.coords.to(device)), item.coords.to(device))
    side = item.pictures.shape[1]
    views = [
        render(splats, pose.to(device), k.to(device), height=side, width=side).colour
        for pose, k in zip(item.world_to_camera, item.intrinsics, strict=True)
    ]
    return torch.stack(views).clamp(0, 1).mul(255).round().to("cpu", torch.uint8).numpy()


def _pack(path: Path, tokenizer: Tokenizer, net: GaussianDecoder, protocol: Protocol) -> Object:
    """A voxel pack has no pictures: it is compared with what the Gaussian decoder makes of it before it is coded."""
    voxels = load_voxels(path.read_bytes(), LIMITS)
    (back,) = tokenizer.decode(tokenizer.encode([voxels]))
    assert isinstance(back, Voxels)
    cameras = sphere_cameras(protocol.views, turn=TURN)
    side = protocol.side
    item = Object(
        name=path.name,
        feats=2 * torch.from_numpy(voxels.feats) - 1,
        decoded=2 * torch.from_numpy(back.feats) - 1,
        coords=pad(torch.from_numpy(voxels.coords).long(), (1, 0)),
        pictures=torch.zeros(protocol.views, side, side, 3, dtype=torch.uint8),
        world_to_camera=torch.from_numpy(cameras.world_to_camera),
        intrinsics=torch.from_numpy(cameras.intrinsics),
    )
    item.pictures.copy_(torch.from_numpy(views_of(net, item, item.feats)))
    return item


def _coded(tokenizer: Tokenizer, pictures: Sequence[UInt8Array], stats: TokenStats) -> list[UInt8Array]:
    """Pictures encoded and decoded, as a user would."""
    tokens = tokenizer.encode([Image(pixels=picture) for picture in pictures], [_output(tokenizer)])
    for item in tokens:
        stats.update(item)
    return [item.pixels for item in tokenizer.decode(tokens) if isinstance(item, Image)]


def _output(tokenizer: Tokenizer) -> str:
    return "codes" if "codes" in tokenizer.outputs else "latents"
