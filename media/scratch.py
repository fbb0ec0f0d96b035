"""Temporary folders of running processes, which the next process removes if its owner was killed.

A folder is locked (flock) for as long as its process lives: the system gives the lock back however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final

_YOUNG_S: Final = 60.0
"""A folder of less than this age may be one that is not locked yet."""


class Scratch:
    """A new folder PREFIX* of mode 0700 in the temporary folder; folders of the same prefix without an owner go."""

    def __init__(self, prefix: str) -> None:
        """prefix: no other program's, since what bears it and is not locked is removed. Raises OSError."""
        _remove_abandoned(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):  # a file system without locks: nobody removes it but we
            fcntl.flock(lock, fcntl.LOCK_EX)
        self.remove = weakref.finalize(self, _remove, self.path, lock)
        """Removes it with all that is in it; once, at the latest when the process ends in order."""


def _remove(path: Path, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def _remove_abandoned(prefix: str) -> None:
    """What fails here is left alone: somebody else is at it, or it is not ours."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(OSError):
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < _YOUNG_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder, lock)
            except OSError:
                os.close(lock)
