"""What each kind of conformance case computes, from its inputs to named arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from media.types import Image, Item, Layout, Video, Voxels
from model import fsq
from model.config import GaussianConfig, ModelConfig
from model.gaussian_decoder import GaussianDecoder
from model.network import ATokenNet
from model.packed import pack, plan_windows
from model.patchify import coords_of, layout_of, patchify, to_uint8, unpatchify
from model.rope import frequencies, rotary_table, rotate
from model.rule_weights import rule_tensor
from model.weights import load_gaussian_decoder

Arrays = dict[str, np.ndarray[Any, Any]]
Kind = Callable[[Path, Arrays, torch.device, torch.dtype, bool], Arrays]
"""Runs a case: its folder, its inputs, where and in which type to compute, and whether item by item."""

SHIPPED = Path(__file__).parent / "conformance"
"""A small set that comes with the package, to check an installation, a GPU or a dtype."""


class UnreadableError(Exception):
    """The folder is no conformance directory."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UnreadableError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise UnreadableError(f"{path}: wanted a JSON object")
    return value


def _network(folder: Path, device: torch.device, dtype: torch.dtype) -> ATokenNet:
    """The network of a case with its weights, upcast to the dtype wanted."""
    case, config = read_json(folder / "case.json"), ModelConfig.from_published(read_json(folder / "config.json"))
    net = ATokenNet(config)
    given = case.get("weights", {})
    if "rule" in given or not ((folder / "weights.safetensors").is_file() or "file" in given):
        shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        state = {name: rule_tensor(name, shapes[name], number) for number, name in enumerate(sorted(shapes))}
    else:
        state = load_file(folder / given.get("file", "weights.safetensors"))
    net.load_state_dict(state, strict=True)
    return net.to(device, dtype).eval()


def _items(inputs: Arrays) -> list[Item]:
    count = 1 + max(int(name.split(".")[0].removeprefix("item_")) for name in inputs if name.startswith("item_"))
    items: list[Item] = []
    for index in range(count):
        pixels = inputs.get(f"item_{index}.pixels")
        if pixels is None:
            items.append(Voxels(coords=inputs[f"item_{index}.coords"], feats=inputs[f"item_{index}.feats"]))
        else:
            items.append(Image(pixels=pixels[0]) if len(pixels) == 1 else Video(frames=pixels))
    return items


@torch.inference_mode()
def _run_model(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    net = _network(folder, device, dtype)
    items = list(enumerate(_items(inputs)))
    groups = [[entry] for entry in items] if one_by_one else [items]
    parts = [_run_pack(net, group, device) for group in groups]
    out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if not name.startswith("item_")}
    for part in parts:
        out.update({name: array for name, array in part.items() if name.startswith("item_")})
    if "boundary.z" in inputs:
        out.update(
            {f"boundary.{name}": array for name, array in _fsq_stages(inputs["boundary.z"], net.config, device).items()}
        )
    return out


def _run_pack(net: ATokenNet, items: list[tuple[int, Item]], device: torch.device) -> Arrays:
    """All stages of one packed pass; items carry their number in the case."""
    config = net.config
    layouts = [layout_of(item, config, "crop") for _, item in items]
    coords = [torch.from_numpy(coords_of(item, layout)) for (_, item), layout in zip(items, layouts, strict=True)]
    feats = [patchify(item, layout, config, device=device) for (_, item), layout in zip(items, layouts, strict=True)]
    spans = [span for index, c in enumerate(coords) for span in plan_windows(c, index, config.window)]
    packed = pack(
        spans,
        [feats[span.item][span.start : span.stop] for span in spans],
        [coords[span.item][span.start : span.stop].to(device) for span in spans],
        [layouts[span.item].kind == "video" for span in spans],
        config.window,
    )
    starts = np.cumsum([0, *map(len, coords)]).tolist()
    numbers = [torch.full((len(c), 1), number, dtype=torch.int32) for (number, _), c in zip(items, coords, strict=True)]
    stages: dict[str, Tensor] = {
        "tokens.coords": torch.cat([torch.cat(pair, 1) for pair in zip(numbers, coords, strict=True)]),
        "tokens.feats": packed.feats,
    }
    with _tapped(net, stages):
        features = net.encode(packed)
        pooled = net.encoder.head(features, starts)
        mean, logvar = net.posterior(features, packed)
        stages |= {"enc.features": features, "pool.raw": pooled, "posterior.mean": mean, "posterior.logvar": logvar}
        stages["pool.normalized"] = torch.nn.functional.normalize(pooled.float(), dim=-1)
        quantizer = _fsq_stages(mean, config, device) if config.codebooks else {}
        latent = net.quantize(mean, packed.moving) if config.codebooks else mean
        stages["latent"] = latent
        patches = stages["dec.tokens"] = net.decode(packed.with_feats(latent))
    arrays = {name: _numpy(tensor) for name, tensor in stages.items()}
    arrays |= {f"fsq.{name}": array for name, array in quantizer.items()}
    for (number, _), layout, start, stop in zip(items, layouts, starts, starts[1:], strict=False):
        arrays |= _item_outputs(f"item_{number}", patches[start:stop], layout, config)
    return arrays


