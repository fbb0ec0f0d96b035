"""The one command: `python -m training.train smoke`, a curriculum, or one of the bundled models, by the first word."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import ModelError
from training import curriculum_cli, small
from training.config import RECIPES
from training.curriculum import NotFiniteError
from training.shard_source import BadSamplesError
from training.smoke import smoke
from training.snapshots import SaveError
from training.stages import CURRICULA

MARK = ".smoke"
"""File of a smoke run's folder, which may be emptied."""

USAGE = f"""usage: python -m training.train NAME ...

  smoke            all stages in small on drawn data, in a minute: start here
  {", ".join(CURRICULA):16} the published curriculum, on shards
  {", ".join(RECIPES)}
                   the bundled models, from a folder of pictures and films

python -m training.train NAME --help says what each takes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the first word names; returns the exit status, 2 with one line for what cannot be done."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if name == "smoke":
            return _smoke(words[1:])
        if name in CURRICULA:
            return curriculum_cli.main(words)
        if name in RECIPES:
            return small.main(words)
    except (OSError, ValueError, ModelError, SaveError, BadSamplesError, NotFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"error: unknown name {name!r}\n{USAGE}", file=sys.stderr)
    return 2


def _smoke(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train smoke", description="All four stages in small.")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke"), help="folder of the run, made anew")
    given = parser.parse_args(words)
    if given.out.exists() and not (given.out / MARK).is_file() and (given.out.is_file() or any(given.out.iterdir())):
        raise ValueError(f"{given.out} holds something else than a smoke run, which begins anew; give another --out")
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    (given.out / MARK).touch()
    return smoke(given.out)


if __name__ == "__main__":
    raise SystemExit(main())
