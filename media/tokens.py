"""The token file (`.tokens`, safetensors, version 1): the only reader and writer, and the check before a decode.

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
lists with one value per item: layout, kind, size ([frames, height, width] in pixels), fps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NoReturn, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.safetensors_file import Buffer, SafetensorsError, Tensor, parse_json, quoted, read, write
from media.types import Float32Array, Int32Array, Kind, Layout, Tokens

FloatName: TypeAlias = Literal["F32", "F16", "BF16"]

FORMAT = "atoken-tokens"
VERSION = "1"
PATCH = (4, 16, 16)
"""Frames, rows and columns of pixels that one token stands for; fixed by the published weights."""

MAX_COORD = 4095
CODEBOOK_SIZE = 4096
MAX_LATENT = 1e4
MAX_ITEMS = 1024
METADATA_BYTES = 64 * 1024
MAX_NAME_CHARS = 128
KINDS = ("image", "video", "voxels")

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
        _refuse(f"no token file: {error}")
    _check_metadata(metadata)
    _check_names(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES[name]:
            _refuse(f"{name} has dtype {tensor.dtype}, allowed are {', '.join(_DTYPES[name])}")
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
        _refuse(f"{len(layouts)} layouts are given for {len(parts)} items")
    return _records(parts, layouts, model, revision, limits)


def check_decodable(tokens: Tokens, *, latent_channels: int | None = None, codebooks: int | None = None) -> None:
    """Refuse tokens of one item that cannot be decoded, naming row and value.

    Wanted are latents (finite, at most 1e4 in size) or codes (0..4095), not both; coords within 0..4095, none twice;
    for pixels z = 0 and the complete raster of a grid that fits the layout's sizes; for voxels t = 0.
    latent_channels, codebooks: widths that the model takes, None to leave them unchecked (0: it takes no codes).
    Raises MediaError `invalid_token_file` or `non_finite_input`.
    """
    coords = tokens.coords
    if coords.ndim != 2 or coords.shape[1] != 4 or len(coords) == 0:
        _refuse(f"coords have shape {_shape(coords)}, needed is [N, 4] with at least one row")
    _ranged_ints("coords", coords, 0, MAX_COORD)
    if tokens.latents is not None and tokens.codes is not None:
        _refuse("there are latents and codes; only one of them can be decoded")
    if tokens.latents is not None:
        _check_width("latents", tokens.latents, len(coords), latent_channels)
        _finite_floats("latents", tokens.latents)
        _refuse_where(
            "latents", tokens.latents, np.abs(tokens.latents) > MAX_LATENT, f"-{MAX_LATENT:g} to {MAX_LATENT:g}"
        )
    elif tokens.codes is not None:
        if codebooks == 0:
            _refuse("there are codes, this model takes latents only")
        _check_width("codes", tokens.codes, len(coords), codebooks)
        _ranged_ints("codes", tokens.codes, 0, CODEBOOK_SIZE - 1)
    else:
        _refuse("there are neither latents nor codes to decode")
    problem = _layout_problem(tokens.layout)
    if problem:
        _refuse(f"layout: {problem}")
    if tokens.layout.kind == "voxels":
        _refuse_where("coords", coords[:, :1], coords[:, :1] != 0, "0 (voxels have no time)")
        _refuse_duplicates(coords)
    else:
        problem = _raster_problem(coords, tokens.layout.grid)
        if problem:
            _refuse_duplicates(coords)
            _refuse(problem)


def infer_layout(
    coords: Int32Array,
    *,
    kind: Kind | None = None,
    size: tuple[int, int, int] | None = None,
    fps: float | None = None,
) -> Layout:
    """Work out the layout of one item from its coords [n, 4] (0..4095), with what else is known of it.

    Rules as in `load_tokens`. size: frames, height, width in pixels. Raises MediaError `invalid_token_file` when the
    coords of an item that may be pixels are no complete raster, or kind and size do not fit them.
    """
    if kind is None and coords[:, 3].any():
        kind = "voxels"
    if kind == "voxels":
        return Layout(kind="voxels", frames=0, height=0, width=0, grid=(0, 0, 0))
    top = coords.max(axis=0)
    grid = (int(top[0]) + 1, int(top[1]) + 1, int(top[2]) + 1)
    problem = _raster_problem(coords, grid)
    if problem:
        _refuse_duplicates(coords)
        _refuse(f"without a layout in the metadata the coords must be a complete raster, but {problem}")
    if kind is None:
        kind = "image" if grid[0] == 1 and (size is None or size[0] == 1) else "video"
    frames, height, width = size or (
        1 if kind == "image" else PATCH[0] * grid[0],
        PATCH[1] * grid[1],
        PATCH[2] * grid[2],
    )
    layout = Layout(kind=kind, frames=frames, height=height, width=width, grid=grid, fps=fps)
    problem = _layout_problem(layout)
    if problem:
        _refuse(f"kind and size do not fit the coords: {problem}")
    return layout


def layout_to_json(layout: Layout) -> dict[str, Any]:
    """Give the layout as a JSON object; `layout_from_json` is the inverse."""
    return {
        "kind": layout.kind,
        "frames": layout.frames,
        "height": layout.height,
        "width": layout.width,
        "grid": list(layout.grid),
        "fps": layout.fps,
    }


def layout_from_json(found: object) -> Layout:
    """Read what `layout_to_json` gave; checks types, ranges and that sizes and grid fit. `fps` may be left out.

    Raises MediaError `invalid_token_file`.
    """
    wanted = {"kind", "frames", "height", "width", "grid"}
    if not isinstance(found, dict) or not wanted <= set(found) <= wanted | {"fps"}:
        _refuse("a layout must be an object with kind, frames, height, width, grid and perhaps fps")
    numbers = [found["frames"], found["height"], found["width"]]
    grid = found["grid"]
    if not _are_sizes(numbers) or not _are_sizes(grid):
        _refuse("a layout must have whole numbers, none negative: frames, height, width, and three of them in grid")
    layout = Layout(
        kind=_kind(found["kind"]),
        frames=numbers[0],
        height=numbers[1],
        width=numbers[2],
        grid=(grid[0], grid[1], grid[2]),
        fps=_fps(found.get("fps")),
    )
    problem = _layout_problem(layout)
    if problem:
        _refuse(f"layout: {problem}")
    return layout


# --- writing


def _outputs(item: Tokens) -> list[str]:
    return [name for name in ("latents", "codes", "embedding", "features") if getattr(item, name) is not None]


def _check_shapes(item: Tokens, index: int) -> None:
    if item.coords.ndim != 2 or item.coords.shape[1] != 4 or len(item) == 0:
        raise ValueError(f"item {index} has coords of shape {_shape(item.coords)}, needed is [N, 4] with N above 0")
    for name in _outputs(item):
        array = getattr(item, name)
        if name == "embedding":
            if array.ndim != 1:
                raise ValueError(f"item {index} has an embedding of shape {_shape(array)}, needed is [D]")
        elif array.ndim != 2 or len(array) != len(item):
            raise ValueError(f"item {index} has {name} of shape {_shape(array)} with {len(item)} rows of coords")


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
        _refuse(f"{size} bytes of metadata, at most {METADATA_BYTES} are allowed", METADATA_BYTES, size)
    for key, ours in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key, ours) != ours:
            _refuse(f"the metadata says {key} {quoted(metadata[key])}, this reads {key} {ours!r}")
    _check_model_name("model", metadata.get("model", ""))
    _check_model_name("revision", metadata.get("revision", ""))


def _check_model_name(key: str, name: str) -> None:
    if len(name) > MAX_NAME_CHARS or not (name.isascii() and name.isprintable()):
        _refuse(f"{key} must be at most {MAX_NAME_CHARS} printable ASCII characters")


def _check_names(arrays: Mapping[str, object]) -> None:
    for name in arrays:
        if name not in _DTYPES:
            _refuse(f"there is a tensor {quoted(name)}, known are {', '.join(_DTYPES)}")
    if "latents" in arrays and "codes" in arrays:
        _refuse("there are latents and codes; a token file holds one of them (quantising again is not the identity)")


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
            whole[name] = _finite_floats(name, arrays[name])
    if "codes" in arrays:
        whole["codes"] = _ranged_ints("codes", arrays["codes"], 0, CODEBOOK_SIZE - 1).astype(np.int16)
    if "coords" not in arrays:
        _refuse(f"there is no tensor coords [N, 4], only {', '.join(sorted(arrays)) or 'none at all'}")
    whole["coords"] = _ranged_ints("coords", arrays["coords"], 0, MAX_COORD).astype(np.int32)
    count = len(whole["coords"]) if whole["coords"].ndim else 0
    if whole["coords"].shape != (count, 4) or count == 0:
        _refuse(f"coords have shape {_shape(whole['coords'])}, needed is [N, 4] with at least one row")
    for name in ("latents", "codes", "features"):
        if name in whole:
            _check_width(name, whole[name], count, None)
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
        _ranged_ints("offsets", found, 0, count)
        if found.ndim != 1 or len(found) < 2:
            _refuse(f"offsets have shape {_shape(found)}, needed is [items + 1]")
        if len(found) - 1 > MAX_ITEMS:
            raise MediaError(
                "too_many_items",
                f"{len(found) - 1} items, at most {MAX_ITEMS} are allowed",
                limit=MAX_ITEMS,
                actual=len(found) - 1,
            )
        offsets = [int(value) for value in found]
        if offsets[0] != 0 or offsets[-1] != count:
            _refuse(f"offsets go from {offsets[0]} to {offsets[-1]}, needed is from 0 to the {count} rows of coords")
        for index, (start, stop) in enumerate(pairwise(offsets)):
            if start >= stop:
                _refuse(f"offsets row {index + 1} is {stop} after {start}; they must rise, no item is empty")
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
        _refuse(f"embedding has shape {_shape(found)}, needed is {wanted}")
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
    if "layout" in metadata:
        return [layout_from_json(found) for found in _per_item(metadata, "layout", len(parts))]
    kinds, sizes, rates = (_per_item(metadata, key, len(parts)) for key in ("kind", "size", "fps"))
    layouts = []
    for part, kind, size, fps in zip(parts, kinds, sizes, rates, strict=True):
        if size is not None and not _are_sizes(size):
            _refuse("size in the metadata must be [frames, height, width] per item, in pixels")
        layouts.append(
            infer_layout(
                part["coords"],
                kind=None if kind is None else _kind(kind),
                size=None if size is None else (size[0], size[1], size[2]),
                fps=_fps(fps),
            )
        )
    return layouts


def _per_item(metadata: Mapping[str, str], key: str, items: int) -> list[Any]:
    """Read a JSON list with a value per item; a lone value will do for a single item."""
    text = metadata.get(key)
    if text is None:
        return [None] * items
    try:
        found = text if text in KINDS else parse_json(text)
    except SafetensorsError as error:
        _refuse(f"{key} in the metadata: {error}")
    if not isinstance(found, list) or (key == "size" and not any(isinstance(value, list) for value in found)):
        found = [found]
    if len(found) != items:
        _refuse(f"{key} in the metadata has {len(found)} values for {items} items")
    return found


def _kind(found: object) -> Kind:
    if found not in KINDS:
        _refuse(f"kind must be one of {', '.join(KINDS)}")
    return cast(Kind, found)


def _fps(found: object) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1e6:
        _refuse("fps must be a number of frames per second above 0, or null")
    return float(found)


def _are_sizes(found: object) -> bool:
    # 4096 steps of 16 pixels are the most that coords can name.
    most = (MAX_COORD + 1) * PATCH[1]
    return (
        isinstance(found, list)
        and len(found) == 3
        and all(type(value) is int and 0 <= value <= most for value in found)
    )


# --- what both need


def _layout_problem(layout: Layout) -> str | None:
    sizes = (layout.frames, layout.height, layout.width)
    if layout.kind == "voxels":
        return "voxels have sizes and grid 0" if any(sizes) or any(layout.grid) else None
    if layout.kind == "image" and layout.frames != 1:
        return f"an image has 1 frame, not {layout.frames}"
    for name, size, steps, patch in zip(("frames", "height", "width"), sizes, layout.grid, PATCH, strict=True):
        if size < 1 or steps > MAX_COORD + 1 or math.ceil(size / patch) != steps:
            return (
                f"{name} {size} does not fit {steps} tokens of {patch} ({patch * (steps - 1) + 1} to {patch * steps})"
            )
    return None


def _raster_problem(coords: Int32Array, grid: tuple[int, int, int]) -> str | None:
    steps, rows, columns = grid
    name = f"the raster of {steps} x {rows} x {columns} tokens (t, x, y)"
    if len(coords) != steps * rows * columns:
        return f"coords have {len(coords)} rows, {name} needs {steps * rows * columns}"
    index = np.arange(len(coords), dtype=np.int64)
    zero = np.zeros_like(index)
    raster = np.stack([index // (rows * columns), index // columns % rows, index % columns, zero], axis=1)
    wrong = (coords != raster).any(axis=1)
    if not wrong.any():
        return None
    row = int(wrong.argmax())
    return f"coords row {row} is {coords[row].tolist()}, {name} needs {raster[row].tolist()} there"


def _refuse_duplicates(coords: Int32Array) -> None:
    wide = coords.astype(np.int64)
    key = wide[:, 0]
    for column in range(1, 4):
        key = key * (MAX_COORD + 1) + wide[:, column]
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order][1:] == key[order][:-1])
    if len(same):
        first, second = int(order[same[0]]), int(order[same[0] + 1])
        _refuse(f"coords rows {first} and {second} are both {coords[first].tolist()}")


def _finite_floats(name: str, array: npt.NDArray[Any]) -> Float32Array:
    if array.dtype.kind not in "fiu":
        _refuse(f"{name} must be numbers, not {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        found = array.astype(np.float32)
    bad = ~np.isfinite(found)
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        raise MediaError("non_finite_input", f"{_place(name, place)} is {array[place]}; only finite values are allowed")
    return found


def _ranged_ints(name: str, array: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[Any]:
    if array.dtype.kind not in "iu":
        _refuse(f"{name} must be whole numbers, not {array.dtype}")
    _refuse_where(name, array, (array < low) | (array > high), f"{low} to {high}")
    return array


def _refuse_where(name: str, array: npt.NDArray[Any], bad: npt.NDArray[np.bool_], allowed: str) -> None:
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        value = array[place].item()
        _refuse(f"{_place(name, place)} is {value}; allowed is {allowed}", allowed, value)


def _check_width(name: str, array: npt.NDArray[Any], count: int, width: int | None) -> None:
    if array.ndim != 2 or len(array) != count or array.shape[1] == 0:
        _refuse(f"{name} have shape {_shape(array)}, needed is [{count}, width] as coords have {count} rows")
    if width is not None and array.shape[1] != width:
        _refuse(f"{name} have {array.shape[1]} columns, this model takes {width}", width, array.shape[1])


def _place(name: str, place: tuple[np.intp, ...]) -> str:
    words = ("row", "column", "layer", "layer", "layer", "layer", "layer", "layer")
    return " ".join([name, ", ".join(f"{word} {index}" for word, index in zip(words, place, strict=False))]).rstrip()


def _shape(array: npt.NDArray[Any]) -> str:
    return str(list(array.shape))


def _refuse(detail: str, limit: int | float | str | None = None, actual: int | float | str | None = None) -> NoReturn:
    raise MediaError("invalid_token_file", detail, limit=limit, actual=actual)
