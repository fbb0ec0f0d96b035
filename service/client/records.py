"""What the client hands back: token files taken apart, models, encoded files. Plain records with numpy arrays."""

from __future__ import annotations

import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from service.client.errors import AnswerError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}


@dataclass(frozen=True, kw_only=True)
class ItemTokens:
    """The tokens of one image or clip.

    kind: image, video or voxels. frames, height, width: of the pixels that decode gives back. fps: of a clip, if known.
    coords: int32 [n, 4] (t, x, y, z; x = patch row, y = patch column). latents: float32 [n, L]. codes: int16 [n, K].
    embedding: float32 [D], unit length. features: float32 [n, D]. What was not asked for is None.
    """

    kind: str
    frames: int
    height: int
    width: int
    fps: float | None
    coords: npt.NDArray[np.int32]
    latents: npt.NDArray[np.float32] | None = None
    codes: npt.NDArray[np.int16] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    features: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.coords)


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """An answer of encode or embed. data: the token file as it came (safetensors), to be saved or sent to decode."""

    data: bytes = field(repr=False)
    model: str
    revision: str
    items: tuple[ItemTokens, ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the token file."""
        Path(path).write_bytes(self.data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Read a token file. Raises AnswerError when it is none, OSError when it cannot be read."""
        return cls.parse(Path(path).read_bytes())

    @classmethod
    def parse(cls, data: bytes) -> TokenFile:
        """Take the bytes of a token file apart. Raises AnswerError when they are none."""
        tensors, metadata = _safetensors(data)
        try:
            return cls(
                data=data,
                model=metadata.get("model", ""),
                revision=metadata.get("revision", ""),
                items=_items(tensors, metadata),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise AnswerError(f"the token file breaks its own format: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What one item decodes to. pixels: uint8 [H, W, 3] of an image, [T, H, W, 3] of a clip, RGB; None for voxels.

    fps: of a clip, if known. coords: int32 [n, 3] and feats: float32 [n, 768] of voxels, else None.
    """

    kind: str
    pixels: npt.NDArray[np.uint8] | None = None
    fps: float | None = None
    coords: npt.NDArray[np.int32] | None = None
    feats: npt.NDArray[np.float32] | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Decoded:
        """Build from an entry of a JSON answer of decode. Raises AnswerError when it has another form."""
        try:
            arrays = {name: _array(entry[name]) for name in ("pixels", "coords", "feats") if name in entry}
            return cls(kind=str(entry["kind"]), fps=entry.get("fps"), **arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"the answer of decode has an item that cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class EncodedFile:
    """A decoded image or clip as a file. data: its bytes; media_type: image/png, video/mp4, ..."""

    data: bytes = field(repr=False)
    media_type: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the service says about one of its models. text: it embeds texts, too. card: all of it, as it came."""

    name: str
    revision: str
    outputs: tuple[str, ...]
    kinds: tuple[str, ...]
    latent_channels: int
    codebooks: int
    embedding_dim: int
    text: bool
    card: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, card: Mapping[str, Any]) -> Model:
        """Build from a model card. Raises AnswerError when something is missing."""
        try:
            return cls(
                name=str(card["name"]),
                revision=str(card["revision"]),
                outputs=tuple(card["outputs"]),
                kinds=tuple(card["kinds"]),
                latent_channels=int(card["latent_channels"]),
                codebooks=int(card.get("codebooks", 0)),
                embedding_dim=int(card.get("embedding_dim", 0)),
                text=bool(card.get("text", False)),
                card=card,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"a model card lacks or breaks {error}") from error


def text_embeddings(answer: Mapping[str, Any], count: int) -> npt.NDArray[np.float32]:
    """Read the embeddings of texts out of a JSON answer of embed: float32 [count, D]. Raises AnswerError."""
    try:
        rows = [_array(entry["embedding"]) for entry in answer["items"]]
        if len(rows) != count:
            raise ValueError(f"{len(rows)} items for {count} texts")
        return np.stack(rows).astype(np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise AnswerError(f"the answer of embed cannot be read: {error}") from error


def _safetensors(data: bytes) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Read all tensors (BF16 as float32) and the metadata; the package checks the file, but gives no metadata."""
    try:
        found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError) as error:
        raise AnswerError(f"this is no token file: {error}") from error
    tensors = {}
    for name, entry in found:
        dtype = entry["dtype"]
        if dtype not in _DTYPES:
            raise AnswerError(f"the token file has a tensor of dtype {dtype}, known are {', '.join(_DTYPES)}")
        array = np.frombuffer(bytearray(entry["data"]), dtype=_DTYPES[dtype]).reshape(entry["shape"])
        tensors[name] = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
    return tensors, header.get("__metadata__", {})


def _array(found: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Read an array out of JSON: base64 of little-endian bytes with dtype and shape."""
    dtype = np.dtype(found["dtype"]).newbyteorder("<")
    data = binascii.a2b_base64(found["data"], strict_mode=True)
    return np.frombuffer(bytearray(data), dtype=dtype).reshape(found["shape"])


def _items(tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> tuple[ItemTokens, ...]:
    coords = tensors["coords"]
    offsets = [int(row) for row in tensors["offsets"]] if "offsets" in tensors else [0, len(coords)]
    if offsets[0] != 0 or offsets[-1] != len(coords):
        raise ValueError(f"offsets go from {offsets[0]} to {offsets[-1]} for {len(coords)} rows of coords")
    count = len(offsets) - 1
    kinds = _per_item(metadata, "kind", "", count)
    sizes = _per_item(metadata, "size", [0, 0, 0], count)
    rates = _per_item(metadata, "fps", None, count)
    floats = {
        name: tensors[name].astype(np.float32) for name in ("latents", "embedding", "features") if name in tensors
    }
    embedding = floats.pop("embedding", None)
    if embedding is not None:
        embedding = embedding.reshape(count, -1)
    items = []
    for index, (start, stop) in enumerate(pairwise(offsets)):
        frames, height, width = sizes[index]
        items.append(
            ItemTokens(
                kind=kinds[index],
                frames=frames,
                height=height,
                width=width,
                fps=rates[index],
                coords=coords[start:stop].astype(np.int32),
                codes=tensors["codes"][start:stop].astype(np.int16) if "codes" in tensors else None,
                embedding=None if embedding is None else embedding[index],
                latents=floats["latents"][start:stop] if "latents" in floats else None,
                features=floats["features"][start:stop] if "features" in floats else None,
            )
        )
    return tuple(items)


def _per_item(metadata: Mapping[str, str], key: str, default: Any, count: int) -> list[Any]:
    found = json.loads(metadata[key]) if key in metadata else [default] * count
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"{key} must be a list with {count} values")
    return found
