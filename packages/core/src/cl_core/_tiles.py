"""The loops under :mod:`cl_core.similarity`: plain functions on tensors, without autograd.

Four kernels, each with its backward:

* ``rows_*``: one log-sum-exp a row, running maxima, right at any scale of the logits;
* ``expected_*``: that, and the mean of a row's logits under its softmax;
* ``shared_*``: one exponential serves the row and the column of an entry (and, with one set of rows, both of its
  rows: only the upper triangle is computed). Without any shift, so only for logits that cannot over- or underflow;
* ``softplus_*``: a sum of softplus a row.

and :func:`nearest`, which has none: the column of the largest logit of a row.

All take logits ``x @ y.T`` and walk them in tiles that fit the cache. Exponentials are taken to base 2, with log2(e)
folded into the product: on CPU that is several times cheaper than base e and no less exact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
LN2 = math.log(2)

Over: TypeAlias = Literal["all", "different", "same"]
LogWeight: TypeAlias = Callable[[int, int, int, int], Tensor]
Tile: TypeAlias = tuple[int, int]

# |logit| up to here keeps sums over 1e6 entries, and a weight of 1e-6 divided by them, inside the dtype's range.
_SAFE_LOGIT = {torch.float32: 60.0, torch.float64: 600.0}
# Groups up to this size are masked by size^2 strided fills, larger ones by comparing keys.
_LARGEST_STRIDED_GROUP = 4


class Pairing:
    """Which (row, column) pairs count, decided tile by tile so that no N x N mask exists.

    ``over="all"`` counts every pair; ``"different"`` pairs of unequal key; ``"same"`` pairs of equal key, less those
    of equal id. Without key tensors, row and column i have key ``i // group_size``. Key tensors that are ``ordered``
    let most tiles be decided by the keys at their corners alone.
    """

    def __init__(
        self,
        over: Over,
        rows: int,
        columns: int,
        *,
        keys: tuple[Tensor, Tensor] | None = None,
        ids: tuple[Tensor, Tensor] | None = None,
        group_size: int = 1,
        ordered: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.over, self._ids, self._keys = over, ids, keys
        self._group_size = group_size if keys is None else 0
        self._shape, self._device = (rows, columns), device
        # Looking at keys on an accelerator would stall it, so there each tile is masked instead.
        self._corners = over != "all" and (keys is None or (ordered and keys[0].device.type == "cpu"))
        self._row_key: Callable[[int], int]
        self._column_key: Callable[[int], int]
        if keys is None:
            self._row_key = self._column_key = lambda i: i // group_size
        elif self._corners:
            self._row_key, self._column_key = keys[0].tolist().__getitem__, keys[1].tolist().__getitem__

    def transposed(self) -> Pairing:
        """The same pairs with rows and columns exchanged."""
        other = copy.copy(self)
        other._keys = None if self._keys is None else self._keys[::-1]
        other._ids = None if self._ids is None else self._ids[::-1]
        other._shape = self._shape[::-1]
        if self._corners:
            other._row_key, other._column_key = self._column_key, self._row_key
        return other

    def counts(self, r0: int, r1: int, c0: int, c1: int) -> bool:
        """Whether any pair of the tile can count."""
        if not self._corners:
            return True
        if self.over == "same":
            return self._overlap(r0, r1, c0, c1)
        return (
            not self._row_key(r0) == self._row_key(r1 - 1) == self._column_key(c0) == self._column_key(c1 - 1)
        )

    def fill_(self, tile: Tensor, r0: int, r1: int, c0: int, c1: int, value: float) -> Tensor:
        """Overwrite the entries of a tile that do not count."""
        if self.over == "all" or (
            self.over == "different" and self._corners and not self._overlap(r0, r1, c0, c1)
        ):
            return tile
        if self.over == "different" and 0 < self._group_size <= _LARGEST_STRIDED_GROUP:
            self._fill_groups_(tile, r0, r1, c0, c1, value)
            return tile
        return tile.masked_fill_(self.excluded(r0, r1, c0, c1), value)

    def excluded(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        """Boolean tile, true where a pair does not count."""
        if self.over == "all":
            return torch.zeros(r1 - r0, c1 - c0, dtype=torch.bool, device=self._device)
        if self._keys is None:
            rows, columns = (
                torch.arange(a, b, device=self._device).div_(self._group_size, rounding_mode="floor")
                for a, b in ((r0, r1), (c0, c1))
            )
        else:
            rows, columns = self._keys[0][r0:r1], self._keys[1][c0:c1]
        if self.over == "different":
            return rows[:, None] == columns[None]
        mask = rows[:, None] != columns[None]
        if self._ids is not None:
            mask |= self._ids[0][r0:r1, None] == self._ids[1][None, c0:c1]
        return mask

    def _overlap(self, r0: int, r1: int, c0: int, c1: int) -> bool:
        return bool(
            self._row_key(r0) <= self._column_key(c1 - 1) and self._column_key(c0) <= self._row_key(r1 - 1)
        )

    def _fill_groups_(self, tile: Tensor, r0: int, r1: int, c0: int, c1: int, value: float) -> None:
        """Fill the blocks of groups of fixed size by strided writes: no mask, no comparison."""
        size = self._group_size
        if (r0, r1) == (c0, c1) and r0 % size == 0 == r1 % size and tile.is_contiguous():
            count = (r1 - r0) // size
            tile.view(count, size, count, size).diagonal(dim1=0, dim2=2).fill_(value)
            return
        for place in range(size):  # of the row in its group
            row = r0 + (place - r0) % size
            for other in range(size):  # of the column in the same group
                column = row - place + other
                first = max(0, -(-(c0 - column) // size))
                last = min((r1 - 1 - row) // size, (c1 - 1 - column) // size)
                if last >= first:
                    i, j = row + first * size - r0, column + first * size - c0
                    diagonal = tile.diagonal(j - i)
                    start = min(i, j)
                    diagonal[start : start + (last - first) * size + 1 : size].fill_(value)


def default_tile(device: torch.device) -> Tile:
    """Rows and columns of a tile: on CPU a megabyte of float32, best for one thread and for two."""
    return (256, 1024) if device.type == "cpu" else (4096, 8192)


def safe(x: Tensor, y: Tensor, bound: float | None) -> bool:
    """Whether no logit of x @ y.T can over- or underflow an unshifted exponential.

    ``bound`` is what the caller knows of |logit|; without it, it is measured where that does not stall.
    """
    if bound is None:
        if x.device.type != "cpu" or not x.numel() or not y.numel():
            return False
        largest_x = torch.linalg.vector_norm(x, dim=1).max()
        largest_y = largest_x if y is x else torch.linalg.vector_norm(y, dim=1).max()
        bound = (largest_x * largest_y).item()
    return bound <= _SAFE_LOGIT[x.dtype]


def panels(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a range into consecutive pieces of at most ``size``."""
    for i in range(start, stop, size):
        yield i, min(i + size, stop)


