"""What the studies that train nothing share: a mean with Student's interval, one-line refusals, report.json."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from model import Tokenizer
from training.run_folder import environment
from training.study_report import QUANTILES, mean_and_error


@dataclass(frozen=True)
class Mean:
    """A mean of `count` values; half: half of its 95 % interval, NaN for fewer than two values."""

    value: float
    half: float
    count: int

    def text(self, digits: int = 2, *, sign: bool = False) -> str:
        """`1.25 (0.95 to 1.55)`; sign: with a plus before what is above 0."""
        if not math.isfinite(self.value):
            return "-"
        form = f"{'+' if sign else ''}.{digits}f"
        if math.isnan(self.half):
            return f"{self.value:{form}}"
        return f"{self.value:{form}} ({self.value - self.half:{form}} to {self.value + self.half:{form}})"

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values; None for what is not known."""
        return {"mean": finite(self.value), "half_interval": finite(self.half), "count": self.count}


def student_quantile(freedom: int) -> float:
    """Student's t at 97.5 %. Beyond the table by its expansion around the normal, right to 1e-3 there.

    Source: Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= len(QUANTILES):
        return QUANTILES[freedom - 1]
    z, n = 1.959964, freedom
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) + third


def mean_of(values: Sequence[float]) -> Mean:
    """Mean of the finite values with Student's interval; NaN where there is none."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    mean, error = mean_and_error(known)
    half = student_quantile(len(known) - 1) * error if len(known) > 1 else math.nan
    return Mean(mean, half, len(known))


class Parser(argparse.ArgumentParser):
    """Refuses in one line, with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the line and leave."""
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)


def at_least(least: int) -> Callable[[str], int]:
    """Type of an option: a whole number from `least` on."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}; wanted a whole number, {least} or more")
        return value

    return whole


def add_common(parser: argparse.ArgumentParser, name: str, count: int | None = None) -> None:
    """The options that both kinds of question have. name: of the study; count: items without --count, None for all."""
    parser.add_argument("--model", default="tiny-continuous", help="bundled name or weights file, as atoken takes it")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"study-{name}", help="folder of the report")
    parser.add_argument(
        "--count",
        type=at_least(1),
        default=count,
        metavar="N",
        help=f"so many items, evenly spaced, at most all; default {count or 'all'}",
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default as Tokenizer.load")
    parser.add_argument("--threads", type=at_least(1), default=1)


def command(name: str, arguments: Sequence[str]) -> str:
    """What a reader types to get the report again."""
    return shlex.join(["python", "-m", "training.study", name, *arguments])


def model_line(tokenizer: Tokenizer) -> str:
    """Which weights, in which numbers, where."""
    dtype = str(tokenizer.dtype).removeprefix("torch.")
    return f"{tokenizer.name}, weights {tokenizer.revision[:12]}, {dtype} on {tokenizer.device.type}"


def say(line: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(line, flush=True)


def minutes_since(began: float) -> str:
    """Minutes of time.monotonic() that have gone by."""
    return f"{(time.monotonic() - began) / 60:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def finite(value: float) -> float | None:
    """None for NaN and infinity, which JSON has no word for."""
    return value if math.isfinite(value) else None


def write_json(folder: Path, name: str, line: str, given: argparse.Namespace, content: Mapping[str, Any]) -> Path:
    """Write report.json: the study, its arguments and seed, the machine, then the content. line: the command."""
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()}
    document = {
        "study": name,
        "command": line,
        "arguments": arguments,
        "seeds": [given.seed],
        # sys.argv would name folders of this machine.
        "environment": {**environment(1), "command": line},
        **content,
    }
    path = folder / "report.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path
