"""Every row once an epoch, or several times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.samplers._base import DistributedBatchSampler, full_batches, resolve_ranks


class EpochBatchSampler(DistributedBatchSampler):
    """Each row once a pass, of which an epoch is one or several, in an order drawn from (seed, epoch).

    Args:
        size: number of rows of the data set.
        batch_size: rows of a batch on one rank.
        shuffle: draw a new order every epoch; otherwise rows come in their own order.
        drop_last: leave out the rows that fill no whole global batch. Otherwise the last global batch is
            shared as evenly as it goes, down to an empty list on some ranks; all ranks get as many batches.
        seed: seed of all epochs.
        passes: times that an epoch goes over the rows, each time in another order.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if ``drop_last`` leaves no batch.

    Cost: O(passes size) an epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = True,
        seed: int = 0,
        passes: int = 1,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        _checks.count("size", size)
        _checks.count("passes", passes)
        _checks.count("batch_size", batch_size)
        rank, world_size = resolve_ranks(rank, world_size)
        batches = passes * full_batches(size, batch_size, world_size, drop_last=drop_last)
        super().__init__(batch_size=batch_size, batches=batches, seed=seed, rank=rank, world_size=world_size)
        self.size = size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.passes = passes

    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Consecutive pieces of one permutation a pass."""
        return [piece for _ in range(self.passes) for piece in self._pass(generator)]

    def _pass(self, generator: torch.Generator) -> Sequence[Tensor]:
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        return torch.split(order, self.global_batch_size)[: len(self) // self.passes]
