"""How the margin losses sum: over all pairs of an anchor, anchors some at a time, or over the pairs listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks
from cl_core._comparison import Comparison
from cl_core._ops import no_second_derivative
from cl_core._rows import tiles
from cl_core._types import Reduction

Terms: TypeAlias = Tensor
"""(N, 2 K): for each anchor the sum of its terms of a sort and their number, then those of the next sort."""
OnTile: TypeAlias = Callable[[Tensor, Tensor, slice], Terms]
"""``function(anchors, candidates, which anchors) -> terms`` of those anchors."""

_LISTED_ENTRIES = 1 << 20  # of the gathered rows of listed pairs


def reduce_terms(terms: Terms, reduction: Reduction, comparison: Comparison) -> Tensor:
    """Mean over the terms that count, sort by sort; the sum; or each anchor's sum."""
    sums, counts = terms[:, ::2], terms[:, 1::2]
    if reduction == "none":
        result = sums.sum(1)
    elif reduction == "sum":
        result = sums.sum()
    else:
        result = (sums.sum(0) / counts.detach().sum(0).clamp_min(1)).sum()
    return result.to(comparison.dtype)


# ---- all pairs -------------------------------------------------------------------------------------------------------


def by_anchor(comparison: Comparison, function: OnTile) -> Terms:
    """Terms of all anchors: at once if that is one tile (differentiable twice), else tile by tile."""
    rows, columns, parts = comparison.rows, comparison.columns, comparison.parts()
    if len(parts) == 1:
        return function(rows, columns, parts[0])
    return _ByAnchor.apply(rows, columns, parts, function)  # type: ignore[no-any-return]


class _ByAnchor(torch.autograd.Function):
    """Keeps nothing of a tile: the backward computes it again, with its graph."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, parts: list[slice], function: OnTile) -> Terms:
        ctx.parts, ctx.function = parts, function
        ctx.save_for_backward(rows, columns)
        first, *others = parts
        terms = function(rows[first], columns, first)
        result = rows.new_empty(len(rows), terms.shape[1])  # at once: see cl_core._rows.Collected
        result[first] = terms
        for part in others:
            result[part] = function(rows[part], columns, part)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            no_second_derivative()
        rows, columns = ctx.saved_tensors
        of_rows, of_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        for part in ctx.parts:
            with torch.enable_grad():
                x = rows[part].detach().requires_grad_()
                y = columns.detach().requires_grad_(ctx.needs_input_grad[1])  # a queue wants none
                # Through a scalar: torch.autograd.grad with gradients imports the compiler's symbolic algebra, 1 s.
                weighted = (ctx.function(x, y, part) * gradient[part]).sum()
            of_x, *of_y = torch.autograd.grad(weighted, (x, y) if y.requires_grad else (x,))
            of_rows[part] = of_x
            if of_y:
                of_columns += of_y[0]
        return of_rows, of_columns, None, None


def all_triplets(distance: Tensor, positive: Tensor, negative: Tensor, margin: float, most: int) -> Terms:
    """Sum and number of the hinges of all triplets, without listing them.

    A negative at distance d meets the positives whose distance plus margin lies beyond d. With these reaches sorted
    and summed up once, their number k comes from a search and their hinges add up to (sum of the k largest) - k d.
    """
    reach = (distance + margin).masked_fill(~positive, -torch.inf).topk(most, dim=1).values
    summed = torch.where(reach > -torch.inf, reach, 0).cumsum(1)
    summed = torch.cat([summed.new_zeros(len(summed), 1), summed], 1)
    ascending = reach.detach().flip(1).contiguous()
    met = most - torch.searchsorted(ascending, distance.detach().contiguous(), right=True)
    met = met * negative
    return torch.stack([(summed.gather(1, met) - met * distance).sum(1), met.sum(1)], 1)


def masked_log_sum_exp(logits: Tensor, mask: Tensor) -> Tensor:
    """Row-wise log-sum-exp of the masked entries; -inf, with a gradient of zero, where there is none."""
    some = mask.any(1)
    result = logits.masked_fill(~mask & some[:, None], -torch.inf).logsumexp(1)
    return torch.where(some, result, -torch.inf)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in float64 too (torch's default is the identity from 20 on)."""
    return F.softplus(x, threshold=60)


# ---- listed pairs ----------------------------------------------------------------------------------------------------


