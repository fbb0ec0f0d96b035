"""Our encoder from a SigLIP 2 vision tower: the published start of the curriculum.

The folder is what Hugging Face saves of a `Siglip2VisionModel` or a whole `Siglip2Model`, naflex form; it is read
without that library. C channels. Source: facts-training 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from model.config import StackConfig
from model.network import ATokenNet
from model.positions import TABLE_SIDE

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
"""Ours to theirs, of one block; queries, keys and values are stacked besides."""

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


def init_from_siglip2(net: ATokenNet, folder: Path) -> None:
    """Set every parameter of the encoder and its pooling head; the projection and the decoder stay as they are.

    The patch embedding goes to the first frame of a patch, the others get 0: an image, whose other frames are grey (0),
    gives SigLIP 2's features, but for the rotation of queries and keys, which SigLIP 2 does not have. Raises
    FileNotFoundError without config.json or weights, ValueError for a tower of other sizes or with other tensors.
    """
    stack = net.config.encoder
    _check(_vision_config(folder), stack, folder)
    theirs = _tensors(folder)
    state = _converted(theirs, stack, net.config.frame_values, net.config.patch_values)
    if theirs:
        raise ValueError(f"{folder}: {len(theirs)} tensors that no encoder has, such as {sorted(theirs)[0]}")
    wanted = net.encoder.state_dict()
    for name, value in state.items():
        if wanted[name].shape != value.shape:
            raise ValueError(f"{folder}: {name} is {tuple(value.shape)}, wanted {tuple(wanted[name].shape)}")
    net.encoder.load_state_dict({name: value.float() for name, value in state.items()})


def _converted(theirs: dict[str, Tensor], stack: StackConfig, frame: int, patch: int) -> dict[str, Tensor]:
    """Our names and shapes; takes what it uses out of `theirs`."""

    def take(name: str) -> Tensor:
        try:
            return theirs.pop(name)
        except KeyError:
            raise ValueError(f"no tensor {name!r} in this SigLIP 2 folder") from None

    embedding = take("embeddings.patch_embedding.weight")
    padded = embedding.new_zeros(len(embedding), patch)
    padded[:, :frame] = embedding.flatten(1)
    state = {
        "input_layer.weight": padded,
        "input_layer.bias": take("embeddings.patch_embedding.bias"),
        "pos_embedder.position_embedding.weight": take("embeddings.position_embedding.weight"),
        "post_layernorm.weight": take("post_layernorm.weight"),
        "post_layernorm.bias": take("post_layernorm.bias"),
        "head.probe": take("head.probe").flatten(),
    }
    for index in range(stack.blocks):
        ours, other = f"blocks.{index}", f"encoder.layers.{index}"
        for mine, name in BLOCK.items():
            state[f"{ours}.{mine}"] = take(f"{other}.{name}")
        for part in ("weight", "bias"):
            parts = [take(f"{other}.self_attn.{which}_proj.{part}") for which in "qkv"]
            state[f"{ours}.attn.to_qkv.{part}"] = torch.cat(parts)
    for mine, name in HEAD.items():
        state[f"head.{mine}"] = take(f"head.{name}")
    for part in ("weight", "bias"):
        packed = take(f"head.attention.in_proj_{part}")
        state[f"head.attention.to_q.{part}"] = packed[: stack.width]
        state[f"head.attention.to_kv.{part}"] = packed[stack.width :]
    return state


def _vision_config(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted the folder of a Siglip2VisionModel")
    values = json.loads(path.read_text())
    vision: Mapping[str, Any] = values.get("vision_config", values)
    return vision


def _check(theirs: Mapping[str, Any], stack: StackConfig, folder: Path) -> None:
    # What the library leaves out of the file has its default.
    sizes = {
        "hidden_size": (theirs.get("hidden_size", 768), stack.width),
        "num_hidden_layers": (theirs.get("num_hidden_layers", 12), stack.blocks),
        "num_attention_heads": (theirs.get("num_attention_heads", 12), stack.heads),
        "intermediate_size": (theirs.get("intermediate_size", 3072), stack.mlp),
        "patch_size": (theirs.get("patch_size", 16), 16),
        "num_patches": (theirs.get("num_patches", 256), TABLE_SIDE**2),
    }
    wrong = [f"{name} {found}, wanted {wanted}" for name, (found, wanted) in sizes.items() if found != wanted]
    if wrong:
        raise ValueError(f"{folder} does not fit the encoder: " + "; ".join(wrong))


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of the vision tower, names without what comes before it; the text tower and the logit scale are left."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no *.safetensors in this folder")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if not name.startswith(("text_model.", "logit_")):
                    tensors[name.removeprefix("vision_model.")] = file.get_tensor(name)
    return tensors
