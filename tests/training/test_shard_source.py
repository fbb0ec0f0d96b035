"""Shards as a source: the same samples for everybody, bad ones replaced up to a share, nothing opened or made twice."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.shard_files import (
    IMAGES,
    STAGE,
    captions,
    corpus_of,
    picture,
    source_of,
    write_images,
)
from training import shard_source
from training.batches import Sample
from training.generated import Generated
from training.shard_file import OpenShard, Record
from training.shard_source import BadSamplesError, ShardSource, tries_of
from training.shards import Shard, ShardWriter, open_shards


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each shard is opened."""
    found: Counter[str] = Counter()

    def counted(place: str, stopped: threading.Event) -> OpenShard:
        found[place] += 1
        return OpenShard(place, stopped)

    monkeypatch.setattr(shard_source, "OpenShard", counted)
    return found


def never_decode(monkeypatch: pytest.MonkeyPatch, bad: float = 0.0) -> None:
    """Samples are their captions alone; a share of them is bad by chance."""
    (sample,) = Generated(sides=(16, 16)).draw("image_rec", [0])

    def made(record: Record, kind: str, stage: object, rng: np.random.Generator) -> Sample:
        if rng.random() < bad:
            raise TypeError("a decoder fails in its own way")
        return Sample(sample.item, record.caption)

    monkeypatch.setattr(shard_source, "sample_of", made)


def test_an_epoch_has_every_sample_once(tmp_path: Path) -> None:
    """Ten samples in shards of 2, 2, 2, 2, 1, 1: with each a lane, those of the last would come twice as often."""
    corpus = corpus_of([*write_images(tmp_path, 9, each=15_000), *write_images(tmp_path, 1, "last")])
    assert [shard.count for shard in corpus.shards] == [2, 2, 2, 2, 1, 1]
    assert len(set(captions(source_of(corpus), range(10)))) == 10


def test_resumed_or_shared_it_is_the_same_samples(tmp_path: Path) -> None:
    corpus = corpus_of(write_images(tmp_path, 12, each=15_000))
    with contextlib.closing(source_of(corpus, workers=1)) as source:
        straight = [source.draw("image_rec", range(first, first + 4)) for first in range(0, 40, 4)]
    with contextlib.closing(source_of(corpus, workers=4)) as source:
        source.ahead("image_rec", range(22, 26))
        later = [source.draw("image_rec", range(first, first + 4)) for first in range(20, 40, 4)]
    with contextlib.closing(source_of(corpus, ranks=2)) as source:
        of_rank = source.draw("image_rec", range(1, 40, 2))
    flat = [sample for step in straight for sample in step]
    for one, other in zip(flat[20:], [sample for step in later for sample in step], strict=True):
        assert one.caption == other.caption
        np.testing.assert_array_equal(one.item.pixels, other.item.pixels)  # type: ignore[union-attr]
    for one, other in zip(flat[1::2], of_rank, strict=True):
        np.testing.assert_array_equal(one.item.pixels, other.item.pixels)  # type: ignore[union-attr]


def test_another_stage_has_another_order(tmp_path: Path) -> None:
    corpus = corpus_of(write_images(tmp_path, 12))
    later = source_of(corpus, stage=replace(IMAGES, name="later"))
    assert captions(source_of(corpus), range(12)) != captions(later, range(12))


