"""Similarities of this rank's rows with the columns of all ranks: gathered for few ranks, around a ring for many.

Around the ring each rank holds one other block at a time, passes it on, and keeps running results; in the backward a
block travels together with its gradient and arrives home complete. Memory is a few blocks whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cl_core import _ops, _tiles, similarity
from cl_core._tiles import Over, Pairing
from cl_core._types import Impl
from cl_core.distributed import Shard

RING_FROM = 8
"""World size from which blocks travel around the ring instead of being gathered on every rank."""


def log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    split: Shard,
    *,
    each: int = 1,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    over: Over = "all",
    impl: Impl = "auto",
) -> Tensor:
    """:func:`cl_core.similarity.cross_log_sum_exp` with the columns of all ranks.

    Args:
        rows: this rank's rows, shape (N, D).
        columns: this rank's columns, shape (each * rows of the shard, D), with their keys and ids.
        split: how many rows each rank holds.
        each: columns that stand for one counted row.
        row_keys: shape (N,).
        column_keys: this rank's, one a column.
        row_ids: shape (N,).
        column_ids: this rank's, one a column.
        over: which pairs count.
        impl: "dense", "tiled" or "auto"; the ring is always tiled.
    """
    if split.group is None or split.world_size < RING_FROM:
        options = _gathered(split, each, row_keys, column_keys, row_ids, column_ids)
        return similarity.cross_log_sum_exp(
            rows, split.gather(columns, each=each), over=over, impl=impl, **options
        )
    keys = _numbers(columns, row_keys, column_keys, row_ids, column_ids)
    return _RingLogSumExp.apply(rows, columns, *keys, over, _Ring(split, each))  # type: ignore[no-any-return]


def softplus_sum(
    rows: Tensor,
    columns: Tensor,
    offset: Tensor,
    split: Shard,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    over: Over = "all",
    impl: Impl = "auto",
) -> Tensor:
    """:func:`cl_core.similarity.softplus_sum` with the columns of all ranks; arguments as in :func:`log_sum_exp`."""
    if split.group is None or split.world_size < RING_FROM:
        options = _gathered(split, 1, row_keys, column_keys, row_ids, column_ids)
        return similarity.softplus_sum(rows, split.gather(columns), offset, over=over, impl=impl, **options)
    keys = _numbers(columns, row_keys, column_keys, row_ids, column_ids)
    return _RingSoftplusSum.apply(rows, columns, offset, *keys, over, _Ring(split, 1))  # type: ignore[no-any-return]


def expected_logits(
    rows: Tensor,
    columns: Tensor,
    split: Shard,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    over: Over = "all",
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`cl_core.similarity.expected_logits` with the columns of all ranks; arguments as in :func:`log_sum_exp`."""
    if split.group is None or split.world_size < RING_FROM:
        everyone = None if column_keys is None else split.gather(column_keys)
        return similarity.expected_logits(
            rows, split.gather(columns), row_keys=row_keys, column_keys=everyone, over=over, impl=impl
        )
    numbers = _numbers(columns, row_keys, column_keys, None, None)
    return _RingExpectedLogits.apply(rows, columns, *numbers, over, _Ring(split, 1))  # type: ignore[no-any-return]


