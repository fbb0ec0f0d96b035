"""Zero-shot classes and retrieval by a protocol: shares with their 95 % intervals, and what they depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model import Tokenizer
from training.captioned import Captioned
from training.embeddings import embed_items
from training.eval_report import count_line, markdown, precision_line
from training.labelled import Labelled
from training.retrieval import Share, class_embeddings, retrieval, zero_shot
from training.text_tower import Texts
from training.word_protocols import WordProtocol

TOPS = {"top-1": 1, "top-5": 5}
RECALLS = {"R@1": 1, "R@5": 5, "R@10": 10}
NOUNS = {"image": "image", "video": "clip", "asset": "asset"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of figures. what: prompts or direction; count: how many were asked; among: how many there were to choose
    from; shares: by metric, without those that chance alone makes 100 %."""

    what: str
    count: int
    among: int
    shares: dict[str, Share]


def zero_shot_rows(
    tokenizer: Tokenizer,
    protocol: WordProtocol,
    items: Labelled,
    texts: Texts,
    prompts: Mapping[str, Sequence[str]],
) -> list[Row]:
    """A row a set of prompts; prompts: by what they are called."""
    images = embed_items(tokenizer, protocol, items.found)
    rows = []
    for called, sentences in prompts.items():
        classes = class_embeddings(items.names, sentences, texts.embed)
        among = len(items.names)
        shares = {name: zero_shot(images, classes, items.labels, k) for name, k in TOPS.items() if k < among}
        rows.append(Row(what=called, count=len(images), among=among, shares=shares))
    return rows


def retrieval_rows(tokenizer: Tokenizer, protocol: WordProtocol, items: Captioned, texts: Texts) -> list[Row]:
    """A row a direction: texts to items, items to texts."""
    images, said = embed_items(tokenizer, protocol, items.found), texts.embed(items.texts)
    found = {name: retrieval(images, said, items.owners, k) for name, k in RECALLS.items()}
    noun = NOUNS[items.found.kind]
    sides = ((f"text to {noun}", len(said), len(images)), (f"{noun} to text", len(images), len(said)))
    return [
        Row(
            what=what,
            count=count,
            among=among,
            shares={name: both[side] for name, both in found.items() if RECALLS[name] < among},
        )
        for side, (what, count, among) in enumerate(sides)
    ]


def word_conditions(
    tokenizer: Tokenizer, protocol: WordProtocol, items: Labelled | Captioned, texts: Texts
) -> list[str]:
    """All that the numbers depend on, in lines."""
    return [
        f"protocol {protocol.line(items.found.kind)}",
        count_line(items, len(items.found.paths), protocol.items),
        protocol.sources(),
        str(texts),
        f"in brackets the 95 % interval (Wilson); {precision_line(tokenizer)}",
    ]


def word_table(name: str, protocol: WordProtocol, rows: Sequence[Row]) -> list[str]:
    """A markdown table."""
    metrics, what = (TOPS, "prompts") if protocol.task == "zero-shot" else (RECALLS, "direction")
    head = ["model", "protocol", what, "n", "among", *metrics]
    return markdown(
        head,
        [
            [name, protocol.name, row.what, f"{row.count:,}", f"{row.among:,}"]
            + [_cell(row.shares.get(metric)) for metric in metrics]
            for row in rows
        ],
    )


def word_record(
    tokenizer: Tokenizer,
    protocol: WordProtocol,
    items: Labelled | Captioned,
    rows: Sequence[Row],
    lines: Sequence[str],
) -> dict[str, Any]:
    """Everything as JSON values; shares and intervals are 0..1."""
    return {
        "model": tokenizer.name,
        "revision": tokenizer.revision,
        "protocol": {
            field: getattr(protocol, field)
            for field in ("name", "task", "side", "filter", "frames", "split", "texts", "items")
        },
        "kind": items.found.kind,
        "files_found": items.found.total,
        "conditions": list(lines),
        "results": [
            {
                "what": row.what,
                "count": row.count,
                "among": row.among,
                "values": {
                    name: {"value": share.value, "interval": share.interval, "right": share.right}
                    for name, share in row.shares.items()
                },
            }
            for row in rows
        ],
    }


def _cell(share: Share | None) -> str:
    if share is None:
        return "-"
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"
