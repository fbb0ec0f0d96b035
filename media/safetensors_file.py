"""Read and write safetensors bytes with a strict header check; the token file and the queue's payloads stand on it.

Own code instead of the safetensors package for two measured reasons. Reading: the package accepts duplicate JSON keys
and spends seconds on hundreds of thousands of empty tensors, and its numpy half knows no BF16. Writing: its metadata
comes out in random order, so equal content would give different bytes. The tests compare both ways with the package.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Buffer: TypeAlias = bytes | bytearray | memoryview

# Far above what our own files need (six tensors, some KiB of header), far below what costs noticeable time.
HEADER_BYTES = 1 << 20
MAX_TENSORS = 64
MAX_RANK = 8
MAX_NAME_CHARS = 128
# numpy refuses shapes beyond its address range even where another dimension is 0, so the others alone are bounded too.
MAX_BYTES = 1 << 62

_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    # numpy has no bfloat16: its upper half of a float32 is kept as the 16 bits that it is.
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES = {dtype: name for name, dtype in _NUMPY_DTYPES.items() if name != "BF16"}


class SafetensorsError(ValueError):
    """The bytes are no safetensors file that we accept; the message says what is wrong, for the person who sent it."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor as it lies in a file. dtype: safetensors name ("F32", "BF16", ...); data: its bytes, little endian."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Tensor:
        """Wrap a numpy array of a float, integer or bool dtype; copies only if it is not contiguous little endian."""
        little = array.dtype.newbyteorder("<")
        if little not in _NAMES:
            raise TypeError(f"an array of dtype {array.dtype} has no place in a safetensors file")
        flat = np.ascontiguousarray(array, dtype=little).reshape(-1)
        return cls(dtype=_NAMES[little], shape=array.shape, data=flat.view(np.uint8).data)

    @classmethod
    def bf16_of(cls, array: npt.NDArray[np.floating]) -> Tensor:
        """Round a float array to bfloat16 (to nearest, ties to even). Values beyond its range become infinite."""
        values = np.ascontiguousarray(array, dtype="<f4").reshape(-1)
        bits = values.view("<u4")
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
        # The sum of a NaN may wrap around to a number.
        rounded[np.isnan(values)] = 0x7FC0
        return cls(dtype="BF16", shape=array.shape, data=rounded.view(np.uint8).data)

    def numpy(self) -> npt.NDArray[Any]:
        """View as a numpy array without a copy (BF16: a float32 copy). Read-only if the source was."""
        array = np.frombuffer(self.data, dtype=_NUMPY_DTYPES[self.dtype]).reshape(self.shape)
        if self.dtype == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Lay tensors and text metadata into safetensors bytes; equal content gives equal bytes.

    Raises SafetensorsError for more than `MAX_TENSORS` tensors or a header that `read` would refuse.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    # Wide values first: each tensor then starts at a multiple of its own item size, so that views are aligned.
    names = sorted(tensors, key=lambda name: (-_NUMPY_DTYPES[tensors[name].dtype].itemsize, name))
    if len(names) > MAX_TENSORS:
        raise SafetensorsError(f"{len(names)} tensors, at most {MAX_TENSORS} fit in a file")
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.data.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES:
        raise SafetensorsError(f"a header of {len(text)} bytes, at most {HEADER_BYTES} are allowed")
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in names)])


