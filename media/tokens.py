"""The token file (`.tokens`, safetensors, version 1): its only reader and writer.

What an item in it must be is in media/token_record.py, whose public names can be had from here too.
Source: the serving design, sections 4.3 and 6.5; `Layout` in the metadata is an addition that makes decode exact.

Letters: N tokens in the file, K items, C latent channels, Q codebooks, D embedding width.

| tensor | written as | also read | shape |
| --- | --- | --- | --- |
| coords | I32 | I16 U8 U16 U32 I64 U64 | [N, 4] (t, x, y, z; x = patch row, y = patch column), 0..4095 |
| offsets | I64 | I32 | [K+1], first 0, last N, rising; may be absent for one item |
| latents | F32 F16 BF16 | F64 | [N, C] |
| codes (instead of latents) | I16 | U8 U16 I32 U32 I64 U64 | [N, Q], 0..4095 |
| embedding (optional) | F32 | F16 BF16 F64 | [D] for one item, [K, D] for several; one item may also come as [1, D] |
| features (optional) | F32 F16 BF16 | F64 | [N, D] |

Metadata (text; JSON where marked): format "atoken-tokens", version "1", model, revision, posterior, seed, and JSON
lists with one value per item: layout, kind, size ([frames, height, width] in pixels), fps. What kind, size and fps
say must be what layout says. posterior and seed tell how latents were drawn; a reader passes over them, and over
every other key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.safetensors_file import Buffer, SafetensorsError, Tensor, parse_json, quoted, read, write
from media.token_record import (
    CODEBOOK_SIZE,
    KINDS,
    MAX_COORD,
    are_sizes,
    check_decodable,
    check_width,
    finite_floats,
    infer_layout,
    layout_from_json,
    layout_to_json,
    ranged_ints,
    read_fps,
    read_kind,
    refuse,
    shape_of,
)
from media.types import Float32Array, Layout, Tokens

__all__ = [
    "FORMAT",
    "METADATA_BYTES",
    "VERSION",
    "FloatName",
    "check_decodable",
    "dump_tokens",
    "infer_layout",
    "layout_from_json",
    "layout_to_json",
    "load_tokens",
    "tokens_from_arrays",
]

FloatName: TypeAlias = Literal["F32", "F16", "BF16"]

FORMAT = "atoken-tokens"
VERSION = "1"
MAX_ITEMS = 1024
METADATA_BYTES = 64 * 1024
MAX_NAME_CHARS = 128

_INTS = ("I16", "I32", "I64", "U8", "U16", "U32", "U64")
_FLOATS = ("F32", "F16", "BF16", "F64")
_DTYPES = {
    "coords": _INTS,
    "offsets": ("I64", "I32"),
    "latents": _FLOATS,
    "codes": _INTS,
    "embedding": _FLOATS,
    "features": _FLOATS,
}
_PER_TOKEN = ("coords", "latents", "codes", "features")


def dump_tokens(
    items: Sequence[Tokens],
    dtype: FloatName = "F32",
    *,
    posterior: Literal["mean", "sample"] | None = None,
    seed: int | None = None,
) -> bytes:
    """Write the token file of one or several items of the same model.

    dtype: of latents and features in the file; the embedding is always F32, codes are I16. posterior, seed: written
    into the metadata when given. Equal input gives equal bytes.
    Raises ValueError when the items do not fit into one file: none or too many, different models or outputs, both
    latents and codes, shapes that disagree, or values that are not finite in `dtype`.
    """
    if not 1 <= len(items) <= MAX_ITEMS:
        raise ValueError(f"{len(items)} items, a token file holds 1 to {MAX_ITEMS}")
    first = items[0]
    outputs = _outputs(first)
    if "latents" in outputs and "codes" in outputs:
        raise ValueError("a token file holds latents or codes, never both: quantising again is not the identity")
    for index, item in enumerate(items):
        if (item.model, item.revision) != (first.model, first.revision):
            raise ValueError(f"item {index} is of model {item.model!r}, item 0 of {first.model!r}: one file, one model")
        if _outputs(item) != outputs:
            raise ValueError(f"item {index} has {_outputs(item)}, item 0 has {outputs}: all must have the same")
        _check_shapes(item, index)
    tensors = {
        "coords": Tensor.of(np.concatenate([item.coords for item in items]).astype(np.int32)),
        "offsets": Tensor.of(np.cumsum([0, *(len(item) for item in items)], dtype=np.int64)),
    }
    for name in outputs:
        joined = _join(name, [getattr(item, name) for item in items])
        if name == "codes":
            tensors[name] = Tensor.of(joined.astype(np.int16))
        else:
            tensors[name] = _float_tensor(name, joined, "F32" if name == "embedding" else dtype)
    try:
        return write(tensors, _metadata(items, posterior, seed))
    except SafetensorsError as error:
        raise ValueError(f"the token file cannot be written: {error}") from None


def load_tokens(data: Buffer, *, limits: Limits | None = None) -> list[Tokens]:
    """Read a token file; believes nothing that it did not check. Arrays are copies: latents, features and embedding
    float32, codes int16, coords int32.

    What a person may leave out of a file made by hand with any safetensors writer: `offsets` when there is one item;
    `format` and `version` (if there, they must be ours); `model` and `revision`, which then are "" for "not said";
    and `layout`. Without `layout`, `kind`, `size` and `fps` are used if there, and the rest is inferred from the
    coords, which for pixels must be complete and in raster order: one token step in t is an image with 1 frame,
    several are a clip with 4 frames a step; sizes are the grid times the patch of 16 x 16 pixels; any z above 0
    means voxels.
    limits: bounds the tokens of an item and of the file and the pixels they stand for (None: only the data's size).

    Raises MediaError: `invalid_token_file` for what is wrong in the file, with tensor, row and value;
    `non_finite_input` for NaN or infinity; `item_too_large`, `too_many_tokens` (all items together) and
    `too_many_items`. What only a decode needs, `check_decodable` looks at.
    """
    try:
        tensors, metadata = read(data)
    except SafetensorsError as error:
        refuse(f"no token file: {error}")
    _check_metadata(metadata)
    _check_names(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES[name]:
            refuse(f"{name} has dtype {tensor.dtype}, allowed are {', '.join(_DTYPES[name])}")
        _check_token_count(name, tensor.shape, limits)
    parts = _split({name: tensor.numpy() for name, tensor in tensors.items()}, limits)
    layouts = _layouts_of_metadata(metadata, parts)
    return _records(parts, layouts, metadata.get("model", ""), metadata.get("revision", ""), limits)


def tokens_from_arrays(
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    model: str = "",
    revision: str = "",
    layouts: Sequence[Layout] | None = None,
    limits: Limits | None = None,
) -> list[Tokens]:
    """Build the records of a token file from arrays that came another way (JSON).

    arrays: names and shapes as in the file, of any float or integer dtype that holds the values. layouts: one per
    item, None to infer them from the coords as `load_tokens` does. Raises MediaError as `load_tokens` does.
    """
    _check_names(arrays)
    _check_model_name("model", model)
    _check_model_name("revision", revision)
    for name, array in arrays.items():
        _check_token_count(name, array.shape, limits)
    parts = _split(arrays, limits)
    if layouts is None:
        layouts = [infer_layout(part["coords"]) for part in parts]
    elif len(layouts) != len(parts):
        refuse(f"{len(layouts)} layouts are given for {len(parts)} items")
    return _records(parts, layouts, model, revision, limits)


# --- writing


def _outputs(item: Tokens) -> list[str]:
    return [name for name in ("latents", "codes", "embedding", "features") if getattr(item, name) is not None]


def _check_shapes(item: Tokens, index: int) -> None:
    if item.coords.ndim != 2 or item.coords.shape[1] != 4 or len(item) == 0:
        raise ValueError(f"item {index} has coords of shape {shape_of(item.coords)}, needed is [N, 4] with N above 0")
    for name in _outputs(item):
        array = getattr(item, name)
        if name == "embedding":
            if array.ndim != 1:
                raise ValueError(f"item {index} has an embedding of shape {shape_of(array)}, needed is [D]")
        elif array.ndim != 2 or len(array) != len(item):
            raise ValueError(f"item {index} has {name} of shape {shape_of(array)} with {len(item)} rows of coords")


def _join(name: str, arrays: list[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    widths = {array.shape[-1] for array in arrays}
    if len(widths) > 1:
        raise ValueError(f"items have {name} of different widths {sorted(widths)}: one file, one model")
    if name == "embedding":
        return arrays[0] if len(arrays) == 1 else np.stack(arrays)
    joined = np.concatenate(arrays)
    if name == "codes" and ((joined < 0) | (joined >= CODEBOOK_SIZE)).any():
        raise ValueError(f"codes reach from {joined.min()} to {joined.max()}, allowed are 0 to {CODEBOOK_SIZE - 1}")
    return joined


def _float_tensor(name: str, array: npt.NDArray[np.floating], dtype: FloatName) -> Tensor:
    with np.errstate(over="ignore"):
        tensor = (
            Tensor.bf16_of(array)
            if dtype == "BF16"
            else Tensor.of(array.astype(np.float16 if dtype == "F16" else np.float32))
        )
    if not np.isfinite(tensor.numpy()).all():
        raise ValueError(f"{name} hold values that are not finite in {dtype}")
    return tensor


def _metadata(items: Sequence[Tokens], posterior: str | None, seed: int | None) -> dict[str, str]:
    def as_json(values: list[Any]) -> str:
        return json.dumps(values, separators=(",", ":"), allow_nan=False)

    layouts = [item.layout for item in items]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": items[0].model,
        "revision": items[0].revision,
        "layout": as_json([layout_to_json(layout) for layout in layouts]),
        "kind": as_json([layout.kind for layout in layouts]),
        "size": as_json([[layout.frames, layout.height, layout.width] for layout in layouts]),
        "fps": as_json([layout.fps for layout in layouts]),
    }
    if posterior is not None:
        metadata["posterior"] = posterior
    if seed is not None:
        metadata["seed"] = str(seed)
    size = _metadata_bytes(metadata)
    if size > METADATA_BYTES:
        raise ValueError(f"{len(items)} items need {size} bytes of metadata, a token file holds {METADATA_BYTES}")
    return metadata


def _metadata_bytes(metadata: Mapping[str, str]) -> int:
    return sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())


# --- reading


def _check_metadata(metadata: Mapping[str, str]) -> None:
    size = _metadata_bytes(metadata)
    if size > METADATA_BYTES:
        refuse(f"{size} bytes of metadata, at most {METADATA_BYTES} are allowed", METADATA_BYTES, size)
    for key, ours in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key, ours) != ours:
            refuse(f"the metadata says {key} {quoted(metadata[key])}, this reads {key} {ours!r}")
    _check_model_name("model", metadata.get("model", ""))
    _check_model_name("revision", metadata.get("revision", ""))


def _check_model_name(key: str, name: str) -> None:
    if len(name) > MAX_NAME_CHARS or not (name.isascii() and name.isprintable()):
        refuse(f"{key} must be at most {MAX_NAME_CHARS} printable ASCII characters")


def _check_names(arrays: Mapping[str, object]) -> None:
    for name in arrays:
        if name not in _DTYPES:
            refuse(f"there is a tensor {quoted(name)}, known are {', '.join(_DTYPES)}")
    if "latents" in arrays and "codes" in arrays:
        refuse("there are latents and codes; a token file holds one of them (quantising again is not the identity)")


def _check_token_count(name: str, shape: tuple[int, ...], limits: Limits | None) -> None:
    if limits is not None and name in _PER_TOKEN and shape and shape[0] > limits.request_tokens:
        raise MediaError(
            "too_many_tokens",
            f"{name} has {shape[0]} rows, at most {limits.request_tokens} tokens are allowed",
            limit=limits.request_tokens,
            actual=shape[0],
        )


def _split(arrays: Mapping[str, npt.NDArray[Any]], limits: Limits | None) -> list[dict[str, npt.NDArray[Any]]]:
    """Check values and shapes, convert to the dtypes of the records, cut into items."""
    # Values first: who sends NaN without coords learns about the NaN.
    whole: dict[str, npt.NDArray[Any]] = {}
    for name in ("latents", "features", "embedding"):
        if name in arrays:
            whole[name] = finite_floats(name, arrays[name])
    if "codes" in arrays:
        whole["codes"] = ranged_ints("codes", arrays["codes"], 0, CODEBOOK_SIZE - 1).astype(np.int16)
    if "coords" not in arrays:
        refuse(f"there is no tensor coords [N, 4], only {', '.join(sorted(arrays)) or 'none at all'}")
    whole["coords"] = ranged_ints("coords", arrays["coords"], 0, MAX_COORD).astype(np.int32)
    count = len(whole["coords"]) if whole["coords"].ndim else 0
    if whole["coords"].shape != (count, 4) or count == 0:
        refuse(f"coords have shape {shape_of(whole['coords'])}, needed is [N, 4] with at least one row")
    for name in ("latents", "codes", "features"):
        if name in whole:
            check_width(name, whole[name], count, None)
    offsets = _offsets(arrays.get("offsets"), count, limits)
    items = len(offsets) - 1
    if "embedding" in whole:
        whole["embedding"] = _embedding(whole["embedding"], items)
    parts: list[dict[str, npt.NDArray[Any]]] = []
    for index, (start, stop) in enumerate(pairwise(offsets)):
        part = {name: array[start:stop] for name, array in whole.items() if name != "embedding"}
        if "embedding" in whole:
            part["embedding"] = whole["embedding"][index]
        parts.append(part)
    return parts


def _offsets(found: npt.NDArray[Any] | None, count: int, limits: Limits | None) -> list[int]:
    if found is None:
        offsets = [0, count]
    else:
        ranged_ints("offsets", found, 0, count)
        if found.ndim != 1 or len(found) < 2:
            refuse(f"offsets have shape {shape_of(found)}, needed is [items + 1]")
        if len(found) - 1 > MAX_ITEMS:
            raise MediaError(
                "too_many_items",
                f"{len(found) - 1} items, at most {MAX_ITEMS} are allowed",
                limit=MAX_ITEMS,
                actual=len(found) - 1,
            )
        offsets = [int(value) for value in found]
        if offsets[0] != 0 or offsets[-1] != count:
            refuse(f"offsets go from {offsets[0]} to {offsets[-1]}, needed is from 0 to the {count} rows of coords")
        for index, (start, stop) in enumerate(pairwise(offsets)):
            if start >= stop:
                refuse(f"offsets row {index + 1} is {stop} after {start}; they must rise, no item is empty")
    for index, (start, stop) in enumerate(pairwise(offsets)):
        if limits is not None and stop - start > limits.item_tokens:
            raise MediaError(
                "item_too_large",
                f"item {index} has {stop - start} tokens, at most {limits.item_tokens} are allowed",
                limit=limits.item_tokens,
                actual=stop - start,
            )
    return offsets


def _embedding(found: Float32Array, items: int) -> Float32Array:
    if found.ndim == 1 and items == 1:
        found = found[None]
    if found.ndim != 2 or len(found) != items or found.shape[1] == 0:
        wanted = "[D] or [1, D]" if items == 1 else f"[{items}, D]"
        refuse(f"embedding has shape {shape_of(found)}, needed is {wanted}")
    return found


def _records(
    parts: list[dict[str, npt.NDArray[Any]]],
    layouts: Sequence[Layout],
    model: str,
    revision: str,
    limits: Limits | None,
) -> list[Tokens]:
    for index, layout in enumerate(layouts):
        size = layout.frames * layout.height * layout.width * 3
        if limits is not None and size > limits.decode_bytes:
            raise MediaError(
                "item_too_large",
                f"item {index} stands for {size} bytes of pixels, at most {limits.decode_bytes} are allowed",
                limit=limits.decode_bytes,
                actual=size,
            )
        # What attends to each other when it is decoded: four latent frames of a clip, else the whole item.
        t, h, w = layout.grid
        window = min(t, 4) * h * w if layout.kind == "video" else len(parts[index]["coords"])
        if limits is not None and window > limits.window_tokens:
            raise MediaError(
                "item_too_large",
                f"item {index} has a window of {window} tokens, at most {limits.window_tokens} are allowed",
                limit=limits.window_tokens,
                actual=window,
            )
    return [
        Tokens(
            coords=part["coords"],
            layout=layout,
            latents=part.get("latents"),
            codes=part.get("codes"),
            embedding=part.get("embedding"),
            features=part.get("features"),
            model=model,
            revision=revision,
        )
        for part, layout in zip(parts, layouts, strict=True)
    ]


def _layouts_of_metadata(metadata: Mapping[str, str], parts: list[dict[str, npt.NDArray[Any]]]) -> list[Layout]:
    count = len(parts)
    kinds = [None if kind is None else read_kind(kind) for kind in _per_item(metadata, "kind", count)]
    sizes = [None if size is None else _size(size) for size in _per_item(metadata, "size", count)]
    rates = [read_fps(fps) for fps in _per_item(metadata, "fps", count)]
    if "layout" not in metadata:
        return [
            infer_layout(part["coords"], kind=kind, size=size, fps=fps)
            for part, kind, size, fps in zip(parts, kinds, sizes, rates, strict=True)
        ]
    layouts = [layout_from_json(found) for found in _per_item(metadata, "layout", count)]
    for index, layout in enumerate(layouts):
        for key, found, said in (
            ("kind", kinds[index], layout.kind),
            ("size", sizes[index], (layout.frames, layout.height, layout.width)),
            ("fps", rates[index], layout.fps),
        ):
            if found is not None and found != said:
                refuse(f"the metadata contradicts itself: item {index} has {key} {found}, in its layout {said}")
    return layouts


def _size(found: object) -> tuple[int, int, int]:
    if not are_sizes(found):
        refuse("size in the metadata must be [frames, height, width] per item, in pixels")
    return found[0], found[1], found[2]


def _per_item(metadata: Mapping[str, str], key: str, items: int) -> list[Any]:
    """Read a JSON list with a value per item; a lone value will do for a single item."""
    text = metadata.get(key)
    if text is None:
        return [None] * items
    try:
        found = text if text in KINDS else parse_json(text)
    except SafetensorsError as error:
        refuse(f"{key} in the metadata: {error}")
    if not isinstance(found, list) or (key == "size" and not any(isinstance(value, list) for value in found)):
        found = [found]
    if len(found) != items:
        refuse(f"{key} in the metadata has {len(found)} values for {items} items")
    return found
