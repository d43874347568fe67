"""``scores``: what runs recorded of their positives and negatives, as pictures and as one page."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse import ArgumentParser

from cl_core.training.comparing import labels_of, runs_in
from cl_core.training.evaluating import SHOWN, shown
from cl_core.training.files import make_folder, sentence, write_atomically
from cl_core.training.run import RunFolder
from cl_core.training.scoring import read_scores
from cl_core.training.settings import setting
from cl_vision import score_figures
from cl_vision.score_figures import STATISTICS, Curves, Histograms

if TYPE_CHECKING:
    from cl_core.training.cli import Domain

_PAGE = "scores.html"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #333; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
figure { margin: 2.5rem 0; }
img { max-width: 100%; height: auto; }
div { overflow-x: auto; }
"""


@dataclass(frozen=True)
class RecordedRun:
    """A run and the scores that it recorded.

    Attributes:
        label: what tells it from the others.
        run: its folder.
        scores: as :func:`cl_core.training.read_scores` reads them, as arrays.
        accuracies: on the test split in [0, 1], by metric; empty without any, or of a run that is not finished.
    """

    label: str
    run: RunFolder
    scores: Mapping[str, np.ndarray]
    accuracies: Mapping[str, float]

    @property
    def curves(self) -> Curves:
        """Steps, and the statistics of each."""
        return self.scores["step"], {name: self.scores[name] for name in STATISTICS}

    @property
    def histograms(self) -> Histograms:
        """Ends of blocks, edges of bins, counts of positives and of negatives."""
        names = ("block_end", "edges", "positive_histogram", "negative_histogram")
        ends, edges, positive, negative = (self.scores[name] for name in names)
        return ends, edges, positive, negative


def scores_command(domain: Domain, args: list[str]) -> None:
    """``scores RUN...``: draw what they recorded, and put it on a page."""
    parser = ArgumentParser(prog=f"{domain.command} scores", exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="*", help="run folders, or folders that hold some")
    parser.add_argument("--output", type=str, default="scores", help="folder; default scores")
    help_ = "a setting in which the runs differ, such as model.momentum: draws a waterfall over it"
    parser.add_argument("--by", type=str, default=None, help=help_)
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    try:
        config = parser.parse_args(args)
    except Exception as error:
        raise ValueError(sentence(error)) from None
    recorded = recorded_runs(runs_in(config.runs, what="scores"))
    for path in draw_scores(recorded, config.output, by=config.by):
        print(f"{'page:  ' if path.name == _PAGE else 'figure:'} {path}")


def recorded_runs(runs: Sequence[RunFolder]) -> list[RecordedRun]:
    """Read what runs recorded.

    Raises:
        FileNotFoundError: if a run has recorded no scores.
        ValueError: in one sentence, if a file is damaged, or a run is given twice or has not recorded anything yet.
    """
    found = []
    for label, run in zip(labels_of(runs), runs, strict=True):
        scores = {name: values.numpy() for name, values in read_scores(run.scores).items()}
        if not len(scores["block_end"]):
            raise ValueError(f"{run.scores} holds no histogram yet.")
        trained = run.read_metrics().get("trained") if run.finished else None
        accuracies = {name: trained[name] for name in shown([trained])} if trained else {}
        found.append(RecordedRun(label, run, scores, accuracies))
    return found


def by_setting(recorded: Sequence[RecordedRun], name: str) -> list[tuple[str, Curves]]:
    """Values of a setting in ascending order, each with the curves of its runs; of several, their mean.

    Raises:
        ValueError: if there is no such setting, or all runs have the same.
    """
    values = [setting(each.run.read_settings(), name) for each in recorded]
    groups: dict[str, list[RecordedRun]] = {}
    numeric = all(isinstance(value, int | float) for value in values)
    order = sorted(range(len(values)), key=lambda place: values[place] if numeric else str(values[place]))
    for place in order:
        groups.setdefault(str(values[place]), []).append(recorded[place])
    if len(groups) < 2:
        raise ValueError(
            f"--by must name a setting in which the runs differ, got {name}, {values[0]} in all."
        )
    return [(value, _mean(members)) for value, members in groups.items()]


