"""Folders to shards by the command, on files as people have them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from media.decode import decode_media
from media.types import Voxels
from media.video import encode_video
from tests.media.meshes import arms_glb
from tests.training.shard_files import STAGE, picture, write_tar
from training import prepare
from training.generated import Generated
from training.prepare import key_of, main
from training.shard_file import read_shard
from training.shard_order import Corpus
from training.shard_source import ShardSource
from training.shards import open_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("birds/a.png", "birds/a b.v2.png", "c.png"):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(len(name)))
    (tmp_path / "pictures" / "broken.png").write_bytes(picture(1)[:200])
    (tmp_path / "pictures" / "c.txt").write_text("A thing.\n")
    (tmp_path / "captions.json").write_text(json.dumps({"pictures/birds/a.png": {"caption": "A toucan."}}))
    (tmp_path / "films").mkdir()
    clip = Generated(sides=(32, 32), frames=(8,)).draw("video_rec", [0])[0].item
    (tmp_path / "films" / "x.mkv").write_bytes(encode_video(clip.frames, 8.0, "mkv"))  # type: ignore[union-attr]
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "arms.glb").write_bytes(arms_glb())
    return tmp_path


def test_folders_become_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "shards"
    words = ["--images", "pictures", "--videos", "films", "--meshes", "things"]
    paths = [str(folder / word) if not word.startswith("--") else word for word in words]
    assert main([str(out), *paths, "--images-captions", str(folder / "captions.json")]) == 0
    said = capsys.readouterr().out
    assert "images: 3 samples, 2 with captions" in said
    assert "left out: 1 corrupt_media" in said
    assert "broken.png is left out: " in said
    assert "videos: 1 samples" in said
    assert "assets: 1 samples" in said
    assert json.loads((out / "index.json").read_text()) == {
        "assets-000000.tar": 1,
        "images-000000.tar": 3,
        "videos-000000.tar": 1,
    }
    records, problem = read_shard(str(out / "images-000000.tar"))
    assert problem is None
    assert {record.caption for record in records} == {"A toucan.", "A thing.", ""}
    assert len({record.key for record in records}) == 3

    corpora = {
        name: [Corpus(name=name, shards=tuple(open_shards([str(out / f"{name}-*.tar")])))]
        for name in ("images", "videos", "assets")
    }
    source = ShardSource(corpora, STAGE)
    (asset,) = source.draw("asset_rec", [0])
    assert isinstance(asset.item, Voxels)
    assert len(asset.item.coords) > 100
    assert source.draw("video_sem", [3])[0].item.kind == "video"
    source.close()


def test_every_modality_has_its_own_captions(folder: Path) -> None:
    files = {"images": "pictures/c.png", "videos": "films/x.mkv", "meshes": "things/arms.glb"}
    words = []
    for name, path in files.items():
        listed = folder / f"{name}.json"
        listed.write_text(json.dumps(dict.fromkeys(files.values(), f"by the list of {name}")))
        words += [f"--{name}", str(folder / path.split("/")[0]), f"--{name}-captions", str(listed)]
    assert main([str(folder / "shards"), *words]) == 0
    found = {
        name: {record.caption for record in read_shard(str(folder / "shards" / f"{name}-000000.tar"))[0]}
        for name in ("images", "videos", "assets")
    }
    assert found == {
        "images": {"by the list of images", ""},
        "videos": {"by the list of videos"},
        "assets": {"by the list of meshes"},
    }


def test_what_is_not_there_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "out"), "--images", str(folder / "nothing")]) == 2
    assert "nothing: no files in this folder" in capsys.readouterr().err
    (folder / "captions.json").write_text("[]")
    words = ["--images", str(folder / "pictures"), "--images-captions", str(folder / "captions.json")]
    assert main([str(folder / "out"), *words]) == 2
    assert "is no JSON object of paths and texts" in capsys.readouterr().err
    # The last word is wrong: nothing was written for the first, so that the command can be given again.
    words = ["--images", str(folder / "pictures"), "--videos", str(folder / "nothing")]
    assert main([str(folder / "out"), *words]) == 2
    assert not (folder / "out").exists()
    capsys.readouterr()
    (folder / "films" / "x.mkv").write_bytes(b"no film")
    assert main([str(folder / "out"), "--videos", str(folder / "films")]) == 2
    assert "films: none of its 1 files can be used" in capsys.readouterr().err


def test_what_prepare_stores_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files without a suffix or with another's, captions with half characters; films that training would refuse."""
    pictures, films = tmp_path / "pictures", tmp_path / "films"
    pictures.mkdir()
    films.mkdir()
    (pictures / "bare").write_bytes(picture(0))
    (pictures / "other.bmp").write_bytes(picture(1))
    (pictures / "._other.png").write_bytes(b"of a Mac")
    (pictures / "bare.txt").write_bytes(b"\xef\xbb\xbfA th\xefng.\n")
    (tmp_path / "captions.json").write_text('{"other.bmp": "half \\ud800"}')
    clip = Generated(sides=(32, 32), frames=(8,)).draw("video_rec", [0])[0].item.frames  # type: ignore[union-attr]
    (films / "x.mov").write_bytes(encode_video(clip, 8.0, "mp4"))
    (films / "short.mp4").write_bytes(encode_video(clip[:3], 8.0, "mp4"))
    stills = [PIL.Image.fromarray(frame) for frame in clip]
    stills[0].save(films / "moving.gif", save_all=True, append_images=stills[1:])
    words = ["--images", str(pictures), "--images-captions", str(tmp_path / "captions.json"), "--videos", str(films)]
    assert main([str(tmp_path / "out"), *words]) == 0
    said = capsys.readouterr().out
    assert "images: 2 samples, 2 with captions" in said
    assert "left out: none" in said
    assert "short.mp4 is left out: 3 frames; wanted 4 or more" in said
    assert "moving.gif is left out: an animated gif cannot be read frame by frame" in said
    shards = open_shards([str(tmp_path / "out")])
    assert [shard.count for shard in shards] == [2, 1]
    records = [record for shard in shards for record in read_shard(shard.place)[0]]
    assert [record.suffix for record in records] == ["png", "png", "mp4"]
    assert [record.caption for record in records] == ["A th\ufffdng.", "half ?", ""]


