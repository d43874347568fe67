"""NT-Xent, the loss of SimCLR: each view must find its sample among all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks
from cl_core._types import Group, Impl, Reduction
from cl_core.losses._base import TwoViewLoss
from cl_core.losses._common import compared_views, reduce_views


def nt_xent_loss(
    z1: Tensor | Sequence[Tensor],
    z2: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Normalised temperature-scaled cross entropy of two or more views.

    For an anchor i of any view, with u = z / |z|, each other view p of its sample, and the negatives N(i) = all views
    of all other samples,

        l_ip = -log( exp(u_i . u_p / T) / (exp(u_i . u_p / T) + sum_{j in N(i)} exp(u_i . u_j / T)) )
             = softplus( log sum_{j in N(i)} exp(u_i . u_j / T) - u_i . u_p / T )

    and the anchor's loss is the mean over its positives p: one for two views. The second line is how it is computed:
    it keeps its precision where the loss is close to zero.

    Args:
        z1: embeddings of view 1, shape (N, D); or a sequence of V >= 2 views, then without ``z2``.
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the V N anchors, "sum", or "none" for shape (V N,), view 1 first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (V N,) for reduction="none". float32 for half inputs. A batch of one has nothing to compare:
        zero, with a zero gradient.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or T <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
    arXiv 2002.05709. With V > 2 views other positives are left out of the denominator, as in the per-pair definition.
    """
    _checks.reduction(reduction)
    positives, log_negatives, split = compared_views(
        as_views(z1, z2), temperature=temperature, normalize=normalize, group=group, impl=impl
    )
    return reduce_views(F.softplus(log_negatives - positives, threshold=60), reduction, split)


def as_views(z1: Tensor | Sequence[Tensor], z2: Tensor | None) -> Sequence[Tensor]:
    """The views as a sequence, however they were passed."""
    if isinstance(z1, list | tuple):
        if z2 is not None or len(z1) < 2:
            raise ValueError(f"a sequence of views must hold at least 2 and comes without z2, got {len(z1)}.")
        return z1
    if not isinstance(z1, Tensor):
        raise TypeError(f"z1 must be a tensor of shape (N, D) or a list of views, got {type(z1).__name__}.")
    if z2 is None:
        raise ValueError("z2 must be given with z1, got None; several views go in as one list.")
    return z1, z2


class NTXentLoss(TwoViewLoss):
    """Module form of :func:`nt_xent_loss`.

    Args:
        temperature: T > 0.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    several_views = True

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature, normalize=normalize, reduction=reduction, group=group, impl=impl
        )

    def forward(self, z1: Tensor | Sequence[Tensor], z2: Tensor | None = None) -> Tensor:
        """Loss of two views, each of shape (N, D), or of a list of two or more."""
        return nt_xent_loss(z1, z2, **self.hyperparameters())
