"""The weights in the package: small enough, and better than what they started from, on pictures they never saw."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from media.types import Image, UInt8Array, Video
from model import Tokenizer
from model.tokenizer import BUNDLED
from model.words import WordTable
from tests.paths import DATA, needs_data
from training.held_out import eval_clips, eval_pictures, model_codec, pca_codec, score
from training.metrics import psnr
from training.pca import fit_components, still_patches
from training.scorecard import codebook_line, frames_codec, mesh_scores, neighbours, raw_neighbours

NAMES = ("tiny-continuous", "tiny-discrete")


@pytest.fixture(scope="module")
def pictures() -> Iterator[list[UInt8Array]]:
    return list(eval_pictures(DATA, "eval", 256))


def load(name: str) -> Tokenizer:
    return Tokenizer.load(name, device="cpu", dtype="float32")


def test_size_and_cards() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*.safetensors")) < 30e6
    for name in NAMES:
        card = (BUNDLED / f"{name}.md").read_text()
        for wanted in ("## Held-out figures", "python -m training.", "seed 0", "minutes", "licence"):
            assert wanted in card, (name, wanted)
        curves = re.findall(r"!\[.*\]\((.*\.png)\)", card)
        assert curves
        assert all((BUNDLED / place).is_file() for place in curves)


def test_commands_of_the_cards_are_those_of_the_readme() -> None:
    readme = Path("training/README.md").read_text()
    for name in NAMES:
        (trained,) = re.findall(rf".*training\.train {name} .*", (BUNDLED / f"{name}.md").read_text())
        for option in ("more", "drawings", "minutes"):
            given = re.findall(rf"--{option} \S+", trained)
            (line,) = re.findall(rf".*training\.train {name} --data.*", readme)
            assert re.findall(rf"--{option} \S+", line) == given, (name, option)


@pytest.mark.parametrize("study", ["geometry", "shift"])
def test_studies_of_the_bundled_model_are_of_these_weights(study: str) -> None:
    report = json.loads(Path("docs/studies", study, "report.json").read_text())
    assert report["model"]["revision"] == load("tiny-continuous").revision


@needs_data
def test_continuous_beats_pca(pictures: list[UInt8Array]) -> None:
    tokenizer = load("tiny-continuous")
    config = tokenizer.config
    model = score("model", model_codec(tokenizer), pictures)
    pca = score("PCA", pca_codec(fit_components(still_patches(DATA, config), 48), config), pictures)
    assert model.psnr >= pca.psnr + 1.0  # what the project wants of its default weights
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
def test_codes_cost_some_and_use_their_books(pictures: list[UInt8Array]) -> None:
    floats, codes = (score(name, model_codec(load(name)), pictures).psnr for name in NAMES)
    assert floats - 3.5 < codes < floats
    line = codebook_line(DATA, load("tiny-discrete"))
    (used,) = re.findall(r"use (\d+) to \d+ %", line)
    assert int(used) >= 40, line


@needs_data
def test_a_clip_beats_its_frames_as_images_with_as_many_tokens() -> None:
    tokenizer = load("tiny-continuous")
    clips = [clip for clip, _ in zip(eval_clips(DATA, 192), range(4), strict=False)]
    whole, frames = (score("", codec, clips).psnr for codec in (model_codec(tokenizer), frames_codec(tokenizer)))
    assert whole > frames + 1


@needs_data
def test_a_mesh_beats_the_colours_of_its_voxels() -> None:
    colours, decoded = mesh_scores(DATA, 2, load("tiny-continuous"), "tiny-splats")
    assert decoded.psnr > colours.psnr + 1
    assert decoded.ssim > colours.ssim


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


@needs_data
def test_the_embedding_knows_what_is_shown_and_what_words_mean() -> None:
    """Twenty points above raw pixels, at 128 px of the 64 px arrays to be quick: the figures are the scorecard's."""
    model = load("tiny-continuous")
    found: dict[str, tuple[np.ndarray, list[str]]] = {}
    shown: dict[str, list[UInt8Array]] = {}
    for part in ("labelled_train", "labelled_test"):
        with np.load(DATA / "images" / f"{part}.npz") as file:
            names = [str(name) for name in file["class_names"]]
            shown[part] = [np.asarray(PIL.Image.fromarray(pixels).resize((128, 128))) for pixels in file["images"]]
            found[part] = (
                model.embed([Image(pixels=picture) for picture in shown[part]]),
                [names[n] for n in file["labels"]],
            )
    (known, known_names), (asked, truth) = found["labelled_train"], found["labelled_test"]
    raw = raw_neighbours(shown["labelled_test"], truth, shown["labelled_train"], known_names, 1)
    share = neighbours(torch.from_numpy(asked), truth, torch.from_numpy(known), known_names, 1)
    assert share.value >= raw.value + 0.2
    classes = sorted(set(known_names))
    texts = WordTable.load().embed([name.replace("_", " ") for name in classes]).numpy()
    said = [classes[row] for row in (asked @ texts.T).argmax(1)]
    right = np.mean([name == true for name, true in zip(said, truth, strict=True)])
    assert right >= raw.value + 0.1


def test_both_models_have_one_embedding() -> None:
    picture = Image(pixels=np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    first, second = (load(name).embed([picture]) for name in NAMES)
    np.testing.assert_allclose(first, second, atol=1e-5)
