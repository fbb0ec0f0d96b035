"""Texts through a small random SigLIP 2: cleaned, in batches, and refused where the tower is not the model's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from tests.training.small_siglip2 import save_text_tower
from training import text_tower
from training.text_tower import TextTower

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_tower(tmp_path_factory.mktemp("small") / "siglip2", WIDTH)


def test_texts_are_cleaned(folder: Path) -> None:
    """Without it about 12 points of accuracy are lost."""
    tower = TextTower(folder, WIDTH)
    loud, plain, other = tower.embed(["A Photo, of a DOG!", "a photo of a dog", "a photo of a cat"])
    assert torch.equal(loud, plain)
    assert not torch.allclose(plain, other, atol=1e-3)
    assert plain.shape == (WIDTH,)
    weights = (folder / "model.safetensors").read_bytes()
    assert str(tower) == f"text tower siglip2 (sha256 {hashlib.sha256(weights).hexdigest()[:12]})"


def test_a_batch_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = TextTower(folder, WIDTH)
    texts = ["a dog", "the red bird of a cat", "", "blue", "a square"]
    whole = tower.embed(texts)
    monkeypatch.setattr(text_tower, "BATCH", 2)
    torch.testing.assert_close(tower.embed(texts), whole)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"text tower: not given\. SigLIP 2, both towers: hf download google/sig"
    ):
        TextTower(None, WIDTH)
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json, .*, tokenizer\.json\. SigLIP 2, both towers"):
        TextTower(tmp_path, WIDTH)
    with pytest.raises(ValueError, match="its texts have 32 values, the embeddings of the model 1152; wanted the text"):
        TextTower(folder, 1152)
