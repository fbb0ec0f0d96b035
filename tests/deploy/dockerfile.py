"""Reads the Dockerfile, and replays the steps of a build stage without an engine, so that neither can drift from it.

As a script (standard library only): `python tests/deploy/dockerfile.py STAGE FOLDER` runs what STAGE and the stages
under it do, with FOLDER in the place of the image's root: the virtual environment ends up in FOLDER/opt/venv.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Stage:
    """One FROM and what follows it. steps: (instruction in capitals, its text), continuation lines joined."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def texts(self, instruction: str) -> list[str]:
        return [text for name, text in self.steps if name == instruction]


def read(path: Path = ROOT / "Dockerfile") -> dict[str, Stage]:
    """Return the stages by name, in their order."""
    # A comment between continuation lines is dropped too, as the engine does it.
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, _, text = line.strip().partition(" ")
        if instruction.upper() == "FROM":
            parent, _, name = text.partition(" AS ")
            stages[name] = Stage(name=name, parent=parent)
        elif stages:
            next(reversed(stages.values())).steps.append((instruction.upper(), text.strip()))
    return stages


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return the stage and those it is built upon, the lowest first."""
    stage = stages[name]
    return [*(chain(stages, stage.parent) if stage.parent in stages else []), stage]


def last(stages: dict[str, Stage], name: str, instruction: str) -> str | None:
    """Return the text of the last such instruction that is in force in the stage."""
    texts = [text for stage in chain(stages, name) for text in stage.texts(instruction)]
    return texts[-1] if texts else None


def command(stages: dict[str, Stage], name: str) -> list[str]:
    """Return the words of the stage's CMD."""
    return list(json.loads(last(stages, name, "CMD") or "[]"))


def healthcheck(stages: dict[str, Stage], name: str) -> list[str]:
    """Return the words of the stage's health check."""
    text = last(stages, name, "HEALTHCHECK") or ""
    return list(json.loads(text.partition("CMD ")[2]))


def environment(stages: dict[str, Stage], name: str) -> dict[str, str]:
    """Return the variables that the stage and those under it set."""
    texts = [text for stage in chain(stages, name) for text in stage.texts("ENV")]
    return dict(word.split("=", 1) for text in texts for word in shlex.split(text))


def replay(name: str, folder: Path) -> None:
    """Run the steps of a build stage on this machine, folder being the image's root. Raises CalledProcessError."""
    stages = read()
    work = folder
    # Absolute paths of the image are all under these two, which the test of the Dockerfile makes sure of.
    inside = re.compile(r"/(?=(opt|src)\b)")
    for stage in chain(stages, name):
        for instruction, text in stage.steps:
            if instruction == "WORKDIR":
                work = folder / text.lstrip("/")
                work.mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                *sources, target = text.split()
                for source in sources:
                    _copy(ROOT / source, work / target / (Path(source).name if target == "./" else ""))
            elif instruction == "RUN":
                shell = inside.sub(f"{folder}/", re.sub(r"^(--mount=\S+ +)+", "", text))
                print("+", shell, flush=True)
                subprocess.run(shell, shell=True, cwd=work, env=os.environ | environment(stages, name), check=True)
            elif instruction != "ENV":
                raise ValueError(f"{instruction} in a build stage: teach replay() what it does")


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"), dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


if __name__ == "__main__":
    replay(sys.argv[1], Path(sys.argv[2]).resolve())
