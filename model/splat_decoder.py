"""The facade of the Gaussian decoder: decoded voxel sets in, Gaussian splats out, several in one packed pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from media.types import Voxels
from model import weights
from model.errors import UnsupportedError
from model.gaussian_decoder import GaussianDecoder
from model.splats import Splats

BUNDLED = Path(__file__).parent / "bundled" / "splats"
PASS_VOXELS = 8192
"""Voxels of one pass, which bounds memory; a larger set passes alone."""


class SplatDecoder:
    """A loaded Gaussian decoder. name, revision: as a Tokenizer has them. note: what its users should know of it."""

    def __init__(self, net: GaussianDecoder, *, name: str, revision: str, note: str = "") -> None:
        self.net = net.eval()
        self.name = name
        self.revision = revision
        self.note = note

    @classmethod
    def load(
        cls, model: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> SplatDecoder:
        """Load the bundled decoder by name, or a weights file: ours, or the published one.

        Raises WeightsError for a file that does not fit, UnsupportedError for an unknown name.
        """
        path = BUNDLED / f"{model}.safetensors"
        if not path.is_file():
            path = Path(model)
        if not path.is_file():
            bundled = ", ".join(sorted(file.stem for file in BUNDLED.glob("*.safetensors")))
            raise UnsupportedError(f"Gaussian decoder {model!r}: no bundled one ({bundled}) and no file of that name")
        config = weights.read_gaussian_config(path)
        net = weights.load_gaussian_decoder(path, config, device=device, dtype=dtype)
        return cls(net, name=path.stem, revision=weights.revision_of(path, config), note=weights.read_note(path))

    def card(self) -> dict[str, Any]:
        """Facts as JSON values, for the card of the model whose voxels it decodes."""
        return {
            "name": self.name,
            "revision": self.revision,
            "gaussians": self.net.config.gaussians,
            "parameters": sum(parameter.numel() for parameter in self.net.parameters()),
            "note": self.note,
        }

    @torch.inference_mode()
    def decode(self, items: Sequence[Voxels]) -> list[Splats]:
        """Decode what Tokenizer.decode gives: coords int32 [n, 3], feats float32 [n, 768] in 0..1.

        An item's result knows no neighbours. Raises ShapeError, RangeError.
        """
        return [splats for pack in _packs(items) for splats in self._decode_pack(pack)]

    def _decode_pack(self, items: Sequence[Voxels]) -> Iterator[Splats]:
        device = self.net.offset_perturbation.device
        feats = torch.cat([torch.tensor(item.feats) for item in items]).to(device)
        coords = torch.cat(
            [
                torch.nn.functional.pad(torch.tensor(item.coords), (1, 0), value=number)
                for number, item in enumerate(items)
            ]
        ).to(device)
        outputs = self.net(2 * feats - 1, coords)
        start = 0
        for item in items:
            rows = slice(start, start + len(item.coords))
            yield self.net.splats(outputs[rows], coords[rows])
            start = rows.stop


def _packs(items: Sequence[Voxels]) -> Iterator[list[Voxels]]:
    pack: list[Voxels] = []
    for item in items:
        if pack and sum(len(other.coords) for other in pack) + len(item.coords) > PASS_VOXELS:
            yield pack
            pack = []
        pack.append(item)
    if pack:
        yield pack
