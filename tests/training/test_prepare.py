"""Folders to shards by the command, on files as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from media.types import Voxels
from media.video import encode_video
from tests.media.meshes import arms_glb
from tests.training.test_shards import STAGE, picture
from training.generated import Generated
from training.prepare import key_of, main
from training.shard_source import Corpus, ShardSource
from training.shards import open_shards, read_shard


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


def test_what_is_not_there_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "out"), "--images", str(folder / "nothing")]) == 2
    assert "nothing: no files in this folder" in capsys.readouterr().err
    (folder / "captions.json").write_text("[]")
    words = ["--images", str(folder / "pictures"), "--images-captions", str(folder / "captions.json")]
    assert main([str(folder / "out"), *words]) == 2
    assert "is no JSON object of paths and texts" in capsys.readouterr().err


def test_keys_never_clash() -> None:
    names = ["a/b.png", "a_b.png", "a.b.png", "ä.png", "a/b.jpg", "x" * 100 + ".png"]
    keys = [key_of(name) for name in names]
    assert len(set(keys)) == len(names)
    assert all("." not in key and "/" not in key and len(key) < 60 for key in keys)
