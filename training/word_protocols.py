"""How pictures, clips and assets are compared with words: one preset a published table, as in protocols.py.

Source: facts-training 7, 8 and 9; paper tables 3, 5 and 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.protocols import FILTERS, Kind

Task = Literal["zero-shot", "retrieval"]
PATCH = 16


@dataclass(frozen=True, kw_only=True)
class WordProtocol:
    """What an embedding is made of, and how many items there should be.

    kind: None is whatever the folder holds. table: of the paper. items: of the whole set. side: pixels of the square
    that a picture or frame is resized to, its aspect not kept. frames: most of a clip. split: of a captions file that
    holds several. texts: most of an item, the first of them; None: all. known, ours: as in protocols.Protocol.
    """

    name: str
    task: Task
    kind: Kind | None
    table: str = ""
    items: int | None = None
    side: int = 256
    filter: str = "bilinear"
    frames: int = 16
    split: str | None = None
    texts: int | None = None
    known: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse sizes that would be padded, and filters that are not there."""
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r}; there are {', '.join(FILTERS)}")
        if self.side < PATCH or self.side % PATCH:
            raise ValueError(f"side {self.side}; wanted a multiple of {PATCH} pixels")

    def line(self, kind: Kind) -> str:
        """What has to stand beside every number of it; kind: of the items."""
        parts = []
        if kind != "asset":
            size = f"{self.side} x {self.side} px (Pillow {self.filter}, antialias, aspect not kept)"
            parts.append(f"{'frames' if kind == 'video' else 'pictures'} resized to {size}")
        if kind == "video":
            parts.append(f"mean of the embeddings of up to {self.frames} frames, evenly spaced, each as an image")
        elif kind == "asset":
            parts.append("embedding of the voxels")
        if self.task == "zero-shot":
            parts.append("a class is the mean of the unit embeddings of its prompts")
        else:
            parts.append(f"{'all' if self.texts is None else f'the first {self.texts}'} texts of an item")
        parts.append("texts cleaned, in lower case, without punctuation, 64 ids; cosine")
        return f"{self.name}: " + "; ".join(parts)

    def sources(self) -> str:
        """What is known of the published table and what is our choice."""
        known = f"known of the paper's {self.table}: {'; '.join(self.known)}. " if self.table else ""
        return f"{known}our choice: {'; '.join(self.ours)}."


_SQUARES = "squares of 256, 384 or 512 px"
_FRAMES = ("mean of the embeddings of frames", "224 px")
_OUR_FRAMES = "16 frames from the middles of equal parts, unit embeddings before the mean"
_OUR_PROMPTS = ("prompts", "the first of several names of a class")

WORD_PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        WordProtocol(
            name="imagenet-zero-shot",
            task="zero-shot",
            kind="image",
            table="table 5, ImageNet-1k",
            items=50_000,
            known=("validation set", _SQUARES),
            ours=(*_OUR_PROMPTS, "filter"),
        ),
        WordProtocol(
            name="imagenet-v2-zero-shot",
            task="zero-shot",
            kind="image",
            table="table 5, ImageNet-v2",
            items=10_000,
            known=(_SQUARES,),
            ours=("the 10,000 of matched frequency", *_OUR_PROMPTS, "filter"),
        ),
        WordProtocol(
            name="toys4k-zero-shot",
            task="zero-shot",
            kind="asset",
            table="table 3, Toys4k",
            known=("classes of the set",),
            ours=("which objects", *_OUR_PROMPTS),
        ),
        WordProtocol(
            name="coco-retrieval",
            task="retrieval",
            kind="image",
            table="table 5, COCO",
            items=5_000,
            split="test",
            texts=5,
            known=(_SQUARES,),
            ours=("the 5,000 of Karpathy's test split with five captions each", "filter"),
        ),
        WordProtocol(
            name="flickr30k-retrieval",
            task="retrieval",
            kind="image",
            table="table 5, Flickr30k",
            items=1_000,
            split="test",
            texts=5,
            known=(_SQUARES,),
            ours=("the 1,000 of Karpathy's test split with five captions each", "filter"),
        ),
        WordProtocol(
            name="msrvtt-retrieval",
            task="retrieval",
            kind="video",
            table="table 7, MSRVTT",
            items=1_000,
            side=224,
            texts=1,
            known=("split 1K-A", *_FRAMES),
            ours=("one caption a clip", _OUR_FRAMES, "filter"),
        ),
        WordProtocol(
            name="msvd-retrieval",
            task="retrieval",
            kind="video",
            table="table 7, MSVD",
            items=670,
            side=224,
            known=_FRAMES,
            ours=("the 670 test clips with all their captions", _OUR_FRAMES, "filter"),
        ),
        WordProtocol(
            name="zero-shot",
            task="zero-shot",
            kind=None,
            ours=("everything: a folder of any kind with a folder a class",),
        ),
        WordProtocol(
            name="retrieval",
            task="retrieval",
            kind=None,
            ours=("everything: a folder of any kind with texts",),
        ),
    )
}
"""Presets by name."""
