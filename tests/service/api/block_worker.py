"""A worker without a network: its tokens are block means of the pixels, so that a decode can be checked by number.

Latents (48 a token): the means over 4 frames and 4 x 4 pixels, 4 x 4 of them and three colours. Codes (8 a token of
12 bits): the means over 8 x 8 pixels, 2 x 2 x 3 bytes, three bytes in two codes. Its jobs come from the real queue.
"""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from media import wire
from media.tokens import layout_from_json, layout_to_json
from media.types import Layout
from service.queue.consumer import QueueConsumer
from service.queue.estimate import Rates
from service.queue.jobs import Answer, Lease
from service.queue.keys import pool_of

FloatArray = npt.NDArray[np.float32]
PixelArray = npt.NDArray[np.uint8]

RATES = Rates(encode=50_000.0, decode=1_000.0)
"""What it says of its speed; it is faster."""

CONTINUOUS: dict[str, Any] = {
    "name": "blocks-continuous",
    "revision": "c0ffee0123456789c0ffee0123456789",
    "outputs": ["latents", "embedding", "features", "reconstruction"],
    "kinds": ["image", "video", "voxels"],
    "patch": [4, 16, 16],
    "latent_channels": 48,
    "codebooks": 0,
    "codebook_size": 4096,
    "embedding_dim": 48,
    "parameters": 0,
    "device": "cpu",
    "dtype": "float32",
    "max_item_tokens": 32_768,
    "description": "block means",
}
DISCRETE: dict[str, Any] = {
    **CONTINUOUS,
    "name": "blocks-discrete",
    "revision": "decade0123456789decade0123456789",
    "outputs": ["latents", "codes", "embedding", "features", "reconstruction"],
    "codebooks": 8,
    "text": True,
    "description": "block means in 8 bits",
}