def read(data: Buffer) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split safetensors bytes into tensors (views, no copy) and metadata; believes nothing that it did not check.

    Refused with SafetensorsError: a header that is cut off, over 1 MiB, no JSON object, or with duplicate keys; unknown
    dtypes; more than `MAX_TENSORS` tensors or `MAX_RANK` dimensions; sizes that do not match; bytes that overlap, are
    left out, or are used by no tensor. Takes time and memory by the header's size only.
    Source: the safetensors format description; serving.md 6.5.
    """
    buffer = memoryview(data).cast("B")
    if len(buffer) < 8:
        raise SafetensorsError(
            f"{len(buffer)} bytes are too few for a safetensors file (it starts with 8 bytes of length)"
        )
    length = int.from_bytes(buffer[:8], "little")
    if length > HEADER_BYTES:
        raise SafetensorsError(f"the header claims {length} bytes, at most {HEADER_BYTES} are allowed")
    if 8 + length > len(buffer):
        raise SafetensorsError(f"the header claims {length} bytes, the file has {len(buffer) - 8} after its length")
    if length == 0 or buffer[8] != ord("{"):
        raise SafetensorsError("the header does not start with a JSON object")
    header = parse_json_object(bytes(buffer[8 : 8 + length]))
    metadata = _metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise SafetensorsError(f"{len(header)} tensors, at most {MAX_TENSORS} are allowed")
    body = buffer[8 + length :]
    tensors: dict[str, Tensor] = {}
    end = 0
    entries = [(name, *_entry(name, entry)) for name, entry in header.items()]
    for name, dtype, shape, start, stop in sorted(entries, key=lambda entry: (entry[3], entry[4])):
        if start != end:
            problem = "overlaps the one before" if start < end else "leaves bytes unused before it"
            raise SafetensorsError(f"tensor {quoted(name)} starts at byte {start} and {problem}, which ends at {end}")
        if stop > len(body):
            raise SafetensorsError(f"tensor {quoted(name)} ends at byte {stop}, the file has {len(body)} bytes of data")
        tensors[name] = Tensor(dtype=dtype, shape=shape, data=body[start:stop])
        end = stop
    if end != len(body):
        raise SafetensorsError(f"{len(body) - end} bytes of data after the last tensor")
    return tensors, metadata


def parse_json(text: bytes | str) -> Any:
    """Parse JSON strictly: no duplicate keys, no NaN or Infinity, bounded depth. Raises SafetensorsError."""
    try:
        # Decoded here, or the parser would guess UTF-16 and UTF-32 too.
        return json.loads(
            text.decode() if isinstance(text, bytes) else text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except SafetensorsError:
        raise
    except RecursionError:
        raise SafetensorsError("the JSON is nested too deep") from None
    except ValueError:
        # The parser's message can hold pieces of the input; those stay out of answers and logs.
        raise SafetensorsError("the JSON cannot be read") from None


def parse_json_object(text: bytes | str) -> dict[str, Any]:
    """Parse one JSON object as `parse_json` does. Raises SafetensorsError also for other JSON values."""
    parsed = parse_json(text)
    if not isinstance(parsed, dict):
        raise SafetensorsError("the JSON is no object")
    return parsed


def quoted(text: str) -> str:
    """Show a foreign name in a message: short, ASCII, on one line."""
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        raise SafetensorsError("the JSON has the same key twice")
    return seen


def _no_constant(name: str) -> float:
    raise SafetensorsError(f"the JSON has {name}, which is no JSON number")


def _metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise SafetensorsError("__metadata__ must map text to text")
    try:
        for key, value in found.items():
            (key + value).encode()
    except UnicodeEncodeError:
        raise SafetensorsError("__metadata__ has text that is no Unicode (a lone surrogate)") from None
    return found


def _entry(name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    if len(name) > MAX_NAME_CHARS:
        raise SafetensorsError(f"a tensor name of {len(name)} characters, at most {MAX_NAME_CHARS} are allowed")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsError(f"tensor {quoted(name)} must be described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NUMPY_DTYPES:
        raise SafetensorsError(f"tensor {quoted(name)} has an unknown dtype; known are {', '.join(_NUMPY_DTYPES)}")
    if not _are_lengths(shape) or len(shape) > MAX_RANK:
        raise SafetensorsError(f"tensor {quoted(name)} must have a shape of at most {MAX_RANK} lengths, none negative")
    if not _are_lengths(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SafetensorsError(f"tensor {quoted(name)} must have data_offsets [start, end]")
    size = math.prod(shape) * _NUMPY_DTYPES[dtype].itemsize
    if math.prod(max(length, 1) for length in shape) * _NUMPY_DTYPES[dtype].itemsize > MAX_BYTES:
        raise SafetensorsError(f"tensor {quoted(name)} has a shape beyond all memory")
    if size != offsets[1] - offsets[0]:
        raise SafetensorsError(
            f"tensor {quoted(name)} spans {offsets[1] - offsets[0]} bytes, its dtype and shape need {size}"
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_lengths(found: object) -> bool:
    return isinstance(found, list) and all(type(value) is int and 0 <= value <= MAX_BYTES for value in found)
