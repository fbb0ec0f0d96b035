"""Teachers: missing ones are all named before anything is loaded, towers of the library load from folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.small_siglip2 import save_siglip2
from training.perceptual import LPIPS
from training.teachers import (
    COMMANDS,
    LPIPS_SHA256,
    TEXT_LENGTH,
    TeacherPaths,
    load_teachers,
    load_text,
    random_teachers,
    verify,
)
from training.text import LENGTH
from training.vgg import VGG16

WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG, heads, and small random towers as the library saves them."""
    transformers = pytest.importorskip("transformers", reason="SigLIP 2 and CLIP come through transformers")
    path = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    torch.save(VGG16().state_dict(), path / "vgg.pth")
    torch.save({name: value.abs() for name, value in LPIPS().state_dict().items()}, path / "heads.pth")
    save_siglip2(path / "siglip2", WIDTH)
    (path / "siglip2" / "tokenizer.json").write_text("{}")  # read by training/text.py
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**sizes, patch_size=32, image_size=224, projection_dim=16)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(path / "clip")
    return path


def paths(folder: Path, **other: Path) -> TeacherPaths:
    given = {
        "vgg": folder / "vgg.pth",
        "lpips": folder / "heads.pth",
        "clip": folder / "clip",
        "siglip2": folder / "siglip2",
    }
    return TeacherPaths(**{**given, **other})


