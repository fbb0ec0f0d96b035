import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from media.types import Float32Array, Image, Item
from model import Tokenizer
from model.words import WordTable
from tests.training.conftest import scene
from training.eval_items import find_items, read_image
from training.packaged import PACKAGES
from training.scorecard import (
    WHOLE,
    codebook_line,
    frames_codec,
    image_scores,
    main,
    meaning_lines,
    neighbours,
    teacher_embed,
)

COLOURS = {"bird": (220, 30, 30), "fish": (30, 220, 30), "tool": (30, 30, 220)}


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Labelled pictures whose class is their colour, in full and at 64 px."""
    rng = np.random.default_rng(0)
    labels: dict[str, str] = {}
    arrays: dict[str, list[np.ndarray]] = {"train": [], "labelled_test": []}
    for split, count in (("train", 3), ("labelled_test", 2)):
        for name, colour in COLOURS.items():
            for number in range(count):
                path = tmp_path / "images" / split / f"{name}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.clip(np.array(colour) + rng.normal(size=(64, 64, 3)) * 10, 0, 255).astype(np.uint8)
                PIL.Image.fromarray(pixels).save(path)
                labels[f"images/{split}/{path.name}"] = name
                arrays[split].append(pixels)
    (tmp_path / "images" / "labels.json").write_text(json.dumps({"labels": labels}))
    for split, name in (("train", "labelled_train"), ("labelled_test", "labelled_test")):
        count = len(arrays[split])
        np.savez(
            tmp_path / "images" / f"{name}.npz",
            images=np.stack(arrays[split]),
            labels=np.arange(count) // (count // 3),
            class_names=list(COLOURS),
        )
    return tmp_path


def test_neighbours_are_counted_by_class() -> None:
    known = torch.eye(4)
    asked = torch.tensor([[0.9, 0.1, 0, 0], [0, 0, 0.2, 0.8], [0, 1.0, 0, 0]])
    share = neighbours(asked, ["a", "b", "b"], known, ["a", "a", "b", "b"], 1)
    assert (share.right, share.count) == (2, 3)


def test_pictures_that_differ_in_colour_are_told_apart_and_words_are_scored(coloured: Path) -> None:
    model = Tokenizer.load("tiny-continuous", device="cpu", dtype="float32")
    width = model.config.encoder.width
    words = WordTable(list(COLOURS), torch.randn(3, width), torch.zeros(width))
    lines = list(meaning_lines(coloured, [model.embed], words, coloured / "images"))
    text = "\n".join(lines)
    assert "labelled test: n = 6, largest class 33.3 %" in lines
    assert "1-NN: 100.0 %" in text
    assert "the same at 64 px: n = 6" in text
    assert "images, other packages" in text
    assert "'a photo of a {}.'" in text


def test_the_teacher_stands_beside_and_pictures_are_left_out_by_name(coloured: Path) -> None:
    words = WordTable(list(COLOURS), torch.eye(3), torch.zeros(3))

    def embed(items: Sequence[Item]) -> Float32Array:
        return np.stack([item.pixels.mean((0, 1)) for item in items if isinstance(item, Image)]).astype(np.float32)

    lines = list(meaning_lines(coloured, [lambda items: -embed(items), embed], words, coloured / "images", "fish*"))
    assert "  teacher, 1-NN: 100.0 %" in "\n".join(lines)
    (title,) = (line for line in lines if line.startswith("images, other packages"))
    assert "n = 10," in title  # of 15
    if all(importlib.util.find_spec(name) for name in PACKAGES):
        assert teacher_embed()([Image(pixels=np.full((224, 224, 3), 90, np.uint8))]).shape == (1, 144)


def test_other_pictures_have_a_table_of_their_own(coloured: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kodak"
    folder.mkdir()
    for number in range(2):
        PIL.Image.fromarray(scene(number, 50, 90)).save(folder / f"{number}.png")
    pictures = [read_image(path, WHOLE) for path in find_items(folder, "image").paths]
    assert [picture.shape for picture in pictures] == [(48, 80, 3)] * 2
    model, codes = (
        Tokenizer.load(name, device="cpu", dtype="float32") for name in ("tiny-continuous", "tiny-discrete")
    )
    rows = image_scores(coloured, pictures, model, codes, [("after stage x", model)])
    assert [row.name for row in rows] == ["PCA 48, a patch alone", "after stage x", "tiny-continuous", "tiny-discrete"]
    assert rows[1].psnr == rows[2].psnr > 20
    assert {row.count for row in rows} == {2}


def test_frames_as_images_have_as_many_tokens_and_come_back_in_size() -> None:
    model = Tokenizer.load("tiny-continuous", device="cpu", dtype="float32")
    frames = np.full((4, 64, 96, 3), 120, np.uint8)
    back = frames_codec(model)(frames)
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - 120).max() < 12


def test_codebooks_are_counted(coloured: Path) -> None:
    (coloured / "images" / "train").rename(coloured / "images" / "eval")
    line = codebook_line(coloured, Tokenizer.load("tiny-discrete", device="cpu", dtype="float32"))
    assert line.startswith(f"codebooks: {9 * 16} tokens use ")
    assert "of 12 bits" in line


def test_what_is_missing_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
