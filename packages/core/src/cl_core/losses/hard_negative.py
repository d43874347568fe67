"""InfoNCE with corrected negatives: debiased for false ones, and weighted towards hard ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks
from cl_core._types import Group, Impl, Reduction
from cl_core.losses._base import TwoViewLoss
from cl_core.losses._common import inverse, reduce_views, view_terms


def hard_negative_nce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""NT-Xent whose negatives are weighted by their hardness and corrected for false negatives.

    For an anchor with positive logit p and the logits s_j of its M negatives (both views of all other samples),

        g = ( sum_j w_j e^{s_j} - tau_plus M e^p ) / (1 - tau_plus),    w_j = e^{beta s_j} / mean_k e^{beta s_k}
        l = -log( e^p / (e^p + max(g, M e^{-1/T})) )

    Computed in logarithms: the weighted sum is exp(lse((1 + beta) s) - lse(beta s) + log M), two calls of the
    primitive. ``beta=0`` is :func:`debiased_nce_loss`; with ``tau_plus=0`` too it is NT-Xent.

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        beta: concentration on hard negatives >= 0.
        tau_plus: prior probability that a negative has the anchor's class, in [0, 1).
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first; the floor M e^{-1/T} assumes unit rows.
        reduction: "mean" over the 2N anchors, "sum", or "none" for shape (2N,), view 1 first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (2N,) for reduction="none". float32 for half inputs. Zero for a batch of one.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or a number is outside its range.

    Cost: O(N^2 D) time (twice NT-Xent if beta > 0), O(N D) memory beyond a few thousand rows.
    Reference: Robinson et al., "Contrastive Learning with Hard Negative Samples", ICLR 2021, arXiv 2010.04592.
    """
    _checks.reduction(reduction)
    _check_numbers(beta, tau_plus)
    terms = view_terms((z1, z2), temperature=temperature, normalize=normalize, group=group, impl=impl)
    positives = terms.positives()
    count = 2 * (terms.shard.total - 1)
    log_count = math.log(count) if count else -math.inf
    weighted = terms.log_negatives(1 + beta)
    if beta > 0 and count:
        weighted = weighted - terms.log_negatives(beta) + log_count
    false_negatives = positives + log_count + (math.log(tau_plus) if tau_plus else -math.inf)
    log_negatives = _log_difference(weighted, false_negatives) - math.log1p(-tau_plus)
    floor = torch.as_tensor(
        log_count - inverse(temperature), dtype=log_negatives.dtype, device=log_negatives.device
    )
    values = F.softplus(torch.maximum(log_negatives, floor) - positives, threshold=60)
    return reduce_views(values, reduction, terms.shard)


def debiased_nce_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    tau_plus: float = 0.1,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""NT-Xent corrected for the negatives that share the anchor's class.

    For an anchor with positive logit p and the logits s_j of its M negatives,

        g = ( sum_j e^{s_j} - tau_plus M e^p ) / (1 - tau_plus),    l = -log( e^p / (e^p + max(g, M e^{-1/T})) )

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D).
        tau_plus: prior probability that a negative has the anchor's class, in [0, 1).
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: as in :func:`hard_negative_nce_loss`.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        As :func:`hard_negative_nce_loss`.

    Raises:
        ValueError: as :func:`hard_negative_nce_loss`.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020, arXiv 2007.00224.
    """
    return hard_negative_nce_loss(
        z1,
        z2,
        beta=0.0,
        tau_plus=tau_plus,
        temperature=temperature,
        normalize=normalize,
        reduction=reduction,
        group=group,
        impl=impl,
    )


def _check_numbers(beta: float, tau_plus: float) -> None:
    _checks.number("beta", beta, at_least=0)
    _checks.number("tau_plus", tau_plus)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}.")


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a - e^b) where a > b, -inf elsewhere; no nan in value or gradient."""
    gap = b - a
    positive = gap < 0
    safe = torch.where(positive, gap, -1.0)
    return torch.where(positive, a + torch.log(-torch.expm1(safe)), -torch.inf)


class HardNegativeNCELoss(TwoViewLoss):
    """Module form of :func:`hard_negative_nce_loss`.

    Args:
        temperature: T > 0.
        beta: concentration on hard negatives >= 0.
        tau_plus: prior probability that a negative has the anchor's class, in [0, 1).
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _check_numbers(beta, tau_plus)
        super().__init__(
            temperature=temperature,
            beta=beta,
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        return hard_negative_nce_loss(z1, z2, **self.hyperparameters())


class DebiasedNCELoss(TwoViewLoss):
    """Module form of :func:`debiased_nce_loss`.

    Args:
        temperature: T > 0.
        tau_plus: prior probability that a negative has the anchor's class, in [0, 1).
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        tau_plus: float = 0.1,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _check_numbers(0.0, tau_plus)
        super().__init__(
            temperature=temperature,
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, D)."""
        return debiased_nce_loss(z1, z2, **self.hyperparameters())
