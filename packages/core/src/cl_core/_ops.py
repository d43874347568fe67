"""The tiled forms of :mod:`cl_core.similarity` as torch custom ops: one opaque node for autograd and the compiler.

The bodies are the loops of :mod:`cl_core._tiles`; here stand their registrations: what they return (fake), what they
save, and their backward, which is an op of its own so that the compiler does not look into its loops either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_core import _tiles
from cl_core._tiles import Over, Pairing


def self_pairing(
    rows: Tensor, keys: Tensor | None, group_size: int, over: Over, *, ordered: bool = True
) -> Pairing:
    ids = None
    if over == "same":
        own = torch.arange(len(rows), device=rows.device)
        ids = (own, own)
    pair = None if keys is None else (keys, keys)
    n = len(rows)
    return Pairing(over, n, n, keys=pair, ids=ids, group_size=group_size, ordered=ordered, device=rows.device)


def cross_pairing(
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    over: Over,
    group_size: int,
    ordered: bool = True,
) -> Pairing:
    keys = None if row_keys is None or column_keys is None else (row_keys, column_keys)
    ids = None if row_ids is None or column_ids is None else (row_ids, column_ids)
    return Pairing(
        over,
        len(rows),
        len(columns),
        keys=keys,
        ids=ids,
        group_size=group_size,
        ordered=ordered,
        device=rows.device,
    )


@torch.library.custom_op("cl_core::self_log_sum_exp", mutates_args=())
def self_log_sum_exp(
    rows: Tensor, keys: Tensor | None, group_size: int, over: str, bound: float | None, tile: list[int]
) -> Tensor:
    pairing = self_pairing(rows, keys, group_size, over)  # type: ignore[arg-type]
    if _tiles.safe(rows, rows, bound):
        return _tiles.shared_forward(rows, rows, pairing, _pair(tile))[0]
    return _tiles.rows_forward(rows, rows, pairing, _pair(tile))


@torch.library.custom_op("cl_core::self_log_sum_exp_backward", mutates_args=())
def self_log_sum_exp_backward(
    gradient: Tensor,
    rows: Tensor,
    log_sum: Tensor,
    keys: Tensor | None,
    group_size: int,
    over: str,
    bound: float | None,
    tile: list[int],
) -> Tensor:
    pairing = self_pairing(rows, keys, group_size, over)  # type: ignore[arg-type]
    if _tiles.safe(rows, rows, bound):
        return _tiles.shared_backward(gradient, None, rows, rows, log_sum, None, pairing, _pair(tile))[0]
    dx, dy = _tiles.rows_backward(gradient, rows, rows, log_sum, pairing, _pair(tile))
    assert dx is not None
    assert dy is not None
    return dx.add_(dy)


@self_log_sum_exp.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0])


@self_log_sum_exp_backward.register_fake
def _(gradient: Tensor, rows: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(rows)


def _self_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, keys, *ctx.options = inputs
    ctx.save_for_backward(rows, output, keys)


def _self_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows, log_sum, keys = ctx.saved_tensors
    return self_log_sum_exp_backward(gradient, rows, log_sum, keys, *ctx.options), *[None] * 5


@torch.library.custom_op("cl_core::rows_log_sum_exp", mutates_args=())
def rows_log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    group_size: int,
    over: str,
    tile: list[int],
) -> Tensor:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size)  # type: ignore[arg-type]
    return _tiles.rows_forward(rows, columns, pairing, _pair(tile))


@torch.library.custom_op("cl_core::rows_log_sum_exp_backward", mutates_args=())
def rows_log_sum_exp_backward(
    gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_sum: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    group_size: int,
    over: str,
    tile: list[int],
    need: list[bool],
) -> tuple[Tensor, Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size)  # type: ignore[arg-type]
    dx, dy = _tiles.rows_backward(
        gradient, rows, columns, log_sum, pairing, _pair(tile), need_x=need[0], need_y=need[1]
    )
    return _or_empty(dx, rows), _or_empty(dy, columns)


@rows_log_sum_exp.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0])


@rows_log_sum_exp_backward.register_fake
def _(gradient: Tensor, rows: Tensor, columns: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need = rest[-1]
    return tuple(
        torch.empty_like(t) if n else t.new_empty(0) for t, n in zip((rows, columns), need, strict=True)
    )  # type: ignore[return-value]


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.group_size, ctx.over, ctx.tile = inputs
    ctx.save_for_backward(*tensors[:2], output, *tensors[2:])


def _rows_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:2])
    dx, dy = rows_log_sum_exp_backward(gradient, *ctx.saved_tensors, ctx.group_size, ctx.over, ctx.tile, need)
    return dx if need[0] else None, dy if need[1] else None, *[None] * 7


@torch.library.custom_op("cl_core::paired_log_sum_exp", mutates_args=())
def paired_log_sum_exp(
    rows: Tensor, columns: Tensor, over: str, bound: float | None, tile: list[int]
) -> tuple[Tensor, Tensor]:
    pairing = Pairing(over, len(rows), len(columns), device=rows.device)  # type: ignore[arg-type]
    if _tiles.safe(rows, columns, bound):
        return _tiles.shared_forward(rows, columns, pairing, _pair(tile))
    return (
        _tiles.rows_forward(rows, columns, pairing, _pair(tile)),
        _tiles.rows_forward(columns, rows, pairing.transposed(), _pair(tile)),
    )


@torch.library.custom_op("cl_core::paired_log_sum_exp_backward", mutates_args=())
def paired_log_sum_exp_backward(
    row_gradient: Tensor,
    column_gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_log_sum: Tensor,
    column_log_sum: Tensor,
    over: str,
    bound: float | None,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    pairing = Pairing(over, len(rows), len(columns), device=rows.device)  # type: ignore[arg-type]
    if _tiles.safe(rows, columns, bound):
        return _tiles.shared_backward(
            row_gradient, column_gradient, rows, columns, row_log_sum, column_log_sum, pairing, _pair(tile)
        )
    dx, dy = _tiles.rows_backward(row_gradient, rows, columns, row_log_sum, pairing, _pair(tile))
    swapped = _tiles.rows_backward(
        column_gradient, columns, rows, column_log_sum, pairing.transposed(), _pair(tile)
    )
    return dx + swapped[1], dy + swapped[0]  # type: ignore[operator]


@paired_log_sum_exp.register_fake
def _(rows: Tensor, columns: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), columns.new_empty(columns.shape[0])


@paired_log_sum_exp_backward.register_fake
def _(
    row_gradient: Tensor, column_gradient: Tensor, rows: Tensor, columns: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(columns)


def _paired_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, columns, *ctx.options = inputs
    ctx.save_for_backward(rows, columns, *output)


def _paired_backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *paired_log_sum_exp_backward(row_gradient, column_gradient, *ctx.saved_tensors, *ctx.options),
        None,
        None,
        None,
    )


@torch.library.custom_op("cl_core::softplus_sum", mutates_args=())
def softplus_sum(
    rows: Tensor,
    columns: Tensor,
    offset: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    over: str,
    tile: list[int],
) -> Tensor:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over, 1)  # type: ignore[arg-type]
    return _tiles.softplus_forward(rows, columns, offset, pairing, _pair(tile))


@torch.library.custom_op("cl_core::softplus_sum_backward", mutates_args=())
def softplus_sum_backward(
    gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    offset: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    over: str,
    tile: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over, 1)  # type: ignore[arg-type]
    return _tiles.softplus_backward(gradient, rows, columns, offset, pairing, _pair(tile))


@softplus_sum.register_fake
def _(rows: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0])


@softplus_sum_backward.register_fake
def _(gradient: Tensor, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t) for t in tensors[:3])  # type: ignore[return-value]


def _softplus_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.over, ctx.tile = inputs
    ctx.save_for_backward(*tensors)


def _softplus_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *softplus_sum_backward(gradient, *ctx.saved_tensors, ctx.over, ctx.tile), *[None] * 6


def no_second_derivative(*_: Any) -> None:
    raise RuntimeError("the tiled form has no second derivative; pass impl='dense' to differentiate twice.")


def _nothing(*_: Any, **__: Any) -> None: ...


for _op, _setup, _backward in (
    (self_log_sum_exp, _self_setup, _self_backward),
    (rows_log_sum_exp, _rows_setup, _rows_backward),
    (paired_log_sum_exp, _paired_setup, _paired_backward),
    (softplus_sum, _softplus_setup, _softplus_backward),
):
    _op.register_autograd(_backward, setup_context=_setup)
for _op in (
    self_log_sum_exp_backward,
    rows_log_sum_exp_backward,
    paired_log_sum_exp_backward,
    softplus_sum_backward,
):
    _op.register_autograd(no_second_derivative, setup_context=_nothing)


def _pair(tile: list[int]) -> tuple[int, int]:
    return tile[0], tile[1]


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if gradient is None else gradient
