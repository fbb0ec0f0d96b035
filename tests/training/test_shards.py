"""Shards: written whole, read to where they are broken, local and remote; as a source, exact in order and shares."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from media.errors import MediaError
from media.types import Image, Video, Voxels
from media.video import encode_video
from tests.training.tiny_run import recipe
from training.generated import Generated
from training.samples import fitted, random_scale, sample_of, voxels_bytes
from training.shard_source import BadSamplesError, Corpus, ShardSource
from training.shards import Record, Shard, ShardWriter, expand, open_shards, read_shard

STAGE = replace(recipe().stage("asset"), image_side=(16, 48), video_side=(16, 32), frames=(4, 8), strides=(1, 2))


def picture(seed: int, height: int = 40, width: int = 56) -> bytes:
    """A PNG whose upper left pixel says which one it is."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int, name: str = "images", each: int = 30_000) -> list[Shard]:
    with ShardWriter(folder, name, each) as writer:
        for number in range(count):
            writer.write(Record(f"{name}{number:04d}", "png", picture(number), f"{name} {number}"))
    return open_shards([str(folder / f"{name}-*.tar")])


def source_of(*corpora: Corpus, seed: int = 0, **options: object) -> ShardSource:
    stage = replace(STAGE, cycle=("image_rec",), batch={"image_rec": 4})
    return ShardSource({"images": corpora}, stage, seed=seed, log=lambda _: None, **options)  # type: ignore[arg-type]


