"""What the bundled models can do, in one table: `python -m training.scorecard --data ../shared/data`.

Everything is of held-out files: pictures, films and meshes of the eval splits, labelled test pictures. `--stages DIR`
adds what the model was after each stage; `--pictures DIR` a table of other pictures, such as Kodak's 24;
`--labelled DIR` labelled pictures from elsewhere, a folder a class; `--teacher` what the embedding was distilled from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from media.errors import MediaError
from media.types import Float32Array, Image, Item, UInt8Array
from model import Tokenizer
from model.errors import ModelError
from model.splat_decoder import SplatDecoder
from model.words import WordTable
from training.data import LANCZOS, read_picture
from training.eval_items import find_items, read_image
from training.gaussian_start import colour_start
from training.gaussians import HELD_OUT, SCORED_SIDE, Object, prepare
from training.gaussians import score as score_splats
from training.held_out import (
    Codec,
    Score,
    eval_clips,
    eval_pictures,
    model_codec,
    pca_codec,
    score,
)
from training.joint_space import JointSpace
from training.lessons import letterboxed
from training.packaged import EfficientNetLite1
from training.pca import fit_components, moving_patches, still_patches
from training.protocols import PROTOCOLS
from training.retrieval import Share

Embed = Callable[[Sequence[Item]], Float32Array]
"""Items to embeddings [N, C]."""

SIDE = 256
WHOLE = replace(PROTOCOLS["plain"], crop=1 << 20)
EMBED_SIDE = 224
RAW_SIDES = (8, 16, 32, 64)
NEIGHBOURS = (1, 5)
PROMPTS = ("{}", "a photo of a {}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sections; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.scorecard", description=__doc__)
    parser.add_argument("--continuous", default="tiny-continuous", help="bundled name or weights file")
    parser.add_argument("--discrete", default="tiny-discrete", help="bundled name or weights file")
    parser.add_argument("--splats", default="tiny-splats", help="bundled name or weights file")
    parser.add_argument("--words", default="tiny-words", help="bundled name or file")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--stages", type=Path, metavar="DIR", help="folder of a run, with STAGE.safetensors")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="more pictures, whole, as Kodak's 24")
    parser.add_argument("--labelled", type=Path, metavar="DIR", help="more labelled pictures, a folder a class")
    parser.add_argument("--skip", metavar="GLOB", help="names of labelled pictures that are left out, as 'scratch*'")
    parser.add_argument("--teacher", action="store_true", help="score the teacher too; wants its packages")
    parser.add_argument("--meshes", type=int, metavar="N", help="so many meshes; all of them take minutes")
    given = parser.parse_args(arguments)
    try:
        for line in _sections(given):
            print(line, flush=True)
    except (OSError, ValueError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _sections(given: argparse.Namespace) -> Iterator[str]:
    model = Tokenizer.load(given.continuous, device="cpu", dtype="float32")
    codes = Tokenizer.load(given.discrete, device="cpu", dtype="float32")
    stages = [
        (
            f"after stage {name}",
            Tokenizer.load(str(given.stages / f"{name}.safetensors"), device="cpu", dtype="float32"),
        )
        for name in ("image", "video", "asset")
        if given.stages and (given.stages / f"{name}.safetensors").is_file()
    ]
    yield f"{model.name} {model.revision[:12]}, {codes.name} {codes.revision[:12]}"
    pictures = list(eval_pictures(given.data, "eval", SIDE))
    yield from _table(f"images, centre {SIDE} px", image_scores(given.data, pictures, model, codes, stages))
    if given.pictures is not None:
        pictures = [read_image(path, WHOLE) for path in find_items(given.pictures, "image").paths]
        title = f"{given.pictures.name}, whole pictures"
        yield from _table(title, image_scores(given.data, pictures, model, codes, stages))
    yield from _table("clips of 16 frames", clip_scores(given.data, model, codes, stages))
    yield from _table("meshes, held-out views at 256 px", mesh_scores(given.data, given.meshes, model, given.splats))
    yield ""
    embedders = [model.embed, *([teacher_embed()] if given.teacher else [])]
    yield from meaning_lines(given.data, embedders, WordTable.load(given.words), given.labelled, given.skip)
    yield ""
    yield codebook_line(given.data, codes)


def _table(title: str, rows: Sequence[Score]) -> Iterator[str]:
    yield from ("", f"{title:34} {'n':>4} {'PSNR':>7} {'SSIM':>7}", *map(str, rows))


def image_scores(
    data: Path,
    pictures: Sequence[UInt8Array],
    model: Tokenizer,
    codes: Tokenizer,
    stages: Sequence[tuple[str, Tokenizer]],
) -> list[Score]:
    """PCA of the data's training split, stages and models on pictures uint8 [H, W, 3], whole patches of 16."""
    count = model.config.latent_channels
    components = fit_components(still_patches(data, model.config), count)
    rows = [score(f"PCA {count}, a patch alone", pca_codec(components, model.config), pictures)]
    rows += [score(name, model_codec(stage), pictures) for name, stage in stages]
    return [*rows, *(score(tokenizer.name, model_codec(tokenizer), pictures) for tokenizer in (model, codes))]


