r"""The primitive under every loss: streaming log-sum-exp of similarities.

:func:`self_log_sum_exp` compares one set of rows with itself, :func:`cross_log_sum_exp` two sets. Three forms behind
``impl``:

* ``"dense"``: the similarity matrix exists; differentiable twice;
* ``"tiled"``: no N x N tensor ever, in neither direction: tiles are recomputed in the backward;
* ``"auto"``: dense while the matrix is small, tiled beyond.

Rows enter as logits want them: :func:`scaled_rows` makes unit length and folds the temperature in, so that ordinary
autograd carries the gradients of normalisation and temperature. The tiled forms are torch custom ops
(``torch.compile`` with ``fullgraph=True`` sees one node); with a Python weight function they are eager only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from cl_core import _checks, _ops, _tiles
from cl_core._tiles import Over, Pairing
from cl_core._types import Impl

LogWeight: TypeAlias = Callable[..., Tensor]
"""``log_weight(rows, columns, *inputs)``: the (R, C) logarithms of the weights of pairs rows x columns, two index vectors."""

# Up to this many entries the matrix is kept: faster, second derivatives, and no more than 16 MB in float32.
_DENSE_ENTRIES = 2048 * 2048
_EPS = 1e-12


def scaled_rows(z: Tensor, *, scale: float | Tensor = 1.0, normalize: bool = True) -> Tensor:
    """Rows of unit length times a scale, in at least float32.

        u_i = scale_i z_i / max(|z_i|, 1e-12)

    A zero row stays zero. Rows of any finite norm are safe from overflow. To divide logits by a temperature T, give
    both sides ``scale=T ** -0.5`` (one set of rows), or one side ``1 / T``, which may be a vector, one T a row.

    Args:
        z: rows, shape (N, D).
        scale: a number, a 0-d tensor or a tensor of shape (N,); tensors receive a gradient.
        normalize: scale to unit length first.

    Returns:
        Shape (N, D), float32 (float64 for float64 input).

    Cost: O(N D).
    """
    z = at_least_float32(z)
    factor = scale if not isinstance(scale, Tensor) else 1.0
    if normalize:
        z = _plain_unit_rows(z, factor) if torch.compiler.is_compiling() else _UnitRows.apply(z, factor)  # type: ignore[no-untyped-call]
    elif factor != 1.0:
        z = z * factor
    if isinstance(scale, Tensor):
        z = z * (scale[:, None] if scale.ndim else scale)
    return z


def self_log_sum_exp(
    rows: Tensor,
    *,
    keys: Tensor | None = None,
    group_size: int = 1,
    over: Over = "different",
    bound: float | None = None,
    impl: Impl = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    r"""Row-wise log-sum-exp of the similarities of rows with one another.

        l_i = log sum_{j != i, j counts for i} exp(rows_i . rows_j)

    Args:
        rows: shape (N, D), float32 or float64; the logits are their plain dot products.
        keys: integers of shape (N,) in any order; None gives row i the key ``i // group_size``.
        group_size: rows that share a key when ``keys`` is None; 1 excludes the row itself only.
        over: "different" sums over rows of another key, "same" over the other rows of the same key.
        bound: an upper bound of the absolute logits if known; otherwise measured on CPU, and on accelerators running
            maxima are used.
        impl: "dense", "tiled" or "auto".
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shape (N,); -inf where nothing counts (with zero gradient).

    Cost: O(N^2 D) time: half of the matrix forward, the same half twice backward; O(N D) memory if tiled.
    """
    _checks.impl(impl)
    _checks.choice("over", over, ("different", "same"))
    if _dense(rows, rows, impl):
        pairing = _ops.self_pairing(rows, keys, group_size, over, ordered=False)
        return _dense_log_sum_exp(rows, rows, pairing, bound, both=False)[0]
    tile = tile or _tiles.default_tile(rows.device)
    if keys is None:
        return _ops.self_log_sum_exp(rows, None, group_size, over, bound, list(tile))  # type: ignore[no-any-return]
    keys, order = keys.sort(stable=True)
    result = _ops.self_log_sum_exp(rows.index_select(0, order), keys, 1, over, bound, list(tile))
    return torch.empty_like(result).index_copy(0, order, result)


def cross_log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    group_size: int = 1,
    over: Over = "all",
    log_weight: LogWeight | None = None,
    weight_inputs: Sequence[Tensor] = (),
    impl: Impl = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    r"""Row-wise log-sum-exp of the (weighted) similarities of rows with columns.

        l_i = log sum_{j counts for i} w_ij exp(rows_i . columns_j)

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D).
        row_keys: integers of shape (N,); None gives row i the key ``i // group_size``.
        column_keys: integers of shape (M,); None likewise.
        row_ids: integers of shape (N,), for ``over="same"``: a pair of equal ids does not count (a row and itself).
        column_ids: integers of shape (M,).
        group_size: rows (and columns) that share a key when there are no keys.
        over: "all" pairs, those of "different" key, or those of the "same" key.
        log_weight: function of a tile giving log w_ij: called with two index vectors and ``weight_inputs``; it and
            any parameters of it (if a module) receive gradients. Eager only.
        weight_inputs: tensors the weight function takes and that receive gradients.
        impl: "dense", "tiled" or "auto".
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shape (N,); -inf where nothing counts (with zero gradient).

    Cost: O(N M D) time; O((N + M) D) memory if tiled.
    """
    _checks.impl(impl)
    _checks.choice("over", over, ("all", "different", "same"))
    if (row_keys is None) != (column_keys is None):
        raise ValueError("row_keys and column_keys must be given together, got only one of them.")
    tile = tile or _tiles.default_tile(rows.device)
    if log_weight is not None:
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size, False
        )
        if _dense(rows, columns, impl):
            bias = log_weight(*_index_vectors(rows, columns), *weight_inputs)
            return _plain_log_sum_exp(rows, columns, pairing, bias)
        parameters = list(log_weight.parameters()) if isinstance(log_weight, torch.nn.Module) else []
        return _WeightedRows.apply(  # type: ignore[no-any-return, no-untyped-call]
            rows, columns, log_weight, pairing, tile, len(weight_inputs), *weight_inputs, *parameters
        )
    if _dense(rows, columns, impl):
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size, False
        )
        return _dense_log_sum_exp(rows, columns, pairing, None, both=False)[0]
    if row_keys is None or column_keys is None:
        return _ops.rows_log_sum_exp(rows, columns, None, None, None, None, group_size, over, list(tile))  # type: ignore[no-any-return]
    row_keys, row_order = row_keys.sort(stable=True)
    column_keys, column_order = column_keys.sort(stable=True)
    if row_ids is not None and column_ids is not None:
        row_ids, column_ids = row_ids[row_order], column_ids[column_order]
    rows, columns = rows.index_select(0, row_order), columns.index_select(0, column_order)
    result = _ops.rows_log_sum_exp(
        rows, columns, row_keys, column_keys, row_ids, column_ids, 1, over, list(tile)
    )
    return torch.empty_like(result).index_copy(0, row_order, result)


def paired_log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    *,
    over: Over = "different",
    bound: float | None = None,
    impl: Impl = "auto",
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp of two towers along rows and along columns, in one pass.

        l_i = log sum_j exp(rows_i . columns_j),    m_j = log sum_i exp(rows_i . columns_j)

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D); row i and column i are a pair.
        over: "different" leaves the pairs (i, i) out, "all" keeps them.
        bound: as in :func:`self_log_sum_exp`.
        impl: "dense", "tiled" or "auto".
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shapes (N,) and (M,); -inf where nothing counts (with zero gradient).

    Cost: O(N M D) time: the matrix once forward, three times backward; O((N + M) D) memory if tiled.
    """
    _checks.impl(impl)
    _checks.choice("over", over, ("all", "different"))
    if _dense(rows, columns, impl):
        pairing = Pairing(over, len(rows), len(columns), device=rows.device)
        return _dense_log_sum_exp(rows, columns, pairing, bound, both=True)
    tile = tile or _tiles.default_tile(rows.device)
    return _ops.paired_log_sum_exp(rows, columns, over, bound, list(tile))  # type: ignore[no-any-return]


