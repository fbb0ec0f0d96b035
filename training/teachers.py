"""Frozen networks that the losses look through: VGG, LPIPS heads, CLIP, SigLIP 2 vision and text.

They come from local folders; what is missing is named, with the command that gets it, before anything is loaded.
B pictures or texts, C channels of an embedding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from training.perceptual import LPIPS, SIDE, load_lpips
from training.vgg import VGG16, load_vgg

ImageFeatures = Callable[[Tensor], Tensor]
"""Pictures [B, 3, 224, 224] in -1..1 to [B, D]."""

TextFeatures = Callable[[Tensor], Tensor]
"""Token ids, int64 [B, 64], to [B, C]."""

LPIPS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
"""Of vgg.pth, computed from the file in the published package lpips 0.1.4 (lpips/weights/v0.1)."""

COMMANDS = {
    "vgg": "VGG16 of torchvision: curl -LO https://download.pytorch.org/models/vgg16-397923af.pth",
    "lpips": "LPIPS heads of VGG: "
    "curl -LO https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth"
    f" && echo {LPIPS_SHA256} > vgg.pth.sha256",
    "clip": "CLIP: hf download openai/clip-vit-base-patch16 --local-dir clip"
    " && hf cache verify openai/clip-vit-base-patch16 --local-dir clip",
    "siglip2": "SigLIP 2, both towers: hf download google/siglip2-so400m-patch16-naflex --local-dir siglip2"
    " && hf cache verify google/siglip2-so400m-patch16-naflex --local-dir siglip2",
}
"""What each teacher is, how to get it, and what tells that it came whole.

Of VGG that is the name, which has a part of its checksum; of LPIPS's heads the note that is written; of folders the
second command, which compares them with what the hub says (huggingface_hub 1.1 or newer).
"""

IN_NAME = re.compile(r"-([0-9a-f]{8})\.pth$")
"""First digits of the SHA-256 in the name of a file, as torch names its downloads."""

TEXT_LENGTH = 64
"""Ids of a caption: LENGTH of training/text.py, which imports more than is wanted here."""

CONTENTS = {
    "clip": (("config.json",), ("*.safetensors", "pytorch_model*.bin")),
    "siglip2": (("config.json",), ("*.safetensors", "pytorch_model*.bin"), ("tokenizer.json",)),
}
"""What a folder must hold: of each group of patterns one file."""


@dataclass(frozen=True, kw_only=True)
class TeacherPaths:
    """Where the teachers are. vgg, lpips: files; clip, siglip2: folders of Hugging Face models.

    What is known of their checksums is compared: see `verify`.
    """

    vgg: Path | None = None
    lpips: Path | None = None
    clip: Path | None = None
    siglip2: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Teachers:
    """What the losses use. vision and text give embeddings of the same space, of the width of the encoder."""

    vgg: VGG16
    lpips: LPIPS
    clip: ImageFeatures
    vision: ImageFeatures
    text: TextFeatures


def load_teachers(
    paths: TeacherPaths, width: int, device: torch.device | str = "cpu", unused: Collection[str] = ()
) -> Teachers:
    """Load them all, frozen. width: C of the encoder that learns from them.

    unused: of vgg, lpips and clip those that no loss asks (their weights are 0), which may be left out. Raises
    FileNotFoundError that names every missing one and how to get it, ValueError for one of the wrong size or kind, for
    one that lacks weights, and for one with another checksum.
    """
    given = {field.name: getattr(paths, field.name) for field in fields(paths)}
    given = {name: path for name, path in given.items() if path is not None or name not in unused}
    faults = {name: _fault(name, path) for name, path in given.items()}
    missing = [f"{name} ({fault}). {COMMANDS[name]}" for name, fault in faults.items() if fault]
    if missing:
        raise FileNotFoundError("missing teachers:\n  " + "\n  ".join(missing))
    for path in given.values():
        verify(path)
    vision, text = _siglip2(given["siglip2"], width)
    loaders: dict[str, Callable[[Path], nn.Module]] = {"clip": _clip, "vgg": load_vgg, "lpips": load_lpips}
    nets: dict[str, Any] = {
        name: loader(given[name]) if name in given else _Unused(name) for name, loader in loaders.items()
    }
    for net in (vision, text, *nets.values()):
        net.to(device)
    return Teachers(vision=vision, text=text, **nets)


def load_text(folder: Path | None, width: int, device: torch.device | str = "cpu") -> nn.Module:
    """SigLIP 2's text tower alone, frozen, as TextFeatures. width: C of the embeddings that texts are compared with.

    Raises FileNotFoundError that says what is missing and how to get it, ValueError for one of another width or kind,
    for one that takes fewer than 64 ids, and for one that is damaged or lacks weights.
    """
    fault = _fault("siglip2", folder)
    if fault or folder is None:
        raise FileNotFoundError(f"text tower: {fault}. {COMMANDS['siglip2']}")
    verify(folder)
    config = _config(folder, "siglip2")
    _check_length(folder, config)
    size = _text_width(config)
    if size != width:
        raise ValueError(
            f"{folder}: its texts have {size} values, the embeddings of the model {width}; wanted the text tower that "
            "the model was trained with"
        )
    from transformers import Siglip2TextModel

    return _frozen(_Siglip2Text(_tower(Siglip2TextModel, folder))).to(device)


def random_teachers(width: int, seed: int, device: torch.device | str = "cpu") -> Teachers:
    """Small networks with the same interface that know nothing: for the smoke run and for tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vgg = VGG16((8, 8, 16, 16, 16))
        lpips = LPIPS(vgg.widths)
        for index in range(lpips.count):
            nn.init.uniform_(lpips.get_parameter(f"lin{index}.model.1.weight"), 0, 1)
        vision, clip, text = _RandomVision(width), _RandomVision(width), _RandomText(width)
    for net in (vgg, lpips, vision, clip, text):
        net.eval().requires_grad_(False).to(device)
    return Teachers(vgg=vgg, lpips=lpips, clip=clip, vision=vision, text=text)


