"""Every command that the README and the examples show is run: here, or (`install`, `pytest`) by .ci/run.

`<!-- run: NAME -->` on the line before a block says by whom:

install, pytest   .ci/run, in a fresh virtual environment
serve             here: the command is started on a free port
curl, cli, python here: run against that server, in the order of the file, in a folder that has what the repository has
compose           only checked: no container engine is wanted for the tests
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.readme import README, RUNNABLE, Block, get_block, read_blocks

NAMES = {"install", "pytest", "serve", "curl", "cli", "python", "compose"}
FILES = [README, *sorted((ROOT / "examples").rglob("*.md"))]
BLOCKS = [block for path in FILES if path.is_file() for block in read_blocks(path) if block.language in RUNNABLE]
RUN_HERE = [block for block in BLOCKS if block.name in {"curl", "cli", "python"}]
START_S = 120.0


def test_readme_has_the_two_commands() -> None:
    assert 'pip install -e ".[local]" && atoken serve' in get_block("install")
    assert 'pip install -e ".[dev]" && pytest' in get_block("pytest")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_is_run_by_somebody(block: Block) -> None:
    assert block.name in NAMES, f"{block}: put a line <!-- run: NAME --> before it, NAME one of {sorted(NAMES)}"
    assert (block.language == "python") == (block.name == "python"), f"{block}: {block.language} as {block.name}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language != "python"], ids=str)
def test_shell_block_parses(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.name == "compose"], ids=str)
def test_compose_block_gives_what_the_file_requires(block: Block) -> None:
    assert re.search(r"^docker compose up\b", block.text, re.MULTILINE), block.text
    required = re.findall(r"\$\{(\w+):\?", (ROOT / "docker-compose.yml").read_text())
    assert required
    assert all(f"{name}=" in block.text for name in required), f"{block} sets not all of {set(required)}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a fresh clone of the repository and may be written to."""
    folder = tmp_path_factory.mktemp("readme")
    for entry in ROOT.iterdir():
        if entry.name == "examples":  # what commands write beside its files must not land in the repository
            shutil.copytree(entry, folder / entry.name)
        elif not entry.name.startswith(".") and entry.name != "out":
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="module")
def port(place: Path) -> Iterator[int]:
    """The port of a server that was started the way the README starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    block = next((block.text for block in read_blocks(README) if block.name == "serve"), "atoken serve\n")
    with (place / "server.log").open("w") as log:
        process = subprocess.Popen(
            ["bash", "-ec", _on_port(block, free)],
            cwd=place,
            env=_environment(free),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_until_ready(free, process, place / "server.log")
            yield free
        finally:
            # What Ctrl-C does: the whole foreground group gets it.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


@pytest.mark.parametrize("block", RUN_HERE, ids=str)
def test_block_runs(block: Block, place: Path, port: int) -> None:
    text = _on_port(block.text, port)
    if block.name == "curl" and shutil.which("curl") is None:
        pytest.skip("no curl on this machine")
    command = [sys.executable, "-c", text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    done = subprocess.run(command, cwd=place, env=_environment(port), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{block}\n{text}\n{done.stdout}\n{done.stderr}"
    # curl prints an error answer and calls it a success; ours are problem+json.
    assert '"type":"/errors/' not in done.stdout.replace(" ", ""), done.stdout


def _environment(port: int) -> dict[str, str]:
    """This interpreter's environment first on the path, and the tests' own settings out of the way."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ATOKEN_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return kept | {"PATH": path, "ATOKEN_PORT": str(port)}


def _on_port(text: str, port: int) -> str:
    text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", f"127.0.0.1:{port}", text)
    return re.sub(r"--port[ =]8000\b", f"--port {port}", text)


def _wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            # A file, not a pipe: a server that nobody reads would stop at a full pipe.
            assert process.poll() is None, f"the server ended:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"not ready after {START_S} s:\n{log.read_text()}"
            time.sleep(0.1)
