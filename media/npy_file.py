"""NumPy's .npy files from strangers: plain arrays only, their size checked before anything is allocated."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from media.errors import MediaError


def load_npy(data: bytes, what: str) -> npt.NDArray[Any]:
    """Read an array of numbers. what: its name for errors. Raises MediaError corrupt_media."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        reader = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if reader is None:
            raise MediaError("corrupt_media", f"{what} is a .npy file of version {version}; 1.0 and 2.0 are read")
        shape, is_fortran, dtype = reader(stream)
    except (ValueError, SyntaxError, EOFError, OverflowError, RecursionError, MemoryError, TypeError):
        raise MediaError("corrupt_media", f"{what} is not a .npy file, or its header is damaged") from None
    if dtype.kind not in "fiub" or dtype.hasobject:
        raise MediaError("corrupt_media", f"{what} holds {dtype}; only numbers are taken")
    room = len(data) - stream.tell()
    if any(side < 0 for side in shape) or math.prod(shape) * dtype.itemsize != room:
        raise MediaError("corrupt_media", f"{what} says that it is {dtype} {list(shape)}, but has {room} bytes")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if is_fortran else "C")
