"""Zero-shot and retrieval: answers that are known, and the whole path of the command with towers that know nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from media.types import Image, Item, Voxels
from model import Tokenizer
from tests.paths import DATA, needs_data
from tests.training.conftest import scene
from tests.training.small_siglip2 import save_text_tower
from training.embeddings import embed_items
from training.eval_items import Found, find_items, read_clip, spread_frames
from training.evaluate import main
from training.generated import Generated
from training.protocols import PROTOCOLS, Protocol
from training.samples import voxels_bytes
from training.text_tower import TextTower
from training.word_protocols import WORD_PROTOCOLS, WordProtocol

WIDTH = 144
"""Of the embeddings of the tiny models."""

CLASSES = ("bird", "cat", "dog", "red_square", "blue", "green", "photo")


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_tower(tmp_path_factory.mktemp("small") / "siglip2", WIDTH)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load("tiny-continuous", device="cpu", dtype="float32")


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Two grey pictures a class; the level says which."""
    for index, name in enumerate(CLASSES):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(2):
            grey = np.full((40 + number, 48, 3), 10 * index, np.uint8)
            PIL.Image.fromarray(grey).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


def perfect(tower: Path, texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that sees of a grey picture which of the texts is its own."""
    rows = TextTower(tower, WIDTH).embed(texts)
    means = torch.nn.functional.normalize(rows, dim=-1).numpy()

    def embed(self: Tokenizer, items: Sequence[Item]) -> np.ndarray:
        assert all(isinstance(item, Image) and item.pixels.shape == (256, 256, 3) for item in items)
        return np.stack([means[item.pixels[0, 0, 0] // 10] for item in items])  # type: ignore[union-attr]

    monkeypatch.setattr(Tokenizer, "embed", embed)


def test_known_classes(
    tower: Path, classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders in the order of the alphabet, levels in another: every picture finds its class by its name."""
    perfect(tower, [f"A photo of a {name.replace('_', ' ')}!" for name in CLASSES], monkeypatch)
    output = tmp_path / "out.json"
    arguments = ["tiny-continuous", "--protocol", "zero-shot", "--data", str(classes), "--text-tower", str(tower)]
    assert main([*arguments, "--device", "cpu", "--prompts", "plain", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "| plain (1) | 14 | 7 | 100.0 (78.5 to 100.0) | 100.0 (78.5 to 100.0) |" in printed
    for words in ("n = 14; 7 classes, named by their folders", "text tower siglip2 (sha256 ", "256 x 256 px"):
        assert words in printed
    document = json.loads(output.read_text())
    assert document["results"][0]["values"]["top-1"]["right"] == 14
    assert not list(tmp_path.glob("*latents*"))


def test_classes_by_chance(tower: Path, classes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real embeddings of the model beside a tower that knows nothing of it; both sets of prompts."""
    arguments = ["tiny-continuous", "--protocol", "zero-shot", "--data", str(classes), "--text-tower", str(tower)]
    assert main([*arguments, "--device", "cpu", "--prompts", "short", "--side", "32", "--limit", "4"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""  # the library says a page about weights of the other tower
    rows = [line for line in printed.splitlines() if line.startswith("| tiny")]
    assert [row.split(" | ")[2:5] for row in rows] == [["short (7)", "4", "7"], ["plain (1)", "4", "7"]]
    assert "pictures resized to 32 x 32 px" in printed
    assert "n = 4 of 14 files, evenly spaced; 7 classes" in printed


def test_known_texts(
    tower: Path, classes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts a picture, in both directions; R@10 among seven says nothing."""
    texts = ["a red bird", "the cat", "a dog of the photo", "red square", "blue blue", "green", "photo of a photo"]
    perfect(tower, texts, monkeypatch)
    listed = {f"{name}/0.png": [text, text.upper() + "."] for name, text in zip(CLASSES, texts, strict=True)}
    (classes / "captions.json").write_text(json.dumps(listed))
    arguments = ["tiny-discrete", "--protocol", "retrieval", "--data", str(classes), "--text-tower", str(tower)]
    assert main([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "| text to image | 14 | 7 | 100.0 (78.5 to 100.0) | 100.0 (78.5 to 100.0) | - |" in printed
    assert (
        "| image to text | 7 | 14 | 100.0 (64.6 to 100.0) | 100.0 (64.6 to 100.0) | 100.0 (64.6 to 100.0) |" in printed
    )
    assert "n = 7; 14 texts of captions.json" in printed


def test_clips_are_the_mean_of_their_frames(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Three of seven frames, from the middles of thirds, each as a square image of its own."""
    (tmp_path / "bear").mkdir()
    frames = [scene(number, 40, 64) for number in range(7)]
    for number, frame in enumerate(frames):
        PIL.Image.fromarray(frame).save(tmp_path / "bear" / f"{number}.png")
    protocol = replace(WORD_PROTOCOLS["msrvtt-retrieval"], frames=3)
    found = embed_items(tokenizer, protocol, find_items(tmp_path, "video"))
    seen = [np.asarray(PIL.Image.fromarray(frames[index]).resize((224, 224), 2)) for index in (1, 3, 5)]
    wanted = tokenizer.embed([Image(pixels=picture) for picture in seen]).mean(0)
    np.testing.assert_allclose(found.numpy(), wanted[None], atol=1e-5)


@needs_data
def test_frames_of_a_film_are_spread(tmp_path: Path) -> None:
    path = DATA / "videos" / "eval" / "cup.mp4"
    whole = read_clip(path, Protocol(name="whole", kind="video"))
    part = len(whole) / 3
    found = spread_frames(path, 3)
    assert len(found) == 3
    for index, frame in enumerate(found):
        middle = int((index + 0.5) * part)
        assert np.array_equal(frame, whole[middle])
    assert len(spread_frames(path, 10_000)) == len(whole)
    (tmp_path / "a.mp4").write_bytes(b"no film")
    with pytest.raises(ValueError, match=r"a\.mp4: "):
        spread_frames(tmp_path / "a.mp4", 3)


def test_assets_are_their_voxels(tmp_path: Path, tower: Path, tokenizer: Tokenizer) -> None:
    coords = np.stack(np.meshgrid(*[np.arange(30, 34)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    feats = np.random.default_rng(0).random((len(coords), 768), np.float32)
    (tmp_path / "cube.safetensors").write_bytes(voxels_bytes(Voxels(coords=coords, feats=feats)))
    (tmp_path / "cube.txt").write_text("a square")
    found = embed_items(tokenizer, WORD_PROTOCOLS["toys4k-zero-shot"], find_items(tmp_path, None))
    rounded = np.rint(feats * 255) / np.float32(255)
    wanted = tokenizer.embed([Voxels(coords=coords, feats=rounded)])
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    (tmp_path / "bad.glb").write_bytes(b"no mesh")
    with pytest.raises(ValueError, match=r"bad\.glb: "):
        embed_items(tokenizer, WORD_PROTOCOLS["retrieval"], Found("asset", (tmp_path / "bad.glb",), 1))


@pytest.mark.parametrize("name", [*PROTOCOLS, *WORD_PROTOCOLS])
def test_every_preset_gives_its_row_by_its_name(
    name: str, tmp_path: Path, tower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One small item a class, of the kind of the table; sides of the tables as published."""
    protocol = {**PROTOCOLS, **WORD_PROTOCOLS}[name]
    kind = protocol.kind or "image"
    texts = {}
    for number, label in enumerate(("cat", "dog")):
        place = tmp_path / "set" / label
        place.mkdir(parents=True)
        if kind == "asset":
            item = Generated(seed=number).draw("asset_rec", [0])[0].item
            assert isinstance(item, Voxels)
            few = Voxels(coords=item.coords[:64], feats=item.feats[:64])
            (place / "a.safetensors").write_bytes(voxels_bytes(few))
        elif kind == "video":
            (place / "clip").mkdir()
            for frame in range(4):
                PIL.Image.fromarray(scene(frame, 32, 48)).save(place / "clip" / f"{frame}.png")
        else:
            PIL.Image.fromarray(scene(number, 40, 56)).save(place / "a.png")
        texts[f"{label}/{'clip' if kind == 'video' else 'a.png'}"] = [f"a {label}"]
    given = [*("--protocol", name), *("--data", str(tmp_path / "set")), *("--device", "cpu")]
    if isinstance(protocol, WordProtocol):
        given += ["--text-tower", str(tower)]
        given += (
            ["--prompts", "plain"] if protocol.task == "zero-shot" else ["--captions", str(tmp_path / "texts.json")]
        )
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    assert main(["tiny-continuous", *given]) == 0
    printed = capsys.readouterr().out
    assert f"| {name} | " in printed
    assert f"{name}: " in printed
    assert "n = 2" in printed


def test_protocols_say_what_numbers_depend_on() -> None:
    for name, protocol in WORD_PROTOCOLS.items():
        assert protocol.name == name
        assert bool(protocol.known) == bool(protocol.table) == (name not in ("zero-shot", "retrieval"))
    assert "the first 5 texts of an item" in WORD_PROTOCOLS["coco-retrieval"].line("image")
    assert "all texts of an item" in WORD_PROTOCOLS["msvd-retrieval"].line("video")
    assert "up to 16 frames" in WORD_PROTOCOLS["msrvtt-retrieval"].line("video")
    assert "its prompts" in WORD_PROTOCOLS["toys4k-zero-shot"].line("asset")
