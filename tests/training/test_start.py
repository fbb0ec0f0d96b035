from dataclasses import replace

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
from training.expert_fit import fit_path_experts
from training.held_out import pca_codec
from training.linear_fit import fit_linear_decoder
from training.losses import reconstruction
from training.pca import Components, fit_components
from training.start import start_at


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
        wanted = pca_codec(basis.first(46), net.config)(pixels)  # two latents are marks
        # Float sums in another order may fall on the other side of a half.
        difference = np.abs(back.astype(int) - wanted)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


def test_the_first_posterior_is_narrow_where_a_channel_matters(net: ATokenNet) -> None:
    latents = tokenizer(net).encode([Image(pixels=scene(2, 64, 64))] * 2, seeds=[None, 7])
    spread = np.abs(latents[1].latents - latents[0].latents).mean(0)
    assert 0 < spread[0] < spread[45] < 0.2
    assert 0 < spread[46:].max() < net.linear_path.still_experts.mark_step / 2


def test_the_first_embedding_is_the_mean_of_the_features(net: ATokenNet) -> None:
    tokens: Tokens = tokenizer(net).encode([Image(pixels=scene(3, 64, 80))], ["features", "embedding"])[0]
    mean = tokens.features.mean(0)
    mean[-1] = 0
    assert np.allclose(tokens.embedding, mean / np.linalg.norm(mean), atol=1e-5)


def test_experts_and_neighbours_lower_the_error(components: tuple[Components, Components], library: Library) -> None:
    batches = [training_batch(1, step, library, SMALL, VARIANTS["tiny-continuous"]) for step in range(12)]
    held = training_batch(2, 0, library, SMALL, VARIANTS["tiny-continuous"])
    for variant in ("tiny-continuous", "tiny-discrete"):
        torch.manual_seed(0)
        net = build(replace(VARIANTS[variant], experts=4, marks=1))
        start_at(net, *components, LossConfig())
        assert net.linear_path is not None
        errors = [error(net, held)]
        fit_path_experts(net.linear_path, batches, 2e-4, seed=0)
        errors.append(error(net, held))
        fit_linear_decoder(net, batches, 2e-4)
        errors.append(error(net, held))
        assert errors[0] - 0.1 > errors[1]
        assert errors[1] - 0.005 > errors[2]


def error(net: ATokenNet, packed: PackedTokens) -> float:
    latents = net.linear_path.encode(packed.feats, packed.moving)
    if net.config.bottleneck == "fsq":
        latents = net.quantize(latents, packed.moving)
    with torch.no_grad():
        decoded = net.decode(packed.with_feats(latents))
    return float(reconstruction(decoded, packed, net.config, 2e-4)[1])