def softmax_mean(rows: Tensor, columns: Tensor, *, tile: tuple[int, int] | None = None) -> Tensor:
    r"""Mean of the columns under the softmax of a row's similarities, without a gradient.

        m_i = sum_j softmax_j(rows_i . columns_j) columns_j

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D), M >= 1.
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shape (N, D), a constant for autograd.

    Cost: O(N M D) time, O((N + M) D) memory.
    """
    rows, columns = rows.detach(), columns.detach()
    options = (None, None, None, None, 1, "all", list(tile or _tiles.default_tile(rows.device)))
    log_sum = _ops.rows_log_sum_exp(rows, columns, *options)
    # The mean is the derivative of the log-sum-exp with respect to the row.
    one = torch.ones_like(log_sum)
    return _ops.rows_log_sum_exp.gradient(one, rows, columns, log_sum, *options, [True, False])[0]


def softplus_sum(
    rows: Tensor,
    columns: Tensor,
    offset: Tensor,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    over: Over = "all",
    impl: Impl = "auto",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    r"""Row-wise sum of the softplus of shifted similarities: losses that look at pairs one by one.

        s_i = sum_{j counts for i} log(1 + exp(rows_i . columns_j + offset_i))

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D).
        offset: shape (N,); -inf makes a row's sum zero.
        row_keys: as in :func:`cross_log_sum_exp`.
        column_keys: as in :func:`cross_log_sum_exp`.
        row_ids: as in :func:`cross_log_sum_exp`.
        column_ids: as in :func:`cross_log_sum_exp`.
        over: "all" pairs, those of "different" key, or those of the "same" key.
        impl: "dense", "tiled" or "auto".
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shape (N,).

    Cost: O(N M D) time (with sorted keys and ``over="same"`` only the blocks of equal keys); O((N + M) D) memory if
    tiled.
    """
    _checks.impl(impl)
    _checks.choice("over", over, ("all", "different", "same"))
    if (row_keys is None) != (column_keys is None):
        raise ValueError("row_keys and column_keys must be given together, got only one of them.")
    if _dense(rows, columns, impl):
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, 1, False
        )
        margin = _logits(rows, columns) + offset[:, None]
        margin = margin.masked_fill(pairing.excluded(0, len(rows), 0, len(columns)), -torch.inf)
        return torch.nn.functional.softplus(margin, threshold=60).sum(1)
    options = [over, list(tile or _tiles.default_tile(rows.device))]
    if row_keys is None or column_keys is None:
        return _ops.softplus_sum(rows, columns, offset, None, None, None, None, *options)  # type: ignore[no-any-return]
    row_keys, row_order = row_keys.sort(stable=True)
    column_keys, column_order = column_keys.sort(stable=True)
    if row_ids is not None and column_ids is not None:
        row_ids, column_ids = row_ids[row_order], column_ids[column_order]
    rows, columns, offset = rows[row_order], columns[column_order], offset[row_order]
    result = _ops.softplus_sum(rows, columns, offset, row_keys, column_keys, row_ids, column_ids, *options)
    return torch.empty_like(result).index_copy(0, row_order, result)


