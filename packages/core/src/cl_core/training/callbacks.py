"""Callbacks that watch a training: neighbours' accuracy, the health of the embeddings, a moving average."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_core import diagnostics
from cl_core.distributed import unbroadcast_buffers
from cl_core.losses._base import ClassPairLoss, ContrastiveLoss, LabelledLoss, PredictionLoss, TwoViewLoss
from cl_core.losses.feature_transform import negatives_within
from cl_core.method import Method
from cl_core.momentum import _follow
from cl_core.scores import _temperature_of
from cl_core.training.data import Data
from cl_core.training.evaluating import Evaluation, embed_split, labelled, neighbour_accuracies
from cl_core.training.files import write_atomically


class KNNMonitor(pl.Callback):
    """Accuracy of the neighbours on the validation split while training, reported as ``validation/knn``.

    For the best number of neighbours, as in the final table, so that the curve compares with its baselines.

    Args:
        data: gives the evaluation splits.
        evaluation: numbers of neighbours to choose from and the temperature of their votes.
        every_epochs: epochs between measurements.
        rows: at most so many rows of each split, evenly spaced.
    """

    def __init__(
        self, data: Data, *, evaluation: Evaluation | None = None, every_epochs: int = 1, rows: int = 10000
    ) -> None:
        self.data = data
        self.evaluation = evaluation or Evaluation()
        self.every_epochs = every_epochs
        self.rows = rows

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure on the first process; the others go on to their next batch and wait there."""
        if (trainer.current_epoch + 1) % self.every_epochs or not trainer.is_global_zero:
            return
        train, validation = (
            labelled(
                *embed_split(pl_module.method, self.data, split, device=pl_module.device, limit=self.rows)
            )
            for split in ("train", "validation")
        )
        scores = neighbour_accuracies(train, validation, self.evaluation)
        pl_module.report("validation/knn", max(scores.values()), show="kNN")


