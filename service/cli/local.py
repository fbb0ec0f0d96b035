"""What `atoken encode`, `decode`, `embed` and `models` do: the model in this process, files in and out."""

from __future__ import annotations

import json
import mmap
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast

import numpy as np

from media.decode import decode_media
from media.errors import MediaError
from media.image import decode_image, encode_image
from media.limits import Limits
from media.sniff import Probe, probe, token_cost
from media.splat_files import SplatFormat, encode_gaussians
from media.tokens import check_decodable, dump_tokens, load_tokens
from media.types import Asset, Fit, Image, Tokens, Voxels
from media.video import VideoWriter, decode_video, iter_video
from model import ModelError, Tokenizer
from service.cli.errors import CommandError

LIMITS = Limits.local()
Up = Literal["y", "z"]
PACK_TOKENS = 8192
"""Pictures are encoded together until they make so many tokens: enough to be fast, little memory."""

IMAGE_FORMATS: dict[str, Literal["png", "webp", "jpeg"]] = {
    ".png": "png",
    ".webp": "webp",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
}
VIDEO_FORMATS: dict[str, Literal["mp4", "mkv"]] = {".mp4": "mp4", ".mkv": "mkv"}
SPLAT_FORMATS: dict[str, SplatFormat] = {".ply": "ply", ".splat": "splat", ".spz": "spz"}
SPLAT_DECODER = "tiny-splats"
SUFFIXES = {
    "image": (*IMAGE_FORMATS, ".npy"),
    "video": (*VIDEO_FORMATS, ".npy"),
    "voxels": (*SPLAT_FORMATS, *IMAGE_FORMATS, *VIDEO_FORMATS, ".npz"),
}
MAGIC = (
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"\x89PNG\r\n", "a PNG picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (8, b"AVI ", "an AVI clip"),
    (4, b"ftyp", "an MP4, MOV or AVIF file"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM clip"),
)
"""Offset, bytes there, and what a file is that was taken for a token file."""


def load(model: str, device: str | None, dtype: str | None, threads: int | None) -> Tokenizer:
    """Load a model as the command line names it. Raises ModelError."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Tokenizer.load(model, device=device, dtype=dtype)


def encode_files(
    tokenizer: Tokenizer,
    files: Sequence[Path],
    output: Path,
    *,
    outputs: Sequence[str] | None,
    fit: str,
    up: str | None = None,
) -> str:
    """Write the token file of all files, in their order; return a line about it."""
    if up not in (None, "y", "z"):
        raise CommandError(f"--up {up!r}; wanted y or z")
    if fit not in ("pad", "crop"):
        raise CommandError(f"--fit {fit!r}; wanted pad or crop")
    _check_folder(output)
    outputs = outputs or [_form(tokenizer)]
    _check_outputs(tokenizer, outputs)
    tokens = _encode(tokenizer, files, outputs, cast(Fit, fit), cast(Up | None, up))
    output.write_bytes(dump_tokens(tokens))
    count = sum(len(item) for item in tokens)
    return f"{output}: {_items(len(tokens))}, {count} tokens, {output.stat().st_size} bytes ({tokenizer.name})"


def embed_items(
    tokenizer: Tokenizer, files: Sequence[Path], texts: Sequence[str], *, as_json: bool, output: Path | None
) -> Iterator[str]:
    """Yield what to print about the embeddings of all files, then all texts: JSON, or sizes and cosine similarities.

    files, texts: at least one together.
    """
    if output is not None:
        _check_folder(output)
    with _named("--text"):  # before the files, which take long
        of_texts = list(tokenizer.embed_texts(texts)) if texts else []
    tokens = _encode(tokenizer, files, ["embedding"], "pad")
    embeddings = np.stack([*(item.embedding for item in tokens if item.embedding is not None), *of_texts])
    if output is not None:
        np.save(output, embeddings)
    if as_json:
        about: list[dict[str, object]] = [
            {"file": str(file), "tokens": len(item)} for file, item in zip(files, tokens, strict=True)
        ]
        about += [{"text": text} for text in texts]
        rows = [{**one, "embedding": row.tolist()} for one, row in zip(about, embeddings, strict=True)]
        yield json.dumps({"model": tokenizer.name, "revision": tokenizer.revision, "items": rows})
        return
    what = "files" if not texts else "files and texts" if files else "texts"
    yield f"{tokenizer.name}, {embeddings.shape[1]} values each; cosine similarity to the {what} in this order:"
    names = [*(file.name for file in files), *texts]
    width = max(map(len, names))
    for name, row in zip(names, embeddings @ embeddings.T, strict=True):
        yield f"{name:{width}}  {' '.join(f'{value:6.3f}' for value in row)}"


def decode_file(
    file: Path,
    output: Path,
    *,
    model: str | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    force: bool = False,
) -> Iterator[str]:
    """Decode every item of a token file; yield a line for each file written."""
    _check_folder(output)
    items = _load_tokens(file)
    for index, item in enumerate(items):
        if output.suffix.lower() not in SUFFIXES[item.layout.kind]:
            raise CommandError(
                f"{output.name}: item {index} of {file.name} is {_a(item.layout.kind)}, "
                f"which can be written as {' '.join(SUFFIXES[item.layout.kind])}"
            )
    tokenizer = load(model or items[0].model or "tiny-continuous", device, dtype, threads)
    for index, item in enumerate(items):
        with _named(f"{file}, item {index}"):
            check_decodable(
                item, latent_channels=tokenizer.config.latent_channels, codebooks=tokenizer.config.codebooks
            )
    for index, item in enumerate(items):
        path = output if len(items) == 1 else output.with_stem(f"{output.stem}-{index}")
        # A file made by hand need not say what made it.
        with _named(f"{file}, item {index}"):
            _write(tokenizer, item, path, any_model=force or not item.revision)
        yield f"{path}: {_size(item)}"


def list_models(*, as_json: bool) -> Iterator[str]:
    """Yield the cards of the bundled models, for people or as JSON."""
    from model.config import VARIANTS
    from model.tokenizer import BUNDLED

    names = sorted(file.stem for file in BUNDLED.glob("*.safetensors"))
    cards = [Tokenizer.load(name, device="cpu").card() for name in names]
    if as_json:
        yield json.dumps(cards)
        return
    for card in cards:
        codes = f"{card['codebooks']} codes of {card['codebook_size']}" if card["codebooks"] else "no codes"
        yield (
            f"{card['name']}  {card['revision'][:12]}  {card['parameters'] / 1e6:.1f} M parameters, "
            f"{card['latent_channels']} latent channels, {codes}, embedding of {card['embedding_dim']}"
        )
    published = [name for name in VARIANTS if name not in names]
    yield f"Other weights: --model FILE.safetensors, or --model VARIANT=FILE.pt with one of {', '.join(published)}"


def list_versions() -> Iterator[str]:
    """Yield the versions of what the results depend on."""
    for name in ("atoken-serve", "torch", "numpy", "av", "pillow", "redis", "fastapi"):
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} not installed"
    yield f"python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _encode(
    tokenizer: Tokenizer, files: Sequence[Path], outputs: Sequence[str], fit: Fit, up: Up | None = None
) -> list[Tokens]:
    """Pictures and 3D go through the model packed together, clips window by window as they are read."""
    done: list[Tokens] = []
    pack: list[Image | Voxels] = []
    pack_tokens = 0
    for file in files:
        header = _probe(file)
        if header.kind != "image" or pack_tokens + (header.tokens or 0) > PACK_TOKENS:
            done += _encode_pack(tokenizer, pack, outputs, fit)
            pack, pack_tokens = [], 0
        if header.kind == "video":
            with _named(file):
                done.append(_encode_clip(tokenizer, file, outputs, fit))
        elif header.kind == "voxels":
            with _named(file):
                asset = decode_media(file.read_bytes(), LIMITS, up=up)
                assert isinstance(asset, Asset)
                done += _encode_pack(tokenizer, [asset.voxels], outputs, fit)
        else:
            with _named(file):
                token_cost("image", 1, header.height, header.width, fit)  # too small to crop: in a pack it has no name
                pack.append(decode_image(file.read_bytes(), LIMITS))
            pack_tokens += header.tokens or 0
    return done + _encode_pack(tokenizer, pack, outputs, fit)


def _encode_pack(
    tokenizer: Tokenizer, pack: Sequence[Image | Voxels], outputs: Sequence[str], fit: Fit
) -> list[Tokens]:
    return tokenizer.encode(pack, outputs, fit=fit) if pack else []


def _encode_clip(tokenizer: Tokenizer, file: Path, outputs: Sequence[str], fit: Fit) -> Tokens:
    if fit == "crop":  # what is dropped at the end is known only when all frames are there
        return tokenizer.encode([decode_video(file.read_bytes(), LIMITS)], outputs, fit=fit)[0]
    with file.open("rb") as source, iter_video(source, LIMITS) as frames:
        return tokenizer.encode_video(frames, outputs, fps=frames.fps)


def _probe(file: Path) -> Probe:
    if file.stat().st_size == 0:
        raise CommandError(f"{file}: the file is empty")
    with file.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as mapped, _named(file):
        return probe(cast(bytes, mapped), LIMITS)  # a map reads like bytes and costs no memory


def _load_tokens(file: Path) -> list[Tokens]:
    data = file.read_bytes()
    with _named(file):
        try:
            return load_tokens(data, limits=LIMITS)
        except MediaError:
            for offset, magic, what in MAGIC:
                if data.startswith(magic, offset):
                    raise CommandError(f"{file}: this is {what}, not a token file") from None
            raise


@contextmanager
def _named(what: Path | str) -> Iterator[None]:
    """Say of what an error is: the packages below get bytes and know no file names."""
    try:
        yield
    except (MediaError, ModelError) as error:
        raise CommandError(f"{what}: {error}") from error


def _write(tokenizer: Tokenizer, item: Tokens, path: Path, *, any_model: bool) -> None:
    suffix = path.suffix.lower()
    layout = item.layout
    if layout.kind == "voxels":
        voxels = tokenizer.decode([item], any_model=any_model)[0]
        assert isinstance(voxels, Voxels)
        _write_voxels(tokenizer, voxels, path)
        return
    if layout.kind == "image":
        pixels = next(tokenizer.decode_stream(item, any_model=any_model))[0]
        if suffix == ".npy":
            np.save(path, pixels)
        else:
            path.write_bytes(encode_image(pixels, IMAGE_FORMATS[suffix]))
        return
    pieces = tokenizer.decode_stream(item, any_model=any_model)
    if suffix == ".npy":
        shape = (layout.frames, layout.height, layout.width, 3)
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        start = 0
        for piece in pieces:
            array[start : start + len(piece)] = piece
            start += len(piece)
        array.flush()
        return
    with (
        path.open("wb") as file,
        VideoWriter(file, layout.height, layout.width, layout.fps, VIDEO_FORMATS[suffix]) as out,
    ):
        for piece in pieces:
            out.write(piece)


def _write_voxels(tokenizer: Tokenizer, voxels: Voxels, path: Path) -> None:
    """As arrays, as Gaussians, as a picture of them, or as a clip of one turn around them."""
    from model.splat_decoder import SplatDecoder
    from service.view import TURNTABLE_FRAMES, TURNTABLE_SIDE, View
    from service.worker.splatter import draw

    suffix = path.suffix.lower()
    if suffix == ".npz":
        np.savez(path, coords=voxels.coords, feats=voxels.feats)
        return
    (splats,) = SplatDecoder.load(SPLAT_DECODER, device=tokenizer.device).decode([voxels])
    if suffix in SPLAT_FORMATS:
        path.write_bytes(encode_gaussians(splats.to_record(), SPLAT_FORMATS[suffix]))
    elif suffix in IMAGE_FORMATS:
        path.write_bytes(encode_image(draw(splats, View())[0], IMAGE_FORMATS[suffix]))
    else:
        view = View(frames=TURNTABLE_FRAMES, side=TURNTABLE_SIDE)
        with path.open("wb") as file, VideoWriter(file, view.side, view.side, view.fps, VIDEO_FORMATS[suffix]) as out:
            out.write(draw(splats, view))


def _form(tokenizer: Tokenizer) -> str:
    return "codes" if "codes" in tokenizer.outputs else "latents"


def _check_outputs(tokenizer: Tokenizer, outputs: Sequence[str]) -> None:
    unknown = [name for name in outputs if name not in tokenizer.outputs]
    if unknown:
        hint = "; --model tiny-discrete has codes" if "codes" in unknown else ""
        raise CommandError(
            f"--outputs: {tokenizer.name} has no {', '.join(unknown)}, only {', '.join(tokenizer.outputs)}{hint}"
        )


def _check_folder(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise CommandError(f"{path}: there is no folder {path.parent}")


def _a(kind: str) -> str:
    return {"image": "an image", "video": "a clip", "voxels": "a voxel set"}[kind]


def _items(count: int) -> str:
    return f"{count} item{'s' if count != 1 else ''}"


def _size(item: Tokens) -> str:
    layout = item.layout
    if layout.kind == "voxels":
        return f"{len(item)} voxels"
    frames = f"{layout.frames} frames of " if layout.kind == "video" else ""
    return f"{frames}{layout.width} x {layout.height} pixels"
