"""Does an item's result depend on what shares its batch? Alone against 20 random mixes, bundled models, real files.

    python -m tests.bench.batch_independence [--mixes 20] [--batch-invariant]

Prints how long the batch-invariant mode takes beside the usual one, in turns, and, for each model, the worst row-wise
relative error of the latents, features and embeddings, how many codes differ and how far those entries are from a
rounding boundary, and how many pixel values differ by how much.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from media.types import Image, Item, Tokens, Video
from model import Tokenizer, fsq
from model.experts import DigitExperts
from model.packed import pack, plan_windows
from model.patchify import coords_of, layout_of, patchify
from model.verify import rowwise_error
from tests.paths import ROOT


@dataclass
class Figures:
    """What was seen; margins are in units of the quantised value, one per differing code."""

    errors: dict[str, float] = field(default_factory=dict)
    codes: int = 0
    codes_differing: int = 0
    largest_margin: float = 0.0
    pixels: int = 0
    pixels_differing: int = 0
    largest_difference: int = 0

    def note(self, name: str, error: float) -> None:
        """Keep the worst."""
        self.errors[name] = max(error, self.errors.get(name, 0.0))


def measure(tokenizer: Tokenizer, items: Sequence[Item], mixes: int, seed: int = 0) -> Figures:
    """Encode and decode each item alone and in `mixes` random selections in random order."""
    figures = Figures()
    outputs = set(tokenizer.outputs) - {"latents"} if "codes" in tokenizer.outputs else set(tokenizer.outputs)
    alone = [tokenizer.encode([item], outputs)[0] for item in items]
    pictures = [_pixels(tokenizer.decode([tokens])[0]) for tokens in alone]
    rng = np.random.default_rng(seed)
    for _ in range(mixes):
        order = rng.permutation(len(items))[: rng.integers(2, len(items) + 1)]
        encoded = tokenizer.encode([items[i] for i in order], outputs)
        for i, tokens in zip(order, encoded, strict=True):
            _compare_tokens(figures, tokenizer, items[i], tokens, alone[i])
        # Both decode the same tokens, so that what is measured here is the decoder's own dependence.
        for i, item in zip(order, tokenizer.decode([alone[i] for i in order]), strict=True):
            difference = np.abs(_pixels(item).astype(np.int16) - pictures[i])
            figures.pixels += difference.size
            figures.pixels_differing += int((difference > 0).sum())
            figures.largest_difference = max(figures.largest_difference, int(difference.max()))
    return figures


def _compare_tokens(figures: Figures, tokenizer: Tokenizer, item: Item, got: Tokens, want: Tokens) -> None:
    for name in ("latents", "features", "embedding"):
        a, b = getattr(got, name), getattr(want, name)
        if b is not None:
            figures.note(name, rowwise_error(np.atleast_2d(a), np.atleast_2d(b)))
    if want.codes is not None and got.codes is not None:
        differing = got.codes != want.codes
        figures.codes += differing.size
        figures.codes_differing += int(differing.sum())
        if differing.any():
            margins = boundary_margins(tokenizer, item)[differing]
            figures.largest_margin = max(figures.largest_margin, float(margins.max()))


@torch.inference_mode()
def boundary_margins(tokenizer: Tokenizer, item: Item) -> np.ndarray:
    """How far the nearest of a code's channels is from where it would round differently: float [n, K].

    In units of the value that is quantised: z, or for a model with digits the coefficient in cells.
    """
    net, config = tokenizer.net, tokenizer.config
    layout = layout_of(item, config)
    coords = torch.from_numpy(coords_of(item, layout))
    spans = plan_windows(coords, 0, config.window)
    feats = patchify(item, layout, config, device=tokenizer.device)
    parts = [slice(span.start, span.stop) for span in spans]
    moving = layout.kind == "video"
    places = coords.to(tokenizer.device)
    packed = pack(spans, [feats[p] for p in parts], [places[p] for p in parts], [moving] * len(spans), config.window)
    mean, _ = net.posterior(net.encode(packed), packed)
    if net.linear_path is None:
        distance = (mean[..., None] - mean.new_tensor(fsq.THRESHOLDS)).abs().amin(-1)
    else:
        experts = net.linear_path.of_kind(moving)[1]
        assert isinstance(experts, DigitExperts)
        chosen = experts.choice(mean)
        cells = mean[:, : experts.coefficients] / experts.step[chosen]
        # Every channel that is a digit of a coefficient may change where that coefficient crosses a cell's edge. The
        # marks change where two experts are equally good: how far that is away is not looked at.
        edge = (cells - cells.floor() - 0.5).abs().gather(1, experts.component[chosen].long())
        distance = torch.cat([edge, edge.new_ones(len(edge), experts.marks)], dim=1)
    return distance.unflatten(-1, (config.codebooks, -1)).amin(-1).cpu().numpy()


def cost(name: str, items: Sequence[Item], rounds: int = 7) -> tuple[float, float]:
    """How many times as long the batch-invariant mode encodes and decodes; median over rounds of both in turn."""
    modes = [Tokenizer.load(name, device="cpu", batch_invariant=fixed) for fixed in (False, True)]
    tokens = [mode.encode(items) for mode in modes]
    ratios: list[list[float]] = [[], []]
    for _ in range(rounds):
        for row, works in zip(
            ratios,
            (
                [lambda m=mode: m.encode(items) for mode in modes],
                [lambda m=mode, t=each: m.decode(t) for mode, each in zip(modes, tokens, strict=True)],
            ),
            strict=True,
        ):
            usual, fixed = (_seconds(work) for work in works)
            row.append(fixed / usual)
    return float(np.median(ratios[0])), float(np.median(ratios[1]))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def real_items() -> list[Item]:
    """Crops of the example picture and clip, of many sizes."""
    from media.image import decode_image
    from media.limits import Limits
    from media.video import decode_video

    photo = decode_image((ROOT / "examples/photo.jpg").read_bytes(), Limits()).pixels
    clip = decode_video((ROOT / "examples/clip.mp4").read_bytes(), Limits()).frames
    sizes = [(16, 16), (1, 1), (17, 31), (64, 320), (256, 256), (100, 90), (400, 600)]
    items: list[Item] = [Image(pixels=photo[:h, :w]) for h, w in sizes]
    return [
        *items,
        *(Video(frames=clip[:t, :h, :w], fps=24.0) for t, h, w in [(3, 50, 40), (24, 96, 80), (17, 64, 64)]),
    ]


def _pixels(item: Item) -> np.ndarray:
    assert not hasattr(item, "feats")
    return item.pixels if isinstance(item, Image) else item.frames  # type: ignore[union-attr]


def main() -> None:
    """Print a few lines for each bundled model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixes", type=int, default=20)
    parser.add_argument("--batch-invariant", action="store_true")
    args = parser.parse_args()
    for name in ("tiny-continuous", "tiny-discrete"):
        encode, decode = cost(name, real_items())
        print(f"{name}: batch-invariant mode takes {encode:.2f} times as long to encode, {decode:.2f} to decode")
        tokenizer = Tokenizer.load(name, device="cpu", batch_invariant=args.batch_invariant)
        figures = measure(tokenizer, real_items(), args.mixes)
        print(f"{name}: " + ", ".join(f"{key} {error:.1e}" for key, error in figures.errors.items()))
        if figures.codes:
            print(
                f"  codes differing {figures.codes_differing} of {figures.codes}, "
                f"at most {figures.largest_margin:.1e} from a rounding boundary"
            )
        print(
            f"  pixel values differing {figures.pixels_differing} of {figures.pixels} "
            f"({figures.pixels_differing / figures.pixels:.1e}), by at most {figures.largest_difference}"
        )


if __name__ == "__main__":
    main()
