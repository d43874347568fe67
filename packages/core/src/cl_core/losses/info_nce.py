"""InfoNCE of queries and keys: two towers, MoCo with a queue, MoCo v3, NNCLR."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks
from cl_core._types import Group, Impl, Reduction
from cl_core.losses._base import QueryKeyLoss
from cl_core.losses._common import pair_terms, queue_terms, reduce_pairs


def info_nce_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    symmetric: bool = False,
    in_batch: bool | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Cross entropy of picking a query's key among its negatives.

    With unit rows q_i, k_i,

        l_i = softplus( log sum_{n in N(i)} exp(q_i . n / T) - q_i . k_i / T )

    where N(i) are the keys of the other rows, or the rows of ``negatives``, or both. Known hosts: CLIP-like two towers
    (``symmetric=True``), MoCo v2 (``negatives`` = the queue, keys without gradient), MoCo v3 (no queue, keys without
    gradient, loss times 2T), NNCLR (``query`` = nearest neighbours, ``key`` = predictions).

    Args:
        query: shape (N, D).
        key: shape (N, D); row i is the positive of row i of query. Detach it where the method says so.
        negatives: a queue of shape (K, D), the same on all ranks.
        symmetric: average with the loss of keys against queries; without a queue only.
        in_batch: whether the keys of other rows are negatives; None means they are if there is no queue.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        reduction: "mean" over the anchors, "sum", or "none" for shape (N,); symmetric (2N,), queries first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or one value an anchor for reduction="none". float32 for half inputs. Zero where an anchor has no
        negative.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, T <= 0, or options contradict each other.

    Cost: O(N^2 D) time (with a queue O(N K D)), O((N + K) D) memory beyond a few thousand rows.
    Reference: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", arXiv 1807.03748;
    He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, arXiv 1911.05722.
    """
    _checks.reduction(reduction)
    _checks.flag("symmetric", symmetric)
    if in_batch is not None:
        _checks.flag("in_batch", in_batch)
    options = {"temperature": temperature, "normalize": normalize, "group": group, "impl": impl}
    names = ("query", "key")
    if negatives is None:
        if in_batch is False:
            raise ValueError(
                "in_batch=False needs negatives, got None: there would be nothing to compare with."
            )
        terms = pair_terms(query, key, symmetric=symmetric, names=names, **options)  # type: ignore[arg-type]
    elif symmetric:
        raise ValueError("symmetric=True needs negatives=None, got a queue: its rows are keys, not queries.")
    else:
        terms = queue_terms(query, key, negatives, in_batch=bool(in_batch), names=names, **options)  # type: ignore[arg-type]
    values = F.softplus(terms.log_negatives - terms.positives, threshold=60)
    return reduce_pairs(values, reduction, terms.shard)


class InfoNCELoss(QueryKeyLoss):
    """Module form of :func:`info_nce_loss`.

    Args:
        temperature: T > 0.
        symmetric: average with the loss of keys against queries.
        in_batch: whether the keys of other rows are negatives; None means they are if there is no queue.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = False,
        in_batch: bool | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        if in_batch is not None:
            _checks.flag("in_batch", in_batch)
        super().__init__(
            temperature=temperature,
            symmetric=symmetric,
            in_batch=in_batch,
            normalize=normalize,
            reduction=reduction,
            group=group,
            impl=impl,
        )

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of queries (N, D) against keys (N, D) and optional extra negatives (K, D)."""
        return info_nce_loss(query, key, negatives, **self.hyperparameters())
