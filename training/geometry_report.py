"""The report of `python -m training.study geometry`: accuracy, cluster measures, how they go together, maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.clusters import Correlation, paired_difference, rank_correlation, resampled
from training.measured import finite, table
from training.retrieval import Share

QUESTION = "Do classes that lie apart in a space make for better neighbours in it?"
REFERENCE = "pixels, 16 x 16"
"""What a representation must beat to be worth having."""
MEASURES = {
    "silhouette": "silhouette (higher is apart)",
    "davies_bouldin": "Davies-Bouldin (lower is apart)",
    "between": "variance between classes (higher is apart)",
    "participation": "participation ratio",
    "effective_rank": "effective rank",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One representation. accuracy: of test pictures, by (k, whether the training mean was taken off).

    hits: bool [M], which of the (or of some) test pictures five neighbours around the mean name right. The measures are
    of the training pictures. is_control: knows nothing of the pictures; not in any correlation.
    """

    name: str
    what: str
    values: int
    accuracy: Mapping[tuple[int, bool], Share]
    hits: npt.NDArray[np.bool_]
    silhouette: float
    davies_bouldin: float
    between: float
    participation: float
    effective_rank: float
    is_control: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "what": self.what,
            "values": self.values,
            "is_control": self.is_control,
            "accuracy": [
                {"k": k, "centred": centred, "right": share.right, "count": share.count, "interval": share.interval}
                for (k, centred), share in self.accuracy.items()
            ],
            **{name: finite(getattr(self, name)) for name in MEASURES},
        }


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Two maps of one representation, float64 [N, 2] each. shares: of the variance along the two axes of the first."""

    name: str
    pca: npt.NDArray[np.float64]
    shares: tuple[float, float]
    tsne: npt.NDArray[np.float64]
    labels: npt.NDArray[np.int64]
    is_test: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Link:
    """How a measure goes with accuracy. low, high: 95 % interval over test pictures, the spaces staying as they are."""

    ranks: Correlation
    low: float
    high: float

    def __str__(self) -> str:
        ranks = self.ranks
        if ranks.value != ranks.value:
            return f"not defined over {ranks.count} representations"
        over_spaces = "unknown" if ranks.low != ranks.low else f"{ranks.low:+.2f} to {ranks.high:+.2f}"
        return (
            f"{ranks.value:+.2f}; over test pictures {self.low:+.2f} to {self.high:+.2f}; over representations "
            f"{over_spaces}, p = {ranks.chance:.3f} (n = {ranks.count})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ranks = self.ranks
        return {
            "value": finite(ranks.value),
            "over_pictures": [finite(self.low), finite(self.high)],
            "over_representations": [finite(ranks.low), finite(ranks.high)],
            "p": finite(ranks.chance),
            "count": ranks.count,
        }


def correlations(outcomes: Sequence[Outcome], seed: int) -> dict[str, Link]:
    """Of each measure with the accuracy of five neighbours around the mean, over representations but the control."""
    spaces = [outcome for outcome in outcomes if not outcome.is_control]
    accuracy = [outcome.accuracy[5, True].value for outcome in spaces]
    hits = np.stack([outcome.hits for outcome in spaces])
    found = {}
    for name in MEASURES:
        values = [getattr(outcome, name) for outcome in spaces]
        found[name] = Link(rank_correlation(values, accuracy, seed=seed), *resampled(values, hits, seed=seed))
    return found


def write_report(
    folder: Path,
    settings: Mapping[str, str],
    outcomes: Sequence[Outcome],
    found: Mapping[str, Link],
    maps: Sequence[Maps],
    names: Sequence[str],
    seed: int,
) -> Path:
    """Write report.md, scatter.png, map-pca.png and map-tsne.png; returns the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# Study: geometry", "", QUESTION, ""]
    lines += [f"- {key}: {value}" for key, value in settings.items()]
    lines += [
        "",
        "## Accuracy",
        "",
        "Percent of the test pictures whose nearest training pictures by cosine (the one nearest; the majority of "
        "five) are of their class,",
        "with the 95 % interval of a share (Wilson). Around the mean: the mean of the training pictures is taken off "
        "first. Last column:",
        f"the difference from {REFERENCE} in the column before it, picture by picture (95 %, bootstrap over the test "
        "pictures).",
        "",
    ]
    kinds = {(1, False): "k = 1", (5, False): "k = 5", (1, True): "k = 1, around the mean"}
    kinds[5, True] = "k = 5, around the mean"
    reference = next((one for one in outcomes if one.name == REFERENCE), outcomes[0])
    rows = []
    for one in outcomes:
        value, low, high = (100 * part for part in paired_difference(one.hits, reference.hits, seed=seed))
        difference = "-" if one is reference else f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
        rows.append([one.name, f"{one.values:,}", *(_share(one.accuracy[kind]) for kind in kinds), difference])
    lines += table(["representation", "values", *kinds.values(), f"minus {reference.name}"], rows)
    lines += [
        "",
        "## Geometry",
        "",
        "Of the training pictures, by their true classes. Silhouette, Davies-Bouldin and variance between classes "
        "(over all variance): of",
        "unit vectors around the mean, as neighbours around the mean see them. Participation ratio and "
        "effective rank (e to the",
        "entropy): how many dimensions the variance fills, classes aside.",
        "",
        *table(
            ["representation", "silhouette", "Davies-Bouldin", "between", "participation", "effective rank"],
            [
                [
                    one.name,
                    f"{one.silhouette:+.3f}",
                    f"{one.davies_bouldin:.2f}",
                    f"{one.between:.3f}",
                    f"{one.participation:.1f}",
                    f"{one.effective_rank:.1f}",
                ]
                for one in outcomes
            ],
        ),
        "",
        "## Do they go together?",
        "",
        "Spearman's rank correlation with k = 5 around the mean, over representations, without the control. Two "
        "doubts, each a 95 % interval:",
        "the test pictures might have been others (bootstrap over them, which leans to 0), and so might the "
        "representations (Fisher's z, and p",
        "by permutations). The second takes them for independent draws, which they are not: some are pixels, some "
        "latents of one model. Five",
        "measures are looked at: one p of 0.05 among them is no finding.",
        "",
        *(f"- {MEASURES[name]}: {value}" for name, value in found.items()),
        "",
        "![Measures against accuracy](scatter.png)",
        "",
        "## Maps",
        "",
        "Dots are training pictures, crosses test pictures. PCA is linear, percent of the variance in the titles; "
        "t-SNE keeps neighbours, and",
        "its sizes and gaps between groups mean nothing.",
        "",
        "![PCA](map-pca.png)",
        "",
        "![t-SNE](map-tsne.png)",
        "",
        "## Representations",
        "",
        *table(["representation", "what it is"], [[one.name, one.what] for one in outcomes]),
        "",
    ]
    _scatter(outcomes, found, folder / "scatter.png")
    _map_sheet(maps, names, folder / "map-pca.png", is_pca=True)
    _map_sheet(maps, names, folder / "map-tsne.png", is_pca=False)
    path = folder / "report.md"
    path.write_text("\n".join(lines))
    return path


