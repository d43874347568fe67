"""What SwAV's loss computes with: codes balanced over prototypes, and the cross entropy of predictions with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _rows, similarity
from cl_core.distributed import Shard

# Of logits: so far apart that factors of rows and columns, and sums of thousands of rows, stay normal numbers.
_NARROW = {torch.float32: 70.0, torch.float64: 600.0}
_PIECE = 2**16  # entries of the scores that are worked on at once, so that they stay in the cache


def balanced_codes(scores: Tensor, epsilon: float, iterations: int, split: Shard) -> Tensor:
    """What :func:`cl_core.losses.clustering.sinkhorn` returns, of scores that are checked."""
    with torch.no_grad():
        scores = similarity.at_least_float32(scores)
        alone = split.group is None and scores.device.type == "cpu" and not torch.compiler.is_compiling()
        if alone:  # elsewhere to look at the range would be a message, or a wait for the device
            low, high = scores.aminmax()
            if float(high - low) <= _NARROW[scores.dtype] * epsilon:
                with torch.autocast("cpu", enabled=False):  # which would round the products
                    return _scaled_codes(scores, high, epsilon, iterations)
        logits = scores / epsilon
        one_each = replace(split, counts=(1,) * split.world_size)
        for _ in range(iterations):
            log_sums = one_each.gather(logits.logsumexp(0, keepdim=True))
            logits = (logits - log_sums.logsumexp(0)).log_softmax(1)
        return logits.exp()


def _scaled_codes(scores: Tensor, high: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The same by one factor a row and one a column, which takes one exponential an entry."""
    codes = torch.empty_like(scores)
    pieces = list(_rows.tiles(len(scores), max(1, _PIECE // scores.shape[1])))
    for part in pieces:
        torch.sub(scores[part], high, out=codes[part]).div_(epsilon).exp_()
    # Of a column; any number would do, but with others the factors drift apart.
    share = len(codes) / codes.shape[1]
    rows = codes.new_ones(len(codes))
    for _ in range(iterations):
        columns = share / (rows @ codes)
        rows = (codes @ columns).reciprocal_()
    for part in pieces:
        codes[part].mul_(columns).mul_(rows[part, None])
    return codes


def cross_entropy(
    scores: Tensor, target: Tensor, temperature: float | Tensor, mass: int, *, spent: bool
) -> Tensor:
    """-sum_k q_k log softmax_k(s / T) of each row, shape (N,), for constant targets q whose rows sum to ``mass``.

    A target that is ``spent`` is wanted no more: it may be written over.
    """
    if isinstance(temperature, Tensor) or torch.compiler.is_compiling():
        return -similarity.row_products(target, F.log_softmax(scores / temperature, 1))
    residual = target if spent else torch.empty_like(target)
    return _CrossEntropy.apply(scores, target, residual, 1 / temperature, mass)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made along with the value, some rows at a time: one exponential an entry, and one matrix kept."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, target: Tensor, residual: Tensor, scale: float, mass: int
    ) -> Tensor:
        products, totals = scores.new_empty(len(scores)), scores.new_empty(len(scores), 1)
        for part in _rows.tiles(len(scores), max(1, _PIECE // scores.shape[1])):
            logits = scores[part] * scale
            logits -= logits.amax(1, keepdim=True)
            products[part] = similarity.row_products(target[part], logits)
            torch.sum(logits.exp_(), 1, keepdim=True, out=totals[part])
            torch.sub(logits.mul_(mass / totals[part]), target[part], out=residual[part])
        ctx.save_for_backward(scores, residual)
        ctx.scale, ctx.mass = scale, mass
        return mass * totals[:, 0].log() - products

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, residual = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more: a softmax, less a constant
            softmax = ctx.mass * (scores * ctx.scale).softmax(1)
            residual = softmax + (residual - softmax.detach())
        return (ctx.scale * gradients[0])[:, None] * residual, None, None, None, None
