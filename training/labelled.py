"""Items with a class each: folders DIR/CLASS/..., and what the classes are called."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.eval_items import Found

WORDNET = re.compile(r"n\d{8}")
"""ImageNet's folders, which say nothing."""


@dataclass(frozen=True)
class Labelled:
    """Items with their classes. names: of all K classes, of which some may have no item; labels: 0..K-1, one an item.

    source: where the names are from.
    """

    found: Found
    names: tuple[str, ...]
    labels: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        alike = len(self.names) - len(set(self.names))
        shared = f", {alike} of them with the name of another" if alike else ""
        return f"{self.found}; {len(self.names):,} classes{shared}, named by {self.source}"


def label_items(found: Found, folder: Path, classnames: Path | None) -> Labelled:
    """The class of each item is its first folder under `folder`.

    classnames: what folders stand for. JSON of folder and name or of number and [folder, name], or lines "folder name";
    a list of names alone, in JSON or lines, is for the folders in order, for folders 0, 1, ... by their numbers. Of
    several names with commas between the first is taken. None: folders are called by their names.
    Raises FileNotFoundError for items that are in no folder, ValueError for folders without a name.
    """
    places = [path.relative_to(folder).parts for path in found.paths]
    if loose := [parts[0] for parts in places if len(parts) < 2]:
        raise FileNotFoundError(f"{folder}: {loose[0]} is in no class folder; wanted CLASS/{loose[0]}")
    # Those without a file count too: a limit must not make the task easier.
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders.sort(key=lambda name: (int(name), name) if name.isdecimal() else (-1, name))
    if classnames is not None:
        called, source = _read_names(classnames, folders), classnames.name
    elif all(WORDNET.fullmatch(name) or name.isdecimal() for name in folders):
        raise ValueError(f"folders like {folders[0]} name no class: give --classnames FILE (folder and name a line)")
    else:
        called, source = {name: name.replace("_", " ") for name in folders}, "their folders"
    rows = {name: index for index, name in enumerate(called)}
    if unknown := sorted({parts[0] for parts in places} - set(rows)):
        raise ValueError(f"{classnames}: no name for {len(unknown)} of the class folders, {unknown[0]} first")
    return Labelled(found, tuple(called.values()), tuple(rows[parts[0]] for parts in places), source)


def _read_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """Folder and name of every class, in order."""
    text = path.read_text()
    try:
        values = json.loads(text)
    except ValueError:
        if path.suffix.lower() == ".json":
            raise ValueError(f"{path}: no JSON") from None
        values = _lines(text)
    numbered = all(name.isdecimal() for name in folders)
    if isinstance(values, list):
        # Of ImageNet-v2's numbers some may be missing; other folders must be all there to be counted off.
        keys = [str(index) for index in range(len(values))] if numbered else list(folders)
        if len(keys) != len(values):
            raise ValueError(f"{path}: {len(values):,} names in a list for {len(keys):,} class folders; wanted as many")
        values = dict(zip(keys, values, strict=True))
    called: dict[str, str] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        if isinstance(value, list) and len(value) == 2:
            key, value = key if numbered else value[0], value[1]
        if not isinstance(value, str) or not (name := value.split(",")[0].strip()):
            raise ValueError(f"{path}: class {key!r} has no name; wanted a text, or [folder, name]")
        called[key] = name
    if not called:
        raise ValueError(f"{path}: no class in it; wanted folders and names, or a list of names")
    return called


def _lines(text: str) -> dict[str, str] | list[str]:
    """Lines "n01440764 tench" or "bird<TAB>a bird" as pairs, others as names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark, is_pair in (("\t", lambda line: "\t" in line), (" ", WORDNET.match)):
        if lines and all(map(is_pair, lines)):
            return {name.strip(): value for name, _, value in (line.partition(mark) for line in lines)}
    return lines