def _share(share: Share) -> str:
    low, high = share.interval
    return f"{100 * share.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _scatter(outcomes: Sequence[Outcome], found: Mapping[str, Link], path: Path) -> None:
    """A panel a cluster measure; a point a representation, its accuracy with the interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = list(MEASURES)[:3]
    sheet, axes = plt.subplots(1, 3, figsize=(13.5, 4.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, shown, strict=True):
        for index, one in enumerate(outcomes):
            share = one.accuracy[5, True]
            low, high = share.interval
            colour = "black" if one.is_control else f"C{index}"
            x, y = getattr(one, name), 100 * share.value
            axis.plot([x, x], [100 * low, 100 * high], color=colour, lw=1, alpha=0.6)
            axis.plot([x], [y], "x" if one.is_control else "o", color=colour, ms=7, label=one.name)
        link = found[name]
        title = f"rank correlation {link.ranks.value:+.2f}\n{link.low:+.2f} to {link.high:+.2f} over test pictures"
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(MEASURES[name], fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("k = 5 around the mean, % right (95 %)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)


def _map_sheet(maps: Sequence[Maps], names: Sequence[str], path: Path, *, is_pca: bool) -> None:
    """A panel a representation, a colour a class."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(5, len(maps))
    rows = -(-len(maps) // columns)
    sheet, axes = plt.subplots(rows, columns, figsize=(3.0 * columns, 3.1 * rows + 0.6), squeeze=False)
    colours = plt.get_cmap("tab20")
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, one in zip(axes.flat, maps, strict=False):
        axis.set_axis_on()
        places = one.pca if is_pca else one.tsne
        for label, name in enumerate(names):
            for is_test, mark in ((False, "."), (True, "x")):
                rows_of = (one.labels == label) & (one.is_test == is_test)
                style = {"color": colours(label % 20), "ls": "", "marker": mark, "ms": 5, "mew": 1.1}
                axis.plot(*places[rows_of].T, label=None if is_test else name, **style)
        title = one.name
        if is_pca:
            title += f"\n{100 * one.shares[0]:.0f} % and {100 * one.shares[1]:.0f} %"
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    sheet.legend(handles[:20], labels[:20], loc="lower center", ncols=7, fontsize=8)
    sheet.tight_layout(rect=(0, 0.11 if rows == 1 else 0.06, 1, 1))
    sheet.savefig(path, dpi=110)
    plt.close(sheet)