def at_least_float32(z: Tensor) -> Tensor:
    """Half precision widened to float32, the rest as it is."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Dot product of each row of x with the same row of y, shape (N,); autocast leaves it alone, unlike vecdot."""
    return (x * y).sum(1)


def logit_bound(temperature: float | Tensor, normalize: bool) -> float | None:
    """What is known beforehand of the largest absolute logit."""
    return 1 / temperature if normalize and not isinstance(temperature, Tensor) else None


# ---- normalisation ---------------------------------------------------------------------------------------------------


def _plain_unit_rows(z: Tensor, factor: float) -> Tensor:
    """The formula in differentiable operations; the row's largest entry is divided out so that squares cannot overflow."""
    peak = z.detach().abs().amax(1, keepdim=True).clamp_min(_EPS)
    z = z / peak
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z * (factor / torch.maximum(norm, _EPS / peak))


class _UnitRows(torch.autograd.Function):
    """The formula with its gradient written out: two passes and no temporaries of size N x D beyond the result."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: float) -> Tensor:
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        if z.device.type != "cpu" or not math.isfinite(norm.sum().item()):
            peak = torch.linalg.vector_norm(z, ord=torch.inf, dim=1, keepdim=True).clamp_min_(_EPS)
            norm = torch.linalg.vector_norm(z / peak, dim=1, keepdim=True).mul_(peak)
        inverse = norm.clamp_min(_EPS).reciprocal_()
        rows = z * (inverse * factor)
        ctx.factor = factor
        ctx.save_for_backward(z, rows, inverse, norm > _EPS)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        z, rows, inverse, spread = ctx.saved_tensors
        if torch.is_grad_enabled():  # asked to be differentiable itself
            return _differentiable_gradient(lambda z: (_plain_unit_rows(z, ctx.factor),), (z,), (gradient,))[
                0
            ], None
        # du/dz = (I - u u^T) / |z|; a row shorter than eps is only multiplied, so it keeps its radial part.
        radial = row_products(gradient, rows)[:, None].mul_(spread).mul_(ctx.factor**-2)
        return torch.addcmul(gradient, rows, radial, value=-1).mul_(inverse.mul(ctx.factor)), None


# ---- dense -----------------------------------------------------------------------------------------------------------


def _dense(rows: Tensor, columns: Tensor, impl: Impl) -> bool:
    return impl == "dense" or (impl == "auto" and rows.shape[0] * columns.shape[0] <= _DENSE_ENTRIES)


def _dense_log_sum_exp(
    rows: Tensor, columns: Tensor, pairing: Pairing, bound: float | None, *, both: bool
) -> tuple[Tensor, Tensor]:
    """Along rows, and along columns if ``both`` (otherwise the second result is the first)."""
    if not torch.compiler.is_compiling() and _tiles.safe(rows.detach(), columns.detach(), bound):
        if columns is rows:
            along_rows = _KeptSelf.apply(rows, pairing)  # type: ignore[no-untyped-call]
            return along_rows, along_rows
        return _KeptCross.apply(rows, columns, pairing, both)  # type: ignore[no-any-return, no-untyped-call]
    along_rows = _plain_log_sum_exp(rows, columns, pairing)
    return along_rows, _plain_log_sum_exp(columns, rows, pairing.transposed()) if both else along_rows


def _plain_log_sum_exp(rows: Tensor, columns: Tensor, pairing: Pairing, bias: Tensor | None = None) -> Tensor:
    """The definition in differentiable operations."""
    logits = _logits(rows, columns)
    if bias is not None:
        logits = logits + bias
    if not logits.numel():
        return logits.sum(1) - torch.inf
    excluded = pairing.excluded(0, len(rows), 0, len(columns))
    logits = logits.masked_fill(excluded, -torch.inf)
    empty = excluded.all(1)
    top = logits.detach().amax(1).masked_fill(empty, 0)
    total = (logits - top[:, None]).exp().sum(1)
    return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -torch.inf)


def _logits(rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ columns.T in the precision of the rows, whatever autocast says, also in the backward."""
    if torch.compiler.is_compiling():
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ columns.t()
    return _Product.apply(rows, columns.t())  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    """Matrix product that autocast leaves alone in all derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with torch.autocast(x.device.type, enabled=False):
            return x @ y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return _Product.apply(gradient, y.t()), _Product.apply(x.t(), gradient)  # type: ignore[no-untyped-call]


class _KeptSelf(torch.autograd.Function):
    """Small symmetric case: keeps the exponentials, so that forward and backward cost one product each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairing: Pairing) -> Tensor:
        kept = _tiles.kept_forward(rows, rows, pairing)
        total = kept.sum(1)
        ctx.pairing = pairing
        ctx.save_for_backward(rows, kept, total)
        return total.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        rows, kept, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            function = lambda rows: (_plain_log_sum_exp(rows, rows, ctx.pairing),)  # noqa: E731
            return _differentiable_gradient(function, (rows,), (gradient,))[0], None
        u = _quotient(gradient, total)
        return _tiles.kept_backward(u, u, rows, rows, kept, (True, False))[0], None