def test_all_missing_ones_are_named_with_the_command_that_gets_them(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text("{}")
    (tmp_path / "clip" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError) as caught:
        load_teachers(TeacherPaths(vgg=tmp_path / "vgg.pth", clip=tmp_path / "clip"), WIDTH)
    message = str(caught.value)
    assert "vgg (nothing at" in message
    assert "curl -LO https://download.pytorch.org/models/vgg16" in message
    assert "lpips (not given)" in message
    assert "siglip2 (not given). SigLIP 2, both towers: hf download google/siglip2-so400m-patch16-naflex" in message
    assert "clip (" not in message


def test_what_a_folder_lacks_is_named_too(tmp_path: Path) -> None:
    """A download that broke off, or a folder given for a file."""
    (tmp_path / "siglip2").mkdir()
    (tmp_path / "siglip2" / "config.json").write_text("{}")
    (tmp_path / "heads.pth").touch()
    with pytest.raises(FileNotFoundError) as caught:
        load_teachers(paths(tmp_path, vgg=tmp_path / "siglip2", clip=tmp_path / "heads.pth"), WIDTH)
    message = str(caught.value)
    assert f"vgg ({tmp_path / 'siglip2'} is no file)" in message
    assert f"clip ({tmp_path / 'heads.pth'} is no folder). CLIP: hf download openai/clip" in message
    assert "siglip2 lacks *.safetensors or pytorch_model*.bin, tokenizer.json)" in message
    assert "lpips (" not in message


def test_transformers_is_imported_only_to_load(tmp_path: Path) -> None:
    code = (
        "import sys, training.teachers as teachers\n"
        "teachers.random_teachers(16, 0)\n"
        "try: teachers.load_teachers(teachers.TeacherPaths(), 16)\n"
        "except FileNotFoundError: pass\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


def test_towers_give_what_the_library_gives(folder: Path) -> None:
    """The same pictures and ids through the library's own preparation and its whole models."""
    import transformers
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    teachers = load_teachers(paths(folder), WIDTH)
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1
    ids = torch.randint(1, 100, (3, 64), generator=generator)
    whole: Any = transformers.Siglip2Model.from_pretrained(folder / "siglip2").eval()
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(picture.numpy(), 16)) for picture in pictures])
    with torch.no_grad():
        seen = whole.vision_model(
            pixel_values=patches,
            pixel_attention_mask=torch.ones(2, 196, dtype=torch.int64),
            spatial_shapes=torch.tensor([[14, 14]] * 2),
        )
        said = whole.text_model(input_ids=ids)
        clip: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "clip").eval()
        processor = transformers.CLIPImageProcessorPil()
        standard = ((pictures + 1) / 2 - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(
            processor.image_std
        )[:, None, None]
        projected = clip(pixel_values=standard).image_embeds
    torch.testing.assert_close(teachers.vision(pictures), seen.pooler_output)
    torch.testing.assert_close(teachers.text(ids), said.pooler_output)
    torch.testing.assert_close(teachers.clip(pictures), projected)


def test_gradients_reach_the_picture_and_no_weight(folder: Path) -> None:
    for teachers in (load_teachers(paths(folder), WIDTH), random_teachers(WIDTH, seed=0)):
        pictures = (torch.rand(1, 3, 224, 224) * 2 - 1).requires_grad_()
        (teachers.clip(pictures).square().sum() + teachers.vision(pictures).square().sum()).backward()
        assert pictures.grad is not None
        assert pictures.grad.abs().sum() > 0
        for net in (teachers.vgg, teachers.lpips, teachers.clip, teachers.vision, teachers.text):
            assert isinstance(net, torch.nn.Module)
            assert not net.training
            assert not any(weight.requires_grad for weight in net.parameters())


def test_a_whole_clip_is_read_as_well(folder: Path, tmp_path: Path) -> None:
    """As published: both towers in one file."""
    import transformers

    vision: Any = transformers.CLIPVisionModelWithProjection.from_pretrained(folder / "clip").eval()
    config = transformers.CLIPConfig(
        vision_config=vision.config.to_dict(),
        text_config={"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=16,
    )
    whole: Any = transformers.CLIPModel(config)
    whole.vision_model.load_state_dict(vision.vision_model.state_dict())
    whole.visual_projection.load_state_dict(vision.visual_projection.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    pictures = torch.rand(1, 3, 224, 224) * 2 - 1
    one, other = (load_teachers(paths(folder, clip=at), WIDTH) for at in (tmp_path / "whole", folder / "clip"))
    torch.testing.assert_close(one.clip(pictures), other.clip(pictures))


def test_half_precision_files_compute_in_float32(folder: Path, tmp_path: Path) -> None:
    for name in ("clip", "siglip2"):
        shutil.copytree(folder / name, tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        halves = {key: value.bfloat16() for key, value in load_file(path).items()}
        save_file(halves, path, metadata={"format": "pt"})
        config = tmp_path / name / "config.json"
        assert '"dtype": "float32"' in config.read_text()
        config.write_text(config.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    teachers = load_teachers(paths(folder, clip=tmp_path / "clip", siglip2=tmp_path / "siglip2"), WIDTH)
    pictures = torch.rand(1, 3, 224, 224) * 2 - 1
    for found in (
        teachers.clip(pictures),
        teachers.vision(pictures),
        teachers.text(torch.ones(1, 64, dtype=torch.int64)),
    ):
        assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "key", "tower"),
    [
        ("siglip2", "vision_model.encoder.layers.1.mlp.fc1.weight", "Siglip2VisionModel"),
        ("siglip2", "text_model.head.weight", "Siglip2TextModel"),
        ("clip", "visual_projection.weight", "CLIPVisionModelWithProjection"),
    ],
)
def test_a_file_without_one_weight_is_refused(folder: Path, tmp_path: Path, name: str, key: str, tower: str) -> None:
    """The library fills such gaps with random numbers and goes on."""
    shutil.copytree(folder / name, tmp_path / name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    del tensors[key]
    save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} lacks 1 weights of {tower}"):
        load_teachers(paths(folder, **{name: tmp_path / name}), WIDTH)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="is a siglip2 model; wanted clip or clip_vision_model"):
        load_teachers(paths(folder, clip=folder / "siglip2"), WIDTH)


def test_a_tower_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="vision hidden_size is 32, the encoder to be trained is 48 wide"):
        load_teachers(paths(folder), 48)


def test_a_changed_file_is_refused(folder: Path) -> None:
    note = folder / "vgg.pth.sha256"
    note.write_text(hashlib.sha256(b"something else").hexdigest())
    try:
        with pytest.raises(ValueError, match=r"vgg\.pth has checksum .* download it again"):
            load_teachers(paths(folder), WIDTH)
        note.write_text("")
        with pytest.raises(ValueError, match=r"vgg\.pth has checksum"):
            load_teachers(paths(folder), WIDTH)
    finally:
        note.unlink()


def test_checksums_of_files_and_in_folders(tmp_path: Path) -> None:
    path, note = tmp_path / "model.safetensors", tmp_path / "model.safetensors.sha256"
    path.write_bytes(b"weights")
    verify(path)  # nothing to compare with
    note.write_text(f"{hashlib.sha256(b'weights').hexdigest().upper()}  model.safetensors\n")  # as sha256sum writes it
    verify(path)
    verify(tmp_path)
    path.write_bytes(b"weightz")
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=r"model\.safetensors has checksum .* download it again"):
            verify(given)


