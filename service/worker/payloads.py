"""What a job's bytes mean: payload of the queue to an item or tokens for the model, and a result back to bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from media import wire
from media.tokens import layout_from_json, layout_to_json
from media.types import Gaussians, Image, Item, PosedPictures, Text, Tokens, Video, Voxels

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Output:
    """A good result: arrays and JSON facts, not yet serialised."""

    arrays: Arrays
    meta: Mapping[str, wire.JSON]

    def dump(self) -> bytes:
        """Return the payload that goes back to the API."""
        return wire.dumps(self.arrays, self.meta)


def read_item(payload: bytes) -> Item | Text:
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
            return Voxels(coords=arrays["coords"], feats=_unit(arrays["feats"]), notes=notes)
        case "text":
            return Text(text=meta["text"])
        case other:
            raise ValueError(f"a payload of kind {other!r}; wanted image, video, voxels or text")


def read_pictures(payload: bytes) -> PosedPictures | None:
    """Read the posed pictures that a reconstruction of voxels is compared with, if the payload has any."""
    arrays, meta = wire.loads(payload)
    if "pictures" not in arrays:
        return None
    return PosedPictures(
        pictures=arrays["pictures"],
        world_to_camera=arrays["world_to_camera"],
        intrinsics=arrays["intrinsics"],
        held_out=bool(meta["held_out"]),
    )


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


def encoded(tokens: Tokens, outputs: Sequence[str], reconstruction: Output | None, notes: Sequence[str]) -> Output:
    """Return what an encode or embed job asked for, and nothing else of what its batch was asked.

    reconstruction: as `decoded` or `splatted` gives it.
    """
    arrays: Arrays = {"coords": tokens.coords}
    for name in ("latents", "codes", "embedding", "features"):
        array = getattr(tokens, name)
        if name in outputs and array is not None:
            arrays[name] = array
    meta: dict[str, wire.JSON] = {
        "layout": layout_to_json(tokens.layout),
        "model": tokens.model,
        "revision": tokens.revision,
        "notes": list(notes),
    }
    if reconstruction is not None:
        arrays |= {f"reconstruction.{name}": array for name, array in reconstruction.arrays.items()}
        meta["reconstruction"] = dict(reconstruction.meta)
    return Output(arrays=arrays, meta=meta)


def embedded(embedding: npt.NDArray[np.float32], model: str, revision: str, notes: Sequence[str]) -> Output:
    """Return what an embed job of a text asked for: float32 [D], and whose it is."""
    return Output(arrays={"embedding": embedding}, meta={"model": model, "revision": revision, "notes": list(notes)})


def decoded(item: Item) -> Output:
    """Return what a decode job asked for: pixels uint8 [T, H, W, 3] (an image has T = 1), or coords and feats."""
    match item:
        case Image():
            return Output(arrays={"pixels": item.pixels[np.newaxis]}, meta={"kind": "image", "fps": None})
        case Video():
            return Output(arrays={"pixels": item.frames}, meta={"kind": "video", "fps": item.fps})
        case Voxels():
            return Output(arrays={"coords": item.coords, "feats": item.feats}, meta={"kind": "voxels", "fps": None})


def splatted(gaussians: Gaussians, meta: Mapping[str, wire.JSON]) -> Output:
    """Return Gaussians; meta: what else there is to say of them."""
    arrays: Arrays = {field.name: getattr(gaussians, field.name) for field in fields(gaussians)}
    return Output(arrays=arrays, meta={"kind": "voxels", **meta})


def _unit(feats: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Features as 0..1; as bytes they take a quarter of the way through the queue."""
    return (feats / np.float32(255)).astype(np.float32) if feats.dtype == np.uint8 else feats


def _pixels(arrays: Arrays) -> npt.NDArray[np.uint8]:
    pixels = arrays["pixels"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pixels {pixels.dtype} {pixels.shape}; wanted uint8 [T, H, W, 3]")
    return pixels