class _KeptCross(torch.autograd.Function):
    """Small two-tower case: keeps the exponentials, one product forward and two backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, pairing: Pairing, both: bool
    ) -> tuple[Tensor, Tensor]:
        kept = _tiles.kept_forward(rows, columns, pairing)
        row_total = kept.sum(1)
        column_total = kept.sum(0) if both else row_total.new_empty(0)
        ctx.pairing, ctx.both = pairing, both
        ctx.save_for_backward(rows, columns, kept, row_total, column_total)
        return row_total.log(), column_total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, columns, kept, row_total, column_total = ctx.saved_tensors
        if torch.is_grad_enabled():

            def function(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
                along_rows = _plain_log_sum_exp(rows, columns, ctx.pairing)
                if not ctx.both:
                    return (along_rows,)
                return along_rows, _plain_log_sum_exp(columns, rows, ctx.pairing.transposed())

            return *_differentiable_gradient(function, (rows, columns), gradients[: 1 + ctx.both]), None, None  # type: ignore[return-value]
        u = _quotient(gradients[0], row_total)
        v = _quotient(gradients[1], column_total) if ctx.both else None
        return *_tiles.kept_backward(u, v, rows, columns, kept, ctx.needs_input_grad[:2]), None, None


def _quotient(gradient: Tensor, total: Tensor) -> Tensor:
    """Gradient over sum; zero where there was nothing to sum."""
    return torch.where(total == 0, 0, gradient / total)


def _differentiable_gradient(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], gradients: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradient of a plain form that can itself be differentiated, with respect to the inputs that want one."""
    wanted = [x for x in inputs if x.requires_grad]
    results = iter(torch.autograd.grad(function(*inputs), wanted, gradients, create_graph=True))
    return tuple(next(results) if x.requires_grad else None for x in inputs)


# ---- tiled: Python weights -------------------------------------------------------------------------------------------


def _index_vectors(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(len(rows), device=rows.device), torch.arange(len(columns), device=columns.device)


class _WeightedRows(torch.autograd.Function):
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
        row_index, column_index = _index_vectors(rows, columns)
        given = weights[:inputs]

        def on_tile(r0: int, r1: int, c0: int, c1: int) -> Tensor:
            return log_weight(row_index[r0:r1], column_index[c0:c1], *given)

        result = _tiles.rows_forward(rows, columns, pairing, tile, on_tile)
        ctx.log_weight, ctx.pairing, ctx.tile, ctx.inputs = log_weight, pairing, tile, inputs
        ctx.save_for_backward(rows, columns, result, *weights)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            _ops.no_second_derivative()
        rows, columns, result, *weights = ctx.saved_tensors
        row_index, column_index = _index_vectors(rows, columns)
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
