"""The report of a study: final figures with their spread over seeds, differences with their error, speed, curves."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COLLAPSE_DB = 3.0
"""A run that ends a stage so far below its best look of that stage has collapsed."""

INTERVAL = "95 % interval"

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 % for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run. points: (step, value) of each figure; collapsed: it broke off with numbers that are not finite.

    ends: the last step of each stage, counted over all stages as in points; without them a run ends at its last point.
    """

    variant: str
    seed: int
    points: Mapping[str, Sequence[tuple[int, float]]]
    ends: Mapping[str, int] = field(default_factory=dict)
    collapsed: bool = False

    def final(self, name: str) -> float:
        """The value of a figure at the end of the run; NaN if it has none there, as where it broke off."""
        values = self.whole(name)
        return values[-1][1] if values else math.nan

    def middle(self, name: str) -> float:
        """The value at the middle look; NaN if the run has none, or broke off."""
        values = self.whole(name)
        return values[(len(values) - 1) // 2][1] if values else math.nan

    def whole(self, name: str) -> Sequence[tuple[int, float]]:
        """The points of a figure, if they go on to the end of the run."""
        values = self.points.get(name, ())
        early = bool(values) and values[-1][0] < max(self.ends.values(), default=0)
        return () if self.collapsed or early else values

    def first_look(self) -> int:
        """The step of the first look, at whatever; 0 without looks."""
        looks = [points[0][0] for name, points in self.points.items() if points and not name.startswith("critic/")]
        return min(looks, default=0)

    def from_first_look(self, name: str) -> bool:
        """Whether a figure was looked at from the first look on."""
        values = self.points.get(name, ())
        return bool(values) and values[0][0] == self.first_look()

    def mean_over(self, name: str, steps: Sequence[int]) -> float:
        """Mean of the values at some of its steps: better for what learned sooner (so less, where less is better)."""
        values = dict(self.points[name])
        return sum(values[step] for step in steps) / len(steps)

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
        """Whether it broke off, or any PSNR ended a stage COLLAPSE_DB under its best of that stage.

        From stage to stage what is learned changes: a fall there is another matter (see "at the end of each stage").
        """
        ends = sorted(self.ends.values()) or [0]
        stages: dict[tuple[str, int], list[float]] = {}
        for name, points in self.points.items():
            if name.endswith("/psnr"):
                for step, value in points:
                    stages.setdefault((name, bisect.bisect_left(ends[:-1], step)), []).append(value)
        return self.collapsed or any(max(values) - values[-1] > COLLAPSE_DB for values in stages.values())


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


@dataclass(frozen=True)
class Gap:
    """Mean of the differences that are known, half its 95 % interval (NaN where not known), how many, of how many."""

    mean: float
    half: float
    known: int
    count: int

    def words(self) -> str:
        """With a verdict, if the difference is known of all: those that are left are not chosen by chance."""
        if not self.known:
            return f"0 of {self.count} pairs, no verdict"
        if self.known < self.count:
            return f"{self.mean:+.4g}; {self.known} of {self.count} pairs, no verdict"
        if math.isnan(self.half):
            return f"{self.mean:+.4g}; of one seed no interval is known"
        known = "a difference" if abs(self.mean) > self.half else "no difference shown"
        ends = f"{self.mean - self.half:+.4g} to {self.mean + self.half:+.4g}"
        return f"{self.mean:+.4g}, {INTERVAL} {ends}: {known}"


def gap_of(values: Sequence[float]) -> Gap:
    """Of differences, NaN for those that are not known."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Gap(math.nan, math.nan, 0, len(values))
    mean, error = mean_and_error(finite)
    return Gap(mean, half_interval(error, len(finite)), len(finite), len(values))


def pairs_of(report: Report, variant: str, figure: str) -> list[tuple[Curve, Curve]]:
    """Runs of a variant, each with the first variant's of the same seed, if both sides have a figure at all."""
    firsts = {curve.seed: curve for curve in report.curves if curve.variant == report.variants()[0]}
    runs = [curve for curve in report.curves if curve.variant == variant and curve.seed in firsts]
    pairs = [(curve, firsts[curve.seed]) for curve in runs]
    both = all(any(pair[side].points.get(figure) for pair in pairs) for side in (0, 1))
    return pairs if both else []


def difference(report: Report, figure: str, variant: str) -> Gap:
    """Variant minus first variant at the end, seed by seed."""
    return gap_of([curve.final(figure) - other.final(figure) for curve, other in pairs_of(report, variant, figure)])


def over_looks(pairs: Sequence[tuple[Curve, Curve]], figure: str) -> tuple[Gap, str]:
    """Mean over the looks that both runs of a pair have, and which these are where they are not all, in words.

    A single one says nothing of the way there: such pairs are not known.
    """
    gaps, starts, ends = [], set(), set()
    for curve, other in pairs:
        shared = sorted(dict(curve.points.get(figure, ())).keys() & dict(other.points.get(figure, ())).keys())
        if len(shared) < 2:
            gaps.append(math.nan)
            continue
        gaps.append(curve.mean_over(figure, shared) - other.mean_over(figure, shared))
        if shared[0] > min(curve.first_look(), other.first_look()):
            starts.add(shared[0])
        if curve.collapsed or other.collapsed:
            ends.add(shared[-1])
    words = f" from step {min(starts)}" if starts else ""
    words += f", to step {min(ends)} where one broke off" if ends else ""
    return gap_of(gaps), words


def write_report(report: Report, folder: Path) -> Path:
    """Write report.md, report.json (every value of every look) and curves.png; returns the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = report.variants()
    lines = [f"# Study: {report.name}", "", report.question, ""]
    lines += [f"- {key}: {value}" for key, value in report.settings.items()]
    lines += ["", "Last look, mean over seeds (standard error), of how many runs that came to their end; PSNR in dB,"]
    lines[-1] += " higher is better; fd, rfid lower:"
    lines += [""]
    lines += ["| figure | " + " | ".join(report.variants()) + " |", "|---" * (1 + len(report.variants())) + "|"]
    for figure in report.figures():
        cells = []
        for variant in report.variants():
            values = [curve.final(figure) for curve in report.curves if curve.variant == variant]
            measured = any(figure in curve.points for curve in report.curves if curve.variant == variant)
            cells.append(_of(values) if measured else "not measured")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    compared = ["", f"Against `{first}`, seed by seed (the same start and samples):", ""]
    for variant in others:
        for figure in report.figures():
            found = difference(report, figure, variant)
            if found.count:
                compared.append(f"- {variant}, {figure}: {found.words()}")
    compared += [*_speed(report), *_stages(report)]
    lines += [*_chance(compared), *compared]
    lines += [
        "",
        f"Runs that collapsed (broke off, or a PSNR ended a stage {COLLAPSE_DB:g} dB under its best there):",
        "",
    ]
    for variant in report.variants():
        runs = [curve for curve in report.curves if curve.variant == variant]
        lines.append(f"- {variant}: {sum(curve.has_collapsed() for curve in runs)} of {len(runs)}")
    critic = [curve for curve in report.curves if "critic/real" in curve.points]
    if critic:
        lines += ["", "What the critic says at the end (originals, reconstructions; 0 is undecided):", ""]
        for curve in critic:
            real, fake = curve.final("critic/real"), curve.final("critic/fake")
            said = f"{real:+.2f}, {fake:+.2f}" if math.isfinite(real + fake) else "broke off before"
            lines.append(f"- seed {curve.seed}: {said}")
    _plot(report, folder / "curves.png")
    lines += ["", "![Curves](curves.png)", ""]
    document = {"study": report.name, **report.settings, "curves": [asdict(curve) for curve in report.curves]}
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _chance(lines: Sequence[str]) -> list[str]:
    """How many of the intervals would leave out 0 by chance."""
    count = sum(INTERVAL in line for line in lines)
    if not count:
        return []
    text = f"The lists below have {count} intervals of 95 %: if nothing differed, {count / 20:.1f} of them would be"
    return ["", f"{text} expected to leave out 0 by chance, and figures of the same runs do so together."]


def _speed(report: Report) -> list[str]:
    """Steps to two levels of the first variant, and the mean over the looks.

    Steps to a level are of figures that both were looked at from the first look on: else the first look decides.
    """
    first, *others = report.variants()
    if not others:
        return []
    lines = ["", f"Learning speed: steps until a run is as good as `{first}` of the same seed at its middle look, and"]
    lines[-1] += " at its last: mean (standard error), of how many runs that get there; a straight line between looks,"
    lines[-1] += (
        " the step of the first look for what is there by then. Only of what both were looked at from the first"
    )
    lines[-1] += " look on."
    lines += ["", "| figure, level | " + " | ".join(report.variants()) + " |"]
    lines += ["|---" * (1 + len(report.variants())) + "|"]
    for figure, (level, value_of) in itertools.product(report.figures(), LEVELS.items()):
        cells = []
        for variant in report.variants():
            pairs = pairs_of(report, variant, figure)
            steps = [curve.steps_to(figure, value_of(other, figure)) for curve, other in pairs]
            cells.append(
                _of(steps) if _timed(pairs, figure) else "not from the first look" if pairs else "not measured"
            )
        lines.append(f"| {figure}, {level} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Against `{first}`, seed by seed, where both get there; and the mean over the looks that both have:",
        "",
    ]
    for variant, figure in itertools.product(others, report.figures()):
        pairs = pairs_of(report, variant, figure)
        for level, value_of in LEVELS.items() if _timed(pairs, figure) else ():
            levels = [value_of(other, figure) for _, other in pairs]
            gaps = [
                curve.steps_to(figure, value) - other.steps_to(figure, value)
                for (curve, other), value in zip(pairs, levels, strict=True)
            ]
            lines.append(f"- {variant}, {figure}, steps to {level}: {gap_of(gaps).words()}")
        found, which = over_looks(pairs, figure)
        if found.known:
            lines.append(f"- {variant}, {figure}, mean over looks{which}: {found.words()}")
    return lines


def _timed(pairs: Sequence[tuple[Curve, Curve]], figure: str) -> bool:
    """Whether both runs of all pairs were looked at from the first look on; a run without any look says nothing."""
    runs = [curve for pair in pairs for curve in pair if curve.points]
    return bool(runs) and all(curve.from_first_look(figure) for curve in runs)


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
            means = ", ".join(f"{stage} {_of(values, always=False)}" for stage, values in known.items())
            start, *_, end = known.values()
            found = gap_of([b - a for a, b in zip(start, end, strict=True)])
            lines.append(f"- {variant}, {figure}: {means}; last against first: {found.words()}")
    return ["", "At the end of each stage, mean over seeds (standard error):", "", *lines] if lines else []


def _of(values: Sequence[float], *, always: bool = True) -> str:
    """Mean of the finite values (standard error), and of how many they are; always: also if of all."""
    finite = [value for value in values if math.isfinite(value)]
    count = f"{len(finite)} of {len(values)}"
    if not finite:
        return count
    mean, error = mean_and_error(finite)
    shown = f"{mean:.4g}" if math.isnan(error) else f"{mean:.4g} ({error:.2g})"
    return f"{shown}, {count}" if always or len(finite) < len(values) else shown


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
    # Not every variant has every figure.
    fullest = max(axes.flat, key=lambda axis: len(axis.get_legend_handles_labels()[1]))
    fullest.legend(fontsize=8)
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
