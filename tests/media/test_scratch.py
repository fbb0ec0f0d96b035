import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from media.scratch import Scratch

HOLD = """
import sys
from media.scratch import Scratch
kept = Scratch("scratch-")
print(kept.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold() -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=os.getcwd()
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "content").write_text("of it")
    return process, folder


def aged(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_the_folder_of_a_killed_process_goes_with_the_next_start() -> None:
    process, folder = hold()
    aged(folder)
    running = Scratch("scratch-")
    assert folder.is_dir(), "its process lives"
    process.kill()
    process.communicate()
    assert folder.is_dir(), "nobody could remove it"
    Scratch("scratch-")
    assert not folder.exists()
    assert running.path.is_dir()


def test_young_and_foreign_folders_stay(place: Path) -> None:
    young, other, file, link = (place / name for name in ("scratch-young", "other-old", "scratch-file", "scratch-link"))
    young.mkdir()
    other.mkdir()
    file.touch()
    link.symlink_to(other)
    for each in (other, file):
        aged(each)
    Scratch("scratch-")
    assert young.is_dir()
    assert other.is_dir()
    assert file.is_file()
    assert link.is_symlink()


def test_a_folder_ends_once_and_at_the_latest_with_its_process() -> None:
    scratch = Scratch("scratch-")
    assert scratch.path.stat().st_mode & 0o777 == 0o700
    path = scratch.path
    scratch.remove()
    assert not path.exists()
    scratch.remove()
    process, folder = hold()
    process.communicate("")
    assert process.returncode == 0
    assert not folder.exists()
