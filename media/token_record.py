"""The tokens of one item: what their values, coords and layout must be, and the layout as JSON.

Letters and shapes as in media/tokens.py, which reads and writes the files that hold such items.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any, NoReturn, TypeGuard, cast

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.types import Float32Array, Int32Array, Kind, Layout, Tokens

PATCH = (4, 16, 16)
"""Frames, rows and columns of pixels that one token stands for; fixed by the published weights."""

MAX_COORD = 4095
CODEBOOK_SIZE = 4096
VOXEL_GRID = 64
MAX_LATENT = 1e4
KINDS = ("image", "video", "voxels")


def check_decodable(tokens: Tokens, *, latent_channels: int | None = None, codebooks: int | None = None) -> None:
    """Refuse tokens of one item that cannot be decoded, naming row and value.

    Wanted are latents (finite, at most 1e4 in size) or codes (0..4095), not both; coords within 0..4095, none twice;
    for pixels z = 0 and the complete raster of a grid that fits the layout's sizes; for voxels t = 0.
    latent_channels, codebooks: widths that the model takes, None to leave them unchecked (0: it takes no codes).
    Raises MediaError `invalid_token_file` or `non_finite_input`.
    """
    coords = tokens.coords
    if coords.ndim != 2 or coords.shape[1] != 4 or len(coords) == 0:
        refuse(f"coords have shape {shape_of(coords)}, needed is [N, 4] with at least one row")
    ranged_ints("coords", coords, 0, MAX_COORD)
    if tokens.latents is not None and tokens.codes is not None:
        refuse("there are latents and codes; only one of them can be decoded")
    if tokens.latents is not None:
        check_width("latents", tokens.latents, len(coords), latent_channels)
        finite_floats("latents", tokens.latents)
        _refuse_where(
            "latents", tokens.latents, np.abs(tokens.latents) > MAX_LATENT, f"-{MAX_LATENT:g} to {MAX_LATENT:g}"
        )
    elif tokens.codes is not None:
        if codebooks == 0:
            refuse("there are codes, this model takes latents only")
        check_width("codes", tokens.codes, len(coords), codebooks)
        ranged_ints("codes", tokens.codes, 0, CODEBOOK_SIZE - 1)
    else:
        refuse("there are neither latents nor codes to decode")
    problem = _layout_problem(tokens.layout)
    if problem:
        refuse(f"layout: {problem}")
    if tokens.layout.kind == "voxels":
        # The published code puts voxels at t = 1; others may write 0. All tokens share it, so it has no effect.
        times = coords[:, :1]
        allowed = "0 or 1, the same in all rows (voxels have no time)"
        _refuse_where("coords", times, (times != times[:1]) | (times < 0) | (times > 1), allowed)
        # The model makes a table of the grid that they span: far ones would fill the memory.
        _refuse_where("coords", coords, (coords < 0) | (coords >= VOXEL_GRID), f"0 to {VOXEL_GRID - 1}")
        _refuse_duplicates(coords)
    else:
        problem = _raster_problem(coords, tokens.layout.grid)
        if problem:
            _refuse_duplicates(coords)
            refuse(problem)


def infer_layout(
    coords: Int32Array,
    *,
    kind: Kind | None = None,
    size: tuple[int, int, int] | None = None,
    fps: float | None = None,
) -> Layout:
    """Work out the layout of one item from its coords [n, 4] (0..4095), with what else is known of it.

    Rules as in `load_tokens`. size: frames, height, width in pixels. Raises MediaError `invalid_token_file` when the
    coords of an item that may be pixels are no complete raster, or kind, size and fps do not fit them.
    """
    if kind is None and coords[:, 3].any():
        kind = "voxels"
    if kind == "voxels":
        frames, height, width = size or (0, 0, 0)
        return _checked(Layout(kind="voxels", frames=frames, height=height, width=width, grid=(0, 0, 0), fps=fps))
    top = coords.max(axis=0)
    grid = (int(top[0]) + 1, int(top[1]) + 1, int(top[2]) + 1)
    problem = _raster_problem(coords, grid)
    if problem:
        _refuse_duplicates(coords)
        refuse(f"without a layout in the metadata the coords must be a complete raster, but {problem}")
    if kind is None:
        kind = "image" if grid[0] == 1 and (size is None or size[0] == 1) else "video"
    frames, height, width = size or (
        1 if kind == "image" else PATCH[0] * grid[0],
        PATCH[1] * grid[1],
        PATCH[2] * grid[2],
    )
    return _checked(Layout(kind=kind, frames=frames, height=height, width=width, grid=grid, fps=fps))


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
        given = (
            ", ".join(sorted(map(reprlib.repr, found))) or "nothing" if isinstance(found, dict) else reprlib.repr(found)
        )
        refuse(f"a layout must be an object with kind, frames, height, width, grid and perhaps fps, not {given}")
    numbers = [found["frames"], found["height"], found["width"]]
    grid = found["grid"]
    if not are_sizes(numbers) or not are_sizes(grid):
        refuse(
            "a layout must have whole numbers, none negative: frames, height, width, and three of them in grid; "
            f"given are {reprlib.repr(numbers)} and {reprlib.repr(grid)}"
        )
    layout = Layout(
        kind=read_kind(found["kind"]),
        frames=numbers[0],
        height=numbers[1],
        width=numbers[2],
        grid=(grid[0], grid[1], grid[2]),
        fps=read_fps(found.get("fps")),
    )
    problem = _layout_problem(layout)
    if problem:
        refuse(f"layout: {problem}")
    return layout


def read_kind(found: object) -> Kind:
    """Read the kind of an item. Raises MediaError `invalid_token_file`."""
    if found not in KINDS:
        refuse(f"kind {reprlib.repr(found)}; it must be one of {', '.join(KINDS)}")
    return cast(Kind, found)


def read_fps(found: object) -> float | None:
    """Read frames per second, None for "unknown". Raises MediaError `invalid_token_file`."""
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found <= 1e6:
        refuse(f"fps {reprlib.repr(found)}; it must be a number of frames per second above 0, at most 1e6, or null")
    return float(found)


def are_sizes(found: object) -> TypeGuard[list[int]]:
    """Say whether these are three whole numbers that sizes in pixels, or a grid, can be."""
    # 4096 steps of 16 pixels are the most that coords can name.
    most = (MAX_COORD + 1) * PATCH[1]
    return (
        isinstance(found, list)
        and len(found) == 3
        and all(type(value) is int and 0 <= value <= most for value in found)
    )


def _checked(layout: Layout) -> Layout:
    problem = _layout_problem(layout)
    if problem:
        refuse(f"kind, size and fps do not fit the coords: {problem}")
    return layout


def _layout_problem(layout: Layout) -> str | None:
    sizes = (layout.frames, layout.height, layout.width)
    if layout.kind != "video" and layout.fps is not None:
        return f"only a clip has fps, and this is kind {layout.kind} with {layout.fps:g}"
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
        refuse(f"coords rows {first} and {second} are both {coords[first].tolist()}")


def finite_floats(name: str, array: npt.NDArray[Any]) -> Float32Array:
    """Return the numbers as float32. Raises MediaError `non_finite_input` with the first place that has none."""
    if array.dtype.kind not in "fiu":
        refuse(f"{name} must be numbers, not {array.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        found = array.astype(np.float32)
    bad = ~np.isfinite(found)
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        raise MediaError("non_finite_input", f"{_place(name, place)} is {array[place]}; only finite values are allowed")
    return found


def ranged_ints(name: str, array: npt.NDArray[Any], low: int, high: int) -> npt.NDArray[Any]:
    """Return the whole numbers as they are. Raises MediaError `invalid_token_file` with the first out of low..high."""
    if array.dtype.kind not in "iu":
        refuse(f"{name} must be whole numbers, not {array.dtype}")
    _refuse_where(name, array, (array < low) | (array > high), f"{low} to {high}")
    return array


def _refuse_where(name: str, array: npt.NDArray[Any], bad: npt.NDArray[np.bool_], allowed: str) -> None:
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), bad.shape)
        value = array[place].item()
        refuse(f"{_place(name, place)} is {value}; allowed is {allowed}", allowed, value)


def check_width(name: str, array: npt.NDArray[Any], count: int, width: int | None) -> None:
    """Refuse all but [count, width]; None is any width above 0. Raises MediaError `invalid_token_file`."""
    if array.ndim != 2 or len(array) != count or array.shape[1] == 0:
        refuse(f"{name} have shape {shape_of(array)}, needed is [{count}, width] as coords have {count} rows")
    if width is not None and array.shape[1] != width:
        refuse(f"{name} have {array.shape[1]} columns, this model takes {width}", width, array.shape[1])


def _place(name: str, place: tuple[np.intp, ...]) -> str:
    words = ("row", "column", "layer", "layer", "layer", "layer", "layer", "layer")
    return " ".join([name, ", ".join(f"{word} {index}" for word, index in zip(words, place, strict=False))]).rstrip()


def shape_of(array: npt.NDArray[Any]) -> str:
    """Give the shape as text for a message."""
    return str(list(array.shape))


def refuse(detail: str, limit: int | float | str | None = None, actual: int | float | str | None = None) -> NoReturn:
    """Raise MediaError `invalid_token_file`."""
    raise MediaError("invalid_token_file", detail, limit=limit, actual=actual)
