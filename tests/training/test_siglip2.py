"""A small random SigLIP 2 of the library: our encoder gives its features and pooled output, but for the rotation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from media.types import Image
from model.network import ATokenNet, build
from model.packed import PackedTokens
from training.batches import Sample, pack_samples
from training.siglip2 import init_from_siglip2
from training.stages import stacks

transformers = pytest.importorskip("transformers", reason="the towers that are compared with come from transformers")

WIDTH, BLOCKS, HEADS, MLP = 64, 2, 4, 96


@pytest.fixture(scope="module")
def tower() -> Any:
    torch.manual_seed(0)
    config = transformers.Siglip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        patch_size=16,
        num_patches=256,
    )
    model = transformers.Siglip2VisionModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # as initialised, biases are 0 and norms 1
            weight.add_(0.05 * torch.randn(weight.shape))
    return model


@pytest.fixture
def folder(tower: Any, tmp_path: Path) -> Path:
    tower.save_pretrained(tmp_path)
    return tmp_path


def no_rotation(net: ATokenNet) -> None:
    def still(packed: PackedTokens) -> torch.Tensor:
        table = torch.zeros(len(packed), WIDTH // HEADS)
        table[:, ::2] = 1  # cosines of 0
        return table

    object.__setattr__(net.encoder, "rotary", still)


@pytest.mark.parametrize("size", [(256, 256), (96, 160), (224, 48), (16, 16), (400, 272)])
def test_features_and_pooled_output_match(tower: Any, folder: Path, size: tuple[int, int]) -> None:
    net = build(stacks(WIDTH, BLOCKS, HEADS, MLP)).eval()
    init_from_siglip2(net, folder)
    no_rotation(net)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    micro = pack_samples([Sample(Image(pixels=pixels))], [0], net.config)
    rows, columns = size[0] // 16, size[1] // 16
    # Theirs cuts (row, column, channel) patches too, of the same -1..1 values.
    tiles = (torch.from_numpy(pixels).float() / 127.5 - 1).unflatten(1, (columns, 16)).unflatten(0, (rows, 16))
    with torch.no_grad():
        theirs = tower(
            pixel_values=tiles.permute(0, 2, 1, 3, 4).reshape(1, rows * columns, 768),
            pixel_attention_mask=torch.ones(1, rows * columns, dtype=torch.int64),
            spatial_shapes=torch.tensor([[rows, columns]]),
        )
        features = net.encode(micro.packed)
        pooled = net.encoder.head(features, [0, len(features)])
    torch.testing.assert_close(features, theirs.last_hidden_state[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=2e-5, rtol=0)


def test_later_frames_have_no_say_at_first(folder: Path) -> None:
    net = build(stacks(WIDTH, BLOCKS, HEADS, MLP))
    init_from_siglip2(net, folder)
    assert not net.encoder.input_layer.weight[:, 768:].any()


def test_both_towers_and_several_files(tower: Any, folder: Path) -> None:
    """A whole Siglip2Model, its tensors in two files."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    prefixed = {name if name.startswith("vision_model.") else f"vision_model.{name}": tensors[name] for name in names}
    (folder / "model.safetensors").unlink()
    first, second = dict(list(prefixed.items())[:5]), dict(list(prefixed.items())[5:])
    save_file({**first, "text_model.head.weight": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({**second, "logit_scale": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"vision_config": config, "text_config": {}}))
    net = build(stacks(WIDTH, BLOCKS, HEADS, MLP))
    init_from_siglip2(net, folder)
    torch.testing.assert_close(
        net.encoder.post_layernorm.get_parameter("weight"),
        dict(tower.named_parameters())[
            next(name for name in dict(tower.named_parameters()) if name.endswith("post_layernorm.weight"))
        ],
    )


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_hidden_layers 2, wanted 3; intermediate_size 96, wanted 128"):
        init_from_siglip2(build(stacks(WIDTH, 3, HEADS, 128)), folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        init_from_siglip2(build(stacks(WIDTH, BLOCKS, HEADS, MLP)), tmp_path / "nothing")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.fc2.bias"))
    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'encoder\.layers\.1\.mlp\.fc2\.bias'"):
        init_from_siglip2(build(stacks(WIDTH, BLOCKS, HEADS, MLP)), folder)
    save_file({**tensors, "adapter.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors that no encoder has, such as adapter\.weight"):
        init_from_siglip2(build(stacks(WIDTH, BLOCKS, HEADS, MLP)), folder)
