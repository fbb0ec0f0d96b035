"""Starts the service as a stranger would, sends one picture through it and stops it. Standard library only.

drive.py readme VENV           the README's first command, in the fresh virtual environment VENV
drive.py images FOLDER REDIS   what the Dockerfile's two targets start, from FOLDER/api and FOLDER/worker, around a
                               server of its own that the program REDIS starts
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.deploy import dockerfile  # noqa: E402
from tests.readme import get_block  # noqa: E402

# pip installs torch within the first command.
INSTALL_AND_START_S = 900.0
START_S = 180.0
STOP_S = 45.0


def drive_readme(venv: Path) -> None:
    """Run the block `install`, wait until the service is ready, use it, press Ctrl-C."""
    port = find_port()
    environment = clean_environment(venv) | {"ATOKEN_PORT": str(port)}
    with started(["bash", "-c", get_block("install")], environment, cwd=ROOT) as process:
        wait_for(lambda: is_ready(port), process, INSTALL_AND_START_S)
        send_picture(port)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(STOP_S)
    if status not in (0, 130, -signal.SIGINT):
        raise SystemExit(f"Ctrl-C ended the service with status {status}")


def drive_images(folder: Path, redis_binary: str) -> None:
    """Start the commands of both images apart from each other and wait for their health checks."""
    stages = dockerfile.read()
    port = find_port()
    with tempfile.TemporaryDirectory(prefix="atoken-") as place:
        password = secrets.token_hex(16)
        socket_path = f"{place}/redis.sock"
        server = [redis_binary, "--port", "0", "--unixsocket", socket_path, "--save", "", "--requirepass", password]
        url = f"unix://:{password}@{socket_path}"

        def environment(target: str) -> dict[str, str]:
            image = {key: value for key, value in dockerfile.environment(stages, target).items() if key[:6] == "ATOKEN"}
            ours = {"ATOKEN_REDIS_URL": url, "ATOKEN_HOST": "127.0.0.1", "ATOKEN_PORT": str(port), "HOME": place}
            return clean_environment(folder / target / "opt" / "venv") | image | ours

        def is_healthy(target: str) -> bool:
            check = [word.replace("/opt/atoken", f"{ROOT}/deploy") for word in dockerfile.healthcheck(stages, target)]
            return subprocess.run(check, env=environment(target), capture_output=True, timeout=30).returncode == 0

        with (
            started(server, dict(os.environ), cwd=place),
            started(dockerfile.command(stages, "worker"), environment("worker"), cwd=place) as worker,
            started(dockerfile.command(stages, "api"), environment("api"), cwd=place) as api,
        ):
            wait_for(lambda: is_healthy("api"), api, START_S)
            wait_for(lambda: is_healthy("worker"), worker, START_S)
            wait_for(lambda: is_ready(port), api, START_S)
            send_picture(port)
            for process in (api, worker):
                process.terminate()
                status = process.wait(STOP_S)
                if status not in (0, -signal.SIGTERM):
                    raise SystemExit(f"SIGTERM ended {process.args!r} with status {status}")


def send_picture(port: int) -> None:
    """Encode a PNG of an odd size to a token file and decode it: the same size must come back."""
    width, height = 83, 50
    rows = b"".join(b"\0" + b"".join(bytes((x * 3, y * 5, 90)) for x in range(width)) for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    tokens = post(port, "/encode", png, "image/png", "application/vnd.safetensors")
    back = post(port, "/decode", tokens, "application/vnd.safetensors", "image/png")
    if back[:8] != png[:8] or struct.unpack(">II", back[16:24]) != (width, height):
        raise SystemExit(f"not the picture that was sent: {back[:24]!r}")
    print(f"a picture of {width}x{height} went to {len(tokens)} bytes of tokens and came back", flush=True)


def post(port: int, path: str, body: bytes, kind: str, accept: str) -> bytes:
    """Return the answer's body. Raises SystemExit with the service's own words."""
    headers = {"Content-Type": kind, "Accept": accept}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path}: {error.code} {error.read(2000).decode(errors='replace')}") from error


def is_ready(port: int) -> bool:
    """Return whether /health/ready says so."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
            return True
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Return as soon as the condition holds. Raises SystemExit when the process ends or the time is over."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise SystemExit(f"{process.args!r} is not ready after {limit_s:.0f} s")
        time.sleep(0.2)


@contextmanager
def started(command: list[str], environment: dict[str, str], cwd: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own; whatever is left of the group is killed at the end.

    What it prints is shown only if something goes wrong meanwhile.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        except BaseException:
            log.seek(0)
            lines = log.read().decode(errors="replace").splitlines()
            print(f"--- the last lines of {command!r}", *lines[-60:], sep="\n", file=sys.stderr, flush=True)
            raise
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def clean_environment(venv: Path) -> dict[str, str]:
    """The environment of a shell that activated venv, without settings of ours."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("ATOKEN_") and k not in {"PYTHONPATH", "PYTHONHOME"}
    }
    return kept | {"VIRTUAL_ENV": str(venv), "PATH": f"{venv}/bin{os.pathsep}{os.environ['PATH']}"}


def find_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    if sys.argv[1] == "readme":
        drive_readme(Path(sys.argv[2]).resolve())
    else:
        drive_images(Path(sys.argv[2]).resolve(), sys.argv[3])
