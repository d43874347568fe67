"""Miners that give triplets: an anchor, a positive and a negative."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._comparison import Comparison
from cl_core._rows import Collected, tiles

Kind: TypeAlias = Literal["all", "hard", "semi-hard", "easy"]
Hardness: TypeAlias = Literal["easy", "semi-hard", "hard"]

_CHUNK = 1 << 21  # entries of a matrix over (positive pairs) x (candidates)


class Triplets(NamedTuple):
    """Row numbers of T triplets, each an int64 vector of shape (T,)."""

    anchor: Tensor
    positive: Tensor
    negative: Tensor


@torch.no_grad()
def mine_triplets(
    z: Tensor,
    labels: Tensor,
    *,
    kind: Kind = "all",
    margin: float = 0.2,
    max_per_anchor: int | None = None,
    generator: torch.Generator | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
) -> Triplets:
    """All triplets of a kind, judged by how much farther the negative is than the positive.

    With gap = d(anchor, negative) - d(anchor, positive):

        all: gap <= margin     hard: gap <= 0     semi-hard: 0 < gap <= margin     easy: gap > margin

    "all" are those that give a triplet loss of this margin anything to do; ``margin=math.inf`` gives every
    triplet.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        kind: "all", "hard", "semi-hard" or "easy".
        margin: margin >= 0.
        max_per_anchor: keep at most so many triplets of an anchor, a uniform draw without repetition.
        generator: source of that draw.
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).
        normalize: scale rows to unit length first.

    Returns:
        The triplets. There can be as many as N P M, P being the positives of an anchor; the memory beyond
        them is up to twice theirs and that of a tile.

    Raises:
        ValueError: if labels do not fit z, or an argument is out of range.

    Cost: O(N M (D + P)) time.
    Reference: Schroff et al., "FaceNet", CVPR 2015, arXiv 1503.03832.
    """
    _checks.choice("kind", kind, get_args(Kind))
    _checks.number("margin", margin, at_least=0, finite=False)
    if max_per_anchor is not None:
        _checks.count("max_per_anchor", max_per_anchor)
    comparison = Comparison(
        z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids, normalize=normalize
    )
    found = Collected(3, z.device)
    for part, positive, negative in comparison.each():
        distance = comparison.distances(part)
        anchor, chosen = positive.nonzero(as_tuple=True)
        drawn, keys = torch.empty(3, 0, dtype=torch.int64, device=z.device), torch.empty(0, device=z.device)
        for pairs in tiles(len(anchor), max(1, _CHUNK // negative.shape[1])):
            a, p = anchor[pairs], chosen[pairs]
            gap = distance[a] - distance[a, p][:, None]
            of_kind = negative[a] & _of_kind(gap, kind, margin)
            if max_per_anchor is None:
                row, n = of_kind.nonzero(as_tuple=True)
                found.add(part.start + a[row], p[row], n)
            else:
                row, n, key = _draw(of_kind, max_per_anchor, generator)
                together = torch.cat([drawn, torch.stack([part.start + a[row], p[row], n])], 1)
                drawn, keys = _at_most(together, torch.cat([keys, key]), max_per_anchor)
        found.add(*drawn)
    return Triplets(*found.vectors())


@torch.no_grad()
def mine_batch_hard(
    z: Tensor,
    labels: Tensor,
    *,
    positive: Hardness = "hard",
    negative: Hardness = "hard",
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
) -> Triplets:
    """One triplet an anchor: its farthest or nearest positive with its nearest or farthest negative.

    A hard positive is the farthest one, an easy one the nearest; a hard negative is the nearest one, an
    easy one the farthest. A semi-hard negative is the nearest one that is farther than the chosen positive;
    a semi-hard positive the farthest one that is nearer than the chosen negative. Batch-hard mining is hard
    with hard (the default), easy-positive mining "easy" with "semi-hard" or "hard".

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        positive: "hard", "easy" or, if ``negative`` is not, "semi-hard".
        negative: "hard", "easy" or, if ``positive`` is not, "semi-hard".
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).
        normalize: scale rows to unit length first.

    Returns:
        At most one triplet an anchor: none for an anchor without a positive or without such a negative.

    Raises:
        ValueError: if labels do not fit z, or both choices are "semi-hard".

    Cost: O(N M D) time.
    Reference: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", arXiv 1703.07737;
    Xuan et al., "Improved Embeddings with Easy Positive Triplet Mining", WACV 2020, arXiv 1904.04370.
    """
    _checks.choice("positive", positive, get_args(Hardness))
    _checks.choice("negative", negative, get_args(Hardness))
    if positive == negative == "semi-hard":
        raise ValueError("positive and negative must not both be 'semi-hard': each is relative to the other.")
    comparison = Comparison(
        z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids, normalize=normalize
    )
    found = Collected(3, z.device)
    for part, positives, negatives in comparison.each():
        distance = comparison.distances(part)
        if positive == "semi-hard":
            n, reach = _extreme(distance, negatives, farthest=negative == "easy")
            p, _ = _extreme(distance, positives & (distance < reach[:, None]), farthest=True)
        else:
            p, reach = _extreme(distance, positives, farthest=positive == "hard")
            if negative == "semi-hard":
                negatives = negatives & (distance > reach[:, None])
            n, _ = _extreme(distance, negatives, farthest=negative == "easy")
        a = ((p >= 0) & (n >= 0)).nonzero().flatten()
        found.add(a + part.start, p[a], n[a])
    return Triplets(*found.vectors())


@torch.no_grad()
def mine_distance_weighted(
    z: Tensor,
    labels: Tensor,
    *,
    nearest: float = 0.5,
    farthest: float = 1.4,
    generator: torch.Generator | None = None,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
) -> Triplets:
    """One negative for every positive pair, drawn so that all distances are about equally likely.

    Points spread evenly over the unit sphere in D dimensions lie at distance d with density

        q(d) ~ d^(D-2) (1 - d^2 / 4)^((D-3)/2)

    A negative at distance d of the anchor is drawn with weight 1 / q(max(d, nearest)).

    Args:
        z: embeddings, shape (N, D); scaled to unit length first, as the density is that of a sphere.
        labels: integers, shape (N,).
        nearest: distance below which the weight stops growing, in (0, 2).
        farthest: negatives from this distance on are not drawn, in (nearest, 2].
        generator: source of the draws.
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).

    Returns:
        A triplet for every positive pair whose anchor has a negative nearer than ``farthest``.

    Raises:
        ValueError: if labels do not fit z, or an argument is out of range.

    Cost: O(N M D) time.
    Reference: Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017, arXiv 1706.07567.
    """
    for name, value in (("nearest", nearest), ("farthest", farthest)):
        _checks.positive(name, value)
    if not nearest < farthest <= 2:
        raise ValueError(f"nearest < farthest <= 2 must hold, got {nearest} and {farthest}.")
    comparison = Comparison(z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids)
    width = z.shape[1]
    most = comparison.most_positives()
    places = torch.arange(1, len(comparison.columns) + 1, device=z.device)
    found = Collected(3, z.device)
    for part, positive, negative in comparison.each():
        distance = comparison.distances(part)
        d = distance.clamp(nearest, farthest)
        log_weight = (2 - width) * d.log() - (width - 3) / 2 * (1 - d * d / 4).clamp_min(1e-8).log()
        eligible = negative & (distance < farthest)
        log_weight = log_weight.masked_fill(~eligible, -math.inf)
        top = log_weight.amax(1, keepdim=True).clamp_min(torch.finfo(d.dtype).min)
        share = (log_weight - top).exp().cumsum(1)
        drawn = _uniform((len(share), most), generator, z.device).to(d.dtype) * share[:, -1:]
        # Rounding may lift a draw to the very end of the line, beyond the last eligible candidate.
        last = (eligible * places).amax(1, keepdim=True) - 1
        n = torch.minimum(torch.searchsorted(share, drawn, right=True), last)
        a, p = (positive & eligible.any(1, keepdim=True)).nonzero(as_tuple=True)
        turn = _rank_in_run(a)  # which of its anchor's positives
        found.add(a + part.start, p, n[a, turn])
    return Triplets(*found.vectors())


class TripletMiner:
    """Base of the miners that give triplets, and what a loss over triplets asks for."""

    _function: ClassVar[Callable[..., Triplets]]

    def __call__(self, z: Tensor, labels: Tensor, **candidates: Tensor | None) -> Triplets:
        """Triplets of z (N, D) with labels (N,); ``ref``, ``ref_labels``, ``ids`` and ``ref_ids`` by name."""
        return type(self)._function(z, labels, **vars(self), **candidates)


@dataclass(frozen=True)
class TripletMarginMiner(TripletMiner):
    """Class form of :func:`mine_triplets`."""

    _function = mine_triplets
    margin: float = 0.2
    kind: Kind = "all"
    max_per_anchor: int | None = None
    generator: torch.Generator | None = None
    normalize: bool = True


@dataclass(frozen=True)
class BatchHardMiner(TripletMiner):
    """Class form of :func:`mine_batch_hard`."""

    _function = mine_batch_hard
    positive: Hardness = "hard"
    negative: Hardness = "hard"
    normalize: bool = True


@dataclass(frozen=True)
class DistanceWeightedMiner(TripletMiner):
    """Class form of :func:`mine_distance_weighted`."""

    _function = mine_distance_weighted
    nearest: float = 0.5
    farthest: float = 1.4
    generator: torch.Generator | None = None


def _of_kind(gap: Tensor, kind: Kind, margin: float) -> Tensor:
    if kind == "easy":
        return gap > margin
    if kind == "hard":
        return gap <= 0
    return gap <= margin if kind == "all" else (gap > 0) & (gap <= margin)


def _extreme(distance: Tensor, mask: Tensor, *, farthest: bool) -> tuple[Tensor, Tensor]:
    """Column of the largest or smallest masked entry of every row, -1 where there is none, and the entry."""
    outside = -math.inf if farthest else math.inf
    masked = distance.masked_fill(~mask, outside)
    value, column = masked.max(1) if farthest else masked.min(1)
    return column.masked_fill(~mask.any(1), -1), value


def _draw(mask: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and random key of at most ``count`` true entries of each row, those with the smallest keys."""
    keys = _uniform(tuple(mask.shape), generator, mask.device).masked_fill(~mask, math.inf)
    keys, columns = keys.topk(min(count, mask.shape[1]), dim=1, largest=False)
    drawn = keys < math.inf
    return drawn.nonzero()[:, 0], columns[drawn], keys[drawn]


def _at_most(triplets: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` triplets of every anchor with the smallest keys, in the order they came in."""
    order = keys.argsort(stable=True)
    order = order[triplets[0, order].argsort(stable=True)]
    kept = order[_rank_in_run(triplets[0, order]) < count].sort().values
    return triplets[:, kept], keys[kept]


def _rank_in_run(ordered: Tensor) -> Tensor:
    """0, 1, ... within every run of equal values: (4, 4, 7, 7, 7) gives 0 1 0 1 2."""
    return torch.arange(len(ordered), device=ordered.device) - torch.searchsorted(ordered, ordered)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), drawn where the generator lives."""
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)
