"""Negatives weighted by how likely they are true ones, which a mixture of two Beta distributions tells (ProGCL).

Similar nodes are mostly of one class, so the most similar negatives are mostly false. Of the two components that are
fitted to the similarities of nodes, the lower one is that of the true negatives.

It lives here and not in the core because the loss carries what was fitted from step to step: it is half a method. All
that is heavy in it, the weighted log-sum-exp, is the core's.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks
from cl_core._types import Reduction
from cl_core.losses import TwoViewLoss
from cl_core.losses._common import reduce
from cl_core.losses.nt_xent import nt_xent_loss
from cl_core.similarity import (
    cross_log_sum_exp,
    row_products,
    scaled_rows,
    self_log_sum_exp,
)

Mode = Literal["weight", "mix"]

# Shares, densities and variances from below, so that none is divided by or has no logarithm.
_TINY = 1e-12
_LEAST_VARIANCE = 1e-8
# Negatives of each node whose similarities the mixture is fitted to, as published.
_SAMPLED = 100
# Entries of a panel of similarities: on the CPU about six such matrices exist at a time.
_ENTRIES = {"cpu": 2**20}
_MORE_ENTRIES = 2**25


class BetaMixture(NamedTuple):
    """Two Beta distributions and their shares; component 0 is that of the true negatives.

    Attributes:
        alphas: shape (2,).
        betas: shape (2,).
        weights: shape (2,), of sum 1.
    """

    alphas: Tensor
    betas: Tensor
    weights: Tensor

    def log_odds(self) -> LogOdds:
        """How much likelier component 1 is than component 0, of numbers as they come in a tile."""
        a, b, w = (part.double() for part in self)
        constant = w.log() - (a.lgamma() + b.lgamma() - (a + b).lgamma())
        return LogOdds(*((part[1] - part[0]).item() for part in (constant, a, b)))


class LogOdds(NamedTuple):
    """The logarithm c + a log x + b log(1 - x)."""

    constant: float
    of_x: float
    of_rest: float

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Of x in [0, 1], of any shape."""
        edge = _edge(x.dtype)
        x = x.clamp(edge, 1 - edge)
        return self.constant + self.of_x * x.log() + self.of_rest * (-x).log1p()

    @torch.no_grad()
    def log_weights(self, cosines: Tensor) -> Tensor:
        """Logarithm of 2 B, B = P(component 0 | x) x, with x = (cosine + 1) / 2, of any shape; constant to autograd.

        Only ratios of weights matter, so the factor stays. Each entry of the matrix of similarities comes through here
        several times a step, so it is in few passes.
        """
        edge = _edge(cosines.dtype)
        cosines = cosines.clamp(edge - 1, 1 - edge)
        log_x = cosines.log1p()
        odds = cosines.neg_().log1p_().mul_(self.of_rest).add_(log_x, alpha=self.of_x)
        odds.add_(self.constant - (self.of_x + self.of_rest) * math.log(2))
        return log_x.sub_(F.softplus(odds))


def _edge(dtype: torch.dtype) -> float:
    """How near to the ends of an interval a number may lie."""
    return max(_TINY, torch.finfo(dtype).eps)


