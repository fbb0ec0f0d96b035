"""The pictures of the README: `python -m training.strips --data ../shared/data` writes them to docs/images.

Only files of the eval split that are public domain, CC0 or BSD are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from media.types import UInt8Array
from model import Tokenizer
from training.data import centre_crop, flatten, read_film, read_picture
from training.held_out import Codec, model_codec, pca_codec
from training.metrics import psnr
from training.pca import fit_components, moving_patches, still_patches

PICTURES = ("eval_astronaut.png", "eval_chelsea.png", "eval_coffee.png")
FILM = "tree.avi"
MODELS = ("tiny-continuous", "tiny-discrete")
SIDE = 256
CLIP_SIDE = 192
SHOWN_FRAMES = (0, 5, 10, 15)
MARGIN = 6
TITLE_ROWS = 24


def sheet(rows: Sequence[Sequence[UInt8Array]], titles: Sequence[str]) -> PIL.Image.Image:
    """Pictures of one size in a grid, a title over every column."""
    height, width = rows[0][0].shape[:2]
    canvas = PIL.Image.new(
        "RGB",
        (len(titles) * (width + MARGIN) - MARGIN, TITLE_ROWS + len(rows) * (height + MARGIN) - MARGIN),
        "white",
    )
    draw = PIL.ImageDraw.Draw(canvas)
    font = PIL.ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * (width + MARGIN) + 2, 3), title, fill="black", font=font)
        for row, pictures in enumerate(rows):
            place = (column * (width + MARGIN), TITLE_ROWS + row * (height + MARGIN))
            canvas.paste(PIL.Image.fromarray(pictures[column]), place)
    return canvas


def with_scores(
    codecs: Sequence[tuple[str, Codec]], originals: Sequence[UInt8Array]
) -> tuple[list[str], list[list[UInt8Array]]]:
    """Titles with the mean PSNR of what is shown, and for every original itself and its reconstructions."""
    titles, rows = ["original"], [[original] for original in originals]
    for name, codec in codecs:
        for row in rows:
            row.append(codec(row[0]))
        titles.append(f"{name}, {np.mean([psnr(row[0], row[-1]) for row in rows]):.1f} dB")
    return titles, rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both pictures; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.strips", description="Draw the pictures of the README.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args(arguments)
    tokenizers = [Tokenizer.load(name, device="cpu", dtype="float32") for name in MODELS]
    config = tokenizers[0].config
    models = [(tokenizer.name, model_codec(tokenizer)) for tokenizer in tokenizers]
    given.out.mkdir(parents=True, exist_ok=True)

    stills = pca_codec(fit_components(still_patches(given.data, config), config.latent_channels), config)
    paths = [given.data / "images" / "eval" / name for name in PICTURES]
    pictures = [centre_crop(np.asarray(flatten(read_picture(path))), SIDE) for path in paths]
    titles, rows = with_scores([*models, (f"PCA {config.latent_channels}", stills)], pictures)
    sheet(rows, titles).save(given.out / "reconstructions.png", optimize=True)

    clips = pca_codec(fit_components(moving_patches(given.data, config), config.latent_channels), config)
    clip = centre_crop(read_film(given.data / "videos" / "eval" / FILM, max(SHOWN_FRAMES) + 1), CLIP_SIDE)
    titles, rows = with_scores([*models, (f"PCA {config.latent_channels}", clips)], [clip])
    frames = [[part[frame] for part in rows[0]] for frame in SHOWN_FRAMES[1::2]]
    sheet(frames, [title.replace("tiny-", "") for title in titles]).save(given.out / "clip.png", optimize=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
