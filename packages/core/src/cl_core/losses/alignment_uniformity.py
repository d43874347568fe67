"""Alignment and uniformity: views of a sample close together, all rows spread over the sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_core import _checks, _ring, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import shard
from cl_core.losses._base import EmbeddingLoss, TwoViewLoss
from cl_core.losses._common import check_rows, reduce


def alignment_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    alpha: float = 2.0,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Distance between the two views of a sample, to a power.

        l_i = |u1_i - u2_i|^alpha,   u = z / |z|

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        alpha: exponent > 0; 2 gives 2 - 2 cos.
        normalize: scale rows to unit length first.
        reduction: "mean" over the N samples, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Equal views have a zero gradient, also
        where the power has none (alpha <= 1).

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or alpha <= 0.

    Cost: O(N D).
    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere", ICML 2020, arXiv 2005.10242.
    """
    _checks.reduction(reduction)
    _checks.positive("alpha", alpha)
    check_rows(group, z1=z1, z2=z2)
    _checks.same_shape(z1=z1, z2=z2)
    rows = [similarity.scaled_rows(z, normalize=normalize) for z in (z1, z2)]
    squared = (rows[0] - rows[1]).square().sum(1)
    if alpha != 2:
        apart = squared > 0
        squared = torch.where(apart, torch.where(apart, squared, 1).pow(alpha / 2), 0)
    return reduce(squared, reduction, split=shard(z1, group))


def uniformity_loss(
    z: Tensor, *, t: float = 2.0, normalize: bool = True, group: Group = None, impl: Impl = "auto"
) -> Tensor:
    r"""Logarithm of the mean Gaussian potential of pairs of rows.

        L = log( 1 / (N (N - 1)) sum_{i != j} exp(-t |u_i - u_j|^2) ),   u = z / |z|

    0 where all rows are equal, at least -4 t. The logarithm stands outside the mean, so there is no value per row and
    no ``reduction``. The usual sum with alignment takes the mean of it over the two views.

    Args:
        z: embeddings, shape (N, D), N >= 2 over all ranks.
        t: sharpness > 0.
        normalize: scale rows to unit length first. False takes the rows as they are: a Gaussian kernel between any
            rows, in twice the time.
        group: process group whose other rows take part; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there are fewer than 2 rows, a value is not finite, or t <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on
    the Hypersphere", ICML 2020, arXiv 2005.10242. A zero row counts as orthogonal to all others.
    """
    _checks.positive("t", t)
    _checks.impl(impl)
    check_rows(group, z=z)
    split = shard(z, group)
    if split.total < 2:
        raise ValueError(f"uniformity_loss needs at least 2 rows (it compares pairs), got {split.total}.")
    if not normalize:  # distances do not change, and squares far from the origin would cancel
        z = similarity.at_least_float32(z)
        z = z - (split.sum(z.detach().sum(0)) / split.total)
    # -t |u_i - u_j|^2 = 2 t u_i . u_j - t |u_i|^2 - t |u_j|^2, and for unit rows the squares are 1.
    rows = similarity.scaled_rows(z, scale=math.sqrt(2 * t), normalize=normalize)
    if normalize and split.group is None:
        potentials = similarity.self_log_sum_exp(rows, bound=2 * t, impl=impl) - 2 * t
    else:
        halves = rows.square().sum(1, keepdim=True) / 2 if not normalize else torch.full_like(rows[:, :1], t)
        own = torch.arange(split.offset, split.offset + len(rows), device=rows.device)
        potentials = _ring.log_sum_exp(
            torch.cat([rows, torch.ones_like(halves)], 1),
            torch.cat([rows, -halves], 1),
            split,
            row_keys=own,
            column_keys=own,
            over="different",
            impl=impl,
        )
        potentials = potentials - halves[:, 0]
    return split.gather(potentials).logsumexp(0) - math.log(split.total * (split.total - 1))


class AlignmentLoss(TwoViewLoss):
    """Module form of :func:`alignment_loss`.

    Args:
        alpha: exponent > 0.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        _checks.positive("alpha", alpha)
        super().__init__(alpha=alpha, normalize=normalize, reduction=reduction, group=group)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        return alignment_loss(z1, z2, **self.hyperparameters())


class UniformityLoss(EmbeddingLoss):
    """Module form of :func:`uniformity_loss`.

    Args:
        t: sharpness > 0.
        normalize: scale rows to unit length first.
        group: process group whose other rows take part: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self, t: float = 2.0, *, normalize: bool = True, group: Group = None, impl: Impl = "auto"
    ) -> None:
        _checks.positive("t", t)
        super().__init__(t=t, normalize=normalize, group=group, impl=impl)

    def forward(self, z: Tensor) -> Tensor:
        """Loss of embeddings (N, D)."""
        return uniformity_loss(z, **self.hyperparameters())
