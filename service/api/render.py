"""Results to bytes: JSON, token file, npy, npz, multipart. Synchronous; callers run it in a thread."""

from __future__ import annotations

import binascii
import io
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import orjson

from media.arrays_json import array_to_json
from media.tokens import dump_tokens, layout_from_json
from media.types import Tokens, UInt8Array
from service.api import negotiation as types
from service.api.children import File
from service.api.items import Bad, Done, Outcome
from service.api.record import Record
from service.errors import PROBLEM_JSON, Problem

PER_TOKEN = ("latents", "codes", "features")
NPY_OUTPUTS = (*PER_TOKEN, "embedding")
SPLAT_FACTS = ("psnr_db", "ssim", "views", "held_out", "decoder", "note")
"""What a worker says of a 3D reconstruction: see answers.Reconstruction."""


def envelope(record: Record, items: Sequence[dict[str, Any]]) -> bytes:
    """Return the JSON answer of any operation, items in request order."""
    body = {
        "id": record.request_id,
        "model": record.model,
        "revision": record.revision,
        "usage": {"tokens": record.tokens},
        "items": items,
    }
    return orjson.dumps(body)


def bad_item(bad: Bad, record: Record) -> dict[str, Any]:
    """Return the JSON entry of an item that failed."""
    return {"id": bad.id, "status": "error", "error": bad.problem.document(record.request_id)}


def encoded_json(
    outcomes: Sequence[Outcome],
    outputs: Sequence[str],
    record: Record,
    files: Sequence[File | None],
    *,
    floats: bool,
    max_values: int,
) -> bytes:
    """Return the JSON answer of encode and embed; files: the written reconstructions, one an item."""
    entries = []
    for outcome, file in zip(outcomes, files, strict=True):
        if isinstance(outcome, Bad):
            entries.append(bad_item(outcome, record))
            continue
        entry: dict[str, Any] = {
            "id": outcome.id,
            "status": "ok",
            "kind": outcome.kind,
            "notes": outcome.meta.get("notes") or [],
        }
        if outcome.kind != "text":  # which has no tokens
            entry |= {"layout": outcome.meta["layout"], "tokens": outcome.cost}
        entry["revision"] = record.revision
        shown = [name for name in outputs if name != "reconstruction"]
        if any(name in PER_TOKEN for name in shown):
            shown.append("coords")
        for name in shown:
            entry[name] = tensor_json(outcome.arrays[name], floats=floats, max_values=max_values)
        if file is not None:
            entry["reconstruction"] = _reconstruction_json(outcome, file)
        entries.append(entry)
    return envelope(record, entries)


def tensor_json(array: npt.NDArray[Any], *, floats: bool, max_values: int) -> dict[str, Any] | list[Any]:
    """Return one array as JSON. Raises Problem when nested lists of so many values are asked for."""
    if floats and array.size > max_values:
        raise Problem(
            "invalid_parameter",
            f"`floats=true` would write {array.size} numbers, at most {max_values} are allowed; base64 has no bound",
            limit=max_values,
            actual=array.size,
        )
    return array_to_json(array, floats)


def token_file(
    outcomes: Sequence[Done], outputs: Sequence[str], record: Record, *, sample: bool = False, seed: int | None = None
) -> bytes:
    """Return the token file of one or several results."""
    items = [
        Tokens(
            coords=done.arrays["coords"],
            layout=layout_from_json(done.meta["layout"]),
            model=record.model or "",
            revision=record.revision or "",
            **{name: done.arrays[name] for name in NPY_OUTPUTS if name in outputs},
        )
        for done in outcomes
    ]
    posterior: Literal["mean", "sample"] = "sample" if sample else "mean"
    try:
        return dump_tokens(items, posterior=posterior, seed=seed if sample else None)
    except ValueError as error:
        # Numbers of ours that are not finite: nothing that the sender could change.
        raise Problem("internal", "the result cannot be written as a token file") from error


