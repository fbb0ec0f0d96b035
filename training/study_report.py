"""The report of a study: final figures with their spread over seeds, differences with their error, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

COLLAPSE_DB = 3.0
"""A run that ends so far below its best look has collapsed."""

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. points: (step, value) of each figure; collapsed: it ended with numbers that are not finite."""

    variant: str
    seed: int
    points: Mapping[str, Sequence[tuple[int, float]]]
    collapsed: bool = False

    def final(self, name: str) -> float:
        """The last value of a figure; NaN if the run has none."""
        values = self.points.get(name)
        return values[-1][1] if values else math.nan

    def has_collapsed(self) -> bool:
        """Whether it broke off, or any PSNR ended COLLAPSE_DB under its best."""
        falls = (
            max(value for _, value in points) - points[-1][1]
            for name, points in self.points.items()
            if name.endswith("/psnr")
        )
        return self.collapsed or any(fall > COLLAPSE_DB for fall in falls)


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of a study. settings: what a reader must know, in words. The first variant is compared with."""

    name: str
    question: str
    settings: Mapping[str, str]
    curves: tuple[Curve, ...]

    def variants(self) -> list[str]:
        """In the order of the runs."""
        return list(dict.fromkeys(curve.variant for curve in self.curves))

    def figures(self) -> list[str]:
        """Names of what was measured at the looks, of all runs."""
        return sorted({name for curve in self.curves for name in curve.points if not name.startswith("critic/")})


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error is NaN for a single value."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def half_interval(error: float, count: int) -> float:
    """Half of the 95 % interval of a mean of `count` values, by Student's t: with few seeds it is wide."""
    return QUANTILES[min(count - 2, len(QUANTILES) - 1)] * error if count > 1 else math.nan


def difference(report: Report, figure: str, variant: str) -> tuple[float, float]:
    """Mean over seeds of variant minus first variant, and half its 95 % interval. Seeds without both are left out."""
    first = report.variants()[0]
    finals = {(curve.variant, curve.seed): curve.final(figure) for curve in report.curves}
    pairs = [finals[variant, seed] - finals[first, seed] for seed in sorted({curve.seed for curve in report.curves})]
    finite = [value for value in pairs if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    mean, error = mean_and_error(finite)
    return mean, half_interval(error, len(finite))


def write_report(report: Report, folder: Path) -> Path:
    """Write report.md and curves.png; returns the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = report.variants()
    lines = [f"# Study: {report.name}", "", report.question, ""]
    lines += [f"- {key}: {value}" for key, value in report.settings.items()]
    lines += ["", "Last look, mean over seeds (standard error); PSNR in dB, higher is better; fd lower is better:", ""]
    lines += ["| figure | " + " | ".join(report.variants()) + " |", "|---" * (1 + len(report.variants())) + "|"]
    for figure in report.figures():
        cells = []
        for variant in report.variants():
            values = [curve.final(figure) for curve in report.curves if curve.variant == variant]
            finite = [value for value in values if math.isfinite(value)]
            cells.append(_shown(*mean_and_error(finite)) if finite else "not measured")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    lines += ["", f"Against `{first}`, seed by seed:", ""]
    for variant in others:
        for figure in report.figures():
            mean, error = difference(report, figure, variant)
            if math.isfinite(mean):
                lines.append(f"- {variant}, {figure}: {_verdict(mean, error)}")
    lines += ["", "Runs that collapsed:", ""]
    for variant in report.variants():
        runs = [curve for curve in report.curves if curve.variant == variant]
        lines.append(f"- {variant}: {sum(curve.has_collapsed() for curve in runs)} of {len(runs)}")
    critic = [curve for curve in report.curves if "critic/real" in curve.points]
    if critic:
        lines += ["", "What the critic says at the end (originals, reconstructions; 0 is undecided):", ""]
        for curve in critic:
            lines.append(f"- seed {curve.seed}: {curve.final('critic/real'):+.2f}, {curve.final('critic/fake'):+.2f}")
    _plot(report, folder / "curves.png")
    lines += ["", "![Curves](curves.png)", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _shown(mean: float, error: float) -> str:
    return f"{mean:.4g}" if math.isnan(error) else f"{mean:.4g} ({error:.2g})"


def _verdict(mean: float, half: float) -> str:
    if math.isnan(half):
        return f"{mean:+.4g}; of one seed no interval is known"
    known = "a difference" if abs(mean) > half else "no difference shown"
    return f"{mean:+.4g}, 95 % interval {mean - half:+.4g} to {mean + half:+.4g}: {known}"


def _plot(report: Report, path: Path) -> None:
    """A panel a figure; a thin line a run, a colour a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = report.figures()
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    sheet, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, figure in zip(axes.flat, figures, strict=False):
        for index, variant in enumerate(report.variants()):
            runs = [curve for curve in report.curves if curve.variant == variant and figure in curve.points]
            for number, curve in enumerate(runs):
                steps, values = zip(*curve.points[figure], strict=True)
                axis.plot(steps, values, color=f"C{index}", lw=1.2, alpha=0.8, label=None if number else variant)
        axis.set_title(figure, fontsize=10)
        axis.set_xlabel("steps", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(figures) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)
