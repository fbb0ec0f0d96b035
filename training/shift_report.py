"""The report of `python -m training.study shift`: tables by level, a chart of the drops, a picture of what breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from media.types import UInt8Array
from training.measured import Mean, finite, mean_of, table
from training.shifts import OF_THE_OBJECT, Shift

QUESTION = "What of an object survives tokens and Gaussians when light, materials, depth or views change?"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One object at one shift. psnr, ssim, snr: means over the held-out views against what they should show.

    snr: like psnr, but against the power of the wanted picture: a darker picture has no better one. patches: PSNR of
    the voxel patches that came back against those that were given, the tokenizer's own part. lost, wrong: voxels of
    the unshifted object that are not there, and voxels that it has not, as shares of its number. is_changed: whether
    the shift changed anything that was given.
    """

    psnr: float
    ssim: float
    snr: float
    patches: float
    voxels: int
    lost: float = 0.0
    wrong: float = 0.0
    is_changed: bool = True


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One object: unshifted, then by name of the shift."""

    name: str
    is_painted: bool
    unshifted: Measured
    shifted: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """One view of one object at one level: uint8 [S, S, 3] wanted and as it came back; psnr: over all its views."""

    group: str
    level: str
    wanted: UInt8Array
    back: UInt8Array
    psnr: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One level over the objects that it changes. drop, ssim_drop, snr_drop: unshifted minus shifted.

    drops, snr_drops: of each object, dB. worst: the object with the largest drop. lost, wrong: shares of the
    unshifted voxels.
    """

    shift: Shift
    psnr: Mean
    drop: Mean
    ssim_drop: Mean
    snr_drop: Mean
    patches: Mean
    lost: Mean
    wrong: Mean
    drops: tuple[float, ...]
    snr_drops: tuple[float, ...]
    worst: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        means = ("psnr", "drop", "ssim_drop", "snr_drop", "patches", "lost", "wrong")
        return {
            "group": self.shift.group,
            "level": self.shift.level,
            "what": self.shift.what,
            "against": against(self.shift.group),
            "objects": len(self.drops),
            **{name: getattr(self, name).to_json() for name in means},
            "drops": [finite(drop) for drop in self.drops],
            "snr_drops": [finite(drop) for drop in self.snr_drops],
            "worst": self.worst,
        }


def against(group: str) -> str:
    """What the held-out views of a group show."""
    return "the shifted object" if group in OF_THE_OBJECT else "the unshifted object"


def summarize(outcomes: Sequence[Outcome], shifts: Sequence[Shift]) -> list[Summary]:
    """Means over the objects that a level changes, by level."""
    found = []
    for shift in shifts:
        pairs = [(outcome, outcome.shifted[shift.name]) for outcome in outcomes]
        pairs = [(outcome, measured) for outcome, measured in pairs if measured.is_changed]
        drops = tuple(outcome.unshifted.psnr - measured.psnr for outcome, measured in pairs)
        snr_drops = tuple(outcome.unshifted.snr - measured.snr for outcome, measured in pairs)
        found.append(
            Summary(
                shift=shift,
                psnr=mean_of([measured.psnr for _, measured in pairs]),
                drop=mean_of(drops),
                ssim_drop=mean_of([outcome.unshifted.ssim - measured.ssim for outcome, measured in pairs]),
                snr_drop=mean_of(snr_drops),
                patches=mean_of([measured.patches for _, measured in pairs]),
                lost=mean_of([measured.lost for _, measured in pairs]),
                wrong=mean_of([measured.wrong for _, measured in pairs]),
                drops=drops,
                snr_drops=snr_drops,
                worst=pairs[int(np.argmax(drops))][0].name if pairs else "",
            )
        )
    return found


