"""Latent geometry against downstream accuracy: do classes that lie apart in a space make for better neighbours in it?

`python -m training.study geometry` encodes labelled pictures, measures each representation on the training pictures,
and lets it name the test pictures by their nearest neighbours. It trains nothing. N pictures, D values of one.
"""

from __future__ import annotations

import argparse
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from media.types import Image, Tokens, UInt8Array
from model import Tokenizer
from model.errors import ModelError
from training.clusters import Spectrum, between_share, centred_units, davies_bouldin, principal, silhouette, spectrum
from training.eval_items import SMALLEST
from training.geometry_report import Maps, Outcome, correlations, write_report
from training.measured import Parser, add_common, at_least, command, minutes_since, model_line, say, write_json
from training.retrieval import neighbours
from training.tsne import tsne

BATCH = 16
"""Pictures of one call: features of all their tokens are in memory together."""
PIXEL_SIDES = (8, 16, 32)
FLAT_VALUES = 1 << 16
"""A representation of more values is left out."""
CELLS = 4
"""Rows and columns of the coarse grid of latents."""
MEASURED_ITEMS = 4000
"""Cluster measures look at all pairs: of more training pictures so many are taken, evenly spaced."""
MAP_ITEMS = 1000
RESAMPLED_ITEMS = 2000
"""Test pictures whose hits are kept one by one, for the intervals of comparisons."""
NOISE = "noise (control)"
NOISE_VALUES = 64


@dataclass(frozen=True)
class Labelled:
    """pictures: uint8 [N, S, S, 3]; labels: int64 [N], into names."""

    pictures: UInt8Array
    labels: list[int]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Representation:
    """One space. what: for readers. known, asked: float32 [N, D] of the training and the test pictures."""

    name: str
    what: str
    known: Tensor
    asked: Tensor


