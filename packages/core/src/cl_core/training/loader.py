"""The loader of training batches, which knows how many of them were used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from cl_core.samplers import EpochBatchSampler
from cl_core.training.data import Data


class TrainLoader:
    """Training batches of a :class:`Data`, epoch by epoch, resumable after any batch.

    A torch loader with workers draws batches ahead of their use, so its sampler runs ahead of the training.
    This one counts the batches it has handed out, and its state is that count.

    Args:
        data: what to load; its seed orders the batches.
        drop_last: leave out the rows that fill no whole batch.
        pin_memory: copy batches to page-locked memory, for an accelerator.
    """

    def __init__(self, data: Data, *, drop_last: bool = True, pin_memory: bool = False) -> None:
        self.dataset: Dataset[Any] = data.train_dataset()
        size = len(self.dataset)  # type: ignore[arg-type]
        if size == 0:
            raise ValueError(f"{type(data).__name__} has no training items.")
        # A data set smaller than a batch is one smaller batch, on one process as on many.
        self.sampler = EpochBatchSampler(
            size,
            data.batch_size,
            drop_last=drop_last and size >= data.batch_size * _world_size(),
            seed=data.seed,
            passes=data.passes_per_epoch,
        )
        self._batch_size = data.batch_size
        collate: Callable[[list[Any]], Any] = data.collate
        self._options: dict[str, Any] = {
            "collate_fn": collate,
            "num_workers": data.num_workers,
            "pin_memory": pin_memory,
            # Of its own, because a loader without one draws from the global state at every epoch.
            "generator": torch.Generator().manual_seed(data.seed),
        }
        self._loader: DataLoader[Any] = DataLoader(self.dataset, batch_sampler=self.sampler, **self._options)
        self.epoch = 0
        self._used = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentations of the next iteration."""
        if epoch != self.epoch:
            self._used = 0
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def in_order(self, rank: int, world_size: int) -> DataLoader[Any]:
        """Loader of all items in their order, as they are in this epoch; of several ranks, of every so-many-th."""
        items = range(rank, len(self.dataset), world_size)  # type: ignore[arg-type]
        return DataLoader(Subset(self.dataset, items), self._batch_size, **self._options)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # The body runs at the first batch, when the epoch has been set.
        if self._used >= len(self.sampler):
            self._used = 0
        self.sampler.set_epoch(self.epoch)
        self.sampler.start_batch = self._used
        for batch in self._loader:
            self._used += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and how many of its batches were handed out."""
        return {"epoch": self.epoch, "used": self._used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the batches that were handed out, in a loader of the same data."""
        self.set_epoch(state["epoch"])
        self._used = state["used"]


def _world_size() -> int:
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1