class _Walk:
    """Visits tiles of the logits of x and y, times a unit, each written into the same reused buffer."""

    def __init__(self, x: Tensor, y: Tensor, pairing: Pairing, tile: Tile, *, unit: float = LOG2E) -> None:
        self.x, self.yt, self.pairing, self.tile, self.unit = x, y.t(), pairing, tile, unit
        self._buffer = x.new_empty(min(tile[0], len(x)) * min(max(tile), max(len(y), 1)))

    def scratch(self) -> Tensor:
        return torch.empty_like(self._buffer)

    def rows(self) -> Iterator[tuple[int, int]]:
        return panels(0, len(self.x), self.tile[0])

    def columns(self, r0: int, r1: int, *, symmetric: bool = False) -> Iterator[tuple[int, int]]:
        """Column strips of a row panel that can count; if symmetric, the diagonal square and what is right of it."""
        if symmetric and self.pairing.counts(r0, r1, r0, r1):
            yield r0, r1
        for c0, c1 in panels(r1 if symmetric else 0, self.yt.shape[1], self.tile[1]):
            if self.pairing.counts(r0, r1, c0, c1):
                yield c0, c1

    def logits(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        tile = view(self._buffer, r1 - r0, c1 - c0)
        return torch.addmm(tile, self.x[r0:r1], self.yt[:, c0:c1], beta=0, alpha=self.unit, out=tile)

    def exponentials(self, r0: int, r1: int, c0: int, c1: int) -> Tensor:
        return self.pairing.fill_(self.logits(r0, r1, c0, c1).exp2_(), r0, r1, c0, c1, 0)


def view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows * columns entries of a flat buffer as a matrix."""
    return buffer[: rows * columns].view(rows, columns)


def rows_forward(
    x: Tensor, y: Tensor, pairing: Pairing, tile: Tile, log_weight: LogWeight | None = None
) -> Tensor:
    """Row-wise log-sum-exp of x @ y.T over the counting pairs, in float64; -inf for a row without any.

    In float64 because the backward subtracts it from logits that may be 1e3 times larger than what is left.
    """
    walk = _Walk(x, y, pairing, tile)
    lowest = torch.finfo(x.dtype).min
    result = x.new_empty(len(x), dtype=torch.float64)
    for r0, r1 in walk.rows():
        top, total = x.new_full((r1 - r0,), -torch.inf), x.new_zeros(r1 - r0)
        for c0, c1 in walk.columns(r0, r1):
            logits = walk.logits(r0, r1, c0, c1)
            if log_weight is not None:
                logits.add_(log_weight(r0, r1, c0, c1), alpha=LOG2E)
            pairing.fill_(logits, r0, r1, c0, c1, -torch.inf)
            new_top = torch.maximum(top, logits.amax(1))
            shift = new_top.clamp_min(lowest)  # a row that is -inf so far must not become nan
            total.mul_(torch.exp2(top - shift)).add_(logits.sub_(shift[:, None]).exp2_().sum(1))
            top = new_top
        result[r0:r1] = (top.double() + total.double().log2_()) * LN2
    return result


def rows_backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    log_sum: Tensor,
    pairing: Pairing,
    tile: Tile,
    *,
    need_x: bool = True,
    need_y: bool = True,
    log_weight: LogWeight | None = None,
    weight_gradient: Callable[[int, int, int, int, Tensor], None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of :func:`rows_forward`: with P = softmax over a row, dx = g (P y) and dy = P^T (g x)."""
    walk = _Walk(x, y, pairing, tile)
    dx = torch.zeros_like(x) if need_x else None
    dy = torch.zeros_like(y) if need_y else None
    # An empty row has log-sum-exp -inf and no gradient: +inf makes its exponentials zero.
    exact = torch.where(log_sum == -torch.inf, torch.inf, log_sum.double() * LOG2E)
    level = exact.to(x.dtype)
    # What rounding the level took from it goes to the gradient, as a factor.
    rest = torch.where(exact.isinf(), 0, exact - level.double())
    gradient = (gradient.double() * torch.exp2(-rest)).to(x.dtype)
    for r0, r1 in walk.rows():
        scaled = x[r0:r1] * gradient[r0:r1, None] if need_y else x
        for c0, c1 in walk.columns(r0, r1):
            logits = walk.logits(r0, r1, c0, c1)
            if log_weight is not None:
                logits.add_(log_weight(r0, r1, c0, c1), alpha=LOG2E)
            share = pairing.fill_(logits.sub_(level[r0:r1, None]).exp2_(), r0, r1, c0, c1, 0)
            if dx is not None:
                dx[r0:r1].addmm_(share, y[c0:c1])
            if dy is not None:
                dy[c0:c1].addmm_(share.t(), scaled)
            if weight_gradient is not None:
                weight_gradient(r0, r1, c0, c1, share.mul_(gradient[r0:r1, None]))
        if dx is not None:
            dx[r0:r1].mul_(gradient[r0:r1, None])
    return dx, dy


def nearest(x: Tensor, y: Tensor, pairing: Pairing, tile: Tile) -> Tensor:
    """Number of the counting column with the largest product for each row, the first of equal ones; -1 without any."""
    walk = _Walk(x, y, pairing, tile, unit=1.0)
    best = x.new_full((len(x),), -torch.inf)
    index = torch.full_like(best, -1, dtype=torch.int64)
    for r0, r1 in walk.rows():
        for c0, c1 in walk.columns(r0, r1):
            products = pairing.fill_(walk.logits(r0, r1, c0, c1), r0, r1, c0, c1, -torch.inf)
            top, place = products.max(1)
            index[r0:r1] = torch.where(top > best[r0:r1], place + c0, index[r0:r1])
            torch.maximum(best[r0:r1], top, out=best[r0:r1])
    return index


def expected_forward(x: Tensor, y: Tensor, pairing: Pairing, tile: Tile) -> tuple[Tensor, Tensor]:
    """As :func:`rows_forward`, and the mean of a row's logits under its softmax; 0 for a row without any."""
    walk = _Walk(x, y, pairing, tile)
    scratch, lowest = walk.scratch(), torch.finfo(x.dtype).min
    log_sum = x.new_empty(len(x), dtype=torch.float64)
    expected = torch.empty_like(log_sum)
    for r0, r1 in walk.rows():
        top, total = x.new_full((r1 - r0,), -torch.inf), x.new_zeros(r1 - r0)
        moment = torch.zeros_like(total)  # sum of the exponentials times what their logits lie below the top
        for c0, c1 in walk.columns(r0, r1):
            logits = pairing.fill_(walk.logits(r0, r1, c0, c1), r0, r1, c0, c1, -torch.inf)
            new_top = torch.maximum(top, logits.amax(1))
            shift = new_top.clamp_min(lowest)
            below = (top - shift).clamp_min_(lowest)
            moment.addcmul_(total, below).mul_(below.exp2())
            total.mul_(below.exp2())
            logits.sub_(shift[:, None])
            exponentials = torch.exp2(logits, out=view(scratch, *logits.shape))
            total.add_(exponentials.sum(1))
            # 0 times -inf is no number
            moment.add_(pairing.fill_(logits, r0, r1, c0, c1, 0).mul_(exponentials).sum(1))
            top = new_top
        log_sum[r0:r1] = (top.double() + total.double().log2()) * LN2
        mean = (top.double() + moment.double() / total) * LN2
        expected[r0:r1] = torch.where(total > 0, mean, 0)
    return log_sum, expected


def expected_backward(
    log_sum_gradient: Tensor,
    expected_gradient: Tensor,
    x: Tensor,
    y: Tensor,
    log_sum: Tensor,
    expected: Tensor,
    pairing: Pairing,
    tile: Tile,
    *,
    need_x: bool = True,
    need_y: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of :func:`expected_forward`: dx = W y, dy = W^T x, W_ij = P_ij (g_i + h_i (1 + logit_ij - e_i))."""
    walk = _Walk(x, y, pairing, tile)
    scratch = walk.scratch()
    dx = torch.zeros_like(x) if need_x else None
    dy = torch.zeros_like(y) if need_y else None
    # An empty row's entries are all overwritten, so any finite level will do.
    exact = torch.where(log_sum == -torch.inf, 0, log_sum.double() * LOG2E)
    level = exact.to(x.dtype)
    rest = exact - level.double()
    factor = torch.exp2(-rest)
    # With s = log2 P, logit - expected = (s - rest) ln 2 + (log_sum - expected).
    slope = (expected_gradient.double() * factor * LN2).to(x.dtype)
    distance = 1 + exact * LN2 - expected.double() - rest * LN2
    constant = ((log_sum_gradient.double() + expected_gradient.double() * distance) * factor).to(x.dtype)
    for r0, r1 in walk.rows():
        for c0, c1 in walk.columns(r0, r1):
            logits = walk.logits(r0, r1, c0, c1).sub_(level[r0:r1, None])
            share = torch.exp2(logits, out=view(scratch, *logits.shape))
            pairing.fill_(share, r0, r1, c0, c1, 0)
            weight = logits.mul_(slope[r0:r1, None]).add_(constant[r0:r1, None]).mul_(share)
            if dx is not None:
                dx[r0:r1].addmm_(weight, y[c0:c1])
            if dy is not None:
                dy[c0:c1].addmm_(weight.t(), x[r0:r1])
    return dx, dy


def joined(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and mean logit of two sets of columns together, from those of each; differentiable."""
    log_sum = torch.logaddexp(one[0], other[0])
    share = torch.where(log_sum == -torch.inf, 0, torch.exp(one[0] - log_sum))
    return log_sum, torch.lerp(other[1], one[1], share)


def shared_forward(
    x: Tensor, y: Tensor, pairing: Pairing, tile: Tile, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of x @ y.T along rows and along columns, in float64.

    ``symmetric`` says that y is x and that the pairing is symmetric: then the upper triangle is enough.
    """
    walk = _Walk(x, y, pairing, tile)
    row_sum = x.new_zeros(len(x))
    column_sum = row_sum if symmetric else x.new_zeros(len(y))
    for r0, r1 in walk.rows():
        for c0, c1 in walk.columns(r0, r1, symmetric=symmetric):
            exponentials = walk.exponentials(r0, r1, c0, c1)
            row_sum[r0:r1] += exponentials.sum(1)
            if not (symmetric and c0 == r0):
                column_sum[c0:c1] += exponentials.sum(0)
    rows = row_sum.double().log_()
    return rows, rows if symmetric else column_sum.double().log_()


def shared_backward(
    row_gradient: Tensor,
    column_gradient: Tensor | None,
    x: Tensor,
    y: Tensor,
    row_log_sum: Tensor,
    column_log_sum: Tensor | None,
    pairing: Pairing,
    tile: Tile,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`shared_forward`: W_ij = E_ij (u_i + v_j) with u, v = gradient / sum; dx = W y, dy = W^T x.

    If symmetric, the column arguments are None and both results are the one gradient.
    """
    walk = _Walk(x, y, pairing, tile)
    scratch = walk.scratch()
    u = _per_sum(row_gradient, row_log_sum, x.dtype)
    v = u if symmetric else _per_sum(column_gradient, column_log_sum, x.dtype)
    dx = torch.zeros_like(x)
    dy = dx if symmetric else torch.zeros_like(y)
    for r0, r1 in walk.rows():
        for c0, c1 in walk.columns(r0, r1, symmetric=symmetric):
            weight = view(scratch, r1 - r0, c1 - c0)
            torch.add(u[r0:r1, None], v[None, c0:c1], out=weight)
            weight.mul_(walk.exponentials(r0, r1, c0, c1))
            dx[r0:r1].addmm_(weight, y[c0:c1])
            if not (symmetric and c0 == r0):  # the square on the diagonal holds both of its halves
                dy[c0:c1].addmm_(weight.t(), x[r0:r1])
    return dx, dy


def kept_forward(x: Tensor, y: Tensor, pairing: Pairing, *, shift: bool) -> tuple[Tensor, Tensor]:
    """The whole matrix of exponentials for a backward without recomputation, and each row's shift in log 2.

    Unshifted, for logits that are safe, it serves rows and columns; shifted by the row's maximum, its rows alone.
    """
    n, m = x.shape[0], y.shape[0]
    logits = x.new_empty(n, m)
    torch.addmm(logits, x, y.t(), beta=0, alpha=LOG2E, out=logits)
    if not shift or not m:
        return pairing.fill_(logits.exp2_(), 0, n, 0, m, 0), x.new_zeros(())
    pairing.fill_(logits, 0, n, 0, m, -torch.inf)
    top = logits.amax(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).min)
    return logits.sub_(top).exp2_(), top[:, 0]


def kept_backward(
    u: Tensor | None, v: Tensor | None, x: Tensor, y: Tensor, kept: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As :func:`shared_backward` from kept exponentials, with u, v = gradient / sum (None: no gradient there).

    If the exponentials are symmetric and u equals v, so is W, and the first result alone is the whole gradient.
    """
    panel = default_tile(x.device)[0]
    scratch = x.new_empty(min(panel, x.shape[0]), y.shape[0])
    dx = torch.empty_like(x) if need[0] else None
    dy = torch.zeros_like(y) if need[1] else None
    for r0, r1 in panels(0, x.shape[0], panel):
        weight = scratch[: r1 - r0]
        if u is None or v is None:
            torch.mul(kept[r0:r1], v[None] if u is None else u[r0:r1, None], out=weight)  # type: ignore[index]
        else:
            torch.add(u[r0:r1, None], v[None], out=weight)
            weight.mul_(kept[r0:r1])
        if dx is not None:
            torch.mm(weight, y, out=dx[r0:r1])
        if dy is not None:
            dy.addmm_(weight.t(), x[r0:r1])
    return dx, dy


def _per_sum(gradient: Tensor | None, log_sum: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Gradient over sum, from the log-sum; zero where there was nothing to sum."""
    assert gradient is not None
    assert log_sum is not None
    return torch.where(log_sum == -torch.inf, 0, gradient.double() * torch.exp(-log_sum)).to(dtype)


def softplus_forward(x: Tensor, y: Tensor, offset: Tensor, pairing: Pairing, tile: Tile) -> Tensor:
    """Row-wise sum of softplus(x @ y.T + offset) over the counting pairs."""
    walk = _Walk(x, y, pairing, tile, unit=1.0)
    scratch = walk.scratch()
    result = x.new_zeros(len(x))
    for r0, r1 in walk.rows():
        for c0, c1 in walk.columns(r0, r1):
            margin = pairing.fill_(
                walk.logits(r0, r1, c0, c1).add_(offset[r0:r1, None]), r0, r1, c0, c1, -torch.inf
            )
            # max(v, 0) + log1p(exp(-|v|)), exact at both ends
            rest = torch.abs(margin, out=view(scratch, r1 - r0, c1 - c0)).mul_(-LOG2E).exp2_().log1p_()
            result[r0:r1] += margin.clamp_min_(0).add_(rest).sum(1)
    return result


def softplus_backward(
    gradient: Tensor, x: Tensor, y: Tensor, offset: Tensor, pairing: Pairing, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`softplus_forward` for x, y and offset: with P = sigmoid, dx = g (P y), dy = P^T (g x)."""
    walk = _Walk(x, y, pairing, tile, unit=1.0)
    dx, dy, doffset = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(offset)
    for r0, r1 in walk.rows():
        scaled = x[r0:r1] * gradient[r0:r1, None]
        for c0, c1 in walk.columns(r0, r1):
            margin = walk.logits(r0, r1, c0, c1).add_(offset[r0:r1, None])
            share = pairing.fill_(margin.sigmoid_(), r0, r1, c0, c1, 0)
            dx[r0:r1].addmm_(share, y[c0:c1])
            dy[c0:c1].addmm_(share.t(), scaled)
            doffset[r0:r1] += share.sum(1)
        dx[r0:r1].mul_(gradient[r0:r1, None])
    return dx, dy, doffset.mul_(gradient)