def fit_beta_mixture(x: Tensor, *, false_share: float = 0.05, steps: int = 10) -> BetaMixture:
    """Fit a mixture of two Beta distributions by expectation maximisation.

    From Beta(1, 2) and Beta(2, 1) of shares 1 - f and f, a step takes the shares r_k of each entry in both components,
    and of each component the weighted mean m and variance v:

        alpha = m (m (1 - m) / v - 1),   beta = alpha (1 - m) / m,   weight = mean r_k

    The upper component keeps beta at 1.01 where it would fall below 1, so that it falls towards 1 as well.

    Args:
        x: in [0, 1], shape (N,), N >= 2.
        false_share: f, in (0, 1). From far too small a share it ends with one component for nearly all entries.
        steps: how many.

    Returns:
        The mixture, in float64.

    Raises:
        ValueError: for entries or numbers out of range.

    Cost: O(steps N).

    Reference: Xia et al., "ProGCL: Rethinking Hard Negative Mining in Graph Contrastive Learning", ICML 2022,
    arXiv 2110.02027. Where all entries are equal, which leaves the authors' without numbers, v is taken to be 1e-8.
    """
    if not isinstance(x, Tensor) or x.ndim != 1 or len(x) < 2:
        raise ValueError(
            f"x must have shape (N,), N >= 2, got {tuple(x.shape) if isinstance(x, Tensor) else x!r:.40}."
        )
    _checks.shares("x", x)
    _check_share(false_share)
    _checks.count("steps", steps)
    x = x.detach().double().clamp(_TINY, 1 - _TINY)
    log_x, log_rest = x.log(), (-x).log1p()
    alphas, betas, weights = x.new_tensor([[1, 2], [2, 1], [1 - false_share, false_share]])
    for _ in range(steps):
        shares = torch.stack(
            [
                (
                    w.log()
                    - (a.lgamma() + b.lgamma() - (a + b).lgamma())
                    + (a - 1) * log_x
                    + (b - 1) * log_rest
                )
                for a, b, w in zip(alphas, betas, weights, strict=True)
            ]
        )
        shares = shares.exp_().clamp_min_(_TINY)
        shares /= shares.sum(0)
        total = shares.sum(1)
        mean = (shares @ x) / total
        off = (x - mean[:, None]).square_()
        variance = ((shares * off).sum(1) / total).clamp_min(_LEAST_VARIANCE)
        alphas = (mean * (mean * (1 - mean) / variance - 1)).clamp_min(_LEAST_VARIANCE)
        betas = alphas * (1 - mean) / mean
        if betas[1] < 1:
            betas[1] = 1.01
        weights = total / len(x)
    return BetaMixture(alphas, betas, weights)


