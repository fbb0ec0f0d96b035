"""VGG16's convolutions: the network behind LPIPS and the Gram term. Our own graph; weights come by path.

B pictures. Key names are those of torchvision's published file (`features.0.weight`), whose classifier is not read.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)
"""Channels of the five groups, as published."""

DEPTHS = (2, 2, 3, 3, 3)
"""Convolutions of each."""

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class VGG16(nn.Module):
    """Pictures [B, 3, H, W] in -1..1 to the maps relu1_2, 2_2, 3_3, 4_3, 5_3. H and W at least 16."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.widths = tuple(widths)
        # Mean and deviation are of pictures in 0..1.
        self.register_buffer("mean", 2 * torch.tensor(MEAN)[:, None, None] - 1, persistent=False)
        self.register_buffer("deviation", 2 * torch.tensor(DEVIATION)[:, None, None], persistent=False)
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in zip(self.widths, DEPTHS, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Five maps [B, C, H / 2^i, W / 2^i], largest first."""
        if pictures.ndim != 4 or pictures.shape[1] != 3 or min(pictures.shape[2:]) < 16:
            raise ValueError(f"pictures of shape {tuple(pictures.shape)}; wanted [B, 3, H, W], sides of 16 or more")
        h = (pictures - self.mean) / self.deviation
        maps = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(h)
            h = layer(h)
        return [*maps, h]


def load_vgg(path: Path, widths: Sequence[int] = WIDTHS) -> VGG16:
    """A frozen VGG16 from torchvision's file (.pth) or the same as .safetensors.

    Raises FileNotFoundError, and ValueError that names missing keys and wrong shapes.
    """
    net = VGG16(widths)
    tensors = {name: value for name, value in read_tensors(path).items() if name.startswith("features.")}
    fill(net, tensors, path)
    return net


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict from a .pth or .safetensors file, no code run.

    Raises FileNotFoundError, and ValueError for a file of anything else, such as the web page of a failed download.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        found: Any
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as tensors, download it again: {str(error)[:80]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; wanted a state dict of tensors by name")
    # Anything in it that is no tensor becomes a missing key.
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def fill(net: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy a state dict into a network, strictly; then freeze it."""
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        wrong = [
            f"{name}: {found.get(name, 'missing')}, wanted {wanted.get(name, 'no such key')}"
            for name in sorted(wanted.keys() | found.keys())
            if wanted.get(name) != found.get(name)
        ]
        raise ValueError(f"{path} does not fit {type(net).__name__}: " + "; ".join(wrong[:4]))
    net.load_state_dict(tensors)
    net.eval().requires_grad_(False)
