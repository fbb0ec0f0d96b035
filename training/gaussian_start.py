"""Where the small Gaussian decoder starts: solid Gaussians that fill each cell, in the mean colour of its patch.

The published start is faint grey everywhere. This one shows the voxels as they are before a single step, so that
training has only their detail to learn; the same idea as the PCA start of the tokenizer.
"""

from __future__ import annotations

import math

import torch
from torch.nn import init

from model.config import GaussianConfig
from model.gaussian_decoder import OUT_EPS, GaussianBlock, GaussianDecoder, position_table
from model.splats import OUTPUTS, SH_DEGREE_0

SMALL = GaussianConfig(width=160, blocks=2, heads=2, mlp=640)
"""26 frequencies an axis fill 156 channels: the last four are free for the colour."""
OPACITY = 0.9
GAIN = 0.25
"""How strongly the colour is written into the free channels: small, so that it hardly moves the norm of a token."""


@torch.no_grad()
def colour_start(config: GaussianConfig = SMALL, *, seed: int = 0) -> GaussianDecoder:
    """A decoder whose blocks pass on what they get, in float32. config: four channels or more beyond the table."""
    torch.manual_seed(seed)
    net = GaussianDecoder(config)
    free = config.width - 6 * (config.width // 6)
    if free < 4:
        raise ValueError(f"width {config.width} leaves {free} channels beside the position table; 4 are needed")
    for block in net.blocks:
        assert isinstance(block, GaussianBlock)
        init.zeros_(block.attn.to_out.weight)
        init.zeros_(block.mlp.mlp.get_parameter("2.weight"))
    first = config.width - 4
    weight = net.input_layer.weight
    init.normal_(weight, std=0.02 / math.sqrt(config.feature_channels))
    weight[first:] = 0
    pixels = config.feature_channels // 3
    for colour in range(3):
        weight[first + colour, colour::3] = GAIN / pixels
    # The norm before the output divides by the spread of a token, which is nearly that of the table.
    places = torch.randint(0, config.grid, (4096, 3))
    spread = (position_table(places, config.width).var(dim=1, unbiased=False) + OUT_EPS).sqrt().mean()
    count = config.gaussians
    start = count * OUTPUTS["offset"]
    rows = net.out_layer.weight[start : start + 3 * count].unflatten(0, (count, 3))
    for colour in range(3):
        # 2 f - 1 is the mean; the last channel stays empty and takes the norm's shift away.
        rows[:, colour, first + colour] = 0.5 / SH_DEGREE_0 * spread / GAIN
        rows[:, colour, first + 3] = -0.5 / SH_DEGREE_0 * spread / GAIN
    chance = config.initial_opacity
    net.out_layer.bias[-count:] = math.log(OPACITY / (1 - OPACITY)) - math.log(chance / (1 - chance))
    return net
