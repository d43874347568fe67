"""The dense forms of :mod:`cl_core.similarity` and the normalisation of rows, as nodes of autograd.

Each node writes its gradient out, and has a plain form in differentiable operations for second derivatives and for the
compiler, which fuses it better than we could.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_core import _tiles
from cl_core._tiles import Pairing


def plain_unit_rows(z: Tensor, factor: float, eps: float) -> Tensor:
    """The formula in differentiable operations; a row's largest entry is divided out, so that no square overflows."""
    peak = z.detach().abs().amax(1, keepdim=True).clamp_min(eps)
    z = z / peak
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z * (factor / torch.maximum(norm, eps / peak))


class UnitRows(torch.autograd.Function):
    """The formula with its gradient written out: two passes and no temporaries of size N x D beyond the result."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factor: float, eps: float) -> Tensor:
        rows, inverse, spread = _unit_forward(z, factor, eps)
        ctx.factor, ctx.eps = factor, eps
        ctx.save_for_backward(z, rows, inverse, spread)
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        z, rows, inverse, spread = ctx.saved_tensors
        if torch.is_grad_enabled():  # asked to be differentiable itself
            function = lambda z: (plain_unit_rows(z, ctx.factor, ctx.eps),)  # noqa: E731
            return _differentiable_gradient(function, (z,), (gradient,))[0], None, None
        return _unit_backward(gradient, rows, inverse, spread, ctx.factor), None, None


def _unit_forward(
    z: Tensor, factor: float, eps: float, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, and for the backward the inverse of each norm and whether the row is longer than eps."""
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    if z.device.type == "cpu" and math.isfinite(norm.sum().item()):
        spread, inverse = norm > eps, norm.clamp_min(eps).reciprocal_()
        return torch.mul(z, inverse * factor, out=out), inverse, spread
    # Squares may overflow: divide the row's largest entry out first.
    peak = torch.linalg.vector_norm(z, ord=torch.inf, dim=1, keepdim=True).clamp_min_(eps)
    scaled, least = z / peak, eps / peak
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    spread, norm = norm > least, torch.maximum(norm, least)
    return torch.mul(scaled, factor / norm, out=out), norm.reciprocal() / peak, spread


