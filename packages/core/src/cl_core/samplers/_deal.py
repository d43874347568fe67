"""Dealing cards: the members of an id go to different batches, and all batches fill evenly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def deal(counts: Tensor, batches: int, generator: torch.Generator) -> Tensor:
    """Batch number for every unit, units listed id by id, so that no batch gets two units of one id.

    Units are dealt in laps: one to every batch, in an order drawn anew for each lap. An id then takes
    neighbouring places of one lap, hence different batches, unless it straddles two laps: there the second
    lap's order is rearranged so that its first places avoid the batches that the id already has.

    Args:
        counts: units of every id, each at most ``batches``.
        batches: number of batches.
        generator: source of the orders.

    Returns:
        int64 vector of length ``counts.sum()``; batch sizes differ by at most one.
    """
    total = int(counts.sum())
    laps = -(-total // batches)
    orders = torch.rand(laps, batches, generator=generator).argsort(dim=1)
    ends = counts.cumsum(0)
    starts_of_laps = torch.arange(1, laps) * batches
    straddler = torch.searchsorted(ends, starts_of_laps, right=True)
    before = (starts_of_laps - (ends - counts)[straddler]).tolist()
    after = (ends[straddler] - starts_of_laps).tolist()
    for lap, (tail, head) in enumerate(zip(before, after, strict=True), start=1):
        if tail:
            orders[lap] = _avoid(orders[lap], orders[lap - 1, -tail:], head)
    return orders.flatten()[:total]


def _avoid(order: Tensor, taken: Tensor, head: int) -> Tensor:
    """``order`` with its first ``head`` entries replaced by the first ones outside ``taken``."""
    marked = torch.zeros(len(order), dtype=torch.bool)
    marked[taken] = True
    first = order[~marked[order]][:head]
    marked.zero_()
    marked[first] = True
    return torch.cat([first, order[~marked[order]]])


def by_batch(units: Tensor, batch_of: Tensor, batches: int) -> Sequence[Tensor]:
    """Rows of every batch, given units of shape (units, rows of a unit) and the batch of every unit."""
    sizes = torch.bincount(batch_of, minlength=batches)
    rows = units[batch_of.argsort(stable=True)].flatten()
    return torch.split(rows, (sizes * units.shape[1]).tolist())


def runs(counts: Tensor) -> Tensor:
    """0, 1, ... within every run: (2, 3) gives 0 1 0 1 2."""
    starts = counts.cumsum(0) - counts
    return torch.arange(int(counts.sum())) - starts.repeat_interleave(counts)


def ascending(numbers: Tensor, counts: Tensor) -> Tensor:
    """``numbers`` >= 0 sorted within every run of ``counts`` of them."""
    above = int(numbers.max()) + 1
    run = torch.arange(len(counts)).repeat_interleave(counts)
    return (run * above + numbers).sort().values % above
