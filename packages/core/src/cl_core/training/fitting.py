"""Train a method and see what it learnt: the same from Python as from the command line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from cl_core import _checks, plugins
from cl_core.method import Method
from cl_core.training import artifacts
from cl_core.training.adaptor import LitMethod
from cl_core.training.callbacks import Diagnostics, KNNMonitor, MovingAverage, averaged_state
from cl_core.training.checkpoints import (
    AtomicCheckpointIO,
    Checkpointing,
    Checkpoints,
    Terminated,
    read_checkpoint,
)
from cl_core.training.data import SPLITS, Data
from cl_core.training.evaluating import (
    Embedding,
    Evaluation,
    accuracies,
    classifier_accuracies,
    embed_split,
    evaluate,
    evaluate_raw,
    has_classifier,
    has_labels,
)
from cl_core.training.files import sentence
from cl_core.training.optimization import Optimization
from cl_core.training.recording import MetricsTable, ProgressBar, Recorder
from cl_core.training.run import RunFolder
from cl_core.training.scoring import ScoreMonitor, check_scored
from cl_core.training.settings import (
    DRAWN,
    GIVEN,
    Monitoring,
    TrainerOptions,
    as_configuration,
    brief,
    changes,
    placed,
    settings_of,
    with_changes,
)

_LOG = logging.getLogger(__name__)
_LARGEST_SEED = 2**32 - 1  # that NumPy takes
_NAMED = 4  # weights in a sentence


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
        method: what was trained.
    """

    run: RunFolder
    table: MetricsTable
    metrics: Mapping[str, Any]
    embeddings: Mapping[str, Embedding] = field(default_factory=dict)
    class_names: Any = None
    method: Method | None = None


Artist = Callable[[Drawing], None]