def tiles(pixels: PixelArray, layout: Layout) -> npt.NDArray[np.uint8]:
    """Pad [T, H, W, 3] to whole patches and cut it into [n, 4, 16, 16, 3], in raster order."""
    steps, rows, columns = layout.grid
    pad = [(0, grid * patch - size) for grid, patch, size in zip(layout.grid, (4, 16, 16), pixels.shape, strict=False)]
    whole = np.pad(pixels, [*pad, (0, 0)], mode="edge")
    split = whole.reshape(steps, 4, rows, 16, columns, 16, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    return split.reshape(-1, 4, 16, 16, 3)


def untile(cut: PixelArray, layout: Layout) -> PixelArray:
    """Undo `tiles` and crop to the layout's size."""
    steps, rows, columns = layout.grid
    whole = cut.reshape(steps, rows, columns, 4, 16, 16, 3).transpose(0, 3, 1, 4, 2, 5, 6)
    return whole.reshape(4 * steps, 16 * rows, 16 * columns, 3)[: layout.frames, : layout.height, : layout.width]


def means(cut: PixelArray, side: int) -> FloatArray:
    """Return the block means [n, side, side, 3] of patches, 0..255."""
    step = 16 // side
    averages: FloatArray = cut.reshape(len(cut), 4, side, step, side, step, 3).mean(axis=(1, 3, 5)).astype(np.float32)
    return averages


def spread(blocks: npt.NDArray[Any]) -> PixelArray:
    """Undo `means`: [n, side, side, 3] to [n, 4, 16, 16, 3]."""
    step = 16 // blocks.shape[1]
    flat = np.clip(np.rint(blocks), 0, 255).astype(np.uint8).repeat(step, axis=1).repeat(step, axis=2)
    return np.repeat(flat[:, None], 4, axis=1)


def to_codes(blocks: npt.NDArray[Any]) -> npt.NDArray[np.int16]:
    """Pack 12 bytes a token into 8 codes of 12 bits."""
    values = np.rint(blocks).astype(np.int32).reshape(len(blocks), 4, 3)
    first = values[..., 0] << 4 | values[..., 1] >> 4
    second = (values[..., 1] & 15) << 8 | values[..., 2]
    return np.stack([first, second], axis=-1).reshape(len(blocks), 8).astype(np.int16)


def from_codes(codes: npt.NDArray[np.int16]) -> npt.NDArray[np.int32]:
    """Undo `to_codes`: [n, 2, 2, 3]."""
    pairs = codes.astype(np.int32).reshape(len(codes), 4, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    values = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    return values.reshape(len(codes), 2, 2, 3)


def layout_of(pixels: PixelArray, kind: str, fps: float | None, fit: str) -> Layout:
    """Return the layout of [T, H, W, 3] with whole patches (crop) or with padding."""
    frames, height, width = pixels.shape[:3]
    if fit == "crop":
        frames, height, width = max(1, frames // 4 * 4), height // 16 * 16, width // 16 * 16
    grid = (-(-frames // 4), -(-height // 16), -(-width // 16))
    return Layout(kind=kind, frames=frames, height=height, width=width, grid=grid, fps=fps)  # type: ignore[arg-type]


def coords_of(layout: Layout) -> npt.NDArray[np.int32]:
    """Return the raster coords [n, 4] of a layout."""
    grid = np.indices(layout.grid).reshape(3, -1).T
    return np.concatenate([grid, np.zeros((len(grid), 1), int)], axis=1).astype(np.int32)


class RefusedError(Exception):
    """What a real worker answers with `invalid_parameter`."""


def embed_text(text: str) -> FloatArray:
    """A unit vector [48] of a text's letters; the word `xyzzy` is not known."""
    if text == "xyzzy":
        raise RefusedError("'xyzzy': no word of it is known")
    counts = np.bincount([ord(letter) % 48 for letter in text], minlength=48).astype(np.float32)
    unit: FloatArray = counts / np.linalg.norm(counts)
    return unit


def answer(lease: Lease, payload: bytes) -> bytes:
    """Do one job. Raises RefusedError."""
    arrays, meta = wire.loads(payload)
    job = lease.job
    card = next(card for card in (CONTINUOUS, DISCRETE) if pool_of(card) == job.pool)
    if job.op != "decode" and meta["kind"] == "text":
        assert (job.op, job.cost, job.options["outputs"], card.get("text")) == ("embed", 1, ["embedding"], True)
        about: dict[str, wire.JSON] = {"model": card["name"], "revision": card["revision"], "notes": []}
        return wire.dumps({"embedding": embed_text(meta["text"])}, about)
    if job.op == "decode":
        assert meta["model"] == card["name"]
        assert meta["revision"] == card["revision"]
        layout = layout_from_json(meta["layout"])
        if layout.kind == "voxels":
            found = {"coords": arrays["coords"][:, 1:], "feats": arrays["latents"].repeat(16, axis=1)}
            return wire.dumps(found, {"kind": "voxels", "fps": None})
        blocks = from_codes(arrays["codes"]) if "codes" in arrays else 255.0 * arrays["latents"].reshape(-1, 4, 4, 3)
        return wire.dumps({"pixels": untile(spread(blocks), layout)}, {"kind": layout.kind, "fps": layout.fps})
    if meta["kind"] == "voxels":
        return encode_voxels(card, arrays, meta, job.options["outputs"])
    pixels = arrays["pixels"]
    layout = layout_of(pixels, meta["kind"], meta["fps"], job.options["fit"])
    cut = tiles(pixels[: layout.frames, : layout.height, : layout.width], layout)
    assert len(cut) == job.cost, "the API's count of tokens is not the true one"
    halves, latents = means(cut, 2), means(cut, 4).reshape(len(cut), 48) / np.float32(255.0)
    if job.options.get("sample"):
        latents += 0.01 * np.random.default_rng(job.options["seed"]).standard_normal(latents.shape, dtype=np.float32)
    pooled = latents.mean(axis=0) + np.float32(1e-3)
    everything: dict[str, npt.NDArray[Any]] = {
        "latents": latents,
        "codes": to_codes(halves),
        "embedding": pooled / np.linalg.norm(pooled),
        "features": latents - latents.mean(axis=0),
        "reconstruction": untile(spread(halves if card["codebooks"] else means(cut, 4)), layout),
    }
    found = {name: everything[name] for name in job.options["outputs"]}
    if "reconstruction" in found:
        found["reconstruction.pixels"] = found.pop("reconstruction")
    facts: dict[str, wire.JSON] = {
        "layout": layout_to_json(layout),
        "model": card["name"],
        "revision": card["revision"],
        "notes": meta["notes"],
    }
    return wire.dumps({"coords": coords_of(layout), **found}, facts)


def encode_voxels(
    card: dict[str, Any], arrays: dict[str, npt.NDArray[Any]], meta: dict[str, Any], outputs: list[str]
) -> bytes:
    """Voxels for latents: the first 48 values of each."""
    cells, feats = arrays["coords"], np.asarray(arrays["feats"], np.float32)
    latents = feats[:, :48] / np.float32(max(1.0, feats.max()))
    pooled = latents.mean(axis=0) + np.float32(1e-3)
    everything: dict[str, npt.NDArray[Any]] = {
        "latents": latents,
        "codes": np.zeros((len(cells), 8), np.int16),
        "embedding": pooled / np.linalg.norm(pooled),
        "features": latents,
    }
    layout = Layout(kind="voxels", frames=0, height=0, width=0, grid=(0, 0, 0))
    facts: dict[str, wire.JSON] = {
        "layout": layout_to_json(layout),
        "model": card["name"],
        "revision": card["revision"],
        "notes": meta["notes"],
    }
    coords = np.pad(cells, ((0, 0), (1, 0)), constant_values=1)
    return wire.dumps({"coords": coords, **{name: everything[name] for name in outputs}}, facts)


class BlockWorker:
    """A thread with a worker's event loop. `hold` lets jobs pile up, `running.set()` ends it; `seen` are begun ids."""

    def __init__(self, url: str, cards: tuple[dict[str, Any], ...] = (CONTINUOUS, DISCRETE)) -> None:
        self._url, self._cards = url, cards
        self.running = threading.Event()
        self.running.set()
        self._idle = threading.Event()
        self.seen: list[str] = []
        self.failures: list[BaseException] = []
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._life()), name="block-worker")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(20.0), "the worker did not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive()
        assert not self.failures, self.failures

    def hold(self) -> None:
        """Take no more jobs, and return when none is in hand."""
        self.running.clear()
        self._idle.clear()
        assert self._idle.wait(20.0), "the worker does not stop"

    async def _life(self) -> None:
        pools = [pool_of(card) for card in self._cards]
        consumer = QueueConsumer(self._url, f"blocks-{time.time_ns()}", pools, lease_s=5.0)
        try:
            await consumer.start(self._cards)
            for pool in pools:
                await consumer.report(pool, RATES)
            await consumer.set_ready(True)
            self._ready.set()
            beaten = time.monotonic()
            while not self._stop.is_set():
                if time.monotonic() - beaten > 1.0:
                    await consumer.beat([])
                    beaten = time.monotonic()
                if not self.running.is_set():
                    self._idle.set()
                    await asyncio.sleep(0.02)
                    continue
                leases = await consumer.fetch(32_768, 16, block_s=0.05)
                for lease in await consumer.start_jobs(leases) if leases else []:
                    self.seen.append(lease.job.request_id)
                    begun = time.perf_counter()
                    try:
                        payload = answer(lease, await consumer.load(lease))
                    except RefusedError as error:
                        refusal = Answer(id=lease.job.id, status="failed", code="invalid_parameter", detail=str(error))
                        await consumer.commit(lease, refusal)
                        continue
                    timings = {"model": 1000.0 * (time.perf_counter() - begun)}
                    await consumer.commit(
                        lease, Answer(id=lease.job.id, status="done", payload=payload, timings=timings)
                    )
        except BaseException as error:
            self.failures.append(error)
            raise
        finally:
            await consumer.close()