def mixture_nce_loss(
    z1: Tensor,
    z2: Tensor,
    mixtures: tuple[BetaMixture, BetaMixture],
    *,
    temperature: float = 0.5,
    mode: Mode = "weight",
    mixed: int = 1000,
    permutation: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """NT-Xent of two views whose negatives are weighted, or joined by mixed ones, by how likely they are true.

    For node i of view 1, with unit rows u and v of the views, s_ij = u_i . v_j, t_ij = u_i . u_j, and weights of
    pairs of different nodes, constant to autograd,

        B_ij = P(true negative | x_ij) x_ij,   x_ij = (s_ij + 1) / 2

    ``"weight"``:   l_i = -log e^(s_ii/T) / ( e^(s_ii/T) + sum_j (e^(s_ij/T) + e^(t_ij/T)) B_ij / mean_j B_ij )

    ``"mix"``: of the ``mixed`` negatives of largest B in falling order, with cosines c and weights b, and in a random
    order shared by all nodes, with c' and b', the cosines (c b + c' b') / (b + b') join the negatives of NT-Xent.

    For node i of view 2 likewise, with the other mixture and the views exchanged.

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D).
        mixtures: of the similarities of view 1 with view 2, and of view 2 with view 1.
        temperature: T > 0.
        mode: ``"weight"`` or ``"mix"``.
        mixed: negatives of a node that are mixed; no more than there are.
        permutation: the random order, shape (min(mixed, N - 1),); None draws one.
        reduction: ``"mean"`` over the 2 N anchors, ``"sum"``, or ``"none"`` for shape (2 N,), view 1 first.

    Returns:
        Scalar, or shape (2 N,). float32 for half inputs. A batch of one has nothing to compare: zero.

    Raises:
        ValueError: if shapes or options do not fit.

    Cost: O(N^2 D) time, a few times that of NT-Xent; O(N D) memory beyond a few thousand rows, and
    O(N mixed) to mix.

    Reference: Xia et al., "ProGCL: Rethinking Hard Negative Mining in Graph Contrastive Learning", ICML 2022,
    arXiv 2110.02027.
    """
    _checks.embeddings("z1", z1)
    _checks.embeddings("z2", z2)
    _checks.same_shape(z1=z1, z2=z2)
    _checks.temperature("temperature", temperature)
    _checks.choice("mode", mode, get_args(Mode))
    _checks.count("mixed", mixed)
    _checks.reduction(reduction)
    if len(z1) < 2:
        return nt_xent_loss(z1, z2, temperature=temperature, reduction=reduction)
    u1, u2 = (scaled_rows(z, source=z.dtype) for z in (z1, z2))
    positives = row_products(u1, u2) / temperature
    sides = ((u1, u2, mixtures[0]), (u2, u1, mixtures[1]))
    if mode == "weight":
        log_negatives = [_weighted(*side, temperature) for side in sides]
    else:
        rows = torch.stack([u1, u2], 1).flatten(0, 1) * temperature**-0.5  # so that a node's are side by side
        plain = self_log_sum_exp(rows, group_size=2, bound=1 / temperature).view(-1, 2).unbind(1)
        count = min(mixed, len(z1) - 1)
        order = torch.randperm(count, device=z1.device) if permutation is None else permutation
        if order.shape != (count,):
            raise ValueError(f"permutation must have shape ({count},), got {tuple(order.shape)}.")
        log_negatives = [
            torch.logaddexp(of_side, _mixed(*side, order, temperature))
            for side, of_side in zip(sides, plain, strict=True)
        ]
    return reduce(
        torch.cat([F.softplus(of_side - positives, threshold=60) for of_side in log_negatives]), reduction
    )


def _weighted(anchors: Tensor, others: Tensor, mixture: BetaMixture, temperature: float) -> Tensor:
    """Log-sum-exp of the weighted logits of anchors with the other nodes of both views, unit rows, shape (N,)."""
    rows, columns = anchors.detach(), others.detach()
    nodes, odds = torch.arange(len(rows), device=rows.device), mixture.log_odds()

    def log_weight(row: Tensor, column: Tensor) -> Tensor:
        return odds.log_weights(_cosines(rows[row], columns[column]))

    def log_weight_of_both(row: Tensor, column: Tensor) -> Tensor:
        # A tile's first column is even, and so is its width: it holds whole nodes, each weighed once for both views.
        return log_weight(row, column[::2] // 2).repeat_interleave(2, dim=1)

    # Without any similarity the log-sum-exp is that of the weights alone.
    nothing = rows.new_zeros(len(rows), 1)
    log_total = cross_log_sum_exp(nothing, nothing, over="different", log_weight=log_weight)
    log_sum = cross_log_sum_exp(
        anchors / temperature,
        torch.stack([others, anchors], 1).flatten(0, 1),
        row_keys=nodes,
        column_keys=nodes.repeat_interleave(2),
        over="different",
        log_weight=log_weight_of_both,
    )
    return log_sum - (log_total - torch.as_tensor(len(rows) - 1, dtype=rows.dtype).log())


def _mixed(
    anchors: Tensor, others: Tensor, mixture: BetaMixture, order: Tensor, temperature: float
) -> Tensor:
    """Log-sum-exp of the logits of anchors with mixed negatives, shape (N,)."""
    cosines, weights = _Hardest.apply(anchors, others, mixture, len(order))
    weights_too = weights[:, order]
    cosines = (cosines * weights + cosines[:, order] * weights_too) / (weights + weights_too + _TINY)
    return (cosines / temperature).logsumexp(1)


def _cosines(rows: Tensor, columns: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T


class _Hardest(torch.autograd.Function):
    """Cosines (N, k) of each row with the k others of largest weight, in falling order, and the weights.

    Some rows' cosines with all others exist at a time, in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, mixture: BetaMixture, count: int
    ) -> tuple[Tensor, Tensor]:
        cosines, weights = rows.new_empty(len(rows), count), rows.new_empty(len(rows), count)
        places = torch.empty(len(rows), count, dtype=torch.int32, device=rows.device)
        height, odds = _height(columns), mixture.log_odds()
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            of_part = _cosines(rows[part], columns)
            log_weights = odds.log_weights(of_part)
            log_weights.diagonal(start).fill_(-torch.inf)
            hardest, place = log_weights.topk(count, dim=1)
            weights[part], places[part] = hardest.exp_(), place
            torch.gather(of_part, 1, place, out=cosines[part])
        ctx.save_for_backward(rows, columns, places)
        ctx.mark_non_differentiable(weights)
        return cosines, weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, columns, places = ctx.saved_tensors
        of_rows, of_columns = torch.empty_like(rows), torch.zeros_like(columns)
        height = _height(columns)
        for start in range(0, len(rows), height):
            part = slice(start, start + height)
            spread = rows.new_zeros(len(rows[part]), len(columns))
            spread.scatter_(1, places[part].long(), gradient[part])
            torch.mm(spread, columns, out=of_rows[part])
            of_columns.addmm_(spread.T, rows[part])
        return of_rows, of_columns, None, None


def _height(columns: Tensor) -> int:
    """Rows of a panel."""
    return max(1, _ENTRIES.get(columns.device.type, _MORE_ENTRIES) // len(columns))


class MixtureNCELoss(TwoViewLoss):
    """Module form of :func:`mixture_nce_loss`, with the mixtures; NT-Xent until they are fitted.

    The mixtures are frozen once :meth:`fit` has fitted them, in buffers. The weights are not: each call works them out
    from the mixtures and the similarities it has, tile by tile. The authors' code keeps the weights of one step too,
    n x n numbers, of one pair of random views. That fits only nodes that are all compared in each step, and grows old
    as the nodes move; here a node is weighed by where it is, alone or with all others, and nothing is kept of it. One
    mixture stands for view 1 with view 2 and one for the converse; in the authors' code the second takes the place of
    the first.

    Args:
        temperature: T > 0.
        mode: ``"weight"`` or ``"mix"``.
        mixed: negatives of a node that are mixed; no more than there are.
        false_share: share of false negatives that the fit starts from; published are 0.05, and 0.15 on Amazon Photo.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    alphas: Tensor
    betas: Tensor
    weights: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        mode: Mode = "weight",
        mixed: int = 1000,
        false_share: float = 0.05,
        reduction: Reduction = "mean",
    ) -> None:
        _checks.choice("mode", mode, get_args(Mode))
        _checks.count("mixed", mixed)
        _check_share(false_share)
        super().__init__(
            temperature=temperature, mode=mode, mixed=mixed, false_share=false_share, reduction=reduction
        )
        for name in BetaMixture._fields:
            self.register_buffer(name, torch.zeros(2, 2))  # by direction, then component

    @property
    def fitted(self) -> bool:
        """Whether there are mixtures."""
        return bool(self.weights.any())

    @property
    def mixtures(self) -> tuple[BetaMixture, BetaMixture]:
        """Of view 1 with view 2, and of view 2 with view 1."""
        first, second = zip(self.alphas, self.betas, self.weights, strict=True)
        return BetaMixture(*first), BetaMixture(*second)

    @torch.no_grad()
    def fit(self, z1: Tensor, z2: Tensor) -> None:
        """Fit the mixtures to the similarities of each node with 100 random others, shape (N, D) each, N >= 2."""
        _checks.embeddings("z1", z1, at_least=2)
        _checks.embeddings("z2", z2, at_least=2)
        _checks.same_shape(z1=z1, z2=z2)
        u1, u2 = (scaled_rows(z, source=z.dtype) for z in (z1, z2))
        for direction, (rows, columns) in enumerate(((u1, u2), (u2, u1))):
            x = ((1 + _other_cosines(rows, columns)) / 2).clamp(0, 1)
            for buffer, values in zip(
                (self.alphas, self.betas, self.weights),
                fit_beta_mixture(x, false_share=self.false_share),
                strict=True,
            ):
                buffer[direction] = values

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        if not self.fitted:
            return nt_xent_loss(z1, z2, temperature=self.temperature, reduction=self.reduction)
        options = {name: getattr(self, name) for name in ("temperature", "mode", "mixed", "reduction")}
        return mixture_nce_loss(z1, z2, self.mixtures, **options)


def _other_cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines of each row with some other columns, the same for all but for their own, as a vector."""
    drawn = torch.randperm(len(rows) - 1, device=rows.device)[:_SAMPLED]
    own = torch.arange(len(rows), device=rows.device)[:, None]
    # Column c of those without the own one is c before it and c + 1 from it on.
    return torch.where(
        drawn < own, _cosines(rows, columns[drawn]), _cosines(rows, columns[drawn + 1])
    ).flatten()


def _check_share(false_share: float) -> None:
    _checks.positive("false_share", false_share)
    if isinstance(false_share, Tensor) or false_share >= 1:
        raise ValueError(f"false_share must be in (0, 1), got {false_share}.")
