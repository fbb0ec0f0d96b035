"""The weights in the package: small enough, and better than what they started from, on pictures they never saw."""

from collections.abc import Iterator

import numpy as np
import pytest

from media.types import Image, UInt8Array, Video
from model import Tokenizer
from model.tokenizer import BUNDLED
from tests.paths import DATA, needs_data
from training.held_out import eval_clips, eval_pictures, model_codec, pca_codec, score
from training.metrics import psnr
from training.pca import fit_components, still_patches

NAMES = ("tiny-continuous", "tiny-discrete")


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[UInt8Array]]:
    return list(eval_pictures(DATA, "eval", 256))


def load(name: str) -> Tokenizer:
    return Tokenizer.load(name, device="cpu", dtype="float32")


def test_size_and_cards() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 15e6
    for name in NAMES:
        assert "Held-out figures" in (BUNDLED / f"{name}.md").read_text()


@needs_data
def test_continuous_beats_pca(pictures: list[UInt8Array]) -> None:
    tokenizer = load("tiny-continuous")
    config = tokenizer.config
    model = score("model", model_codec(tokenizer), pictures)
    pca = score("PCA", pca_codec(fit_components(still_patches(DATA, config), 48), config), pictures)
    assert model.psnr >= pca.psnr + 0.05
    assert model.ssim >= pca.ssim


@needs_data
def test_eight_codes_beat_eight_floats(pictures: list[UInt8Array]) -> None:
    tokenizer = load("tiny-discrete")
    config = tokenizer.config
    model = score("model", model_codec(tokenizer), pictures)
    pca = score("PCA", pca_codec(fit_components(still_patches(DATA, config), config.codebooks), config), pictures)
    assert model.psnr > pca.psnr + 0.5
    assert model.ssim > pca.ssim


@needs_data
def test_latents_have_about_unit_variance_and_a_narrow_posterior(pictures: list[UInt8Array]) -> None:
    tokenizer = load("tiny-continuous")
    items = [Image(pixels=picture) for picture in pictures]
    means = tokenizer.encode(items)
    every = np.concatenate([tokens.latents for tokens in means])
    assert 0.5 < every.std() < 2
    drawn = tokenizer.encode(items, seeds=list(range(len(items))))
    noise = np.concatenate([tokens.latents for tokens in drawn]) - every
    assert 1e-4 < noise.std() < 0.3
    kept, sampled = (
        np.mean([psnr(p, back.pixels) for p, back in zip(pictures, tokenizer.decode(tokens), strict=True)])
        for tokens in (means, drawn)
    )
    assert kept - 0.3 < sampled < kept


@needs_data
@pytest.mark.parametrize("name", NAMES)
def test_clips_come_back(name: str) -> None:
    tokenizer = load(name)
    clip = next(eval_clips(DATA, 128))
    assert score(name, model_codec(tokenizer), [clip]).psnr > 22
    still = np.repeat(clip[:1], 8, axis=0)
    image, video = tokenizer.decode(tokenizer.encode([Image(pixels=still[0]), Video(frames=still)]))
    # Standing still is the easiest film there is: each frame about as good as the picture.
    assert score("", lambda _: video.frames, [still]).psnr > score("", lambda _: image.pixels, [still[0]]).psnr - 3


@pytest.mark.parametrize("colour", [(128, 128, 128), (90, 140, 200), (210, 205, 195), (40, 45, 60), (60, 110, 60)])
def test_a_wall_of_one_colour_comes_back_without_speckle(colour: tuple[int, int, int]) -> None:
    tokenizer = load("tiny-discrete")
    wall = np.full((64, 64, 3), colour, np.uint8)
    back = tokenizer.decode(tokenizer.encode([Image(pixels=wall)], ["codes"]))[0].pixels.astype(float)
    assert back.std((0, 1)).max() < 1.5
    assert np.abs(back - wall).mean() < 3