def draw_scores(recorded: Sequence[RecordedRun], folder: str | Path, *, by: str | None = None) -> list[Path]:
    """Draw runs as PNG, and a page that holds the pictures.

    Args:
        recorded: one run, or several to compare.
        folder: to write to.
        by: name of a setting to draw a waterfall over, as :func:`by_setting` takes it; None draws none.

    Returns:
        The paths written, the page last.

    Raises:
        ValueError: if there is no such setting, or all runs have the same.
    """
    grouped = None if by is None else by_setting(recorded, by)
    folder = make_folder(folder)
    title = "Scores over training" + (f": {recorded[0].label}" if len(recorded) == 1 else "")
    pictures = {
        "Mean and variance of the scores in every step, faint, and their running means.": (
            score_figures.plot_score_curves(
                folder / "curves.png",
                {each.label: each.curves for each in recorded},
                accuracies={each.label: each.accuracies.get("knn") for each in recorded},
                accuracy_name=f"test accuracy, {SHOWN['knn']}",
                title=title,
            )
        ),
        "Histograms of the scores of blocks of steps, each drawn to the same height, with their means.": (
            score_figures.plot_score_histograms(
                folder / "histograms.png",
                {each.label: each.histograms for each in recorded},
                title=f"Histograms of {title[0].lower()}{title[1:]}",
            )
        ),
    }
    if grouped is not None:
        caption = f"Running means over the steps for each value of {by}; the numbers are their last values."
        pictures[caption] = score_figures.plot_score_waterfall(folder / "waterfall.png", str(by), grouped)
    page = write_atomically(folder / _PAGE, _page(title, recorded, pictures))
    return [*pictures.values(), page]


def _page(title: str, recorded: Sequence[RecordedRun], pictures: Mapping[str, Path]) -> str:
    """One HTML page that needs nothing else: a table of the runs, and pictures with their captions.

    Args:
        title: of the page.
        recorded: the rows of the table.
        pictures: caption to PNG.
    """
    metrics = shown(each.accuracies for each in recorded)
    head = ["run", "folder", "steps", *metrics.values(), *STATISTICS.values()]
    lines = [_row(head, "th")]
    for each in recorded:
        accuracies = [each.accuracies.get(metric) for metric in metrics]
        steps, curves = each.curves
        ending = [score_figures.smoothed(curves[name])[-1] for name in STATISTICS]
        cells = [each.label, str(each.run.path), f"{len(steps):,}"]
        cells += ["" if value is None else f"{100 * value:.1f} %" for value in accuracies]
        lines.append(_row([*cells, *("" if np.isnan(value) else f"{value:.3g}" for value in ending)], "td"))
    drawn = []
    for caption, path in pictures.items():
        content = base64.b64encode(path.read_bytes()).decode()
        said = html.escape(caption)
        drawn.append(
            f'<figure><img src="data:image/png;base64,{content}" alt="{said}">'
            f"<figcaption>{said}</figcaption></figure>"
        )
    note = "Accuracies are those on the test split, scores those of the last steps."
    return "\n".join(
        [
            f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>",
            *("<div><table>", *lines, f"</table></div>\n<p>{note}</p>"),
            *drawn,
            "</body>\n</html>\n",
        ]
    )


def _mean(members: Sequence[RecordedRun]) -> Curves:
    """The mean of runs, at the steps of the shortest."""
    grid = min((each.scores["step"] for each in members), key=lambda steps: (steps[-1], len(steps)))
    means = {}
    for name in STATISTICS:
        values = [np.interp(grid, each.scores["step"], each.scores[name]) for each in members]
        means[name] = np.mean(values, axis=0)
    return grid, means


def _row(cells: Sequence[Any], kind: str) -> str:
    inner = "".join(f"<{kind}>{html.escape(str(cell))}</{kind}>" for cell in cells)
    return f"<tr>{inner}</tr>"
