"""Losses on features instead of pairs: Barlow Twins and VICReg compare the columns of two views, never the rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._dense import product
from cl_core._types import Group
from cl_core.distributed import Shard, shard
from cl_core.losses._base import TwoViewLoss
from cl_core.losses._common import check_rows
from cl_core.similarity import at_least_float32

_BATCH_NORM_EPS = 1e-5


def barlow_twins_loss(z1: Tensor, z2: Tensor, *, lambd: float = 0.005, group: Group = None) -> Tensor:
    r"""Cross-correlation of the features of two views, drawn to the identity.

    With a_nk = (z1_nk - mean_k) / sqrt(var_k + 1e-5), mean and (biased) variance of feature k over the batch, and b
    likewise from z2,

        C_kl = 1/N sum_n a_nk b_nl,    L = sum_k (1 - C_kk)^2 + lambd sum_{k != l} C_kl^2

    A sum over features, so it grows with D. There is no value per row, hence no ``reduction``.

    Args:
        z1: embeddings of view 1, shape (N, D), N >= 2 over all ranks.
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        lambd: weight >= 0 of the redundancy between features.
        group: process group over which the batch is spread: statistics are those of all its rows.

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there are fewer than 2 rows, shapes differ, a value is not finite, or lambd < 0.

    Cost: O(N D^2) time, O(D^2 + N D) memory.
    Reference: Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021,
    arXiv 2103.03230.
    """
    _checks.number("lambd", lambd, at_least=0)
    split = check_views(z1, z2, group, "barlow_twins_loss")
    standard = standardised(z1, z2, split, eps=_BATCH_NORM_EPS)
    correlation = split.sum(product(standard[0].t(), standard[1])) / split.total
    invariance = (1 - correlation.diagonal()).square().sum()
    return invariance + lambd * off_diagonal(correlation).square().sum()


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    sim_weight: float = 25.0,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    eps: float = 1e-4,
    group: Group = None,
) -> Tensor:
    r"""Variance, invariance and covariance: views agree, no feature dies, no two features say the same.

    With the (unbiased) covariance matrix S^v of view v over the batch,

        L = sim_weight / (N D) sum_nk (z1_nk - z2_nk)^2
          + var_weight / (2 D) sum_{v, k} max(0, 1 - sqrt(S^v_kk + eps))
          + cov_weight / D     sum_{v, k != l} (S^v_kl)^2

    The variance term is a mean over the two views, as in the authors' code; some libraries sum it, which is twice the
    ``var_weight`` here. There is no value per row, hence no ``reduction``.

    Args:
        z1: embeddings of view 1, shape (N, D), N >= 2 over all ranks.
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        sim_weight: weight >= 0 of the distance between views.
        var_weight: weight >= 0 of features whose standard deviation is below 1.
        cov_weight: weight >= 0 of the covariance between features.
        eps: added to variances, > 0; keeps the gradient finite where a feature is constant.
        group: process group over which the batch is spread: statistics are those of all its rows.

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there are fewer than 2 rows, shapes differ, a value is not finite or so large that the loss is
            not (in float32 from about 1e9 on), or a weight is out of range.

    Cost: O(N D^2) time, O(D^2 + N D) memory.
    Reference: Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
    ICLR 2022, arXiv 2105.04906.
    """
    _check_vicreg(sim_weight, var_weight, cov_weight, eps)
    split = check_views(z1, z2, group, "vicreg_loss")
    views = _centred(torch.stack([at_least_float32(z1), at_least_float32(z2)]), split)
    covariance = split.sum(product(views.mT, views)) / (split.total - 1)
    deviation = (covariance.diagonal(dim1=1, dim2=2) + eps).sqrt()
    distance = split.sum((at_least_float32(z1) - at_least_float32(z2)).square().sum())
    width = z1.shape[1]
    loss = (
        sim_weight * distance / (split.total * width)
        + var_weight * torch.relu(1 - deviation).mean()
        + cov_weight * off_diagonal(covariance).square().sum() / width
    )
    message = (
        f"z1 and z2 must be small enough for their squared covariances in {loss.dtype}, got larger values."
    )
    _checks.require(loss.detach().isfinite(), message)
    return loss


def check_views(z1: Tensor, z2: Tensor, group: Group, name: str) -> Shard:
    """Refuse two views that cannot be compared over the batch; how the batch is spread."""
    check_rows(group, z1=z1, z2=z2)
    _checks.same_shape(z1=z1, z2=z2)
    split = shard(z1, group)
    if split.total < 2:
        raise ValueError(
            f"{name} needs at least 2 rows (it compares features over the batch), got {split.total}."
        )
    return split


def standardised(z1: Tensor, z2: Tensor, split: Shard, *, eps: float, correction: int = 0) -> Tensor:
    """Both views, shape (2, N, D), each feature less its mean and divided by sqrt(variance + eps) over all ranks.

    The variance is over the number of rows less ``correction``.
    """
    views = torch.stack([at_least_float32(z1), at_least_float32(z2)])
    # The result does not depend on the unit of a feature, beside eps. In units of about its largest value, no sum and
    # no square overflows, nor does a power of the variance underflow in the backward; powers of 2 round nothing.
    unit = _largest(views, split).clamp(1, torch.finfo(views.dtype).max / 2).log2().floor().exp2()[:, None]
    views = _centred(views / unit, split)
    variance = split.sum(views.square().sum(1)) / (split.total - correction)
    return views * (variance + eps / unit[:, 0].square()).rsqrt()[:, None]


def _centred(views: Tensor, split: Shard) -> Tensor:
    """Both views, shape (2, N, D), less their means over the rows of all ranks."""
    return views - split.sum(views.sum(1))[:, None] / split.total


def _largest(views: Tensor, split: Shard) -> Tensor:
    """Largest absolute value of each feature of both views over the rows of all ranks, shape (2, D)."""
    own = views.detach().abs()
    largest = own.amax(1) if views.shape[1] else own.sum(1)
    return replace(split, counts=(1,) * split.world_size).gather(largest[None]).amax(0)


def off_diagonal(matrices: Tensor) -> Tensor:
    """A view of the entries off the diagonal of (..., D, D), shape (..., D - 1, D).

    Without the last entry, the matrix read in rows of D + 1 has its diagonal in the first column.
    """
    width = matrices.shape[-1]
    return matrices.flatten(-2)[..., :-1].view(*matrices.shape[:-2], width - 1, width + 1)[..., 1:]


def _check_vicreg(sim_weight: float, var_weight: float, cov_weight: float, eps: float) -> None:
    _checks.number("sim_weight", sim_weight, at_least=0)
    _checks.number("var_weight", var_weight, at_least=0)
    _checks.number("cov_weight", cov_weight, at_least=0)
    _checks.positive("eps", eps)


class BarlowTwinsLoss(TwoViewLoss):
    """Module form of :func:`barlow_twins_loss`.

    Args:
        lambd: weight >= 0 of the redundancy between features.
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(self, lambd: float = 0.005, *, group: Group = None) -> None:
        _checks.number("lambd", lambd, at_least=0)
        super().__init__(lambd=lambd, group=group)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        return barlow_twins_loss(z1, z2, **self.hyperparameters())


class VICRegLoss(TwoViewLoss):
    """Module form of :func:`vicreg_loss`.

    Args:
        sim_weight: weight >= 0 of the distance between views.
        var_weight: weight >= 0 of features whose standard deviation is below 1.
        cov_weight: weight >= 0 of the covariance between features.
        eps: added to variances, > 0.
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        sim_weight: float = 25.0,
        var_weight: float = 25.0,
        cov_weight: float = 1.0,
        *,
        eps: float = 1e-4,
        group: Group = None,
    ) -> None:
        _check_vicreg(sim_weight, var_weight, cov_weight, eps)
        super().__init__(
            sim_weight=sim_weight, var_weight=var_weight, cov_weight=cov_weight, eps=eps, group=group
        )

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        return vicreg_loss(z1, z2, **self.hyperparameters())
