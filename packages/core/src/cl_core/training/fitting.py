"""Train a method and see what it learnt: the same from Python as from the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from cl_core import _checks
from cl_core.method import Method
from cl_core.training import artifacts
from cl_core.training.adaptor import LitMethod
from cl_core.training.callbacks import Diagnostics, KNNMonitor, MovingAverage
from cl_core.training.checkpoints import AtomicCheckpointIO, Checkpointing, Checkpoints, read_checkpoint
from cl_core.training.data import SPLITS, Data
from cl_core.training.evaluating import (
    Embedding,
    Evaluation,
    accuracies,
    embed_split,
    evaluate,
    evaluate_raw,
    has_labels,
)
from cl_core.training.optimization import Optimization
from cl_core.training.recording import MetricsTable, ProgressBar, Recorder
from cl_core.training.run import RunFolder

Precision: TypeAlias = Literal["32-true", "16-mixed", "bf16-mixed"]


@dataclass(frozen=True)
class TrainerOptions:
    """What is passed on to Lightning's Trainer.

    Args:
        max_epochs: epochs to train.
        max_steps: optimiser steps after which training stops, -1 for no such limit.
        accelerator: "auto", "cpu", "gpu", ...
        devices: how many, a list of numbers, or "auto".
        strategy: "auto", "ddp", ...
        precision: "32-true", "16-mixed", "bf16-mixed", ...
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


@dataclass(frozen=True)
class FitResult:
    """What :func:`fit` returns.

    Attributes:
        run: the run folder.
        method: the trained method, in evaluation mode on the CPU.
        metrics: what ``metrics.json`` holds.
        table: one row an epoch, what ``metrics.csv`` holds.
    """

    run: RunFolder
    method: Method
    metrics: dict[str, Any]
    table: list[dict[str, float]]


@dataclass(frozen=True)
class Drawing:
    """What an artist gets at the end of a fit to draw figures from.

    Attributes:
        run: the run folder; figures go to ``run.figures``.
        table: the table of the run.
        metrics: accuracies by encoder, as in ``metrics.json``.
        embeddings: of the trained method by split; empty without evaluation.
        class_names: as the data says.
    """

    run: RunFolder
    table: MetricsTable
    metrics: Mapping[str, Any]
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)
    class_names: Any = None


Artist = Callable[[Drawing], None]


def fit(
    method: Method,
    data: Data,
    *,
    optimization: Optimization | None = None,
    trainer: TrainerOptions | None = None,
    checkpoint: Checkpointing | None = None,
    monitor: Monitoring | None = None,
    evaluation: Evaluation | None = None,
    seed: int = 0,
    run_dir: str | Path | None = None,
    name: str | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    config: str | None = None,
    gradient_cache_chunk: int | None = None,
    artist: Artist | None = None,
    package: str = "cl-core",
) -> FitResult:
    """Train a method, evaluate it and write everything to a run folder.

    ``seed`` governs the order of the data, the augmentations and what is drawn while training; the initial
    weights are those that the method comes with.

    Args:
        method: to train, in place.
        data: what to train and evaluate on.
        optimization: optimiser and learning rate.
        trainer: what is passed on to Lightning.
        checkpoint: when to save.
        monitor: what is measured while training.
        evaluation: how the result is evaluated, where there are labels.
        seed: of the run.
        run_dir: folder of the run; None makes ``runs/<name>-<number>``.
        name: stem of that folder; None for the method's and the data's.
        resume: a run folder to continue; the method must be built as it was then.
        init_from: a run folder, export folder or checkpoint whose fitting weights to start from.
        config: text for ``config.yaml``; None for the settings given here.
        gradient_cache_chunk: rows encoded at a time, for batches whose activations do not fit; None for all.
        artist: draws figures at the end.
        package: distribution that checkpoints belong to.

    Returns:
        :class:`FitResult`.

    Raises:
        KeyboardInterrupt: after Ctrl-C; the last checkpoint is there to resume from.
        ValueError: for data, settings, checkpoints or weights that do not fit.
        OSError: in one sentence, if the run folder cannot be written.
    """
    trainer_options, evaluation = trainer or TrainerOptions(), evaluation or Evaluation()
    # What cannot be used is refused now: before there is a folder, and not after the training.
    artifacts.describe(method)
    weights = None if init_from is None else weights_of(init_from, package=package)
    data.set_seed(seed)
    labelled, device = has_labels(data), _device(trainer_options)
    if resume is not None:
        run = RunFolder.existing(resume)
    else:
        name = name or f"{type(method).__name__}-{type(data).__name__}".lower()
        run = RunFolder.create(name, run_dir=run_dir)
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    pl.seed_everything(seed + rank, verbose=False)  # processes draw different dropout masks

    settings = {
        "trainer": trainer_options,
        "optimization": optimization or Optimization(),
        "evaluation": evaluation,
    }
    monitor, checkpoint = monitor or Monitoring(), checkpoint or Checkpointing()
    first = rank == 0
    before = run.config.read_text() if resume is not None and run.config.is_file() else None
    if config is not None and config == before and run.finished:  # nothing was left to do
        return FitResult(run, artifacts.load_export(run.export), run.read_metrics(), [])
    if first and (resume is None or config is not None):
        run.write_config(config if config is not None else _described(method, data, settings, seed))
        run.write_versions(package)
    if first and labelled and evaluation.baselines and "untrained" not in run.read_metrics():
        untrained = evaluate(method, data, evaluation, device=device)
        run.write_metrics(untrained=untrained, raw=evaluate_raw(data, evaluation))
    if weights is not None:
        kept = artifacts.initialise(method, weights, source=str(init_from))
        run.write_metrics(initialised_from=str(init_from), kept_initial=kept)

    method.train()
    try:
        lit = LitMethod(
            method,
            optimization,
            accumulate_batches=trainer_options.accumulate_grad_batches,
            gradient_clip=trainer_options.gradient_clip_val,
            max_steps=trainer_options.max_steps,
            gradient_cache_chunk=gradient_cache_chunk,
            data=data,
        )
        table = _train(
            lit, data, run, trainer_options, checkpoint, monitor, evaluation if labelled else None, package
        )
    except (MisconfigurationException, ValueError) as error:
        if first and before is not None:  # what was refused must not stand in the way of the next resume
            run.write_config(before)
        raise ValueError(" ".join(str(error).split())) from error
    except KeyboardInterrupt:
        state = (
            "the last checkpoint is kept" if run.last_checkpoint.is_file() else "no checkpoint was due yet"
        )
        raise KeyboardInterrupt(f"{state}; go on with fit --resume {run.path}") from None
    method.to("cpu").eval()
    if not lit.trainer.is_global_zero:
        return FitResult(run, method, {}, [])
    artifacts.export_method(method, run.export)
    embeddings: dict[str, Embedding] = {}
    entries: dict[str, Any] = {"steps": lit.steps_done, "seed": seed}
    if labelled:
        embeddings = {
            split: embed_split(method, data, split, device=device, batch_size=evaluation.batch_size)
            for split in SPLITS
        }
        method.to("cpu")
        train, validation, test = embeddings.values()
        entries["trained"] = accuracies(train, validation, test, evaluation)
    metrics = run.write_metrics(**entries, train=table.rows[-1] if table.rows else {}, finished=True)
    if artist is not None:
        artist(Drawing(run, table, metrics, embeddings, data.class_names))
    return FitResult(run, method, metrics, table.rows)