def check_listed(
    name: str, listed: tuple[Tensor, ...], anchors: tuple[bool, ...], comparison: Comparison
) -> None:
    """Refuse anything but equally long int64 vectors, pair by pair, of row numbers that exist."""
    fields = getattr(listed, "_fields", None)
    if fields is None or len(fields) != len(anchors):
        kind = "Triplets" if name == "triplets" else "Pairs"
        raise TypeError(f"{name} must be cl_core.miners.{kind}, got {type(listed).__name__}.")
    for field, index, is_anchor in zip(fields, listed, anchors, strict=True):
        if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 1:
            raise TypeError(f"{name}.{field} must be a vector of int64, got {_what(index)}.")
        of, size = (
            ("z", len(comparison.rows)) if is_anchor or comparison.alone else ("ref", len(comparison.columns))
        )
        inside = ((index >= 0) & (index < size)).all()
        _checks.require(
            inside, f"{name}.{field} must hold row numbers of {of}, 0 to {size - 1}, got another."
        )
    partners = zip(listed, listed[1:], fields, fields[1:], anchors[1:], strict=False)
    for one, other, field, next_field, starts_anew in partners:
        if not starts_anew and len(one) != len(other):
            raise ValueError(
                f"{name}.{field} and {name}.{next_field} must be equally long, got {len(one)} and {len(other)}."
            )


def _what(value: object) -> str:
    return (
        f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )


def listed_distances(comparison: Comparison, anchor: Tensor, other: Tensor) -> Tensor:
    """Euclidean distances of listed pairs, from differences: products would lose those below 1e-7."""
    return _ListedDistances.apply(comparison.rows, comparison.columns, anchor, other)  # type: ignore[no-any-return]


def listed_products(comparison: Comparison, anchor: Tensor, other: Tensor) -> Tensor:
    """Dot products of listed pairs."""
    return _ListedProducts.apply(comparison.rows, comparison.columns, anchor, other)  # type: ignore[no-any-return]


class _ListedProducts(torch.autograd.Function):
    """Gathers the rows of some pairs at a time, not of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, i, j)
        result = x.new_empty(len(i))
        for part in _parts(x, i):
            torch.linalg.vecdot(x[i[part]], y[j[part]], out=result[part])
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            no_second_derivative()
        x, y, i, j = ctx.saved_tensors
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
        for part in _parts(x, i):
            weight = gradient[part, None]
            of_x.index_add_(0, i[part], weight * y[j[part]])
            if ctx.needs_input_grad[1]:
                of_y.index_add_(0, j[part], weight * x[i[part]])
        return of_x, of_y, None, None


class _ListedDistances(torch.autograd.Function):
    """The same for distances; zero, with a gradient of zero, where rows coincide but for their rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
        result = x.new_empty(len(i))
        for part in _parts(x, i):
            torch.linalg.vector_norm(x[i[part]] - y[j[part]], dim=1, out=result[part])
        rounding = 8 * torch.finfo(x.dtype).eps * (x.norm(dim=1)[i] + y.norm(dim=1)[j])
        result = torch.where(result > rounding, result, 0)
        ctx.save_for_backward(x, y, i, j, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():
            no_second_derivative()
        x, y, i, j, distance = ctx.saved_tensors
        weight = torch.where(distance > 0, gradient / distance, 0)[:, None]
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
        for part in _parts(x, i):
            pull = weight[part] * (x[i[part]] - y[j[part]])
            of_x.index_add_(0, i[part], pull)
            if ctx.needs_input_grad[1]:
                of_y.index_add_(0, j[part], pull, alpha=-1)
        return of_x, of_y, None, None


def _parts(x: Tensor, index: Tensor) -> list[slice]:
    return list(tiles(len(index), max(1, _LISTED_ENTRIES // x.shape[1])))


def listed_hinges(excess: Tensor, anchor: Tensor, anchors: int) -> Terms:
    """Sum and number of the positive ones among the listed values of every anchor."""
    hinge = excess.relu()
    pair = torch.stack([hinge, (hinge > 0).to(hinge.dtype)], 1)
    return pair.new_zeros(anchors, 2).index_add(0, anchor, pair)


def listed_log_sum_exp(logits: Tensor, anchor: Tensor, anchors: int) -> Tensor:
    """Log-sum-exp of the listed values of every anchor; -inf, with a gradient of zero, where there is none."""
    bottom = torch.finfo(logits.dtype).min
    top = logits.new_full((anchors,), bottom).scatter_reduce(0, anchor, logits.detach(), "amax")
    total = logits.new_zeros(anchors).index_add(0, anchor, (logits - top[anchor]).exp())
    some = total > 0
    return torch.where(some, torch.where(some, total, 1).log() + top, -torch.inf)
