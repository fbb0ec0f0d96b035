"""Items with texts: captions files of public sets, this project's captions.json, or NAME.txt beside a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.eval_items import Found, find_items, spread
from training.protocols import Kind

CAPTIONS = "captions.json"
NAMES = ("video", "image", "video_id", "path", "file_name", "filename", "file")
TEXTS = ("caption", "captions", "sentence", "sentences", "text", "raw", "name")
"""Keys and columns that hold an item's file and its texts, the first that is there."""

DEEPEST = 8
"""Parts of a path that a captions file may give of it."""


@dataclass(frozen=True)
class Captioned:
    """Items with their texts. owners: the item of each text, 0..N-1. source: where the texts are from."""

    found: Found
    texts: tuple[str, ...]
    owners: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        items_of: dict[str, set[int]] = {}
        for text, owner in zip(self.texts, self.owners, strict=True):
            items_of.setdefault(text, set()).add(owner)
        alike = sum(len(items_of[text]) > 1 for text in self.texts)
        shared = f"; {alike:,} are of another item too, which counts as wrong" if alike else ""
        return f"{self.found}; {len(self.texts):,} texts of {self.source}{shared}"


@dataclass
class _Entry:
    """names: under which the file may be found, the best first."""

    names: tuple[str, ...]
    texts: list[str]


def caption_items(
    folder: Path,
    kind: Kind | None,
    captions: Path | None = None,
    *,
    split: str | None = None,
    texts: int | None = None,
    limit: int | None = None,
) -> Captioned:
    """The files of a folder that have texts.

    captions: JSON of Karpathy's splits or of COCO, a list of objects or a CSV with a row a text (MSRVTT), or JSON of
    paths and texts; None: captions.json of the folder, else NAME.txt beside the files. split: of Karpathy's. texts:
    most of an item. limit: so many items, evenly spaced. Raises FileNotFoundError where an item has no file: a score
    over fewer would be another score; only JSON of paths may name more than the folder holds. ValueError for files of
    another form.
    """
    found = find_items(folder, kind)
    if captions is None and (folder / CAPTIONS).is_file():
        captions = folder / CAPTIONS
    if captions is None:
        pairs = [(path, [text]) for path in found.paths if (text := _beside(path))]
        source = "files beside them"
    else:
        entries, whole = _read(captions, split)
        known = _by_ends(found.paths)
        located = [(_locate(entry.names, known, captions), entry) for entry in entries]
        absent = [entry.names[0] for path, entry in located if path is None]
        if absent and whole:
            lacks = f"no file for {len(absent):,} of {len(located):,} items of {captions.name}"
            raise FileNotFoundError(f"{folder}: {lacks}, {absent[0]} first")
        pairs, source = [(path, entry.texts) for path, entry in located if path is not None], captions.name
    if not pairs:
        wanted = f"none of its files is in {captions.name}" if captions else f"no {CAPTIONS} and no NAME.txt in it"
        raise FileNotFoundError(f"{folder}: {wanted}; name a file with --captions")
    chosen = [pairs[index] for index in spread(len(pairs), limit)]
    said = [(text, owner) for owner, (_, own) in enumerate(chosen) for text in own[:texts]]
    return Captioned(
        found=Found(found.kind, tuple(path for path, _ in chosen), len(pairs)),
        texts=tuple(text for text, _ in said),
        owners=tuple(owner for _, owner in said),
        source=source,
    )


def _read(path: Path, split: str | None) -> tuple[list[_Entry], bool]:
    """Items of a captions file, and whether all of them must be there."""
    if path.suffix.lower() == ".csv":
        try:
            with path.open(newline="") as file:
                return _merged(path, csv.DictReader(file)), True
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(values, list):
        return _merged(path, values), True
    if not isinstance(values, dict):
        raise ValueError(f"{path}: neither an object nor a list")
    if not isinstance(values.get("images"), list):
        entries = [_Entry((name,), texts) for name, value in values.items() if (texts := _texts(value))]
        return entries, False
    try:
        entries = _coco(values) if "annotations" in values else _karpathy(values["images"], split)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not as of COCO nor of Karpathy's splits ({error!r})") from None
    if not entries:
        raise ValueError(f"{path}: no item of split {split!r}" if split else f"{path}: no item")
    return entries, True


def _karpathy(images: Sequence[dict[str, Any]], split: str | None) -> list[_Entry]:
    return [
        _Entry(
            (f"{image['filepath']}/{image['filename']}", image["filename"])
            if "filepath" in image
            else (image["filename"],),
            [text for sentence in image["sentences"] for text in _texts(sentence)],
        )
        for image in images
        if split is None or image["split"] == split
    ]


def _coco(values: dict[str, Any]) -> list[_Entry]:
    entries = {image["id"]: _Entry((image["file_name"],), []) for image in values["images"]}
    for note in values["annotations"]:
        entries[note["image_id"]].texts.append(note["caption"])
    return [entry for entry in entries.values() if entry.texts]


def _merged(path: Path, rows: Iterable[Any]) -> list[_Entry]:
    """A row an item or a text."""
    entries: dict[str, _Entry] = {}
    for row in rows:
        values = row if isinstance(row, dict) else {}
        name = next((values[key] for key in NAMES if isinstance(values.get(key), str)), None)
        texts = _texts(values)
        if name is None or not texts:
            raise ValueError(f"{path}: {str(row)[:60]} is no item: wanted {', '.join(NAMES[:3])} ... and a caption")
        entries.setdefault(name, _Entry((name,), [])).texts.extend(texts)
    return list(entries.values())


def _texts(value: object) -> list[str]:
    """A text, an object with one, or a list of such."""
    if isinstance(value, str):
        return [text] if (text := value.strip()) else []
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    if isinstance(value, dict):
        return next((texts for key in TEXTS if (texts := _texts(value.get(key)))), [])
    return []


def _by_ends(paths: Iterable[Path]) -> dict[str, Path | None]:
    """Every end of every path, with its suffix and without; None for what two have."""
    known: dict[str, Path | None] = {}
    for path in paths:
        for end in _ends(path.absolute()):
            known[end] = path if known.get(end, path) == path else None
    return known


def _ends(path: Path) -> Iterator[str]:
    for parts in dict.fromkeys((path.parts, path.with_suffix("").parts)):
        for start in range(max(1, len(parts) - DEEPEST), len(parts)):
            yield "/".join(parts[start:])


def _locate(names: Sequence[str], known: dict[str, Path | None], captions: Path) -> Path | None:
    found = next((name for name in names if name in known), None)
    if found is None:
        return None
    if known[found] is None:
        raise ValueError(f"{captions}: {found} may be several files of the folder; give more of its path")
    return known[found]


def _beside(path: Path) -> str:
    note = path.with_suffix(".txt")
    return note.read_text(errors="replace").strip() if note.is_file() else ""
