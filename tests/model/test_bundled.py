"""The models that ship: small enough, complete, and independent of the batch."""

import numpy as np
import pytest

from media.types import Image, Video
from model import VARIANTS, Tokenizer
from model.tokenizer import BUNDLED
from tests.bench.batch_independence import measure, real_items

NAMES = ("tiny-continuous", "tiny-discrete")


def test_together_under_30_megabytes() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 30_000_000


@pytest.mark.parametrize("name", NAMES)
def test_config_card_and_text(name: str) -> None:
    tokenizer = Tokenizer.load(name, device="cpu")
    assert tokenizer.config == VARIANTS[name]
    assert ("codes" in tokenizer.card()["outputs"]) == (name == "tiny-discrete")
    assert name in (BUNDLED / f"{name}.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_twenty_random_mixes(name: str) -> None:
    figures = measure(Tokenizer.load(name, device="cpu"), real_items(), mixes=20)
    assert max(figures.errors.values()) <= 1e-5
    assert figures.codes_differing == 0 or figures.largest_margin <= 1e-4
    assert figures.largest_difference <= 1
    assert figures.pixels_differing <= 1e-3 * figures.pixels


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_picture_and_clip_keep_their_colour(name: str) -> None:
    tokenizer = Tokenizer.load(name, device="cpu")
    colour = np.array([200, 90, 40], np.uint8)
    items = [
        Image(pixels=np.broadcast_to(colour, (50, 70, 3)).copy()),
        Video(frames=np.broadcast_to(colour, (6, 40, 40, 3)).copy()),
    ]
    image, video = tokenizer.decode(tokenizer.encode(items, {tokenizer.outputs[0]}))
    assert np.abs(image.pixels.astype(int).mean((0, 1)) - colour).max() < 12
    assert np.abs(video.frames.astype(int).mean((0, 1, 2)) - colour).max() < 12
