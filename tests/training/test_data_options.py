"""What the options of the data do: weights of corpora, and the share of samples that may be lost."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import pytest

from tests.training.shard_files import IMAGES, captions, write_images
from training.curriculum_cli import corpora_of, parser, shards_of
from training.shard_source import BadSamplesError, ShardSource


def source(*words: str) -> ShardSource:
    given = parser().parse_args(["tiny", *words])
    return shards_of(given, corpora_of(given), seed=0, ranks=1, stage=IMAGES)


@pytest.mark.parametrize(("weights", "shares"), [(("", ""), (200, 200)), (("@3", "@1"), (300, 100))])
def test_corpora_are_drawn_by_their_weights(weights: tuple[str, str], shares: tuple[int, int], tmp_path: Path) -> None:
    words = []
    for name, weight in zip(("birds", "ships"), weights, strict=True):
        write_images(tmp_path / name, 8, name)
        words += ["--images", f"{tmp_path / name}{weight}"]
    drawn = Counter(caption.split()[0] for caption in captions(source(*words), range(400)))
    assert (drawn["birds"], drawn["ships"]) == pytest.approx(shares, abs=4)


def test_weights_of_every_modality_are_read(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b@home", 2)
    words = [
        "--images",
        f"{tmp_path / 'a'}@2",
        "--videos",
        f"{tmp_path / 'a'}@0.5",
        "--assets",
        str(tmp_path / "b@home"),
    ]
    found = corpora_of(parser().parse_args(["tiny", *words]))
    assert {name: [corpus.weight for corpus in given] for name, given in found.items()} == {
        "images": [2.0],
        "videos": [0.5],
        "assets": [None],  # the name of a folder, not a weight
    }


def test_how_many_samples_may_be_lost(tmp_path: Path) -> None:
    """The one shard is cut: 8 samples by its index, fewer in it."""
    (shard,) = write_images(tmp_path, 8, each=10**6)
    data = Path(shard.place).read_bytes()
    Path(shard.place).write_bytes(data[: len(data) // 2])
    words = ["--images", str(tmp_path)]
    assert len(captions(source(*words, "--most-bad", "0.9"), range(20))) == 20
    for few in (["--most-bad", "0.2"], []):
        with (
            contextlib.closing(source(*words, *few)) as given,
            pytest.raises(BadSamplesError, match=f"{'20.0' if few else '1.0'}% may be lost"),
        ):
            given.draw("image_rec", range(20))
