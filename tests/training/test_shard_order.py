"""Number n by arithmetic: every sample once in an epoch, whatever the sizes of shards; shares as asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.training.shard_files import corpus_of
from training.shard_order import Corpus, Mixture, Place
from training.shards import Shard


def shards_of(*counts: int, folder: str = "") -> list[Shard]:
    return [Shard(f"{folder}{index}.tar", count) for index, count in enumerate(counts)]


def places(mixture: Mixture, numbers: range) -> list[Place]:
    return [mixture.place(number) for number in numbers]


@pytest.mark.parametrize("lanes", [1, 3, 8, 50])
@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (9, 1, 5, 0, 3), (7, 7, 7, 7, 7, 7, 7, 1), (2,)])
def test_every_epoch_has_every_sample_once_in_another_order(counts: tuple[int, ...], lanes: int) -> None:
    total = sum(counts)
    mixture = Mixture([corpus_of(shards_of(*counts))], [0], lanes)
    epochs = [places(mixture, range(total * epoch, total * (epoch + 1))) for epoch in range(3)]
    wanted = {Place(shard, index) for shard in shards_of(*counts) for index in range(shard.count)}
    for epoch in epochs:
        assert len(epoch) == total
        assert set(epoch) == wanted
    if total > 2:
        assert epochs[0] != epochs[1] != epochs[2]
        assert places(Mixture([corpus_of(shards_of(*counts))], [1], lanes), range(total)) != epochs[0]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_reads_its_own_part(world: int) -> None:
    """Only shards in which one part ends and the next begins are read by two ranks."""
    total = 40 * 10 - 3
    mixture = Mixture([corpus_of(shards_of(*[10] * 39, 7))], [0], 8)
    read = Counter(
        name for rank in range(world) for name in {mixture.place(n).shard.name for n in range(rank, total, world)}
    )
    assert len(read) == 40
    assert sum(count > 1 for count in read.values()) <= 8
    assert max(read.values()) <= 2


def test_neighbouring_numbers_keep_to_a_few_shards() -> None:
    mixture = Mixture([corpus_of(shards_of(*[100] * 40))], [0], 8)
    for first in range(0, 4000, 160):
        assert len({place.shard for place in places(mixture, range(first, first + 160))}) <= 16


def test_the_order_goes_with_the_data_to_another_machine() -> None:
    here, there = (
        Mixture([Corpus(name=folder, shards=tuple(shards_of(5, 6, folder=folder)))], [0], 4)
        for folder in ("data/", "http://elsewhere/")
    )
    for number in range(30):
        one, other = here.place(number), there.place(number)
        assert (one.shard.name, one.index) == (other.shard.name, other.index)


def test_shares() -> None:
    a, b = shards_of(3, 2), shards_of(7, 8, folder="b/")
    for weights, wanted in (((1.0, 3.0), 250), ((2.0, 0.0), 1000), ((0.001, 0.999), 1)):
        mixture = Mixture([corpus_of(a, weights[0]), corpus_of(b, weights[1])], [0], 8)
        for first in (0, 16_000):
            drawn = places(mixture, range(first, first + 8000))
            assert sum(place.shard in a for place in drawn) == 8 * wanted
        # The samples of each in their own epochs.
        of_b = Counter(place for place in drawn if place.shard not in a)
        assert not of_b or max(of_b.values()) - min(of_b.values()) <= 2
    mixed = Mixture([corpus_of(a, 1.0), corpus_of(b, 1.0)], [0], 8)
    for first in range(0, 160, 16):
        assert {place.shard in a for place in places(mixed, range(first, first + 16))} == {True, False}


def test_without_weights_every_sample_weighs_the_same() -> None:
    """A corpus of less than a thousandth is not lost."""
    mixture = Mixture([corpus_of(shards_of(1)), corpus_of(shards_of(4000, folder="b/"))], [0], 8)
    assert sum(place.shard.place == "0.tar" for place in places(mixture, range(4001))) == 1


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0, float("inf")), (1.0, 0.0001)])
def test_weights_without_sense_are_refused(weights: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="wanted each 0 or at least 1/1000"):
        Mixture([corpus_of(shards_of(3), weight) for weight in weights], [0], 8)


def test_what_has_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="some of c, c have a weight"):
        Mixture([corpus_of(shards_of(3), 1.0), corpus_of(shards_of(3))], [0], 8)
    with pytest.raises(ValueError, match="no samples in c"):
        Mixture([corpus_of(shards_of(0, 0))], [0], 8)
    Mixture([corpus_of(shards_of(0), 0.0), corpus_of(shards_of(3), 1.0)], [0], 8)


def test_far_numbers_cost_no_more() -> None:
    mixture = Mixture([corpus_of(shards_of(*[1000] * 2000))], [0], 8)
    assert mixture.place(10**12) == mixture.place(10**12)
    assert mixture.place(10**12) != mixture.place(10**12 + 8)
