"""A small random SigLIP 2 as the library saves it, with a vocabulary of a few words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "an", "the", "of", "photo", "dog", "cat", "bird", "red", "green", "blue", "square"]


def save_siglip2(folder: Path, width: int, vocabulary: int = 100) -> None:
    """Both towers, `width` wide, in config.json and model.safetensors."""
    transformers = pytest.importorskip("transformers", reason="SigLIP 2 comes through transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Siglip2Config(
        vision_config={**sizes, "patch_size": 16, "num_patches": 256},
        text_config={**sizes, "vocab_size": vocabulary, "projection_size": width, "max_position_embeddings": 64},
    )
    transformers.Siglip2Model(config).save_pretrained(folder)


def save_vocabulary(folder: Path, words: list[str]) -> None:
    """tokenizer.json of whole words; the first must be <pad>, and <eos> and <unk> be among them."""
    vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary.save(str(folder / "tokenizer.json"))


def save_text_tower(folder: Path, width: int) -> Path:
    """A tower that knows WORDS."""
    save_siglip2(folder, width)
    save_vocabulary(folder, ["<pad>", "<eos>", "<unk>", *WORDS])
    return folder
