"""The tiled forms of :mod:`cl_core.similarity` as nodes of autograd: custom ops when compiling, plain nodes in eager.

The bodies are the loops of :mod:`cl_core._tiles`. To the compiler each is one opaque op with a backward that is an op
of its own, so that it does not look into the loops. Eager code calls the same bodies without the dispatcher: that saves
its 0.14 ms a call and, on the first one, the import of the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_core import _tiles
from cl_core._tiles import Over, Pairing

LogWeight: TypeAlias = Callable[..., Tensor]
"""``log_weight(rows, columns, *inputs)``: logarithms (R, C) of the weights of rows x columns, two index vectors."""


class TiledForm:
    """A tiled computation and its gradient.

    Args:
        forward: body; takes ``differentiable`` tensors, then ``keys`` integer tensors or None, then plain options,
            and returns a tensor or a tuple of tensors.
        backward: body called with the gradients of the results, the differentiable inputs, the results, the keys, the
            options, and which inputs need a gradient; returns one gradient an input, empty where none is needed.
        differentiable: number of differentiable inputs.
        keys: number of key tensors.
        results: for each result, a float64 vector, the input that has as many rows.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        *,
        differentiable: int,
        keys: int,
        results: tuple[int, ...] = (0,),
    ) -> None:
        name = "cl_core::" + forward.__name__.removeprefix("_")
        self._op = torch.library.custom_op(name, forward, mutates_args=())
        backward_op = torch.library.custom_op(f"{name}_backward", backward, mutates_args=())

        def fake(*arguments: Any) -> Any:
            made = tuple(arguments[i].new_empty(arguments[i].shape[0], dtype=torch.float64) for i in results)
            return made if len(results) > 1 else made[0]

        def fake_backward(*arguments: Any) -> list[Tensor]:
            given = arguments[len(results) : len(results) + differentiable]
            return [_wanted(torch.empty_like(t), n) for t, n in zip(given, arguments[-1], strict=True)]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.options = inputs[differentiable + keys :]
            ctx.save_for_backward(
                *inputs[:differentiable], *outputs, *inputs[differentiable : differentiable + keys]
            )

        def through(call: Callable[..., Any]) -> Callable[..., Any]:
            def backward_of(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
                need = list(ctx.needs_input_grad[:differentiable])
                found = call(*gradients, *ctx.saved_tensors, *ctx.options, need)
                kept = (g if n else None for g, n in zip(found, need, strict=True))
                return *kept, *[None] * (keys + len(ctx.options))

            return backward_of

        self._op.register_fake(fake)
        self._op.register_autograd(through(backward_op), setup_context=setup)
        backward_op.register_fake(fake_backward)
        backward_op.register_autograd(no_second_derivative, setup_context=_nothing_to_save)
        # autograd only follows the tensors of a tuple
        eager_backward = _node(lambda *given: tuple(backward(*given)), _nothing_to_save, no_second_derivative)
        self._eager = _node(forward, setup, through(eager_backward.apply))

        self._backward, self._backward_op = backward, backward_op

    def gradient(self, *arguments: Any) -> list[Tensor]:
        """The backward body on its own, outside autograd."""
        return (self._backward_op if torch.compiler.is_compiling() else self._backward)(*arguments)  # type: ignore[no-any-return]

    def __call__(self, *arguments: Any) -> Any:
        """Compute, as an op if the compiler is looking."""
        return (self._op if torch.compiler.is_compiling() else self._eager.apply)(*arguments)


def no_second_derivative(*_: Any) -> None:
    """Backward of a backward that has none."""
    raise RuntimeError("the tiled form has no second derivative; pass impl='dense' to differentiate twice.")


def _nothing_to_save(*_: Any, **__: Any) -> None:
    return None


def _node(forward: Callable[..., Any], setup: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    body = {
        name: staticmethod(f)
        for name, f in (("forward", forward), ("setup_context", setup), ("backward", backward))
    }
    return type(forward.__name__, (torch.autograd.Function,), body)


def _wanted(gradient: Tensor | None, need: bool) -> Tensor:
    """The gradient, or an empty tensor where none is needed: ops cannot return None."""
    if need and gradient is not None:
        return gradient
    return torch.empty(0) if gradient is None else gradient.new_empty(0)


def self_pairing(
    rows: Tensor, keys: Tensor | None, group_size: int, over: Over, *, ordered: bool = True
) -> Pairing:
    """Pairs of rows with one another; a row never meets itself."""
    ids = None
    if over == "same":
        own = torch.arange(len(rows), device=rows.device)
        ids = (own, own)
    pair, n = None if keys is None else (keys, keys), len(rows)
    return Pairing(over, n, n, keys=pair, ids=ids, group_size=group_size, ordered=ordered, device=rows.device)


def cross_pairing(
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    over: Over,
    group_size: int = 1,
    ordered: bool = True,
) -> Pairing:
    """Pairs of rows with columns."""
    keys = None if row_keys is None or column_keys is None else (row_keys, column_keys)
    ids = None if row_ids is None or column_ids is None else (row_ids, column_ids)
    options: dict[str, Any] = {"keys": keys, "ids": ids, "group_size": group_size, "ordered": ordered}
    return Pairing(over, len(rows), len(columns), device=rows.device, **options)


def _self_log_sum_exp(
    rows: Tensor, keys: Tensor | None, group_size: int, over: str, bound: float | None, tile: list[int]
) -> Tensor:
    pairing = self_pairing(rows, keys, group_size, over)  # type: ignore[arg-type]
    if _tiles.safe(rows, rows, bound):
        return _tiles.shared_forward(rows, rows, pairing, _pair(tile), symmetric=True)[0]
    return _tiles.rows_forward(rows, rows, pairing, _pair(tile))


def _self_log_sum_exp_backward(
    gradient: Tensor,
    rows: Tensor,
    log_sum: Tensor,
    keys: Tensor | None,
    group_size: int,
    over: str,
    bound: float | None,
    tile: list[int],
    need: list[bool],
) -> list[Tensor]:
    pairing = self_pairing(rows, keys, group_size, over)  # type: ignore[arg-type]
    if _tiles.safe(rows, rows, bound):
        return [
            _tiles.shared_backward(
                gradient, None, rows, rows, log_sum, None, pairing, _pair(tile), symmetric=True
            )[0]
        ]
    dx, dy = _tiles.rows_backward(gradient, rows, rows, log_sum, pairing, _pair(tile))
    assert dx is not None
    assert dy is not None
    return [dx.add_(dy)]


def _rows_log_sum_exp(
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


def _rows_log_sum_exp_backward(
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
) -> list[Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size)  # type: ignore[arg-type]
    dx, dy = _tiles.rows_backward(
        gradient, rows, columns, log_sum, pairing, _pair(tile), need_x=need[0], need_y=need[1]
    )
    return [_wanted(dx, need[0]), _wanted(dy, need[1])]


def _expected_logits(
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    over: str,
    tile: list[int],
) -> tuple[Tensor, Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, None, None, over)  # type: ignore[arg-type]
    return _tiles.expected_forward(rows, columns, pairing, _pair(tile))


def _expected_logits_backward(
    log_sum_gradient: Tensor,
    expected_gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_sum: Tensor,
    expected: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    over: str,
    tile: list[int],
    need: list[bool],
) -> list[Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, None, None, over)  # type: ignore[arg-type]
    given = (log_sum_gradient, expected_gradient, rows, columns, log_sum, expected)
    dx, dy = _tiles.expected_backward(*given, pairing, _pair(tile), need_x=need[0], need_y=need[1])
    return [_wanted(dx, need[0]), _wanted(dy, need[1])]


def _paired_log_sum_exp(
    rows: Tensor, columns: Tensor, over: str, bound: float | None, tile: list[int]
) -> tuple[Tensor, Tensor]:
    pairing = Pairing(over, len(rows), len(columns), device=rows.device)  # type: ignore[arg-type]
    if _tiles.safe(rows, columns, bound):
        return _tiles.shared_forward(rows, columns, pairing, _pair(tile))
    return (
        _tiles.rows_forward(rows, columns, pairing, _pair(tile)),
        _tiles.rows_forward(columns, rows, pairing.transposed(), _pair(tile)),
    )


def _paired_log_sum_exp_backward(
    row_gradient: Tensor,
    column_gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    row_log_sum: Tensor,
    column_log_sum: Tensor,
    over: str,
    bound: float | None,
    tile: list[int],
    need: list[bool],
) -> list[Tensor]:
    pairing = Pairing(over, len(rows), len(columns), device=rows.device)  # type: ignore[arg-type]
    log_sums = row_log_sum, column_log_sum
    if _tiles.safe(rows, columns, bound):
        found = _tiles.shared_backward(
            row_gradient, column_gradient, rows, columns, *log_sums, pairing, _pair(tile)
        )
        return [_wanted(g, n) for g, n in zip(found, need, strict=True)]
    dx, dy = _tiles.rows_backward(
        row_gradient, rows, columns, row_log_sum, pairing, _pair(tile), need_x=need[0], need_y=need[1]
    )
    more_y, more_x = _tiles.rows_backward(
        column_gradient,
        columns,
        rows,
        column_log_sum,
        pairing.transposed(),
        _pair(tile),
        need_x=need[1],
        need_y=need[0],
    )
    both = ((dx, more_x), (dy, more_y))
    return [
        one.add_(more) if one is not None and more is not None else rows.new_empty(0) for one, more in both
    ]


def _softplus_sum(
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
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over)  # type: ignore[arg-type]
    return _tiles.softplus_forward(rows, columns, offset, pairing, _pair(tile)).double()


def _softplus_sum_backward(
    gradient: Tensor,
    rows: Tensor,
    columns: Tensor,
    offset: Tensor,
    total: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    over: str,
    tile: list[int],
    need: list[bool],
) -> list[Tensor]:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, row_ids, column_ids, over)  # type: ignore[arg-type]
    found = _tiles.softplus_backward(gradient.to(rows.dtype), rows, columns, offset, pairing, _pair(tile))
    return [_wanted(g, n) for g, n in zip(found, need, strict=True)]


def _pair(tile: list[int]) -> tuple[int, int]:
    return tile[0], tile[1]


self_log_sum_exp = TiledForm(_self_log_sum_exp, _self_log_sum_exp_backward, differentiable=1, keys=1)
rows_log_sum_exp = TiledForm(_rows_log_sum_exp, _rows_log_sum_exp_backward, differentiable=2, keys=4)
expected_logits = TiledForm(
    _expected_logits, _expected_logits_backward, differentiable=2, keys=2, results=(0, 0)
)
paired_log_sum_exp = TiledForm(
    _paired_log_sum_exp, _paired_log_sum_exp_backward, differentiable=2, keys=0, results=(0, 1)
)
softplus_sum = TiledForm(_softplus_sum, _softplus_sum_backward, differentiable=3, keys=4)


def _nearest(
    rows: Tensor,
    columns: Tensor,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    group_size: int,
    over: str,
    tile: list[int],
) -> Tensor:
    pairing = cross_pairing(rows, columns, row_keys, column_keys, None, None, over, group_size, ordered=False)  # type: ignore[arg-type]
    return _tiles.nearest(rows, columns, pairing, _pair(tile))


_nearest_op = torch.library.custom_op("cl_core::nearest", _nearest, mutates_args=())
_nearest_op.register_fake(lambda rows, *_: rows.new_empty(rows.shape[0], dtype=torch.int64))


def nearest(*arguments: Any) -> Tensor:
    """The body of :func:`cl_core.similarity.nearest`, as an op if the compiler is looking."""
    return (_nearest_op if torch.compiler.is_compiling() else _nearest)(*arguments)


def index_vectors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(rows), device=rows.device), torch.arange(len(columns), device=columns.device)


class WeightedRows(torch.autograd.Function):
    """Row-wise log-sum-exp with a weight function, called tile by tile in both directions."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        log_weight: LogWeight,
        pairing: Pairing,
        tile: tuple[int, int],
        inputs: int,
        *weights: Tensor,
    ) -> Tensor:
        row_index, column_index = index_vectors(rows, columns)
        given = weights[:inputs]

        def on_tile(r0: int, r1: int, c0: int, c1: int) -> Tensor:
            return log_weight(row_index[r0:r1], column_index[c0:c1], *given)

        result = _tiles.rows_forward(rows, columns, pairing, tile, on_tile)
        ctx.log_weight, ctx.pairing, ctx.tile, ctx.inputs = log_weight, pairing, tile, inputs
        ctx.save_for_backward(rows, columns, result, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            no_second_derivative()
        rows, columns, result, *weights = ctx.saved_tensors
        row_index, column_index = index_vectors(rows, columns)
        # The inputs of the function, cut from their history: its tile graphs end here and are freed tile by tile.
        given = [w.detach().requires_grad_(w.requires_grad) for w in weights[: ctx.inputs]]
        sources = [*given, *weights[ctx.inputs :]]
        wanted = [w for w in sources if w.requires_grad]
        totals = [torch.zeros_like(w) for w in wanted]
        current: list[Tensor] = []

        def on_tile(r0: int, r1: int, c0: int, c1: int) -> Tensor:
            with torch.enable_grad():
                current[:] = [ctx.log_weight(row_index[r0:r1], column_index[c0:c1], *given)]
            return current[0].detach()

        def on_gradient(r0: int, r1: int, c0: int, c1: int, tile_gradient: Tensor) -> None:
            expanded = tile_gradient.sum_to_size(current[0].shape)
            parts = torch.autograd.grad(current[0], wanted, expanded, allow_unused=True)
            for total, part in zip(totals, parts, strict=True):
                if part is not None:
                    total.add_(part)

        need_x, need_y = ctx.needs_input_grad[:2]
        dx, dy = _tiles.rows_backward(
            gradient,
            rows,
            columns,
            result,
            ctx.pairing,
            ctx.tile,
            need_x=need_x,
            need_y=need_y,
            log_weight=on_tile,
            weight_gradient=on_gradient if wanted else None,
        )
        of_weights = iter(totals)
        return (
            dx,
            dy,
            None,
            None,
            None,
            None,
            *(next(of_weights) if w.requires_grad else None for w in sources),
        )