def test_kinds_in_turn_are_made_ahead_and_only_once(
    tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step draws them: distill, then a task, each where it stands in the order."""
    never_decode(monkeypatch)
    corpus = corpus_of(write_images(tmp_path, 64, each=8 * 7_000))
    with contextlib.closing(source_of(corpus, stage=replace(IMAGES, distill=8), workers=1)) as source:
        for first in range(0, 64, 8):
            for kind, at in (("distill", first), ("image_rec", first + 32)):
                assert len(source.draw(kind, range(at, at + 8))) == 8  # type: ignore[arg-type]
                if first < 56:
                    source.ahead(kind, range(at + 8, at + 16))  # type: ignore[arg-type]
        assert source.drawn == 2 * 64
        assert not source._ahead
    # Both kinds read all shards, and lanes begin and end in the middle of some.
    assert opened.total() <= 3 * len(corpus.shards)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (None, None)])
def test_more_corpora_than_one_are_read_without_opening_again_and_again(
    weights: Sequence[float | None], tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    never_decode(monkeypatch)
    shards = write_images(tmp_path, 64, each=15_000)
    corpora = [corpus_of(shards[start::2], weight) for start, weight in enumerate(weights)]
    captions(source_of(*corpora, lanes=8, workers=1), range(64))
    assert len(shards) == 32
    assert max(opened.values()) <= 2


def test_threads_share_a_shelf_that_is_too_small(tmp_path: Path) -> None:
    """Shards are put away while others read them: nobody may get the bytes of another file."""
    corpus = corpus_of(write_images(tmp_path, 40, each=8_000))
    wanted = captions(source_of(corpus), range(200))
    source = source_of(corpus, workers=8)
    source._shelf._most = 1
    assert captions(source, range(200)) == wanted


def test_bad_samples_are_counted_said_once_and_replaced(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "images") as writer:
        for number in range(20):
            media = b"\x89PNG broken" if number == 7 else picture(number)
            writer.write(Record(f"s{number}", "png", media, f"it {number}"))
    corpus = corpus_of(open_shards([str(tmp_path)]))
    said: list[str] = []
    with contextlib.closing(source_of(corpus, log=said.append, most_bad=0.2)) as source:
        seen = [sample.caption for sample in source.draw("image_rec", range(40))]
    assert "it 7" not in seen
    bad = source.left_out()
    assert bad == sum(source.bad.values()) >= 2
    assert "sample 7: left out" in said[0]
    source.close()
    assert said[1:] == [
        f"stage asset: {bad} of {40 + bad} samples that were drawn cannot be used (unsupported_media_type {bad})"
    ]


def test_bad_samples_past_the_share_end_the_run_and_chance_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = corpus_of(write_images(tmp_path, 40))
    # Of 64 ranks that see half of what is allowed, every second run would have ended.
    never_decode(monkeypatch, bad=0.005)
    for seed in range(8):
        with contextlib.closing(source_of(corpus, seed=seed, patience=200)) as source:
            source.draw("image_rec", range(1000))
    never_decode(monkeypatch, bad=0.03)
    with (
        contextlib.closing(source_of(corpus)) as source,
        pytest.raises(BadSamplesError, match=r"cannot be used \(TypeError \d+\); 1\.0% are allowed"),
    ):
        source.draw("image_rec", range(4000))
    never_decode(monkeypatch, bad=1.0)
    with (
        contextlib.closing(source_of(corpus)) as source,
        pytest.raises(BadSamplesError, match=r"16 samples in a row cannot be used, of which 1\.0% may be bad"),
    ):
        source.draw("image_rec", [0])


def test_many_bad_ones_in_a_row_end_no_run_that_allows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 85 % bad ones, 16 come in a row every fourteenth time; what ends the run is the share alone."""
    corpus = corpus_of(write_images(tmp_path, 40))
    never_decode(monkeypatch, bad=0.85)
    with contextlib.closing(source_of(corpus, most_bad=0.95)) as source:
        assert len(source.draw("image_rec", range(400))) == 400
        assert source.drawn > 2 * source.patience
    with (
        contextlib.closing(source_of(corpus, most_bad=0.6)) as source,
        pytest.raises(BadSamplesError, match=r"cannot be used \(TypeError \d+\); 60\.0% are allowed"),
    ):
        source.draw("image_rec", range(400))
    assert [tries_of(share) for share in (0.0, 0.01, 0.5, 0.95, 1.0)] == [16, 16, 30, 405, 1000]
    assert all(share ** tries_of(share) < 1e-9 for share in (0.01, 0.3, 0.5, 0.9, 0.97))


def test_the_order_is_of_lanes_shards_and_weights_and_not_of_places(tmp_path: Path) -> None:
    shards = write_images(tmp_path, 12)
    corpus = corpus_of(shards)
    same = source_of(corpus_of([replace(shard, place=f"/other/{shard.name}") for shard in shards]), ranks=2, workers=1)
    plain = source_of(corpus).order()
    assert same.order() == plain
    assert plain["images"].startswith(f"12 in {len(shards)} shards, ")
    others = (
        source_of(corpus, lanes=4),
        source_of(corpus_of(shards[::-1])),
        source_of(corpus_of(shards[1:])),
        source_of(corpus_of(shards, 0.5)),
        source_of(corpus_of(shards[:1]), corpus_of(shards[1:])),
        source_of(corpus_of([replace(shards[0], count=3), *shards[1:]])),
    )
    for other in others:
        assert other.order() != plain
        other.close()


def test_a_cut_shard_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its 100 samples the last 70 are gone: more in a row than would ever be tried one after the other."""
    never_decode(monkeypatch)
    (shard,) = write_images(tmp_path, 100, each=10**9)
    path = Path(shard.place)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    said: list[str] = []
    seen = captions(source_of(corpus_of([shard]), log=said.append, most_bad=0.8), range(200))
    assert len(seen) == 200
    assert len(set(seen)) == 30
    assert max(Counter(seen).values()) == 8  # they take the places of the others in turn, in both epochs
    assert said[0] == f"{path}: unexpected end of data; 30 samples of 100 are used"
    assert said[1:] == ["stage asset: 70 of 100 images cannot be read"]


def test_a_shard_that_cannot_be_read_is_replaced_by_others_up_to_the_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_decode(monkeypatch)
    shards = write_images(tmp_path, 160, each=280_000)
    assert shards[1].count > 2 * shard_source.TRIES
    Path(shards[1].place).unlink()
    said: list[str] = []
    for lanes in (1, 8):
        source = source_of(corpus_of(shards), log=said.append, most_bad=0.5, lanes=lanes)
        seen = captions(source, range(320))
        assert len(seen) == 320
        assert len(set(seen)) == 160 - shards[1].count
    assert len([line for line in said if not line.startswith("stage ")]) == 2
    assert f"0 samples of {shards[1].count} are used" in said[0]
    with pytest.raises(
        BadSamplesError, match=rf"\d of 160 images cannot be read .*{shards[1].name}.*1\.0% may be lost"
    ):
        captions(source_of(corpus_of(shards)), range(160))


def test_an_index_of_another_shard_is_told(tmp_path: Path) -> None:
    (shard,) = write_images(tmp_path, 8, each=10**9)
    for count, most_bad in ((5, 0.01), (16, 0.6)):
        said: list[str] = []
        captions(source_of(corpus_of([Shard(shard.place, count)]), log=said.append, most_bad=most_bad), range(20))
        assert said[0] == f"{shard.place}: 8 samples, {count} by the index, which is of another shard"


def test_closing_ends_what_was_begun_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run that was told to stop would decode its whole next step first."""
    begun = threading.Event()

    def slow(*_: Any) -> Sample:
        begun.set()
        time.sleep(0.05)
        raise ValueError

    monkeypatch.setattr(shard_source, "sample_of", slow)
    source = source_of(corpus_of(write_images(tmp_path, 8)), workers=1, most_bad=1.0)
    source.ahead("image_rec", range(1000))
    begun.wait()
    source.close()
    assert source.drawn == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
    assert not source._shelf._held


def test_a_draw_that_failed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(corpus_of(write_images(tmp_path, 8)))
    with contextlib.closing(source), monkeypatch.context() as patch:
        never_decode(patch, bad=1.0)
        source.ahead("image_rec", range(4))
        with pytest.raises(BadSamplesError):
            source.draw("image_rec", range(4))
        never_decode(patch)
        assert len(source.draw("image_rec", range(4))) == 4


def test_what_a_stage_cannot_work_with_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of([Shard("x.tar", 1)])
    with pytest.raises(ValueError, match="stage asset draws video_rec: no shards of videos are given"):
        ShardSource({"images": [corpus]}, STAGE)
    with pytest.raises(ValueError, match="0 lanes; wanted 1 or more"):
        source_of(corpus, lanes=0)
