"""One shard: what other tools put into it, where it is broken, and servers that fail."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import threading
from pathlib import Path

import pytest

from tests.training.shard_files import Quiet, picture, served, write_images, write_tar
from training import shard_file
from training.shard_file import OpenShard, read_shard

PNG = picture(0, 16, 16)


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        pytest.param([("a/0.PNG", PNG), ("a/0.txt", b" words\n")], [("a/0", "png", "words")], id="folder, upper case"),
        pytest.param([("./x.y/0.png", PNG)], [("x.y/0", "png", "")], id="dots in folders"),
        pytest.param([("n" * 300 + ".png", PNG)], [("n" * 300, "png", "")], id="long name"),
        pytest.param([("0.cls", b"7"), ("0.jpg", PNG)], [("0", "jpg", "")], id="class before the picture"),
        pytest.param([("0.mask.png", b""), ("0.jpg", PNG), ("0.npz", b"")], [("0", "jpg", "")], id="more pictures"),
        pytest.param([("0.jpg", b""), ("0.mp4", PNG)], [("0", "mp4", "")], id="clip and preview"),
        pytest.param(
            [("._0.jpg", b""), ("0.jpg", PNG), ("._0.txt", b"x"), ("0.txt", b"words")],
            [("0", "jpg", "words")],
            id="mac",
        ),
        pytest.param(
            [("0.png", PNG), ("1.png", PNG), ("0.txt", b"a"), ("1.txt", b"b")],
            [("0", "png", "a"), ("1", "png", "b")],
            id="unsorted",
        ),
        pytest.param([("0.txt", b"words")], [], id="no picture"),
        pytest.param([("0.png", PNG), ("0.png", PNG)], [("0", "png", "")], id="twice"),
        pytest.param([("0.png", PNG), ("0.txt", b"\xef\xbb\xbfa\xff")], [("0", "png", "a\ufffd")], id="no UTF-8"),
        pytest.param([("0.png", PNG), ("0.json", b'{"caption": "a"}')], [("0", "png", "a")], id="json"),
        pytest.param(
            [("0.png", PNG), ("0.json", b'{"text": "b"}'), ("0.txt", b" ")], [("0", "png", "b")], id="json, text"
        ),
        pytest.param([("0.png", PNG), ("0.json", b'{"width": 3}')], [("0", "png", "")], id="json, none"),
        pytest.param([("0.png", PNG), ("0.json", b'{"caption": 3}')], [("0", "png", "")], id="json, number"),
        pytest.param([("0.png", PNG), ("0.json", b'{"caption": ["a", "b"]}')], [("0", "png", "a")], id="json, list"),
        pytest.param([("0.png", PNG), ("0.json", b'{"caption": "\\ud800"}')], [("0", "png", "?")], id="json, half"),
        pytest.param([("0.png", PNG), ("0.json", b"[" * 10**5)], [("0", "png", "")], id="json, deep"),
        pytest.param([("0.png", PNG), ("0.json", b"{")], [("0", "png", "")], id="json, cut"),
    ],
)
def test_shards_of_others(members: list[tuple[str, bytes]], wanted: list[tuple[str, str, str]], tmp_path: Path) -> None:
    records, problem = read_shard(str(write_tar(tmp_path / "x.tar", members)))
    assert [(record.key, record.suffix, record.caption) for record in records] == wanted
    assert all(record.media == PNG for record in records)
    assert (problem is None) == bool(wanted)


@pytest.mark.parametrize("kept", [0.3, 0.62, 0.9])
def test_a_shard_that_was_cut_gives_what_is_whole(tmp_path: Path, kept: float) -> None:
    (shard,) = write_images(tmp_path, 8, each=10**9)
    path = Path(shard.place)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    records, problem = read_shard(shard.place)
    assert problem is not None
    assert shard.place in problem
    assert 0 < len(records) < 8
    assert all(record.media == picture(number) for number, record in enumerate(records))
    assert all(record.caption == f"images {number}" for number, record in enumerate(records))


def test_a_shard_that_is_cut_between_two_files_or_damaged_is_told(tmp_path: Path) -> None:
    """tarfile takes both for the end."""
    members = [(f"{number}.png", PNG) for number in range(8)]
    path = write_tar(tmp_path / "x.tar", members)
    data = bytearray(path.read_bytes())
    fourth = 4 * (512 + -(-len(PNG) // 512) * 512)
    for broken in (data[:fourth], data[:fourth] + b"\xff" + data[fourth + 1 :]):
        path.write_bytes(broken)
        records, problem = read_shard(str(path))
        assert [record.key for record in records] == ["0", "1", "2"]  # of the fourth, more files may have come
        assert problem == f"{path}: no member and no end mark at byte {fourth}: it was cut or damaged"


@pytest.mark.parametrize("data", [b"", b"<html>" * 500, b"\x1f\x8b" + bytes(2000), None])
def test_what_is_no_shard_is_named(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    if data is not None:
        path.write_bytes(data)
    records, problem = read_shard(str(path))
    assert records == []
    assert problem
    assert problem.startswith(f"{path}: ")


def test_a_shard_that_changes_while_it_is_read_is_an_error_and_not_another_picture(tmp_path: Path) -> None:
    (shard,) = write_images(tmp_path, 8, each=10**9)
    opened = OpenShard(shard.place)
    path = Path(shard.place)
    path.write_bytes(path.read_bytes()[:10_000])
    assert opened.record(0).media == picture(0)
    with pytest.raises(OSError, match="it was changed"):
        opened.record(7)


def test_files_are_closed(tmp_path: Path) -> None:
    (shard,) = write_images(tmp_path, 4, each=10**9)
    gc.collect()  # of what tests before left
    before = len(os.listdir("/proc/self/fd"))
    held = [OpenShard(shard.place) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before + 20
    del held
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


class _Failing(Quiet):
    """Fails in some way a number of times, then serves."""

    way: str
    times: int

    def do_GET(self) -> None:  # noqa: N802  # its name
        if self.path.endswith(".tar") and len(self.asked) < self.times:
            self.asked.append(self.path)
            if self.way == "cut":
                self.send_response(200)
                self.send_header("Content-Length", "50000")
                self.end_headers()
                self.wfile.write(bytes(10_000))
            elif self.way == "drop":
                self.connection.close()
            else:
                self.send_error(int(self.way))
            return
        super().do_GET()


@pytest.mark.parametrize("way", ["503", "429", "cut", "drop"])
def test_a_server_that_fails_for_a_while_is_waited_for(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shard,) = write_images(tmp_path, 4, each=10**9)
    monkeypatch.setattr(shard_file, "WAITS_S", (0.0, 0.0, 0.0))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    _Failing.way, _Failing.times = way, 3
    with served(tmp_path, _Failing) as address:
        records, problem = read_shard(f"{address}/{shard.name}")
        assert problem is None
        assert [record.media for record in records] == [picture(number) for number in range(4)]
        _Failing.times = 100
        records, problem = read_shard(f"{address}/{shard.name}")
    assert records == []
    assert problem
    assert shard.name in problem
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    with served(tmp_path) as address:
        records, problem = read_shard(f"{address}/x.tar")
    assert records == []
    assert problem
    assert "404" in problem
    assert Quiet.asked == ["/x.tar"]


def test_a_fetch_ends_when_it_is_told_to(tmp_path: Path) -> None:
    _Failing.way, _Failing.times = "503", 100
    stopped = threading.Event()
    with served(tmp_path, _Failing) as address:
        thread = threading.Thread(target=lambda: OpenShard(f"{address}/x.tar", stopped))
        thread.start()
        stopped.set()
        thread.join(5)  # it would wait for a minute and a half
        assert not thread.is_alive()


def test_captions_of_all_kinds() -> None:
    values = json.loads('{"caption": [null, " ", "a"], "text": "b", "name": "c"}')
    assert shard_file.caption_of(values) == "a"
    assert shard_file.caption_of({"name": "c"}) == ""
    assert shard_file.caption_of({"name": "c"}, ("caption", "name")) == "c"
    nothing: list[object] = [None, 3, [], {}, [["a"]]]
    assert [shard_file.caption_of(value) for value in nothing] == [""] * 5