def weights_of(source: str | Path, *, package: str) -> dict[str, Tensor]:
    """The method's weights in a run folder, an export folder or a checkpoint.

    Raises:
        FileNotFoundError: if there is nothing to read.
        ValueError: in one sentence, if it cannot be read.
    """
    source = Path(source)
    if source.is_dir():
        if artifacts.is_export(source):
            return artifacts.read_export_weights(source)
        run = RunFolder(source)
        if artifacts.is_export(run.export):
            return artifacts.read_export_weights(run.export)
        source = run.last_checkpoint if run.last_checkpoint.is_file() else source
    if not source.is_file():
        raise FileNotFoundError(f"{source} is neither a run, nor an export, nor a checkpoint.")
    state = read_checkpoint(source, package=package)["state_dict"]
    return {name.removeprefix("method."): value for name, value in state.items()}


def _train(
    lit: LitMethod,
    data: Data,
    run: RunFolder,
    options: TrainerOptions,
    checkpoint: Checkpointing,
    monitor: Monitoring,
    evaluation: Evaluation | None,
    package: str,
) -> MetricsTable:
    table = MetricsTable(run.metrics_table)
    saver = Checkpoints(run.checkpoints, checkpoint)
    callbacks: list[pl.Callback] = []
    if monitor.knn_every_epochs is not None and evaluation is not None:
        every, rows = monitor.knn_every_epochs, monitor.knn_rows
        callbacks.append(KNNMonitor(data, evaluation=evaluation, every_epochs=every, rows=rows))
    if monitor.diagnostics_every_epochs is not None:
        callbacks.append(Diagnostics(run.path, every_epochs=monitor.diagnostics_every_epochs))
    if monitor.moving_average is not None:
        callbacks.append(MovingAverage(monitor.moving_average))
    callbacks += [ProgressBar()] * options.progress_bar + [Recorder(table), saver]
    automatic = lit.automatic_optimization
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=options.max_epochs,
            max_steps=options.max_steps if automatic else -1,
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=options.strategy,
            precision=options.precision,
            accumulate_grad_batches=options.accumulate_grad_batches if automatic else 1,
            gradient_clip_val=options.gradient_clip_val if automatic else None,
            limit_train_batches=options.limit_train_batches,
            deterministic=options.deterministic,
            logger=[TensorBoardLogger(str(run.path), name="tensorboard", version="")]
            if options.tensorboard
            else False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(package)],
            default_root_dir=str(run.path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        last = run.last_checkpoint
        with _interruptible(saver, single=trainer.world_size == 1):
            trainer.fit(lit, ckpt_path=str(last) if last.is_file() else None)
    return table


def _device(options: TrainerOptions) -> str:
    wanted = options.accelerator in ("auto", "gpu", "cuda")
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def _interruptible(saver: Checkpoints, *, single: bool) -> Iterator[None]:
    """Turn the exit that Lightning makes of Ctrl-C back into KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Several processes would stop at different batches and wait for each other while saving.
        with saver.graceful() if single else contextlib.nullcontext():
            yield
    except SystemExit:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's hints off the terminal; its errors come through as exceptions."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _described(method: Method, data: Data, settings: Mapping[str, Any], seed: int) -> str:
    """What there is to write down of a run that was not started from a configuration."""
    described = {
        "model": artifacts.describe(method),
        "data": f"{type(data).__module__}.{type(data).__qualname__}",
        **{name: _plain(asdict(value)) for name, value in settings.items()},
        "seed": seed,
    }
    return str(yaml.safe_dump(described, sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
