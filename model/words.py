"""Words to the space of the bundled models' embeddings: a table with one vector a word, and their mean.

No part of the published architecture, whose text tower is SigLIP 2's. C channels of an embedding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import RangeError, UnsupportedError, WeightsError

BUNDLED = Path(__file__).parent / "bundled" / "words"
EMPTY_WORDS = frozenset(
    ("a", "an", "the", "this", "that", "it", "its", "is", "are", "and", "or", "photo", "picture", "image")
) | frozenset(("of", "in", "on", "at", "to", "with", "by", "from", "for"))
"""What says nothing of a picture."""
SHOWN = 50
"""Characters of a text that a refusal repeats."""


class WordTable:
    """words: V of them; vectors: [V, C]; mean: [C], what the vector of any text has."""

    def __init__(self, words: Sequence[str], vectors: Tensor, mean: Tensor) -> None:
        self.words = tuple(words)
        self._rows = {word: row for row, word in enumerate(self.words)}
        self.vectors = vectors.float()
        self.mean = mean.float()

    @classmethod
    def load(cls, name: str = "tiny-words") -> WordTable:
        """A bundled table by its name, or a file. Raises UnsupportedError or WeightsError."""
        path = BUNDLED / f"{name}.safetensors"
        if not path.is_file():
            path = Path(name)
        if not path.is_file():
            bundled = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.safetensors")))
            raise UnsupportedError(f"words {name!r}: no bundled table ({bundled}) and no file of that name")
        try:
            with safe_open(path, framework="pt") as file:
                words = json.loads((file.metadata() or {})["words"])
                vectors = file.get_tensor("levels").float() * file.get_tensor("steps")[:, None]
                return cls(words, vectors, file.get_tensor("mean"))
        except (SafetensorError, KeyError, ValueError) as error:
            raise WeightsError(f"{path.name}: not a table of words: {error}") from error

    def save(self, path: Path, note: str) -> None:
        """Write it with 8 bits a value."""
        steps = self.vectors.abs().amax(1).clamp(min=1e-8) / 127
        levels = (self.vectors / steps[:, None]).round().to(torch.int8)
        tensors = {"levels": levels, "steps": steps, "mean": self.mean.contiguous()}
        save_file(tensors, path, metadata={"words": json.dumps(self.words), "note": note})
        path.chmod(0o644)  # safetensors writes for the owner alone

    def known(self, text: str) -> list[int]:
        """Rows of the words of a text that the table has; of a plural that it lacks, the singular's."""
        return [row for _, row in self._found(text) if row is not None]

    def unknown(self, text: str) -> list[str]:
        """Words of a text that say nothing here, each once."""
        return list(dict.fromkeys(word for word, row in self._found(text) if row is None))

    def _found(self, text: str) -> Iterator[tuple[str, int | None]]:
        for word in re.sub(r"[\W\d_]+", " ", text.lower()).split():
            if word not in EMPTY_WORDS:
                forms = (word, word.removesuffix("s"), word.removesuffix("es"), word + "s")
                yield word, next((self._rows[form] for form in forms if form in self._rows), None)

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings [B, C] of length 1. Raises RangeError for a text without a known word."""
        parts = []
        for text in texts:
            rows = self.known(text)
            if not rows:
                shown = f"{text[:SHOWN]!r}{'...' if len(text) > SHOWN else ''}"
                raise RangeError(f"{shown}: no word of it is known; wanted plain English words for what can be seen")
            parts.append(self.vectors[rows].mean(0) + self.mean)
        return F.normalize(torch.stack(parts), dim=1)
