"""Rows and statistics of all ranks, differentiably: one ``group`` argument everywhere.

Every loss that takes ``group`` keeps this contract, for any split of the global batch over the ranks (uneven, or no
row at all on some):

* the mean over ranks of the returned loss is the loss of one process on the global batch;
* the gradient averaged over ranks, as ``DistributedDataParallel`` does it, is the gradient of that loss.

Each rank evaluates its own anchors against the rows of all ranks; the backward of a gather sums over the ranks.
``reduction="sum"`` therefore returns the world size times the rank's own sum, and ``"none"`` the rank's own values.

All ranks must call a loss, and with inputs that pass its checks: where one rank raises, the others wait in the exchange
until the timeout of their process group. Memories and k-means, which run between steps, are refused on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_core import _checks
from cl_core._types import Group

_DTYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
]
_REFUSED = (-1, 0, 0)  # stands for a rank without valid rows: count, width, dtype


@dataclass(frozen=True)
class Shard:
    """This rank's part of the global batch: how many rows each rank holds, and where ours start."""

    group: dist.ProcessGroup | None
    counts: tuple[int, ...]
    rank: int

    @property
    def offset(self) -> int:
        """Global index of this rank's first row."""
        return sum(self.counts[: self.rank])

    @property
    def total(self) -> int:
        """Rows of all ranks together."""
        return sum(self.counts)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.counts)

    def gather(self, rows: Tensor, *, each: int = 1) -> Tensor:
        """Rows of all ranks in rank order; differentiable.

        Args:
            rows: shape (each * N_rank, ...).
            each: rows that stand for one counted row (the views of a sample).

        Returns:
            Shape (each * total, ...).
        """
        if self.group is None:
            return rows
        counts = tuple(each * count for count in self.counts)
        return _AllGather.apply(rows, self.group, counts, self.rank)  # type: ignore[no-any-return]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks of equally shaped tensors; differentiable."""
        return value if self.group is None else _AllReduceSum.apply(value, self.group)


def resolve(group: Group) -> dist.ProcessGroup | None:
    """The process group meant, or None if this process is on its own.

    Raises:
        ValueError: if a group is asked for before ``torch.distributed`` is initialised, or is of another type.
    """
    if group is None:
        return None
    _checks.group(group)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"group={group!r} needs torch.distributed to be initialised first (init_process_group); pass group=None "
            "for a loss over this process alone."
        )
    found = dist.group.WORLD if group == "world" else group
    if not isinstance(found, dist.ProcessGroup):
        raise ValueError(
            f"group must be None, 'world' or a process group of this rank, got {type(group).__name__}."
        )
    return found if dist.get_world_size(found) > 1 else None


def shard(rows: Tensor, group: Group, *, at_least: int = 1) -> Shard:
    """Exchange how many rows each rank holds.

    Args:
        rows: this rank's rows, shape (N_rank, ...), N_rank >= 0.
        group: None, "world" or a process group.
        at_least: rows that all ranks must have together.

    Raises:
        ValueError: on all ranks, if they hold too few rows together, their widths or dtypes differ, or a rank
            left by an error inside :func:`refusing_together`.
    """
    found = resolve(group)
    if found is None:
        result = Shard(None, (rows.shape[0],), 0)
    else:
        # Width and dtype go along, so that all ranks refuse a mismatch that would break the exchange of the rows.
        width = rows.shape[1] if rows.ndim > 1 else 1
        own = (rows.shape[0], width, _DTYPES.index(rows.dtype))
        counts, widths, dtypes = _exchange(found, own, rows.device)
        if _REFUSED[0] in counts:
            ranks = [rank for rank, count in enumerate(counts) if count == _REFUSED[0]]
            raise ValueError(
                f"all ranks must have valid arguments, got others on ranks {ranks}: see the errors there."
            )
        if len(set(widths)) > 1 or len(set(dtypes)) > 1:
            names = [str(_DTYPES[index]).removeprefix("torch.") for index in dtypes]
            raise ValueError(
                f"rows must have one width and dtype on all ranks, got {list(zip(widths, names, strict=True))}."
            )
        result = Shard(found, tuple(counts), dist.get_rank(found))
    if result.total < at_least:
        raise ValueError("the batch must have at least 1 row on some rank, got none on any.")
    return result


@contextmanager
def refusing_together(group: Group, device: torch.device) -> Iterator[None]:
    """Around the checks that come before :func:`shard`: there the other ranks learn that this one has refused."""
    try:
        yield
    except (TypeError, ValueError):
        found = resolve(group)
        if found is not None:
            _exchange(found, _REFUSED, device)
        raise


def unbroadcast_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that need no broadcast, as they are equal on all ranks without it or are meant to differ.

    ``DistributedDataParallel`` sends all buffers of rank 0 to the others before every forward: right for running
    statistics, a waste for memories that their ``group`` keeps equal (34 MB a step for a queue of 65,536 x 128), wrong
    for memories without one. A module names such buffers of its own in an attribute ``unbroadcast``, as all of
    :mod:`cl_core.memory` do.

    :mod:`cl_core.training` takes them out. In a loop of your own, before wrapping ``module``, this does:

        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, unbroadcast_buffers(module))

    They are then left alone from the start, so all ranks have to seed alike what they fill them with.

    Args:
        module: whatever holds them, at any depth.

    Returns:
        Their names, as of ``module.named_buffers()``.
    """
    return [
        f"{prefix}.{name}".removeprefix(".")
        for prefix, part in module.named_modules()
        for name in getattr(part, "unbroadcast", ())
    ]


def _exchange(group: dist.ProcessGroup, own: Sequence[int], device: torch.device) -> list[list[int]]:
    """A few integers of every rank, those of one kind together."""
    sent = torch.tensor(own, device=device)
    gathered = sent.new_empty(len(own) * dist.get_world_size(group))
    dist.all_gather_into_tensor(gathered, sent, group=group)
    return gathered.view(-1, len(own)).t().tolist()


class _AllGather(torch.autograd.Function):
    """Uneven all-gather along the first dimension, by padding to the largest count; its backward sums over ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: dist.ProcessGroup, counts: tuple[int, ...], rank: int
    ) -> Tensor:
        ctx.group, ctx.counts, ctx.rank = group, counts, rank
        largest, rest = max(counts), rows.shape[1:]
        padded = rows.contiguous()
        if len(rows) < largest:
            padded = torch.cat([padded, rows.new_zeros(largest - len(rows), *rest)])
        gathered = rows.new_empty(len(counts) * largest, *rest)
        dist.all_gather_into_tensor(gathered, padded, group=group)
        if min(counts) == largest:
            return gathered
        blocks = gathered.view(len(counts), largest, *rest)
        return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        counts, rank, largest = ctx.counts, ctx.rank, max(ctx.counts)
        gradient = gradient.contiguous()
        if min(counts) != largest:
            blocks = gradient.new_zeros(len(counts), largest, *gradient.shape[1:])
            for block, part in zip(blocks, gradient.split(list(counts)), strict=True):
                block[: len(part)] = part
            gradient = blocks.flatten(0, 1)
        own = gradient.new_empty(largest, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient, group=ctx.group)
        return own[: counts[rank]], None, None, None


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Each rank's loss depends on every rank's term, so the backward sums over ranks as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
