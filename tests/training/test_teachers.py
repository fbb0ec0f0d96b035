"""Teachers: missing ones are all named before anything is loaded, towers of the library load from folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from training.perceptual import LPIPS
from training.teachers import TeacherPaths, load_teachers, random_teachers
from training.vgg import VGG16

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG, heads, and small random towers as the library saves them."""
    transformers = pytest.importorskip("transformers", reason="SigLIP 2 and CLIP come through transformers")
    path = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    torch.save(VGG16().state_dict(), path / "vgg.pth")
    torch.save(LPIPS().state_dict(), path / "heads.pth")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        vision_config={**sizes, "patch_size": 16, "num_patches": 256},
        text_config={**sizes, "vocab_size": 100, "projection_size": WIDTH, "max_position_embeddings": 64},
    )
    transformers.Siglip2Model(config).save_pretrained(path / "siglip2")
    clip = transformers.CLIPVisionConfig(**sizes, patch_size=32, image_size=224, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(path / "clip")
    return path


def paths(folder: Path) -> TeacherPaths:
    return TeacherPaths(
        vgg=folder / "vgg.pth", lpips=folder / "heads.pth", clip=folder / "clip", siglip2=folder / "siglip2"
    )


def test_all_missing_ones_are_named_with_the_command_that_gets_them(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    with pytest.raises(FileNotFoundError) as caught:
        load_teachers(TeacherPaths(vgg=tmp_path / "vgg.pth", clip=tmp_path / "clip"), WIDTH)
    message = str(caught.value)
    assert "vgg (nothing at" in message
    assert "curl -LO https://download.pytorch.org/models/vgg16" in message
    assert "lpips (not given)" in message
    assert "siglip2 (not given). SigLIP 2, both towers: hf download google/siglip2-so400m-patch16-naflex" in message
    assert "clip (" not in message


def test_towers_load_and_answer(folder: Path) -> None:
    teachers = load_teachers(paths(folder), WIDTH)
    pictures = torch.rand(2, 3, 224, 224) * 2 - 1
    assert teachers.vision(pictures).shape == (2, WIDTH)
    assert teachers.clip(pictures).shape == (2, 16)
    ids = torch.randint(1, 100, (3, 64))
    assert teachers.text(ids).shape == (3, WIDTH)
    assert not any(weight.requires_grad for weight in teachers.vision.parameters())  # type: ignore[attr-defined]
    moved = pictures.clone()
    moved[0] = pictures[0].flip(2)
    assert not torch.allclose(teachers.vision(moved)[0], teachers.vision(pictures)[0], atol=1e-4)
    torch.testing.assert_close(teachers.vision(moved)[1], teachers.vision(pictures)[1])


def test_a_tower_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="vision hidden_size is 32, the encoder to be trained is 48 wide"):
        load_teachers(paths(folder), 48)


def test_a_changed_file_is_refused(folder: Path) -> None:
    note = folder / "vgg.pth.sha256"
    note.write_text(hashlib.sha256(b"something else").hexdigest())
    try:
        with pytest.raises(ValueError, match=r"vgg\.pth has checksum .* download it again"):
            load_teachers(paths(folder), WIDTH)
    finally:
        note.unlink()


def test_random_teachers_repeat() -> None:
    pictures = torch.rand(2, 3, 224, 224) * 2 - 1
    one, other = random_teachers(WIDTH, seed=4), random_teachers(WIDTH, seed=4)
    assert torch.equal(one.vision(pictures), other.vision(pictures))
    assert torch.equal(one.text(torch.ones(1, 64, dtype=torch.int64)), other.text(torch.ones(1, 64, dtype=torch.int64)))
    assert one.vision(pictures).shape == (2, WIDTH)
