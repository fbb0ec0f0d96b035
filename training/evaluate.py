"""Figures of a model: `python -m training.evaluate MODEL [--protocol NAME] --data DIR`.

Without a protocol: the small models beside PCA and JPEG on the held-out split. With one: a row of its published table
and, under it, everything that the row depends on. A metric whose network is not given is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from model import Tokenizer
from model.errors import ModelError
from model.splat_decoder import SplatDecoder
from training.captioned import caption_items
from training.eval_items import SUFFIXES, find_items
from training.eval_report import conditions, record, table
from training.evaluation import evaluate
from training.feature_nets import load_networks
from training.held_out import held_out_lines
from training.labelled import label_items
from training.prompts import PROMPTS, get_prompts
from training.protocols import FILTERS, PROTOCOLS, Protocol
from training.text_tower import TextTower
from training.token_stats import sidecar_name
from training.word_figures import retrieval_rows, word_conditions, word_record, word_table, zero_shot_rows
from training.word_protocols import WORD_PROTOCOLS, WordProtocol

DATA = Path("../shared/data")
SIDE = 256
RUN = {"kind", "filter", "limit", "device", "dtype", "output"}
OPTIONS = {
    "held-out": {"split", "side"},
    "reconstruction": RUN | {"inception", "i3d", "lpips_vgg", "lpips_heads", "splats", "frames_as_images"},
    "zero-shot": RUN | {"side", "text_tower", "classnames", "prompts"},
    "retrieval": RUN | {"side", "text_tower", "captions"},
}
"""What may be given with which task, beside model, protocol and data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print figures; returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        lines = _run(given)
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _run(given: argparse.Namespace) -> list[str]:
    protocol = _protocol(given)
    task = "held-out" if protocol is None else protocol.task if isinstance(protocol, WordProtocol) else "reconstruction"
    for name in sorted(set().union(*OPTIONS.values()) - OPTIONS[task]):
        if getattr(given, name) is not None:
            where = given.protocol or "a run without --protocol"
            raise ValueError(f"--{name.replace('_', '-')} is no option of {where}")
    if protocol is None:
        tokenizer = Tokenizer.load(given.model, device="cpu", dtype="float32")
        side = SIDE if given.side is None else given.side
        return held_out_lines(tokenizer, given.data or DATA, split=given.split or "eval", side=side)
    if given.data is None:
        raise ValueError(f"{protocol.name} wants --data DIR")
    return _words(given, protocol) if isinstance(protocol, WordProtocol) else _reconstruction(given, protocol)


def _protocol(given: argparse.Namespace) -> Protocol | WordProtocol | None:
    """The preset with what the options change of it."""
    if given.protocol is None:
        return None
    known: Mapping[str, Protocol | WordProtocol] = {**PROTOCOLS, **WORD_PROTOCOLS}
    if given.protocol not in known:
        raise ValueError(f"protocol {given.protocol!r}; there are {', '.join(known)}")
    protocol = known[given.protocol]
    if given.filter:
        protocol = replace(protocol, filter=given.filter)
    if given.side is not None and isinstance(protocol, WordProtocol):
        protocol = replace(protocol, side=given.side)
    if given.kind and protocol.kind not in (None, given.kind):
        raise ValueError(f"{protocol.name} is a protocol of kind {protocol.kind}, not {given.kind}")
    return protocol


def _reconstruction(given: argparse.Namespace, protocol: Protocol) -> list[str]:
    found = find_items(given.data, protocol.kind or given.kind, given.limit)
    tokenizer = Tokenizer.load(given.model, device=given.device, dtype=given.dtype)
    networks = load_networks(
        inception=given.inception,
        i3d=given.i3d,
        vgg=given.lpips_vgg,
        heads=given.lpips_heads,
        device=tokenizer.device,
    )
    splats = None
    if found.kind == "asset":
        splats = SplatDecoder.load(given.splats or "tiny-splats", device=tokenizer.device)
    results = evaluate(
        tokenizer, protocol, found, networks, frames_as_images=bool(given.frames_as_images), splats=splats
    )
    lines = conditions(tokenizer, protocol, found, networks, results)
    if splats is not None:
        lines.append(f"drawn through the Gaussian decoder {splats.name}, weights {splats.revision[:12]}")
    name = _signature(tokenizer)
    printed = _printed(table(name, protocol, found, results), lines)
    if given.output is not None:
        _write(given.output, record(tokenizer, protocol, found, networks, results, lines))
        latents = results[0].stats.latents
        if latents.count > 1:
            place = given.output.parent / sidecar_name(given.model)
            _write(place, results[0].stats.latents_record(name, lines[0]))
            printed.append(f"- mean and deviation of the {len(latents.mean)} latent channels: {place}")
    return printed