def clip_scores(data: Path, model: Tokenizer, codes: Tokenizer, stages: Sequence[tuple[str, Tokenizer]]) -> list[Score]:
    """The same on films, and frames that are encoded as images with as many tokens."""
    clips = list(eval_clips(data, SIDE))
    count = model.config.latent_channels
    components = fit_components(moving_patches(data, model.config), count)
    rows = [score(f"PCA {count}, a patch alone", pca_codec(components, model.config), clips)]
    rows.append(score("frames as images, as many tokens", frames_codec(model), clips))
    rows += [score(name, model_codec(stage), clips) for name, stage in stages]
    return [*rows, *(score(tokenizer.name, model_codec(tokenizer), clips) for tokenizer in (model, codes))]


def frames_codec(model: Tokenizer) -> Codec:
    """Each frame as an image of half the side, since a clip has one token for the patches of four frames."""
    codec = model_codec(model)

    def run(frames: UInt8Array) -> UInt8Array:
        height, width = frames.shape[1:3]
        back = []
        for frame in frames:
            small = PIL.Image.fromarray(frame).resize((width // 2, height // 2), LANCZOS)
            decoded = PIL.Image.fromarray(codec(np.asarray(small)))
            back.append(np.asarray(decoded.resize((width, height), PIL.Image.Resampling.BICUBIC)))
        return np.stack(back)

    return run


def mesh_scores(data: Path, limit: int | None, model: Tokenizer, splats: str) -> list[Score]:
    """Views that made no voxel: colours of the voxels as Gaussians, before and after the tokenizer; the decoder."""
    objects: list[Object] = []
    for path in sorted((data / "meshes" / "eval").iterdir()):
        try:
            objects.append(prepare(path, model, HELD_OUT, SCORED_SIDE, 0.6))
        except MediaError:  # not a mesh that serving takes
            continue
        if len(objects) == limit:
            break
    rows = []
    for name, net in (("voxels' own colours", colour_start()), (splats, SplatDecoder.load(splats).net)):
        found = score_splats(net, objects)
        rows.append(Score(name, len(objects), found["psnr"], found["ssim"]))
    return rows


def teacher_embed() -> Embed:
    """The teacher's places in the space of the bundled models' embedding. Raises FileNotFoundError without packages."""
    teacher = EfficientNetLite1()
    space = JointSpace.load(Path(__file__).parent / "tiny-space.safetensors")

    def embed(items: Sequence[Item]) -> Float32Array:
        pictures = [torch.from_numpy(item.pixels) for item in items if isinstance(item, Image)]
        return torch.cat([space.embed(teacher(picture[None]).features) for picture in pictures]).numpy()

    return embed


def meaning_lines(
    data: Path, embedders: Sequence[Embed], words: WordTable, labelled: Path | None, skip: str | None = None
) -> Iterator[str]:
    """Neighbours and classes from words, on labelled pictures; raw pixels and chance beside them.

    embedders: the model, and its teacher if that is asked too. skip: names of labelled pictures to leave out.
    """
    labels: dict[str, str] = json.loads((data / "images" / "labels.json").read_text())["labels"]
    known = [name for name in labels if name.startswith("images/train/")]
    asked = [name for name in labels if name.startswith("images/labelled_test/")]
    library, small_library = _pictures(data, known), _small(data / "images" / "labelled_train.npz")
    sets = [
        ("labelled test", _pictures(data, asked), [labels[name] for name in asked], library, [labels[n] for n in known])
    ]
    small_test = _small(data / "images" / "labelled_test.npz")
    sets.append(("the same at 64 px", small_test[0], small_test[1], *small_library))
    if labelled is not None:
        found = sorted(path for path in labelled.glob("*/*") if path.is_file())
        paths = [path for path in found if skip is None or not fnmatch(path.name, skip)]
        outside = [letterboxed(read_picture(path), EMBED_SIDE) for path in paths]
        sets.append(
            (f"{labelled.name}, other packages", outside, [path.parent.name for path in paths], library, sets[0][4])
        )
    classes = sorted(set(labels.values()))
    for title, pictures, truth, others, names in sets:
        yield f"{title}: n = {len(truth)}, largest class {100 * max(map(truth.count, set(truth))) / len(truth):.1f} %"
        for who, embed in zip(("", "teacher, "), embedders, strict=False):
            ours, theirs = (torch.from_numpy(embed(_items(shown))) for shown in (pictures, others))
            for k in NEIGHBOURS:
                near = neighbours(ours, truth, theirs, names, k)
                raw = raw_neighbours(pictures, truth, others, names, k)
                yield f"  {who}{k}-NN: {near}; raw pixels, best of {RAW_SIDES}: {raw}"
            for prompt in PROMPTS:
                texts = words.embed([prompt.format(name.replace("_", " ")) for name in classes])
                said = (ours @ texts.T).argmax(1).tolist()
                right = sum(classes[row] == name for row, name in zip(said, truth, strict=True))
                yield f"  {who}from words, {prompt!r}: {Share(right, len(truth))}; chance {100 / len(classes):.1f} %"


def raw_neighbours(
    asked: Sequence[UInt8Array], truth: Sequence[str], known: Sequence[UInt8Array], names: Sequence[str], k: int
) -> Share:
    """Neighbours by raw pixels, at the size where they are best."""
    shares = (neighbours(_raw(asked, side), truth, _raw(known, side), names, k) for side in RAW_SIDES)
    return max(shares, key=lambda share: share.right)


def neighbours(asked: Tensor, truth: Sequence[str], known: Tensor, names: Sequence[str], k: int) -> Share:
    """Share whose k nearest by cosine, weighed by it, are mostly of their class. asked: [N, C]; known: [M, C]."""
    classes = sorted(set(names))
    rows = torch.tensor([classes.index(name) for name in names])
    near = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(k, 1)
    votes = F.one_hot(rows[near.indices], len(classes)) * near.values.clamp(min=0)[..., None]
    found = [classes[int(row)] for row in votes.sum(1).argmax(1)]
    return Share(sum(name == true for name, true in zip(found, truth, strict=True)), len(truth))


def codebook_line(data: Path, codes: Tokenizer) -> str:
    """How much of the codebooks the eval pictures use."""
    items = [Image(pixels=picture) for picture in eval_pictures(data, "eval", SIDE)]
    encoded = codes.encode(items, ["codes"])
    found = np.concatenate([one.codes for one in encoded if one.codes is not None])
    size = codes.config.codebook_size
    counts = [np.bincount(column, minlength=size) for column in found.T]
    used = [float((count > 0).mean()) for count in counts]
    bits = [float(-(p[p > 0] * np.log2(p[p > 0])).sum()) for p in (count / count.sum() for count in counts)]
    return (
        f"codebooks: {len(found)} tokens use {100 * min(used):.0f} to {100 * max(used):.0f} % of the {size} codes of "
        f"each of {len(used)} books; entropy {np.mean(bits):.2f} of {np.log2(size):.0f} bits"
    )


def _pictures(data: Path, names: Sequence[str]) -> list[UInt8Array]:
    return [letterboxed(read_picture(data / name), EMBED_SIDE) for name in names]


def _small(path: Path) -> tuple[list[UInt8Array], list[str]]:
    """Labelled 64 px arrays, enlarged."""
    with np.load(path) as file:
        names = [str(name) for name in file["class_names"]]
        pictures = [PIL.Image.fromarray(pixels) for pixels in file["images"]]
        labels = [names[int(label)] for label in file["labels"]]
    size = (EMBED_SIDE, EMBED_SIDE)
    return [np.asarray(picture.resize(size, PIL.Image.Resampling.BICUBIC)) for picture in pictures], labels


def _items(pictures: Sequence[UInt8Array]) -> list[Item]:
    return [Image(pixels=picture) for picture in pictures]


def _raw(pictures: Sequence[UInt8Array], side: int) -> Tensor:
    """Pixels themselves, without their mean, [N, 3 side^2]."""
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    rows = F.interpolate(shown, size=(side, side), mode="area").flatten(1)
    return rows - rows.mean(1, keepdim=True)


if __name__ == "__main__":
    raise SystemExit(main())
