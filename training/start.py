"""Where a run starts: a network that is exactly the linear codec of its principal components.

L latent channels, C channels of a stack, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from model.blocks import Attention, Block
from model.config import FSQ_LEVELS
from model.decoder import Decoder
from model.encoder import Encoder
from model.linear_path import NEIGHBOURS, Basis, Digits, DigitTable
from model.network import ATokenNet
from model.packed import PackedTokens
from model.rope import frequencies
from training.config import LossConfig
from training.digits import Allocation, allocate, draw_samples
from training.pca import Components

SHARPNESS = 10.0
"""Square of the query and key of every rotary pair: the next token but the one looked at gets about a ninth."""

CONTENT_SHARE = 0.25
"""What torch's initial query and key weights are multiplied by, so that content does not drown the place at first."""

TYPICAL_MSE = 0.006
"""Error of the linear codec on photographs, pixels -1..1; sets the first posterior variance, nothing else."""


def start_at(net: ATokenNet, still: Components, moving: Components, loss: LossConfig) -> None:
    """Set every weight that matters at step 0; the rest stays as torch initialised it.

    still: [K, 768], moving: [K, 3072], K at least the width of the encoder. Raises ValueError for a network without a
    linear path.
    """
    if net.linear_path is None:
        raise ValueError("a network without linear_path cannot start at PCA")
    count = net.config.latent_channels
    with torch.no_grad():
        _start_basis(net.linear_path.still, still.first(count))
        _start_basis(net.linear_path.moving, moving.first(count))
        for stack in (net.encoder, net.decoder):
            stack.pos_embedder.position_embedding.weight.zero_()
            for block in stack.blocks:
                if isinstance(block, Block):
                    _start_as_identity(block)
        net.decoder.out_layer.weight.zero_()
        _start_encoder_input(net.encoder, still, moving)
        _look_at_neighbours(net)
        _start_posterior(net, still.first(count), loss)
        _start_pooling(net.encoder)


def start_digits(net: ATokenNet, still: Components, moving: Components, batches: Sequence[PackedTokens]) -> None:
    """Put base-4 digits between the linear way in and out, after start_at. batches: what they are fitted to.

    The decoder's blocks read coefficients of unit variance, as those of the continuous model do, rather than digits.
    """
    if net.linear_path is None or net.digits is None:
        raise ValueError("a network without digits cannot start with them")
    count = net.config.latent_channels
    with torch.no_grad():
        for basis, table, components, is_moving in (
            (net.linear_path.still, net.digits.still, still.first(count), False),
            (net.linear_path.moving, net.digits.moving, moving.first(count), True),
        ):
            samples = draw_samples(batches, components, moving=is_moving)
            coefficients = components.encode(samples.patches)
            _start_digit_basis(
                basis, table, components, allocate(coefficients, samples.weights, components.scales, count)
            )
        _read_coefficients(net.decoder, net.digits)


def _start_basis(basis: Basis, components: Components) -> None:
    basis.mean.copy_(components.mean)
    basis.bias.copy_(components.mean)
    basis.analysis.copy_(components.vectors / components.scales[:, None])
    basis.synthesis.copy_((components.vectors * components.scales[:, None]).T)


def _start_digit_basis(basis: Basis, table: DigitTable, components: Components, allocation: Allocation) -> None:
    counts = allocation.counts
    table.step.copy_(allocation.steps.half())  # as they will be stored
    table.component.copy_(torch.arange(len(counts)).repeat_interleave(counts))
    table.power.copy_(torch.cat([torch.arange(int(number)) for number in counts]))
    units = components.vectors * components.scales[:, None]  # what a unit of each coefficient is in pixels
    matrix, shift = _coefficients_of_values(table)
    basis.synthesis.copy_(units.T @ matrix)
    basis.bias.copy_(components.mean + shift @ units)


def _coefficients_of_values(table: DigitTable) -> tuple[Tensor, Tensor]:
    """Coefficients in the middle of their cells as matrix @ values + shift, of FSQ values. Returns [L, L], [L]."""
    component, channels = table.component.long(), torch.arange(len(table.component))
    cells = FSQ_LEVELS ** component.bincount(minlength=len(table.step))
    # A value is (digit - 2) / 2, a coefficient step * (sum of digit * 4^power - cells // 2); without digits it is 0.
    matrix = torch.zeros(len(table.step), len(component))
    matrix[component, channels] = 2 * table.step[component] * FSQ_LEVELS ** table.power.long()
    return matrix, table.step * (2 * (cells - 1) / 3 - cells // 2)


def _read_coefficients(decoder: Decoder, digits: Digits) -> None:
    """Mixtures of coefficients for input: two thirds of the channels as stills have them, the rest as clips."""
    weight, constant = decoder.input_layer.weight, len(decoder.input_layer.weight) - 1
    stills = 2 * len(weight) // 3
    for rows, table in ((slice(0, stills), digits.still), (slice(stills, constant), digits.moving)):
        matrix, shift = _coefficients_of_values(table)
        # No bias in the decoder; the table of positions, the same everywhere at first, stands in for it.
        decoder.pos_embedder.position_embedding.weight[:, rows] = weight[rows] @ shift
        weight[rows] = weight[rows] @ matrix


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
    """No correction of the mean yet; the log variance at which noise and KL are in balance.

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