def verify(path: Path) -> None:
    """Compare a file, or every file of a folder, with its SHA-256, where something says what that is.

    That is NAME.sha256 beside it, and of names as torch gives them (vgg16-397923af.pth) the name. Raises ValueError
    where they differ.
    """
    if path.is_dir():
        for note in sorted(path.glob("*.sha256")):
            verify(note.with_suffix(""))
        return
    if not path.is_file():
        return
    wanted: dict[str, str] = {}
    if named := IN_NAME.search(path.name):
        wanted["its name"] = named[1]
    note = path.with_name(f"{path.name}.sha256")
    if note.is_file():
        wanted[note.name] = "".join(note.read_text().split()[:1]).lower()
    if not wanted:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    for where, digits in wanted.items():
        # A name has the first digits, a note all of them: of an empty note any file would be a match.
        if found[: len(digits) if where == "its name" else None] != digits:
            raise ValueError(f"{path} has checksum {found}, {where} says {digits}: download it again")


def _fault(name: str, path: Path | None) -> str:
    """What is missing of one teacher, or nothing."""
    if path is None:
        return "not given"
    if not path.exists():
        return f"nothing at {path}"
    if name not in CONTENTS:
        return "" if path.is_file() else f"{path} is no file"
    if not path.is_dir():
        return f"{path} is no folder"
    lacks = [
        " or ".join(patterns)
        for patterns in CONTENTS[name]
        if not any(True for pattern in patterns for _ in path.glob(pattern))
    ]
    return f"{path} lacks {', '.join(lacks)}" if lacks else ""


