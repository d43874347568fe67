"""The contract of a data set: what to train on, what to evaluate on, how items become a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cl_core import _checks
from cl_core.evaluation import LinearProbe

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Data(ABC):
    """Base of every data set that the commands can train on.

    The order of the batches is drawn from (seed, epoch) and the augmentations from (seed, epoch, index),
    never from a worker process, so that a run can be continued in the middle of an epoch. Therefore the seed
    is set once, by :meth:`set_seed`, before :meth:`train_dataset` is asked for, and a training data set that
    has ``set_epoch(epoch)`` is told each epoch before its first batch.

    Args:
        batch_size: items a training batch, on each process.
        num_workers: loader processes; 0 loads in the main one.

    Attributes:
        passes_per_epoch: times that an epoch goes over the items. More than one where a pass is a step or two, so that
            what is measured and shown once an epoch does not cost more than the training.
    """

    passes_per_epoch: int = 1

    def __init__(self, *, batch_size: int = 256, num_workers: int = 0) -> None:
        _checks.count("batch_size", batch_size)
        _checks.count("num_workers", num_workers, at_least=0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = 0

    def set_seed(self, seed: int) -> None:
        """Set the seed of the run, from which order and augmentations derive."""
        self.seed = seed

    @abstractmethod
    def train_dataset(self) -> Dataset[Any]:
        """Map-style data set whose collated items are what ``Method.loss`` takes."""

    @abstractmethod
    def evaluation_dataset(self, split: Split) -> Dataset[Any]:
        """Map-style data set of ``(input, label)``, not augmented; ``Method.embed`` takes the inputs."""

    def collate(self, items: list[Any]) -> Any:
        """Make a training batch of items; torch's default."""
        return default_collate(items)

    def collate_evaluation(self, items: list[Any]) -> Any:
        """Make ``(inputs, labels)`` of the items of an evaluation data set; torch's default."""
        return default_collate(items)

    def evaluation_batch_size(self, asked: int) -> int:
        """Inputs embedded at a time where ``asked`` are asked for: more where they are embedded together anyway."""
        return asked

    def raw(self, inputs: Any) -> Tensor | None:
        """Evaluation inputs as rows of numbers (N, D), the baseline of every encoder; None where there are none."""
        return inputs.flatten(1) if isinstance(inputs, Tensor) else None

    def scores(
        self,
        probe: LinearProbe,
        *,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
    ) -> dict[str, float]:
        """Scores that matter to these data beside the accuracies, by the names of ``evaluating.SCORES``; none here.

        Args:
            probe: fitted on ``train``, its penalty chosen on ``validation``.
            train: embeddings (N, D) and labels (N,), all with a label.
            validation: likewise.
            test: likewise, those that judge.
        """
        return {}

    def row_names(self, split: Split) -> Sequence[str] | None:
        """What each row of an evaluation data set is called, such as its file; None if rows have no names."""
        return None

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None where there are no labels."""
        return None

    @property
    def class_names(self) -> Sequence[str] | None:
        """Name of each class in the order of the labels, or None."""
        return None
