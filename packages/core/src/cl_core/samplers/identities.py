"""Batches in which an id, or a patient, comes once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.samplers._base import DistributedBatchSampler, integer_vector, resolve_ranks
from cl_core.samplers._deal import by_batch, deal, runs


class GroupAwareBatchSampler(DistributedBatchSampler):
    """No two rows of one group (a patient, a user, a video) in a global batch, except as a pair.

    In-batch negatives are then never rows of the anchor's own group. With ``rows_per_group=1`` a positive
    is made from the row itself (two views of it). With ``rows_per_group=2`` two different rows of the group
    form the positive pair: they stand side by side on one rank, so ``z[0::2], z[1::2]`` are the two views.

    Every epoch pairs up and orders the rows anew. Rows that cannot be placed wait for another epoch, a random
    choice each time: those left over when a group's rows are cut into sets of ``rows_per_group`` (a group
    smaller than that never appears) and, with ``drop_last=True``, those of a group with more sets than
    there are full batches.

    Args:
        groups: group of every row, shape (N,), integers.
        batch_size: rows of a batch on one rank, a multiple of ``rows_per_group``.
        rows_per_group: rows of a group in a batch, if it is in the batch at all.
        drop_last: make full batches only, as many as the group sizes allow. Otherwise every set is placed:
            there are at least as many batches as the largest group has sets, their sizes differ by at most
            one set, and where groups are few or uneven they are smaller than ``batch_size``, down to an
            empty list on a rank.
        seed: seed of all epochs.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if no group is large enough, or ``drop_last`` leaves no batch.

    Cost: O(N log N) an epoch.
    """

    _argument = "groups"  # what the errors call the first argument

    def __init__(
        self,
        groups: Tensor | Sequence[int],
        batch_size: int,
        *,
        rows_per_group: int = 1,
        drop_last: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size = resolve_ranks(rank, world_size)
        _checks.count("batch_size", batch_size)
        _checks.count("rows_per_group", rows_per_group)
        if batch_size % rows_per_group:
            raise ValueError(
                f"batch_size must be a multiple of rows_per_group {rows_per_group}, got {batch_size}."
            )
        name = self._argument
        _, self._id, sizes = torch.unique(
            integer_vector(name, groups), return_inverse=True, return_counts=True
        )
        self._sets = sizes // rows_per_group  # sets of rows that each group can give
        if not self._sets.any():
            raise ValueError(
                f"{name} must have at least {rows_per_group} rows of some value, got at most {sizes.max()}."
            )
        places = batch_size // rows_per_group * world_size
        if drop_last:
            batches = _full_batches_apart(self._sets, places)
            if batches == 0:
                raise ValueError(
                    f"{name} must have {places} different values to fill a batch of {batch_size} rows on "
                    f"each of {world_size} ranks, got {int((self._sets > 0).sum())}; "
                    "lower batch_size or pass drop_last=False."
                )
            self._placed = batches * places
        else:
            self._placed = int(self._sets.sum())
            batches = max(-(-self._placed // places), int(self._sets.max()))
        super().__init__(
            batch_size=batch_size,
            batches=batches,
            seed=seed,
            unit=rows_per_group,
            rank=rank,
            world_size=world_size,
        )
        self.rows_per_group = rows_per_group
        self.drop_last = drop_last

    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Shuffle ids and rows, cut the rows of an id into sets, deal the sets to the batches."""
        unit, batches = self.rows_per_group, len(self)
        shuffled_ids = torch.randperm(len(self._sets), generator=generator)
        sets = self._sets[shuffled_ids]
        place_of_id = torch.empty_like(shuffled_ids)
        place_of_id[shuffled_ids] = torch.arange(len(shuffled_ids))
        rows = torch.randperm(len(self._id), generator=generator)
        rows = rows[place_of_id[self._id[rows]].argsort(stable=True)]
        sizes = torch.bincount(place_of_id[self._id])
        whole = runs(sizes) < (sets * unit).repeat_interleave(sizes)
        units = rows[whole].view(-1, unit)

        keep = runs(sets) < batches
        surplus = int(keep.sum()) - self._placed
        if surplus > 0:
            candidates = keep.nonzero().flatten()
            keep[candidates[torch.randperm(len(candidates), generator=generator)[:surplus]]] = False
        owner = torch.arange(len(sets)).repeat_interleave(sets)
        kept = torch.bincount(owner[keep], minlength=len(sets))
        return by_batch(units[keep], deal(kept, batches, generator), batches)


class UniqueIdBatchSampler(GroupAwareBatchSampler):
    """No two rows of equal id in one global batch.

    For data in which one item comes several times (captions of an image, texts that repeat): two rows of an
    id would be each other's false negatives.

    Args:
        ids: id of every row, shape (N,), integers.
        batch_size: rows of a batch on one rank.
        drop_last: make full batches only, as many as the repetitions allow; rows of an id that comes more
            often than that wait for another epoch, a random choice each time. Otherwise every row comes
            once an epoch: there are at least as many batches as the most frequent id has rows, and sizes
            differ by at most one.
        seed: seed of all epochs.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if ``drop_last`` leaves no batch.

    Cost: O(N log N) an epoch.
    """

    _argument = "ids"

    def __init__(
        self,
        ids: Tensor | Sequence[int],
        batch_size: int,
        *,
        drop_last: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(ids, batch_size, drop_last=drop_last, seed=seed, rank=rank, world_size=world_size)


def _full_batches_apart(sets: Tensor, places: int) -> int:
    """Most batches of ``places`` different ids each: the largest B with sum min(sets, B) >= B * places."""
    low, high = 0, int(sets.sum()) // places
    while low < high:
        middle = (low + high + 1) // 2
        if int(sets.clamp(max=middle).sum()) >= middle * places:
            low = middle
        else:
            high = middle - 1
    return low
