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
    share = (
        len(codes) / codes.shape[1]
    )  # of a column; any number would do, but with others the factors drift apart
    rows = codes.new_ones(len(codes))
    for _ in range(iterations):
        columns = share / (rows @ codes)
        rows = (codes @ columns).reciprocal_()
    for part in pieces:
        codes[part].mul_(columns).mul_(rows[part, None])
    return codes


def cross_entropy(scores: Tensor, target: Tensor, temperature: float | Tensor, mass: int) -> Tensor:
    """-sum_k q_k log softmax_k(s / T) of each row, shape (N,), for constant targets q whose rows sum to ``mass``."""
    if isinstance(temperature, Tensor) or torch.compiler.is_compiling():
        return -similarity.row_products(target, F.log_softmax(scores / temperature, 1))
    return _CrossEntropy.apply(scores, target, 1 / temperature, mass)  # type: ignore[no-any-return]


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made along with the value, some rows at a time: one exponential an entry, and one matrix kept."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, target: Tensor, scale: float, mass: int) -> Tensor:
        values, residual = scores.new_empty(len(scores)), torch.empty_like(scores)
        for part in _rows.tiles(len(scores), max(1, _PIECE // scores.shape[1])):
            logits = scores[part] * scale
            logits -= logits.amax(1, keepdim=True)
            products = similarity.row_products(target[part], logits)
            total = logits.exp_().sum(1, keepdim=True)
            values[part] = mass * total.log()[:, 0] - products
            torch.sub(logits.mul_(mass / total), target[part], out=residual[part])
        ctx.save_for_backward(scores, target, residual)
        ctx.scale, ctx.mass = scale, mass
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, target, residual = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            residual = ctx.mass * (scores * ctx.scale).softmax(1) - target
        return (ctx.scale * gradients[0])[:, None] * residual, None, None, None
