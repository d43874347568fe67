"""Miners that give pairs: an anchor and a positive, an anchor and a negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._comparison import Comparison
from cl_core._rows import Collected


class Pairs(NamedTuple):
    """Row numbers of positive pairs, two int64 vectors (P,), and of negative pairs, two vectors (Q,)."""

    positive_anchor: Tensor
    positive: Tensor
    negative_anchor: Tensor
    negative: Tensor


@torch.no_grad()
def mine_multi_similarity(
    z: Tensor,
    labels: Tensor,
    *,
    epsilon: float = 0.1,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
) -> Pairs:
    """Pairs that are hard relative to the anchor's pairs of the other sort.

    With s the similarity to the anchor, a positive is kept if s - epsilon < the largest s of a negative, a
    negative if s + epsilon > the smallest s of a positive.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        epsilon: slack >= 0.
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).
        normalize: scale rows to unit length first; similarities are dot products.

    Returns:
        The pairs.

    Raises:
        ValueError: if labels do not fit z, or epsilon < 0.

    Cost: O(N M D) time.
    Reference: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019,
    arXiv 1904.06627.
    """
    _checks.number("epsilon", epsilon, at_least=0)
    comparison = Comparison(
        z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids, normalize=normalize
    )
    found = Collected(2, z.device), Collected(2, z.device)
    for part, positive, negative in comparison.each():
        s = comparison.similarities(part)
        nearest_negative = s.masked_fill(~negative, -math.inf).amax(1, keepdim=True)
        farthest_positive = s.masked_fill(~positive, math.inf).amin(1, keepdim=True)
        kept = positive & (s - epsilon < nearest_negative), negative & (s + epsilon > farthest_positive)
        _add(found, part, kept)
    return Pairs(*found[0].vectors(), *found[1].vectors())


@torch.no_grad()
def mine_pair_margin(
    z: Tensor,
    labels: Tensor,
    *,
    positive_margin: float = 0.2,
    negative_margin: float = 0.8,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
) -> Pairs:
    """Positive pairs farther apart than one margin, negative pairs nearer than another.

    ``positive_margin=-1`` and ``negative_margin=math.inf`` give all pairs.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        positive_margin: positives at a larger distance are kept.
        negative_margin: negatives at a smaller distance are kept.
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).
        normalize: scale rows to unit length first.

    Returns:
        The pairs; their number can reach N M.

    Raises:
        ValueError: if labels do not fit z.

    Cost: O(N M D) time.
    """
    _checks.number("positive_margin", positive_margin, finite=False)
    _checks.number("negative_margin", negative_margin, finite=False)
    comparison = Comparison(
        z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids, normalize=normalize
    )
    found = Collected(2, z.device), Collected(2, z.device)
    for part, positive, negative in comparison.each():
        distance = comparison.distances(part)
        kept = positive & (distance > positive_margin), negative & (distance < negative_margin)
        _add(found, part, kept)
    return Pairs(*found[0].vectors(), *found[1].vectors())


class PairMiner:
    """Base of the miners that give pairs, and what a loss over pairs asks for."""

    _function: ClassVar[Callable[..., Pairs]]

    def __call__(self, z: Tensor, labels: Tensor, **candidates: Tensor | None) -> Pairs:
        """Pairs of z (N, D) with labels (N,); ``ref``, ``ref_labels``, ``ids`` and ``ref_ids`` by name."""
        return type(self)._function(z, labels, **vars(self), **candidates)


@dataclass(frozen=True)
class MultiSimilarityMiner(PairMiner):
    """Class form of :func:`mine_multi_similarity`."""

    _function = mine_multi_similarity
    epsilon: float = 0.1
    normalize: bool = True


@dataclass(frozen=True)
class PairMarginMiner(PairMiner):
    """Class form of :func:`mine_pair_margin`."""

    _function = mine_pair_margin
    positive_margin: float = 0.2
    negative_margin: float = 0.8
    normalize: bool = True


def _add(found: tuple[Collected, ...], part: slice, kept: tuple[Tensor, ...]) -> None:
    """Note the positive and the negative pairs of some anchors."""
    for pairs, mask in zip(found, kept, strict=True):
        anchor, other = mask.nonzero(as_tuple=True)
        pairs.add(anchor + part.start, other)
