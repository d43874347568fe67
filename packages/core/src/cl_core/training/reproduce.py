"""``reproduce``: a grid of shipped configurations over seeds, one cell a run, continued where it was stopped.

A grid is a YAML file in the package, ``configs/reproduce/NAME.yaml``::

    title: What the table shows
    seeds: [0, 1, 2]
    metrics: [knn, linear]
    numbers: [train/npc_factor]  # of the last epoch, optional
    cells:
      - method: DCL
        setting: digits, batch 32
        config: dcl/digits
        overrides: {data.batch_size: 32}
        published: {linear: 0.98, source: "Authors, Venue, Table 1"}
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

from cl_core import _checks, plugins
from cl_core.training.cli import Domain
from cl_core.training.commands import fit_from, planned
from cl_core.training.evaluating import CLASSIFIER, FEW, METRICS, SCORES
from cl_core.training.files import make_folder, sentence, to_json, write_atomically
from cl_core.training.run import RunFolder
from cl_core.training.settings import differences, is_beside

_ENCODERS = ("trained", "untrained", "raw")
_NONE = "none"


@dataclass(frozen=True)
class Cell:
    """One line of a grid: a method in a setting, over all seeds.

    Attributes:
        method: name of the method in the table.
        setting: name of the setting in the table.
        config: name of the shipped configuration.
        overrides: options on top of it.
        published: published value of each metric, in [0, 1], and its ``source``.
    """

    method: str
    setting: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, seed: int) -> str:
        """Folder name of the run of one seed."""
        return (
            f"{re.sub(r'[^A-Za-z0-9.]+', '-', f'{self.method}-{self.setting}').strip('-').lower()}-seed{seed}"
        )

    def arguments(self, seed: int, options: Sequence[str] = ()) -> list[str]:
        """Arguments of ``fit`` for one seed; ``options`` take the place of the configuration's, not of the cell's."""
        overrides = [f"--{name}={_option(value)}" for name, value in self.overrides.items()]
        return ["--config", self.config, *options, *overrides, f"--seed={seed}"]


@dataclass(frozen=True)
class Grid:
    """A grid file, read and checked.

    Attributes:
        title: of the table.
        seeds: of every cell.
        metrics: accuracies shown in the table.
        cells: its lines.
        numbers: columns of ``metrics.csv`` whose value in the last epoch is shown too.
    """

    title: str
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    cells: tuple[Cell, ...]
    numbers: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Grid:
        """Read a grid.

        Raises:
            ValueError: in one sentence, if the file is not a grid.
        """
        try:
            content = yaml.safe_load(path.read_text())
            grid = cls(
                title=content["title"],
                seeds=tuple(int(seed) for seed in content["seeds"]),
                metrics=tuple(content.get("metrics", ("knn", "linear"))),
                cells=tuple(Cell(**cell) for cell in content["cells"]),
                numbers=tuple(content.get("numbers", ())),
            )
            for name in ("seeds", "metrics", "cells"):
                if not getattr(grid, name):
                    raise ValueError(f"{name} must hold at least one entry")
            folders = [cell.folder(0) for cell in grid.cells]
            if len(set(folders)) < len(folders):
                raise ValueError(
                    "method and setting must name each cell, got two whose runs would share a folder"
                )
            for metric in grid.metrics:
                if not metric.startswith(FEW):
                    _checks.choice("metrics", metric, (*METRICS, *SCORES, *CLASSIFIER))
            return grid
        except (KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not a grid of cells: {sentence(error).rstrip('.')}.") from None


_OWN = ("--output", "--seeds", "--debug", "--help", "-h")
_OF_ONE_RUN = ("--seed", "--run_dir", "--resume")


def reproduce_command(domain: Domain, args: list[str]) -> None:
    """``reproduce NAME [options of fit]``: run what is missing, print and write the table."""
    args, options = _apart(args)
    parser = ArgumentParser(prog=f"{domain.command} reproduce", exit_on_error=False)
    parser.add_argument("name", type=str, help="a grid ('list configs' shows them), or its file")
    parser.add_argument("--output", type=str, default=None, help="folder; default runs/reproduce-NAME")
    parser.add_argument("--seeds", type=list[int], default=None, help="instead of the grid's, such as [0,1]")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    try:
        config = parser.parse_args(args)
    except Exception as error:
        if "seeds" in str(error):
            raise ValueError("--seeds must be a list of integers such as [0,1,2].") from None
        raise ValueError(sentence(error)) from None
    name = Path(config.name).stem if Path(config.name).is_file() else config.name
    output = Path(config.output or f"runs/reproduce-{name}")
    print(reproduce(domain, config.name, output=output, seeds=config.seeds, options=options))
    print(f"table: {output / 'results.md'}")


def _apart(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments, and the options of ``fit`` among them."""
    own: list[str] = []
    options: list[str] = []
    into = own
    for arg in args:
        if arg.startswith("-"):
            name = arg.partition("=")[0]
            if name in _OF_ONE_RUN:
                raise ValueError(
                    f"{name} belongs to one run, not to all of a grid: pass --seeds or --output."
                )
            into = own if name in _OWN else options
        into.append(arg)
    return own, options


