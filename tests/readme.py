"""The fenced blocks of a Markdown file, by name. As a script (standard library only): print the README's block NAME."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

RUNNABLE = frozenset({"sh", "bash", "python"})
_FENCE = re.compile(
    r"^(?:<!-- run: (?P<name>[a-z]+) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block. name: what `<!-- run: NAME -->` on the line before it says; None without such a line."""

    path: Path
    line: int
    language: str
    name: str | None
    text: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def read_blocks(path: Path) -> list[Block]:
    """Return all fenced blocks of a file, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text.count("\n", 0, found.start("language")) + 1, found["language"], found["name"], found["text"])
        for found in _FENCE.finditer(text)
    ]


def get_block(name: str, path: Path = README) -> str:
    """Return the text of the one block of this name. Raises ValueError unless there is exactly one."""
    found = [block.text for block in read_blocks(path) if block.name == name]
    if len(found) != 1:
        raise ValueError(f"{path.name} has {len(found)} blocks marked <!-- run: {name} -->, and one is wanted")
    return found[0]


if __name__ == "__main__":
    print(get_block(sys.argv[1]), end="")