class _Unused(nn.Module):
    """In the place of a teacher that was not given, since no loss asks it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Tensor) -> Tensor:
        raise RuntimeError(f"the teacher {self.name} was left out, and a loss asks it all the same")


class _RandomVision(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.out = nn.Linear(width, width)

    def forward(self, pictures: Tensor) -> Tensor:
        rows = F.gelu(self.patches(pictures)).mean((2, 3))
        return self.out(rows)


class _RandomText(nn.Module):
    def __init__(self, width: int, words: int = 1000) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids) * (ids > 0)[..., None]).sum(1)


def _siglip2(folder: Path, width: int) -> tuple[nn.Module, nn.Module]:
    from transformers import Siglip2TextModel, Siglip2VisionModel

    config = _config(folder, "siglip2")
    sizes = {
        "vision hidden_size": config.vision_config.hidden_size,
        "text projection_size": _text_width(config),
    }
    for what, size in sizes.items():
        if size != width:
            raise ValueError(f"{folder}: {what} is {size}, the encoder to be trained is {width} wide; they must agree")
    if SIDE % (patch := int(config.vision_config.patch_size)):
        raise ValueError(f"{folder}: patches of {patch} pixels, which do not fill pictures of {SIDE}")
    _check_length(folder, config)
    vision, text = (_tower(kind, folder) for kind in (Siglip2VisionModel, Siglip2TextModel))
    return _frozen(_Siglip2Vision(vision)), _frozen(_Siglip2Text(text))


def _text_width(config: Any) -> int:
    """Values of a text's embedding."""
    return int(getattr(config.text_config, "projection_size", None) or config.text_config.hidden_size)


def _check_length(folder: Path, config: Any) -> None:
    places = int(config.text_config.max_position_embeddings)
    if places < TEXT_LENGTH:
        raise ValueError(f"{folder}: its text tower takes {places} ids; captions have {TEXT_LENGTH}")


def _clip(folder: Path) -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    config = _config(folder, "clip", "clip_vision_model")
    side = int(getattr(config, "vision_config", config).image_size)
    if side != SIDE:
        raise ValueError(f"{folder}: CLIP of pictures of {side} pixels; the losses show it {SIDE}, take one of {SIDE}")
    return _frozen(_ClipVision(_tower(CLIPVisionModelWithProjection, folder)))


def _config(folder: Path, *kinds: str) -> Any:
    """The library's configuration. Raises ValueError for a model of another kind."""
    from transformers import AutoConfig

    with _quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in kinds:
        raise ValueError(f"{folder} is a {config.model_type} model; wanted {' or '.join(kinds)}")
    return config


def _tower(kind: Any, folder: Path) -> Any:
    """A tower in float32, whatever the file has. Raises ValueError for a damaged file, and one without some weight.

    The library would fill the gap with random numbers and go on.
    """
    options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with _quiet():
            tower, report = kind.from_pretrained(folder, **options)
    except (SafetensorError, RuntimeError) as error:  # cut off, or of other sizes than its config.json says
        raise ValueError(f"{folder}: not the weights of its config.json ({str(error).splitlines()[0][:100]})") from None
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(f"{folder} lacks {len(absent)} weights of {kind.__name__}, {absent[0]} first: get it again")
    return tower


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's bars and its page on the other tower's weights; what is missing is an error of ours."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _frozen(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)


class _Siglip2Vision(nn.Module):
    """Squares through the NaFlex tower: 224 pixels are 14 x 14 patches of (row, column, channel)."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.patch = int(tower.config.patch_size)

    def forward(self, pictures: Tensor) -> Tensor:
        p = self.patch
        b, _, height, width = pictures.shape
        h, w = height // p, width // p
        tiles = pictures.unflatten(2, (h, p)).unflatten(4, (w, p)).permute(0, 2, 4, 3, 5, 1)
        mask = torch.ones(b, h * w, dtype=torch.int64, device=pictures.device)
        shapes = torch.tensor([[h, w]] * b, device=pictures.device)
        out = self.tower(pixel_values=tiles.reshape(b, h * w, -1), pixel_attention_mask=mask, spatial_shapes=shapes)
        pooled: Tensor = out.pooler_output
        return pooled


class _Siglip2Text(nn.Module):
    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.tower(input_ids=ids).pooler_output
        return pooled


class _ClipVision(nn.Module):
    mean: Tensor
    deviation: Tensor

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        # Of pictures in 0..1, as published with CLIP.
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None])
        self.register_buffer("deviation", torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None])

    def forward(self, pictures: Tensor) -> Tensor:
        embeddings: Tensor = self.tower(pixel_values=((pictures + 1) / 2 - self.mean) / self.deviation).image_embeds
        return embeddings