def test_a_file_that_kills_its_worker_costs_itself_only(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (folder / "pictures" / "broken.png").read_bytes()
    real = decode_media

    def decode(data: bytes, *rest: Any) -> object:
        if data == broken:
            os._exit(11)
        return real(data, *rest)

    monkeypatch.setattr(prepare, "decode_media", decode)  # workers are forks
    assert main([str(folder / "shards"), "--images", str(folder / "pictures")]) == 0
    said = capsys.readouterr().out
    assert "broken.png is left out: the process that looked at it died" in said
    assert "images: 3 samples" in said


def test_results_do_not_pile_up_behind_a_slow_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are whole films."""
    begun = tmp_path / "begun"
    begun.mkdir()
    paths = [tmp_path / f"{number:03d}.png" for number in range(60)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number, 16, 16))
    slow = paths[0].read_bytes()
    real = decode_media

    def decode(data: bytes, *rest: Any) -> object:
        (begun / hashlib.sha256(data).hexdigest()).touch()
        if data == slow:
            time.sleep(1)
        return real(data, *rest)

    monkeypatch.setattr(prepare, "decode_media", decode)
    results = prepare._checked(paths, "images", 2)
    assert next(results)[0] == paths[0]
    assert len(list(begun.iterdir())) <= 2 * prepare.AHEAD + 1
    assert len(list(results)) == 59


def test_shards_of_others_get_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", picture(0)), ("1.png", picture(1))])
    assert main([str(tmp_path), "--index"]) == 0
    assert "index.json: 2 samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "index.json").read_text()) == {"a.tar": 2}
    assert main([str(tmp_path / "nothing"), "--index"]) == 2
    assert "no shards in this folder" in capsys.readouterr().err


def test_keys_never_clash() -> None:
    names = ["a/b.png", "a_b.png", "a.b.png", "ä.png", "a/b.jpg", "x" * 100 + ".png"]
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all("." not in key and "/" not in key and len(key) < 60 for key in keys)
