"""Held-out figures of a small model beside per-patch PCA and JPEG: what `training.evaluate` does without a protocol.

Every picture is cut to its centre, encoded, decoded and rounded to 8 bits; PSNR and SSIM are means over pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from media.types import Image, Item, UInt8Array, Video
from model import Tokenizer
from model.config import ModelConfig
from model.patchify import to_uint8, unpatchify
from training.data import centre_crop, films_of, flatten, is_validation, picture_paths, read_picture
from training.metrics import psnr, ssim
from training.pca import Components, fit_components, moving_patches, patches_of, still_patches

Codec = Callable[[UInt8Array], UInt8Array]

CLIP_FRAMES = 16
VALIDATION_SIDE = 192
"""Pictures held aside from training are small; those under this side are left out of the score."""


@dataclass(frozen=True)
class Score:
    """Means over `count` pictures or clips."""

    name: str
    count: int
    psnr: float
    ssim: float

    def __str__(self) -> str:
        return f"{self.name:34} {self.count:4} {self.psnr:7.2f} {self.ssim:7.4f}"


def eval_pictures(data: Path, split: str, side: int) -> Iterator[UInt8Array]:
    """Centre crops, uint8 [H, W, 3], of `images/eval`, or with split="validation" of training pictures held aside."""
    if split == "eval":
        paths = picture_paths(data / "images" / "eval")
    else:
        paths = [path for path in picture_paths(data / "images" / "train") if is_validation(path)]
    for path in paths:
        picture = flatten(read_picture(path))
        if split == "eval" or min(picture.size) >= VALIDATION_SIDE:
            yield centre_crop(np.asarray(picture), side)


def eval_clips(data: Path, side: int) -> Iterator[UInt8Array]:
    """Centre crops, uint8 [16, H, W, 3], from the start and the middle of every film of `videos/eval`."""
    for _, film in films_of(data / "videos" / "eval"):
        for start in {0, max(0, len(film) - CLIP_FRAMES) // 2}:
            yield centre_crop(film[start : start + CLIP_FRAMES], side)


def score(name: str, codec: Codec, originals: Sequence[UInt8Array]) -> Score:
    """Run a codec over pictures or clips."""
    pairs = [(original, codec(original)) for original in originals]
    return Score(
        name=name,
        count=len(pairs),
        psnr=float(np.mean([psnr(a, b) for a, b in pairs])),
        ssim=float(np.mean([ssim(a, b) for a, b in pairs])),
    )


def model_codec(tokenizer: Tokenizer) -> Codec:
    """Encode and decode as a user would, codes where the model has them."""
    output = "codes" if "codes" in tokenizer.outputs else "latents"

    def codec(pixels: UInt8Array) -> UInt8Array:
        item: Item = Image(pixels=pixels) if pixels.ndim == 3 else Video(frames=pixels)
        back = tokenizer.decode(tokenizer.encode([item], [output]))[0]
        return back.pixels if isinstance(back, Image) else back.frames  # type: ignore[union-attr]

    return codec


def pca_codec(components: Components, config: ModelConfig) -> Codec:
    """Every patch on its own: coefficients in float, no rounding but that of the pixels."""

    def codec(pixels: UInt8Array) -> UInt8Array:
        patches = patches_of(pixels, config)
        patches = components.decode(components.encode(patches))
        patches = torch.nn.functional.pad(patches, (0, config.patch_values - patches.shape[1]))
        frames = 1 if pixels.ndim == 3 else pixels.shape[0]
        grid = (-(-frames // config.patch[0]), pixels.shape[-3] // config.patch[1], pixels.shape[-2] // config.patch[2])
        decoded = to_uint8(unpatchify(patches, grid, config))
        return decoded[0] if pixels.ndim == 3 else decoded

    return codec


def jpeg_codec(bytes_per_patch: int) -> Codec:
    """The best JPEG (4:2:0, optimised) of at most so many bytes per 16 x 16 pixels; quality 1 where none is."""

    def codec(pixels: UInt8Array) -> UInt8Array:
        budget = bytes_per_patch * pixels.shape[0] * pixels.shape[1] // 256
        low, high = 1, 95
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(_jpeg(pixels, middle)) <= budget else (low, middle - 1)
        with PIL.Image.open(io.BytesIO(_jpeg(pixels, low))) as file:
            return np.asarray(file.convert("RGB"))

    return codec


def _jpeg(pixels: UInt8Array, quality: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def held_out(tokenizer: Tokenizer, data: Path, *, split: str = "eval", side: int = 256) -> tuple[list[Score], ...]:
    """Rows for images and rows for clips: PCA with as many components as latents, JPEG for a discrete model, model."""
    config = tokenizer.config
    count = config.latent_channels
    pictures = list(eval_pictures(data, split, side))
    images = [
        score(
            f"PCA {count}, {label}",
            pca_codec(fit_components(still_patches(data, config, most), count), config),
            pictures,
        )
        for label, most in (("pictures alike", 256), ("all patches alike", None))
    ]
    if config.codebooks:
        bytes_per_patch = config.latent_channels // 4
        images.append(score(f"JPEG, {bytes_per_patch} bytes a patch", jpeg_codec(bytes_per_patch), pictures))
    images.append(score(tokenizer.name, model_codec(tokenizer), pictures))
    clips = list(eval_clips(data, side)) if split == "eval" else []
    if not clips:
        return images, []
    moving = fit_components(moving_patches(data, config), count)
    films = fit_components(moving_patches(data, config, panned=0), count)
    rows = [
        score(f"PCA {count}, films and pans", pca_codec(moving, config), clips),
        score(f"PCA {count}, films", pca_codec(films, config), clips),
        score(tokenizer.name, model_codec(tokenizer), clips),
    ]
    return images, rows


def held_out_lines(tokenizer: Tokenizer, data: Path, *, split: str, side: int) -> list[str]:
    """The tables as they are printed. split: "eval" or "validation"; side: of the centre crop, pixels."""
    images, clips = held_out(tokenizer, data, split=split, side=side)
    lines = [f"{tokenizer.name} {tokenizer.revision[:12]}, {split}, centre {side} px"]
    for title, rows in (("images", images), (f"clips of {CLIP_FRAMES} frames", clips)):
        lines += ["", f"{title:34} {'n':>4} {'PSNR':>7} {'SSIM':>7}", *map(str, rows)]
    return lines