def test_other_bytes_under_a_name_with_a_checksum_are_refused(folder: Path, tmp_path: Path) -> None:
    """As torch names its files; what is in these has the right keys and shapes, and is another network."""
    path = tmp_path / "vgg16-397923af.pth"
    shutil.copy(folder / "vgg.pth", path)
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth has checksum .*, its name says 397923af: download it"):
        load_teachers(paths(folder, vgg=path), WIDTH)
    right = tmp_path / f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    right.write_bytes(b"weights")
    verify(right)
    right.with_name(f"{right.name}.sha256").write_text(hashlib.sha256(b"others").hexdigest())
    with pytest.raises(ValueError, match=r"\.pth\.sha256 says"):
        verify(right)


def test_the_command_of_lpips_leaves_its_checksum(folder: Path, tmp_path: Path) -> None:
    """All but the download is run."""
    _, note = COMMANDS["lpips"].split(" && ")
    subprocess.run(note, shell=True, cwd=tmp_path, check=True)
    assert (tmp_path / "vgg.pth.sha256").read_text().strip() == LPIPS_SHA256
    shutil.copy(folder / "heads.pth", tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=rf"vgg\.pth\.sha256 says {LPIPS_SHA256}: download it again"):
        load_teachers(paths(folder, lpips=tmp_path / "vgg.pth"), WIDTH)


def changed(folder: Path, to: Path, tower: str, **sizes: int) -> Path:
    """A folder whose config.json says other sizes; its weights are not looked at before these are."""
    shutil.copytree(folder, to)
    values = json.loads((to / "config.json").read_text())
    (values[tower] if tower else values).update(sizes)
    (to / "config.json").write_text(json.dumps(values))
    return to


def test_towers_of_another_length_or_side_are_refused(folder: Path, tmp_path: Path) -> None:
    """They would fail inside the first step, or, of patches that leave a rest, see a part of each picture."""
    assert TEXT_LENGTH == LENGTH
    large = changed(folder / "clip", tmp_path / "clip", "", image_size=336)
    with pytest.raises(ValueError, match="CLIP of pictures of 336 pixels; the losses show it 224"):
        load_teachers(paths(folder, clip=large), WIDTH)
    short = changed(folder / "siglip2", tmp_path / "short", "text_config", max_position_embeddings=32)
    for load in (lambda: load_teachers(paths(folder, siglip2=short), WIDTH), lambda: load_text(short, WIDTH)):
        with pytest.raises(ValueError, match="its text tower takes 32 ids; captions have 64"):
            load()
    odd = changed(folder / "siglip2", tmp_path / "odd", "vision_config", patch_size=15)
    with pytest.raises(ValueError, match="patches of 15 pixels, which do not fill pictures of 224"):
        load_teachers(paths(folder, siglip2=odd), WIDTH)


def test_heads_of_another_network_are_refused(folder: Path, tmp_path: Path) -> None:
    """The published file for AlexNet has the same keys."""
    torch.save(LPIPS((64, 192, 384, 256, 256)).state_dict(), tmp_path / "alex.pth")
    with pytest.raises(
        ValueError, match=r"alex\.pth does not fit LPIPS: lin1.*\(1, 192, 1, 1\), wanted \(1, 128, 1, 1\)"
    ):
        load_teachers(paths(folder, lpips=tmp_path / "alex.pth"), WIDTH)


def test_a_teacher_that_no_loss_asks_may_be_left_out(folder: Path) -> None:
    some = TeacherPaths(vgg=folder / "vgg.pth", siglip2=folder / "siglip2")
    teachers = load_teachers(some, WIDTH, unused=["lpips", "clip"])
    assert len(teachers.vgg(torch.zeros(1, 3, 32, 32))) == 5
    with pytest.raises(RuntimeError, match="the teacher clip was left out"):
        teachers.clip(torch.zeros(1, 3, 224, 224))
    with pytest.raises(FileNotFoundError, match=r"clip \(not given\)"):
        load_teachers(some, WIDTH, unused=["lpips"])


def test_random_teachers_repeat() -> None:
    pictures = torch.rand(2, 3, 224, 224) * 2 - 1
    before = torch.get_rng_state()
    one, other = random_teachers(WIDTH, seed=4), random_teachers(WIDTH, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(one.vision(pictures), random_teachers(WIDTH, seed=5).vision(pictures))
    assert min(float(weight.min()) for weight in one.lpips.heads()) >= 0
    assert torch.equal(one.vision(pictures), other.vision(pictures))
    assert torch.equal(one.text(torch.ones(1, 64, dtype=torch.int64)), other.text(torch.ones(1, 64, dtype=torch.int64)))
    assert one.vision(pictures).shape == (2, WIDTH)
