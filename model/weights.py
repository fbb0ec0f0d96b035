"""Weights files to networks: strict, memory-mapped, one tensor at a time to the device and dtype wanted.

Two formats: our safetensors (the config is in the header) and the published .pt files (a plain state dict).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import GaussianConfig, ModelConfig
from model.errors import WeightsError
from model.gaussian_decoder import GaussianDecoder
from model.network import ATokenNet

CONFIG_KEY = "atoken_config"
GAUSSIAN_KEY = "atoken_gaussian_config"
NOTE_KEY = "note"
WRAPPERS = ("state_dict", "model")
"""Keys under which training code commonly puts the state dict of a .pt file."""

IN_FLOAT32 = "linear_path."
"""Prefix of tensors that no dtype asked for changes (model/linear_path.py says why)."""

TRAINING_ONLY = "lpips_loss."
"""Published files of the Gaussian decoder may hold the loss network of its training under this prefix."""

Network = TypeVar("Network", bound=nn.Module)

_PAGE = mmap.PAGESIZE


def save(
    net: ATokenNet | GaussianDecoder,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write our safetensors. dtype: of the floating tensors in the file, default as they are in the network."""
    tensors = {
        name: tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in net.state_dict().items()
    }
    key = GAUSSIAN_KEY if isinstance(net, GaussianDecoder) else CONFIG_KEY
    header = {**(metadata or {}), key: json.dumps(net.config.to_json())}
    save_file(tensors, path, metadata=header)


def load(
    path: Path,
    config: ModelConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ATokenNet:
    """Read a file into a network in eval mode.

    config: needed for files that do not carry one (.pt). Host memory stays near one copy of the file: pages that
    were converted are given back at once. Raises WeightsError, naming the key, for a missing or truncated file, an
    unmatched key, or a wrong shape.
    """
    config = config or read_config(path)
    with torch.device("meta"):
        net = ATokenNet(config)
    net = _filled(net, path, device, dtype)
    if net.linear_path is not None:
        net.linear_path.straighten()
    return net


def load_gaussian_decoder(
    path: Path,
    config: GaussianConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> GaussianDecoder:
    """The same for the Gaussian decoder; config: default that of our own file, of others the published sizes.

    The loss network in a published file is left out.
    """
    with torch.device("meta"):
        net = GaussianDecoder(config or read_gaussian_config(path))
    return _filled(net, path, device, dtype, leave_out=TRAINING_ONLY)


def _filled(
    net: Network, path: Path, device: torch.device | str, dtype: torch.dtype, leave_out: str | None = None
) -> Network:
    """A network built on the meta device with the tensors of a file; leave_out: prefix of keys to ignore."""
    wanted = net.state_dict()
    with _open(path) as source:
        found = {name: shape for name, shape in source.shapes.items() if not (leave_out and name.startswith(leave_out))}
        _check_keys(path, wanted, found)
        for name, like in wanted.items():
            stored = source.read(name)
            target = like.dtype if name.startswith(IN_FLOAT32) or not like.is_floating_point() else dtype
            tensor = stored.to(device, target)
            if tensor.data_ptr() != stored.data_ptr():
                _give_back(stored)
            _assign(net, name, tensor)
    return net.eval().requires_grad_(False)


def read_config(path: Path) -> ModelConfig:
    """The config in the header of our safetensors file. Raises WeightsError if there is none."""
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path.name}: a {path.suffix or 'nameless'} file does not say which variant it is; name it")
    with _open(path) as source:
        if CONFIG_KEY not in source.metadata:
            raise WeightsError(f"{path.name}: no {CONFIG_KEY!r} in its header; name the variant that it is")
        try:
            return ModelConfig.from_json(json.loads(source.metadata[CONFIG_KEY]))
        except (ValueError, TypeError, KeyError) as error:
            raise WeightsError(f"{path.name}: unreadable {CONFIG_KEY!r} in its header: {error}") from error


def read_gaussian_config(path: Path) -> GaussianConfig:
    """The config in the header of our file, the published one of any other. Raises WeightsError."""
    if path.suffix != ".safetensors":
        return GaussianConfig()
    with _open(path) as source:
        if GAUSSIAN_KEY not in source.metadata:
            return GaussianConfig()
        try:
            return GaussianConfig.from_json(json.loads(source.metadata[GAUSSIAN_KEY]))
        except (ValueError, TypeError, KeyError) as error:
            raise WeightsError(f"{path.name}: unreadable {GAUSSIAN_KEY!r} in its header: {error}") from error


def read_note(path: Path) -> str:
    """What the header of our file says of it to its users; empty where it says nothing."""
    if path.suffix != ".safetensors":
        return ""
    with _open(path) as source:
        return source.metadata.get(NOTE_KEY, "")


def revision_of(path: Path, config: ModelConfig | GaussianConfig) -> str:
    """Hash of a weights file and of what it is taken for; tokens carry it, so that others are told apart."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


class _Source:
    """An opened file: its shapes, its header, and a way to map one tensor."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], read: Callable[[str], Tensor]
    ) -> None:
        self.shapes = shapes
        self.metadata = metadata
        self.read = read


@contextmanager
def _open(path: Path) -> Iterator[_Source]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
                yield _Source(shapes, file.metadata() or {}, file.get_tensor)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path.name}: not a whole safetensors file: {error}") from error
    elif path.suffix in (".pt", ".pth", ".bin"):
        state = _read_pt(path)
        yield _Source({name: tuple(tensor.shape) for name, tensor in state.items()}, {}, state.__getitem__)
    else:
        raise WeightsError(f"{path.name}: weights are .safetensors, .pt, .pth or .bin files")


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        # weights_only: the file is data from outside, and a full unpickler would run what it says.
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, zipfile.BadZipFile, OSError) as error:
        raise WeightsError(f"{path.name}: not a whole .pt file of plain tensors: {str(error)[:300]}") from error
    for key in WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path.name}: wanted a dictionary of names to tensors, alone or under one of {WRAPPERS}")
    return loaded


def _check_keys(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        parts = [
            f"{len(keys)} {what} (first {keys[0]})"
            for what, keys in (("missing", missing), ("unknown", unknown))
            if keys
        ]
        raise WeightsError(f"{path.name}: keys that do not fit the model: {', '.join(parts)}")
    for name, like in wanted.items():
        if found[name] != tuple(like.shape):
            raise WeightsError(f"{path.name}: {name} has shape {list(found[name])}; wanted {list(like.shape)}")


def _assign(net: nn.Module, name: str, tensor: Tensor) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = net.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _give_back(mapped: Tensor) -> None:
    """Tell the system that the pages behind a mapped tensor are not needed now; they are read again if they are."""
    start = -(-mapped.data_ptr() // _PAGE) * _PAGE
    stop = (mapped.data_ptr() + mapped.nbytes) // _PAGE * _PAGE
    if stop > start and hasattr(mmap, "MADV_DONTNEED"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)
