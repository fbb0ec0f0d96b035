"""Texts to embeddings: SigLIP 2's text tower with its ids. B texts, C channels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from training.teachers import load_text
from training.text import CaptionTokens

BATCH = 64
"""Texts of one pass."""


class Texts(Protocol):
    """What texts are compared by; its str says what it is."""

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, float32 [B, C] on the CPU, of any length."""
        ...


class TextTower:
    """A loaded tower. checksum: SHA-256 over its weights files, hexadecimal."""

    def __init__(self, folder: Path | None, width: int, device: torch.device | str = "cpu") -> None:
        """width: C of the embeddings that texts are compared with. Raises as load_text and CaptionTokens do."""
        self._net = load_text(folder, width, device)
        assert folder is not None  # load_text refuses that
        self._tokens = CaptionTokens(folder)
        self._device = torch.device(device)
        self.name = folder.resolve().name
        self.checksum = _checksum(folder)

    def __str__(self) -> str:
        return f"text tower {self.name} (sha256 {self.checksum[:12]})"

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings, float32 [B, C] on the CPU, as the tower gives them. Each text is cleaned and has 64 ids."""
        parts = [
            self._net(self._tokens(texts[start : start + BATCH]).to(self._device)).float().cpu()
            for start in range(0, len(texts), BATCH)
        ]
        return torch.cat(parts)


def _checksum(folder: Path) -> str:
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    sums = []
    for path in paths:
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").hexdigest())
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()
