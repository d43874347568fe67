"""How a run is trained and watched, and which of its settings may change when it is resumed.

A run folder says twice what it is. ``config.yaml`` holds what was asked, in the words of the command line, to read
and to give to ``--config``. ``settings.json`` holds what was built from it: a constructor may keep another value than
it was given (a default filled in, a number rounded to float32), so a resumed run is compared with that one.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from cl_core import _checks, plugins
from cl_core.method import Method
from cl_core.training.artifacts import as_config, describe
from cl_core.training.data import Data
from cl_core.training.files import to_json

GIVEN, DRAWN = "given", "drawn from the seed"
"""Where the weights that a run starts from came from: a method of somebody's program, or the command line."""
Precision: TypeAlias = Literal["32-true", "16-mixed", "bf16-mixed"]

# They touch what is computed with, watched or kept, not what the steps before the checkpoint learnt.
_MAY_CHANGE = {
    *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "accelerator", "devices", "strategy")),
    *(f"trainer.{name}" for name in ("tensorboard", "progress_bar")),
    *(f"monitor.{name}" for name in ("knn_every_epochs", "knn_rows", "diagnostics_every_epochs")),
    *(f"monitor.{name}" for name in ("scores", "scores_rows")),
    *(f"checkpoint.{name}" for name in ("every_steps", "every_epochs", "keep_every_epochs")),
    *(f"data.{name}" for name in ("num_workers", "root", "download")),
    "evaluation.batch_size",
    *("data.batch_size", "processes"),  # global_batch_size may not
    "weights",  # where they came from, once a checkpoint holds them
}
# They make no other run of it: with the seed, the runs of one setting differ in nothing else.
_BESIDE = {
    *("seed", "checkpoint", "data.root", "data.num_workers", "data.download"),
    *(f"monitor.{name}" for name in ("knn_every_epochs", "knn_rows", "diagnostics_every_epochs")),
    *(f"monitor.{name}" for name in ("scores", "scores_every", "scores_rows")),
    *(f"trainer.{name}" for name in ("accelerator", "progress_bar", "tensorboard", "deterministic")),
    *("evaluation.batch_size", "evaluation.baselines"),
    "global_batch_size",  # follows from the batch size and the processes, which are named
}
_KIND_COUNTS = {"trainer.limit_train_batches"}  # 1 is a batch, 1.0 all of them
_PLACES = ("root", "path")  # arguments of data, and of what they are made of, that name a folder or a file
_SHOWN = 500  # characters of a value that nobody reads in full


@dataclass(frozen=True)
class TrainerOptions:
    """What is passed on to Lightning's Trainer.

    Args:
        max_epochs: epochs to train.
        max_steps: optimiser steps after which training stops, -1 for no such limit.
        accelerator: "auto", "cpu", "gpu", ...
        devices: how many, a list of numbers, or "auto".
        strategy: "auto", "ddp", ...
        precision: "32-true", "16-mixed" or "bf16-mixed".
        accumulate_grad_batches: batches an optimiser step.
        gradient_clip_val: largest norm of the gradient, None for any.
        limit_train_batches: batches an epoch (an integer) or share of them (a float up to 1.0).
        deterministic: let torch refuse operations that are not reproducible.
        tensorboard: also log for TensorBoard, in the run folder.
        progress_bar: show one.
    """

    max_epochs: int = 100
    max_steps: int = -1
    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    strategy: str = "auto"
    precision: Precision = "32-true"
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    limit_train_batches: int | float = 1.0
    deterministic: bool = False
    tensorboard: bool = False
    progress_bar: bool = True

    def __post_init__(self) -> None:
        _checks.count("max_epochs", self.max_epochs)
        if self.max_steps != -1:
            _checks.count("max_steps", self.max_steps)
        limit = self.limit_train_batches
        if isinstance(limit, bool) or not (limit >= 1 if isinstance(limit, int) else 0 < limit <= 1):
            raise ValueError(
                f"limit_train_batches must be an integer >= 1 or a share in (0, 1], as 1.0 for all, got {limit}."
            )
        _checks.count("accumulate_grad_batches", self.accumulate_grad_batches)
        if self.gradient_clip_val is not None:
            _checks.positive("gradient_clip_val", self.gradient_clip_val)

    def named(self) -> str:
        """What is asked of the machine, for the message if it has not got it."""
        names = ("accelerator", "devices", "strategy", "precision")
        return ", ".join(f"trainer.{name}={getattr(self, name)!r}" for name in names)


