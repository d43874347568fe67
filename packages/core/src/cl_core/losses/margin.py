r"""Losses with margins over labelled rows: triplet, contrastive, multi-similarity, circle.

All compare the rows of z with each other or, with ``ref``, with the rows of ref. Without mined ``triplets``
or ``pairs`` they take all there are, anchors some at a time: no N x N x N, nor N x M, forward or backward.
An anchor without a positive never counts, nor do the pairs it is the anchor of. Losses of this family have
no ``group``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._comparison import Comparison, euclidean, products
from cl_core._types import Reduction
from cl_core.losses._base import LabelledLoss
from cl_core.losses._terms import (
    Terms,
    all_triplets,
    by_anchor,
    check_listed,
    listed_distances,
    listed_hinges,
    listed_log_sum_exp,
    listed_products,
    masked_log_sum_exp,
    reduce_terms,
    softplus,
)
from cl_core.miners import PairMiner, Pairs, TripletMiner, Triplets
from cl_core.similarity import cross_log_sum_exp, scaled_rows, self_log_sum_exp

_TRIPLET = (True, False, False)  # which of the listed vectors number anchors
_PAIRS = (True, False, True, False)


def triplet_margin_loss(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.05,
    triplets: Triplets | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Triplet loss with a margin: a positive must be nearer than a negative by the margin.

        l_apn = max(0, d(a, p) - d(a, n) + margin)

    with the Euclidean distance d. Without ``triplets`` the sum over all of them is taken from sorted
    distances.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        margin: margin >= 0.
        triplets: rows to compare, as :func:`cl_core.miners.mine_triplets` gives them; None takes all.
        ref: rows that serve as positives and negatives instead of z itself, shape (M, D); none of them a
            copy of a row of z (else mine with ``ids`` and pass the triplets).
        ref_labels: integers, shape (M,).
        normalize: scale rows to unit length first.
        reduction: "mean" over the triplets that violate the margin, "sum" over all, or "none" for each
            anchor's sum.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if
        no triplet violates the margin.

    Raises:
        ValueError: if labels do not fit z, only one of ref and ref_labels is given, or a triplet names no
            row.

    Cost: O(N M (D + log P)) time for anchors of P positives, O((N + M) D) memory; T listed triplets: O(T D) time.
    Reference: Schroff et al., "FaceNet", CVPR 2015, arXiv 1503.03832; here with distances instead of their
    squares and the mean over non-zero terms, as metric-learning libraries have it.
    """
    _checks.number("margin", margin, at_least=0)
    _checks.reduction(reduction)
    comparison = Comparison(z, labels, ref=ref, ref_labels=ref_labels, normalize=normalize)
    if triplets is None:
        most = comparison.most_positives()

        def terms(x: Tensor, y: Tensor, part: slice) -> Terms:
            return all_triplets(euclidean(x, y), *comparison.masks(part), margin, most)

        return reduce_terms(by_anchor(comparison, terms), reduction, comparison)
    check_listed("triplets", triplets, _TRIPLET, comparison)
    excess = listed_distances(comparison, triplets.anchor, triplets.positive) + margin
    excess = excess - listed_distances(comparison, triplets.anchor, triplets.negative)
    return reduce_terms(listed_hinges(excess, triplets.anchor, len(z)), reduction, comparison)


