"""What a reconstruction protocol prints and writes: a row of a table, everything that it depends on, all as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from model import Tokenizer
from training.eval_items import Found
from training.feature_nets import Networks
from training.protocols import Protocol
from training.tally import METRICS, Result

DIGITS = {"PSNR": 2, "SSIM": 4, "LPIPS": 4, "rFID": 3, "rFVD": 2}


def conditions(
    tokenizer: Tokenizer, protocol: Protocol, found: Found, networks: Networks, results: Sequence[Result]
) -> list[str]:
    """All that the numbers depend on, in lines."""
    lines = [f"protocol {protocol.line(found.kind)}"]
    count = count_line(found, len(found.paths), protocol.items)
    if found.kind == "video":
        fewest, most = results[0].lengths
        count += f"; clips of {fewest} to {most} frames" if fewest < most else f"; clips of {most} frames"
    lines.append(count)
    lines.append(protocol.sources())
    what = "posterior means" if tokenizer.config.bottleneck == "gaussian" else "codes"
    lines.append(f"decoded from {what}; {precision_line(tokenizer)}")
    lines += networks.notes
    for result in results:
        missing = {name: why for name, why in result.missing.items() if result is results[0] or name == "rFVD"}
        lines += [f"left out: {name}: {why}" for name, why in missing.items()]
        lines += [f"{name} of {result.coding}: {why}" for name, why in result.warnings.items()]
        if (codes := result.stats.codes) is not None:
            used = ", ".join(f"{100 * share:.1f} %" for share in codes.used)
            perplexity = ", ".join(f"{value:.0f}" for value in codes.perplexity)
            size = tokenizer.config.codebook_size
            lines.append(
                f"codes of {result.coding}, by codebook, of {size:,}, over {result.tokens:,} tokens: "
                f"used {used}; perplexity {perplexity}"
            )
    return list(dict.fromkeys(lines))


def table(name: str, protocol: Protocol, found: Found, results: Sequence[Result]) -> list[str]:
    """A markdown table, one row a coding."""
    metrics = METRICS[found.kind]
    head = ["model", "protocol", "coded as", "n", "tokens", *metrics]
    rows = []
    for result in results:
        cells = [name, protocol.name, result.coding, f"{result.items:,}", f"{result.tokens:,}"]
        rows.append([*cells, *(_cell(result, metric) for metric in metrics)])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def count_line(found: object, count: int, published: int | None) -> str:
    """How many items there are; published: how many there should be."""
    other = published is not None and count != published
    return f"{found}; the published set has {published:,}: not comparable with the table" if other else str(found)


def precision_line(tokenizer: Tokenizer) -> str:
    """What the numbers were computed in."""
    dtype = str(tokenizer.dtype).removeprefix("torch.")
    return f"{dtype} on {tokenizer.device.type}, torch {torch.__version__}"


def record(
    tokenizer: Tokenizer,
    protocol: Protocol,
    found: Found,
    networks: Networks,
    results: Sequence[Result],
    lines: Sequence[str],
) -> dict[str, Any]:
    """Everything as JSON values; a PSNR of equal pictures is the text "inf"."""
    return {
        "model": tokenizer.name,
        "revision": tokenizer.revision,
        "protocol": {
            field: getattr(protocol, field)
            for field in ("name", "short_side", "enlarge", "filter", "crop", "frames", "views", "side", "items")
        },
        "kind": found.kind,
        "files_found": found.total,
        "conditions": list(lines),
        "networks": list(networks.notes),
        "results": [
            {
                "coding": result.coding,
                "items": result.items,
                "frames": result.frames,
                "tokens": result.tokens,
                "values": {name: _json(value) for name, value in result.values.items()},
                "frechet_parts": {
                    name: {"mean": mean, "covariance": covariance} for name, (mean, covariance) in result.parts.items()
                },
                "left_out": result.missing,
                "warnings": result.warnings,
                "codebooks": None
                if (codes := result.stats.codes) is None
                else {"used": codes.used, "perplexity": codes.perplexity},
            }
            for result in results
        ],
    }


def _cell(result: Result, metric: str) -> str:
    if metric not in result.values:
        return "-"
    value = f"{result.values[metric]:.{DIGITS[metric]}f}"
    if metric not in result.parts:
        return value
    mean, covariance = (f"{part:.{DIGITS[metric]}f}" for part in result.parts[metric])
    return f"{value} (mean {mean} + covariance {covariance})" + (" *" if metric in result.warnings else "")


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
