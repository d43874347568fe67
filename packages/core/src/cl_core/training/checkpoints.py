"""Checkpoints: written whole, checked before use, read without executing code."""

from __future__ import annotations

import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import CheckpointIO

from cl_core import _checks
from cl_core.training.adaptor import STATE
from cl_core.training.files import link_or_copy, write_atomically

VERSION = 1
LAST = "last.ckpt"


@dataclass(frozen=True)
class Checkpointing:
    """When to save.

    Args:
        every_steps: optimiser steps between saves of ``last.ckpt`` inside an epoch; None saves at its end only.
        every_epochs: epochs between saves of ``last.ckpt``; the last epoch is always saved.
        keep_every_epochs: epochs between checkpoints that are kept beside ``last.ckpt``; None keeps none.
    """

    every_steps: int | None = None
    every_epochs: int = 1
    keep_every_epochs: int | None = None

    def __post_init__(self) -> None:
        _checks.count("every_epochs", self.every_epochs)
        for name in ("every_steps", "keep_every_epochs"):
            if getattr(self, name) is not None:
                _checks.count(name, getattr(self, name))


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint under a temporary name first; reads only what :func:`read_checkpoint` accepts.

    Args:
        package: distribution that the checkpoints belong to.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write tensors and plain values, with the format version and the package's name."""
        stamped = {**checkpoint, "format": {"version": VERSION, "package": self.package}}
        write_atomically(path, lambda temporary: torch.save(stamped, temporary))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; pickled code is never executed, whatever ``weights_only`` says."""
        return read_checkpoint(path, package=self.package)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path, *, package: str) -> dict[str, Any]:
    """Read a checkpoint of this package to the CPU.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: in one sentence, if it is truncated, corrupt, foreign, or of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}.")
    foreign = f"{path} is not a {package} checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError):
        raise ValueError(f"{foreign}: it is truncated or of another format{_intact(path)}.") from None
    if damaged is not None:
        raise ValueError(f"{path} is corrupt: the checksum of its entry {damaged!r} is wrong{_intact(path)}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise ValueError(f"{foreign}: it holds more than tensors and plain values.") from None
    stamp = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if not isinstance(stamp, dict) or STATE not in checkpoint:
        raise ValueError(f"{foreign}: it has no format entry.")
    if stamp.get("package") != package:
        owner = stamp.get("package")
        raise ValueError(f"{foreign}: it belongs to {owner} (from Python, pass package={owner!r}).")
    if stamp.get("version") != VERSION:
        raise ValueError(
            f"{path} has checkpoint format {stamp.get('version')}, this {package} reads {VERSION}; "
            "start from its exported weights with --init_from instead."
        )
    state, weights = checkpoint[STATE], checkpoint.get("state_dict")
    whole = isinstance(state, dict) and isinstance(weights, dict)
    kinds = {"steps_done": int, "batches": int, "random_states": list}
    if not whole or not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise ValueError(f"{path} is damaged: its entries are not what this {package} writes.")
    return dict(checkpoint)


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers do, and saved first."""


class Checkpoints(pl.Callback):
    """Saves ``last.ckpt`` and, if asked for, one checkpoint every few epochs.

    Ctrl-C and SIGTERM are let through only after the running batch, so that what is saved then can be continued
    exactly; a second one interrupts at once and leaves the checkpoint before. Put this callback last.

    Args:
        folder: where checkpoints go.
        policy: when to save.
    """

    def __init__(self, folder: Path, policy: Checkpointing) -> None:
        self.folder = folder
        self.policy = policy
        self.interrupted: signal.Signals | None = None
        self._step = 0
        self._handlers: dict[signal.Signals, Any] = {}  # before those of :meth:`graceful`

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Note where training goes on; take SIGTERM from Lightning, which stops before an epoch's end is saved."""
        self._step = pl_module.steps_done
        if self._handlers:
            signal.signal(signal.SIGTERM, self._remember)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch, when it is due or after Ctrl-C."""
        step, every = pl_module.steps_done, self.policy.every_steps
        stepped, self._step = step != self._step, step
        # Between two steps there are accumulated gradients, which no checkpoint holds; and the end of an
        # epoch saves for itself.
        if stepped and batch_idx + 1 < trainer.num_training_batches:
            if self.interrupted or (every and step % every == 0):
                self._save(trainer)
            self._stop_if_interrupted()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save at the end of an epoch."""
        done = trainer.current_epoch + 1
        final = done == trainer.max_epochs or pl_module.steps_done >= pl_module.progress.total_steps
        keep = self.policy.keep_every_epochs
        kept = keep is not None and done % keep == 0
        if final or kept or self.interrupted or done % self.policy.every_epochs == 0:
            self._save(trainer)
        if kept and trainer.is_global_zero:
            link_or_copy(self.folder / LAST, self.folder / f"epoch-{done:04d}.ckpt")
        self._stop_if_interrupted()

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait for the end of the batch, in the main thread of a single process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, self._remember)
        try:
            yield
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers = {}

    def _remember(self, number: int, frame: Any) -> None:
        self.interrupted = signal.Signals(number)
        signal.signal(number, self._handlers[self.interrupted])

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)

    def _stop_if_interrupted(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt


def _intact(path: Path) -> str:
    """The newest other checkpoint beside ``path`` whose checksums are right, as a clause."""
    for other in sorted(path.parent.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True):
        if other.name != path.name and zipfile.is_zipfile(other):
            with zipfile.ZipFile(other) as archive:
                if archive.testzip() is None:
                    return f"; {other} is intact"
    return ""