def contrastive_margin_loss(
    z: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    pairs: Pairs | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrastive loss with margins: positives within one distance, negatives beyond another.

        l_ap = max(0, d(a, p) - positive_margin)      l_an = max(0, negative_margin - d(a, n))

    with the Euclidean distance d.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        positive_margin: distance >= 0 up to which a positive pair costs nothing.
        negative_margin: distance >= 0 from which a negative pair costs nothing.
        pairs: rows to compare, as :func:`cl_core.miners.mine_pair_margin` gives them; None takes all.
        ref: rows that serve as positives and negatives instead of z itself, shape (M, D); none of them a
            copy of a row of z (else mine with ``ids`` and pass the pairs).
        ref_labels: integers, shape (M,).
        normalize: scale rows to unit length first.
        reduction: "mean" over the positive pairs that cost something plus the mean over such negative
            pairs; "sum" over all; or "none" for each anchor's sum.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if
        no pair costs anything.

    Raises:
        ValueError: if labels do not fit z, only one of ref and ref_labels is given, or a pair names no row.

    Cost: O(N M D) time, O((N + M) D) memory; listed pairs: O(P D) time.
    Reference: Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; here
    with hinges instead of their squares and means over non-zero terms, as metric-learning libraries have it.
    """
    _checks.number("positive_margin", positive_margin, at_least=0)
    _checks.number("negative_margin", negative_margin, at_least=0)
    _checks.reduction(reduction)
    comparison = Comparison(z, labels, ref=ref, ref_labels=ref_labels, normalize=normalize)
    if pairs is None:

        def terms(x: Tensor, y: Tensor, part: slice) -> Terms:
            distance = euclidean(x, y)
            positive, negative = comparison.masks(part)
            too_far = torch.where(positive, distance - positive_margin, 0).relu()
            too_near = torch.where(negative, negative_margin - distance, 0).relu()
            return torch.cat([torch.stack([t.sum(1), (t > 0).sum(1)], 1) for t in (too_far, too_near)], 1)

        return reduce_terms(by_anchor(comparison, terms), reduction, comparison)
    check_listed("pairs", pairs, _PAIRS, comparison)
    too_far = listed_distances(comparison, pairs.positive_anchor, pairs.positive) - positive_margin
    too_near = negative_margin - listed_distances(comparison, pairs.negative_anchor, pairs.negative)
    sorts = ((too_far, pairs.positive_anchor), (too_near, pairs.negative_anchor))
    listed = torch.cat([listed_hinges(excess, anchor, len(z)) for excess, anchor in sorts], 1)
    return reduce_terms(listed, reduction, comparison)


def multi_similarity_loss(
    z: Tensor,
    labels: Tensor,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    pairs: Pairs | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multi-similarity loss: soft thresholds that weigh a pair by all other pairs of its anchor.

        l_a = 1/alpha log(1 + sum_p exp(-alpha (s_ap - base))) + 1/beta log(1 + sum_n exp(beta (s_an - base)))

    with the cosine similarity s.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        alpha: sharpness > 0 on positives.
        beta: sharpness > 0 on negatives.
        base: similarity at which a pair has weight 1 (lambda in the paper).
        pairs: rows to compare, as :func:`cl_core.miners.mine_multi_similarity` gives them; None takes all.
        ref: rows that serve as positives and negatives instead of z itself, shape (M, D); none of them a
            copy of a row of z (else mine with ``ids`` and pass the pairs).
        ref_labels: integers, shape (M,).
        normalize: scale rows to unit length first; otherwise s is the dot product.
        reduction: "mean" over the anchors with a positive, listed in ``pairs`` or not; "sum"; or "none" for
            shape (N,), zero where an anchor does not count.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if
        no anchor has a positive.

    Raises:
        ValueError: if labels do not fit z, alpha or beta is not > 0, or a pair names no row.

    Cost: O(N M D) time, O((N + M) D) memory; listed pairs: O(P D) time.
    Reference: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019,
    arXiv 1904.06627; the mean there is over all rows, those without a positive included.
    """
    _checks.positive("alpha", alpha)
    _checks.positive("beta", beta)
    _checks.number("base", base)
    _checks.reduction(reduction)
    comparison = Comparison(z, labels, ref=ref, ref_labels=ref_labels, normalize=normalize)
    if pairs is None:
        log_positive, log_negative = _log_sums(z, ref, comparison, alpha, beta, normalize)
    else:
        check_listed("pairs", pairs, _PAIRS, comparison)
        similar = listed_products(comparison, pairs.positive_anchor, pairs.positive)
        log_positive = listed_log_sum_exp(-alpha * similar, pairs.positive_anchor, len(z))
        dissimilar = listed_products(comparison, pairs.negative_anchor, pairs.negative)
        log_negative = listed_log_sum_exp(beta * dissimilar, pairs.negative_anchor, len(z))
    values = softplus(log_positive + alpha * base) / alpha + softplus(log_negative - beta * base) / beta
    counts = comparison.anchors().to(values.dtype)
    return reduce_terms(torch.stack([values * counts, counts], 1), reduction, comparison)


def _log_sums(
    z: Tensor, ref: Tensor | None, comparison: Comparison, alpha: float, beta: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of -alpha s over all positives and of beta s over all negatives of every anchor."""
    row_keys, column_keys = comparison.row_labels.long(), comparison.column_labels.long()
    rows = scaled_rows(z, normalize=normalize)
    columns = rows if ref is None else scaled_rows(ref, normalize=normalize)
    log_positive = cross_log_sum_exp(
        rows * -alpha,
        columns,
        row_keys=row_keys,
        column_keys=column_keys,
        row_ids=comparison.row_ids,
        column_ids=comparison.column_ids,
        over="same",
    )
    if ref is None:
        bound = beta if normalize else None
        return log_positive, self_log_sum_exp(rows * beta**0.5, keys=row_keys, bound=bound)
    log_negative = cross_log_sum_exp(
        rows * beta, columns, row_keys=row_keys, column_keys=column_keys, over="different"
    )
    return log_positive, log_negative


def circle_loss(
    z: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.4,
    gamma: float = 80.0,
    pairs: Pairs | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Circle loss: each similarity is pulled the harder the farther it is from its optimum.

        l_a = softplus( log sum_n exp(gamma [s_an + m]+ (s_an - m))
                        + log sum_p exp(-gamma [1 + m - s_ap]+ (s_ap - 1 + m)) )

    with the cosine similarity s and the weights [.]+ held constant in the gradient.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        margin: m, the relaxation; optima are 1 + m for positives and -m for negatives.
        gamma: scale > 0.
        pairs: rows to compare; None takes all.
        ref: rows that serve as positives and negatives instead of z itself, shape (M, D); none of them a
            copy of a row of z (else mine with ``ids`` and pass the pairs).
        ref_labels: integers, shape (M,).
        normalize: scale rows to unit length first; otherwise s is the dot product.
        reduction: "mean" over the anchors with a positive and a negative (among ``pairs``, if given),
            "sum", or "none" for shape (N,), zero where an anchor does not count.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs. Zero, attached to the graph, if
        no anchor has a positive and a negative.

    Raises:
        ValueError: if labels do not fit z, gamma is not > 0, or a pair names no row.

    Cost: O(N M D) time, O((N + M) D) memory; listed pairs: O(P D) time.
    Reference: Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020,
    arXiv 2002.10857.
    """
    _checks.number("margin", margin)
    _checks.positive("gamma", gamma)
    _checks.reduction(reduction)
    comparison = Comparison(z, labels, ref=ref, ref_labels=ref_labels, normalize=normalize)

    def positive_logit(s: Tensor) -> Tensor:
        return -gamma * (1 + margin - s.detach()).relu() * (s - 1 + margin)

    def negative_logit(s: Tensor) -> Tensor:
        return gamma * (s.detach() + margin).relu() * (s - margin)

    def terms(log_positive: Tensor, log_negative: Tensor) -> Terms:
        counts = (log_positive > -torch.inf) & (log_negative > -torch.inf)
        total = torch.where(counts, log_positive, 0) + torch.where(counts, log_negative, -torch.inf)
        return torch.stack([softplus(total), counts.to(total.dtype)], 1)

    def on_tile(x: Tensor, y: Tensor, part: slice) -> Terms:
        similarity = products(x, y)
        positive, negative = comparison.masks(part)
        return terms(
            masked_log_sum_exp(positive_logit(similarity), positive),
            masked_log_sum_exp(negative_logit(similarity), negative),
        )

    if pairs is None:
        return reduce_terms(by_anchor(comparison, on_tile), reduction, comparison)
    check_listed("pairs", pairs, _PAIRS, comparison)
    similar = listed_products(comparison, pairs.positive_anchor, pairs.positive)
    dissimilar = listed_products(comparison, pairs.negative_anchor, pairs.negative)
    listed = terms(
        listed_log_sum_exp(positive_logit(similar), pairs.positive_anchor, len(z)),
        listed_log_sum_exp(negative_logit(dissimilar), pairs.negative_anchor, len(z)),
    )
    return reduce_terms(listed, reduction, comparison)


class TripletMarginLoss(LabelledLoss):
    """Module form of :func:`triplet_margin_loss`.

    Args:
        margin: margin >= 0.
        miner: picks the triplets of each batch where none are passed, such as
            :class:`cl_core.miners.BatchHardMiner`; None takes all triplets.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        margin: float = 0.05,
        *,
        miner: TripletMiner | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        _checks.number("margin", margin, at_least=0)
        super().__init__(margin=margin, miner=miner, normalize=normalize, reduction=reduction)

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        triplets: Triplets | None = None,
        *,
        ref: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of embeddings (N, D) with integer labels (N,), over given or mined triplets or all."""
        arguments = self.hyperparameters()
        miner = arguments.pop("miner")
        if triplets is None and miner is not None:
            triplets = miner(z, labels, ref=ref, ref_labels=ref_labels)
        return triplet_margin_loss(z, labels, triplets=triplets, ref=ref, ref_labels=ref_labels, **arguments)


class _PairLoss(LabelledLoss):
    """What the losses over pairs share: the pairs are given, mined, or all."""

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        pairs: Pairs | None = None,
        *,
        ref: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of embeddings (N, D) with integer labels (N,), over given or mined pairs or all."""
        arguments = self.hyperparameters()
        miner = arguments.pop("miner")
        if pairs is None and miner is not None:
            pairs = miner(z, labels, ref=ref, ref_labels=ref_labels)
        return self._function(z, labels, pairs=pairs, ref=ref, ref_labels=ref_labels, **arguments)

    def _function(self, z: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        raise NotImplementedError


class ContrastiveMarginLoss(_PairLoss):
    """Module form of :func:`contrastive_margin_loss`.

    Args:
        positive_margin: distance >= 0 up to which a positive pair costs nothing.
        negative_margin: distance >= 0 from which a negative pair costs nothing.
        miner: picks the pairs of each batch where none are passed; None takes all pairs.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        *,
        miner: PairMiner | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        _checks.number("positive_margin", positive_margin, at_least=0)
        _checks.number("negative_margin", negative_margin, at_least=0)
        super().__init__(
            positive_margin=positive_margin,
            negative_margin=negative_margin,
            miner=miner,
            normalize=normalize,
            reduction=reduction,
        )

    def _function(self, z: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        return contrastive_margin_loss(z, labels, **arguments)


class MultiSimilarityLoss(_PairLoss):
    """Module form of :func:`multi_similarity_loss`.

    Args:
        alpha: sharpness > 0 on positives.
        beta: sharpness > 0 on negatives.
        base: similarity at which a pair has weight 1.
        miner: picks the pairs of each batch where none are passed; None takes all pairs.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 50.0,
        base: float = 0.5,
        *,
        miner: PairMiner | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        _checks.positive("alpha", alpha)
        _checks.positive("beta", beta)
        _checks.number("base", base)
        super().__init__(
            alpha=alpha, beta=beta, base=base, miner=miner, normalize=normalize, reduction=reduction
        )

    def _function(self, z: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        return multi_similarity_loss(z, labels, **arguments)


class CircleLoss(_PairLoss):
    """Module form of :func:`circle_loss`.

    Args:
        margin: the relaxation m.
        gamma: scale > 0.
        miner: picks the pairs of each batch where none are passed; None takes all pairs.
        normalize: scale rows to unit length first.
        reduction: "mean", "sum" or "none".
    """

    def __init__(
        self,
        margin: float = 0.4,
        gamma: float = 80.0,
        *,
        miner: PairMiner | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        _checks.number("margin", margin)
        _checks.positive("gamma", gamma)
        super().__init__(margin=margin, gamma=gamma, miner=miner, normalize=normalize, reduction=reduction)

    def _function(self, z: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        return circle_loss(z, labels, **arguments)