def _words(given: argparse.Namespace, protocol: WordProtocol) -> list[str]:
    kind = protocol.kind or given.kind
    if protocol.task == "zero-shot":
        chosen = given.prompts or "clip"
        # Next to any set the one sentence: figures of both are published.
        prompts = {f"{name} ({len(get_prompts(name))})": get_prompts(name) for name in dict.fromkeys((chosen, "plain"))}
        labelled = label_items(find_items(given.data, kind, given.limit), given.data, given.classnames)
        tokenizer, tower = _towers(given)
        rows = zero_shot_rows(tokenizer, protocol, labelled, tower, prompts)
        lines = word_conditions(tokenizer, protocol, labelled, tower)
        document = word_record(tokenizer, protocol, labelled, rows, lines)
    else:
        captioned = caption_items(
            given.data, kind, given.captions, split=protocol.split, texts=protocol.texts, limit=given.limit
        )
        tokenizer, tower = _towers(given)
        rows = retrieval_rows(tokenizer, protocol, captioned, tower)
        lines = word_conditions(tokenizer, protocol, captioned, tower)
        document = word_record(tokenizer, protocol, captioned, rows, lines)
    if given.output is not None:
        _write(given.output, document)
    return _printed(word_table(_signature(tokenizer), protocol, rows), lines)


def _towers(given: argparse.Namespace) -> tuple[Tokenizer, TextTower]:
    tokenizer = Tokenizer.load(given.model, device=given.device, dtype=given.dtype)
    return tokenizer, TextTower(given.text_tower, tokenizer.config.encoder.width, tokenizer.device)


def _signature(tokenizer: Tokenizer) -> str:
    return f"{tokenizer.name} {tokenizer.revision[:12]}"


def _printed(rows: Sequence[str], lines: Sequence[str]) -> list[str]:
    return [*rows, "", *(f"- {line}" for line in lines)]


def _write(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description="Figures of a model.")
    parser.add_argument("model", help="bundled name or weights file")
    parser.add_argument(
        "--protocol", metavar="NAME", help=f"{', '.join([*PROTOCOLS, *WORD_PROTOCOLS])}; none: the held-out split"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help=f"folder, with its subfolders; without a protocol {DATA}"
    )
    group = parser.add_argument_group("without a protocol")
    group.add_argument("--split", choices=("eval", "validation"), help="default eval")
    group.add_argument(
        "--side", type=int, help=f"pixels of the centre crop ({SIDE}); with words, of the resized square"
    )
    group = parser.add_argument_group("with any protocol")
    group.add_argument("--kind", choices=tuple(SUFFIXES), help="of the files, where a folder holds several")
    group.add_argument("--filter", choices=tuple(FILTERS), help="of the resize, instead of the protocol's")
    group.add_argument("--limit", type=int, metavar="N", help="so many items, evenly spaced")
    group.add_argument("--device", help="default: the GPU if there is one")
    group.add_argument("--dtype", help="float32, bfloat16 or float16; default as Tokenizer.load")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write everything; a continuous model's latents go beside it (MODEL.latents.json)",
    )
    group = parser.add_argument_group("reconstruction")
    group.add_argument("--inception", type=Path, metavar="FILE", help="rFID: inception-2015-12-05.pt")
    group.add_argument("--i3d", type=Path, metavar="FILE", help="rFVD: i3d_torchscript.pt")
    group.add_argument("--lpips-vgg", type=Path, metavar="FILE", help="LPIPS: torchvision's VGG16")
    group.add_argument("--lpips-heads", type=Path, metavar="FILE", help="LPIPS: published heads of VGG")
    group.add_argument("--splats", help="Gaussian decoder of 3D, bundled name (tiny-splats) or weights file")
    group.add_argument(
        "--frames-as-images", action="store_true", default=None, help="code the frames of clips as images too"
    )
    group = parser.add_argument_group("zero-shot and retrieval")
    group.add_argument("--text-tower", type=Path, metavar="DIR", help="folder of SigLIP 2, whose text tower is used")
    group.add_argument("--classnames", type=Path, metavar="FILE", help="what class folders stand for (zero-shot)")
    group.add_argument(
        "--prompts", metavar="SET", help=f"{', '.join(PROMPTS)} or a file with a prompt a line (zero-shot; clip)"
    )
    group.add_argument("--captions", type=Path, metavar="FILE", help="texts, where not DIR/captions.json (retrieval)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
