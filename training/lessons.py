"""All that the teachers say to the bundled models, computed once into a folder: views, clips, meshes, words."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from media.types import UInt8Array
from model.words import WordTable
from training.data import LANCZOS, flatten, is_validation, load_library, load_pictures, picture_paths, read_picture
from training.distill import Lessons
from training.joint_space import JointSpace, Pairs, fit_words
from training.packaged import (
    EfficientNetLite1,
    ImageTeacher,
    MiniLM,
    SentenceTeacher,
    captions_of,
    class_names,
    require_packages,
)
from training.shown import cached_clips, cached_sets
from training.views import CHUNK, SIDE, cached_views

VIEWS, CLIPS = 24_000, 600
MORE_VIEWS, DRAWING_VIEWS = 40, 6
"""Of each picture of other folders, and of each drawing: there are many, and photographs are what is asked about."""

WORDS, SPACE, MADE_OF = "words.safetensors", "space.safetensors", "made-of.json"


def load_lessons(
    data: Path, more: Sequence[Path], folder: Path, channels: int, seed: int, drawings: Sequence[Path] = ()
) -> Lessons:
    """Lessons of a data folder, and of other folders of pictures; what `folder` holds already is taken from there.

    Leaves words.safetensors, which model.words reads, and space.safetensors, so that an encoder which goes on with
    the same folder finds the same space. Raises FileNotFoundError if the teachers are not installed, ValueError if
    the folder was made of other files.
    """
    require_packages()
    shared = [data / kind / "train" for kind in ("images", "videos", "meshes")]
    require_same_files([*(path for path in shared if path.is_dir()), *more, *drawings], folder)
    teacher = cache(EfficientNetLite1)
    library = load_library(data)
    views = [cached_views(library, teacher, VIEWS, seed, folder / "views.pt")]
    others = ((more, MORE_VIEWS, "views-more.pt"), (drawings, DRAWING_VIEWS, "views-drawings.pt"))
    for number, (folders, each, name) in enumerate(others, start=1):
        if folders:
            shown = load_pictures(folders)
            views.append(cached_views(shown, teacher, each * len(shown.pictures), seed + number, folder / name))
    clips = cached_clips(library, teacher, CLIPS, seed, folder / "clips.pt")
    meshes = data / "meshes" / "train"
    sets = cached_sets(meshes, teacher, folder / "sets.pt") if meshes.is_dir() else None
    new = not (folder / SPACE).is_file()
    if new:
        JointSpace.fit(torch.cat([part.features for part in views]), channels).save(folder / SPACE)
    space = JointSpace.load(folder / SPACE)
    captions = captions_of(data)
    names = class_names()
    path = folder / WORDS
    if new or not path.is_file():  # words of another space would be nowhere in this one
        table = _words(data, captions, names, space, teacher(), MiniLM())
        partial = path.with_suffix(".partial")
        table.save(partial, "words of all-MiniLM-L6-v2, in the space of features of EfficientNet-Lite1")
        os.replace(partial, path)
    table = WordTable.load(str(path))
    texts = [text for text in (*names, *sorted(set(captions.values()))) if table.known(text)]
    return Lessons(space=space, texts=table.embed(texts), views=tuple(views), clips=clips, sets=sets)


def require_same_files(sources: Sequence[Path], folder: Path) -> None:
    """Note in `folder` what it is made of; raise ValueError if it is made of other files already."""
    if missing := [str(source) for source in sources if not source.is_dir()]:
        raise FileNotFoundError(f"{', '.join(missing)}: no such folder")
    files = [path for source in sources for path in sorted(source.iterdir()) if path.is_file()]
    made_of = [[path.name, path.stat().st_size] for path in files]
    noted = folder / MADE_OF
    if not noted.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(made_of), encoding="utf-8")
    elif json.loads(noted.read_text(encoding="utf-8")) != made_of:
        raise ValueError(f"{folder} holds what teachers say of other files; give another --lessons, or remove it")


def _words(
    data: Path,
    captions: dict[str, str],
    names: Sequence[str],
    space: JointSpace,
    teacher: EfficientNetLite1,
    sentences: SentenceTeacher,
) -> WordTable:
    """The text side: captions of training pictures that are not held aside, and names of the teacher's classes."""
    shown = [path for path in picture_paths(data / "images" / "train") if path.name in captions]
    shown = [path for path in shown if not is_validation(path)]
    known = sentences.words()
    pairs = [Pairs(names, space.embed_directions(teacher.class_vectors), NAMES_WEIGHT)]
    if shown:
        pairs.append(Pairs([captions[path.name] for path in shown], space.embed(_features(shown, teacher))))
    return fit_words(known, sentences(known), pairs)


NAMES_WEIGHT = 0.2
"""What the name of a class counts beside a caption, chosen with the ridge by captions left out of the fit."""


def _features(paths: Sequence[Path], teacher: ImageTeacher) -> Tensor:
    parts = []
    for first in range(0, len(paths), CHUNK):
        pictures = np.stack([letterboxed(read_picture(path)) for path in paths[first : first + CHUNK]])
        parts.append(teacher(torch.from_numpy(pictures)).features)
    return torch.cat(parts)


def letterboxed(picture: PIL.Image.Image, side: int = SIDE) -> UInt8Array:
    """All of a picture in the middle of a white square, uint8 [side, side, 3]."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = flatten(picture).resize(size, LANCZOS, reducing_gap=3.0)
    ground = PIL.Image.new("RGB", (side, side), (255, 255, 255))
    ground.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(ground)
