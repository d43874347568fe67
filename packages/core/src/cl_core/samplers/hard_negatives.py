"""Batches built around nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.samplers._base import DistributedBatchSampler, full_batches, integer_vector, resolve_ranks

_ROUNDS = 8  # each leaves a part of the free rows, about a third where neighbours are well spread


class HardNegativeBatchSampler(DistributedBatchSampler):
    """Each row once an epoch, next to its nearest neighbours as far as they are still free.

    Randomly drawn rows become leaders; each takes those of its neighbours that are no leader and that no
    earlier leader took. What remains is treated likewise, a few times; the last rows stand alone. The
    clusters are shuffled, laid end to end and cut into batches, so a batch holds whole neighbourhoods (and
    a cut one at each end). The wider the index, the harder the batch: pass ``neighbours[:, :4]`` for
    clusters of at most five.

    A state resumes exactly only with the index it was taken with; :meth:`set_neighbours` changes it between
    epochs.

    Args:
        neighbours: row numbers of the nearest neighbours of every row, shape (N, k), nearest first; -1
            stands for none, and a row's own number is passed over.
        batch_size: rows of a batch on one rank.
        labels: class or id of every row, shape (N,); a neighbour of the same one is passed over, being no
            negative.
        drop_last: leave out the rows that fill no whole global batch; otherwise the last one may be uneven,
            down to an empty list on a rank.
        seed: seed of all epochs.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if a neighbour is no row number, or ``drop_last`` leaves no batch.

    Cost: O(N k + N log N) an epoch.
    """

    def __init__(
        self,
        neighbours: Tensor,
        batch_size: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        drop_last: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size = resolve_ranks(rank, world_size)
        _checks.count("batch_size", batch_size)
        self._neighbours = _neighbour_table(neighbours)
        size = len(self._neighbours)
        self._labels = None
        if labels is not None:
            self._labels = integer_vector("labels", labels)
            _checks.labels("labels", self._labels, rows=size, of="neighbours", device=self._neighbours.device)
        batches = full_batches(size, batch_size, world_size, drop_last=drop_last)
        super().__init__(batch_size=batch_size, batches=batches, seed=seed, rank=rank, world_size=world_size)
        self.drop_last = drop_last

    def set_neighbours(self, neighbours: Tensor) -> None:
        """Use another index of as many rows from the next iteration on, such as one of fresher embeddings."""
        table = _neighbour_table(neighbours)
        if len(table) != len(self._neighbours):
            raise ValueError(
                f"neighbours must have {len(self._neighbours)} rows as before, got {len(table)}."
            )
        self._neighbours = table

    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Gather clusters in rounds, shuffle them, cut the line of rows into batches."""
        size, width = self._neighbours.shape
        cluster = torch.full((size,), -1)  # of every row, -1 while it is free
        clusters = 0
        remaining = torch.randperm(size, generator=generator)
        for _ in range(_ROUNDS):
            leaders = remaining[: -(-len(remaining) // (width + 1))]
            cluster[leaders] = torch.arange(clusters, clusters + len(leaders))
            self._claim(leaders, cluster, clusters)
            clusters += len(leaders)
            remaining = remaining[cluster[remaining] < 0]
            if len(remaining) == 0:
                break
        cluster[remaining] = torch.arange(clusters, clusters + len(remaining))
        place = torch.randperm(clusters + len(remaining), generator=generator)
        line = place[cluster].argsort(stable=True)
        return torch.split(line, self.global_batch_size)[: len(self)]

    def _claim(self, leaders: Tensor, cluster: Tensor, first: int) -> None:
        """Give free neighbours of the leaders to the earliest leader that names them."""
        wanted = self._neighbours[leaders]
        free = (wanted >= 0) & (cluster[wanted] < 0)
        if self._labels is not None:
            free &= self._labels[wanted] != self._labels[leaders, None]
        claimed = wanted[free]
        by = torch.arange(first, first + len(leaders))[:, None].expand_as(wanted)[free]
        cluster[claimed] = len(cluster)
        cluster.scatter_reduce_(0, claimed, by, "amin")


def _neighbour_table(neighbours: Tensor) -> Tensor:
    if not isinstance(neighbours, Tensor):
        raise TypeError(f"neighbours must be a tensor of shape (N, k), got {type(neighbours).__name__}.")
    if neighbours.ndim != 2 or 0 in neighbours.shape:
        raise ValueError(f"neighbours must have shape (N, k) with N, k >= 1, got {tuple(neighbours.shape)}.")
    if neighbours.is_floating_point() or neighbours.is_complex() or neighbours.dtype == torch.bool:
        raise TypeError(f"neighbours must hold integers, got {neighbours.dtype}.")
    low, high = int(neighbours.min()), int(neighbours.max())
    if low < -1 or high >= len(neighbours):
        raise ValueError(
            f"neighbours must hold row numbers from 0 to {len(neighbours) - 1} or -1, got {low} to {high}."
        )
    return neighbours.detach().to("cpu", torch.int64)