def _unit_backward(
    gradient: Tensor,
    rows: Tensor,
    inverse: Tensor,
    spread: Tensor,
    factor: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """du/dz = (I - u u^T) / |z|; a row shorter than eps is only multiplied, so it keeps its radial part."""
    radial = (gradient * rows).sum(1, keepdim=True).mul_(spread).mul_(factor**-2)
    return torch.addcmul(gradient, rows, radial, value=-1, out=out).mul_(inverse * factor)


def log_sum_exp(
    rows: Tensor,
    columns: Tensor,
    pairing: Pairing,
    bound: float | None,
    *,
    both: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Along rows, and along columns if ``both`` (otherwise the second result is the first).

    ``symmetric`` says that columns are the rows and that the pairing is symmetric.
    """
    if torch.compiler.is_compiling():
        along_rows = plain_log_sum_exp(rows, columns, pairing)
        return along_rows, plain_log_sum_exp(columns, rows, pairing.transposed()) if both else along_rows
    if not _tiles.safe(rows.detach(), columns.detach(), bound):
        along_rows = KeptCross.apply(rows, columns, pairing, False, True)[0]
        if not both:
            return along_rows, along_rows
        return along_rows, KeptCross.apply(columns, rows, pairing.transposed(), False, True)[0]
    if symmetric:
        along_rows = KeptSelf.apply(rows, pairing)
        return along_rows, along_rows
    return KeptCross.apply(rows, columns, pairing, both, False)  # type: ignore[no-any-return]


def plain_log_sum_exp(rows: Tensor, columns: Tensor, pairing: Pairing, bias: Tensor | None = None) -> Tensor:
    """The definition in differentiable operations."""
    logits = logits_of(rows, columns)
    if bias is not None:
        logits = logits + bias
    if not logits.numel():
        return logits.sum(1) - torch.inf
    excluded = pairing.excluded(0, len(rows), 0, len(columns))
    logits = logits.masked_fill(excluded, -torch.inf)
    top = logits.detach().amax(1)
    empty = top == -torch.inf  # nothing counts, or nothing has any weight
    top = top.masked_fill(empty, 0)
    total = (logits.masked_fill(empty[:, None], 0) - top[:, None]).exp().sum(1)
    return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -torch.inf)


def logits_of(rows: Tensor, columns: Tensor) -> Tensor:
    """Rows @ columns.T in the precision of the rows, whatever autocast says, also in the backward."""
    return product(rows, columns.t())


def product(x: Tensor, y: Tensor) -> Tensor:
    """Matrix product of (..., N, D) and (..., D, M), which autocast leaves alone, in all derivatives too."""
    if torch.compiler.is_compiling():
        with torch.autocast(x.device.type, enabled=False):
            return x @ y
    return _Product.apply(x, y)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """The product, and the same as its derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        with torch.autocast(x.device.type, enabled=False):
            return x @ y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad
        of_x = _Product.apply(gradient, y.mT) if need_x else None
        return of_x, _Product.apply(x.mT, gradient) if need_y else None


class KeptSelf(torch.autograd.Function):
    """Small symmetric case: keeps the exponentials, so that forward and backward cost one product each."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, pairing: Pairing) -> Tensor:
        kept, _ = _tiles.kept_forward(rows, rows, pairing, shift=False)
        total = kept.sum(1)
        ctx.pairing = pairing
        ctx.save_for_backward(rows, kept, total)
        return total.log()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        rows, kept, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            function = lambda rows: (plain_log_sum_exp(rows, rows, ctx.pairing),)  # noqa: E731
            return _differentiable_gradient(function, (rows,), (gradient,))[0], None
        u = _quotient(gradient, total)
        return _tiles.kept_backward(u, u, rows, rows, kept, (True, False))[0], None


class KeptViews(torch.autograd.Function):
    """Two views of a small batch from the embeddings on: normalisation, positives and negatives in one node.

    What :class:`UnitRows` and :class:`KeptSelf` do, with a third of the operations: at a few hundred rows these cost
    more than the products. The positives' gradient joins that of the negatives before the product with the rows.

    Returns the logit of a pair, shape (N, 1), and the log-sum-exp over both views of the other samples, (N, 2).
    """

    @staticmethod
    def forward(ctx: Any, z1: Tensor, z2: Tensor, factor: float, eps: float) -> tuple[Tensor, Tensor]:
        n = len(z1)
        stacked = torch.cat([z1, z2])
        rows, inverse, spread = _unit_forward(stacked, factor, eps, out=stacked)
        kept = _exponentials_of_views(rows, n)
        total = kept.sum(1)
        ctx.factor, ctx.eps = factor, eps
        ctx.save_for_backward(z1, z2, rows, inverse, spread, kept, total)
        positives = torch.mul(rows[:n], rows[n:]).sum(1, keepdim=True)
        return positives, total.log().view(2, n).t()

    @staticmethod
    def backward(ctx: Any, of_positives: Tensor, of_negatives: Tensor) -> tuple[Tensor | None, ...]:
        z1, z2, rows, inverse, spread, kept, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            function = lambda z1, z2: plain_views(z1, z2, ctx.factor, ctx.eps)  # noqa: E731
            return *_differentiable_gradient(function, (z1, z2), (of_positives, of_negatives)), None, None
        u = _quotient(of_negatives.t().reshape(-1), total)
        gradient = torch.empty_like(rows)
        _views_backward(u, of_positives[:, 0], rows, kept, out=gradient)
        gradient = _unit_backward(gradient, rows, inverse, spread, ctx.factor, out=gradient)
        return gradient[: len(z1)], gradient[len(z1) :], None, None


def _views_backward(u: Tensor, of_positives: Tensor, rows: Tensor, kept: Tensor, *, out: Tensor) -> None:
    """W @ rows, with W_ij = kept_ij (u_i + u_j) for negatives and the positives' gradient within a sample."""
    n, panel = len(of_positives), _tiles.default_tile(rows.device)[0]
    scratch = kept.new_empty(min(panel, len(rows)), len(rows))
    for r0, r1 in _tiles.panels(0, len(rows), panel):
        weight = torch.add(u[r0:r1, None], u, out=scratch[: r1 - r0]).mul_(kept[r0:r1])
        if r0 < n:  # rows of view 1 meet their own other view here
            weight.diagonal(r0 + n).copy_(of_positives[r0:r1])
        if r1 > n:
            weight.diagonal(r0 - n).copy_(of_positives[max(r0 - n, 0) : r1 - n])
        torch.mm(weight, rows, out=out[r0:r1])


def _exponentials_of_views(rows: Tensor, samples: int) -> Tensor:
    """Exponentials of the logits of stacked views, zero within a sample."""
    kept = rows.new_empty(len(rows), len(rows))
    torch.addmm(kept, rows, rows.t(), beta=0, alpha=_tiles.LOG2E, out=kept).exp2_()
    for offset in (0, samples, -samples):
        kept.diagonal(offset).fill_(0)
    return kept


def plain_views(z1: Tensor, z2: Tensor, factor: float, eps: float) -> tuple[Tensor, Tensor]:
    """:class:`KeptViews` in differentiable operations."""
    n = len(z1)
    rows = plain_unit_rows(torch.cat([z1, z2]), factor, eps)
    sample = torch.arange(n, device=rows.device).repeat(2)
    pairing = Pairing("different", 2 * n, 2 * n, keys=(sample, sample), ordered=False, device=rows.device)
    return (rows[:n] * rows[n:]).sum(1, keepdim=True), plain_log_sum_exp(rows, rows, pairing).view(2, n).t()


class KeptCross(torch.autograd.Function):
    """Small case of two sets: keeps the exponentials, one product forward and two backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, pairing: Pairing, both: bool, shift: bool
    ) -> tuple[Tensor, Tensor]:
        kept, top = _tiles.kept_forward(rows, columns, pairing, shift=shift)
        row_total = kept.sum(1)
        column_total = kept.sum(0) if both else row_total.new_empty(0)
        ctx.pairing, ctx.both = pairing, both
        ctx.save_for_backward(rows, columns, kept, row_total, column_total)
        along_rows = row_total.log()
        return torch.add(along_rows, top, alpha=_tiles.LN2) if shift else along_rows, column_total.log()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, kept, row_total, column_total = ctx.saved_tensors
        if torch.is_grad_enabled():

            def function(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
                along_rows = plain_log_sum_exp(rows, columns, ctx.pairing)
                if not ctx.both:
                    return (along_rows,)
                return along_rows, plain_log_sum_exp(columns, rows, ctx.pairing.transposed())

            return *_differentiable_gradient(function, (rows, columns), gradients[: 1 + ctx.both]), *[
                None
            ] * 3
        u = _quotient(gradients[0], row_total)
        v = _quotient(gradients[1], column_total) if ctx.both else None
        return *_tiles.kept_backward(u, v, rows, columns, kept, ctx.needs_input_grad[:2]), *[None] * 3


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


def plain_expected_logits(rows: Tensor, columns: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of a row and the mean of its logits under its softmax, in differentiable operations."""
    log_sum = plain_log_sum_exp(rows, columns, pairing)
    logits = logits_of(rows, columns)
    excluded = pairing.excluded(0, len(rows), 0, len(columns))
    share = (logits - log_sum.masked_fill(log_sum == -torch.inf, 0)[:, None]).masked_fill(
        excluded, -torch.inf
    )
    return log_sum, (share.exp() * logits).sum(1)


class KeptExpected(torch.autograd.Function):
    """Small case of :func:`plain_expected_logits`: keeps the softmax and its derivative, one product each way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, pairing: Pairing) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        n, m = len(rows), len(columns)
        logits = rows.new_empty(n, m)
        torch.mm(rows, columns.t(), out=logits)
        share = pairing.fill_(logits.clone(), 0, n, 0, m, -torch.inf)
        top = share.amax(1, keepdim=True) if m else rows.new_zeros(n, 1)
        top = top.masked_fill_(top == -torch.inf, 0)
        share = share.sub_(top).exp_()
        total = share.sum(1, keepdim=True)
        share.div_(total.clamp_min(torch.finfo(total.dtype).tiny))
        # From the top, lest large logits swallow the 1 in P_ij (1 + logit_ij - e_i).
        slope = logits.sub_(top).mul_(share)
        below = slope.sum(1, keepdim=True)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            slope.add_(share).addcmul_(share, below, value=-1)
        ctx.pairing = pairing
        ctx.save_for_backward(rows, columns, share, slope)
        return (total.log_() + top)[:, 0], (below + top)[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, columns, share, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = tuple(rows.new_zeros(len(rows)) if g is None else g for g in gradients)
            function = lambda rows, columns: plain_expected_logits(rows, columns, ctx.pairing)  # noqa: E731
            return *_differentiable_gradient(function, (rows, columns), given), None
        parts = [
            kept * g[:, None] for kept, g in zip((share, slope), gradients, strict=True) if g is not None
        ]
        if not parts:
            return None, None, None
        weight = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        need_rows, need_columns = ctx.needs_input_grad[:2]
        of_rows = torch.mm(weight, columns, out=torch.empty_like(rows)) if need_rows else None
        of_columns = torch.mm(weight.t(), rows, out=torch.empty_like(columns)) if need_columns else None
        return of_rows, of_columns, None
