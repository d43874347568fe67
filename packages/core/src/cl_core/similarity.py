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

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks, _dense, _ops, _tiles
from cl_core._ops import LogWeight
from cl_core._tiles import Over, Pairing
from cl_core._types import Impl

# Up to this many entries the matrix is kept: faster, second derivatives, and no more than 16 MB in float32.
_DENSE_ENTRIES = 2048 * 2048
# Rows shorter than this are multiplied by its inverse, which bounds their gradient. In float16 that is 2^14 times the
# one that comes in, divided by the temperature: at small temperatures a zero row's still overflows.
_SHORT = {torch.float16: 2.0**-14}
_SHORTEST = 1e-12


def scaled_rows(
    z: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = True,
    source: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rows of unit length times a scale, in at least float32.

        u_i = scale_i z_i / max(|z_i|, eps)

    with eps = 1e-12, for float16 input 2^-14. A zero row stays zero. Rows of any finite norm are safe from overflow. To
    divide logits by a temperature T, give both sides ``scale=T ** -0.5`` (one set of rows), or one side ``1 / T``,
    which may be a vector, one T a row.

    Args:
        z: rows, shape (N, D).
        scale: a number, a 0-d tensor or a tensor of shape (N,); tensors receive a gradient.
        normalize: scale to unit length first.
        source: the type of the original rows if they were widened before; it decides eps.
        dtype: float32 or float64, to be compared with rows of that type; None for float32 (float64 for float64 input).

    Returns:
        Shape (N, D).

    Cost: O(N D).
    """
    _checks.flag("normalize", normalize)
    if not isinstance(scale, Tensor):
        _checks.positive("scale", scale)
    eps = _SHORT.get(source or z.dtype, _SHORTEST)
    z = at_least_float32(z) if dtype is None else z.to(dtype)
    factor = scale if not isinstance(scale, Tensor) else 1.0
    if normalize and torch.compiler.is_compiling():
        z = _dense.plain_unit_rows(z, factor, eps)
    elif normalize:
        z = _dense.UnitRows.apply(z, factor, eps)
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
    _check(rows, rows, impl, tile, group_size, row_keys=(keys, "keys", 0))
    _checks.choice("over", over, ("different", "same"))
    if _fits(rows.shape[0], rows.shape[0], impl):
        pairing = _ops.self_pairing(rows, keys, group_size, over, ordered=False)
        return _dense.log_sum_exp(rows, rows, pairing, bound, symmetric=True)[0]
    tile = tile or _tiles.default_tile(rows.device)
    if keys is None:
        return _ops.self_log_sum_exp(rows, None, group_size, over, bound, list(tile)).to(rows.dtype)  # type: ignore[no-any-return]
    keys, order = keys.sort(stable=True)
    result = _ops.self_log_sum_exp(rows.index_select(0, order), keys, 1, over, bound, list(tile))
    return _unsorted(result, order, rows.dtype)


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
    _check_pairs(rows, columns, impl, tile, group_size, over, row_keys, column_keys, row_ids, column_ids)
    tile = tile or _tiles.default_tile(rows.device)
    if log_weight is not None:
        _check_owner(log_weight, rows, weight_inputs)
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size, False
        )
        if _fits(rows.shape[0], columns.shape[0], impl):
            bias = log_weight(*_ops.index_vectors(rows, columns), *weight_inputs)
            return _dense.plain_log_sum_exp(rows, columns, pairing, bias)
        parameters = list(log_weight.parameters()) if isinstance(log_weight, torch.nn.Module) else []
        return _ops.WeightedRows.apply(  # type: ignore[no-any-return]
            rows, columns, log_weight, pairing, tile, len(weight_inputs), *weight_inputs, *parameters
        ).to(rows.dtype)
    if _fits(rows.shape[0], columns.shape[0], impl):
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, group_size, False
        )
        return _dense.log_sum_exp(rows, columns, pairing, None)[0]
    if row_keys is None or column_keys is None:
        result = _ops.rows_log_sum_exp(rows, columns, None, None, None, None, group_size, over, list(tile))
        return result.to(rows.dtype)  # type: ignore[no-any-return]
    row_keys, row_order = row_keys.sort(stable=True)
    column_keys, column_order = column_keys.sort(stable=True)
    if row_ids is not None and column_ids is not None:
        row_ids, column_ids = row_ids[row_order], column_ids[column_order]
    rows, columns = rows.index_select(0, row_order), columns.index_select(0, column_order)
    numbers = (row_keys, column_keys, row_ids, column_ids)
    result = _ops.rows_log_sum_exp(rows, columns, *numbers, 1, over, list(tile))
    return _unsorted(result, row_order, rows.dtype)


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
    _check(rows, columns, impl, tile)
    _checks.choice("over", over, ("all", "different"))
    if _fits(rows.shape[0], columns.shape[0], impl):
        pairing = Pairing(over, len(rows), len(columns), device=rows.device)
        return _dense.log_sum_exp(rows, columns, pairing, bound, both=True)
    tile = tile or _tiles.default_tile(rows.device)
    along_rows, along_columns = _ops.paired_log_sum_exp(rows, columns, over, bound, list(tile))
    return along_rows.to(rows.dtype), along_columns.to(rows.dtype)


def expected_logits(
    rows: Tensor,
    columns: Tensor,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    over: Over = "all",
    impl: Impl = "auto",
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Row-wise log-sum-exp of similarities, and their mean under the softmax: losses that weigh what they average.

        l_i = log sum_{j counts for i} exp(s_ij),    e_i = sum_{j counts for i} exp(s_ij - l_i) s_ij

    with s_ij = rows_i . columns_j. The weights' entropy is l - e. With the weights as constants, e has the gradient
    of l.

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D).
        row_keys: integers of shape (N,); None gives row i the key i.
        column_keys: integers of shape (M,); None likewise.
        over: "all" pairs, those of "different" key, or those of the "same" key.
        impl: "dense", "tiled" or "auto".
        tile: rows and columns of a tile; None chooses.

    Returns:
        Shapes (N,) and (N,); -inf and 0 where nothing counts (with zero gradient).

    Cost: O(N M D) time; O((N + M) D) memory if tiled.
    """
    _check_pairs(rows, columns, impl, tile, 1, over, row_keys, column_keys, None, None)
    if _fits(rows.shape[0], columns.shape[0], impl):
        pairing = _ops.cross_pairing(rows, columns, row_keys, column_keys, None, None, over, 1, False)
        if torch.compiler.is_compiling():
            return _dense.plain_expected_logits(rows, columns, pairing)
        return _dense.KeptExpected.apply(rows, columns, pairing)  # type: ignore[no-any-return]
    options = [over, list(tile or _tiles.default_tile(rows.device))]
    if row_keys is None or column_keys is None:
        log_sum, expected = _ops.expected_logits(rows, columns, None, None, *options)
        return log_sum.to(rows.dtype), expected.to(rows.dtype)
    row_keys, order = row_keys.sort(stable=True)
    column_keys, column_order = column_keys.sort(stable=True)
    rows, columns = rows.index_select(0, order), columns.index_select(0, column_order)
    found = _ops.expected_logits(rows, columns, row_keys, column_keys, *options)
    return _unsorted(found[0], order, rows.dtype), _unsorted(found[1], order, rows.dtype)


def nearest(
    rows: Tensor,
    columns: Tensor,
    *,
    row_keys: Tensor | None = None,
    column_keys: Tensor | None = None,
    group_size: int = 1,
    over: Over = "all",
    tile: tuple[int, int] | None = None,
) -> Tensor:
    r"""Which column is most similar to each row, without a gradient.

        n_i = argmax_{j counts for i} rows_i . columns_j

    Args:
        rows: shape (N, D), float32 or float64.
        columns: shape (M, D).
        row_keys: integers of shape (N,); None gives row i the key ``i // group_size``.
        column_keys: integers of shape (M,); None likewise.
        group_size: rows (and columns) that share a key when there are no keys.
        over: "all" pairs, or those of "different" key.
        tile: rows and columns of a tile; None chooses.

    Returns:
        int64, shape (N,): the first of equally similar columns, -1 where none counts.

    Cost: O(N M D) time, O(N) memory beside a tile.
    """
    _check_pairs(rows, columns, "tiled", tile, group_size, over, row_keys, column_keys, None, None)
    _checks.choice("over", over, ("all", "different"))
    tile = tile or _tiles.default_tile(rows.device)
    return _ops.nearest(rows.detach(), columns.detach(), row_keys, column_keys, group_size, over, list(tile))


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
    _check_pairs(rows, columns, impl, tile, 1, over, row_keys, column_keys, row_ids, column_ids)
    if tuple(offset.shape) != (rows.shape[0],) or offset.dtype != rows.dtype:
        came = f"{tuple(offset.shape)}, {offset.dtype}"
        raise ValueError(f"offset must have shape ({rows.shape[0]},) and the dtype of rows, got {came}.")
    if _fits(rows.shape[0], columns.shape[0], impl):
        pairing = _ops.cross_pairing(
            rows, columns, row_keys, column_keys, row_ids, column_ids, over, 1, False
        )
        margin = _dense.logits_of(rows, columns) + offset[:, None]
        margin = margin.masked_fill(pairing.excluded(0, len(rows), 0, len(columns)), -torch.inf)
        return torch.nn.functional.softplus(margin, threshold=60).sum(1)
    options = [over, list(tile or _tiles.default_tile(rows.device))]
    if row_keys is None or column_keys is None:
        total = _ops.softplus_sum(rows, columns, offset, None, None, None, None, *options)
        return total.to(rows.dtype)  # type: ignore[no-any-return]
    row_keys, row_order = row_keys.sort(stable=True)
    column_keys, column_order = column_keys.sort(stable=True)
    if row_ids is not None and column_ids is not None:
        row_ids, column_ids = row_ids[row_order], column_ids[column_order]
    rows, columns, offset = rows[row_order], columns[column_order], offset[row_order]
    result = _ops.softplus_sum(rows, columns, offset, row_keys, column_keys, row_ids, column_ids, *options)
    return _unsorted(result, row_order, rows.dtype)


def _check(
    rows: Tensor,
    columns: Tensor,
    impl: Impl,
    tile: tuple[int, int] | None,
    group_size: int = 1,
    **numbers: tuple[Tensor | None, str, int],
) -> None:
    """Refuse operands that do not fit; ``numbers`` are integer vectors, their names, and 0 for rows, 1 for columns."""
    _checks.impl(impl)
    _checks.count("group_size", group_size)
    for size in tile or ():
        _checks.count("tile", size)
    for name, matrix in (("rows", rows), ("columns", columns)):
        if matrix.ndim != 2 or matrix.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64 of shape (N, D), got {matrix.dtype} of {tuple(matrix.shape)}."
            )
    if columns is not rows:
        _checks.same_width(rows=rows, columns=columns)
    for vector, name, side in numbers.values():
        if vector is not None:
            matrix = (rows, columns)[side]
            of = ("rows", "columns")[side]
            _checks.labels(name, vector, rows=matrix.shape[0], of=of, device=matrix.device)


