"""Losses without negatives: a prediction of the other view's embedding, as in SimSiam and BYOL."""

from __future__ import annotations

from torch import Tensor

from cl_core import _checks, similarity
from cl_core._types import Group, Reduction
from cl_core.distributed import Shard, shard
from cl_core.losses._base import PredictionLoss
from cl_core.losses._common import check_rows, reduce


def negative_cosine_similarity(
    p: Tensor,
    z: Tensor,
    *,
    detach: bool = True,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Minus the cosine between predictions and targets, the loss of SimSiam.

        l_i = -p_i . z_i / (|p_i| |z_i|)

    The loss of two views is the mean of (p1, z2) and (p2, z1). In [-1, 1] with ``normalize``; it is the stop-gradient
    on z that keeps all embeddings from becoming equal.

    Args:
        p: predictions, shape (N, D).
        z: targets, shape (N, D); row i is another view of the sample of p's row i.
        detach: treat z as a constant.
        normalize: scale rows to unit length first.
        reduction: "mean" over the N rows, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ or an input is empty or not finite.

    Cost: O(N D).
    Reference: Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.
    """
    _checks.reduction(reduction)
    products, split = _products(p, z, detach, normalize, group)
    return reduce(-products, reduction, split=split)


def byol_loss(
    p: Tensor,
    z: Tensor,
    *,
    detach: bool = True,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Squared distance between predictions and targets of unit length, the loss of BYOL.

        l_i = |p_i / |p_i| - z_i / |z_i||^2 = 2 - 2 cos(p_i, z_i)

    The loss of two views is the sum of (p1, z2) and (p2, z1). In [0, 4] with ``normalize``.

    Args:
        p: predictions of the online network, shape (N, D).
        z: embeddings of the target network, shape (N, D); row i is another view of the sample of p's row i.
        detach: treat z as a constant.
        normalize: scale rows to unit length first; pass False only for rows that have it.
        reduction: "mean" over the N rows, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ or an input is empty or not finite.

    Cost: O(N D).
    Reference: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020,
    arXiv 2006.07733.
    """
    _checks.reduction(reduction)
    products, split = _products(p, z, detach, normalize, group)
    return reduce(2 - 2 * products, reduction, split=split)


def _products(p: Tensor, z: Tensor, detach: bool, normalize: bool, group: Group) -> tuple[Tensor, Shard]:
    """Dot products of rows, shape (N,), in [-1, 1] for unit rows, and how the batch is spread."""
    check_rows(group, p=p, z=z)
    _checks.same_shape(p=p, z=z)
    predictions = similarity.scaled_rows(p, normalize=normalize)
    targets = similarity.scaled_rows(z.detach() if detach else z, normalize=normalize)
    products = similarity.row_products(predictions, targets)
    if normalize:
        # Rounding leaves the range by a little; a plain clamp would take the gradient, which near the ends is not 0.
        products = products + (products.clamp(-1, 1) - products).detach()
    return products, shard(p, group)


class NegativeCosineSimilarityLoss(PredictionLoss):
    """Module form of :func:`negative_cosine_similarity`.

    Args:
        detach: treat the targets as constants.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        *,
        detach: bool = True,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(detach=detach, normalize=normalize, reduction=reduction, group=group)

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Loss of predictions (N, D) and targets (N, D)."""
        return negative_cosine_similarity(p, z, **self.hyperparameters())


class BYOLLoss(PredictionLoss):
    """Module form of :func:`byol_loss`.

    Args:
        detach: treat the targets as constants.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        *,
        detach: bool = True,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(detach=detach, normalize=normalize, reduction=reduction, group=group)

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Loss of predictions (N, D) and targets (N, D)."""
        return byol_loss(p, z, **self.hyperparameters())