class Diagnostics(pl.Callback):
    """Health of what the loss sees: alignment, uniformity, effective rank, similarities of pairs and their overlap.

    For losses with a temperature also the factor q by which InfoNCE's gradient shrinks (``train/npc_factor``), and what
    the loss itself measures. Reads the embeddings that the method hands to its ``criterion`` in the last batch of an
    epoch, of several views the first two; rows with labels are positives where their labels are equal, also those of a
    loss of class pairs. Of a criterion that takes neither views, nor queries and keys, nor predictions and targets, nor
    labelled rows only its own measures are reported.

    Args:
        folder: where ``similarities.safetensors`` is written, samples of the similarities over training.
        every_epochs: epochs between measurements.
        samples: similarities of each kind that are stored at a time.
    """

    def __init__(self, folder: Path, *, every_epochs: int = 1, samples: int = 1024) -> None:
        self.path = folder / "similarities.safetensors"
        self.every_epochs = every_epochs
        self.samples = samples
        self._seen: tuple[Tensor, ...] | None = None
        self._factor: Tensor | None = None
        self._measures: dict[str, Tensor] = {}
        self._advice: str | None = None
        self._advised = False
        self._handle: Any = None
        self._stored: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take back the samples that belong to the restored state."""
        self._stored = {}
        if self.path.is_file() and pl_module.steps_done > 0:
            self._stored = {
                name: values
                for name, values in _stored_similarities(self.path).items()
                if int(name.split("/")[0]) <= pl_module.steps_done
            }

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Listen to the criterion during the last batch of an epoch, and of the training."""
        due = (trainer.current_epoch + 1) % self.every_epochs == 0
        criterion = getattr(pl_module.method, "criterion", None)
        due = due and batch_idx + 1 == trainer.num_training_batches
        progress = pl_module.progress
        due = due or progress.step + 1 >= progress.total_steps  # max_steps may end it inside an epoch
        if due and trainer.is_global_zero and isinstance(criterion, ContrastiveLoss):
            self._handle = criterion.register_forward_pre_hook(self._listen, with_kwargs=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop listening."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure what was heard."""
        for name, value in self._measures.items():
            pl_module.report(f"train/{name}", float(value))
        self._measures = {}
        if self._advice is not None and not self._advised:  # once a run is enough
            self._advised = True
            # From here, as what is said of Lightning's own lines is not shown.
            warnings.warn(f"epoch {trainer.current_epoch + 1}: {self._advice}", stacklevel=1)
        if self._seen is None:
            return
        first, second = self._seen
        self._seen = None
        if len(first) < 2:
            return
        if self._factor is not None:
            pl_module.report("train/npc_factor", float(self._factor))
        if second.ndim == 2:
            pl_module.report("train/alignment", float(diagnostics.alignment(first, second)))
            scores = diagnostics.score_statistics(first, second)
        else:
            scores = diagnostics.score_statistics(first, labels=second)
        pl_module.report("train/uniformity", float(diagnostics.uniformity(first)), show="uniformity")
        pl_module.report("train/effective_rank", float(diagnostics.effective_rank(first)))
        pl_module.report("train/positive_similarity", float(scores.positive.mean))
        pl_module.report("train/negative_similarity", float(scores.negative.mean))
        pl_module.report("train/similarity_overlap", float(scores.overlap))
        self._store(pl_module.steps_done, first, second)

    def _listen(self, module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        # Now, as a queue has taken in these keys when the epoch ends.
        self._measures = module.measures(*inputs, **options)  # type: ignore[operator]
        self._advice = module.advice(self._measures) if self._measures else None  # type: ignore[operator]
        pair = None
        if isinstance(module, ClassPairLoss):
            pair = inputs[0], inputs[2]
        elif isinstance(module, TwoViewLoss | LabelledLoss | PredictionLoss):
            pair = first_pair(inputs)
        if pair is None or not len(pair[0]):  # a rank may hold no row
            return
        first, second = (value.detach() for value in pair)
        self._seen = (first.float(), second.float() if second.is_floating_point() else second)
        self._factor = None
        temperature = _temperature_of(module)
        if second.is_floating_point() and temperature is not None:
            temperature = temperature.item() if isinstance(temperature, Tensor) else temperature
            queue = queue_among(inputs, options)
            negatives = negatives_within(module) if queue is None else queue
            self._factor = diagnostics.npc_factor(first, second, negatives=negatives, temperature=temperature)

    def _store(self, step: int, first: Tensor, second: Tensor) -> None:
        for kind, values in sampled_similarities(first, second, self.samples).items():
            self._stored[f"{step:09d}/{kind}"] = values.half().cpu().contiguous()
        write_atomically(self.path, lambda temporary: save_file(self._stored, temporary))


def first_pair(inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Two views, or rows and labels, among what a criterion was called with; of several views the first two."""
    first, second = (*inputs, None, None)[:2]
    if isinstance(first, list | tuple):
        others = first if second is None else second
        first, second = first[0], others[1] if isinstance(others, list | tuple) else others
    return (first, second) if isinstance(first, Tensor) and isinstance(second, Tensor) else None


def queue_among(inputs: tuple[Any, ...], options: Mapping[str, Any]) -> Tensor | None:
    """The queue of negatives among what a criterion was called with, if there is one."""
    queue: Tensor | None = options.get("negatives", options.get("queue"))
    return inputs[2] if len(inputs) > 2 else queue


class MovingAverage(pl.Callback):
    """Exponential moving average of the method's weights, taken over when the training ends.

    Memories (queues, banks, clusters) have no average: they stay as the last step left them.

    Args:
        decay: share of the average that each step keeps, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {decay}.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._step: int | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Once the method is prepared, start from its weights, or go on with the restored average."""
        if self._step is not None:
            return
        self._step = pl_module.steps_done
        weights = _weights(pl_module.method)
        self._average = {
            name: self._average[name].to(value.device) if name in self._average else value.detach().clone()
            for name, value in weights.items()
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update after an optimiser step."""
        if pl_module.steps_done != self._step:
            self._step = pl_module.steps_done
            _follow(self._average, _weights(pl_module.method), self.decay)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Make the average the result, also of a run resumed after its last step, which starts no training."""
        pl_module.method.load_state_dict(averaged_state(pl_module.method.state_dict(), self._average))

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"average": {name: value.cpu() for name, value in self._average.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._average = dict(state["average"])


def averaged_state(state: dict[str, Any], average: dict[str, Tensor]) -> dict[str, Any]:
    """A method's state with the :class:`MovingAverage` of its weights in place of them."""
    return {name: average.get(name, value) for name, value in state.items()}


def _weights(method: Method) -> dict[str, Tensor]:
    """What a moving average is taken of: parameters and statistics, under all of their names."""
    left_out = set(unbroadcast_buffers(method))
    parameters = method.named_parameters(remove_duplicate=False)
    buffers = method.named_buffers(remove_duplicate=False)
    return {name: value for name, value in chain(parameters, buffers) if name not in left_out}


def sampled_similarities(first: Tensor, second: Tensor, samples: int) -> dict[str, Tensor]:
    """Cosine similarities of at most ``samples`` positive and negative pairs, spread evenly over the batch.

    Args:
        first: embeddings (N, D).
        second: embeddings (N, D) of the same rows, or labels (N,).
        samples: of each kind.
    """
    first, second = _evenly(first, samples), _evenly(second, samples)
    rows = torch.nn.functional.normalize(first, dim=1)
    if second.ndim == 2:
        other = torch.nn.functional.normalize(second, dim=1)
        same = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        similarity = rows @ other.T
        pairs = {"positive": similarity[same], "negative": similarity[~same]}
    else:
        above = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
        same = second[:, None] == second[None]
        similarity = rows @ rows.T
        pairs = {"positive": similarity[same & above], "negative": similarity[~same & above]}
    return {kind: _evenly(values, samples) for kind, values in pairs.items()}


def read_similarities(path: Path) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Step, positive and negative similarities of each measurement of :class:`Diagnostics`, in order.

    Raises:
        ValueError: in one sentence, if the file is damaged.
    """
    stored = _stored_similarities(path)
    for key in sorted(name for name in stored if name.endswith("/positive")):
        step = key.split("/")[0]
        yield int(step), stored[key].float(), stored[f"{step}/negative"].float()


def _stored_similarities(path: Path) -> dict[str, Tensor]:
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); without it, a run goes on.") from None
    kinds: dict[str, set[str]] = {"positive": set(), "negative": set()}
    for name in stored:
        step, _, kind = name.partition("/")
        if step.isdecimal():
            kinds.get(kind, set()).add(step)
    if len(stored) != 2 * len(kinds["positive"]) or kinds["positive"] != kinds["negative"]:
        raise ValueError(f"{path} holds other things than similarities; without it, a run goes on.")
    return stored


def _evenly(values: Tensor, samples: int) -> Tensor:
    if len(values) <= samples:
        return values
    return values[torch.linspace(0, len(values) - 1, samples, device=values.device).round().long()]
