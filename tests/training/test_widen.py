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


def test_what_does_not_fit_is_named() -> None:
    state = fresh(WIDE, 0).state_dict()
    with pytest.raises(ValueError, match="from 48 channels, gaussian, to 32, gaussian; wanted as many"):
        widen_latents(state, WIDE, NARROW, seed=0)
    with pytest.raises(ValueError, match="never back from codes"):
        widen_latents(state, CODES, WIDE, seed=0)
    other = replace(WIDE, decoder=replace(WIDE.decoder, blocks=2))
    with pytest.raises(ValueError, match=r"1 \+ 1 blocks of width 32 .* does not fit a stage of 1 \+ 2 blocks"):
        widen_latents(state, WIDE, other, seed=0)
