"""Image and text in one space: the softmax loss of CLIP and the pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_core import _checks, _ring, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import shard
from cl_core.losses._base import TwoViewLoss
from cl_core.losses._common import check_rows, inverse, pair_terms, reduce, reduce_pairs


def clip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Symmetric cross entropy of matching images and texts.

    With unit rows x_i, y_i and scale s,

        l_i = -log( exp(s x_i . y_i) / sum_j exp(s x_i . y_j) )
        m_i = -log( exp(s x_i . y_i) / sum_j exp(s x_j . y_i) )

    averaged over both sides: InfoNCE of two towers at temperature 1 / s.

    Args:
        image: shape (N, D).
        text: shape (N, D); row i belongs to image i.
        logit_scale: s > 0, after the exponential; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the 2N anchors, "sum", or "none" for shape (2N,), images first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (2N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or logit_scale <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    arXiv 2103.00020.
    """
    _checks.reduction(reduction)
    _checks.positive("logit_scale", logit_scale)
    terms = pair_terms(
        image,
        text,
        symmetric=True,
        temperature=inverse(logit_scale),
        normalize=normalize,
        group=group,
        impl=impl,
        names=("image", "text"),
    )
    values = F.softplus(terms.log_negatives - terms.positives, threshold=60)
    return reduce_pairs(values, reduction, terms.shard)


def siglip_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Sigmoid loss of each image-text pair on its own.

    With unit rows x_i, y_j, scale s and bias b,

        l_i = softplus(-(s x_i . y_i + b)) + sum_{j != i} softplus(s x_i . y_j + b)

    Args:
        image: shape (N, D).
        text: shape (N, D); row i belongs to image i.
        logit_scale: s > 0, after the exponential; a 0-d tensor receives a gradient.
        logit_bias: b, usually negative; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the N images (not over the N^2 pairs, as the authors do), "sum", or "none" for (N,).
        group: process group whose other texts serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or logit_scale <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows, in the backward too.
    Reference: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343.
    """
    _checks.reduction(reduction)
    _checks.positive("logit_scale", logit_scale)
    _checks.scalar("logit_bias", logit_bias)
    _checks.impl(impl)
    check_rows(group, image=image, text=text)
    _checks.same_shape(image=image, text=text)
    split = shard(image, group)
    rows = similarity.scaled_rows(image, scale=logit_scale, normalize=normalize)
    columns = similarity.scaled_rows(text, normalize=normalize)
    positives = similarity.row_products(rows, columns) + logit_bias
    own = None  # by its place; over ranks it has to be said which, at the cost of sorted copies of the rows
    if split.group is not None:
        own = torch.arange(split.offset, split.offset + len(rows), device=rows.device)
    negatives = _ring.softplus_sum(
        rows,
        columns,
        torch.zeros_like(positives) + logit_bias,
        split,
        row_keys=own,
        column_keys=own,
        over="different",
        impl=impl,
    )
    return reduce(F.softplus(-positives, threshold=60) + negatives, reduction, split=split)


class CLIPLoss(TwoViewLoss):
    """Module form of :func:`clip_loss` with its learnable scale.

    The scale is kept as its logarithm, the parameter ``log_scale``, and brought back to ``max_scale`` before each use.

    Args:
        logit_scale: the scale to start from.
        max_scale: where the scale is capped.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        *,
        max_scale: float = 100.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _check_scales(logit_scale, max_scale)
        super().__init__(
            max_scale=max_scale, normalize=normalize, reduction=reduction, group=group, impl=impl
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))

    @property
    def logit_scale(self) -> Tensor:
        """The scale as it stands."""
        return self.log_scale.exp()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Loss of images and texts, each of shape (N, D)."""
        _cap_(self.log_scale, self.hyperparameters()["max_scale"])
        return clip_loss(image, text, logit_scale=self.logit_scale, **_without_max(self.hyperparameters()))


class SigLIPLoss(TwoViewLoss):
    """Module form of :func:`siglip_loss` with the learnable parameters ``log_scale`` and ``logit_bias``.

    Args:
        logit_scale: the scale to start from.
        logit_bias: the bias to start from.
        max_scale: where the scale is capped.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other texts serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        max_scale: float = 100.0,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _check_scales(logit_scale, max_scale)
        _checks.number("logit_bias", logit_bias)
        super().__init__(
            max_scale=max_scale, normalize=normalize, reduction=reduction, group=group, impl=impl
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(logit_bias)))

    @property
    def logit_scale(self) -> Tensor:
        """The scale as it stands."""
        return self.log_scale.exp()

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Loss of images and texts, each of shape (N, D)."""
        _cap_(self.log_scale, self.hyperparameters()["max_scale"])
        options = _without_max(self.hyperparameters())
        return siglip_loss(image, text, logit_scale=self.logit_scale, logit_bias=self.logit_bias, **options)


def _check_scales(logit_scale: float, max_scale: float) -> None:
    _checks.positive("max_scale", max_scale)
    _checks.positive("logit_scale", logit_scale)
    if logit_scale > max_scale:
        raise ValueError(f"logit_scale must not exceed max_scale, got {logit_scale} and {max_scale}.")


@torch.no_grad()
def _cap_(log_scale: Tensor, largest: float) -> None:
    """Keep the parameter itself below the cap: capping the scale would leave it without a gradient to come back by."""
    log_scale.clamp_(max=math.log(largest))


def _without_max(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "max_scale"}
