"""Fresh weights for networks that nothing pretrained: torch's layers as they are, positions and probe small."""

from __future__ import annotations

import torch
from torch.nn import init

from model.config import ModelConfig
from model.network import ATokenNet, build

STD = 0.02


def fresh(config: ModelConfig, seed: int) -> ATokenNet:
    """A network from a seed.

    torch draws the position tables from a unit normal, which would drown the patches.
    """
    torch.manual_seed(seed)
    net = build(config)
    with torch.no_grad():
        for stack in (net.encoder, net.decoder):
            init.normal_(stack.pos_embedder.position_embedding.weight, std=STD)
        init.normal_(net.encoder.head.probe, std=STD)
    return net
