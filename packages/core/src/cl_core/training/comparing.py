"""``compare``: runs side by side, those that differ in the seed alone as one line with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from scipy.special import stdtrit  # type: ignore[import-untyped]

from cl_core.training.cli import Domain
from cl_core.training.evaluating import METRICS, SHOWN, shown
from cl_core.training.files import make_folder, sentence, to_json, write_atomically
from cl_core.training.recording import MetricsTable
from cl_core.training.run import RunFolder
from cl_core.training.settings import is_beside, joined

_LEVEL = 0.95


@dataclass(frozen=True)
class Compared:
    """Runs of one setting.

    Attributes:
        label: in what the setting differs from the others.
        seeds: of the runs, in their order.
        runs: their folders.
        accuracies: by metric, one a run, in [0, 1]; those that all of its runs have.
        curves: for each run the steps and the accuracies of neighbours on the validation split.
    """

    label: str
    seeds: tuple[int, ...]
    runs: tuple[RunFolder, ...]
    accuracies: Mapping[str, tuple[float, ...]]
    curves: tuple[tuple[list[float], list[float]], ...]


def compare_command(domain: Domain, args: list[str]) -> None:
    """``compare RUN...``: print and write the table, draw the figure."""
    parser = ArgumentParser(prog=f"{domain.command} compare", exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="*", help="run folders, or folders that hold some")
    parser.add_argument("--output", type=str, default="comparison", help="folder; default comparison")
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    try:
        config = parser.parse_args(args)
    except Exception as error:
        raise ValueError(sentence(error)) from None
    compared = compare(config.runs)
    folder = make_folder(config.output)
    text = markdown(compared)
    write_atomically(folder / "comparison.md", text)
    write_atomically(folder / "comparison.json", to_json([_plain(each) for each in compared]))
    print(text)
    print(f"table:  {folder / 'comparison.md'}")
    if domain.comparer is not None:
        module, _, name = domain.comparer.partition(":")
        print(f"figure: {getattr(import_module(module), name)(compared, folder)}")


def compare(places: Sequence[str | Path]) -> list[Compared]:
    """Group finished runs by all their settings but the seed.

    Args:
        places: run folders, or folders that hold some. The first one's setting comes first.

    Returns:
        One entry a setting, each with the runs of its seeds.

    Raises:
        FileNotFoundError: if a place holds no run.
        ValueError: in one sentence, if nothing was given, a run is not finished or has no accuracies, or two are the
            same.
    """
    runs = runs_in(places, what="compare")
    groups: list[tuple[dict[str, Any], list[tuple[int, RunFolder, dict[str, Any]]]]] = []
    for run in runs:
        metrics = run.read_metrics()
        if not run.finished:
            raise ValueError(f"{run.path} is not finished: go on with it first (fit --resume {run.path}).")
        if not metrics.get("trained"):
            raise ValueError(f"{run.path} has no accuracies to compare: its data has no labels.")
        if lost := [key for key in SHOWN if key in METRICS and key not in metrics["trained"]]:
            raise ValueError(f"{run.metrics} is damaged: what was trained lacks {', '.join(lost)}.")
        settings = run.read_settings()
        seed, rest = settings["seed"], _without_beside("", settings)
        for known, members in groups:
            if known == rest:
                if any(seed == other for other, _, _ in members):
                    raise ValueError(f"{run.path} is given twice, or two runs of seed {seed} are the same.")
                members.append((seed, run, metrics))
                break
        else:
            groups.append((rest, [(seed, run, metrics)]))
    labels = _told_apart(
        _labels([rest for rest, _ in groups]), [str(members[0][1].path) for _, members in groups]
    )
    return [_compared(label, members) for label, (_, members) in zip(labels, groups, strict=True)]


def markdown(compared: Sequence[Compared]) -> str:
    """A table: mean and interval of each setting, and its paired difference from the first."""
    head = ["setting", "seeds"]
    metrics = shown(each.accuracies for each in compared)
    for name in metrics.values():
        head += [name, "against the first"] if len(compared) > 1 else [name]
    lines = [_line(head), _line(["---"] * len(head))]
    for each in compared:
        cells = [each.label, ", ".join(map(str, each.seeds))]
        for metric in metrics:
            cells.append(_with_interval(each.accuracies[metric]) if metric in each.accuracies else "none")
            if len(compared) > 1:
                cells.append("" if each is compared[0] else _difference(compared[0], each, metric))
        lines.append(_line(cells))
    note = (
        f"Test accuracy in percent: mean over seeds [{_LEVEL:.0%} interval of Student's t]. Differences are paired "
        "over the seeds that both have; an interval that holds 0 shows none."
    )
    return "\n".join([*lines, "", note, ""])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean of values; None for fewer than two."""
    if len(values) < 2:
        return None
    reach = float(stdtrit(len(values) - 1, (1 + _LEVEL) / 2))
    reach *= statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - reach, statistics.fmean(values) + reach


