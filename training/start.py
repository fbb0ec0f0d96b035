"""Where a run starts: a network that is exactly the linear codec of its principal components.

L latent channels, C channels of a stack, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from model.blocks import Attention, Block
from model.encoder import Encoder
from model.experts import Experts
from model.linear_path import NEIGHBOURS, Basis
from model.network import ATokenNet
from model.rope import frequencies
from training.config import LossConfig
from training.pca import Components

SHARPNESS = 10.0
"""Square of the query and key of every rotary pair: the next token but the one looked at gets about a ninth."""

CONTENT_SHARE = 0.25
"""What torch's initial query and key weights are multiplied by, so that content does not drown the place at first."""

TYPICAL_MSE = 0.006
"""Error of the linear codec on photographs, pixels -1..1; sets the first posterior variance, nothing else."""


def start_at(net: ATokenNet, still: Components, moving: Components, loss: LossConfig) -> None:
    """Set every weight that matters at step 0; the rest stays as torch initialised it.

    still: [K, 768], moving: [K, 3072], K at least the width of the encoder and, with experts, the components that they
    share; every expert is the same then. Raises ValueError for a network without a linear path.
    """
    if net.linear_path is None:
        raise ValueError("a network without linear_path cannot start at PCA")
    with torch.no_grad():
        for clips, found in ((False, still), (True, moving)):
            basis, experts = net.linear_path.of_kind(clips)
            _start_basis(basis, found.first(net.linear_path.components))
            if experts is not None:
                _start_experts(basis, experts, found)
        for stack in (net.encoder, net.decoder):
            stack.pos_embedder.position_embedding.weight.zero_()
            for block in stack.blocks:
                if isinstance(block, Block):
                    _start_as_identity(block)
        net.decoder.out_layer.weight.zero_()
        _start_encoder_input(net.encoder, still, moving)
        _look_at_neighbours(net)
        _start_posterior(net, still.first(net.config.latent_channels), loss)
        _start_pooling(net.encoder)


def _start_basis(basis: Basis, components: Components) -> None:
    basis.mean.copy_(components.mean)
    basis.bias.copy_(components.mean)
    basis.analysis.copy_(components.vectors / components.scales[:, None])
    basis.synthesis.copy_((components.vectors * components.scales[:, None]).T)


def _start_experts(basis: Basis, experts: Experts, components: Components) -> None:
    """Components in units of pixels, so that experts can weigh errors; every expert keeps the strongest."""
    basis.analysis.copy_(components.vectors[: len(basis.analysis)])
    basis.synthesis.copy_(basis.analysis.T)
    count = experts.coefficients
    experts.rows.copy_(torch.eye(count, experts.rows.shape[2]))
    experts.scale.copy_(components.scales[:count])


def _start_as_identity(block: Block) -> None:
    """Residual branches say nothing until they have learned something."""
    _silence(block.attn.to_out)
    _silence(block.mlp.mlp[2])


def _silence(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        parameter.zero_()


def _start_encoder_input(encoder: Encoder, still: Components, moving: Components) -> None:
    """Channels of the encoder are coefficients of unit variance: two thirds of stills, the rest of clips."""
    layer = encoder.input_layer
    channels = layer.weight.shape[0]
    stills = 2 * channels // 3
    layer.weight.zero_()
    layer.bias.zero_()
    for rows, components in ((slice(0, stills), still), (slice(stills, channels), moving)):
        part = components.first(layer.weight[rows].shape[0])
        matrix = part.vectors / part.scales[:, None]
        layer.weight[rows, : matrix.shape[1]] = matrix
        layer.bias[rows] = -(matrix @ part.mean)


def _look_at_neighbours(net: ATokenNet) -> None:
    """Give every head one neighbour to look at, whatever its token holds.

    RoPE turns a constant query and key into a bump around a fixed distance. Found by descent alone, this takes most
    of a short run.
    """
    for index, attention in enumerate(_attentions(net.encoder.blocks)):
        for head in range(attention.heads):
            _set_place(attention, head, index * attention.heads + head, constant=None)
    constant = net.config.decoder.width - 1
    # The decoder has no biases: one channel, the same for every token, stands in for them.
    net.decoder.input_layer.weight[constant] = 0
    net.decoder.pos_embedder.position_embedding.weight[:, constant] = 1
    for index, attention in enumerate(_attentions(net.decoder.blocks)):
        for head in range(attention.heads):
            _set_place(attention, head, index * attention.heads + head, constant=constant)
        for norm in (attention.q_rms_norm, attention.k_rms_norm):
            if norm is not None:
                norm.gamma.fill_((SHARPNESS / 2) ** 0.5)  # the norm makes every pair sqrt(2) long on average


def _attentions(blocks: Iterable[nn.Module]) -> list[Attention]:
    return [block.attn for block in blocks if isinstance(block, Block)]


def _set_place(attention: Attention, head: int, number: int, constant: int | None) -> None:
    """Point one head at NEIGHBOURS[number], by the biases, or by the column of a constant channel."""
    width = attention.to_out.weight.shape[0]
    head_width = width // attention.heads
    dx, dy = NEIGHBOURS[number % len(NEIGHBOURS)]
    freqs = frequencies(head_width)
    angles = torch.cat([freqs * distance for distance in (0, dx, dy, 0)])  # t, x, y, z
    query = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten()
    key = torch.view_as_real(torch.polar(torch.ones_like(angles), torch.zeros_like(angles))).flatten()
    for part, pattern in ((0, query), (1, key)):
        rows = slice(part * width + head * head_width, part * width + (head + 1) * head_width)
        attention.to_qkv.weight[rows] *= CONTENT_SHARE
        if constant is None:
            attention.to_qkv.bias[rows] = (pattern * SHARPNESS**0.5).float()
        else:
            attention.to_qkv.weight[rows, constant] = pattern.float()


def _start_posterior(net: ATokenNet, still: Components, loss: LossConfig) -> None:
    """No correction of the mean yet; the log variance at which noise and KL are in balance (with PCA, before experts).

    Noise of variance v on a channel adds scale^2 v / 768 to the error, the loss is the log of the error, and the KL
    term gains kl / 2 * log v: v = kl / 2 * 768 * error / scale^2. The projection has no bias, so the last feature
    is a constant.
    """
    net.proj.weight.zero_()
    constant = net.config.encoder.width - 1
    net.encoder.post_layernorm.get_parameter("weight")[constant] = 0
    net.encoder.post_layernorm.get_parameter("bias")[constant] = 1
    variance = max(loss.kl, 1e-8) / 2 * still.vectors.shape[1] * TYPICAL_MSE / still.scales.square()
    net.proj.weight[net.config.latent_channels :, constant] = variance.log()


def _start_pooling(encoder: Encoder) -> None:
    """The embedding starts as the plain mean of the features, without the constant one."""
    head = encoder.head
    width = head.probe.shape[0]
    head.probe.zero_()
    head.attention.to_q.bias.zero_()  # no query: every token weighs the same
    head.attention.to_kv.weight[width:] = torch.eye(width)
    head.attention.to_kv.bias.zero_()
    head.attention.to_out.weight.copy_(torch.eye(width))
    head.attention.to_out.weight[-1] = 0
    head.attention.to_out.bias.zero_()
    _silence(head.mlp.mlp[2])
