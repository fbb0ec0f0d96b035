"""Arrays inside JSON: base64 of little-endian bytes with dtype and shape, or plain nested lists for people."""

from __future__ import annotations

import binascii
import itertools
import math
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.safetensors_file import quoted

MAX_RANK = 4
# Wider than any embedding; with the bound on rows it keeps shapes sane before anything is allocated.
MAX_WIDTH = 4096
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        "float16",
        "float32",
        "float64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "int8",
        "int16",
        "int32",
        "int64",
    )
}
# Who knows safetensors writes F32 for float32: the same thing, so both names are understood.
_SHORT_NAMES = {f"{name[0].upper()}{name.lstrip('abcdefghijklmnopqrstuvwxyz')}": name for name in DTYPES}


def array_to_json(array: npt.NDArray[Any], floats: bool) -> dict[str, Any] | list[Any]:
    """Put an array into JSON types.

    array: float16 to float64 or an integer dtype, any shape. floats: True for plain nested lists (long, readable),
    False for {"dtype": "float32", "shape": [n, c], "data": base64 of the little-endian bytes in C order}.
    Raises TypeError for other dtypes, ValueError for values that JSON has no word for (NaN, infinity) as lists.
    """
    if array.dtype.name not in DTYPES:
        raise TypeError(f"an array of dtype {array.dtype} has no place in JSON; known are {', '.join(DTYPES)}")
    if floats:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("NaN and infinity cannot be written as JSON numbers")
        listed: list[Any] = array.tolist()
        return listed
    data = np.ascontiguousarray(array, dtype=DTYPES[array.dtype.name])
    text = binascii.b2a_base64(data.tobytes(), newline=False).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": text}


def array_from_json(found: object, what: str, limits: Limits) -> npt.NDArray[Any]:
    """Read an array of rank 1 to 4 in either form of `array_to_json`; `what` names it in errors.

    The dtype may also be given by its safetensors name (F32). Returns the dtype that is given; lists become int64 when
    all numbers are whole, else float64. At most limits.request_tokens rows and 4096 values along the other dimensions.
    Raises MediaError: `invalid_parameter` for a wrong form, dtype, shape, byte count, or ragged lists;
    `non_finite_input` for NaN or infinity; `too_many_tokens` for too many rows.
    """
    if isinstance(found, dict):
        array = _from_base64(found, what, limits)
    elif isinstance(found, list):
        array = _from_lists(found, what, limits)
    else:
        _refuse(f"{what} must be nested lists of numbers or an object with dtype, shape and data")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise MediaError("non_finite_input", f"{what} row {row} holds NaN or infinity; only finite values are allowed")
    return array


def _from_base64(found: dict[str, object], what: str, limits: Limits) -> npt.NDArray[Any]:
    if set(found) != {"dtype", "shape", "data"}:
        given = ", ".join(quoted(str(key)) for key in list(found)[:5]) or "nothing"
        _refuse(f"{what} must have dtype, shape and data and no more; given are {given}")
    name, shape, text = found["dtype"], found["shape"], found["data"]
    name = _SHORT_NAMES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in DTYPES:
        given = quoted(name) if isinstance(name, str) else "no text"
        _refuse(f"{what} has dtype {given}, allowed are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        _refuse(f"{what} has no shape; it must be a list of whole numbers, none negative")
    _check_shape(shape, what, limits)
    if not isinstance(text, str):
        _refuse(f"{what} has no data; it must be base64 text")
    needed = math.prod(shape) * DTYPES[name].itemsize
    padded = 4 * ((needed + 2) // 3)
    # The length first: no memory for data that cannot be right.
    if len(text) not in (padded, padded - (-needed % 3)):
        _refuse(
            f"{what} has {len(text)} characters of data; dtype and shape need {needed} bytes, "
            f"in base64 {padded} characters"
        )
    try:
        data = binascii.a2b_base64(text + "=" * (padded - len(text)), strict_mode=True) if text else b""
    except ValueError:
        _refuse(f"{what} has data that is no base64 (standard alphabet, no line breaks)")
    if len(data) != needed:
        _refuse(f"{what} has {len(data)} bytes of data, dtype and shape need {needed}")
    return np.frombuffer(data, dtype=DTYPES[name]).reshape(shape)


def _from_lists(found: list[object], what: str, limits: Limits) -> npt.NDArray[Any]:
    shape: list[int] = []
    level: list[Any] = found
    # The shape along the first elements, then every list of each level against it.
    while True:
        shape.append(len(level))
        _check_shape(shape, what, limits)
        if not level or not isinstance(level[0], list):
            break
        level = level[0]
    flat: list[Any] = found
    for depth, size in enumerate(shape[1:], start=1):
        for index, row in enumerate(flat):
            if not isinstance(row, list) or len(row) != size:
                given = f"{len(row)} values" if isinstance(row, list) else "no list"
                _refuse(f"{what} is ragged: list {index} at depth {depth} has {given}, the first one {size}")
        flat = list(itertools.chain.from_iterable(flat))
    kinds = {type(value) for value in flat}
    if not kinds <= {int, float}:
        _refuse(f"{what} must hold numbers only, in lists of equal length and depth")
    try:
        return np.array(flat, dtype=np.float64 if float in kinds else np.int64).reshape(shape)
    except OverflowError:
        _refuse(f"{what} holds a number beyond 64 bits")


def _check_shape(shape: list[int], what: str, limits: Limits) -> None:
    if not 1 <= len(shape) <= MAX_RANK:
        _refuse(f"{what} has {len(shape)} dimensions, allowed are 1 to {MAX_RANK}", MAX_RANK, len(shape))
    if shape[0] > limits.request_tokens:
        raise MediaError(
            "too_many_tokens",
            f"{what} has {shape[0]} rows, at most {limits.request_tokens} are allowed",
            limit=limits.request_tokens,
            actual=shape[0],
        )
    if max(shape[1:], default=0) > MAX_WIDTH:
        _refuse(f"{what} is {max(shape[1:])} wide, at most {MAX_WIDTH} are allowed", MAX_WIDTH, max(shape[1:]))


def _refuse(detail: str, limit: int | None = None, actual: int | None = None) -> NoReturn:
    raise MediaError("invalid_parameter", detail, limit=limit, actual=actual)
