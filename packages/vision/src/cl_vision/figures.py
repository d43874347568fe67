"""Pictures of a training run: curves, a map of the embeddings, similarities over time.

Every function draws from plain arrays, writes one PNG whole or not at all and leaves matplotlib's global
state alone.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cl_core.training.files import write_atomically

# Okabe and Ito's colours, told apart by all common kinds of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# Petroff's ten (arXiv 2107.02270), made for the same; ten markers keep a hundred classes apart.
_CLASS_COLOURS = (
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
_POSITIVE, _NEGATIVE, _GRID, _TEXT = COLOURS[1], COLOURS[0], "#DDDDDD", "#333333"
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "h")
_TSNE_ROWS = 2000

Curve = tuple[Sequence[float], Sequence[float]]
Interval = tuple[float, float] | None


def plot_curves(
    path: str | Path,
    *,
    loss: Mapping[str, Curve],
    accuracy: Mapping[str, Curve] | None = None,
    baselines: Mapping[str, float] | None = None,
    title: str = "Training",
    step_name: str = "optimiser step",
) -> Path:
    """Loss and accuracy over training.

    Args:
        path: PNG to write.
        loss: name of each curve to (steps, values).
        accuracy: the same for accuracies in [0, 1]; None draws the loss alone.
        baselines: accuracies to compare with, in [0, 1], drawn as level lines.
        title: of the picture.
        step_name: what is counted along the horizontal axis.

    Returns:
        The path written.
    """
    if not loss:
        raise ValueError("loss must hold at least one curve, got none.")
    panels = 1 if not accuracy and not baselines else 2
    figure = _figure(width=5.2 * panels, height=3.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _draw_curves(axes[0], loss, step_name, "loss")
    if panels == 2:
        percent = {
            name: (steps, [100 * value for value in values])
            for name, (steps, values) in (accuracy or {}).items()
        }
        _draw_curves(axes[1], percent, step_name, "accuracy (%)", markers=True)
        for (name, value), dashes in zip(
            (baselines or {}).items(), (":", "--", "-.", (0, (1, 4))) * 4, strict=False
        ):
            axes[1].axhline(100 * value, color=_TEXT, linewidth=1.2, linestyle=dashes, label=name)
        axes[1].set_ylim(top=min(axes[1].get_ylim()[1], 100.5))
        _legend_below(axes[1])
    if len(loss) > 1 or panels == 2:
        _legend_below(axes[0])
    figure.suptitle(title, color=_TEXT)
    return _save(figure, path)


def plot_embedding_map(
    path: str | Path,
    embeddings: Any,
    labels: Any,
    *,
    class_names: Sequence[str] | None = None,
    projection: Literal["auto", "tsne", "pca"] = "auto",
    title: str = "Embeddings",
    seed: int = 0,
) -> Path:
    """Two-dimensional map of embeddings, one colour and marker a class.

    Args:
        path: PNG to write.
        embeddings: shape (N, D), N >= 3.
        labels: shape (N,), integers; negative for unknown.
        class_names: name of class c at position c; None for the numbers.
        projection: ``"pca"``; ``"tsne"`` (at most 2,000 rows, evenly spaced ones of more); ``"auto"`` for
            t-SNE.
        title: of the picture.
        seed: of t-SNE.

    Returns:
        The path written.

    Cost: PCA O(N D^2); t-SNE about 5 seconds of one core at 2,000 rows.
    """
    rows, classes = np.asarray(embeddings, dtype=np.float64), np.asarray(labels).astype(int)
    if rows.ndim != 2 or len(rows) < 3 or rows.shape[1] < 2:
        raise ValueError(f"embeddings must have shape (N, D) with N >= 3 and D >= 2, got {rows.shape}.")
    if classes.shape != (len(rows),):
        raise ValueError(f"labels must have shape ({len(rows)},), got {classes.shape}.")
    if not np.isfinite(rows).all():
        raise ValueError("embeddings must be finite, got NaN or infinity in them.")
    if projection not in ("auto", "tsne", "pca"):
        raise ValueError(f"projection must be one of 'auto', 'tsne', 'pca', got {projection!r}.")
    total = len(rows)
    if projection != "pca" and total > _TSNE_ROWS:
        kept = np.linspace(0, total - 1, _TSNE_ROWS).round().astype(int)
        rows, classes = rows[kept], classes[kept]
    points, names = _project(rows, "pca" if projection == "pca" else "tsne", seed)

    present = sorted(set(classes.tolist()))
    figure = _figure(width=6.6, height=5.2)
    axes = figure.subplots()
    handles, written = [], []
    for place, label in enumerate(present):
        colour, marker = _class_style(place) if label >= 0 else ("#BBBBBB", "o")
        chosen = points[classes == label]
        size = 20 if len(points) <= 1000 else 12
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=size,
            c=[colour],
            marker=marker,
            alpha=0.85,
            linewidths=0.2,
            edgecolors="#666666",
        )
        name = "unlabelled" if label < 0 else str(label if class_names is None else class_names[label])
        handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, markersize=6))
        written.append(name)
        if projection != "pca" and label >= 0 and len(present) <= 20:
            x, y = np.median(chosen, axis=0)
            halo = [withStroke(linewidth=3, foreground="white")]
            text = axes.text(
                x, y, "", color=_TEXT, weight="bold", ha="center", va="center", path_effects=halo, zorder=5
            )
            _write(text, name)
    _tidy(axes, grid=False)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    if projection != "pca":
        axes.set_xticks([])
        axes.set_yticks([])
    else:
        axes.set_aspect("equal", adjustable="datalim")
    if len(handles) <= 40 and present != [-1]:
        legend = axes.legend(
            handles,
            ["class"] * len(handles),
            title="class",
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
            ncols=1 + (len(handles) - 1) // 20,
        )
        for text, name in zip(legend.get_texts(), written, strict=True):
            _write(text, name)
    shown = f"{len(points):,} images" if len(points) == total else f"{len(points):,} of {total:,} images"
    axes.set_title(f"{title} ({shown})", color=_TEXT)
    return _save(figure, path)


def plot_similarities(
    path: str | Path,
    *,
    steps: Sequence[float],
    positive: Sequence[Any],
    negative: Sequence[Any],
    title: str = "Cosine similarities over training",
    step_name: str = "step",
    rows: int = 10,
) -> Path:
    """Histograms of positive and negative similarities over training, one row a moment, the first at the top.

    Args:
        path: PNG to write.
        steps: when each pair of samples was taken, ascending.
        positive: for each step, cosine similarities of positive pairs, any shape.
        negative: for each step, cosine similarities of negative pairs, any shape.
        title: of the picture.
        step_name: what ``steps`` counts.
        rows: at most this many moments are drawn, evenly spaced, the first and the last among them.

    Returns:
        The path written.
    """
    if not len(steps) == len(positive) == len(negative) or not len(steps):
        raise ValueError(
            "steps, positive and negative must be of equal length, at least 1, "
            f"got {len(steps)}, {len(positive)} and {len(negative)}."
        )
    if rows < 1:
        raise ValueError(f"rows must be >= 1, got {rows}.")
    chosen = sorted(set(np.linspace(0, len(steps) - 1, min(rows, len(steps))).round().astype(int).tolist()))
    edges = np.linspace(-1, 1, 81)
    centres = (edges[:-1] + edges[1:]) / 2
    figure = _figure(width=6.4, height=2.0 + 0.42 * len(chosen))
    axes = figure.subplots()
    overlap = 1.6
    for place, at in enumerate(chosen):
        base = len(chosen) - 1 - place
        for values, colour in ((negative[at], _NEGATIVE), (positive[at], _POSITIVE)):
            sample = np.clip(np.asarray(values, dtype=np.float64).ravel(), -1, 1)
            counts = np.histogram(sample, bins=edges)[0].astype(float)
            # Each histogram reaches the same height: shape and place are what changes over training.
            heights = base + overlap * 0.6 * counts / max(1.0, counts.max())
            axes.fill_between(
                centres, base, heights, step="mid", color=colour, alpha=0.45, linewidth=0, zorder=place + 2
            )
            axes.step(centres, heights, where="mid", color=colour, linewidth=0.9, zorder=place + 2)
            if len(sample):
                mean = sample.mean()
                axes.plot([mean, mean], [base, base + 0.35], color=colour, linewidth=2.0, zorder=place + 2.5)
    axes.set_yticks(range(len(chosen)), [f"{steps[at]:,.0f}" for at in reversed(chosen)])
    axes.set_xlim(-1, 1)
    axes.set_xticks(np.linspace(-1, 1, 9), ["-1", "", "-0.5", "", "0", "", "0.5", "", "1"])
    axes.set_ylim(-0.08, len(chosen) - 1 + overlap * 0.68)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel(step_name)
    _tidy(axes, grid=False)
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    handles = [
        Patch(facecolor=_NEGATIVE, alpha=0.45, edgecolor=_NEGATIVE, label="negative pairs"),
        Patch(facecolor=_POSITIVE, alpha=0.45, edgecolor=_POSITIVE, label="positive pairs"),
        Line2D([], [], color=_TEXT, linewidth=2.0, label="mean"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    axes.set_title(title, color=_TEXT)
    return _save(figure, path)


def plot_comparison(
    path: str | Path,
    *,
    accuracies: Mapping[str, Mapping[str, tuple[Sequence[float], Interval]]],
    curves: Mapping[str, Sequence[Curve]] | None = None,
    title: str = "Comparison",
    step_name: str = "optimiser step",
) -> Path:
    """Accuracies of several settings with their intervals, and of neighbours over training.

    Args:
        path: PNG to write.
        accuracies: setting to metric to (one value a seed, interval of their mean or None), in [0, 1]; a setting may
            lack a metric.
        curves: setting to the (steps, accuracies) of each seed, in [0, 1].
        title: of the picture.
        step_name: what is counted along the horizontal axis of the curves.

    Returns:
        The path written.
    """
    if not accuracies:
        raise ValueError("accuracies must hold at least one setting, got none.")
    drawn = {name: [c for c in of_seeds if len(c[0])] for name, of_seeds in (curves or {}).items()}
    panels = 2 if any(drawn.values()) else 1
    figure = _figure(width=5.6 * panels, height=1.6 + 0.75 * max(3, len(accuracies)))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    metrics = list(dict.fromkeys(metric for of_metric in accuracies.values() for metric in of_metric))
    apart = min(0.3, 0.9 / max(1, len(metrics)))  # several metrics of one setting keep clear of the next
    for row, of_metric in enumerate(accuracies.values()):
        for place, metric in enumerate(metrics):
            if metric not in of_metric:
                continue
            values, bounds = of_metric[metric]
            at = row + apart * (place - (len(metrics) - 1) / 2)
            colour, marker = COLOURS[row % len(COLOURS)], _MARKERS[place % len(_MARKERS)]
            points = [100 * value for value in values]
            axes[0].scatter(points, [at] * len(points), s=14, color=colour, alpha=0.45, linewidths=0)
            mean = sum(points) / len(points)
            if bounds is not None:
                axes[0].plot([100 * bound for bound in bounds], [at, at], color=colour, linewidth=1.6)
            axes[0].plot([mean], [at], color=colour, marker=marker, markersize=7)
    labels = [textwrap.fill(label, 30) for label in accuracies]
    axes[0].set_yticks(range(len(labels)), labels, parse_math=False)
    axes[0].set_ylim(len(accuracies) - 0.4, -0.6)
    axes[0].set_xlabel("test accuracy (%)\nseeds, mean and 95 % interval")
    _tidy(axes[0])
    handles = [
        Line2D([], [], linestyle="", marker=_MARKERS[place % len(_MARKERS)], color=_TEXT, label=metric)
        for place, metric in enumerate(metrics)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    if panels == 2:
        for row, of_seeds in enumerate(drawn.values()):
            for steps, values in of_seeds:
                percent = [100 * value for value in values]
                axes[1].plot(steps, percent, color=COLOURS[row % len(COLOURS)], linewidth=1.2, alpha=0.8)
        _count(axes[1], step_name)
        axes[1].set_ylabel("neighbours on validation (%)")
        _tidy(axes[1])
    figure.suptitle(title, color=_TEXT)
    return _save(figure, path)


def plot_class_pairs(
    path: str | Path,
    values: Any,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "Class pairs",
    quantity: str = "open dimensions",
) -> Path:
    """Heat map of a number for every pair of classes.

    Args:
        path: PNG to write.
        values: shape (C, C).
        class_names: of the C classes; None for their numbers.
        title: of the picture.
        quantity: what the colours tell.

    Returns:
        The path written.
    """
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"values must have shape (C, C) with C >= 1, got {matrix.shape}.")
    names = [str(name) for name in (class_names or range(len(matrix)))]
    if len(names) != len(matrix):
        raise ValueError(f"class_names must name {len(matrix)} classes, got {len(names)}.")
    side = 3.4 + 0.28 * min(len(matrix), 30)
    figure = _figure(width=side + 1.2, height=side)
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="cividis", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(quantity, color=_TEXT)
    bar.ax.tick_params(colors=_TEXT)
    if len(names) <= 40:
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 12:
        middle = (matrix.min() + matrix.max()) / 2
        for (row, column), value in np.ndenumerate(matrix):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.3g}", color=colour, ha="center", va="center", fontsize=8)
    _tidy(axes, grid=False)
    axes.set_title(title, color=_TEXT)
    return _save(figure, path)


def _draw_curves(
    axes: Axes, curves: Mapping[str, Curve], step_name: str, quantity: str, *, markers: bool = False
) -> None:
    for place, (name, (steps, values)) in enumerate(curves.items()):
        if len(steps) != len(values):
            raise ValueError(f"curve {name!r} has {len(steps)} steps and {len(values)} values.")
        marker = _MARKERS[place % len(_MARKERS)] if markers or len(steps) == 1 else None
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=4, label=name)
    _count(axes, step_name)
    axes.set_ylabel(quantity)
    _tidy(axes)


def _project(rows: np.ndarray, projection: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    with np.errstate(invalid="ignore"):  # rows that are all the same have no variance to share out
        pca = PCA(n_components=2, svd_solver="full").fit(unit)
    if projection == "pca":
        first, second = 100 * np.nan_to_num(pca.explained_variance_ratio_)
        names = (f"component 1 ({first:.0f} % of variance)", f"component 2 ({second:.0f} % of variance)")
        return pca.transform(unit), names
    start = pca.transform(unit)
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
    perplexity = min(30.0, (len(rows) - 1) / 3)
    points = TSNE(n_components=2, perplexity=perplexity, init=start, random_state=seed).fit_transform(unit)
    return points, ("t-SNE 1 (no unit)", "t-SNE 2 (no unit)")


def _class_style(place: int) -> tuple[str, str]:
    colours, markers = len(_CLASS_COLOURS), len(_MARKERS)
    return _CLASS_COLOURS[place % colours], _MARKERS[(place + place // colours) % markers]


def _figure(*, width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, *, grid: bool = True) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_TEXT)
    axes.tick_params(colors=_TEXT)
    axes.xaxis.label.set_color(_TEXT)
    axes.yaxis.label.set_color(_TEXT)
    if grid:
        axes.grid(color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)


def _count(axes: Axes, step_name: str | None) -> None:
    """Say along the horizontal axis what is counted, at whole numbers: there is no half step."""
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.set_xlabel(step_name or "")


def _write(text: Text, name: str) -> None:
    """A name as it is: dollars are no formula, and a leading underscore does not hide it."""
    text.set_parse_math(False)
    text.set_text(name)


def _legend_below(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)


def _save(figure: Figure, path: str | Path) -> Path:
    """Draw in memory, then write: a reader never sees half a picture."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, which anyone sees.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(picture, format="png", dpi=160, metadata={"Software": None})
    return write_atomically(path, picture.getvalue())
