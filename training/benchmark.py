"""Figures by a published protocol: `python -m training.benchmark MODEL --protocol imagenet-256 --data DIR`.

Prints a row of a table and, under it, everything that the row depends on. A metric whose network is not given is left
out and said so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model import Tokenizer
from model.errors import ModelError
from model.splat_decoder import SplatDecoder
from training.eval_items import SUFFIXES, Found, find_items
from training.evaluation import evaluate
from training.feature_nets import Networks, load_networks
from training.protocols import FILTERS, PROTOCOLS, Protocol
from training.tally import METRICS, Result

DIGITS = {"PSNR": 2, "SSIM": 4, "LPIPS": 4, "rFID": 3, "rFVD": 2}
LATENTS = "latents.json"


def conditions(
    tokenizer: Tokenizer, protocol: Protocol, found: Found, networks: Networks, results: Sequence[Result]
) -> list[str]:
    """All that the numbers depend on, in lines."""
    lines = [f"protocol {protocol.line(found.kind)}"]
    count = str(found)
    if protocol.items is not None and len(found.paths) != protocol.items:
        count += f"; the published set has {protocol.items:,}: not comparable with the table"
    if found.kind == "video":
        fewest, most = results[0].lengths
        count += f"; clips of {fewest} to {most} frames" if fewest < most else f"; clips of {most} frames"
    lines.append(count)
    lines.append(protocol.sources())
    what = "posterior means" if tokenizer.config.bottleneck == "gaussian" else "codes"
    dtype = str(tokenizer.dtype).removeprefix("torch.")
    lines.append(f"decoded from {what}; {dtype} on {tokenizer.device.type}, torch {torch.__version__}")
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
    return [_row(head), _row(["---"] * len(head)), *(_row(row) for row in rows)]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the row and its conditions; returns the exit status."""
    given = _parser().parse_args(arguments)
    protocol = PROTOCOLS[given.protocol]
    try:
        if given.filter:
            protocol = replace(protocol, filter=given.filter)
        if given.kind and protocol.kind not in (None, given.kind):
            raise ValueError(f"{protocol.name} is a protocol of kind {protocol.kind}, not {given.kind}")
        found = find_items(given.data, protocol.kind or given.kind, given.limit)
        tokenizer = Tokenizer.load(given.model, device=given.device, dtype=given.dtype)
        networks = load_networks(
            inception=given.inception,
            i3d=given.i3d,
            vgg=given.lpips_vgg,
            heads=given.lpips_heads,
            device=tokenizer.device,
        )
        splats = SplatDecoder.load(given.splats, device=tokenizer.device) if found.kind == "asset" else None
        results = evaluate(tokenizer, protocol, found, networks, frames_as_images=given.frames_as_images, splats=splats)
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = conditions(tokenizer, protocol, found, networks, results)
    if splats is not None:
        lines.append(f"drawn through the Gaussian decoder {splats.name}, weights {splats.revision[:12]}")
    name = f"{tokenizer.name} {tokenizer.revision[:12]}"
    print("\n".join(table(name, protocol, found, results)))
    print()
    print("\n".join(f"- {line}" for line in lines))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        document = record(tokenizer, protocol, found, networks, results, lines)
        _write(given.output, document)
        stats = results[0].stats
        if stats.latents.count > 1:
            place = given.output.parent / LATENTS
            _write(place, stats.latents_record(name, lines[0]))
            print(f"- mean and deviation of the {len(stats.latents.mean)} latent channels: {place}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark", description="Figures by a protocol.")
    parser.add_argument("model", help="bundled name or weights file")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder, with its subfolders; folders of frames are clips"
    )
    parser.add_argument("--kind", choices=tuple(SUFFIXES), help="of the files, where a folder holds several (plain)")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="rFID: inception-2015-12-05.pt")
    parser.add_argument("--i3d", type=Path, metavar="FILE", help="rFVD: i3d_torchscript.pt")
    parser.add_argument("--lpips-vgg", type=Path, metavar="FILE", help="LPIPS: torchvision's VGG16")
    parser.add_argument("--lpips-heads", type=Path, metavar="FILE", help="LPIPS: published heads of VGG")
    parser.add_argument("--splats", default="tiny-splats", help="Gaussian decoder, bundled name or weights file (3D)")
    parser.add_argument("--frames-as-images", action="store_true", help="code the frames of clips as images too")
    parser.add_argument("--filter", choices=tuple(FILTERS), help="of the resize, instead of the protocol's")
    parser.add_argument("--limit", type=int, metavar="N", help="so many items, evenly spaced")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default as Tokenizer.load")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help=f"write everything; {LATENTS} goes beside it (continuous)"
    )
    return parser


def _cell(result: Result, metric: str) -> str:
    if metric not in result.values:
        return "-"
    value = f"{result.values[metric]:.{DIGITS[metric]}f}"
    if metric not in result.parts:
        return value
    mean, covariance = (f"{part:.{DIGITS[metric]}f}" for part in result.parts[metric])
    return f"{value} (mean {mean} + covariance {covariance})" + (" *" if metric in result.warnings else "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
