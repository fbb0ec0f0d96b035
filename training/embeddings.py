"""Items of a folder to embeddings, by a protocol of words. N items, C channels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from media.decode import decode_media
from media.errors import MediaError
from media.types import Asset, Image, UInt8Array, Voxels
from model import Tokenizer
from training.eval_items import LIMITS, Found, read_pixels, spread_frames
from training.protocols import resized
from training.word_protocols import WordProtocol

BATCH = 32
"""Pictures that are handed to the model at once."""


def embed_items(tokenizer: Tokenizer, protocol: WordProtocol, found: Found) -> Tensor:
    """Embeddings, float32 [N, C]. Raises ValueError for a file that cannot be read."""
    if found.kind == "image":
        rows = []
        for start in range(0, len(found.paths), BATCH):
            pictures = [_square(read_pixels(path), protocol) for path in found.paths[start : start + BATCH]]
            rows.append(tokenizer.embed([Image(pixels=picture) for picture in pictures]))
        return torch.from_numpy(np.concatenate(rows))
    if found.kind == "video":
        return torch.stack([_clip(tokenizer, protocol, path) for path in found.paths])
    return torch.from_numpy(np.concatenate([tokenizer.embed([_voxels(path)]) for path in found.paths]))


def _clip(tokenizer: Tokenizer, protocol: WordProtocol, path: Path) -> Tensor:
    """The mean over frames, each seen as an image, [C]: as published, where one pooling over the clip was worse."""
    frames = [_square(frame, protocol) for frame in spread_frames(path, protocol.frames)]
    if not frames:
        raise ValueError(f"{path}: no frame in it")
    return torch.from_numpy(tokenizer.embed([Image(pixels=frame) for frame in frames])).mean(0)


def _square(picture: UInt8Array, protocol: WordProtocol) -> UInt8Array:
    return resized(picture[None], protocol.side, protocol.side, protocol.filter)[0]


def _voxels(path: Path) -> Voxels:
    try:
        asset = decode_media(path.read_bytes(), LIMITS, "asset")
    except MediaError as error:
        raise ValueError(f"{path}: {error.detail}") from None
    assert isinstance(asset, Asset)  # nothing else is declared so
    return asset.voxels
