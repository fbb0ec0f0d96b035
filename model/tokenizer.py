"""The facade: items in, tokens out, and back. Everything below it is plain torch modules.

n: tokens of one item; L latent channels; K codebooks; C channels of the features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from media.types import Fit, Image, Int32Array, Item, Layout, Tokens, UInt8Array, Video, Voxels
from model import fsq, gaussian, weights
from model.config import VARIANTS, VOXEL_GRID, WINDOW_FRAMES, ModelConfig
from model.errors import RangeError, ShapeError, UnsupportedError, WeightsError
from model.network import ATokenNet
from model.packed import PackedTokens, Span, chunk_spans, pack, plan_windows
from model.patchify import coords_of, layout_of, leading_patches, pixel_layout, raster_coords, to_uint8, unpatchify
from model.pooling import PoolState
from model.words import WordTable

BUNDLED = Path(__file__).parent / "bundled"
OUTPUTS = ("latents", "codes", "embedding", "features")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tokens of one pass through a stack. More brings a CPU nothing but memory; a GPU wants to be filled.
PASS_TOKENS = {"cpu": 2048, "cuda": 32768}


class Tokenizer:
    """A loaded model.

    net: the network, on its device and in its dtype; name: what tokens are signed with; revision: hash of its
    weights; pass_tokens: tokens of one pass, which bounds memory; batch_invariant: as in load; words: texts to the
    space of its embeddings, None for a model without a text side.
    """

    def __init__(
        self,
        net: ATokenNet,
        *,
        name: str,
        revision: str,
        pass_tokens: int | None = None,
        batch_invariant: bool = False,
        words: WordTable | None = None,
    ) -> None:
        self.net = net.eval()
        self.batch_invariant = batch_invariant
        if batch_invariant:
            net.fix_products()
        self.config: ModelConfig = net.config
        self.name = name
        self.revision = revision
        self.words = words
        parameter = next(net.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.pass_tokens = pass_tokens or PASS_TOKENS.get(self.device.type, PASS_TOKENS["cuda"])

    @classmethod
    def load(
        cls,
        model: str,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        pass_tokens: int | None = None,
        batch_invariant: bool = False,
    ) -> Tokenizer:
        """Load a bundled model by name, a weights file or folder, or `VARIANT=FILE` for files that carry no config.

        device: default the GPU if there is one. dtype: "float32", "bfloat16" or "float16"; default bfloat16 for a
        continuous model on a GPU, else float32 (codes are not reproducible between float types). batch_invariant: an
        item's results are bit for bit the same whatever shares its batch, on one device and release of torch, for
        products that are slower; else they agree to rounding.
        Raises WeightsError for files that are missing or do not fit, UnsupportedError for unknown names.
        """
        name, path, config = _resolve(model)
        config = config or weights.read_config(path)
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise UnsupportedError(f"device {device!r}; wanted cpu, cuda or cuda:N") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError(f"device {device}: there is no usable CUDA device; use device='cpu'")
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" and config.bottleneck == "gaussian" else torch.float32
        elif isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UnsupportedError(f"dtype {dtype!r}; wanted one of {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
        net = weights.load(path, config, device=device, dtype=dtype)
        return cls(
            net,
            name=name,
            revision=weights.revision_of(path, config),
            pass_tokens=pass_tokens,
            batch_invariant=batch_invariant,
            # The bundled models have one space of embeddings, which other weights do not share.
            words=WordTable.load() if path.resolve().parent == BUNDLED.resolve() else None,
        )

    @property
    def outputs(self) -> tuple[str, ...]:
        """What encode can be asked for."""
        return OUTPUTS if self.config.bottleneck == "fsq" else tuple(name for name in OUTPUTS if name != "codes")

    def card(self) -> dict[str, Any]:
        """Facts about this model as JSON values: what a worker registers and /v1/models shows."""
        return {
            "name": self.name,
            "revision": self.revision,
            "outputs": [*self.outputs, "reconstruction"],
            "kinds": ["image", "video", "voxels"],
            "patch": list(self.config.patch),
            "latent_channels": self.config.latent_channels,
            "codebooks": self.config.codebooks,
            "codebook_size": self.config.codebook_size,
            "embedding_dim": self.config.encoder.width,
            "attention_tokens": self.config.encoder.attention_tokens,
            "window": self.config.window,
            "text": self.words is not None,
            "parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_invariant": self.batch_invariant,
        }

    def encode(
        self,
        items: Sequence[Item],
        outputs: Collection[str] = ("latents",),
        *,
        fit: Fit | Sequence[Fit] = "pad",
        seeds: Sequence[int | None] | None = None,
    ) -> list[Tokens]:
        """Encode images, clips and voxel sets of any size in packed passes; an item's result knows no neighbours.

        outputs: any of latents, codes, embedding, features. A discrete model gives codes when both codes and
        latents are asked for; its latents alone are the FSQ values. fit: "pad" keeps every pixel, "crop" is the
        published crop-and-drop; one for all or one an item. seeds: an int draws that item's latents from the
        posterior, None (default) takes the mean. Raises UnsupportedError, ShapeError or RangeError.
        """
        wanted = self._wanted(outputs)
        fits = [fit] * len(items) if isinstance(fit, str) else list(fit)
        seeds = [None] * len(items) if seeds is None else list(seeds)
        if len(fits) != len(items) or len(seeds) != len(items):
            raise ShapeError(f"{len(items)} items with {len(fits)} fits and {len(seeds)} seeds; wanted one an item")
        if unknown := sorted(set(fits) - {"pad", "crop"}):
            raise UnsupportedError(f"fit {unknown[0]!r}; wanted 'pad' or 'crop'")
        works = []
        for item, item_fit, seed in zip(items, fits, seeds, strict=True):
            layout = layout_of(item, self.config, item_fit)
            if layout.kind != "voxels" and 0 in layout.grid:
                _, ph, pw = self.config.patch
                raise RangeError(f"an image or clip under {ph} x {pw} pixels with fit='crop'; use fit='pad'")
            works.append(_Work(wanted, layout=layout, coords=coords_of(item, layout), seed=self._seed(seed)))
        spans = [
            span
            for index, work in enumerate(works)
            for span in plan_windows(torch.from_numpy(work.coords), index, self.config.window)
        ]
        for chunk in chunk_spans(spans, self.pass_tokens):
            patches = []
            for span in chunk:
                work = works[span.item]
                first, last = work.coords[span.start, 0], work.coords[span.stop - 1, 0] + 1
                t = slice(int(first), int(last))
                patches.append(leading_patches(items[span.item], work.layout, self.config, t=t, device=self.device))
            self._encode_pass(works, chunk, patches)
        return [self._finish(work) for work in works]

    def embed(self, items: Sequence[Item]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Embeddings for search: float32 [B, C], unit length; [0, C] for no items."""
        if not items:
            return np.zeros((0, self.config.encoder.width), np.float32)
        return np.stack(
            [tokens.embedding for tokens in self.encode(items, {"embedding"}) if tokens.embedding is not None]
        )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Embeddings of texts beside those of pictures: float32 [B, C], unit length; [0, C] for no texts.

        Raises UnsupportedError of a model without a text side, RangeError for a text without a known word.
        """
        if self.words is None:
            raise UnsupportedError(f"{self.name!r} has no text side; the bundled models have one")
        if not texts:
            return np.zeros((0, self.config.encoder.width), np.float32)
        embeddings: np.ndarray[Any, np.dtype[np.float32]] = self.words.embed(texts).numpy()
        return embeddings

    def encode_video(
        self,
        frames: Iterable[UInt8Array],
        outputs: Collection[str] = ("latents",),
        *,
        fps: float | None = None,
        seed: int | None = None,
    ) -> Tokens:
        """Encode a clip as its frames come: memory does not grow with its length. The same result as encode.

        frames: uint8 [H, W, 3] each, all of one size, at least one. Raises ShapeError.
        """
        wanted = self._wanted(outputs)
        stream = iter(frames)
        tile = list(islice(stream, WINDOW_FRAMES))
        if len(tile) == 0:
            raise ShapeError("a clip without frames; wanted at least one")
        height, width = tile[0].shape[:2]
        empty = pixel_layout(0, height, width, self.config, kind="video")
        work = _Work(wanted, layout=empty, coords=None, seed=self._seed(seed))
        total = 0
        while tile:
            if any(frame.shape != tile[0].shape for frame in tile) or tile[0].shape != (height, width, 3):
                raise ShapeError(f"frames of different sizes; the first is {height} x {width}, wanted all alike")
            layout = pixel_layout(len(tile), height, width, self.config, kind="video")
            patches = leading_patches(Video(frames=np.stack(tile)), layout, self.config, device=self.device)
            coords = raster_coords(layout.grid, total // self.config.patch[0])
            work.add_coords(coords)
            span = Span(
                item=0, start=work.rows - len(coords), stop=work.rows, rows=layout.grid[1], columns=layout.grid[2]
            )
            self._encode_pass([work], [span], [patches])
            total += len(tile)
            tile = list(islice(stream, WINDOW_FRAMES))
        work.layout = pixel_layout(total, height, width, self.config, kind="video", fps=fps)
        return self._finish(work)

    def decode(self, tokens: Sequence[Tokens], *, any_model: bool = False) -> list[Item]:
        """Decode tokens to items of their exact original size, in packed passes.

        tokens: each with latents or codes. any_model=True takes tokens of other weights, at the caller's risk.
        Raises UnsupportedError, ShapeError or RangeError.
        """
        values = [self._values(item, any_model) for item in tokens]
        canvases: list[UInt8Array | None] = [
            None
            if item.layout.kind == "voxels"
            else np.empty((item.layout.frames, item.layout.height, item.layout.width, 3), np.uint8)
            for item in tokens
        ]
        voxels: list[list[Tensor]] = [[] for _ in tokens]
        spans = [span for index, item in enumerate(tokens) for span in self._spans(item, index)]
        for chunk in chunk_spans(spans, self.pass_tokens):
            for span, patches in zip(chunk, self._decode_pass(tokens, values, chunk), strict=True):
                canvas, item = canvases[span.item], tokens[span.item]
                if canvas is None:
                    voxels[span.item].append(patches[:, : self.config.frame_values].float().cpu())
                else:
                    first = int(item.coords[span.start, 0]) * self.config.patch[0]
                    frames = self._frames(patches, span, item.layout, first)
                    canvas[first : first + len(frames)] = frames
        return [
            _item(item, canvas, parts, item.coords)
            for item, canvas, parts in zip(tokens, canvases, voxels, strict=True)
        ]

    def decode_stream(self, tokens: Tokens, *, any_model: bool = False) -> Iterator[UInt8Array]:
        """Decode an image or clip piece by piece: uint8 [T, H, W, 3], windows of at most 16 frames as they come.

        Memory does not grow with the clip's length. Raises as decode does, before the first piece.
        """
        if tokens.layout.kind == "voxels":
            raise UnsupportedError("voxels have no frames to stream; use decode")
        values = [self._values(tokens, any_model)]
        spans = self._spans(tokens, 0)
        return self._stream(tokens, values, spans)

    def _stream(self, tokens: Tokens, values: list[Tensor], spans: list[Span]) -> Iterator[UInt8Array]:
        for span in spans:
            patches = self._decode_pass([tokens], values, [span])[0]
            first = int(tokens.coords[span.start, 0]) * self.config.patch[0]
            yield self._frames(patches, span, tokens.layout, first)

    @torch.inference_mode()
    def _encode_pass(self, works: Sequence[_Work], spans: Sequence[Span], patches: Sequence[Tensor]) -> None:
        """One pass of the encoder over whole windows; what was asked for is added to each item's work."""
        coords = [torch.from_numpy(works[span.item].coords[span.start : span.stop]).to(self.device) for span in spans]
        moving = [works[span.item].layout.kind == "video" for span in spans]
        packed = pack(spans, patches, coords, moving, self.config.window)
        wanted = works[spans[0].item].wanted
        features = self.net.encode(packed)
        mean = logvar = codes = None
        if "latents" in wanted or "codes" in wanted:
            mean, logvar = self.net.posterior(features, packed)
            if self.config.bottleneck == "fsq":
                mean = self.net.quantize(mean, packed.moving)
                codes = fsq.values_to_codes(mean, self.config.codebooks)
        for span, start, stop in zip(spans, packed.starts, packed.starts[1:], strict=False):
            work = works[span.item]
            if "embedding" in wanted:
                work.pool = self.net.encoder.head.update(work.pool, features[start:stop])
            if "features" in wanted:
                work.features.append(features[start:stop].float().cpu())
            if "codes" in wanted and codes is not None:
                work.codes.append(codes[start:stop].cpu())
            elif mean is not None and logvar is not None:
                latents = mean[start:stop].float()
                if work.seed is not None and self.config.bottleneck == "gaussian":
                    latents = gaussian.sample(latents, logvar[start:stop], work.seed, span.start)
                work.latents.append(latents.cpu())

    @torch.inference_mode()
    def _finish(self, work: _Work) -> Tokens:
        embedding = None
        if work.pool is not None:
            embedding = normalize(self.net.encoder.head.finish(work.pool).float(), dim=0, eps=1e-12).cpu().numpy()
        return Tokens(
            coords=work.coords,
            layout=work.layout,
            latents=torch.cat(work.latents).numpy() if work.latents else None,
            codes=torch.cat(work.codes).numpy().astype(np.int16) if work.codes else None,
            embedding=embedding,
            features=torch.cat(work.features).numpy() if work.features else None,
            model=self.name,
            revision=self.revision,
        )

    @torch.inference_mode()
    def _decode_pass(
        self, tokens: Sequence[Tokens], values: Sequence[Tensor], spans: Sequence[Span]
    ) -> tuple[Tensor, ...]:
        """One pass of the decoder over whole windows; patches [len, P] of each, without a still's other frames."""
        coords = [
            torch.from_numpy(np.array(tokens[span.item].coords[span.start : span.stop], np.int32)).to(self.device)
            for span in spans
        ]
        feats = [values[span.item][span.start : span.stop].to(self.device) for span in spans]
        moving = [tokens[span.item].layout.kind == "video" for span in spans]
        packed: PackedTokens = pack(spans, feats, coords, moving, self.config.window)
        count = self.config.patch_values if any(moving) else self.config.frame_values
        return self.net.decode(packed, count).split([len(span) for span in spans])

    def _frames(self, patches: Tensor, span: Span, layout: Layout, first: int) -> UInt8Array:
        """Pixels of one window, cut to the item's size. first: its first frame in the item."""
        grid = (len(span) // (span.rows * span.columns), span.rows, span.columns)
        pixels = unpatchify(patches, grid, self.config)
        return to_uint8(pixels[: layout.frames - first, : layout.height, : layout.width])

    def _spans(self, tokens: Tokens, index: int) -> list[Span]:
        coords = torch.from_numpy(np.array(tokens.coords, np.int32))
        return plan_windows(coords, index, self.config.window)

    def _values(self, tokens: Tokens, any_model: bool) -> Tensor:
        """What the decoder receives for one item, float32 [n, L] on the CPU, after all checks."""
        if tokens.revision != self.revision and not any_model:
            raise UnsupportedError(
                f"tokens of model {tokens.model!r}, weights {tokens.revision[:12]}; this is {self.name!r}, "
                f"weights {self.revision[:12]}"
            )
        layout, coords = tokens.layout, tokens.coords
        if coords.ndim != 2 or coords.shape[1] != 4 or len(coords) == 0:
            raise ShapeError(f"coords of shape {coords.shape}; wanted [n, 4] with n at least 1")
        if layout.kind == "voxels" and (coords[:, 1:].min() < 0 or coords[:, 1:].max() >= VOXEL_GRID):
            raise RangeError(f"voxels at {coords[:, 1:].min()} to {coords[:, 1:].max()}; wanted 0 to {VOXEL_GRID - 1}")
        if layout.kind != "voxels":
            t, h, w = layout.grid
            pt, ph, pw = self.config.patch
            sizes = (layout.frames, layout.height, layout.width)
            if any(
                not 0 < size <= cells * p for size, cells, p in zip(sizes, layout.grid, self.config.patch, strict=True)
            ):
                raise ShapeError(f"layout of {sizes} pixels on a grid of {layout.grid} patches of {(pt, ph, pw)}")
            if len(coords) != t * h * w or not np.array_equal(coords, raster_coords(layout.grid)):
                raise ShapeError(f"{len(coords)} coords that are not the raster of the grid {layout.grid}, t slowest")
        n = len(coords)
        if tokens.codes is not None:
            if self.config.bottleneck != "fsq":
                raise UnsupportedError(f"{self.name!r} is continuous: it decodes latents, not codes")
            if tokens.codes.shape != (n, self.config.codebooks):
                raise ShapeError(f"codes of shape {tokens.codes.shape}; wanted [{n}, {self.config.codebooks}]")
            low, high, size = int(tokens.codes.min()), int(tokens.codes.max()), self.config.codebook_size
            if low < 0 or high >= size:
                raise RangeError(f"codes from {low} to {high}; wanted 0 to {size - 1}")
            codes = torch.from_numpy(np.ascontiguousarray(tokens.codes, np.int32))
            return fsq.codes_to_values(codes, self.config.latent_channels)
        if tokens.latents is None:
            raise ShapeError("tokens with neither latents nor codes; wanted one of them")
        if tokens.latents.shape != (n, self.config.latent_channels):
            raise ShapeError(f"latents of shape {tokens.latents.shape}; wanted [{n}, {self.config.latent_channels}]")
        if not np.isfinite(tokens.latents).all():
            row = int(np.argwhere(~np.isfinite(tokens.latents))[0, 0])
            raise RangeError(f"latents that are not finite, first in row {row}")
        return torch.from_numpy(np.array(tokens.latents, np.float32))  # a copy: torch warns of read-only views

    def _wanted(self, outputs: Collection[str]) -> frozenset[str]:
        if isinstance(outputs, str) or not outputs:
            raise UnsupportedError(f"outputs {outputs!r}; wanted a list or set of {', '.join(self.outputs)}")
        if unknown := sorted(set(outputs) - set(self.outputs)):
            raise UnsupportedError(
                f"{self.name!r} does not give {', '.join(unknown)}; it gives {', '.join(self.outputs)}"
            )
        return frozenset(outputs) - ({"latents"} if "codes" in outputs else set())

    def _seed(self, seed: int | None) -> int | None:
        if seed is not None and not 0 <= seed < 2**64:
            raise RangeError(f"seed {seed}; wanted 0 to 2**64 - 1")
        return seed


@dataclass
class _Work:
    """One item on its way through the encoder; coords is None until the first tile of a stream came."""

    wanted: frozenset[str]
    layout: Layout
    coords: Any
    seed: int | None
    pool: PoolState | None = None
    latents: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Tokens so far."""
        return 0 if self.coords is None else len(self.coords)

    def add_coords(self, coords: Int32Array) -> None:
        """Append a tile's coordinates."""
        self.coords = coords if self.coords is None else np.concatenate([self.coords, coords])


def _item(tokens: Tokens, canvas: UInt8Array | None, parts: list[Tensor], coords: Int32Array) -> Item:
    if canvas is None:
        feats = ((torch.cat(parts) + 1) / 2).numpy()
        return Voxels(coords=np.ascontiguousarray(coords[:, 1:]), feats=feats)
    if tokens.layout.kind == "image":
        return Image(pixels=canvas[0])
    return Video(frames=canvas, fps=tokens.layout.fps)


def _resolve(model: str) -> tuple[str, Path, ModelConfig | None]:
    """A name, path or VARIANT=PATH to (name, weights file, config if it is known)."""
    variant, _, given = model.rpartition("=")
    if variant and variant not in VARIANTS:
        raise UnsupportedError(f"variant {variant!r}; there are {', '.join(VARIANTS)}")
    if not variant and (BUNDLED / f"{given}.safetensors").is_file():
        return given, BUNDLED / f"{given}.safetensors", None
    path = Path(given)
    if path.is_dir():
        files = sorted(chain(path.glob("*.safetensors"), path.glob("*.pt")))
        if len(files) != 1:
            raise WeightsError(f"{path}: {len(files)} weights files; wanted one .safetensors or .pt")
        path = files[0]
    if variant and not path.is_file():
        raise WeightsError(f"{given}: no such file or folder")
    if not path.is_file():
        if given in VARIANTS:
            raise UnsupportedError(
                f"{given!r} is a published size, which does not ship: name its weights, {given}=FILE"
            )
        bundled = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.safetensors")))
        raise UnsupportedError(f"model {model!r}: no bundled model ({bundled}) and no file or folder of that name")
    return variant or path.stem, path, VARIANTS.get(variant)
