"""What a worker must pass before it takes work: a stored pattern through the whole model and back, twice."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from media.types import Image, Tokens, UInt8Array, Video
from model import Tokenizer

# The same values from two passes with other neighbours. bfloat16 has 8 bits of mantissa, float16 has 11.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
CODES_EQUAL = 0.99
"""Share of codes that must be equal; a value on a rounding boundary may fall to either side."""


TIMINGS, TIMINGS_S = 3, 1.0
"""At most so many of each direction, and no more after so many seconds."""


class SelfTestError(Exception):
    """The model does not work on this device."""


@dataclass(frozen=True)
class Measured:
    """Tokens of the timed picture and the seconds that each direction took: a first estimate of the speed."""

    tokens: int
    encode_s: float
    decode_s: float


def run_selftest(tokenizer: Tokenizer, timed_tokens: int) -> Measured:
    """Encode and decode a small picture and a clip; raise SelfTestError if the model's answers cannot be right.

    Checked: finite values, exact sizes, and that the picture alone and beside the clip gives the same tokens.
    Then a picture of at least timed_tokens tokens is encoded and decoded against the clock.
    """
    picture, clip = Image(pixels=pattern(40, 56)), Video(frames=np.stack([pattern(24, 24, t) for t in range(5)]))
    wanted = {"codes" if "codes" in tokenizer.outputs else "latents", "embedding"}
    alone = tokenizer.encode([picture], wanted)[0]
    first, second = tokenizer.encode([clip, picture], wanted)[1], tokenizer.encode([clip], wanted)[0]
    for tokens in (alone, first, second):
        _check_finite(tokenizer, tokens)
    _check_same(tokenizer, alone, first)
    back = tokenizer.decode([alone, second])
    if not isinstance(back[0], Image) or back[0].pixels.shape != picture.pixels.shape:
        raise SelfTestError(f"{tokenizer.name}: a picture came back with another size")
    if not isinstance(back[1], Video) or back[1].frames.shape != clip.frames.shape:
        raise SelfTestError(f"{tokenizer.name}: a clip came back with another size")

    side = max(1, math.ceil(timed_tokens**0.5))
    timed = Image(pixels=pattern(16 * side, 16 * side))
    encode_s: list[float] = []
    decode_s: list[float] = []
    # The best of a few: one that the machine held up would refuse long items as hopeless. Large models take too long.
    while len(encode_s) < TIMINGS and sum(encode_s) + sum(decode_s) < TIMINGS_S:
        begin = time.perf_counter()
        encoded = tokenizer.encode([timed], wanted)
        between = time.perf_counter()
        tokenizer.decode(encoded)
        encode_s.append(between - begin)
        decode_s.append(time.perf_counter() - between)
    return Measured(tokens=side**2, encode_s=min(encode_s), decode_s=min(decode_s))


def pattern(height: int, width: int, frame: int = 0) -> UInt8Array:
    """Smooth waves in three colours that move with the frame: uint8 [height, width, 3]."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(rows / (5 + c) + frame / 3) + np.cos(columns / (7 - c) - frame / 4) for c in range(3)]
    return np.asarray(np.clip(np.stack(waves, axis=-1) * 60 + 128, 0, 255), np.uint8)


def _check_finite(tokenizer: Tokenizer, tokens: Tokens) -> None:
    for name in ("latents", "embedding"):
        values: npt.NDArray[np.floating] | None = getattr(tokens, name)
        if values is not None and not np.isfinite(values).all():
            raise SelfTestError(f"{tokenizer.name}: {name} that are not finite; try --dtype float32")


def _check_same(tokenizer: Tokenizer, alone: Tokens, packed: Tokens) -> None:
    if alone.codes is not None and packed.codes is not None:
        share = float((alone.codes == packed.codes).mean())
        if share < CODES_EQUAL:
            raise SelfTestError(f"{tokenizer.name}: only {share:.1%} of the codes are the same beside a neighbour")
    if alone.latents is not None and packed.latents is not None:
        worst = float(np.abs(alone.latents - packed.latents).max() / max(float(np.abs(alone.latents).max()), 1e-12))
        allowed = TOLERANCE[str(tokenizer.dtype).removeprefix("torch.")]
        if worst > allowed:
            raise SelfTestError(
                f"{tokenizer.name}: latents differ by {worst:.1e} beside a neighbour; allowed {allowed}"
            )