def _item_outputs(name: str, patches: Tensor, layout: Layout, config: ModelConfig) -> Arrays:
    if layout.kind == "voxels":
        return {f"{name}.voxel_feats": _numpy(patches[:, : config.frame_values])}
    pixels = unpatchify(patches, layout.grid, config)[: layout.frames]
    return {
        f"{name}.pixels": _numpy(pixels.permute(0, 3, 1, 2)),
        f"{name}.pixels_u8": to_uint8(pixels, truncate=True),
    }


class _tapped:  # noqa: N801 - used as a context manager, like a function
    """Record what flows between the parts of both stacks, under the names of the conformance cases."""

    def __init__(self, net: ATokenNet, stages: dict[str, Tensor]) -> None:
        self.handles: list[Any] = []
        self.stages = stages
        for prefix, first, stack in (("enc", "patch_embed", net.encoder), ("dec", "unproject", net.decoder)):
            self._out(stack.input_layer, f"{prefix}.{first}")
            self._out(stack.pos_embedder, f"{prefix}.pos_embed")
            self.handles.append(stack.blocks[0].register_forward_pre_hook(self._input_tap(f"{prefix}.embed")))
            for number, block in enumerate(stack.blocks):
                self._out(block, f"{prefix}.block_{number}")

    def _out(self, module: torch.nn.Module, name: str) -> None:
        def keep(_module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
            self.stages[name] = output

        self.handles.append(module.register_forward_hook(keep))

    def _input_tap(self, name: str) -> Callable[[torch.nn.Module, Any], None]:
        def keep(_module: torch.nn.Module, inputs: Any) -> None:
            self.stages[name] = inputs[0]

        return keep

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _fsq_stages(z: Any, config: ModelConfig, device: torch.device) -> Arrays:
    z = torch.as_tensor(z, device=device).float()
    values = fsq.quantize(z)
    codes = fsq.values_to_codes(values, config.codebooks)
    return {
        "bounded": _numpy(fsq.bound(z)),
        "quantized": _numpy(values),
        "dequantized": _numpy(fsq.codes_to_values(codes, config.latent_channels)),
        "indices": _numpy(codes),
    }


@torch.inference_mode()
def _run_fsq(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    z = torch.from_numpy(inputs["z"]).to(device)
    values = fsq.quantize(z)
    codes = fsq.values_to_codes(values, 8)
    all_codes = fsq.codes_to_values(torch.from_numpy(inputs["all_indices"]).to(device)[:, None], 6)
    return {
        "bounded": _numpy(fsq.bound(z)),
        "quantized": _numpy(values),
        "dequantized": _numpy(fsq.codes_to_values(codes, z.shape[1])),
        "indices": _numpy(codes),
        "all_codes": _numpy(all_codes),
        "curve_bounded": _numpy(fsq.bound(torch.from_numpy(inputs["curve_z"]).to(device))),
        "requantized_codes": _numpy(fsq.quantize(all_codes[:64])),
    }


@torch.inference_mode()
def _run_rope(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    q, k = (torch.from_numpy(inputs[name]).to(device) for name in ("q", "k"))
    table = rotary_table(torch.from_numpy(inputs["coords"]).to(device), q.shape[-1])
    return {
        "freqs": _numpy(frequencies(q.shape[-1])),
        "cos": _numpy(table[:, 0::2]),
        "sin": _numpy(table[:, 1::2]),
        "q": _numpy(rotate(q, table)),
        "k": _numpy(rotate(k, table)),
    }


@torch.inference_mode()
def _run_pixels(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    patch = tuple(read_json(folder / "config.json")["patch_size"])
    stack = read_json(SHIPPED / "core_s1_tiny" / "config.json")
    config = ModelConfig.from_published({**stack, "patch_size": patch})
    out: Arrays = {}
    for number, item in enumerate(_items(inputs)):
        layout = layout_of(item, config, "crop")
        feats, coords = patchify(item, layout, config, device=device), coords_of(item, layout)
        out |= {f"item_{number}.tokens.feats": _numpy(feats), f"item_{number}.tokens.coords": coords}
        pixels = unpatchify(feats, layout.grid, config)[: layout.frames]
        out[f"item_{number}.roundtrip"] = _numpy(pixels.permute(0, 3, 1, 2))
        out[f"item_{number}.roundtrip_u8"] = to_uint8(pixels, truncate=True)
    return out


@torch.inference_mode()
def _run_decode(folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool) -> Arrays:
    net = _network(folder, device, dtype)
    latents, coords = torch.from_numpy(inputs["latent"]).to(device), torch.from_numpy(inputs["coords"]).to(device)
    frames = net.config.patch[0]
    out: Arrays = {}
    for name, run in read_json(folder / "case.json")["runs"].items():
        stride, cache = run["stride_frames"] // frames, run["cache_frames"] // frames
        items = (latents[coords[:, 0] == b] for b in range(int(coords[:, 0].max()) + 1))
        places = (coords[coords[:, 0] == b, 1:] for b in range(int(coords[:, 0].max()) + 1))
        out[name] = _numpy(
            torch.cat(
                [
                    net.decoder.forward_cached(z, c, stride=stride, cache=cache)
                    for z, c in zip(items, places, strict=True)
                ]
            )
        )
    return out


@torch.inference_mode()
def _run_gaussian_decoder(
    folder: Path, inputs: Arrays, device: torch.device, dtype: torch.dtype, one_by_one: bool
) -> Arrays:
    config = GaussianConfig.from_published(read_json(folder / "config.json"))
    net = load_gaussian_decoder(folder / "weights.safetensors", config, device=device, dtype=dtype)
    out: Arrays = {}
    for name in read_json(folder / "case.json")["runs"]:
        coords, feats = (torch.from_numpy(inputs[name + part]).to(device) for part in ("coords", "feats"))
        packs = [coords[:, 0] == item for item in coords[:, 0].unique()] if one_by_one else [slice(None)]
        parts = [_gaussian_stages(net, feats[pack], coords[pack]) for pack in packs]
        out |= {name + stage: np.concatenate([part[stage] for part in parts]) for stage in parts[0]}
    return out


def _gaussian_stages(net: GaussianDecoder, feats: Tensor, coords: Tensor) -> Arrays:
    taps: dict[str, Tensor] = {}

    def keep(name: str, of_input: bool = False) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, inputs: Any, output: Any = None) -> None:
            taps[name] = inputs[0] if of_input else output

        return hook

    handles = [block.register_forward_hook(keep(f"block_{number}")) for number, block in enumerate(net.blocks)]
    handles.append(net.blocks[0].register_forward_pre_hook(keep("embed", of_input=True)))
    handles.append(net.out_layer.register_forward_pre_hook(keep("pre_out_norm", of_input=True)))
    raw = net(feats, coords, uncap_eights=True)
    for handle in handles:
        handle.remove()
    splats = net.splats(raw, coords)
    taps |= {
        f"raw_{name}": getattr(splats, name) for name in ("xyz01", "features_dc", "scaling", "rotation", "opacity")
    }
    taps |= {"xyz": splats.positions(), "scaling": splats.scales()}
    taps |= {"rotation": splats.rotations(), "opacity": splats.opacities(), "raw": raw}
    taps["gaussians_per_sample"] = coords[:, 0].unique(return_counts=True)[1] * net.config.gaussians
    return {name: _numpy(tensor) for name, tensor in taps.items()}


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()


KINDS: dict[str, Kind] = {
    "model": _run_model,
    "decode": _run_decode,
    "rope": _run_rope,
    "fsq": _run_fsq,
    "pixels": _run_pixels,
    "gaussian_decoder": _run_gaussian_decoder,
}