def _gathered(
    split: Shard,
    each: int,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> dict[str, Any]:
    everyone = [None if t is None else split.gather(t, each=each) for t in (column_keys, column_ids)]
    return {"row_keys": row_keys, "column_keys": everyone[0], "row_ids": row_ids, "column_ids": everyone[1]}


def _numbers(
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Row keys, row ids, and the column's key and id side by side as one tensor that travels."""
    nothing = torch.zeros(len(columns), dtype=torch.int64, device=columns.device)
    pair = [nothing if t is None else t.long() for t in (column_keys, column_ids)]
    return row_keys, row_ids, torch.stack(pair, 1)


class _Ring:
    """The neighbours of this rank and how many columns each rank's block has."""

    def __init__(self, split: Shard, each: int) -> None:
        group = split.group
        assert group is not None
        self.group, self.size, self.rank = group, split.world_size, split.rank
        self.counts = [each * count for count in split.counts]
        self._previous = dist.get_global_rank(group, (self.rank - 1) % self.size)
        self._next = dist.get_global_rank(group, (self.rank + 1) % self.size)

    def padded(self, block: Tensor) -> Tensor:
        """The block in a buffer as long as the longest one, so that all that travels has one shape."""
        buffer = block.new_zeros(max(self.counts), *block.shape[1:])
        buffer[: len(block)] = block
        return buffer

    def blocks(self, *own: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Length and contents of every rank's block, ours first; the next one arrives while this one is used."""
        held = [self.padded(t) for t in own]
        for step in range(self.size):
            arriving, requests = self.send(held) if step + 1 < self.size else (held, [])
            count = self.counts[(self.rank + step) % self.size]
            yield count, [t[:count] for t in held]
            for request in requests:
                request.wait()
            held = arriving

    def send(self, tensors: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Pass tensors to the previous rank and receive those of the next; the requests must be waited for."""
        arriving = [torch.empty_like(t) for t in tensors]
        operations = [
            operation
            for leaving, coming in zip(tensors, arriving, strict=True)
            for operation in (
                dist.P2POp(dist.isend, leaving, self._previous, self.group),
                dist.P2POp(dist.irecv, coming, self._next, self.group),
            )
        ]
        return arriving, dist.batch_isend_irecv(operations)


def _pairing(
    rows: Tensor, block: Tensor, row_keys: Tensor | None, row_ids: Tensor | None, numbers: Tensor, over: Over
) -> Pairing:
    column_keys = None if row_keys is None else numbers[:, 0].contiguous()
    column_ids = None if row_ids is None else numbers[:, 1].contiguous()
    return _ops.cross_pairing(rows, block, row_keys, column_keys, row_ids, column_ids, over, ordered=False)


class _RingLogSumExp(torch.autograd.Function):
    """Row-wise log-sum-exp over all ranks' columns, one block at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_keys: Tensor | None,
        row_ids: Tensor | None,
        numbers: Tensor,
        over: Over,
        ring: _Ring,
    ) -> Tensor:
        tile = _tiles.default_tile(rows.device)
        result = rows.new_full((len(rows),), -torch.inf, dtype=torch.float64)
        for block, pairing in _paired_blocks(ring, rows, columns, row_keys, row_ids, numbers, over):
            result = torch.logaddexp(result, _tiles.rows_forward(rows, block, pairing, tile))
        ctx.over, ctx.ring = over, ring
        ctx.save_for_backward(rows, columns, row_keys, row_ids, numbers, result)
        return result.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _ops.no_second_derivative()
        rows, columns, row_keys, row_ids, numbers, result = ctx.saved_tensors
        tile = _tiles.default_tile(rows.device)

        def of_block(block: Tensor, pairing: Pairing) -> tuple[Tensor | None, ...]:
            return _tiles.rows_backward(gradient, rows, block, result, pairing, tile)

        return *_gradients(ctx, rows, columns, row_keys, row_ids, numbers, of_block), *[None] * 5


class _RingExpectedLogits(torch.autograd.Function):
    """Row-wise log-sum-exp and mean logit over all ranks' columns, one block at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        row_keys: Tensor | None,
        row_ids: Tensor | None,
        numbers: Tensor,
        over: Over,
        ring: _Ring,
    ) -> tuple[Tensor, Tensor]:
        tile = _tiles.default_tile(rows.device)
        result = (
            rows.new_full((len(rows),), -torch.inf, dtype=torch.float64),
            rows.new_zeros(len(rows)).double(),
        )
        for block, pairing in _paired_blocks(ring, rows, columns, row_keys, row_ids, numbers, over):
            result = _tiles.joined(result, _tiles.expected_forward(rows, block, pairing, tile))
        ctx.over, ctx.ring = over, ring
        ctx.save_for_backward(rows, columns, row_keys, row_ids, numbers, *result)
        return result[0].to(rows.dtype), result[1].to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _ops.no_second_derivative()
        rows, columns, row_keys, row_ids, numbers, log_sum, expected = ctx.saved_tensors
        tile = _tiles.default_tile(rows.device)

        def of_block(block: Tensor, pairing: Pairing) -> tuple[Tensor | None, ...]:
            return _tiles.expected_backward(
                gradients[0], gradients[1], rows, block, log_sum, expected, pairing, tile
            )

        return *_gradients(ctx, rows, columns, row_keys, row_ids, numbers, of_block), *[None] * 5


class _RingSoftplusSum(torch.autograd.Function):
    """Row-wise sum of softplus over all ranks' columns, one block at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        offset: Tensor,
        row_keys: Tensor | None,
        row_ids: Tensor | None,
        numbers: Tensor,
        over: Over,
        ring: _Ring,
    ) -> Tensor:
        tile = _tiles.default_tile(rows.device)
        result = rows.new_zeros(len(rows))
        for block, pairing in _paired_blocks(ring, rows, columns, row_keys, row_ids, numbers, over):
            result += _tiles.softplus_forward(rows, block, offset, pairing, tile)
        ctx.over, ctx.ring = over, ring
        ctx.save_for_backward(rows, columns, offset, row_keys, row_ids, numbers)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _ops.no_second_derivative()
        rows, columns, offset, row_keys, row_ids, numbers = ctx.saved_tensors
        tile = _tiles.default_tile(rows.device)
        doffset = torch.zeros_like(offset)

        def of_block(block: Tensor, pairing: Pairing) -> tuple[Tensor | None, ...]:
            *of_both, of_offset = _tiles.softplus_backward(gradient, rows, block, offset, pairing, tile)
            doffset.add_(of_offset)
            return tuple(of_both)

        dx, dy = _gradients(ctx, rows, columns, row_keys, row_ids, numbers, of_block)
        return dx, dy, doffset, *[None] * 5


def _paired_blocks(
    ring: _Ring,
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    row_ids: Tensor | None,
    numbers: Tensor,
    over: Over,
) -> Iterator[tuple[Tensor, Pairing]]:
    """Every rank's columns, ours first, and which of their pairs with our rows count."""
    for _, (block, of_block) in ring.blocks(columns, numbers):
        yield block, _pairing(rows, block, row_keys, row_ids, of_block, over)


def _gradients(
    ctx: Any,
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    row_ids: Tensor | None,
    numbers: Tensor,
    of_block: Callable[[Tensor, Pairing], tuple[Tensor | None, ...]],
) -> tuple[Tensor, Tensor]:
    """Gradients of our rows and of our columns; ``of_block`` gives those of our rows and of the columns of a block.

    Every block goes around the ring with the sum of its gradients, and comes home with it.
    """
    ring, dx = ctx.ring, torch.zeros_like(rows)
    traveller = torch.zeros_like(ring.padded(columns))
    for block, pairing in _paired_blocks(ring, rows, columns, row_keys, row_ids, numbers, ctx.over):
        of_rows, of_columns = of_block(block, pairing)
        assert of_rows is not None
        assert of_columns is not None
        dx.add_(of_rows)
        traveller[: len(block)] += of_columns
        (traveller,), requests = ring.send([traveller])
        for request in requests:
            request.wait()
    return dx, traveller[: len(columns)]
