"""Networks that metrics look through: TorchScript files for rFID and rFVD, VGG for LPIPS. By path, never downloaded.

B items, T frames, H x W pixels, D features. A file is used for the one metric it is given for, and a number is printed
with the file's name and checksum: another network gives another metric.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.teachers import COMMANDS, verify

FVD_SIDE = 224
FVD_FRAMES = 300
"""Frames of a clip that FVD looks at, the first (facts-training 8)."""

FVD_FEWEST = 9
"""The network halves time three times, rounded up, and then pools over two: of fewer frames nothing would be left."""


@dataclass(frozen=True, kw_only=True)
class NetForm:
    """A published file. features: D; switches: how it is called; what: for messages; command: gets it."""

    metric: str
    features: int
    switches: Mapping[str, bool]
    what: str
    command: str

    def help(self) -> str:
        """For people who have another file, or none."""
        return f"For {self.metric}, {self.what}: {self.command}"


INCEPTION = NetForm(
    metric="rFID",
    features=2048,
    switches={"return_features": True},
    what="Inception v3 of 2015-12-05 as TorchScript",
    command="curl -LO https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
)
I3D = NetForm(
    metric="rFVD",
    features=400,
    switches={"rescale": False, "resize": False, "return_features": True},
    what="I3D of Kinetics-400 as TorchScript",
    command="curl -L -o i3d_torchscript.pt 'https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1'",
)


@dataclass(frozen=True)
class FeatureNet:
    """A loaded network. checksum: SHA-256 of its file, hexadecimal."""

    form: NetForm
    name: str
    checksum: str
    device: torch.device
    module: torch.jit.ScriptModule

    def __str__(self) -> str:
        return f"{self.form.metric} network {self.name} ({self.form.features} features, sha256 {self.checksum[:12]})"

    def of_pictures(self, pictures: Tensor) -> Tensor:
        """Features [B, D], float64 on the CPU, of uint8 pictures [B, 3, H, W]; the network scales and resizes them."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures {pictures.dtype} {tuple(pictures.shape)}; wanted uint8 [B, 3, H, W]")
        return self._features(pictures)

    def of_clips(self, clips: Tensor) -> Tensor:
        """Features [B, D], float64 on the CPU, of clips [B, 3, T, 224, 224] in -1..1 (see fvd_frames)."""
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < FVD_FEWEST or not clips.is_floating_point():
            raise ValueError(
                f"clips {clips.dtype} {tuple(clips.shape)}; wanted floats [B, 3, T, H, W], T of {FVD_FEWEST} or more"
            )
        return self._features(clips)

    @torch.inference_mode()
    def _features(self, items: Tensor) -> Tensor:
        features = self.module(items.to(self.device), **self.form.switches)
        if features.shape != (len(items), self.form.features):
            found = f"{tuple(features.shape)}; wanted ({len(items)}, {self.form.features})"
            raise ValueError(f"{self.name} gives features {found}. {self.form.help()}")
        return features.to("cpu", torch.float64)


def load_feature_net(path: Path, form: NetForm, device: torch.device | str = "cpu") -> FeatureNet:
    """Load a TorchScript file.

    Raises FileNotFoundError that says what the file is and how to get it; ValueError for a file that is no TorchScript,
    is called in another way, or has another checksum than NAME.sha256 beside it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. {form.help()}")
    verify(path)
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    device = torch.device(device)
    try:
        with warnings.catch_warnings():
            # Published networks come as TorchScript, which torch calls deprecated.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"{path}: no TorchScript file ({reason}). {form.help()}") from None
    known = {argument.name for argument in module.forward.schema.arguments}
    if unknown := [name for name in form.switches if name not in known]:
        raise ValueError(f"{path}: its forward does not take {', '.join(unknown)}. {form.help()}")
    return FeatureNet(form, path.name, checksum, device, module.eval())


def fvd_frames(frames: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3] as I3D wants them, [3, T, 224, 224] in -1..1: short side to 224, bilinear without
    antialias as its users do, then the centre."""
    values = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = FVD_SIDE / min(values.shape[2:])
    height, width = (max(FVD_SIDE, round(side * scale)) for side in values.shape[2:])
    values = F.interpolate(values, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - FVD_SIDE) // 2, (width - FVD_SIDE) // 2
    return values[:, :, top : top + FVD_SIDE, left : left + FVD_SIDE].transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What some metrics look through. lpips: pictures [B, 3, H, W] in -1..1, twice, to [B]. missing: why one is not."""

    inception: FeatureNet | None = None
    i3d: FeatureNet | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    device: torch.device | str = "cpu"
    notes: tuple[str, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)


def load_networks(
    *,
    inception: Path | None = None,
    i3d: Path | None = None,
    vgg: Path | None = None,
    heads: Path | None = None,
    device: torch.device | str = "cpu",
) -> Networks:
    """Load what is given; the rest is noted as missing, with the command that gets it, and never replaced.

    Raises FileNotFoundError that names all files that are given and not there, with the command that gets each;
    ValueError for one that cannot be used.
    """
    helps = {path: form.help() for form, path in ((INCEPTION, inception), (I3D, i3d)) if path}
    helps |= {path: f"For LPIPS, {COMMANDS[name]}" for name, path in (("vgg", vgg), ("lpips", heads)) if path}
    if absent := [f"{path}: no such file. {help}" for path, help in helps.items() if not path.is_file()]:
        raise FileNotFoundError("; ".join(absent))
    missing: dict[str, str] = {}
    nets: dict[str, FeatureNet | None] = {}
    for form, path in ((INCEPTION, inception), (I3D, i3d)):
        nets[form.metric] = load_feature_net(path, form, device) if path else None
        if path is None:
            missing[form.metric] = f"no network given ({form.what}: {form.command})"
    notes = [str(net) for net in nets.values() if net is not None]
    lpips = None
    if vgg is None or heads is None:
        wanted = [COMMANDS[name] for name, path in (("vgg", vgg), ("lpips", heads)) if path is None]
        missing["LPIPS"] = f"no network given ({'; '.join(wanted)})"
    else:
        lpips = _lpips(vgg, heads, device)
        notes.append(f"LPIPS network {vgg.name} with heads {heads.name}")
    return Networks(
        inception=nets[INCEPTION.metric],
        i3d=nets[I3D.metric],
        lpips=lpips,
        device=device,
        notes=tuple(notes),
        missing=missing,
    )


def _lpips(vgg: Path, heads: Path, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
    from training.perceptual import load_lpips
    from training.vgg import load_vgg

    for path in (vgg, heads):
        verify(path)
    net, distance = load_vgg(vgg).to(device), load_lpips(heads).to(device)

    @torch.inference_mode()
    def lpips(seen: Tensor, wanted: Tensor) -> Tensor:
        return distance(net, seen, wanted)

    return lpips
