"""Our encoder from a SigLIP 2 vision tower: the published start of the curriculum.

The folder is what Hugging Face saves of a `Siglip2VisionModel` or a whole `Siglip2Model`, naflex form; it is read
without that library. C channels. Source: facts-training 4.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.network import ATokenNet
from model.norms import EPS
from model.positions import TABLE_SIDE
from training.teachers import COMMANDS

INDEX = "model.safetensors.index.json"

TOP = {
    "input_layer.weight": "embeddings.patch_embedding.weight",
    "input_layer.bias": "embeddings.patch_embedding.bias",
    "pos_embedder.position_embedding.weight": "embeddings.position_embedding.weight",
    "post_layernorm.weight": "post_layernorm.weight",
    "post_layernorm.bias": "post_layernorm.bias",
    "head.probe": "head.probe",
}
"""Ours to theirs."""

BLOCK = {
    "norm1.weight": "layer_norm1.weight",
    "norm1.bias": "layer_norm1.bias",
    "attn.to_out.weight": "self_attn.out_proj.weight",
    "attn.to_out.bias": "self_attn.out_proj.bias",
    "norm2.weight": "layer_norm2.weight",
    "norm2.bias": "layer_norm2.bias",
    "mlp.mlp.0.weight": "mlp.fc1.weight",
    "mlp.mlp.0.bias": "mlp.fc1.bias",
    "mlp.mlp.2.weight": "mlp.fc2.weight",
    "mlp.mlp.2.bias": "mlp.fc2.bias",
}
"""The same of one block; queries, keys and values are stacked besides."""

HEAD = {
    "attention.to_out.weight": "attention.out_proj.weight",
    "attention.to_out.bias": "attention.out_proj.bias",
    "layernorm.weight": "layernorm.weight",
    "layernorm.bias": "layernorm.bias",
    "mlp.mlp.0.weight": "mlp.fc1.weight",
    "mlp.mlp.0.bias": "mlp.fc1.bias",
    "mlp.mlp.2.weight": "mlp.fc2.weight",
    "mlp.mlp.2.bias": "mlp.fc2.bias",
}
"""The same of the pooling head; its query is ours apart from keys and values, theirs stacks all three."""


def init_from_siglip2(net: ATokenNet, folder: Path) -> dict[str, tuple[str, ...]]:
    """Set every parameter of the encoder and its pooling head; the projection and the decoder stay as they are.

    The patch embedding goes to the first frame of a patch, the others get 0: an image, whose other frames are grey (0),
    gives SigLIP 2's features, but for the rotation of queries and keys, which SigLIP 2 does not have. Returns what was
    copied: each tensor of the encoder, and those of the folder that it was made of. Raises FileNotFoundError without
    config.json or weights, ValueError for a tower of another kind or size, with other tensors, or with a damaged file;
    the net is then as it was.
    """
    _check_config(folder, net.config)
    theirs = _tensors(folder)
    sources = _sources(net.config.encoder.blocks)
    _check_names(folder, {name for names in sources.values() for name in names}, set(theirs))
    wanted = net.encoder.state_dict()
    state = {}
    for ours, names in sources.items():
        value = _converted(ours, [theirs[name] for name in names], net.config)
        if value.shape != wanted[ours].shape:
            shapes = ", ".join(f"{name} {list(theirs[name].shape)}" for name in names)
            raise ValueError(f"{folder}: {shapes} does not fit {ours} {list(wanted[ours].shape)}")
        state[ours] = value
    net.encoder.load_state_dict(state)
    return sources


def _sources(blocks: int) -> dict[str, tuple[str, ...]]:
    """Every tensor of our encoder, and those of theirs that it is made of."""
    sources: dict[str, tuple[str, ...]] = {ours: (name,) for ours, name in TOP.items()}
    sources |= {f"head.{ours}": (f"head.{name}",) for ours, name in HEAD.items()}
    for part in ("weight", "bias"):
        for ours in ("to_q", "to_kv"):
            sources[f"head.attention.{ours}.{part}"] = (f"head.attention.in_proj_{part}",)
        for index in range(blocks):
            layer = f"encoder.layers.{index}.self_attn"
            sources[f"blocks.{index}.attn.to_qkv.{part}"] = tuple(f"{layer}.{which}_proj.{part}" for which in "qkv")
    for index in range(blocks):
        for ours, name in BLOCK.items():
            sources[f"blocks.{index}.{ours}"] = (f"encoder.layers.{index}.{name}",)
    return sources


def _converted(ours: str, theirs: Sequence[Tensor], config: ModelConfig) -> Tensor:
    value = torch.cat(list(theirs))
    if ours == "input_layer.weight" and value.shape[1:] == (config.frame_values,):
        # Both flatten a patch as (row, column, channel), ours with the frame before those: the first frame leads.
        return F.pad(value, (0, config.patch_values - config.frame_values))
    if ours == "head.probe":
        return value.flatten()
    if ours.startswith("head.attention.to_q."):
        return value[: config.encoder.width]
    if ours.startswith("head.attention.to_kv."):
        return value[config.encoder.width :]
    return value


def _check_config(folder: Path, config: ModelConfig) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; wanted the folder of a Siglip2VisionModel. {COMMANDS['siglip2']}"
        )
    values = _json(path)
    theirs = values.get("vision_config", values)
    kind = theirs.get("model_type", "siglip2_vision_model")
    if kind != "siglip2_vision_model":
        # Those of one fixed size are "siglip": a convolution (channel, row, column), a table of that size.
        raise ValueError(
            f"{path}: model_type {kind!r}; wanted 'siglip2_vision_model', the naflex form "
            "(google/siglip2-so400m-patch16-naflex)"
        )
    stack = config.encoder
    patch = theirs.get("patch_size", 16)
    # What the library leaves out of the file has its default.
    pairs: dict[str, tuple[object, object]] = {
        "hidden_size": (theirs.get("hidden_size", 768), stack.width),
        "num_hidden_layers": (theirs.get("num_hidden_layers", 12), stack.blocks),
        "num_attention_heads": (theirs.get("num_attention_heads", 12), stack.heads),
        "intermediate_size": (theirs.get("intermediate_size", 3072), stack.mlp),
        "num_channels": (theirs.get("num_channels", 3), config.pixel_channels),
        "patch_size": (tuple(patch) if isinstance(patch, list) else (patch, patch), config.patch[1:]),
        "num_patches": (theirs.get("num_patches", 256), TABLE_SIDE**2),
        "hidden_act": (theirs.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
        "layer_norm_eps": (theirs.get("layer_norm_eps", EPS), EPS),
        "vision_use_head": (theirs.get("vision_use_head", True), True),
    }
    wrong = [f"{name} {found}, wanted {wanted}" for name, (found, wanted) in pairs.items() if found != wanted]
    if (stack.norm, stack.bias, stack.qk_norm) != ("layer", True, False):
        wrong.append(
            f"layer norm and biases, no QK norm, but the encoder has norm {stack.norm!r}, bias {stack.bias}, "
            f"qk_norm {stack.qk_norm}"
        )
    if wrong:
        raise ValueError(f"{folder} does not fit the encoder: " + "; ".join(wrong))


def _check_names(folder: Path, wanted: set[str], found: set[str]) -> None:
    missing, unused = sorted(wanted - found), sorted(found - wanted)
    parts = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", missing), ("not used by the encoder", unused))
        if names
    ]
    if parts:
        raise ValueError(f"{folder}: tensors of the vision tower that do not fit: {'; '.join(parts)}")


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of the vision tower, names without what comes before it; the text tower and the logit scale are left."""
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    if name.startswith(("text_model.", "logit_")):
                        continue
                    short = name.removeprefix("vision_model.")
                    if short in tensors:
                        raise ValueError(f"{path}: {name} is in another file of this folder too")
                    tensors[short] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors


def _files(folder: Path) -> list[Path]:
    """The weights files that the index names, or all there are."""
    index = folder / INDEX
    if not index.is_file():
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no *.safetensors in this folder. {COMMANDS['siglip2']}")
        return paths
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: no weight_map in it")
    paths = [folder / name for name in sorted(set(names.values()))]
    gone = [path.name for path in paths if not path.is_file()]
    if gone:
        raise FileNotFoundError(f"{folder}: no {', '.join(gone)}; {INDEX} names {len(paths)} files")
    return paths


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted an object")
    return values