def _check_pairs(
    rows: Tensor,
    columns: Tensor,
    impl: Impl,
    tile: tuple[int, int] | None,
    group_size: int,
    over: Over,
    row_keys: Tensor | None,
    column_keys: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
) -> None:
    """Refuse keys and ids that do not belong together."""
    _check(
        rows,
        columns,
        impl,
        tile,
        group_size,
        row_keys=(row_keys, "row_keys", 0),
        column_keys=(column_keys, "column_keys", 1),
        row_ids=(row_ids, "row_ids", 0),
        column_ids=(column_ids, "column_ids", 1),
    )
    _checks.choice("over", over, ("all", "different", "same"))
    for kind, one, other in (("keys", row_keys, column_keys), ("ids", row_ids, column_ids)):
        if (one is None) != (other is None):
            raise ValueError(f"row_{kind} and column_{kind} must be given together, got only one of them.")
    if row_ids is not None and row_keys is None:
        raise ValueError(
            "row_ids must come with row_keys, got them without: ids tell rows of equal key apart."
        )


def _check_owner(log_weight: LogWeight, rows: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a weight function that holds what wants a gradient: tile by tile it would get none."""
    if isinstance(log_weight, torch.nn.Module) or not torch.is_grad_enabled() or not rows.shape[0]:
        return
    first = torch.zeros(1, dtype=torch.int64, device=rows.device)
    if log_weight(first, first, *(t.detach() for t in inputs)).requires_grad:
        raise ValueError(
            "log_weight must be a module, or take what wants a gradient as weight_inputs, got a function that holds "
            "such a tensor itself."
        )


def _unsorted(result: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Values of sorted rows in the order before, in the dtype of the rows."""
    return torch.empty_like(result).index_copy(0, order, result).to(dtype)


def at_least_float32(z: Tensor) -> Tensor:
    """Half precision widened to float32, the rest as it is."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Dot product of each row of x with the same row of y, shape (N,); autocast leaves it alone, unlike vecdot."""
    return (x * y).sum(1)


def _fits(rows: int, columns: int, impl: Impl) -> bool:
    """Whether to keep the matrix."""
    return impl == "dense" or (impl == "auto" and rows * columns <= _DENSE_ENTRIES)


def _two_view_terms(
    z1: Tensor, z2: Tensor, *, temperature: float | Tensor, normalize: bool, impl: Impl, source: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Logits of pairs (N, 1), and log-sum-exp over both views of all other samples (N, 2), in one node of autograd.

    None where there are too many rows to keep their matrix, or their logits are not known to be small: then
    :func:`scaled_rows`, :func:`row_products` and :func:`self_log_sum_exp` give the same. ``source`` is the type of the
    rows before they were widened.
    """
    _checks.flag("normalize", normalize)
    bound, rows = logit_bound(temperature, normalize), 2 * z1.shape[0]
    if bound is None or isinstance(temperature, Tensor) or not rows or torch.compiler.is_compiling():
        return None
    if not _fits(rows, rows, impl) or not _tiles.safe(z1, z2, bound):
        return None
    return _dense.KeptViews.apply(z1, z2, temperature**-0.5, _SHORT.get(source, _SHORTEST))  # type: ignore[no-any-return]


def logit_bound(temperature: float | Tensor, normalize: bool) -> float | None:
    """What is known beforehand of the largest absolute logit."""
    return 1 / temperature if normalize and not isinstance(temperature, Tensor) else None
