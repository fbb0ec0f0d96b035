"""Pictures and films of a folder, and the random crops of one training step.

A step's batch depends on (seed, step) alone, so that a run can be resumed anywhere without any loader state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from media.types import Image, Item, UInt8Array, Video, Voxels
from model.config import VOXEL_GRID, ModelConfig
from model.packed import PackedTokens, pack, plan_windows
from model.patchify import coords_of, layout_of, patchify
from training.config import DataConfig

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".webm", ".mkv"}
MAX_FILM_FRAMES = 256
VALIDATION_SHARE = 16
"""One picture in so many is held aside; checkpoints and recipes are compared on those, never on the eval split."""

SHEET_SIDE = 8
"""Rows and columns of tokens of a sheet."""

LANCZOS = PIL.Image.Resampling.LANCZOS


@dataclass(frozen=True)
class Library:
    """What a run draws from.

    pictures: RGB or, for cut-outs, RGBA. films: uint8 [T, H, W, 3]. sets: voxels of meshes.
    """

    pictures: tuple[PIL.Image.Image, ...]
    films: tuple[UInt8Array, ...]
    sets: tuple[Voxels, ...] = ()


def picture_paths(folder: Path) -> list[Path]:
    """Image files of a folder, sorted. Raises FileNotFoundError if there is none."""
    paths = (
        sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES) if folder.is_dir() else []
    )
    if not paths:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder")
    return paths


def is_validation(path: Path) -> bool:
    """Whether a training picture is held aside; by its name, so that new files do not move old ones."""
    return hashlib.sha256(path.name.encode()).digest()[0] % VALIDATION_SHARE == 0


def read_picture(path: Path) -> PIL.Image.Image:
    """One picture, upright: RGB, or RGBA where it has transparency."""
    with PIL.Image.open(path) as file:
        upright = PIL.ImageOps.exif_transpose(file)
        has_alpha = "A" in upright.getbands() or "transparency" in upright.info
        picture = upright.convert("RGBA" if has_alpha else "RGB")
    picture.load()
    return picture


def flatten(picture: PIL.Image.Image, colour: tuple[int, int, int] = (255, 255, 255)) -> PIL.Image.Image:
    """A cut-out over a colour; other pictures as they are."""
    if picture.mode != "RGBA":
        return picture
    ground = PIL.Image.new("RGB", picture.size, colour)
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def read_film(path: Path, max_frames: int = MAX_FILM_FRAMES) -> UInt8Array:
    """The first frames of a film, uint8 [T, H, W, 3]."""
    frames: list[UInt8Array] = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False))
            if len(frames) == max_frames:
                break
    return np.stack(frames)


def films_of(folder: Path) -> Iterator[tuple[str, UInt8Array]]:
    """Name and frames of every film of a folder, sorted."""
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                yield path.name, read_film(path)


def load_library(data: Path, more: Sequence[Path] = ()) -> Library:
    """The train split under a data folder (`images/train`, `videos/train`), without the pictures held aside.

    more: folders with other pictures.
    """
    paths = [path for path in picture_paths(data / "images" / "train") if not is_validation(path)]
    films = tuple(film for _, film in films_of(data / "videos" / "train"))
    pictures = tuple(read_picture(path) for path in paths)
    return Library(pictures=pictures + load_pictures(more).pictures, films=films)


def load_pictures(folders: Sequence[Path]) -> Library:
    """Every picture of these folders, and no films."""
    paths = [path for folder in folders for path in picture_paths(folder)]
    return Library(pictures=tuple(read_picture(path) for path in paths), films=())


def centre_crop(picture: UInt8Array, side: int) -> UInt8Array:
    """The middle `side` x `side` pixels of uint8 [..., H, W, 3], less where it is smaller (whole patches of 16)."""
    height, width = (min(side, size // 16 * 16) for size in picture.shape[-3:-1])
    top, left = (picture.shape[-3] - height) // 2, (picture.shape[-2] - width) // 2
    return picture[..., top : top + height, left : left + width, :]


def random_crop(rng: np.random.Generator, library: Library, height: int, width: int) -> UInt8Array:
    """One augmented image crop, uint8 [height, width, 3]."""
    if rng.random() < 0.5:
        height, width, turned = width, height, True
    else:
        turned = False
    picture = library.pictures[rng.integers(len(library.pictures))]
    box = random_box(rng, picture.size, (width, height))
    crop = picture.resize((width, height), LANCZOS, box=box, reducing_gap=3.0)
    pixels = np.asarray(over_something(rng, library, crop))
    if turned:
        pixels = pixels.transpose(1, 0, 2)
    return _augment(rng, pixels[None])[0]


def random_clip(rng: np.random.Generator, library: Library, config: DataConfig, frames: int, side: int) -> UInt8Array:
    """One augmented clip, uint8 [frames, side, side, 3]: cut from a film, or a window that moves over a photograph."""
    if not library.films or rng.random() < config.panned:
        clip = _panned_clip(rng, library, frames, side)
    else:
        clip = _film_clip(rng, library, frames, side)
    return _augment(rng, clip)


def random_sheet(rng: np.random.Generator, library: Library) -> Voxels:
    """A stand-in for a voxel set: overlapping patches of a photograph on a tilted sheet in the 64 x 64 x 64 grid.

    A voxel's patch is what a view shows around it, so that neighbours overlap; no mesh is rendered for this.
    """
    stride = int(rng.choice([4, 8, 16]))
    side = (SHEET_SIDE - 1) * stride + 16
    crop = random_crop(rng, library, side, side)
    windows = np.lib.stride_tricks.sliding_window_view(crop, (16, 16), axis=(0, 1))[::stride, ::stride]
    feats = windows.transpose(0, 1, 3, 4, 2).reshape(SHEET_SIDE**2, -1).astype(np.float32) / np.float32(255)
    i, j = np.indices((SHEET_SIDE, SHEET_SIDE)).reshape(2, -1)
    depth = np.rint(rng.uniform(-1, 1) * i + rng.uniform(-1, 1) * j).astype(np.int64)
    axes = np.stack([i, j, depth - depth.min()])[rng.permutation(3)]
    start = [rng.integers(0, VOXEL_GRID - axis.max()) for axis in axes]
    coords = (axes.T + np.array(start)).astype(np.int32)
    return Voxels(coords=coords, feats=feats)


def piece_of(rng: np.random.Generator, voxels: Voxels, most: int) -> Voxels:
    """The `most` voxels nearest to a random one: a piece as dense as the whole."""
    if len(voxels.coords) <= most:
        return voxels
    centre = voxels.coords[rng.integers(len(voxels.coords))].astype(np.int64)
    distance = np.square(voxels.coords.astype(np.int64) - centre).sum(1)
    rows = np.sort(np.argpartition(distance, most)[:most])
    return Voxels(coords=voxels.coords[rows], feats=voxels.feats[rows])


def training_batch(seed: int, step: int, library: Library, config: DataConfig, model: ModelConfig) -> PackedTokens:
    """The packed batch of one step: image crops of one size, clips, sheets. feats: patches [N, P] in -1..1."""
    rng = np.random.default_rng([seed, step])
    rows, columns = config.grids[rng.integers(len(config.grids))]
    items: list[Item] = [
        Image(pixels=random_crop(rng, library, 16 * rows, 16 * columns))
        for _ in range(-(-config.image_tokens // (rows * columns)))
    ]
    left = config.clip_tokens
    while left > 0:
        frames = int(rng.choice(config.clip_frames))
        grid = config.clip_grids[rng.integers(len(config.clip_grids))]
        items.append(Video(frames=random_clip(rng, library, config, frames, 16 * grid[0])))
        left -= frames // 4 * grid[0] * grid[1]
    items += [random_sheet(rng, library) for _ in range(config.sheets)]
    if library.sets:
        for _ in range(config.pieces):
            voxels = library.sets[rng.integers(len(library.sets))]
            items.append(piece_of(rng, voxels, int(rng.choice(config.piece_tokens))))
    return pack_items(items, model)


def pack_items(items: Sequence[Item], model: ModelConfig) -> PackedTokens:
    """Items to one packed batch, by the same functions as in serving."""
    spans, patches, coords, moving = [], [], [], []
    for index, item in enumerate(items):
        layout = layout_of(item, model)
        places = torch.from_numpy(coords_of(item, layout))
        feats = patchify(item, layout, model)
        for span in plan_windows(places, index, model.window):
            spans.append(span)
            patches.append(feats[span.start : span.stop])
            coords.append(places[span.start : span.stop])
            moving.append(item.kind == "video")
    return pack(spans, patches, coords, moving, model.window)


def random_box(
    rng: np.random.Generator, size: tuple[int, int], wanted: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A window of a picture to be resized to `wanted`: shrunk by up to 4, enlarged only where it is too small."""
    most = min(size[0] / wanted[0], size[1] / wanted[1])
    least = min(1.0, most)
    scale = float(np.exp(rng.uniform(np.log(least), np.log(max(least, min(most, 4.0))))))
    stretch = float(np.exp(rng.uniform(-0.1, 0.1)))
    w = min(size[0], wanted[0] * scale * stretch)
    h = min(size[1], wanted[1] * scale / stretch)
    if rng.random() < 0.3 and most >= 1:  # as it was shot, no resampling at all
        w, h = wanted
        left, top = int(rng.integers(size[0] - w + 1)), int(rng.integers(size[1] - h + 1))
        return (left, top, left + w, top + h)
    x, y = rng.uniform(0, size[0] - w), rng.uniform(0, size[1] - h)
    return (x, y, x + w, y + h)


