"""The sentences that a class name is put into: CLIP's eighty, the best seven of them, and one.

Source: the notebook "Prompt Engineering for ImageNet" that came with CLIP (arXiv 2103.00020). SigLIP 2's authors
average several (facts-training 9); the default of their public code is the eighty, later with the bare name.
"""

from __future__ import annotations

from pathlib import Path

_PHOTOS = (
    "bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated", "jpeg corrupted",
    "blurry", "good",
)  # fmt: skip
_THINGS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
_WORKS = ("sculpture", "rendering", "tattoo", "drawing", "painting", "doodle", "sketch", "rendition")
_COPIES = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")
_ARTICLES = ("a", "the")

CLIP = (
    *(f"a {kind} photo of {article} {{}}." for kind in _PHOTOS for article in _ARTICLES),
    *(f"a photo of {article} {kind} {{}}." for kind in _THINGS for article in _ARTICLES),
    *(f"a photo of {which} {{}}." for which in ("a", "the", "my", "one", "many")),
    *(f"a {work} of {article} {{}}." for work in _WORKS for article in _ARTICLES),
    *(f"{work} of {article} {{}}." for work in ("graffiti", "art") for article in _ARTICLES),
    *(f"itap of {which} {{}}." for which in ("a", "the", "my")),
    *(f"{article} {kind} {{}}." for kind in _COPIES for article in _ARTICLES),
    *(f"{article} {{}} in a video game." for article in _ARTICLES),
)
"""The eighty; itap: I took a picture."""

SHORT = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The seven that CLIP's authors found to do nearly as well."""

PLAIN = ("a photo of a {}.",)

PROMPTS = {"clip": CLIP, "short": SHORT, "plain": PLAIN}


def get_prompts(name: str) -> tuple[str, ...]:
    """A set of PROMPTS, or those of a file. Raises ValueError for a name that is neither."""
    if name in PROMPTS:
        return PROMPTS[name]
    if not Path(name).is_file():
        raise ValueError(f"prompts {name!r}; there are {', '.join(PROMPTS)}, and no file of that name")
    return read_prompts(Path(name))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a file, one a line, each with {} where the name goes. Raises ValueError for others."""
    lines = tuple(line.strip() for line in path.read_text().splitlines() if line.strip())
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(f"{path}: {wrong[0]!r} has no single {{}}" if wrong else f"{path}: no prompt in it")
    return lines
