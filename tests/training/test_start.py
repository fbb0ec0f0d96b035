import numpy as np
import torch

from media.types import Image, Tokens, Video
from model import Tokenizer
from model.config import VARIANTS
from model.network import ATokenNet, build
from model.packed import PackedTokens
from tests.training.conftest import SMALL, scene
from training.config import LossConfig
from training.data import Library, training_batch
from training.held_out import pca_codec
from training.linear_fit import fit_linear_decoder
from training.losses import reconstruction
from training.pca import Components, fit_components
from training.start import start_at, start_digits


def tokenizer(net: ATokenNet) -> Tokenizer:
    return Tokenizer(net, name="start", revision="0")


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(500, 20, generator=generator) @ torch.randn(20, 20, generator=generator) + 3
    found = fit_components(patches.split(123), 6)
    _, scales, vectors = torch.linalg.svd((patches - patches.mean(0)).double(), full_matrices=False)
    assert torch.allclose(found.scales.double(), scales[:6] / 500**0.5, rtol=1e-4)
    assert torch.allclose((found.vectors.double() @ vectors[:6].T).abs(), torch.eye(6).double(), atol=1e-3)
    assert torch.allclose(found.encode(patches).var(0, correction=0), torch.ones(6), rtol=1e-3)


def test_step_0_is_exactly_the_linear_codec(net: ATokenNet, components: tuple[Components, Components]) -> None:
    picture = scene(1, 64, 96)
    clip = np.stack([scene(seed, 48, 64) for seed in range(8)])
    tokens = tokenizer(net).encode([Image(pixels=picture), Video(frames=clip)])
    image, video = tokenizer(net).decode(tokens)
    for back, pixels, basis in ((image.pixels, picture, components[0]), (video.frames, clip, components[1])):
        wanted = pca_codec(basis.first(48), net.config)(pixels)
        # Float sums in another order may fall on the other side of a half.
        difference = np.abs(back.astype(int) - wanted)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_the_first_posterior_is_narrow_where_a_channel_matters(net: ATokenNet) -> None:
    latents = tokenizer(net).encode([Image(pixels=scene(2, 64, 64))] * 2, seeds=[None, 7])
    spread = np.abs(latents[1].latents - latents[0].latents).mean(0)
    assert 0 < spread[0] < spread[47] < 0.2


def test_the_first_embedding_is_the_mean_of_the_features(net: ATokenNet) -> None:
    tokens: Tokens = tokenizer(net).encode([Image(pixels=scene(3, 64, 80))], ["features", "embedding"])[0]
    mean = tokens.features.mean(0)
    mean[-1] = 0
    assert np.allclose(tokens.embedding, mean / np.linalg.norm(mean), atol=1e-5)


def test_digits_and_neighbours_lower_the_error(
    components: tuple[Components, Components], net: ATokenNet, library: Library
) -> None:
    batches = [training_batch(1, step, library, SMALL, net.config) for step in range(12)]
    held = training_batch(2, 0, library, SMALL, net.config)
    torch.manual_seed(0)
    discrete = build(VARIANTS["tiny-discrete"])
    start_at(discrete, *components, LossConfig())
    start_digits(discrete, *components, batches)
    for table in (discrete.digits.still, discrete.digits.moving):
        counts = table.component.bincount(minlength=48)
        assert counts.sum() == 48
        assert counts[0] == counts.max() > 1
    for network in (net, discrete):
        before = error(network, held)
        fit_linear_decoder(network, batches, 2e-4)
        assert error(network, held) < before - 0.01


def error(net: ATokenNet, packed: PackedTokens) -> float:
    latents = net.linear_path.encode(packed.feats, packed.moving)
    if net.digits is not None:
        latents = net.quantize(latents, packed.moving)
    with torch.no_grad():
        decoded = net.decode(packed.with_feats(latents))
    return float(reconstruction(decoded, packed, net.config, 2e-4)[1])


def test_digits_come_back_as_the_middle_of_their_cell(
    components: tuple[Components, Components], library: Library
) -> None:
    net = build(VARIANTS["tiny-discrete"])
    start_at(net, *components, LossConfig())
    start_digits(net, *components, [training_batch(1, step, library, SMALL, net.config) for step in range(4)])
    packed = training_batch(3, 0, library, SMALL, net.config)
    coefficients = net.linear_path.encode(packed.feats, packed.moving)
    decoded = net.linear_path.decode(net.quantize(coefficients, packed.moving), packed, 768)[~packed.moving]
    again = components[0].first(48).encode(decoded.detach())
    table = net.digits.still
    cells = 4 ** table.component.bincount(minlength=48)
    wanted = coefficients[~packed.moving].detach()
    cell = wanted / table.step + cells // 2
    inside = (cells > 1) & (cell > -0.5) & (cell < cells - 0.5)
    assert inside.any()
    off = (again - wanted).abs() / table.step
    assert off[inside].max() <= 0.5 + 1e-2


def test_coefficients_near_0_come_back_as_0(components: tuple[Components, Components], library: Library) -> None:
    net = build(VARIANTS["tiny-discrete"])
    start_at(net, *components, LossConfig())
    start_digits(net, *components, [training_batch(1, step, library, SMALL, net.config) for step in range(4)])
    packed = training_batch(3, 0, library, SMALL, net.config)
    for table, basis, rows in (
        (net.digits.still, components[0], ~packed.moving),
        (net.digits.moving, components[1], packed.moving),
    ):
        noise = torch.rand(len(packed), 48, generator=torch.Generator().manual_seed(0)) - 0.5
        values = net.quantize(0.99 * noise * table.step, packed.moving)
        decoded = net.decode(packed.with_feats(values))[rows, : len(basis.mean)]
        assert len(decoded) > 0
        assert torch.allclose(decoded, basis.mean.expand_as(decoded), atol=1e-4)


def test_the_decoder_of_codes_reads_coefficients(components: tuple[Components, Components], library: Library) -> None:
    """Its first layer of whole steps must be a linear map of them: what it was before there were digits."""
    torch.manual_seed(0)
    net = build(VARIANTS["tiny-discrete"])
    start_at(net, *components, LossConfig())
    before = net.decoder.input_layer.weight.detach().clone()
    start_digits(net, *components, [training_batch(1, step, library, SMALL, net.config) for step in range(4)])
    packed = training_batch(3, 0, library, SMALL, net.config)
    for table, channels, rows in (
        (net.digits.still, slice(0, 96), ~packed.moving),
        (net.digits.moving, slice(96, 143), packed.moving),
    ):
        cells = 4 ** table.component.bincount(minlength=48)
        share = torch.rand(len(packed), 48, generator=torch.Generator().manual_seed(0))
        coefficients = ((share * cells).floor() - cells // 2) * table.step
        values = net.quantize(coefficients, packed.moving)
        position = net.decoder.pos_embedder.position_embedding.weight[0]
        read = net.decoder.input_layer(values) + position
        wanted = coefficients @ before.T
        assert torch.allclose(read[rows, channels], wanted[rows, channels], atol=1e-3)