@dataclass(frozen=True)
class _Task:
    """What one call of :func:`fit` is about."""

    method: Method
    data: Data
    optimization: Optimization
    trainer: TrainerOptions
    checkpoint: Checkpointing
    monitor: Monitoring
    evaluation: Evaluation
    seed: int
    gradient_cache_chunk: int | None
    init_from: Path | None
    artist: Artist | None
    package: str
    judged: Evaluation | None = None  # how to evaluate, where the data turn out to have labels

    @property
    def class_names(self) -> list[str] | None:
        """What the columns of the method's own classifier's scores speak for; None without one."""
        names = self.data.class_names if has_classifier(self.method) else None
        return None if names is None else [str(name) for name in names]

    @property
    def device(self) -> str:
        """Where to evaluate."""
        wanted = self.trainer.accelerator in ("auto", "gpu", "cuda")
        return "cuda" if wanted and torch.cuda.is_available() else "cpu"

    def adaptor(self) -> LitMethod:
        """The method under Lightning."""
        return LitMethod(
            self.method,
            self.optimization,
            accumulate_batches=self.trainer.accumulate_grad_batches,
            gradient_clip=self.trainer.gradient_clip_val,
            max_steps=self.trainer.max_steps,
            gradient_cache_chunk=self.gradient_cache_chunk,
            data=self.data,
        )

    def settings(self, *, processes: int) -> dict[str, Any]:
        """All of it in plain values."""
        names = ("optimization", "trainer", "checkpoint", "monitor", "evaluation")
        return settings_of(
            self.method,
            self.data,
            {name: getattr(self, name) for name in names},
            processes=processes,
            seed=self.seed,
            init_from=None if self.init_from is None else self.init_from.resolve(),
            gradient_cache_chunk=self.gradient_cache_chunk,
        )


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
    package: str | None = None,
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
        seed: of the run, in [0, 2^32).
        run_dir: folder of the run; None makes ``runs/<name>-<number>``.
        name: stem of that folder; None for the method's and the data's.
        resume: a run folder to continue; the method must be built as it was then, and only settings that leave
            alone what was learnt so far may differ, such as the number of epochs.
        init_from: a run folder, export folder or checkpoint whose fitting weights to start from.
        config: text for ``config.yaml``, of a method that the command line built of it; None for the settings given
            here.
        gradient_cache_chunk: rows encoded at a time, for batches whose activations do not fit; None for all.
        artist: draws figures at the end; if it cannot, that is a warning.
        package: distribution that checkpoints belong to; None for the one that registers the method or its nearest
            base, else ``"cl-core"``.

    Returns:
        :class:`FitResult`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, or SIGTERM while training; what was saved is there to resume from.
        ValueError: for data, settings, checkpoints or weights that do not fit.
        OSError: in one sentence, if the run folder cannot be written or another process trains in it.
    """
    _checks.count("seed", seed, at_least=0)
    if seed > _LARGEST_SEED:
        raise ValueError(f"seed must be at most {_LARGEST_SEED}, got {seed}.")
    for given_name, given in (("run_dir", run_dir), ("resume", resume), ("init_from", init_from)):
        if given == "":
            raise ValueError(f"{given_name} must name a folder, got an empty text.")
    if resume is not None and run_dir is not None:
        raise ValueError(
            f"run_dir must be None where a run is resumed, which stays in its folder, got {run_dir}."
        )
    task = _Task(
        method,
        data,
        optimization or Optimization(),
        trainer or TrainerOptions(),
        checkpoint or Checkpointing(),
        monitor or Monitoring(),
        evaluation or Evaluation(),
        seed,
        gradient_cache_chunk,
        None if init_from is None else Path(init_from).expanduser(),
        artist,
        package or plugins.distribution_of(type(method)),
    )
    # What cannot be used is refused now: before there is a folder, and not after the training.
    data.set_seed(seed)
    method.build(data)
    if task.monitor.scores:
        check_scored(method)
    with _one_sentence():
        lit = task.adaptor()
    with _one_sentence(task.trainer.named()):
        processes = _trainer(task.trainer, lit).world_size
    settings = task.settings(processes=processes) | {"weights": GIVEN if config is None else DRAWN}
    asked = as_configuration(settings) if config is None else placed(yaml.safe_load(config))
    settings = brief(settings)
    run = None if resume is None else RunFolder.existing(resume)
    if has_labels(data):  # reads them
        task = replace(task, judged=task.evaluation)
    if run is not None:
        changed = _resumable(run, settings)
        if not changed and run.finished and (weights := _intact_export(run)) is not None:
            return _finished(run, method, weights)
        settings, asked = with_changes(run.read_settings(), changed), with_changes(run.read_config(), changed)
    initial = _initial_weights(task, run)
    name = name or f"{type(method).__name__}-{type(data).__name__}".lower()
    resumed = run is not None
    run = run or RunFolder.create(name, run_dir=run_dir, processes=processes)
    return _fit_in(run, task, lit, asked, settings, initial, resumed=resumed)


def _initial_weights(task: _Task, run: RunFolder | None) -> dict[str, Tensor] | None:
    """The fitting weights of ``init_from``, unless a checkpoint holds later ones."""
    if task.init_from is None or (run is not None and run.last_checkpoint.is_file()):
        return None
    found = weights_of(task.init_from, package=task.package)
    return artifacts.fitting(task.method, found, source=task.init_from)


def _fit_in(
    run: RunFolder,
    task: _Task,
    lit: LitMethod,
    asked: Mapping[str, Any],
    settings: Mapping[str, Any],
    initial: dict[str, Tensor] | None,
    *,
    resumed: bool,
) -> FitResult:
    """Train and evaluate in a run folder, new or resumed."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    pl.seed_everything(task.seed + rank, verbose=False)  # processes draw different dropout masks
    with (
        run.locked() if rank == 0 else contextlib.nullcontext(),
        run.announced(),
        _interruption_explained(run),
    ):
        if rank == 0 and not resumed:
            run.check_free()  # once more: another process may have begun there before the lock was ours
        restore = run.snapshot()
        try:
            if rank == 0:
                run.write_settings(asked, settings)
                run.write_versions(task.package)
                if run.finished:
                    run.reopen()
                _measure_baselines(run, task)
                if (names := task.class_names) is not None:
                    run.write_metrics(class_names=names)
            if initial is not None:
                kept = artifacts.initialise(task.method, initial, source=str(task.init_from))
                if rank == 0:
                    run.write_metrics(initialised_from=settings["init_from"], kept_initial=kept)
                    _name_kept(kept, task)
            task.method.train()
            table = _train(lit, run, task)
        except Exception:
            learnt = lit.started if resumed else lit.steps_done > 0
            if (
                not learnt and rank == 0
            ):  # refused: all is as before, and a new folder free for another attempt
                restore()
            raise
        task.method.to("cpu").eval()
        if not lit.trainer.is_global_zero:
            return FitResult(run, task.method, {}, [])
        return _conclude(run, lit, task, table)


