"""The report of a study: final figures with their spread over seeds, differences with their error, speed, curves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COLLAPSE_DB = 3.0
"""A run that ends so far below its best look has collapsed."""

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. points: (step, value) of each figure; collapsed: it ended with numbers that are not finite.

    ends: the last step of each stage, counted over all stages as in points.
    """

    variant: str
    seed: int
    points: Mapping[str, Sequence[tuple[int, float]]]
    ends: Mapping[str, int] = field(default_factory=dict)
    collapsed: bool = False

    def final(self, name: str) -> float:
        """The last value of a figure; NaN if the run has none."""
        values = self.points.get(name)
        return values[-1][1] if values else math.nan

    def middle(self, name: str) -> float:
        """The value at the middle look; NaN if the run has none."""
        values = self.points.get(name)
        return values[(len(values) - 1) // 2][1] if values else math.nan

    def over_looks(self, name: str) -> float:
        """Mean over the looks: what learned sooner has more of it. NaN if the run has none."""
        values = self.points.get(name)
        return sum(value for _, value in values) / len(values) if values else math.nan

    def steps_to(self, name: str, level: float) -> float:
        """Steps until a figure is as good as `level`, by a straight line between looks; NaN if it never is."""
        sign = -1 if is_distance(name) else 1
        points = [(step, sign * value) for step, value in self.points.get(name, ())]
        if points and points[0][1] >= sign * level:
            return float(points[0][0])
        for (before, low), (after, high) in itertools.pairwise(points):
            if high >= sign * level:
                return before + (after - before) * (sign * level - low) / (high - low)
        return math.nan

    def at_end_of(self, stage: str, name: str) -> float:
        """The value at the last step of a stage; NaN if the run has none there."""
        return dict(self.points.get(name, ())).get(self.ends[stage], math.nan)

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


def is_distance(figure: str) -> bool:
    """Whether less of a figure is better."""
    return figure.endswith(("/fd", "/rfid"))


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
    """Mean over seeds of variant minus first variant at the end, and half its 95 % interval. See paired."""
    return paired(report, variant, lambda curve, _: curve.final(figure))


def paired(report: Report, variant: str, value: Callable[[Curve, Curve], float]) -> tuple[float, float]:
    """Mean over seeds of variant minus first variant, and half its 95 % interval. Seeds without both are left out.

    value: of a run, and the first variant's of the same seed.
    """
    runs = {(curve.variant, curve.seed): curve for curve in report.curves}
    first = report.variants()[0]
    seeds = [seed for name, seed in runs if name == first and (variant, seed) in runs]
    pairs = [
        value(runs[variant, seed], runs[first, seed]) - value(runs[first, seed], runs[first, seed]) for seed in seeds
    ]
    return mean_and_half(pairs)


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean of the finite values and half its 95 % interval; NaN where it is not known."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan, math.nan
    mean, error = mean_and_error(finite)
    return mean, half_interval(error, len(finite))


def write_report(report: Report, folder: Path) -> Path:
    """Write report.md, report.json (every value of every look) and curves.png; returns the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = report.variants()
    lines = [f"# Study: {report.name}", "", report.question, ""]
    lines += [f"- {key}: {value}" for key, value in report.settings.items()]
    lines += ["", "Last look, mean over seeds (standard error); PSNR in dB, higher is better; fd, rfid lower:", ""]
    lines += ["| figure | " + " | ".join(report.variants()) + " |", "|---" * (1 + len(report.variants())) + "|"]
    for figure in report.figures():
        cells = []
        for variant in report.variants():
            values = [curve.final(figure) for curve in report.curves if curve.variant == variant]
            finite = [value for value in values if math.isfinite(value)]
            cells.append(_shown(*mean_and_error(finite)) if finite else "not measured")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    lines += ["", f"Against `{first}`, seed by seed (the same start and samples):", ""]
    for variant in others:
        for figure in report.figures():
            mean, error = difference(report, figure, variant)
            if math.isfinite(mean):
                lines.append(f"- {variant}, {figure}: {_verdict(mean, error)}")
    lines += [*_speed(report), *_stages(report), "", "Runs that collapsed:", ""]
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
    document = {"study": report.name, **report.settings, "curves": [asdict(curve) for curve in report.curves]}
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _speed(report: Report) -> list[str]:
    """Steps to two levels of the first variant, and the mean over the looks."""
    first, *others = report.variants()
    if not others:
        return []
    firsts = {curve.seed: curve for curve in report.curves if curve.variant == first}
    lines = ["", f"Learning speed: steps until a run is as good as `{first}` of the same seed at its middle look, and"]
    lines[-1] += " at its last: mean (standard error), of how many runs that get there; a straight line between looks."
    lines += ["", "| figure, level | " + " | ".join(report.variants()) + " |"]
    lines += ["|---" * (1 + len(report.variants())) + "|"]
    for figure, (level, value_of) in itertools.product(report.figures(), LEVELS.items()):
        cells = []
        for variant in report.variants():
            runs = [curve for curve in report.curves if curve.variant == variant and curve.seed in firsts]
            steps = [curve.steps_to(figure, value_of(firsts[curve.seed], figure)) for curve in runs]
            there = [value for value in steps if math.isfinite(value)]
            cells.append(f"{_shown(*mean_and_error(there))}, {len(there)} of {len(runs)}" if there else "never")
        lines.append(f"| {figure}, {level} | " + " | ".join(cells) + " |")
    lines += ["", f"Against `{first}`, seed by seed, where both get there; and the mean over all looks:", ""]
    for variant, figure in itertools.product(others, report.figures()):
        for level, value_of in LEVELS.items():
            mean, half = paired(
                report,
                variant,
                lambda curve, other: curve.steps_to(figure, value_of(other, figure)),  # noqa: B023
            )
            if math.isfinite(mean):
                lines.append(f"- {variant}, {figure}, steps to {level}: {_verdict(mean, half)}")
        mean, half = paired(report, variant, lambda curve, _: curve.over_looks(figure))  # noqa: B023
        if math.isfinite(mean):
            lines.append(f"- {variant}, {figure}, mean over looks: {_verdict(mean, half)}")
    return lines


LEVELS: dict[str, Callable[[Curve, str], float]] = {"middle": Curve.middle, "last": Curve.final}


def _stages(report: Report) -> list[str]:
    """What becomes of a figure from one stage to the next, of variants with several."""
    lines = []
    for variant in report.variants():
        runs = [curve for curve in report.curves if curve.variant == variant]
        for figure in report.figures():
            ends = {
                stage: [run.at_end_of(stage, figure) for run in runs if stage in run.ends] for stage in runs[0].ends
            }
            known = {stage: values for stage, values in ends.items() if any(map(math.isfinite, values))}
            if len(known) < 2:
                continue
            means = ", ".join(f"{stage} {_shown(*_finite_mean(values))}" for stage, values in known.items())
            start, *_, end = known.values()
            mean, half = mean_and_half([b - a for a, b in zip(start, end, strict=True)])
            lines.append(f"- {variant}, {figure}: {means}; last against first: {_verdict(mean, half)}")
    return ["", "At the end of each stage, mean over seeds (standard error):", "", *lines] if lines else []


def _finite_mean(values: Sequence[float]) -> tuple[float, float]:
    return mean_and_error([value for value in values if math.isfinite(value)])


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

    critics = [curve for curve in report.curves if "critic/real" in curve.points]
    figures = [*report.figures(), *(["critic"] if critics else [])]
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    sheet, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, layout="constrained")
    for axis, figure in zip(axes.flat, figures, strict=False):
        for index, variant in enumerate(report.variants()):
            runs = [curve for curve in report.curves if curve.variant == variant and figure in curve.points]
            for number, curve in enumerate(runs):
                steps, values = zip(*curve.points[figure], strict=True)
                axis.plot(steps, values, color=f"C{index}", lw=1.2, alpha=0.8, label=None if number else variant)
        for end in sorted({end for curve in report.curves for end in list(curve.ends.values())[:-1]}):
            axis.axvline(end, color="0.8", lw=0.8, zorder=0)
        axis.set_title(figure, fontsize=10)
        axis.set_xlabel("steps", fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(figures) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8)
    if critics:
        _plot_critics(list(axes.flat)[len(figures) - 1], critics)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)


def _plot_critics(axis: Any, critics: Sequence[Curve]) -> None:
    """Mean scores of originals, full, and of reconstructions, dashed."""
    for number, curve in enumerate(critics):
        for name, style in (("critic/real", "-"), ("critic/fake", "--")):
            steps, values = zip(*curve.points[name], strict=True)
            axis.plot(steps, values, style, color="C1", lw=1.2, label=None if number else name)
    axis.set_title("critic: mean scores", fontsize=10)
    axis.legend(fontsize=8)