@dataclass(frozen=True)
class Monitoring:
    """What is measured while training.

    Args:
        knn_every_epochs: epochs between measurements of the neighbours' accuracy on validation; None for never.
        knn_rows: at most so many rows of each split take part.
        diagnostics_every_epochs: epochs between measurements of the embeddings' health; None for never.
        moving_average: decay of a moving average of the weights that becomes the result; None for none.
        scores: record the scores of positives and negatives of every step in ``scores.safetensors``; see
            :class:`~cl_core.training.scoring.ScoreMonitor`.
        scores_every: steps that share a histogram of scores.
        scores_rows: queries whose negatives are looked at in each step; None for all, which costs as much as the loss.
    """

    knn_every_epochs: int | None = 5
    knn_rows: int = 10000
    diagnostics_every_epochs: int | None = 1
    moving_average: float | None = None
    scores: bool = False
    scores_every: int = 100
    scores_rows: int | None = 32

    def __post_init__(self) -> None:
        for name in ("knn_every_epochs", "diagnostics_every_epochs", "scores_rows"):
            if getattr(self, name) is not None:
                _checks.count(name, getattr(self, name))
        for name in ("knn_rows", "scores_every"):
            _checks.count(name, getattr(self, name))
        _checks.flag("scores", self.scores)
        if self.moving_average is not None and not 0 < self.moving_average < 1:
            raise ValueError(f"moving_average must be in (0, 1), got {self.moving_average}.")


def settings_of(
    method: Method, data: Data, groups: Mapping[str, Any], *, processes: int, **rest: Any
) -> dict[str, Any]:
    """All that makes a run, as it was built, in plain values and in the words of a configuration.

    Args:
        method: what is trained.
        data: what it is trained on.
        groups: dataclasses of settings by name.
        processes: that share a batch.
        rest: plain settings.
    """
    return {
        "model": read_back(as_config(describe(method))),
        **data_settings(data, **groups),
        **read_back({name: describe(value, name=name) for name, value in rest.items()}),
        "processes": processes,
        "global_batch_size": processes * data.batch_size,
    }


def data_settings(data: Data, **groups: Any) -> dict[str, Any]:
    """The part of :func:`settings_of` that is about data, and dataclasses of settings by name."""
    described = {"data": _described_data(data), **{name: asdict(group) for name, group in groups.items()}}
    settings: dict[str, Any] = read_back(described)
    return settings


def read_back(settings: Any) -> Any:
    """Settings as a later resume finds them in the file."""
    return json.loads(to_json(settings))