def _name_kept(kept: list[str], task: _Task) -> None:
    """Say which weights the initial ones did not bring along."""
    if kept:
        _LOG.warning(
            "%d of %d weights were not in %s and keep their initial values: %s.",
            len(kept),
            len(task.method.state_dict()),
            task.init_from,
            ", ".join(kept if len(kept) <= _NAMED else [*kept[:_NAMED], "..."]),
        )


def _resumable(run: RunFolder, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the resumed run has otherwise than when it began; raises if that makes another run of it."""
    stored, config = run.read_settings(), run.read_config()
    if lost := [name for name in as_configuration(stored) if name not in config]:
        raise ValueError(f"{run.config} is truncated: it lacks {', '.join(lost)}.")
    changed = changes(stored, settings, run=run.path)
    if changed.pop("weights", None) is not None and not run.last_checkpoint.is_file():
        began, other = "from Python", "on the command line"
        if stored["weights"] != GIVEN:
            began, other = other, began
        raise ValueError(
            f"{run.path} was started {began} and has no checkpoint yet: resume it there, as only there its initial "
            f"weights are known, or start another run {other}."
        )
    return changed


def _intact_export(run: RunFolder) -> dict[str, Tensor] | None:
    """The weights of a finished run, or None if they are damaged and can be written anew."""
    try:
        return artifacts.read_export_weights(run.export)
    except (OSError, ValueError) as error:
        if not run.last_checkpoint.is_file():
            raise
        warnings.warn(f"{sentence(error)} It is written anew from {run.last_checkpoint}.", stacklevel=3)
        return None


def weights_of(source: str | Path, *, package: str) -> dict[str, Tensor]:
    """The method's weights in a run folder, an export folder or a checkpoint.

    Of a checkpoint, the moving average of the weights where the run keeps one, as that becomes its result.

    Raises:
        FileNotFoundError: if there is nothing to read.
        ValueError: in one sentence, if it cannot be read.
    """
    place = Path(source)
    if place.is_dir() and not artifacts.is_export(place):
        run = RunFolder(place)
        if run.result is None and run.config.is_file():
            raise FileNotFoundError(f"{source} is a run without a checkpoint so far.")
        place = run.result or place
    if artifacts.is_export(place):
        return artifacts.read_export_weights(place)
    if not place.is_file():
        raise FileNotFoundError(f"{source} is neither a run, nor an export, nor a checkpoint.")
    checkpoint = read_checkpoint(place, package=package)
    state = {name.removeprefix("method."): value for name, value in checkpoint["state_dict"].items()}
    average = checkpoint.get("callbacks", {}).get(MovingAverage.__qualname__, {}).get("average", {})
    return averaged_state(state, average)


def _finished(run: RunFolder, method: Method, weights: dict[str, Tensor]) -> FitResult:
    """The result of a run that has nothing left to do."""
    try:
        method.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {run.export} do not fit: {sentence(error)}") from None
    table = MetricsTable(run.metrics_table)
    table.read()
    return FitResult(run, method.to("cpu").eval(), run.read_metrics(), table.rows)


def _measure_baselines(run: RunFolder, task: _Task) -> None:
    """Write what the untrained encoder and the raw inputs are worth, once a run."""
    judged = task.judged
    if judged is not None and judged.baselines and "untrained" not in run.read_metrics():
        untrained = evaluate(task.method, task.data, judged, device=task.device)
        run.write_metrics(untrained=untrained, raw=evaluate_raw(task.data, judged))


def _conclude(run: RunFolder, lit: LitMethod, task: _Task, table: MetricsTable) -> FitResult:
    """Export the trained method, evaluate it, draw, and mark the run as finished."""
    method = task.method
    artifacts.export_method(method, run.export, class_names=task.class_names)
    embeddings: dict[str, Embedding] = {}
    entries: dict[str, Any] = {"steps": lit.steps_done, "seed": task.seed}
    if task.judged is not None:
        size = task.judged.batch_size
        embeddings = {
            split: embed_split(method, task.data, split, device=task.device, batch_size=size)
            for split in SPLITS
        }
        own = classifier_accuracies(method, task.data, task.judged, device=task.device)
        method.to("cpu")
        train, validation, test = embeddings.values()
        entries["trained"] = accuracies(train, validation, test, task.judged, task.data) | own
    metrics = run.write_metrics(**entries, train=table.rows[-1] if table.rows else {})
    if task.artist is not None:
        try:
            task.artist(Drawing(run, table, metrics, embeddings, task.data.class_names, method))
        except Exception as error:  # a picture must not cost the result
            said = f"{type(error).__name__}: {sentence(error)}"
            warnings.warn(f"the figures of {run.path} could not be drawn: {said}", stacklevel=3)
    return FitResult(run, method, run.write_metrics(finished=True), table.rows)


def _train(lit: LitMethod, run: RunFolder, task: _Task) -> MetricsTable:
    options, monitor = task.trainer, task.monitor
    table = MetricsTable(run.metrics_table)
    saver = Checkpoints(run.checkpoints, task.checkpoint)
    callbacks: list[pl.Callback] = []
    if monitor.knn_every_epochs is not None and task.judged is not None:
        every, rows = monitor.knn_every_epochs, monitor.knn_rows
        callbacks.append(KNNMonitor(task.data, evaluation=task.judged, every_epochs=every, rows=rows))
    if monitor.diagnostics_every_epochs is not None:
        callbacks.append(Diagnostics(run.path, every_epochs=monitor.diagnostics_every_epochs))
    if monitor.scores:
        callbacks.append(ScoreMonitor(run.path, every=monitor.scores_every, rows=monitor.scores_rows))
    if monitor.moving_average is not None:
        callbacks.append(MovingAverage(monitor.moving_average))
    callbacks += [ProgressBar()] * options.progress_bar + [Recorder(table), saver]
    last = run.last_checkpoint if run.last_checkpoint.is_file() else None
    with _one_sentence(), _quiet():
        trainer = _trainer(
            options,
            lit,
            logger=[TensorBoardLogger(str(run.path), name="tensorboard", version="")]
            if options.tensorboard
            else False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(task.package)],
            default_root_dir=str(run.path),
        )
        with _interruptible(saver, single=trainer.world_size == 1):
            try:
                trainer.fit(lit, ckpt_path=None if last is None else str(last))
            except (MisconfigurationException, ValueError):
                raise
            except Exception as error:
                if last is None or lit.started:
                    raise
                # Whatever a checkpoint that is whole, but not of this method or damaged inside, does to Lightning.
                raise ValueError(
                    f"{last} cannot be continued: {type(error).__name__}: {sentence(error)}"
                ) from error
    return table


def _trainer(options: TrainerOptions, lit: LitMethod, **rest: Any) -> pl.Trainer:
    automatic = lit.automatic_optimization
    with _quiet():
        return pl.Trainer(
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
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **{"logger": False, **rest},
        )


@contextlib.contextmanager
def _one_sentence(asked: str = "") -> Iterator[None]:
    """What was asked for and cannot be done, as a ValueError of one line."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"{asked} cannot be had: {sentence(error)}" if asked else sentence(error)) from error


@contextlib.contextmanager
def _interruption_explained(run: RunFolder) -> Iterator[None]:
    """Say after Ctrl-C or SIGTERM how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "the last checkpoint is kept" if run.last_checkpoint.is_file() else "no checkpoint was due yet"
        raise type(error)(f"{kept}; go on with fit --resume {run.path}") from None


@contextlib.contextmanager
def _interruptible(saver: Checkpoints, *, single: bool) -> Iterator[None]:
    """Turn the exit that Lightning makes of an interruption back into KeyboardInterrupt."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Several processes would stop at different batches and wait for each other while saving.
        with saver.graceful() if single else contextlib.nullcontext():
            yield
        if saver.interrupted is None:
            return
    except SystemExit:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, handler)
    raise (Terminated if saver.interrupted == signal.SIGTERM else KeyboardInterrupt) from None


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
