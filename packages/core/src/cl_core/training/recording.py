"""What a run notes down while it trains: a table of one row an epoch, and a progress bar."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from cl_core.training.adaptor import gathered, process
from cl_core.training.files import text_of, write_atomically


class MetricsTable:
    """A CSV file of one row an epoch, rewritten whole with each; columns appear as they come.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def read(self, *, up_to_step: float = math.inf) -> None:
        """Take back the rows of an earlier part of the run; later ones were not kept by any checkpoint.

        Raises:
            ValueError: in one sentence, if the file is damaged.
        """
        self.rows = []
        if not self.path.is_file():
            return
        try:
            text = self.path.read_bytes().decode()
            head, *lines = csv.reader(text.splitlines(), strict=True)
            rows = [
                {key: _short(float(value)) for key, value in zip(head, line, strict=True) if value}
                for line in lines
            ]
        except (ValueError, csv.Error):
            text = ""
        if not text.endswith("\n") or not all({"epoch", "step"} <= row.keys() for row in rows):
            raise ValueError(f"{self.path} is truncated or corrupt: it is not the table that a run writes.")
        self.rows = [row for row in rows if row["step"] <= up_to_step]

    def append(self, row: dict[str, float]) -> None:
        """Add a row and write the file."""
        self.rows.append({name: _short(value) for name, value in row.items()})
        columns = list(dict.fromkeys(name for entry in self.rows for name in entry))

        def write(file: Any) -> None:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            for entry in self.rows:
                writer.writerow(entry)

        write_atomically(self.path, text_of(write))

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have this column."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


class Recorder(pl.Callback):
    """Writes the epoch's mean of every logged loss, the learning rate, and what the monitors report.

    The running sums are part of the checkpoint, so that a run resumed in the middle of an epoch writes the
    same row. Put it after the monitors and before the checkpoints.

    Args:
        table: where the rows go.
    """

    def __init__(self, table: MetricsTable) -> None:
        self.table = table
        self._sums: dict[str, Tensor] = {}
        self._batches = 0
        self._rows: int | None = None  # of the table, as the checkpoint counts

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Go on after the rows that belong to the restored state, also where no step is left to do."""
        self.table.read(up_to_step=pl_module.steps_done)
        if trainer.is_global_zero and self._rows not in (None, len(self.table.rows)):
            raise ValueError(
                f"{self.table.path} is truncated: it has {len(self.table.rows)} rows where the checkpoint counts "
                f"{self._rows}."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's losses, without waiting for the device."""
        for name, value in pl_module.last_losses.items():
            total = self._sums.get(name)
            value = value.to(torch.float64 if value.device.type != "mps" else torch.float32)
            self._sums[name] = value if total is None else total.to(value.device) + value
        self._batches += 1

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the row."""
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1, "step": pl_module.steps_done}
        for name, total in self._sums.items():
            mean = trainer.strategy.reduce(total / self._batches, reduce_op="mean")
            row[f"train/{name}"] = float(mean)
        optimizer = next(iter(pl_module.named_optimizers.values()))
        row["lr"] = optimizer.param_groups[0]["lr"]
        row |= pl_module.epoch_metrics
        pl_module.epoch_metrics = {}
        self._sums, self._batches = {}, 0
        if trainer.is_global_zero:
            self.table.append(row)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the running epoch, of every process, and the number of rows before it."""
        sums = gathered({name: value.cpu() for name, value in self._sums.items()})
        return {"sums": sums, "batches": self._batches, "rows": len(self.table.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back; where the number of processes is another one, each takes the mean."""
        sums, self._batches, self._rows = state["sums"], state["batches"], state["rows"]
        rank, processes = process()
        if len(sums) != processes:
            sums = [{name: sum(each[name] for each in sums) / len(sums) for name in sums[0]}] * processes
        self._sums = dict(sums[rank])


class ProgressBar(pl.Callback):
    """One bar over the optimiser steps of the whole training."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar where training goes on."""
        if trainer.is_global_zero:
            done, total = pl_module.steps_done, pl_module.progress.total_steps
            self._bar = tqdm(total=total, initial=done, unit="step", desc="training", **_looks())

    def looking_at(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches that a method looks at before it trains, with a bar of their own."""
        if self._bar is None:
            return batches
        bar: Iterable[Any] = tqdm(batches, unit="batch", desc="looking at the data", leave=False, **_looks())
        return bar

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        if self._bar is not None:
            self._bar.update(pl_module.steps_done - self._bar.n)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Show the epoch's numbers."""
        if self._bar is not None:
            shown = {"loss": float(pl_module.last_losses["loss"]), **pl_module.shown_metrics}
            self._bar.set_description(f"epoch {trainer.current_epoch + 1}/{pl_module.progress.total_epochs}")
            self._bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _looks() -> dict[str, Any]:
    return {"dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 10.0}


def _short(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value
