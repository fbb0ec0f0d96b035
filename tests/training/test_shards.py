"""Shards: written whole, never mixed with older ones, listed and counted in folders and behind addresses."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.training.shard_files import Quiet, captions, corpus_of, picture, served, source_of, write_images, write_tar
from training.shard_file import Record, read_shard
from training.shards import ShardWriter, count_shards, expand, open_shards


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = write_images(tmp_path, 10)
    assert len(shards) > 1
    assert sum(shard.count for shard in shards) == 10
    records = [record for shard in shards for record in read_shard(shard.place)[0]]
    assert [record.caption for record in records] == [f"images {number}" for number in range(10)]
    assert records[3].media == picture(3)
    assert records[3].suffix == "png"
    assert records[3].key == "images0003"
    again = tmp_path / "again"
    write_images(again, 10)
    assert (again / shards[0].name).read_bytes() == Path(shards[0].place).read_bytes()
    assert sorted(path.suffix for path in again.iterdir()) == [".json"] + [".tar"] * len(shards)
    with tarfile.open(shards[0].place) as tar:  # as other tools see it
        assert tar.getnames()[:2] == ["images0000.png", "images0000.txt"]


def test_old_shards_are_never_mixed_with_new_ones(tmp_path: Path) -> None:
    """A second run that writes fewer would leave the rest of the first."""
    shards = write_images(tmp_path, 10)
    with pytest.raises(ValueError, match=r"has shards images-\*\.tar already"):
        write_images(tmp_path, 2)
    assert open_shards([str(tmp_path)]) == shards
    write_images(tmp_path, 2, "others")
    assert sum(shard.count for shard in open_shards([str(tmp_path)])) == 12


def test_a_writer_that_fails_leaves_nothing_half(tmp_path: Path) -> None:
    def fails() -> None:
        with ShardWriter(tmp_path, "x") as writer:
            for key in ("a", "a.b"):
                writer.write(Record(key, "png", picture(0), ""))

    with pytest.raises(ValueError, match="key"):
        fails()
    assert not list(tmp_path.iterdir())


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


def test_an_index_is_read_once_and_must_make_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 12)
    loads: list[int] = []
    real = json.loads

    def counted(data: bytes) -> object:
        loads.append(1)
        return real(data)

    monkeypatch.setattr("training.shards.json.loads", counted)
    shards = open_shards([str(tmp_path / "*.tar"), str(tmp_path)])
    assert len(shards) > 4
    assert len(loads) == 1
    (tmp_path / "index.json").write_text('{"version": 2, "shards": []}')  # of another program: the shards are counted
    assert open_shards([str(tmp_path / "*.tar"), str(tmp_path)]) == shards
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: Expecting"):
        open_shards([str(tmp_path)])


def test_shards_without_samples_are_told_from_those_that_are_broken(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    (shard,) = open_shards([str(tmp_path)])
    assert shard.count == 0
    write_tar(tmp_path / "b.tar", [("0.tif", b"x"), ("0.json", b"{}")])
    with pytest.raises(ValueError, match=r"b\.tar: no media among its files, which are json, tif; wanted glb"):
        open_shards([str(tmp_path)])


def test_a_cut_shard_without_an_index_is_refused_until_it_is_counted(tmp_path: Path) -> None:
    """How many samples it had nobody knows: of a run that took what is left, no share would ever see the loss."""
    (shard,) = write_images(tmp_path, 40, each=10**9)
    path = Path(shard.place)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 10])
    assert open_shards([str(tmp_path)]) == [shard]  # the index knows, and the share will see it
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=rf"unexpected end of data; its 12 whole .*prepare {tmp_path} --index` counts"):
        open_shards([str(tmp_path)])
    said: list[str] = []
    assert count_shards(tmp_path, said.append) == 12
    assert len(said) == 1
    assert [found.count for found in open_shards([str(tmp_path)])] == [12]


def test_shards_of_others_get_an_index(tmp_path: Path) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", [(f"{n}.png", picture(n)) for n in range(shard + 1)])
    said: list[str] = []
    assert count_shards(tmp_path, said.append) == 6
    assert json.loads((tmp_path / "index.json").read_text()) == {"0.tar": 1, "1.tar": 2, "2.tar": 3}
    assert said == []
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:2000])
    assert count_shards(tmp_path, said.append) == 4
    assert "1.tar: unexpected end of data" in said[0]
    with pytest.raises(FileNotFoundError, match="no shards in this folder"):
        count_shards(tmp_path / "nothing", said.append)


def test_remote_shards_give_the_same_samples(tmp_path: Path) -> None:
    local = write_images(tmp_path, 12)
    wanted = captions(source_of(corpus_of(local)), range(24))
    with served(tmp_path) as address:
        last = len(local) - 1
        remote = open_shards([f"{address}/images-{{000000..{last:06d}}}.tar"])
        assert Quiet.asked == ["/index.json"]
        assert [shard.count for shard in remote] == [shard.count for shard in local]
        assert captions(source_of(corpus_of(remote)), range(24)) == wanted
        assert sorted(Quiet.asked[1:]) == [f"/{shard.name}" for shard in local]
        with pytest.raises(FileNotFoundError, match=r"other\.tar is not in"):
            open_shards([f"{address}/other.tar"])
        with pytest.raises(ValueError, match=r"remote shards need the index"):
            open_shards([f"{address}/nowhere/a.tar"])