def over_something(
    rng: np.random.Generator, library: Library, picture: PIL.Image.Image, white: float = 0.3, coloured: float = 0.2
) -> PIL.Image.Image:
    """A cut-out over white, a colour, or a piece of a photograph; other pictures as they are.

    white, coloured: how often the first two, the rest is photographs.
    """
    if picture.mode != "RGBA":
        return picture
    kind = rng.random()
    if kind < white:
        return flatten(picture)
    if kind < white + coloured:
        r, g, b = (int(value) for value in rng.integers(0, 256, 3))
        return flatten(picture, (r, g, b))
    for _ in range(8):
        other = library.pictures[rng.integers(len(library.pictures))]
        if other.mode == "RGB":
            break
    ground = flatten(other).resize(picture.size, LANCZOS, box=random_box(rng, other.size, picture.size))
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def _panned_clip(rng: np.random.Generator, library: Library, frames: int, side: int) -> UInt8Array:
    for _ in range(8):
        picture = library.pictures[rng.integers(len(library.pictures))]
        if min(picture.size) >= 1.5 * side:
            break
    picture = flatten(picture)
    x0, y0, x1, y1 = random_box(rng, picture.size, (side, side))
    size = np.array([x1 - x0, y1 - y0])
    centre = np.array([x0 + x1, y0 + y1]) / 2
    speed = rng.normal(size=2) * rng.choice([0.0, 0.5, 2.0, 5.0]) * size / side  # pixels of the clip a frame
    zoom = rng.normal() * rng.choice([0.0, 0.003, 0.01])
    clip = []
    for t in range(frames):
        now = np.minimum(size * np.exp(zoom * t), picture.size)
        low = np.clip(centre + speed * t - now / 2, 0, np.array(picture.size) - now)
        box = (low[0], low[1], low[0] + now[0], low[1] + now[1])
        clip.append(np.asarray(picture.resize((side, side), LANCZOS, box=box, reducing_gap=3.0)))
    return np.stack(clip)


