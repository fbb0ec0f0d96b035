"""What a job's bytes mean: payload of the queue to an item or tokens for the model, and a result back to bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from media import wire
from media.tokens import layout_from_json, layout_to_json
from media.types import Image, Item, Tokens, Video, Voxels

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A good result: arrays and JSON facts, not yet serialised."""

    arrays: Arrays
    meta: Mapping[str, wire.JSON]

    def dump(self) -> bytes:
        """Return the payload that goes back to the API."""
        return wire.dumps(self.arrays, self.meta)


def read_item(payload: bytes) -> Item:
    """Read the payload of an encode or embed job.

    Raises WireError, KeyError or ValueError for what only a fault between our own processes can bring.
    """
    arrays, meta = wire.loads(payload)
    notes = tuple(meta.get("notes") or ())
    match meta["kind"]:
        case "image":
            return Image(pixels=_pixels(arrays)[0], notes=notes)
        case "video":
            return Video(frames=_pixels(arrays), fps=meta.get("fps"), notes=notes)
        case "voxels":
            return Voxels(coords=arrays["coords"], feats=arrays["feats"], notes=notes)
        case other:
            raise ValueError(f"a payload of kind {other!r}; wanted image, video or voxels")


def read_tokens(payload: bytes) -> Tokens:
    """Read the payload of a decode job. Raises as read_item does."""
    arrays, meta = wire.loads(payload)
    return Tokens(
        coords=arrays["coords"],
        layout=layout_from_json(meta["layout"]),
        latents=arrays.get("latents"),
        codes=arrays.get("codes"),
        model=meta["model"],
        revision=meta["revision"],
    )


def encoded(tokens: Tokens, outputs: Sequence[str], reconstruction: Item | None, notes: Sequence[str]) -> Output:
    """Return what an encode or embed job asked for, and nothing else of what its batch was asked."""
    arrays: Arrays = {"coords": tokens.coords}
    for name in ("latents", "codes", "embedding", "features"):
        array = getattr(tokens, name)
        if name in outputs and array is not None:
            arrays[name] = array
    if reconstruction is not None:
        arrays["reconstruction"] = frames_of(reconstruction)
    meta: dict[str, wire.JSON] = {
        "layout": layout_to_json(tokens.layout),
        "model": tokens.model,
        "revision": tokens.revision,
        "notes": list(notes),
    }
    return Output(arrays=arrays, meta=meta)


def decoded(item: Item) -> Output:
    """Return what a decode job asked for."""
    if isinstance(item, Voxels):
        return Output(arrays={"coords": item.coords, "feats": item.feats}, meta={"kind": "voxels", "fps": None})
    fps = item.fps if isinstance(item, Video) else None
    return Output(arrays={"pixels": frames_of(item)}, meta={"kind": item.kind, "fps": fps})


def frames_of(item: Item) -> npt.NDArray[Any]:
    """Return the values of an item as one array: uint8 [T, H, W, 3] (an image has T = 1), voxels float32 [n, 768]."""
    match item:
        case Image():
            return item.pixels[np.newaxis]
        case Video():
            return item.frames
        case Voxels():
            return item.feats


def _pixels(arrays: Arrays) -> npt.NDArray[np.uint8]:
    pixels = arrays["pixels"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels {pixels.dtype} {pixels.shape}; wanted uint8 [T, H, W, 3]")
    return pixels