def as_configuration(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of :func:`settings_of` a configuration names."""
    derived = ("processes", "global_batch_size", "weights")
    return {name: value for name, value in settings.items() if name not in derived}


def brief(settings: Any) -> Any:
    """Settings whose long lists and texts are cut to their beginning and digest, enough to see if they are others."""
    if isinstance(settings, Mapping):
        return {name: brief(value) for name, value in settings.items()}
    shown = settings if isinstance(settings, str) else repr(settings)
    if len(shown) <= _SHOWN:
        return settings
    return f"{shown[:_SHOWN]}... (SHA-256 {hashlib.sha256(shown.encode()).hexdigest()})"


def placed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose files and folders are found from any working directory."""
    config = dict(config)
    if isinstance(config.get("init_from"), str):
        config["init_from"] = _absolute(config["init_from"])
    if "data" in config:
        config["data"] = _placed(config["data"])
    return config


def changes(began: Mapping[str, Any], now: Mapping[str, Any], *, run: object) -> dict[str, Any]:
    """What a resumed run has otherwise than when it began, by dotted name.

    A setting that only one of the two names (a later version has more) counts as unchanged.

    Args:
        began: settings that the run folder holds.
        now: settings of the resumed run.
        run: for the message.

    Raises:
        ValueError: for a setting that makes another run of it.
    """
    found = {}
    for path, before, after in differences(began, now):
        if path not in _MAY_CHANGE:
            if path == "global_batch_size":
                path = "data.batch_size"
                before, after = (_batch(each) for each in (began, now))
            raise ValueError(
                f"{path} was {before} when {run} began and is {after} now: resume it as it began, or start "
                f"another run from its weights with --init_from {run}."
            )
        found[path] = after
    return found


def is_beside(path: str) -> bool:
    """Whether a setting, by its dotted name, leaves a run one of the same setting as others, such as the seed."""
    return path in _BESIDE or path.partition(".")[0] in _BESIDE


def differences(before: Any, after: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names and values of what two configurations, or two :func:`settings_of`, both have and not the same.

    Args:
        before: one of them, or of its groups or described objects.
        after: the other one.
        path: dotted name of both.
    """
    for name in before:
        if name not in after:
            continue
        inner, one, other = joined(path, name), before[name], after[name]
        group = not path and isinstance(one, Mapping) and isinstance(other, Mapping)
        if group or name == "init_args" or (_is_object(one) and _is_object(other)):
            yield from differences(one, other, inner)
        elif one != other or (inner in _KIND_COUNTS and type(one) is not type(other)):
            yield inner, one, other


def joined(path: str, name: str) -> str:
    """Dotted name of an entry of a group of settings, or of an object's arguments."""
    return path if name == "init_args" else f"{path}.{name}".lstrip(".")


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """A setting by the dotted name that it has on the command line, such as ``model.loss.temperature``.

    Args:
        settings: of a run, as ``settings.json`` holds them.
        name: what to look up; of an object, the name of its class.

    Raises:
        ValueError: if there is none of this name, with the nearest ones.
    """
    known = dict(_named("", settings))
    if name not in known:
        raise ValueError(plugins.unknown("setting", name, known))
    return known[name]


def with_changes(settings: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or a configuration with what :func:`changes` found, where they name it."""
    updated: dict[str, Any] = _updated("", settings, changed)
    return updated


def _named(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    if _is_object(value):
        yield path, str(value["class_path"]).rpartition(".")[2]
    for name, entry in value.items():
        if name != "class_path":
            yield from _named(joined(path, name), entry)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _updated(path: str, value: Any, changed: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping) and path not in changed:
        return {name: _updated(joined(path, name), entry, changed) for name, entry in value.items()}
    return changed.get(path, value)


def _batch(settings: Mapping[str, Any]) -> str:
    rows, processes = settings["global_batch_size"], settings["processes"]
    return f"{rows // processes} on each of {processes} processes" if processes > 1 else str(rows)


def _described_data(data: Data) -> dict[str, Any]:
    kind = type(data)
    arguments: dict[str, Any] = {}
    for name in inspect.signature(kind).parameters:
        value = getattr(data, name, None)
        try:
            arguments[name] = as_config(describe(value, name=name))
        except TypeError:  # nothing that can be written down, such as a function: then it counts which
            arguments[name] = _label(value)
    described = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
    return _placed(described)  # type: ignore[no-any-return]


def _label(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    shown = repr(value)
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}" if re.search(r" at 0x[0-9a-f]+", shown) else shown


def _placed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            name: _absolute(entry) if name in _PLACES and isinstance(entry, str) else _placed(entry)
            for name, entry in value.items()
        }
    return [_placed(entry) for entry in value] if isinstance(value, list) else value


def _absolute(place: str) -> str:
    return str(Path(place).expanduser().resolve())
