"""Drawn samples: always the same, of every kind, packed whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.training.tiny_run import recipe
from training.batches import Sample, micro_batches, pack_samples, share, tokens_of
from training.data import pack_items
from training.generated import COLOURS, KINDS, Generated, hash_tokens

MODEL = recipe().model(recipe().stage("asset"))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_n_is_always_the_same(kind: str) -> None:
    source = Generated(seed=3)
    straight = source.draw(kind, range(6))  # type: ignore[arg-type]
    again = [Generated(seed=3).draw(kind, [number])[0] for number in (4, 1)]  # type: ignore[arg-type]
    for sample, other in zip([straight[4], straight[1]], again, strict=True):
        assert sample.caption == other.caption
        for name in ("pixels", "frames", "coords", "feats"):
            if hasattr(sample.item, name):
                np.testing.assert_array_equal(getattr(sample.item, name), getattr(other.item, name))
    assert len({sample.caption for sample in source.draw(kind, range(40))}) > 8  # type: ignore[arg-type]


def test_captions_are_true() -> None:
    for sample in Generated(sides=(64, 64)).draw("asset_rec", range(10)):
        colour = np.array(COLOURS[sample.caption.split()[1]])
        mean = sample.item.feats.reshape(-1, 3).mean(0)  # type: ignore[union-attr]
        np.testing.assert_allclose(mean / mean.max(), colour / colour.max(), atol=0.02)
    right = next(s for s in Generated(sides=(64, 64)).draw("video_sem", range(99)) if s.caption.endswith("moves right"))
    frames = right.item.frames.astype(float)  # type: ignore[union-attr]
    changed = np.abs(frames[-1] - frames[0]).sum(2)
    assert changed.max() > 30


def test_passes_hold_whole_items_within_the_budget() -> None:
    samples = Generated(sides=(16, 64)).draw("distill", range(30))
    passes = list(micro_batches(samples, range(30), MODEL, budget=20))
    assert [number for micro in passes for number in micro.numbers] == list(range(30))
    for micro in passes:
        assert len(micro.packed) <= 20 or len(micro) == 1
        assert micro.items[-1] == len(micro.packed) == sum(tokens_of(s.item, MODEL) for s in micro.samples)
    whole = pack_samples(samples, range(30), MODEL).packed
    torch.testing.assert_close(torch.cat([micro.packed.feats for micro in passes]), whole.feats)
    old = pack_items([sample.item for sample in samples], MODEL)
    torch.testing.assert_close(whole.feats, old.feats[:, : whole.feats.shape[1]])
    assert not old.feats[:, whole.feats.shape[1] :].any()
    with pytest.raises(ValueError, match="no sample to pack"):
        pack_samples([], [], MODEL)


def test_ranks_share_without_overlap() -> None:
    parts = [list(share(7, 10, rank, 3)) for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(7, 17))


def test_hashed_words() -> None:
    ids = hash_tokens(["a red disc", "A red  disc", "a blue disc"])
    assert ids.shape == (3, 64)
    assert torch.equal(ids[0], ids[1])
    assert (ids[0] != ids[2]).sum() == 1
    assert (ids[0, 3:] == 0).all()
    assert Sample(Generated().draw("distill", [0])[0].item).caption == ""
