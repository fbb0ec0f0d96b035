"""A latent of another width or bottleneck for a trained network, so that it starts where the old one was.

L latent channels. From 32 to 48 as between the published first and second stage; how the authors did it is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.config import ModelConfig

NEW_STD = 0.02
"""Of the rows that are new: small, so that KL and sampling hardly see them, not 0, so that they get gradients."""


def widen_latents(state: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig, seed: int) -> dict[str, Tensor]:
    """The state of a network of config `old` as one of config `new`.

    Old means and log variances keep their rows; new means are small random projections, new log variances have weights
    of 0; the decoder does not read the new channels yet, so that it gives back what it gave. From "gaussian" to "fsq"
    the projection keeps its rows: codes are of the mean. Raises ValueError where more than the latent differs, and
    where the state is not one of config `old`.
    """
    same = replace(old, latent_channels=new.latent_channels, bottleneck=new.bottleneck, codebooks=new.codebooks)
    if same != new:
        raise ValueError(f"a checkpoint of {_sizes(old)} does not fit a stage of {_sizes(new)}")
    if old.linear_path and old.latent_channels != new.latent_channels:
        raise ValueError("a network with a linear path is fitted to its latent width; only plain ones can be widened")
    if new.latent_channels < old.latent_channels or (old.bottleneck, new.bottleneck) == ("fsq", "gaussian"):
        raise ValueError(
            f"from {old.latent_channels} channels, {old.bottleneck}, to {new.latent_channels}, {new.bottleneck}; "
            "wanted as many channels or more, and never back from codes"
        )
    if new.bottleneck == "fsq" and (not new.codebooks or new.latent_channels % new.codebooks):
        raise ValueError(f"{new.latent_channels} channels do not split into {new.codebooks} codebooks")
    _check(state, old)
    count, more = old.latent_channels, new.latent_channels - old.latent_channels
    result = {name: value.clone() for name, value in state.items()}
    projection, reader = result["proj.weight"], result["decoder.input_layer.weight"]
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(more, projection.shape[1], generator=generator).to(projection) * NEW_STD
    silent = projection.new_zeros(more, projection.shape[1])
    result["proj.weight"] = torch.cat([projection[:count], fresh, projection[count:], silent])
    result["decoder.input_layer.weight"] = torch.cat([reader, reader.new_zeros(len(reader), more)], dim=1)
    return result


def _check(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Whether the tensors that are changed are there and as wide as the config says."""
    wanted = {
        "proj.weight": [2 * config.latent_channels, config.encoder.width],
        "decoder.input_layer.weight": [config.decoder.width, config.latent_channels],
    }
    for name, shape in wanted.items():
        found = list(state[name].shape) if name in state else "missing"
        if found != shape:
            raise ValueError(f"{name} is {found}; wanted {shape} for {config.latent_channels} latent channels")


def _sizes(config: ModelConfig) -> str:
    encoder, decoder = config.encoder, config.decoder
    return (
        f"{encoder.blocks} + {decoder.blocks} blocks of width {encoder.width} and {decoder.width}, "
        f"patch {config.patch}, {config.latent_channels} latent channels"
    )
