"""How a run is trained and watched, and which of its settings may change when it is resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cl_core import _checks

Precision: TypeAlias = Literal["32-true", "16-mixed", "bf16-mixed"]

# They touch what is computed with, watched or kept, not what the steps before the checkpoint learnt.
_MAY_CHANGE = {
    *(f"trainer.{name}" for name in ("max_epochs", "max_steps", "accelerator", "devices", "strategy")),
    *(f"trainer.{name}" for name in ("tensorboard", "progress_bar")),
    *(f"monitor.{name}" for name in ("knn_every_epochs", "knn_rows", "diagnostics_every_epochs")),
    *(f"checkpoint.{name}" for name in ("every_steps", "every_epochs", "keep_every_epochs")),
    *(f"data.{name}" for name in ("num_workers", "root", "download")),
    "evaluation.batch_size",
}


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
        if not self.limit_train_batches > 0:
            raise ValueError(f"limit_train_batches must be > 0, got {self.limit_train_batches}.")
        _checks.count("accumulate_grad_batches", self.accumulate_grad_batches)


@dataclass(frozen=True)
class Monitoring:
    """What is measured while training.

    Args:
        knn_every_epochs: epochs between measurements of the neighbours' accuracy on validation; None for never.
        knn_rows: at most so many rows of each split take part.
        diagnostics_every_epochs: epochs between measurements of the embeddings' health; None for never.
        moving_average: decay of a moving average of the weights that becomes the result; None for none.
    """

    knn_every_epochs: int | None = 5
    knn_rows: int = 10000
    diagnostics_every_epochs: int | None = 1
    moving_average: float | None = None

    def __post_init__(self) -> None:
        for name in ("knn_every_epochs", "diagnostics_every_epochs"):
            if getattr(self, name) is not None:
                _checks.count(name, getattr(self, name))
        _checks.count("knn_rows", self.knn_rows)
        if self.moving_average is not None and not 0 < self.moving_average < 1:
            raise ValueError(f"moving_average must be in (0, 1), got {self.moving_average}.")


def continued(began: Mapping[str, Any], now: Mapping[str, Any], *, run: object) -> dict[str, Any]:
    """The configuration that a resumed run goes on with: as it began, with what may change as it is now.

    A setting that only one of the two names (a later version has more) is left as it is.

    Args:
        began: configuration that the run folder holds.
        now: configuration of the resumed run.
        run: for the message.

    Raises:
        ValueError: for a setting that makes another run of it.
    """
    for path, before, after in _differences("", began, now):
        if path not in _MAY_CHANGE:
            raise ValueError(
                f"{path} was {before} when {run} began and is {after} now: resume it as it began, or start "
                f"another run from its weights with --init_from {run}."
            )
    merged: dict[str, Any] = _updated(began, now)
    return merged


def _differences(path: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in before:
            if name in after:
                inner = path if name == "init_args" else f"{path}.{name}".lstrip(".")
                yield from _differences(inner, before[name], after[name])
    elif before != after:
        yield path, before, after


def _updated(before: Any, after: Any) -> Any:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return {name: _updated(value, after.get(name, value)) for name, value in before.items()}
    return after
