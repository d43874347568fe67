"""Decoupled contrastive learning: InfoNCE without the positive in the denominator, and its weighted form."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard
from cl_core.losses._base import QueryKeyLoss
from cl_core.losses._common import PairTerms, compared_views, pair_terms, queue_terms, reduce_pairs
from cl_core.similarity import at_least_float32

Within: TypeAlias = Literal["both", "cross", "keys"]
"""Which rows of the batch an anchor is compared with: both views of the others, their other view, or, where the first
view alone has anchors, their keys."""
Negatives: TypeAlias = Tensor | Within
"""Which rows an anchor is compared with: those of a queue (K, D), or of the batch."""


def dcl_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    negatives: Negatives = "both",
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Decoupled contrastive loss of two views.

    For anchor i of either view, with u = z / |z|, its other view p(i) and negatives N(i) = both views of all other
    samples,

        l_i = -u_i . u_p(i) / T + log sum_{j in N(i)} exp(u_i . u_j / T)

    NT-Xent of the same batch is softplus(l_i). Values may be negative.

    Args:
        z1: embeddings of view 1, shape (N, D), N >= 2 over all ranks unless there is a queue.
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        negatives: "both" views of the other samples; "cross", the other view of the other samples (two towers);
            "keys", the rows of z2 of the other samples, where the rows of z1 alone are anchors (NNCLR, MoCo v3); or a
            queue of shape (K, D): then, too, the rows of z1 alone are anchors (MoCo) and the batch holds no negatives.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the 2N anchors (N with "keys" or a queue), "sum", or "none" for one value an anchor, view
            1 first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (2N,) (with "keys" or a queue (N,)) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if there are no negatives (one row and no queue), shapes differ, or T <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows; with a queue O(N K D) time.
    Reference: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, arXiv 2110.06848.
    """
    _checks.reduction(reduction)
    positives, log_negatives, split = _terms(
        z1, z2, negatives, "dcl_loss", temperature=temperature, normalize=normalize, group=group, impl=impl
    )
    return reduce_pairs(log_negatives - positives, reduction, split)


def dclw_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    sigma: float = 0.5,
    detach_weight: bool = True,
    negatives: Negatives = "both",
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Decoupled contrastive loss whose positives are weighted by how hard they are.

    With s_i = u_i . u_p(i) of sample i and the mean over the N samples of the (global) batch,

        l_i = -w_i s_i / T + log sum_{j in N(i)} exp(u_i . u_j / T)
        w_i = 2 - exp(s_i / sigma) / mean_j exp(s_j / sigma)

    The weights (negative von Mises-Fisher) have mean 1; a positive much easier than the others gets a negative one,
    down to 2 - N. As sigma grows the loss becomes :func:`dcl_loss`.

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D).
        sigma: width of the weighting > 0.
        detach_weight: treat the weights as constants.
        negatives: as in :func:`dcl_loss`.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: as in :func:`dcl_loss`.
        group: process group whose other rows serve as negatives and share the mean of the weights.
        impl: "dense", "tiled" or "auto".

    Returns:
        As :func:`dcl_loss`.

    Raises:
        ValueError: as :func:`dcl_loss`, and if sigma <= 0.

    Cost: as :func:`dcl_loss`.
    Reference: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, arXiv 2110.06848. The paper does not say
    whether the weight is differentiated; the two known implementations differ, hence ``detach_weight``.
    """
    _checks.reduction(reduction)
    _checks.positive("sigma", sigma)
    _checks.flag("detach_weight", detach_weight)
    positives, log_negatives, split = _terms(
        z1, z2, negatives, "dclw_loss", temperature=temperature, normalize=normalize, group=group, impl=impl
    )
    weight = hardness(positives, split, temperature=temperature, sigma=sigma, detach=detach_weight)
    return reduce_pairs(log_negatives - weight * positives, reduction, split)


def _terms(z1: Tensor, z2: Tensor, negatives: Negatives, name: str, **options: Any) -> PairTerms:
    """What both losses are made of; refuses a batch without negatives."""
    terms = compared(z1, z2, negatives, **options)
    if not isinstance(negatives, Tensor) and terms.shard.total < 2:
        raise ValueError(
            f"{name} needs at least 2 rows (the other rows are the negatives), got {terms.shard.total}; use "
            "nt_xent_loss, pass a group, or pass a queue as negatives."
        )
    return terms


def compared(z1: Tensor, z2: Tensor, negatives: Negatives, **options: Any) -> PairTerms:
    """Positives of the anchors, and the log-sum-exp of their negatives."""
    if isinstance(negatives, Tensor):
        return queue_terms(z1, z2, negatives, names=("z1", "z2"), **options)
    _checks.choice("negatives", negatives, get_args(Within))
    if negatives == "both":
        positives, log_negatives, split = compared_views((z1, z2), **options)
        return PairTerms(positives[0], log_negatives, split)
    return pair_terms(z1, z2, symmetric=negatives == "cross", names=("z1", "z2"), **options)


def hardness(
    positives: Tensor, split: Shard, *, temperature: float | Tensor, sigma: float, detach: bool
) -> Tensor:
    """Weights 2 - N softmax(s / sigma) of positives, over the samples of all ranks, from their logits (N, 1)."""
    if isinstance(temperature, Tensor):
        temperature = at_least_float32(temperature)
    scaled = positives * temperature / sigma
    scaled = scaled.detach() if detach else scaled
    return 2 - split.total * torch.exp(scaled - torch.logsumexp(split.gather(scaled), 0))


class DCLLoss(QueryKeyLoss):
    """Module form of :func:`dcl_loss`.

    Args:
        temperature: T > 0.
        negatives: "both" views of the other samples, "cross" or "keys"; a queue is passed with the views.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        negatives: Within = "both",
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _checks.choice("negatives", negatives, get_args(Within))
        super().__init__(
            temperature=temperature,
            negatives=negatives,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of two views, each of shape (N, D); with a queue (K, D) its rows are the negatives."""
        options = self.hyperparameters() | ({} if negatives is None else {"negatives": negatives})
        return dcl_loss(query, key, **options)


class DCLWLoss(QueryKeyLoss):
    """Module form of :func:`dclw_loss`.

    Args:
        temperature: T > 0.
        sigma: width of the weighting > 0.
        detach_weight: treat the weights as constants.
        negatives: "both" views of the other samples, "cross" or "keys"; a queue is passed with the views.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        sigma: float = 0.5,
        detach_weight: bool = True,
        negatives: Within = "both",
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _checks.positive("sigma", sigma)
        _checks.choice("negatives", negatives, get_args(Within))
        super().__init__(
            temperature=temperature,
            sigma=sigma,
            detach_weight=detach_weight,
            negatives=negatives,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of two views, each of shape (N, D); with a queue (K, D) its rows are the negatives."""
        options = self.hyperparameters() | ({} if negatives is None else {"negatives": negatives})
        return dclw_loss(query, key, **options)
