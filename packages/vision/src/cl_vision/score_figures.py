"""Pictures of scores over training: curves of their statistics, histograms, and a waterfall over a hyper-parameter.

Like :mod:`cl_vision.figures`, every function draws from plain arrays and writes one PNG whole or not at all.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cl_vision import figures

STATISTICS = {
    "positive_mean": "positive scores: mean",
    "positive_variance": "positive scores: variance",
    "negative_mean": "negative scores: mean",
    "negative_variance": "negative scores: variance",
}
KINDS = {"positive": figures._POSITIVE, "negative": figures._NEGATIVE}
_SMOOTHING = 25  # a smoothed curve's value is the mean over this share of all steps
_DASHES = ("-", "--", ":", "-.")
_COLUMNS = 5  # runs side by side

Curves = tuple[Any, Mapping[str, Any]]
"""Steps (S,), and for each of :data:`STATISTICS` its values (S,)."""
Histograms = tuple[Any, Any, Any, Any]
"""Steps at which blocks end (B,), edges of bins (n + 1,), and counts (B, n) of positive and of negative scores."""


def plot_score_curves(
    path: str | Path,
    runs: Mapping[str, Curves],
    *,
    accuracies: Mapping[str, float | None] | None = None,
    accuracy_name: str = "test accuracy",
    title: str = "Scores over training",
    step_name: str = "optimiser step",
) -> Path:
    """Mean and variance of the positive and negative scores over the steps: smoothed, and faint as they were.

    Args:
        path: PNG to write.
        runs: name of each run to its curves; one colour a run.
        accuracies: in [0, 1], by run, for the legend; None for a run without one.
        accuracy_name: what they are.
        title: of the picture.
        step_name: what is counted along the horizontal axes.

    Returns:
        The path written.
    """
    _some(runs)
    names = {}
    for name in runs if len(runs) > 1 else ():
        accuracy = (accuracies or {}).get(name)
        names[name] = textwrap.fill(name if accuracy is None else f"{name} | {100 * accuracy:.1f} %", 100)
    columns = max(1, min(3, 110 // max(map(len, names.values()), default=110)))
    figure = figures._figure(width=10.4, height=6.4 + 0.25 * math.ceil(len(names) / columns))
    panels = figure.subplots(2, 2, sharex=True).flat
    for (statistic, heading), axes in zip(STATISTICS.items(), panels, strict=True):
        for place, (steps, curves) in enumerate(runs.values()):
            values = _curve(steps, curves[statistic])
            colour, dashes = _style(place) if len(runs) > 1 else (KINDS[statistic.partition("_")[0]], "-")
            axes.plot(
                steps, values, color=colour, linewidth=0.7, alpha=max(0.1, 0.3 / len(runs) ** 0.5), zorder=2
            )
            axes.plot(steps, smoothed(values), color=colour, linewidth=1.7, linestyle=dashes, zorder=3)
        axes.set_title(heading, color=figures._TEXT, fontsize=11)
        axes.margins(x=0.01)
        figures._tidy(axes)
    for axes in figure.axes[2:]:
        figures._count(axes, step_name)
    if names:
        styles = [_style(place) for place in range(len(names))]
        handles = [Line2D([], [], color=colour, linestyle=dashes, linewidth=2) for colour, dashes in styles]
        legend = figure.legend(
            handles, ["run"] * len(handles), loc="outside lower center", ncols=columns, frameon=False
        )
        if any(accuracy is not None for accuracy in (accuracies or {}).values()):
            legend.set_title(f"run | {accuracy_name}")
        for text, name in zip(legend.get_texts(), names.values(), strict=True):
            figures._write(text, name)
    _head(figure, title)
    return figures._save(figure, path)


def plot_score_histograms(
    path: str | Path,
    runs: Mapping[str, Histograms],
    *,
    title: str = "Histograms of scores over training",
    step_name: str = "optimiser step",
    rows: int = 12,
) -> Path:
    """Histograms of the positive and negative scores of each run, one row a block of steps, the first at the top.

    Args:
        path: PNG to write.
        runs: name of each run to its histograms.
        title: of the picture.
        step_name: what the blocks' ends count.
        rows: at most this many blocks are drawn, evenly spaced, the first and the last among them.

    Returns:
        The path written.
    """
    _some(runs)
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}.")
    shown = {name: _chosen(histograms, rows) for name, histograms in runs.items()}
    height = max(2.2, 1.0 + 0.3 * max(len(ends) for ends, *_ in shown.values()))
    kinds = tuple(KINDS)
    limits = {kind: _occupied(shown.values(), place) for place, kind in enumerate(kinds)}
    if len(shown) == 1:
        figure = figures._figure(width=9.0, height=1.2 + height)
        grid = figure.subplots(1, 2)
        cells = {(name, kind): axes for name in shown for kind, axes in zip(kinds, grid, strict=True)}
    else:
        bands = math.ceil(len(shown) / _COLUMNS)
        columns = math.ceil(len(shown) / bands)
        figure = figures._figure(width=1.2 + 2.6 * columns, height=1.0 + 2 * bands * (height + 0.3))
        grid = figure.subplots(2 * bands, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        cells = {
            (name, kind): grid[2 * (place // columns) + row, place % columns]
            for place, name in enumerate(shown)
            for row, kind in enumerate(kinds)
        }
    for (name, kind), axes in cells.items():
        ends, edges, *counts = shown[name]
        axes.set_axis_on()
        _draw_ridges(axes, ends, edges, counts[kinds.index(kind)], KINDS[kind])
        axes.set_xlim(limits[kind])
        axes.set_xlabel(f"{kind} score")
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(step_name)
        if len(shown) > 1 and kind == kinds[0]:
            figures._write(axes.set_title("run", color=figures._TEXT, fontsize=10), textwrap.fill(name, 28))
    mean = Line2D([], [], color=figures._TEXT, linewidth=2, label="mean")
    figure.legend(handles=[mean], loc="outside lower center", frameon=False)
    _head(figure, title)
    return figures._save(figure, path)


def plot_score_waterfall(
    path: str | Path,
    name: str,
    values: Sequence[tuple[str, Curves]],
    *,
    title: str | None = None,
    step_name: str = "optimiser step",
) -> Path:
    """Mean and variance of the scores over (hyper-parameter, step): a waterfall of smoothed curves for each.

    All curves of a panel rise from one value, the smallest of the panel, in the same measure, which the bar shows. The
    numbers beside them are their last values.

    Args:
        path: PNG to write.
        name: of the hyper-parameter.
        values: each of its values, as a text, with the curves that belong to it; the first at the bottom.
        title: of the picture.
        step_name: what is counted along the horizontal axes.

    Returns:
        The path written.
    """
    _some(values, "values")
    figure = figures._figure(width=10.4, height=1.6 + 2 * (1.2 + 0.62 * len(values)))
    for (statistic, heading), axes in zip(STATISTICS.items(), figure.subplots(2, 2).flat, strict=True):
        lines = [
            (label, np.asarray(steps, float), smoothed(_curve(steps, curves[statistic])))
            for label, (steps, curves) in values
        ]
        figures._count(axes, step_name if axes.get_subplotspec().is_last_row() else None)
        _draw_waterfall(axes, lines)
        axes.set_title(heading, color=figures._TEXT, fontsize=11)
        if axes.get_subplotspec().is_first_col():
            figures._write(axes.set_ylabel("setting", color=figures._TEXT), name)
    _head(figure, title or f"Scores over training, by {name}")
    return figures._save(figure, path)


def smoothed(values: Any) -> np.ndarray:
    """Running means over a twenty-fifth of the curve, of the numbers that there are; shorter ones at its ends.

    Args:
        values: shape (S,), may hold NaN.

    Returns:
        Shape (S,); NaN where there is no number near.
    """
    values = np.asarray(values, dtype=np.float64)
    known, reach, places = np.isfinite(values), len(values) // (2 * _SMOOTHING), np.arange(len(values))
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    with np.errstate(invalid="ignore"):
        return (sums[end] - sums[first]) / (counts[end] - counts[first])


def _draw_ridges(axes: Axes, ends: np.ndarray, edges: np.ndarray, counts: np.ndarray, colour: str) -> None:
    """One histogram above the other, each of the same height: shape and place are what changes over training."""
    for place, row in enumerate(counts):
        base = len(counts) - 1 - place
        heights = base + 1.3 * row / max(1.0, row.max())
        order = 2 * place + 2
        axes.stairs(heights, edges, baseline=base, fill=True, color=_light(colour, 0.55), zorder=order)
        axes.stairs(heights, edges, baseline=None, color=colour, linewidth=1.0, zorder=order + 1)
        mean = float(row @ (edges[:-1] + edges[1:]) / 2 / row.sum()) if row.any() else math.nan
        axes.plot([mean, mean], [base - 0.12, base + 0.2], color=figures._TEXT, linewidth=2, zorder=999)
    axes.set_yticks(range(len(counts)), [f"{end:,.0f}" for end in reversed(ends)])
    axes.set_ylim(-0.2, len(counts) + 0.4)
    figures._tidy(axes, grid=False)
    axes.grid(axis="x", color=figures._GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_waterfall(axes: Axes, lines: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    every = np.concatenate([values for _, _, values in lines])
    every = every[np.isfinite(every)]
    lowest = every.min(initial=math.inf)
    span = float(every.max(initial=lowest) - lowest) if len(every) else 0.0
    measure = 1 / (span or 1.0)  # no curve hides another
    colours = mpl.colormaps["viridis"](np.linspace(0.1, 0.8, len(lines)))
    last = max(1.0, *(steps.max() for _, steps, _ in lines))
    for row, ((_, steps, values), colour) in enumerate(zip(lines, colours, strict=True)):
        heights, order = row + measure * (values - lowest), 2 * (len(lines) - row) + 2
        axes.fill_between(steps, row, heights, color=_light(colour, 0.65), linewidth=0, zorder=order)
        axes.plot(steps, heights, color=colour, linewidth=1.6, zorder=order + 1)
        ending = values[np.isfinite(values)]
        if len(ending):
            said = f"{ending[-1]:.2g}"
            axes.text(last * 1.02, row + 0.05, said, color=figures._TEXT, fontsize=9, va="bottom")
    axes.set_yticks(range(len(lines)), [label for label, *_ in lines], parse_math=False)
    axes.set_xlim(0, last * 1.3)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= last])
    axes.set_ylim(-0.05, len(lines) + 0.1)
    figures._tidy(axes, grid=False)
    axes.spines["bottom"].set_bounds(0, last)
    axes.grid(axis="y", color=figures._GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    bar = _round_below(0.7 * (span or 1.0))
    axes.plot([last * 1.21] * 2, [0, measure * bar], color=figures._TEXT, linewidth=2, solid_capstyle="butt")
    axes.text(last * 1.22, measure * bar / 2, f"{bar:.2g}", color=figures._TEXT, fontsize=9, va="center")


def _chosen(histograms: Histograms, rows: int) -> tuple[np.ndarray, ...]:
    ends, edges, *counts = (np.asarray(values, dtype=np.float64) for values in histograms)
    bins = len(edges) - 1
    if not len(ends) or any(of_kind.shape != (len(ends), bins) for of_kind in counts):
        raise ValueError(
            "histograms must hold B >= 1 ends, n + 1 edges and twice counts (B, n), got shapes "
            f"{ends.shape}, {edges.shape}, {', '.join(str(of_kind.shape) for of_kind in counts)}."
        )
    places = sorted(set(np.linspace(0, len(ends) - 1, min(rows, len(ends))).round().astype(int).tolist()))
    return ends[places], edges, *(of_kind[places] for of_kind in counts)


def _occupied(shown: Iterable[tuple[np.ndarray, ...]], place: int) -> tuple[float, float]:
    """Where scores of a kind lie, save one in a thousand on either side, and a margin."""
    lows, highs = [], []
    for _, edges, *counts in shown:
        for row in counts[place]:
            share = row.cumsum() / max(1.0, row.sum())
            lows.append(edges[np.searchsorted(share, 0.001)] if row.any() else edges[-1])
            highs.append(edges[np.searchsorted(share, 0.999) + 1] if row.any() else edges[0])
    if min(lows) >= max(highs):  # there are none
        lows, highs = highs, lows
    margin = 0.03 * (max(highs) - min(lows))
    return min(lows) - margin, max(highs) + margin


def _curve(steps: Any, values: Any) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or len(found) != len(steps) or not len(found):
        raise ValueError(
            f"a curve must have as many values as steps, at least 1, got {found.shape} and {len(steps)}."
        )
    return found


def _round_below(value: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is not above a value > 0."""
    unit = 10.0 ** math.floor(math.log10(value))
    return unit * max(times for times in (1, 2, 5) if times * unit <= value * (1 + 1e-9))


def _light(colour: Any, share: float) -> tuple[float, float, float]:
    """A colour mixed with white, opaque."""
    red, green, blue = mpl.colors.to_rgb(colour)
    return tuple(share + (1 - share) * part for part in (red, green, blue))  # type: ignore[return-value]


def _style(place: int) -> tuple[str, str]:
    colours = figures.COLOURS[:-1]  # yellow lines are hard to see
    return colours[place % len(colours)], _DASHES[(place // len(colours)) % len(_DASHES)]


def _head(figure: Any, title: str) -> None:
    figures._write(figure.suptitle("title", color=figures._TEXT), title)


def _some(given: Any, name: str = "runs") -> None:
    if not len(given):
        raise ValueError(f"{name} must hold at least one, got none.")
