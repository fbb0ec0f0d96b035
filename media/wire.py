"""Arrays and a little JSON as bytes: what lies in Redis between the API and a worker. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy.typing as npt

from media.safetensors_file import Buffer, SafetensorsError, Tensor, parse_json_object, read, write

JSON: TypeAlias = "bool | int | float | str | list[JSON] | tuple[JSON, ...] | Mapping[str, JSON] | None"


class WireError(ValueError):
    """A payload that `dumps` did not write, or that was damaged on its way."""


def dumps(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, JSON]) -> bytes:
    """Join arrays and JSON values into one payload (safetensors bytes; `meta` lies under the metadata key "meta").

    arrays: any shape, of a float, integer or bool dtype. meta: finite JSON values. One copy of the arrays is made.
    Raises WireError when a value is no JSON, TypeError when a dtype does not fit.
    """
    try:
        text = json.dumps(dict(meta), separators=(",", ":"), allow_nan=False)
        return write({name: Tensor.of(array) for name, array in arrays.items()}, {"meta": text})
    except (SafetensorsError, ValueError) as error:
        raise WireError(f"this cannot be sent: {error}") from None


def loads(buffer: Buffer) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Split a payload of `dumps` into its arrays and its JSON values. Raises WireError for anything else.

    The arrays are views into `buffer` (no copy, kept alive by them) and read-only when it is `bytes`.
    """
    try:
        tensors, metadata = read(buffer)
        if set(metadata) != {"meta"}:
            raise WireError("the payload has no meta")
        return {name: tensor.numpy() for name, tensor in tensors.items()}, parse_json_object(metadata["meta"])
    except SafetensorsError as error:
        raise WireError(f"the payload is damaged: {error}") from None
