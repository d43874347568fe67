"""Batches balanced by class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks
from cl_core.samplers._base import DistributedBatchSampler, full_batches, integer_vector, resolve_ranks
from cl_core.samplers._deal import ascending, by_batch, deal, runs


class SamplesPerClassBatchSampler(DistributedBatchSampler):
    """Classes x samples: a global batch holds ``samples_per_class`` rows of each of its classes.

    Classes come equally often in an epoch (counts differ by at most one) and a class comes once in a global
    batch, all of its rows side by side on one rank. A class's rows are used up in a random order before any
    comes again; a class with fewer than ``samples_per_class`` rows repeats them within a batch, as evenly
    as it goes.

    An epoch has as many batches as the data has full ones, N // (batch_size * world_size), at least 1. So
    rows of rare classes come more than once an epoch, and of frequent classes not all.

    Args:
        labels: class of every row, shape (N,), integers.
        batch_size: rows of a batch on one rank, a multiple of ``samples_per_class``.
        samples_per_class: rows of a class in a batch.
        seed: seed of all epochs.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if a global batch needs more classes than ``labels`` holds.

    Cost: O(N log N) an epoch.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        *,
        samples_per_class: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size = resolve_ranks(rank, world_size)
        _checks.count("batch_size", batch_size)
        _checks.count("samples_per_class", samples_per_class)
        if batch_size % samples_per_class:
            raise ValueError(
                f"batch_size must be a multiple of samples_per_class {samples_per_class}, got {batch_size}."
            )
        self._rows = _RowsByClass(labels)
        self._places = batch_size // samples_per_class * world_size
        if self._places > len(self._rows.sizes):
            raise ValueError(
                f"labels must hold {self._places} classes to fill a batch of {batch_size} rows on each of "
                f"{world_size} ranks with {samples_per_class} rows a class, got {len(self._rows.sizes)}."
            )
        super().__init__(
            batch_size=batch_size,
            batches=max(1, self._rows.total // (batch_size * world_size)),
            seed=seed,
            unit=samples_per_class,
            rank=rank,
            world_size=world_size,
        )
        self.samples_per_class = samples_per_class

    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Deal the classes to the batches, then give every class its rows."""
        batches = len(self)
        units = _even_shares(batches * self._places, len(self._rows.sizes), generator)
        rows = self._rows.draw(units, self.samples_per_class, generator)
        # In the order of their numbers the same classes would be kept apart in every epoch.
        order = torch.randperm(len(units), generator=generator)
        starts = units.cumsum(0) - units
        dealt = units[order]
        unit_of = starts[order].repeat_interleave(dealt) + runs(dealt)
        batch_of = ascending(deal(dealt, batches, generator), dealt)
        return by_batch(rows[unit_of], batch_of, batches)


class ClassBalancedBatchSampler(DistributedBatchSampler):
    """Each class equally likely in every place of a batch, whatever its share of the data.

    An epoch has as many places as the data has rows. Every class gets the same number of them (to within
    one), its rows are used up in a random order before any comes again, and the places are shuffled. So
    rows of rare classes come more than once an epoch, and of frequent classes not all.

    Args:
        labels: class of every row, shape (N,), integers.
        batch_size: rows of a batch on one rank.
        drop_last: leave out the places that fill no whole global batch.
        seed: seed of all epochs.
        rank: number of this process; by default as ``torch.distributed`` says, else 0 of 1.
        world_size: number of processes; given together with ``rank``.

    Raises:
        ValueError: if ``drop_last`` leaves no batch.

    Cost: O(N log N) an epoch.
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        batch_size: int,
        *,
        drop_last: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        rank, world_size = resolve_ranks(rank, world_size)
        _checks.count("batch_size", batch_size)
        self._rows = _RowsByClass(labels)
        batches = full_batches(self._rows.total, batch_size, world_size, drop_last=drop_last)
        super().__init__(batch_size=batch_size, batches=batches, seed=seed, rank=rank, world_size=world_size)
        self.drop_last = drop_last

    def plan(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Equal shares for the classes, then one shuffle of all places."""
        places = self._rows.total
        if self.drop_last:
            places = len(self) * self.global_batch_size
        shares = _even_shares(places, len(self._rows.sizes), generator)
        line = torch.empty(places, dtype=torch.int64)
        place = ascending(torch.randperm(places, generator=generator), shares)
        line[place] = self._rows.draw(shares, 1, generator).flatten()
        return torch.split(line, self.global_batch_size)


class _RowsByClass:
    """Row numbers sorted by class, to draw from every class at once."""

    def __init__(self, labels: Tensor | Sequence[int]) -> None:
        _, self.class_of, self.sizes = torch.unique(
            integer_vector("labels", labels), return_inverse=True, return_counts=True
        )
        self.rows: Tensor = self.class_of.argsort(stable=True)
        self.total = len(self.rows)

    def draw(self, units: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """``units[c]`` sets of ``samples`` rows for every class c, class after class, shape (sum, samples).

        A class passes through its rows again and again, in a new order each time, and each pass goes on where the
        last one ended: in the middle of a set, perhaps. Such a set ends with rows other than those it began with,
        as far as there are others, so that in a class with at least ``samples`` rows no set holds a row twice.
        """
        passes = -(-units * samples // self.sizes)
        size = self.sizes.repeat_interleave(passes)  # of every pass of every class
        start = size.cumsum(0) - size
        of_pass = torch.arange(len(size)).repeat_interleave(size)
        # Sorting a shuffled list stably by pass leaves every pass where it was, in a random order.
        shuffle = torch.randperm(len(of_pass), generator=generator)
        order = runs(size)[shuffle[of_pass[shuffle].argsort(stable=True)]]
        # A pass depends on the one before only until sets and passes end together.
        in_cycle = runs(passes) % (samples // torch.gcd(self.sizes, torch.tensor(samples))).repeat_interleave(
            passes
        )
        for number in range(1, samples):
            chosen = in_cycle == number
            if not chosen.any():
                break
            _complete_sets(order, start[chosen], size[chosen], number * size[chosen], samples)
        rows = self.rows[(self.sizes.cumsum(0) - self.sizes).repeat_interleave(self.sizes * passes) + order]
        drawn = self.sizes * passes
        return rows[runs(drawn) < (units * samples).repeat_interleave(drawn)].view(-1, samples)


def _complete_sets(order: Tensor, start: Tensor, size: Tensor, before: Tensor, samples: int) -> None:
    """Move to the front of some passes, in place, rows that their first set does not hold yet.

    Args:
        order: the passes of all classes, one after another, as numbers of the class's rows.
        start: where in ``order`` the chosen passes start.
        size: their lengths.
        before: rows of the class since a set last began with a pass.
        samples: rows of a set.
    """
    begun = before % samples  # rows that the set has already
    tail = (
        begun % size
    )  # of them, those of the pass in which it began; whole passes since then rule nothing out
    held = torch.zeros(len(order), dtype=torch.bool)
    held[start.repeat_interleave(tail) + order[(start - begun).repeat_interleave(tail) + runs(tail)]] = True
    place = start.repeat_interleave(size) + runs(size)
    other = ~held[start.repeat_interleave(size) + order[place]]
    rank = other.cumsum(0)
    rank -= (rank - other.long())[size.cumsum(0) - size].repeat_interleave(size)
    first = other & (rank <= (samples - begun).repeat_interleave(size))
    key = 2 * torch.arange(len(size)).repeat_interleave(size) + ~first
    order[place] = order[place[key.argsort(stable=True)]]


def _even_shares(total: int, classes: int, generator: torch.Generator) -> Tensor:
    """``total`` split over the classes to within one; which get one more is drawn."""
    shares = torch.full((classes,), total // classes)
    shares[torch.randperm(classes, generator=generator)[: total % classes]] += 1
    return shares
