"""The curves of a run of a bundled model, for its card: `python -m training.curves RUN OUT.png`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.config import RECIPES

PANELS = {
    "loss": "reconstruction: log of the square error + KL",
    "place": "teacher's place: 1 - cosine",
    "texts": "distillation over texts (KL)",
    "dense": "teacher's map at patches",
    "cells": "teacher's place of 32 x 32 pixels: 1 - cosine",
    "clip": "clips: 1 - cosine",
    "set": "meshes: 1 - cosine",
}
SMOOTH = 5
"""Lines of the log that a point is the mean of."""


def read_logs(run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Lines of every stage that a run has, in order. Raises FileNotFoundError if there is none."""
    order = [stage.stage for stages in RECIPES.values() for stage in stages]
    logs = [(name, run / name / "log.jsonl") for name in order]
    found = [
        (name, [json.loads(line) for line in path.read_text().splitlines()]) for name, path in logs if path.is_file()
    ]
    if not found:
        raise FileNotFoundError(f"{run}: no log.jsonl of a stage in it")
    return found


def draw(run: Path, out: Path) -> None:
    """One panel a term, stages one after the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    logs = read_logs(run)
    names = [name for name in PANELS if any(name in line for _, lines in logs for line in lines)]
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.4 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        start = 0.0
        for number, (stage, lines) in enumerate(logs):
            at = np.array([start + line["minutes"] for line in lines if name in line])
            values = np.array([line[name] for line in lines if name in line])
            few = len(values) < 3 * SMOOTH
            name_of = stage if few and len(values) else None
            axis.plot(
                at, values, "o-" if few else "-", color=f"C{number}", alpha=0.25, lw=0.8, markersize=4, label=name_of
            )
            if not few:
                mean = np.convolve(values, np.ones(SMOOTH) / SMOOTH, "valid")
                axis.plot(at[SMOOTH // 2 : SMOOTH // 2 + len(mean)], mean, color=f"C{number}", label=stage)
            start += max((line["minutes"] for line in lines), default=0.0)
        axis.set_title(PANELS[name], fontsize=9)
        axis.set_xlabel("minutes", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    # Not every stage has every term.
    fullest = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    fullest.legend(fontsize=8)
    for axis in list(axes.flat)[len(names) :]:
        axis.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("out", type=Path, help="PNG file")
    given = parser.parse_args(arguments)
    try:
        draw(given.run, given.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