def write_report(
    folder: Path,
    settings: Mapping[str, str],
    outcomes: Sequence[Outcome],
    summaries: Sequence[Summary],
    pictures: Sequence[Shown],
    name: str,
) -> Path:
    """Write report.md, drops.png and breaks.png; returns the path of the report. name: of the object in the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [outcome.unshifted for outcome in outcomes]
    unshifted = {key: mean_of([getattr(one, key) for one in plain]) for key in ("psnr", "ssim", "snr", "patches")}
    lines = ["# Study: shift", "", QUESTION, ""]
    lines += [f"- {key}: {value}" for key, value in settings.items()]
    lines += [
        "",
        "What the held-out views are compared with:",
        "",
        *(
            f"- **{group}**: {against(group)}" + (", drawn again with the shift" if group in OF_THE_OBJECT else "")
            for group in dict.fromkeys(summary.shift.group for summary in summaries)
        ),
        "",
        f"Unshifted, mean over {len(plain)} objects (95 % interval by Student's t over objects): "
        f"PSNR {unshifted['psnr'].text()} dB, SSIM {unshifted['ssim'].text(3)}, patches {unshifted['patches'].text()} "
        "dB.",
        "",
        "## How much is lost",
        "",
        "Drop: unshifted minus shifted, object by object; above 0 is worse. n: objects that the level changes (a grey "
        "one has no",
        "hues to turn). SNR is PSNR against the power of the wanted picture: where light or material make the wanted "
        "picture darker or",
        "plainer, PSNR rises by itself, and SNR is the one to read; where the wanted picture is the unshifted one, "
        "both drop alike.",
        "Patches: PSNR of the voxel patches that came back against those that went in, the tokenizer alone.",
        "",
    ]
    rows = []
    for one in summaries:
        rows.append(
            [
                one.shift.group,
                one.shift.level,
                str(len(one.drops)),
                _bare(one.psnr),
                one.drop.text(sign=True) + _mark(one.drop),
                one.snr_drop.text(sign=True) + _mark(one.snr_drop),
                one.ssim_drop.text(3, sign=True),
                _bare(one.patches),
                one.worst or "-",
            ]
        )
    head = ["shift", "level", "n", "PSNR dB", "drop dB", "SNR drop dB", "SSIM drop", "patches dB", "largest drop"]
    lines += table(head, rows)
    lines += ["", "\\* the interval does not hold 0. Each level is one of many: a single mark proves little.", ""]
    moved = [one for one in summaries if one.shift.group not in OF_THE_OBJECT]
    if moved:
        lines += [
            "## Voxels",
            "",
            "Percent of the unshifted object's voxels. Lost: not there any more. Wrong: there, though the unshifted "
            "object has none there.",
            "Light and materials move no voxel.",
            "",
            *table(
                ["shift", "level", "lost %", "wrong %"],
                [[one.shift.group, one.shift.level, _percent(one.lost), _percent(one.wrong)] for one in moved],
            ),
            "",
        ]
    lines += ["## Levels", ""]
    lines += table(
        ["shift", "level", "what it is"], [[one.shift.group, one.shift.level, one.shift.what] for one in summaries]
    )
    _chart(summaries, folder / "drops.png")
    _grid(pictures, f"{name}: wanted | what came back", folder / "breaks.png")
    lines += [
        "",
        "![Drops by level](drops.png)",
        "",
        f"What breaks, on {name}: each pair is what a held-out view should show, and what came back.",
        "",
        "![What breaks](breaks.png)",
        "",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _mark(mean: Mean) -> str:
    return " \\*" if abs(mean.value) > mean.half else ""


def _bare(mean: Mean) -> str:
    return f"{mean.value:.2f}" if mean.count else "-"


def _percent(mean: Mean) -> str:
    return Mean(100 * mean.value, 100 * mean.half, mean.count).text(1)


def _chart(summaries: Sequence[Summary], path: Path) -> None:
    """A row a level: a dot an object, the mean and its interval; PSNR beside SNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(summary.shift.group for summary in summaries))
    size = (11.0, 1.6 + 0.27 * len(summaries))
    sheet, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    places = range(len(summaries))
    for axis, title, what in zip(axes, ("PSNR drop, dB", "SNR drop, dB"), ("drop", "snr_drop"), strict=True):
        for place, one in zip(places, summaries, strict=True):
            drops = getattr(one, f"{what}s")
            axis.plot(drops, [place] * len(drops), ".", color=f"C{groups.index(one.shift.group)}", alpha=0.35, ms=5)
        axis.margins(x=0.1)
        # Of few objects an interval is wider than all else: the dots alone say how far the axis goes.
        limits = axis.get_xlim()
        for place, one in zip(places, summaries, strict=True):
            mean: Mean = getattr(one, what)
            colour = f"C{groups.index(one.shift.group)}"
            if mean.count > 1:
                axis.plot([mean.value - mean.half, mean.value + mean.half], [place] * 2, color=colour, lw=2)
            if mean.count:
                axis.plot([mean.value], [place], "o", color=colour, ms=6, markeredgecolor="white")
        axis.set_xlim(limits)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_yticks(list(places), [one.shift.name for one in summaries], fontsize=8)
    axes[0].invert_yaxis()
    sheet.supxlabel(
        "right of 0 is worse than unshifted; small dots: objects; bars: 95 % intervals of the mean", fontsize=9
    )
    sheet.savefig(path, dpi=110)
    plt.close(sheet)


def _grid(pictures: Sequence[Shown], title: str, path: Path) -> None:
    """A row a group, the unshifted pair first in every row; all cut to the square that the object fills."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top, left, side = _square([part for shown in pictures for part in (shown.wanted, shown.back)])
    window = slice(top, top + side), slice(left, left + side)
    first, *others = pictures
    groups = list(dict.fromkeys(shown.group for shown in others)) or [first.group]
    rows = [[first, *(shown for shown in others if shown.group == group)] for group in groups]
    columns = max(map(len, rows))
    size = (2.3 * columns, 1.42 * len(rows) + 0.3)
    sheet, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for line, group, row in zip(axes, groups, rows, strict=True):
        for axis, shown in zip(line, row, strict=False):
            rule = np.full((side, max(1, side // 60), 3), 255, np.uint8)
            axis.imshow(np.concatenate([shown.wanted[window], rule, shown.back[window]], axis=1))
            label = shown.level if shown is first else f"{group}: {shown.level}"
            axis.set_title(f"{label}, {shown.psnr:.1f} dB", fontsize=8)
    sheet.suptitle(title, fontsize=9)
    sheet.savefig(path, dpi=130)
    plt.close(sheet)


def _square(pictures: Sequence[UInt8Array]) -> tuple[int, int, int]:
    """Top, left and side of the smallest square that holds all that is not black in any of the pictures."""
    there = np.max([picture.max(axis=2) > 20 for picture in pictures], axis=0)
    if not there.any():
        return 0, 0, len(there)
    rows, columns = (np.flatnonzero(there.any(axis=axis)) for axis in (1, 0))
    side = min(len(there), 4 + max(int(np.ptp(rows)), int(np.ptp(columns))))
    top, left = ((int(ends[0]) + int(ends[-1]) - side) // 2 + 1 for ends in (rows, columns))
    most = len(there) - side
    return min(max(top, 0), most), min(max(left, 0), most), side