def read_labelled(path: Path, count: int | None) -> Labelled:
    """Read an .npz of images, labels and class_names; at most `count` pictures, evenly spaced. Raises ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted an .npz of images, labels and class_names")
    try:
        with np.load(path, allow_pickle=False) as file:
            pictures, labels, names = (file[key] for key in ("images", "labels", "class_names"))
    except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be used: {error}") from None
    if pictures.ndim != 4 or pictures.shape[1] != pictures.shape[2] or pictures.shape[3] != 3:
        raise ValueError(f"{path}: images {list(pictures.shape)}; wanted [N, S, S, 3]")
    if pictures.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.shape != pictures.shape[:1]:
        raise ValueError(
            f"{path}: images {pictures.dtype}, labels {labels.dtype} {list(labels.shape)} of {len(pictures)} images; "
            "wanted uint8, and a whole number each"
        )
    if not len(labels) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{path}: labels of {len(labels)} images; wanted 0 to {len(names) - 1}, of one or more")
    total = len(labels)
    rows = _spread(total, count or total)
    return Labelled(pictures[rows], [int(label) for label in labels[rows]], tuple(map(str, names)))


def resized(picture: UInt8Array, side: int, filter: PIL.Image.Resampling) -> UInt8Array:
    """A square picture at another size."""
    if len(picture) == side:
        return picture
    return np.asarray(PIL.Image.fromarray(picture).resize((side, side), filter))


def pixel_rows(pictures: UInt8Array, side: int) -> Tensor:
    """float32 [N, 3 side^2] of pictures made smaller by means of their pixels."""
    small = np.stack([resized(picture, side, PIL.Image.Resampling.BOX) for picture in pictures])
    return torch.from_numpy(small.reshape(len(small), -1)).float() / 255


def token_rows(tokenizer: Tokenizer, pictures: UInt8Array, side: int) -> dict[str, Tensor]:
    """What the model says of each picture, enlarged to side x side by a bicubic filter: float32 [N, D] by name."""
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(pictures), BATCH):
        items = [
            Image(pixels=resized(picture, side, PIL.Image.Resampling.BICUBIC))
            for picture in pictures[start : start + BATCH]
        ]
        for tokens in tokenizer.encode(items, ("latents", "features", "embedding")):
            for name, row in _rows_of(tokens):
                parts.setdefault(name, []).append(row)
    return {name: torch.stack(rows) for name, rows in parts.items()}


def _rows_of(tokens: Tokens) -> Iterator[tuple[str, Tensor]]:
    assert tokens.latents is not None
    assert tokens.features is not None
    assert tokens.embedding is not None
    latents = torch.from_numpy(np.asarray(tokens.latents, np.float32))  # [n, L]
    yield "latents, mean", latents.mean(0)
    yield "latents, mean and deviation", torch.cat([latents.mean(0), latents.std(0, correction=0)])
    _, rows, columns = tokens.layout.grid
    grid = latents.T.reshape(-1, rows, columns)
    yield f"latents, {CELLS} x {CELLS} places", adaptive_avg_pool2d(grid, CELLS).flatten()
    if latents.numel() <= FLAT_VALUES:
        yield "latents, every place", latents.flatten()
    yield "features, mean", torch.from_numpy(np.asarray(tokens.features, np.float32)).mean(0)
    yield "embedding", torch.from_numpy(tokens.embedding)


WHAT = {
    "latents, mean": "mean over the positions of a picture",
    "latents, mean and deviation": "of each channel over the positions",
    f"latents, {CELLS} x {CELLS} places": f"means of {CELLS} x {CELLS} parts of the picture, one after the other",
    "latents, every place": "all positions, one after the other",
    "features, mean": "what the encoder gives before the latents, mean over the positions",
    "embedding": "the pooled vector that serving gives for search",
}


def representations(
    tokenizer: Tokenizer, known: Labelled, asked: Labelled, side: int, seed: int
) -> list[Representation]:
    """All spaces of the study; noise, which knows nothing of the pictures, is the last."""
    found = []
    for small in PIXEL_SIDES:
        if small <= min(known.pictures.shape[1], asked.pictures.shape[1]):
            rows = [pixel_rows(one.pictures, small) for one in (known, asked)]
            found.append(Representation(f"pixels, {small} x {small}", "RGB of a small copy", *rows))
    ours, theirs = (token_rows(tokenizer, one.pictures, side) for one in (known, asked))
    found += [Representation(name, WHAT[name], ours[name], theirs[name]) for name in ours]
    chance = torch.Generator().manual_seed(seed)
    noise = [torch.randn(len(one.labels), NOISE_VALUES, generator=chance) for one in (known, asked)]
    return [*found, Representation(NOISE, "normal numbers: what chance gives", *noise)]


def measure(space: Representation, known: Labelled, asked: Labelled) -> Outcome:
    """Neighbours of the test pictures, and how the training pictures lie. Raises ValueError for a single class."""
    mean = space.known.mean(0)
    accuracy = {}
    for centred in (False, True):
        a, b = (space.known - mean, space.asked - mean) if centred else (space.known, space.asked)
        for k in (1, 5):
            accuracy[k, centred] = neighbours(a, known.labels, b, asked.labels, k)
    # One by one, for how spaces compare hangs on the same pictures; the share above counts all of them.
    hits = [
        bool(neighbours(space.known - mean, known.labels, space.asked[row : row + 1] - mean, [asked.labels[row]]).right)
        for row in _spread(len(asked.labels), RESAMPLED_ITEMS)
    ]
    rows = _spread(len(known.labels), MEASURED_ITEMS)
    units = centred_units(space.known[rows], mean)
    labels = torch.tensor(known.labels)[rows]
    filled: Spectrum = spectrum(space.known[rows])
    return Outcome(
        name=space.name,
        what=space.what,
        values=space.known.shape[1],
        accuracy=accuracy,
        hits=np.array(hits),
        silhouette=silhouette(units, labels),
        davies_bouldin=davies_bouldin(units, labels),
        between=between_share(units, labels),
        participation=filled.participation,
        effective_rank=filled.effective,
        is_control=space.name == NOISE,
    )


def maps_of(space: Representation, known: Labelled, asked: Labelled) -> Maps:
    """Both maps of training and test pictures together, at most MAP_ITEMS of them, in cosine around the mean."""
    rows = _spread(len(known.labels) + len(asked.labels), MAP_ITEMS)
    both = torch.cat([space.known, space.asked])[rows]
    units = centred_units(both, space.known.mean(0))
    plane, shares = principal(both)
    on_sphere, _ = principal(units)
    return Maps(
        name=space.name,
        pca=plane.numpy(),
        shares=(shares[0], shares[1]),
        tsne=tsne((2 - 2 * units @ units.T).clamp(min=0), on_sphere).numpy(),
        labels=torch.tensor([*known.labels, *asked.labels])[rows].numpy(),
        is_test=(torch.tensor(rows) >= len(known.labels)).numpy(),
    )


def _spread(total: int, most: int) -> list[int]:
    """At most so many of 0..total-1, evenly spaced."""
    count = min(total, most)
    return [index * total // count for index in range(count)]


def run(
    tokenizer: Tokenizer,
    known: Labelled,
    asked: Labelled,
    *,
    side: int,
    seed: int,
    log: Callable[[str], None] = say,
) -> tuple[list[Outcome], list[Maps]]:
    """Measure and map every representation."""
    outcomes, maps = [], []
    for space in representations(tokenizer, known, asked, side, seed):
        outcomes.append(measure(space, known, asked))
        maps.append(maps_of(space, known, asked))
        log(f"{space.name}, {space.known.shape[1]} values: k = 5 {outcomes[-1].accuracy[5, True]}")
    return outcomes, maps


def main(arguments: Sequence[str]) -> int:
    """Run the study; returns the exit status."""
    given = _parser().parse_args(arguments)
    began = time.monotonic()
    torch.set_num_threads(given.threads)
    try:
        known, asked = (
            read_labelled(given.data / "images" / f"labelled_{part}.npz", given.count) for part in ("train", "test")
        )
        if known.names != asked.names:
            raise ValueError(f"{given.data}: the classes of the test pictures are not those of the training pictures")
        if len(set(known.labels)) < 2 or len(known.labels) < 4:
            raise ValueError(
                f"{len(known.labels)} training pictures of {len(set(known.labels))} classes; wanted 4 or more, of 2 "
                "or more"
            )
        tokenizer = Tokenizer.load(given.model, device=given.device, dtype=given.dtype)
        given.out.mkdir(parents=True, exist_ok=True)
        outcomes, maps = run(tokenizer, known, asked, side=given.side, seed=given.seed)
        line = command("geometry", arguments)
        most = max(asked.labels.count(label) for label in set(asked.labels))
        settings = {
            "model": model_line(tokenizer),
            "pictures": f"{len(known.labels)} to learn from, {len(asked.labels)} to name, {len(known.names)} classes, "
            f"{known.pictures.shape[1]} x {known.pictures.shape[2]} pixels, enlarged to {given.side} by a bicubic "
            "filter for the model",
            "naming the most frequent class of the test pictures always": f"{100 * most / len(asked.labels):.1f} %",
            "seed": f"{given.seed}, of the noise, the permutations and the bootstrap",
            "minutes": minutes_since(began),
            "command": f"`{line}`",
        }
        found = correlations(outcomes, given.seed)
        path = write_report(given.out, settings, outcomes, found, maps, known.names, given.seed)
        content: dict[str, Any] = {
            "model": {"name": tokenizer.name, "revision": tokenizer.revision},
            "settings": settings,
            "representations": [outcome.to_json() for outcome in outcomes],
            "rank_correlations": {name: value.to_json() for name, value in found.items()},
        }
        write_json(given.out, "geometry", line, given, content)
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report in {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m training.study geometry",
        description="Latent geometry against downstream accuracy; trains nothing.",
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder with images/labelled_train.npz and _test.npz"
    )
    parser.add_argument(
        "--side", type=at_least(SMALLEST), default=224, help="of the pictures as the model sees them, in pixels"
    )
    add_common(parser, "geometry")
    return parser