def captions(source: ShardSource, numbers: range) -> list[str]:
    with contextlib.closing(source):
        return [sample.caption for sample in source.draw("image_rec", numbers)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = write_images(tmp_path, 10)
    assert len(shards) > 1
    assert sum(shard.count for shard in shards) == 10
    records = [record for shard in shards for record in read_shard(shard.place)[0]]
    assert [record.caption for record in records] == [f"images {number}" for number in range(10)]
    assert records[3].media == picture(3)
    assert records[3].suffix == "png"
    again = tmp_path / "again"
    write_images(again, 10)
    assert (again / shards[0].name).read_bytes() == Path(shards[0].place).read_bytes()
    assert sorted(path.suffix for path in again.iterdir()) == [".json"] + [".tar"] * len(shards)
    with tarfile.open(shards[0].place) as tar:  # as other tools see it
        assert tar.getnames()[:2] == ["images0000.png", "images0000.txt"]


def test_shards_of_others(tmp_path: Path) -> None:
    """Folders in the names, captions in a JSON, no index."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number in range(3):
            for suffix, data in (
                ("json", json.dumps({"caption": f"it is {number}"}).encode()),
                ("PNG", picture(number)),
            ):
                member = tarfile.TarInfo(f"part/{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (shard,) = open_shards([str(tmp_path)])
    assert shard.count == 3
    records, problem = read_shard(shard.place)
    assert problem is None
    assert [(record.suffix, record.caption) for record in records] == [("png", f"it is {n}") for n in range(3)]


@pytest.mark.parametrize("kept", [0.3, 0.62, 0.9])
def test_a_shard_that_was_cut_gives_what_is_whole(tmp_path: Path, kept: float) -> None:
    (shard,) = write_images(tmp_path, 8, each=10**9)
    path = Path(shard.place)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    records, problem = read_shard(shard.place)
    assert problem is not None
    assert shard.name in problem
    assert 0 < len(records) < 8
    assert all(record.media == picture(number) for number, record in enumerate(records))
    assert read_shard(str(tmp_path / "nothing.tar"))[1] is not None


def test_patterns() -> None:
    assert expand("a-{008..010}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar"]
    assert expand("a.tar") == ["a.tar"]
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such shard"):
        open_shards(["nowhere/a.tar"])
    with pytest.raises(FileNotFoundError, match=r"training\.prepare"):
        open_shards(["nowhere/*.tar"])


def test_keys_are_plain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"key 'a\.b'; wanted a name without dots"):
        ShardWriter(tmp_path, "x").write(Record("a.b", "png", b"", ""))


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        return


def test_remote_shards_give_the_same_samples(tmp_path: Path) -> None:
    local = write_images(tmp_path, 12)
    wanted = captions(source_of(Corpus(name="c", shards=tuple(local))), range(24))
    with served(tmp_path) as address:
        last = len(local) - 1
        remote = open_shards([f"{address}/images-{{000000..{last:06d}}}.tar"])
        assert [shard.count for shard in remote] == [shard.count for shard in local]
        assert captions(source_of(Corpus(name="c", shards=tuple(remote))), range(24)) == wanted
        with pytest.raises(FileNotFoundError, match=r"other\.tar is not in"):
            open_shards([f"{address}/other.tar"])
        with pytest.raises(ValueError, match=r"remote shards need the index"):
            open_shards([f"{address}/nowhere/a.tar"])


def test_every_epoch_has_every_sample_once_in_another_order(tmp_path: Path) -> None:
    corpus = Corpus(name="c", shards=tuple(write_images(tmp_path, 12, each=15_000)))
    assert len(corpus.shards) == 6
    seen = captions(source_of(corpus, lanes=3), range(36))
    epochs = [seen[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len(set(epochs[0])) == 12
    assert epochs[0] != epochs[1] != epochs[2]
    assert captions(source_of(corpus, lanes=3, seed=1), range(12)) != epochs[0]


def test_resumed_or_shared_it_is_the_same_samples(tmp_path: Path) -> None:
    corpus = Corpus(name="c", shards=tuple(write_images(tmp_path, 12, each=15_000)))
    with contextlib.closing(source_of(corpus, workers=1)) as source:
        straight = [source.draw("image_rec", range(first, first + 4)) for first in range(0, 40, 4)]
    with contextlib.closing(source_of(corpus, workers=4)) as source:
        later = [source.draw("image_rec", range(first, first + 4)) for first in range(20, 40, 4)]
    with contextlib.closing(source_of(corpus)) as source:
        of_rank = source.draw("image_rec", range(1, 40, 2))
    flat = [sample for step in straight for sample in step]
    for one, other in zip(flat[20:], [sample for step in later for sample in step], strict=True):
        assert one.caption == other.caption
        np.testing.assert_array_equal(one.item.pixels, other.item.pixels)  # type: ignore[union-attr]
    for one, other in zip(flat[1::2], of_rank, strict=True):
        np.testing.assert_array_equal(one.item.pixels, other.item.pixels)  # type: ignore[union-attr]


def test_a_rank_reads_its_own_shards_only(tmp_path: Path) -> None:
    shards = write_images(tmp_path, 16, each=15_000)
    assert len(shards) == 8
    corpus = Corpus(name="c", shards=tuple(shards))
    read: list[set[str]] = []
    for rank in range(2):
        with contextlib.closing(source_of(corpus, lanes=4)) as source:
            source.draw("image_rec", range(rank, 64, 2))
            read.append(set(source._cache._held))
    assert not read[0] & read[1]


def test_corpora_are_mixed_by_weight_and_by_size(tmp_path: Path) -> None:
    a, b = (tuple(write_images(tmp_path, count, name)) for name, count in (("aa", 3), ("bb", 9)))
    for weights, wanted in (((1.0, 3.0), 0.25), ((None, None), 0.25), ((1.0, 0.0), 1.0)):
        corpora = [Corpus(name=n, shards=s, weight=w) for n, s, w in zip("ab", (a, b), weights, strict=True)]
        share = np.mean([caption.startswith("aa") for caption in captions(source_of(*corpora), range(1000))])
        assert share == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(ValueError, match="wanted some above 0"):
        source_of(Corpus(name="a", shards=a, weight=0.0))


def test_bad_samples_are_counted_said_once_and_skipped(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "images") as writer:
        for number in range(20):
            media = b"\x89PNG broken" if number == 7 else picture(number)
            writer.write(Record(f"s{number}", "png", media, f"it {number}"))
    corpus = Corpus(name="c", shards=tuple(open_shards([str(tmp_path)])))
    said: list[str] = []
    stage = replace(STAGE, cycle=("image_rec",), batch={"image_rec": 4})
    with contextlib.closing(ShardSource({"images": [corpus]}, stage, log=said.append, most_bad=0.2)) as source:
        seen = [sample.caption for sample in source.draw("image_rec", range(40))]
    assert "it 7" not in seen
    assert sum(source.bad.values()) >= 2
    assert [line for line in said if "sample 7" in line] == said
    assert len(said) == 1
    strict = ShardSource({"images": [corpus]}, stage, log=said.append, most_bad=0.01, patience=10)
    with contextlib.closing(strict), pytest.raises(BadSamplesError, match=r"cannot be used .*1\.0% are allowed"):
        strict.draw("image_rec", range(100))


def test_a_cut_shard_does_not_end_the_run(tmp_path: Path) -> None:
    shards = write_images(tmp_path, 8, each=10**9)
    path = Path(shards[0].place)
    path.write_bytes(path.read_bytes()[:-30_000])
    said: list[str] = []
    stage = replace(STAGE, cycle=("image_rec",), batch={"image_rec": 4})
    corpus = Corpus(name="c", shards=tuple(shards))
    with contextlib.closing(ShardSource({"images": [corpus]}, stage, log=said.append, most_bad=1.0)) as source:
        assert len(source.draw("image_rec", range(16))) == 16
    assert any("unexpected end" in line or "ends after" in line or "end mark" in line for line in said), said
    assert any("the shard holds" in line for line in said)


def test_a_stage_without_its_data_is_refused() -> None:
    with pytest.raises(ValueError, match="stage asset draws video_rec: no shards of videos are given"):
        ShardSource({"images": [Corpus(name="c", shards=(Shard("x.tar", 1),))]}, STAGE)


@pytest.mark.parametrize("size", [(40, 56), (300, 90), (17, 500), (64, 64)])
def test_sizes_of_pictures(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)
    for _ in range(20):
        scale = random_scale(*size, (32, 128), rng)
        assert scale <= max(1.0, 32 / min(size))
        cut = fitted(frames, (32, 128), rng)
        height, width = cut.shape[1:3]
        assert height % 16 == width % 16 == 0
        assert max(height, width) <= 128
        assert min(height, width) >= (16 if max(size) / min(size) > 4 else 32)
    whole = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fitted(whole, (32, 64), rng), whole)


def test_clips_and_assets() -> None:
    clip = Generated(sides=(64, 64), frames=(40,)).draw("video_rec", [0])[0].item
    assert isinstance(clip, Video)
    film = Record("f", "mkv", encode_video(clip.frames, 8.0, "mkv"), "a film")
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(12):
        video = sample_of(film, "video_rec", STAGE, rng).item
        assert isinstance(video, Video)
        lengths.add(len(video.frames))
        assert max(video.frames.shape[1:3]) <= 32
    assert lengths == {4, 8}
    words = sample_of(film, "video_sem", STAGE, rng).item
    assert isinstance(words, Video)
    assert len(words.frames) == 8  # 40 frames at 8 a second are 5 seconds, rounded up to whole patches
    assert words.fps == 1.0
    voxels = Generated().draw("asset_rec", [0])[0].item
    assert isinstance(voxels, Voxels)
    back = sample_of(Record("v", "safetensors", voxels_bytes(voxels), ""), "asset_rec", STAGE, rng).item
    assert isinstance(back, Voxels)
    np.testing.assert_array_equal(back.coords, voxels.coords)
    np.testing.assert_allclose(back.feats, voxels.feats, atol=0.5 / 255 + 1e-6)
    image = sample_of(Record("i", "png", picture(0), ""), "image_rec", STAGE, rng).item
    assert isinstance(image, Image)
    with pytest.raises(MediaError, match="declared as 'image' but is a video"):
        sample_of(film, "image_rec", STAGE, rng)