def reproduce(
    domain: Domain,
    name: str,
    *,
    output: str | Path,
    seeds: Sequence[int] | None = None,
    options: Sequence[str] = (),
) -> str:
    """Run a grid; cells that are finished in ``output`` are not run again, a cut one is resumed.

    Several processes may be started on one ``output``: each leaves a run to the one that trains it and takes the next.
    The table of the last to finish holds all.

    Args:
        domain: whose grid it is.
        name: of a shipped grid, or a file.
        output: folder of the runs and of ``results.json`` and ``results.md``, rewritten after each run.
        seeds: instead of the grid's.
        options: of ``fit``, for all cells, such as ``["--data", "CIFAR100"]``; what a cell says itself stands above
            them.

    Returns:
        The table, as Markdown.

    Raises:
        ValueError: for an unknown grid, no seed, or, before anything is trained, for options that a cell does not take,
            or if ``output`` holds a run of other settings.
    """
    grids = domain.grids()
    if not Path(name).is_file() and name not in grids:
        raise ValueError(plugins.unknown("grid or file", name, grids))
    grid = Grid.read(Path(name) if Path(name).is_file() else grids[name])
    chosen = grid.seeds if seeds is None else tuple(seeds)
    if not chosen:
        raise ValueError("seeds must hold at least one number, got none.")
    plans = [planned(domain, cell.arguments(chosen[0], options)) for cell in grid.cells]
    folder = make_folder(output)
    queue = [
        (cell, seed, plan, RunFolder(folder / cell.folder(seed)))
        for seed in chosen
        for cell, plan in zip(grid.cells, plans, strict=True)
    ]
    for _, _, plan, run in queue:
        _check_plan(run, plan)
    table = ""
    for place, (cell, seed, plan, run) in enumerate(queue):
        print(f"[{place + 1}/{len(queue)}] {cell.method}, {cell.setting}, seed {seed}", flush=True)
        try:
            _run_cell(domain, cell.arguments(seed, options), plan, run)
        except BlockingIOError as error:  # several processes may share a queue
            print(f"{error.strerror}: left to it", flush=True)
        results = _collect(grid, chosen, folder)
        table = markdown(grid, results, options)
        write_atomically(folder / "results.json", to_json(results))
        write_atomically(folder / "results.md", table)
    return table


def markdown(grid: Grid, results: Sequence[Mapping[str, Any]], options: Sequence[str] = ()) -> str:
    """The table of a grid's results; columns that no line has a number for are left out.

    Published numbers stand beside ours only where no options make another experiment of it.
    """
    beside = [{} if options else row["published"] for row in results]
    columns: dict[str, list[str]] = {
        "method": [row["method"] for row in results],
        "setting": [row["setting"] for row in results],
        "seeds": [str(len(row["seeds"])) for row in results],
    }
    for metric in grid.metrics:
        for encoder in _ENCODERS:
            name = metric if encoder == "trained" else f"{metric}, {encoder}"
            columns[name] = [_spread(row[encoder].get(metric)) for row in results]
        published = [row.get(metric) for row in beside]
        columns[f"{metric}, published"] = [_NONE if p is None else f"{100 * p:.1f}" for p in published]
    for number in grid.numbers:
        columns[number] = [_spread(row["numbers"][number], scale=1, digits=3) for row in results]
    shown = {name: cells for name, cells in columns.items() if any(cell != _NONE for cell in cells)}
    lines = [f"# {grid.title}", "", _line([*shown]), _line(["---"] * len(shown))]
    lines += [_line(cells) for cells in zip(*shown.values(), strict=True)]
    lines += ["", "Test accuracy in percent: mean +- standard deviation over the seeds (n - 1)."]
    if options:
        lines.append(f"All with {' '.join(options)}.")
    sources = [
        f"{row['method']}: {published['source']}"
        for row, published in zip(results, beside, strict=True)
        if "source" in published
    ]
    return "\n".join([*lines, *(f"Published, {source}." for source in dict.fromkeys(sources)), ""])


def _check_plan(run: RunFolder, plan: Mapping[str, Any]) -> None:
    """Refuse a run that is there already and was not begun with the configuration of its cell."""
    if not run.config.is_file():
        return
    for path, before, after in differences(run.read_config(), plan):
        if path == "data.root" or not is_beside(path):
            raise ValueError(
                f"{run.path} holds a run of other settings, {path} was {before} and is {after} now: choose another "
                "--output."
            )


def _run_cell(domain: Domain, arguments: list[str], plan: Mapping[str, Any], run: RunFolder) -> None:
    _check_plan(run, plan)
    if run.finished:
        return
    begin, go_on = [*arguments, "--run_dir", str(run.path)], ["--resume", str(run.path)]
    try:
        fit_from(domain, go_on if run.config.is_file() else begin)
    except FileExistsError:  # another process has begun it meanwhile
        _check_plan(run, plan)
        fit_from(domain, go_on)


def _collect(grid: Grid, seeds: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    results = []
    for cell in grid.cells:
        runs = {seed: RunFolder(folder / cell.folder(seed)) for seed in seeds}
        found = {seed: run.read_metrics() for seed, run in runs.items() if run.finished}
        if not found:
            continue
        row: dict[str, Any] = {"method": cell.method, "setting": cell.setting, "seeds": list(found)}
        for encoder in _ENCODERS:
            measured = [metrics[encoder] for metrics in found.values() if metrics.get(encoder)]
            row[encoder] = {
                metric: [entry[metric] for entry in measured if metric in entry]
                for metric in grid.metrics
                if measured
            }
        last = [metrics["train"] for metrics in found.values()]
        row["numbers"] = {name: [epoch[name] for epoch in last if name in epoch] for name in grid.numbers}
        results.append({**row, "published": dict(cell.published)})
    return results


def _spread(values: Sequence[float] | None, *, scale: float = 100, digits: int = 1) -> str:
    if not values:
        return _NONE
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _option(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else str(yaml.safe_dump(value, default_flow_style=True)).split("\n")[0]
    )
