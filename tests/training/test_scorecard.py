import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from model import Tokenizer
from model.words import WordTable
from training.scorecard import codebook_line, frames_codec, main, meaning_lines, neighbours

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
    lines = list(meaning_lines(coloured, model, words, coloured / "images"))
    text = "\n".join(lines)
    assert "labelled test: n = 6, largest class 33.3 %" in lines
    assert "1-NN: 100.0 %" in text
    assert "the same at 64 px: n = 6" in text
    assert "images, other packages" in text
    assert "'a photo of a {}.'" in text


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