def npy(array: npt.NDArray[Any]) -> bytes:
    """Return one array as an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def npz(arrays: dict[str, npt.NDArray[Any]]) -> bytes:
    """Return several arrays as an .npz file, not compressed."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **cast(dict[str, Any], arrays))
    return buffer.getvalue()


def encoded_arrays(outcomes: Sequence[Done], outputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays for npy and npz: all of a single item, of several the embeddings stacked [K, D]."""
    if len(outcomes) > 1:
        return {"embedding": np.stack([done.arrays["embedding"] for done in outcomes])}
    arrays = {name: outcomes[0].arrays[name] for name in outputs}
    return arrays | ({"coords": outcomes[0].arrays["coords"]} if any(name in PER_TOKEN for name in outputs) else {})


def decoded_json(outcomes: Sequence[Outcome], record: Record, *, floats: bool, max_values: int) -> bytes:
    """Return the JSON answer of decode: pixels [H, W, 3] or [T, H, W, 3], of voxels coords and feats."""
    entries = []
    for outcome in outcomes:
        if isinstance(outcome, Bad):
            entries.append(bad_item(outcome, record))
            continue
        entry: dict[str, Any] = {"id": outcome.id, "status": "ok", "kind": outcome.kind, "tokens": outcome.cost}
        if outcome.kind == "video":
            entry["fps"] = outcome.meta.get("fps")
        for name, array in decoded_arrays(outcome).items():
            entry[name] = tensor_json(array, floats=floats, max_values=max_values)
        entries.append(entry)
    return envelope(record, entries)


def decoded_arrays(done: Done) -> dict[str, npt.NDArray[Any]]:
    """Return what was decoded, by name."""
    if done.kind == "voxels":
        return {name: done.arrays[name] for name in ("coords", "feats")}
    pixels = done.arrays["pixels"]
    return {"pixels": pixels[0] if done.kind == "image" else pixels}


def multipart(outcomes: Sequence[Outcome], record: Record, files: Sequence[File | None]) -> tuple[bytes, str]:
    """Return a multipart/mixed body and its Content-Type: a written file for each item, a problem where one failed."""
    boundary = f"atoken-{record.request_id}"
    pieces = []
    for position, (outcome, file) in enumerate(zip(outcomes, files, strict=True)):
        if isinstance(outcome, Bad):
            media_type, body = PROBLEM_JSON, orjson.dumps(outcome.problem.document(record.request_id))
        else:
            assert file is not None
            media_type, body = file.media_type, file.data
        head = (
            f"--{boundary}\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\nX-Item: {position}\r\n\r\n"
        )
        pieces += [head.encode("ascii"), body, b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode("ascii"))
    return b"".join(pieces), f'{types.MULTIPART}; boundary="{boundary}"'


def psnr(original: UInt8Array, reconstruction: UInt8Array) -> float | None:
    """Return the peak signal-to-noise ratio in dB of equal-sized uint8 [T, H, W, 3]; None when they are equal.

    An original that is larger was cropped at the end of each side (fit=crop).
    """
    frames, height, width, _ = reconstruction.shape
    difference = original[:frames, :height, :width].astype(np.int16) - reconstruction
    mean_square = float(np.mean(np.square(difference, dtype=np.int32), dtype=np.float64))
    return None if mean_square == 0.0 else 10.0 * math.log10(255.0**2 / mean_square)


def _reconstruction_json(done: Done, file: File) -> dict[str, Any]:
    text = binascii.b2a_base64(file.data, newline=False).decode("ascii")
    entry: dict[str, Any] = {"media_type": file.media_type, "data": text}
    if done.pixels is not None:
        entry["psnr_db"] = psnr(done.pixels, done.arrays["reconstruction.pixels"])
    about = done.meta.get("reconstruction") or {}
    return entry | {name: about[name] for name in SPLAT_FACTS if about.get(name) is not None}