def runs_in(places: Sequence[str | Path], *, what: str) -> list[RunFolder]:
    """Run folders, and those inside of folders that hold some.

    Args:
        places: where to look.
        what: the command, for the message if nothing was given.

    Raises:
        FileNotFoundError: if a place holds no run.
        ValueError: if nothing was given.
    """
    runs = [run for place in places for run in _runs_in(Path(place))]
    if not runs:
        raise ValueError(f"{what} needs at least one run folder, got none.")
    return runs


def labels_of(runs: Sequence[RunFolder]) -> list[str]:
    """What tells each run from the others, in a few words: settings, then seeds, then folders.

    Raises:
        ValueError: in one sentence, if a run is given twice or does not say its settings.
    """
    if len({run.path.resolve() for run in runs}) < len(runs):
        raise ValueError(f"every run must be given once, got {', '.join(str(run.path) for run in runs)}.")
    settings = [run.read_settings() for run in runs]
    return _told_apart(
        _labels([_without_beside("", each) for each in settings]),
        [f"seed {each['seed']}" for each in settings],
        [str(run.path) for run in runs],
    )


def _runs_in(place: Path) -> list[RunFolder]:
    if RunFolder(place).config.is_file():
        return [RunFolder(place)]
    found = sorted(path.parent for path in place.glob("*/config.yaml"))
    if not found:
        raise FileNotFoundError(f"{place} is not a run and holds none: there is no config.yaml in it.")
    return [RunFolder(path) for path in found]


def _compared(label: str, members: list[tuple[int, RunFolder, dict[str, Any]]]) -> Compared:
    members = sorted(members, key=lambda member: member[0])
    curves = []
    for _, run, _ in members:
        table = MetricsTable(run.metrics_table)
        table.read()
        curves.append(table.column("validation/knn"))
    return Compared(
        label,
        tuple(seed for seed, _, _ in members),
        tuple(run for _, run, _ in members),
        {
            metric: tuple(metrics["trained"][metric] for *_, metrics in members)
            for metric in shown(metrics["trained"] for *_, metrics in members)
            if all(metric in metrics["trained"] for *_, metrics in members)
        },
        tuple(curves),
    )


def _without_beside(path: str, settings: Any) -> Any:
    """Settings without those that do not make another run; the arguments of objects in their place."""
    if not isinstance(settings, Mapping):
        return settings
    kept = {}
    for name, value in settings.items():
        inner = joined(path, name)
        if not is_beside(inner):
            kept[name] = _without_beside(inner, value)
    return kept


def _labels(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each setting from the others, in a few words."""
    if len(settings) == 1:
        return [f"{_short(settings[0]['model'])}, {_short(settings[0]['data'])}"]
    words: list[list[str]] = [[] for _ in settings]
    _collect_differences("", list(settings), words)
    return [", ".join(each) for each in words]


def _told_apart(labels: list[str], *more: Sequence[str]) -> list[str]:
    """Labels, those that several share with a word more each, until all are others."""
    for words in more:
        several = {label for label in labels if labels.count(label) > 1}
        labels = [
            ", ".join(filter(None, (label, word))) if label in several else label
            for label, word in zip(labels, words, strict=True)
        ]
    return labels


def _collect_differences(name: str, values: Sequence[Any], words: Sequence[list[str]]) -> None:
    if all(value == values[0] for value in values):
        return
    kinds = [value.get("class_path") if isinstance(value, Mapping) else None for value in values]
    if all(isinstance(value, Mapping) for value in values) and len(set(kinds)) == 1:
        for inner in dict.fromkeys(key for value in values for key in value):
            following = name if inner == "init_args" else inner
            _collect_differences(following, [value.get(inner) for value in values], words)
        return
    for each, value in zip(words, values, strict=True):
        each.append(f"{name} {_short(value)}")
    for kind in dict.fromkeys(filter(None, kinds)):  # those of one class may differ in their arguments
        members = [place for place, other in enumerate(kinds) if other == kind]
        _collect_differences(name, [values[place] for place in members], [words[place] for place in members])


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return f"{value}"


def _difference(first: Compared, other: Compared, metric: str) -> str:
    if metric not in first.accuracies or metric not in other.accuracies:
        return ""
    pairs = [
        other.accuracies[metric][other.seeds.index(seed)] - first.accuracies[metric][place]
        for place, seed in enumerate(first.seeds)
        if seed in other.seeds
    ]
    return _with_interval(pairs, signed=True) if pairs else "no common seed"


def _with_interval(values: Sequence[float], *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    mean = f"{100 * statistics.fmean(values):{sign}.1f}"
    found = interval(values)
    return mean if found is None else f"{mean} [{100 * found[0]:{sign}.1f}, {100 * found[1]:{sign}.1f}]"


def _plain(each: Compared) -> dict[str, Any]:
    return {
        "label": each.label,
        "seeds": list(each.seeds),
        "runs": [str(run.path) for run in each.runs],
        "accuracies": {metric: list(values) for metric, values in each.accuracies.items()},
    }


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
