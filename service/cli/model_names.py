"""Whether a model that a command line names is there, known before anything starts and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from service.cli.errors import UsageError


def check_models(names: Sequence[str]) -> None:
    """Raise UsageError for the first name that is no bundled model, no file or folder, and no VARIANT=FILE.

    What is in a file, and whether there is such a variant, is seen when it is loaded.
    """
    bundled = _bundled()
    for name in names:
        variant, _, path = name.rpartition("=")
        is_there = Path(path).is_file() or (not variant and path != "" and Path(path).is_dir())
        if name not in bundled and not is_there:
            raise UsageError(
                f"model {name!r} is not there: give a bundled one ({', '.join(bundled)}), a file or folder with "
                f"weights, or VARIANT=FILE with a file that exists"
            )


def _bundled() -> list[str]:
    spec = find_spec("model")  # finds the folder of the package and imports nothing
    folders = spec.submodule_search_locations or [] if spec is not None else []
    return sorted(file.stem for folder in folders for file in Path(folder, "bundled").glob("*.safetensors"))
