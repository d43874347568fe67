"""Scores over training: a callback that records them beside the loss of any host, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cl_core import _rows
from cl_core.losses import FeatureTransform
from cl_core.losses._base import ContrastiveLoss, PredictionLoss, QueueLoss, TwoViewLoss
from cl_core.method import Method
from cl_core.scores import CURVES, ScoreRecorder, _temperature_of
from cl_core.training.callbacks import first_pair, queue_among
from cl_core.training.files import write_atomically

_OF_PAIRS = (TwoViewLoss, QueueLoss, PredictionLoss)
_OF_BLOCKS = ("block_end", "positive_histogram", "negative_histogram")


class ScoreMonitor(pl.Callback):
    """Records what the positives and negatives of every optimiser step look like, of any host.

    Scores are cosines (products, if the loss does not ``normalize``) of the rows that the method hands to its
    ``criterion``: a loss of two views, of queries and keys with a queue or without, or of predictions. Without a queue,
    the negatives of a query are the keys, or targets, of the other rows, also for losses that have no negatives. Of a
    :class:`~cl_core.losses.FeatureTransform` they are those of the transformed rows, as it compares them. Other losses
    say themselves what they score (:meth:`~cl_core.losses.ContrastiveLoss.scored`): labelled rows with rows of the same
    label and of others, class pairs by their gated similarity, rows or predictions with the prototype they belong to
    and with the others. A loss that compares nothing with a positive, as of one view, is refused.

    Of several views the first two count; of several calls in a step (both directions, accumulated batches) the first;
    of several clusterings the first; of several processes the rows of the first.

    Nothing waits for the device but the end of every block of ``every`` steps. The file is written at the end of an
    epoch and before a checkpoint; a run that was killed and resumed ends with the same file as one that was not.

    Args:
        folder: where ``scores.safetensors`` is written; :func:`read_scores` reads it.
        every: steps that share a histogram.
        rows: queries whose negatives are looked at in each step, evenly spaced; None for all. Of a loss that says
            itself what it scores, also the positives are those of these queries.
    """

    def __init__(self, folder: Path, *, every: int = 100, rows: int | None = 32) -> None:
        self.path = folder / "scores.safetensors"
        self._recorder = ScoreRecorder(every, rows=rows)
        self._past = self._recorder.flush()  # all blocks before those of the recorder
        self._written = 0  # number of the step after the last in the file
        self._handles: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take back the blocks that were full at the restored state."""
        check_scored(pl_module.method)
        if trainer.is_global_zero and self.path.is_file() and pl_module.steps_done > 0:
            own = self._recorder.state_dict()["step"]
            self._past = _before(read_scores(self.path), int(own[0]) if len(own) else pl_module.steps_done)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Listen to the criterion, unless this step has been recorded."""
        step = pl_module.steps_done
        if not trainer.is_global_zero or (len(self._handles) or step < self._recorder.steps):
            return
        self._recorder.steps = step
        criterion = pl_module.method.criterion
        if isinstance(criterion, FeatureTransform):
            self._handles = [
                criterion.register_forward_pre_hook(self._lend),
                criterion.register_forward_hook(self._take_back, always_call=True),
            ]
        else:
            self._handles = [criterion.register_forward_hook(self._record, with_kwargs=True)]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening to a criterion that was not called."""
        self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the file."""
        self._write()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the file first: the checkpoint holds only the block that has begun."""
        self._write()

    def state_dict(self) -> dict[str, Any]:
        """What is not in the file, or not for good."""
        return {"recorder": self._recorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._recorder.load_state_dict(state["recorder"])

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], loss: Any) -> None:
        # After the loss, which refuses what cannot be compared in words of its own.
        self._stop()
        if not isinstance(module, _OF_PAIRS):
            if len(next(iter((*inputs, *options.values())))):
                found = module.scored(*inputs, rows=self._recorder.rows, **options)  # type: ignore[operator]
                self._recorder.update_scores(*found[:3], temperature=found.temperature)
            return
        pair = first_pair(inputs)
        if pair is None or not len(pair[0]):  # a rank may hold no row
            return
        query, key = (_rows.wide(rows.detach()) for rows in pair)
        queue = queue_among(inputs, options)
        self._recorder.update(
            query,
            key,
            None if queue is None else queue.detach(),
            temperature=_temperature_of(module),
            normalize=bool(getattr(module, "normalize", True)),
        )

    def _lend(self, module: FeatureTransform, inputs: tuple[Any, ...]) -> None:
        module.recorder = self._recorder

    def _take_back(self, module: FeatureTransform, inputs: tuple[Any, ...], loss: Any) -> None:
        module.recorder = None
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _write(self) -> None:
        if self._recorder.steps == self._written:
            return
        found = _joined(self._past, self._recorder.flush(keep_open=True))
        if not len(found["step"]):
            return
        write_atomically(self.path, lambda temporary: save_file(found, temporary))
        self._written = self._recorder.steps
        own = self._recorder.state_dict()["step"]
        self._past = _before(found, int(own[0]) if len(own) else self._written)


def check_scored(method: Method) -> None:
    """Refuse a method whose criterion's scores :class:`ScoreMonitor` does not know how to record."""
    criterion = getattr(method, "criterion", None)
    scores = isinstance(criterion, ContrastiveLoss) and type(criterion).scored is not ContrastiveLoss.scored
    if not scores and not isinstance(criterion, _OF_PAIRS):
        raise ValueError(
            "monitor.scores needs a method whose criterion compares something with positives (views, queries and keys, "
            "predictions and targets, labelled rows, prototypes), got "
            f"{type(criterion).__name__} in {type(method).__name__}."
        )
    if isinstance(criterion, FeatureTransform) and criterion.recorder is not None:
        raise ValueError("criterion.recorder must be None with monitor.scores, got a recorder of your own.")


def read_scores(path: str | Path) -> dict[str, Tensor]:
    """The scores that a run has recorded, as :meth:`cl_core.scores.ScoreRecorder.flush` hands them out.

    Args:
        path: of ``scores.safetensors`` in a run folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: in one sentence, if it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: scores are recorded by fit --monitor.scores true.")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); without it, a run goes on.") from None
    if not _fits(found):
        raise ValueError(f"{path} holds other things than scores; without it, a run goes on.")
    return found


def _fits(found: dict[str, Tensor]) -> bool:
    """Whether names, kinds and shapes are those of recorded scores."""
    wanted = ScoreRecorder().flush()
    if found.keys() != wanted.keys() or any(found[name].dtype != wanted[name].dtype for name in wanted):
        return False
    steps, blocks, bins = (found[name].numel() for name in ("step", "block_end", "edges"))
    shapes = dict.fromkeys(("step", *CURVES), (steps,)) | dict.fromkeys(_OF_BLOCKS, (blocks, bins - 1))
    shapes |= {"block_end": (blocks,), "edges": (bins,)}
    return all(tuple(found[name].shape) == shape for name, shape in shapes.items())


def _before(found: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """The steps before one, and the blocks that ended by then."""
    steps, blocks = found["step"] < step, found["block_end"] <= step
    kept = {name: found[name][blocks] for name in _OF_BLOCKS} | {"edges": found["edges"]}
    return {name: kept[name] if name in kept else values[steps] for name, values in found.items()}


def _joined(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: values if name == "edges" else torch.cat([values, second[name]])
        for name, values in first.items()
    }