def _film_clip(rng: np.random.Generator, library: Library, frames: int, side: int) -> UInt8Array:
    film = library.films[rng.integers(len(library.films))]
    stride = int(rng.integers(1, 4))
    stride = max(1, min(stride, (len(film) - 1) // max(1, frames - 1)))
    start = int(rng.integers(max(1, len(film) - stride * (frames - 1))))
    cut = film[start : start + stride * (frames - 1) + 1 : stride]
    box = random_box(rng, (film.shape[2], film.shape[1]), (side, side))
    pictures = (PIL.Image.fromarray(frame) for frame in cut)
    return np.stack([np.asarray(picture.resize((side, side), LANCZOS, box=box)) for picture in pictures])


def _augment(rng: np.random.Generator, clip: UInt8Array) -> UInt8Array:
    """Flips and a mild change of brightness, contrast and saturation. clip: uint8 [T, H, W, 3]."""
    if rng.random() < 0.5:
        clip = clip[:, :, ::-1]
    if rng.random() < 0.5:
        clip = clip[:, ::-1]
    if rng.random() < 0.5:
        levels = clip.astype(np.float32)
        grey = levels.mean(axis=-1, keepdims=True)
        saturation = 0.0 if rng.random() < 0.1 else rng.uniform(0.7, 1.3)
        levels = grey + (levels - grey) * np.float32(saturation)
        levels = (levels - 128) * np.float32(rng.uniform(0.8, 1.2)) + 128 + np.float32(rng.uniform(-20, 20))
        clip = (levels + 0.5).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(clip)
