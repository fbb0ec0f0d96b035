"""A small random SigLIP 2 of the library: our encoder gives its features and pooled output, but for the rotation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from media.types import Image
from model.config import ModelConfig
from model.network import ATokenNet, build
from model.packed import PackedTokens
from training.batches import Sample, pack_samples
from training.siglip2 import init_from_siglip2
from training.stages import stacks

transformers = pytest.importorskip("transformers", reason="the towers that are compared with come from transformers")

WIDTH, BLOCKS, HEADS, MLP = 64, 2, 4, 96
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "patch_size": 16,
}
PLAN = stacks(WIDTH, BLOCKS, HEADS, MLP)
PICTURES = ((256, 256), (96, 160), (224, 48), (16, 16), (400, 272))


@pytest.fixture(scope="module")
def tower() -> Any:
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(num_patches=256, **SIZES)).eval()
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


def pictures() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in PICTURES]


def config_with(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_features_and_pooled_output_match(tower: Any, folder: Path) -> None:
    """All pictures at once: padded to the longest with a mask in theirs, end to end in ours."""
    net = build(PLAN).eval()
    init_from_siglip2(net, folder)
    no_rotation(net)
    # The library's own processor cuts and flattens the patches; nothing here says in which order.
    processor = transformers.Siglip2ImageProcessorPil(do_resize=False, max_num_patches=25 * 17)
    inputs = processor([PIL.Image.fromarray(pixels) for pixels in pictures()], return_tensors="pt")
    micro = pack_samples([Sample(Image(pixels=pixels)) for pixels in pictures()], range(len(PICTURES)), net.config)
    with torch.no_grad():
        theirs = tower(**inputs)
        features = net.encode(micro.packed)
        pooled = net.encoder.head(features, list(micro.items))
    mask = inputs["pixel_attention_mask"].bool()
    torch.testing.assert_close(features, theirs.last_hidden_state[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, theirs.pooler_output, atol=1e-5, rtol=0)


def test_the_rotation_is_what_differs(tower: Any, folder: Path) -> None:
    """Or the comparison above would not see it."""
    net, other = build(PLAN).eval(), build(PLAN).eval()
    init_from_siglip2(net, folder)
    init_from_siglip2(other, folder)
    no_rotation(other)
    packed = pack_samples([Sample(Image(pixels=pictures()[1]))], [0], net.config).packed
    with torch.no_grad():
        assert (net.encode(packed) - other.encode(packed)).abs().max() > 1e-3


def test_later_frames_have_no_say_at_first(folder: Path) -> None:
    net = build(PLAN)
    init_from_siglip2(net, folder)
    assert not net.encoder.input_layer.weight[:, 768:].any()


def test_every_tensor_of_the_encoder_is_set_and_no_other(tower: Any, folder: Path) -> None:
    net = build(PLAN)
    with torch.no_grad():
        for value in net.parameters():
            value.fill_(torch.nan)
    copied = init_from_siglip2(net, folder)
    assert copied.keys() == net.encoder.state_dict().keys()
    assert not any(value.isnan().any() for value in net.encoder.parameters())
    assert net.proj.weight.isnan().all()
    assert all(value.isnan().all() for value in net.decoder.parameters())
    theirs = {name.removeprefix("vision_model.") for name in tower.state_dict()}
    assert {name for names in copied.values() for name in names} == theirs
    assert copied["blocks.1.attn.to_qkv.bias"] == tuple(f"encoder.layers.1.self_attn.{x}_proj.bias" for x in "qkv")


def test_a_whole_model_in_several_files(tmp_path: Path) -> None:
    """As the library saves both towers: prefixes, shards and an index; other files are not looked at."""
    torch.manual_seed(1)
    text = {"vocab_size": 8, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": 1, "projection_size": WIDTH}
    text |= {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    whole = transformers.Siglip2Model(
        transformers.Siglip2Config(vision_config={**SIZES, "num_patches": 256}, text_config=text)
    )
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    save_file({"adapter": torch.zeros(1)}, tmp_path / "other.safetensors")
    net = build(PLAN)
    init_from_siglip2(net, tmp_path)
    theirs = whole.vision_model.state_dict()
    for ours, name in (
        ("post_layernorm.weight", "post_layernorm.weight"),
        ("head.mlp.mlp.0.weight", "head.mlp.fc1.weight"),
    ):
        assert torch.equal(net.encoder.state_dict()[ours], theirs[name])
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-\d+\.safetensors; model\.safetensors\.index\.json"):
        init_from_siglip2(net, tmp_path)


def test_a_prefix_before_every_name(folder: Path) -> None:
    plain, net = build(PLAN), build(PLAN)
    init_from_siglip2(plain, folder)
    tensors = {
        name.removeprefix("vision_model."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    save_file({f"vision_model.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    init_from_siglip2(net, folder)
    for value, wanted in zip(net.encoder.parameters(), plain.encoder.parameters(), strict=True):
        assert torch.equal(value, wanted)


def test_a_tower_of_one_fixed_size_is_refused(tmp_path: Path) -> None:
    """Its patch embedding has as many numbers, in another order."""
    fixed = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=256, **SIZES))
    fixed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'siglip_vision_model'; wanted 'siglip2_vision_model'"):
        init_from_siglip2(build(PLAN), tmp_path)
    config_with(tmp_path, model_type="siglip2_vision_model")
    with pytest.raises(ValueError, match=r"patch_embedding.weight \[64, 3, 16, 16\] does not fit input_layer.weight"):
        init_from_siglip2(build(PLAN), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (stacks(WIDTH, 3, HEADS, 128), "num_hidden_layers 2, wanted 3; intermediate_size 96, wanted 128"),
        (stacks(128, BLOCKS, 8, MLP), "hidden_size 64, wanted 128; num_attention_heads 4, wanted 8"),
        (replace(PLAN, patch=(2, 8, 8)), r"patch_size \(16, 16\), wanted \(8, 8\)"),
        (replace(PLAN, encoder=replace(PLAN.encoder, norm="rms")), "the encoder has norm 'rms'"),
        (replace(PLAN, encoder=replace(PLAN.encoder, bias=False)), "bias False"),
        (replace(PLAN, encoder=replace(PLAN.encoder, qk_norm=True)), "qk_norm True"),
    ],
)
def test_a_network_that_does_not_fit_is_named(folder: Path, config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_from_siglip2(build(config), folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_patches": 64}, "num_patches 64, wanted 256"),
        ({"hidden_act": "gelu"}, "hidden_act gelu, wanted gelu_pytorch_tanh"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05, wanted 1e-06"),
        ({"vision_use_head": False}, "vision_use_head False, wanted True"),
    ],
)
def test_a_config_that_does_not_fit_is_named(folder: Path, values: dict[str, object], message: str) -> None:
    config_with(folder, **values)
    with pytest.raises(ValueError, match=message):
        init_from_siglip2(build(PLAN), folder)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_a_bias(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if not name.endswith("1.mlp.fc2.bias")}, path)


def with_an_adapter(path: Path) -> None:
    save_file({**load_file(path), "adapter.weight": torch.zeros(1)}, path)


def twice(path: Path) -> None:
    path.with_name("copy.safetensors").write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors: not a whole safetensors file"),
        (without_a_bias, r"1 missing: encoder\.layers\.1\.mlp\.fc2\.bias"),
        (with_an_adapter, r"1 not used by the encoder: adapter\.weight"),
        (twice, "is in another file of this folder too"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_leave_the_network(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder / "model.safetensors")
    net = build(PLAN)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        init_from_siglip2(net, folder)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_folder_that_is_none_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file.*hf download google/siglip2"):
        init_from_siglip2(build(PLAN), tmp_path / "nothing")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        init_from_siglip2(build(PLAN), folder)
    (folder / "config.json").write_text(json.dumps(SIZES))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors in this folder.*hf download"):
        init_from_siglip2(build(PLAN), folder)
