"""A wider latent gives back what the narrow one gave."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.network import build
from tests.training.tiny_run import recipe
from training.batches import pack_samples
from training.fresh import fresh
from training.generated import Generated
from training.widen import widen_latents

PLAN = recipe()
NARROW, WIDE, CODES = (PLAN.model(PLAN.stage(name)) for name in ("image", "video", "fsq"))


def test_reconstructions_stay_and_new_channels_learn() -> None:
    old, new = fresh(NARROW, 0), build(WIDE)
    new.load_state_dict(widen_latents(old.state_dict(), NARROW, WIDE, seed=0))
    packed = pack_samples(Generated().draw("video_rec", range(2)), [0, 1], NARROW).packed
    means, decoded = [], []
    for net in (old, new):
        mean, logvar = net.posterior(net.encode(packed), packed)
        means.append((mean, logvar))
        decoded.append(net.decode(packed.with_feats(mean)))
    torch.testing.assert_close(decoded[1], decoded[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[1][0][:, :32], means[0][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(means[1][1][:, :32], means[0][1], atol=1e-6, rtol=0)
    assert (means[1][1][:, 32:] == 0).all()
    assert (means[1][0][:, 32:].std(0) > 0).all()
    decoded[1].square().sum().backward()
    assert new.decoder.input_layer.weight.grad is not None
    assert (new.decoder.input_layer.weight.grad[:, 32:].abs().sum(0) > 0).all()


def test_codes_are_of_the_mean() -> None:
    old, new = fresh(WIDE, 0), build(CODES)
    new.load_state_dict(widen_latents(old.state_dict(), WIDE, CODES, seed=0))
    assert torch.equal(new.proj.weight, old.proj.weight)


def test_samples_stay_too() -> None:
    """New channels are noise of width 1 at first; the decoder does not hear it."""
    old, new = fresh(NARROW, 0), build(WIDE)
    new.load_state_dict(widen_latents(old.state_dict(), NARROW, WIDE, seed=0))
    packed = pack_samples(Generated().draw("video_rec", range(2)), [0, 1], NARROW).packed
    noise = torch.randn(len(packed), 48, generator=torch.Generator().manual_seed(0))
    decoded = []
    with torch.no_grad():
        for net, channels in ((old, 32), (new, 48)):
            mean, logvar = net.posterior(net.encode(packed), packed)
            decoded.append(net.decode(packed.with_feats(mean + (logvar / 2).exp() * noise[:, :channels])))
    torch.testing.assert_close(decoded[1], decoded[0], atol=1e-6, rtol=0)


def test_the_seed_alone_decides_and_the_old_state_stays() -> None:
    state = fresh(NARROW, 0).state_dict()
    before = {name: value.clone() for name, value in state.items()}
    first, again, other = (widen_latents(state, NARROW, WIDE, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first["proj.weight"], again["proj.weight"])
    assert not torch.equal(first["proj.weight"], other["proj.weight"])
    first["decoder.out_layer.weight"].zero_()
    assert all(torch.equal(value, before[name]) for name, value in state.items())


def test_wider_and_to_codes_at_once() -> None:
    """The means that codes are made of lead; the first 32 are the old ones."""
    old, new = fresh(NARROW, 0), build(CODES)
    new.load_state_dict(widen_latents(old.state_dict(), NARROW, CODES, seed=0))
    packed = pack_samples(Generated().draw("image_rec", range(2)), [0, 1], NARROW).packed
    with torch.no_grad():
        wanted = old.quantize(old.posterior(old.encode(packed), packed)[0], packed.moving)
        found = new.quantize(new.posterior(new.encode(packed), packed)[0], packed.moving)
    assert (found[:, :32] == wanted).float().mean() > 0.999  # a sum in another order may cross a threshold


def test_what_does_not_fit_is_named() -> None:
    state = fresh(WIDE, 0).state_dict()
    with pytest.raises(ValueError, match="from 48 channels, gaussian, to 32, gaussian; wanted as many"):
        widen_latents(state, WIDE, NARROW, seed=0)
    with pytest.raises(ValueError, match="never back from codes"):
        widen_latents(state, CODES, WIDE, seed=0)
    other = replace(WIDE, decoder=replace(WIDE.decoder, blocks=2))
    with pytest.raises(ValueError, match=r"1 \+ 1 blocks of width 32 .* does not fit a stage of 1 \+ 2 blocks"):
        widen_latents(state, WIDE, other, seed=0)
    with pytest.raises(ValueError, match="linear path is fitted to its latent width"):
        widen_latents(state, replace(NARROW, linear_path=True), replace(WIDE, linear_path=True), seed=0)
    with pytest.raises(ValueError, match="50 channels do not split into 8 codebooks"):
        widen_latents(state, WIDE, replace(CODES, latent_channels=50), seed=0)
    with pytest.raises(ValueError, match=r"proj\.weight is \[96, 32\]; wanted \[64, 32\] for 32 latent channels"):
        widen_latents(state, NARROW, WIDE, seed=0)
    with pytest.raises(ValueError, match=r"proj\.weight is missing"):
        widen_latents({}, NARROW, WIDE, seed=0)
