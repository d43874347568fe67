"""Health of a representation: alignment, uniformity, rank, scores of pairs, and a warning on collapse.

Plain measurements: without gradients, outside autocast, in at least float32, and never an N x N tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_core import _checks, _rows, similarity
from cl_core.losses.decoupled import Negatives, compared

_BINS = 64
_FINE_BINS = 64 * _BINS  # quantiles are read off these: to 1/4096 of the range [-1, 1]


def alignment(z1: Tensor, z2: Tensor, *, alpha: float = 2.0) -> Tensor:
    r"""How far apart the views of a sample lie on the unit sphere; 0 is perfect.

        mean_i |u1_i - u2_i|^alpha,   u = z / |z|

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D).
        alpha: exponent > 0; 2 gives 2 - 2 cos.

    Returns:
        Scalar tensor, without gradient.

    Raises:
        ValueError: if shapes differ, a value is not finite, or alpha <= 0.

    Cost: O(N D).
    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242.
    """
    _checks.embeddings("z1", z1)
    _checks.embeddings("z2", z2)
    _checks.same_shape(z1=z1, z2=z2)
    _checks.positive("alpha", alpha)
    with _rows.measuring(z1.device):
        distance: Tensor = torch.linalg.vector_norm(_rows.unit(z1) - _rows.unit(z2), dim=1)
        return distance.pow(alpha).mean()


def uniformity(z: Tensor, *, t: float = 2.0) -> Tensor:
    r"""How evenly the rows cover the unit sphere; 0 when all are equal, lower is more even.

        log mean_{i != j} exp(-t |u_i - u_j|^2),   u = z / |z|

    Args:
        z: embeddings, shape (N, D), N >= 2.
        t: sharpness > 0.

    Returns:
        Scalar tensor, without gradient.

    Raises:
        ValueError: if N < 2, a value is not finite, or t <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, arXiv 2005.10242.
    """
    _checks.embeddings("z", z, at_least=2)
    _checks.positive("t", t)
    with _rows.measuring(z.device):
        # -t |u_i - u_j|^2 = 2 t u_i . u_j - 2 t for unit rows.
        rows = _rows.unit(z) * math.sqrt(2 * t)
        log_sums = similarity.self_log_sum_exp(rows, bound=2 * t)
        return torch.logsumexp(log_sums, 0) - 2 * t - math.log(len(z) * (len(z) - 1))


def effective_rank(z: Tensor, *, center: bool = False, tile: int = 8192) -> Tensor:
    r"""Number of dimensions the rows spread over: exp of the entropy of the normalised singular values.

        exp( -sum_k p_k log p_k ),   p_k = sigma_k / sum_l sigma_l

    Args:
        z: embeddings, shape (N, D).
        center: subtract the mean row first.
        tile: rows at a time.

    Returns:
        Scalar tensor, float64, without gradient, in [1, min(N, D)]; 0 if all entries (after centring) are 0.

    Raises:
        ValueError: if z is not a finite matrix.

    Cost: O(N D min(N, D) + min(N, D)^3) time, O(tile D + min(N, D)^2) memory.
    Reference: Roy and Vetterli, "The Effective Rank", EUSIPCO 2007; as a measure of embeddings: Garrido et
    al., "RankMe", ICML 2023, arXiv 2210.02885.
    """
    _checks.embeddings("z", z)
    _checks.count("tile", tile)
    with _rows.measuring(z.device):
        gram = _gram(z, center, tile)
        energy = torch.linalg.eigvalsh(gram)
        # Singular values that float64 cannot tell from zero are zero: their square roots would add up.
        energy = torch.where(energy > energy[-1] * torch.finfo(energy.dtype).eps * len(energy), energy, 0)
        sigma = energy.clamp_min(0).sqrt()
        total = sigma.sum()
        share = sigma / torch.where(total > 0, total, 1)
        return torch.where(total > 0, torch.special.entr(share).sum().exp(), 0.0)


def _gram(z: Tensor, center: bool, tile: int) -> Tensor:
    """The smaller of the two Gram matrices of ``z`` scaled to largest entry 1, in float64.

    Centring starts from the first row, so that equal rows leave exactly nothing, not the rounding of their mean.
    """
    dtype = _rows.accumulation_dtype(z.device)
    peak = _rows.wide(z).abs().max().to(dtype)
    peak = torch.where(peak > 0, peak, 1)
    blocks = list(_rows.tiles(len(z), tile))
    origin = mean = torch.zeros(z.shape[1], dtype=dtype, device=z.device)
    if center:
        origin = z[0].to(dtype) / peak
        mean = sum(((z[rows].to(dtype) / peak - origin).sum(0) for rows in blocks), start=mean) / len(z)
    if len(z) <= z.shape[1]:
        rows = z.to(dtype) / peak - origin - mean
        return rows @ rows.T
    gram = mean.new_zeros(z.shape[1], z.shape[1])
    for block in blocks:
        rows = z[block].to(dtype) / peak - origin - mean
        gram.addmm_(rows.T, rows)
    return gram


@dataclass(frozen=True)
class ScoreSummary:
    """Distribution of the cosine similarities of one kind of pair. Tensors on the device of the embeddings.

    Attributes:
        count: number of pairs, int64 scalar; with none, mean, variance and quantiles are NaN.
        mean: scalar, float64.
        variance: scalar, float64, divided by the count.
        quantiles: one for each level asked for, float64, read off a histogram: exact to 1/2048.
        histogram: pairs in each of 64 equal bins over [-1, 1], int64.
    """

    count: Tensor
    mean: Tensor
    variance: Tensor
    quantiles: Tensor
    histogram: Tensor


@dataclass(frozen=True)
class ScoreStatistics:
    """Similarities of positive and of negative pairs; made by :func:`score_statistics`."""

    positive: ScoreSummary
    negative: ScoreSummary

    @property
    def overlap(self) -> Tensor:
        """What the two distributions share, the sum over the 64 bins of the smaller share of pairs: 0 apart, 1 equal.

        NaN without a pair of either kind.
        """
        shares = [kind.histogram / kind.count for kind in (self.positive, self.negative)]
        return torch.minimum(*shares).sum()


def score_statistics(
    z1: Tensor,
    z2: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    tile: int = 1024,
) -> ScoreStatistics:
    """Mean, variance, quantiles and histogram of the cosine similarities of positive and negative pairs.

    Every unordered pair of distinct rows counts once. It is positive if both rows are views of one sample or
    share a label, negative otherwise.

    Args:
        z1: embeddings, shape (N, D).
        z2: embeddings of a second view of the samples, shape (N, D); may be left out when there are labels.
        labels: integers of shape (N,); None makes only the two views of a sample a positive pair.
        quantiles: levels in [0, 1].
        tile: rows and columns of similarities at a time.

    Returns:
        :class:`ScoreStatistics`, all of it on the device of ``z1``.

    Raises:
        ValueError: if neither z2 nor labels is given, shapes differ, a value is not finite or a level is
            outside [0, 1].

    Cost: O(N^2 D) time, O(tile^2 + N D) memory.
    """
    _checks.embeddings("z1", z1)
    _checks.count("tile", tile)
    if z2 is None and labels is None:
        raise ValueError("score_statistics needs z2 or labels to know the positive pairs, got neither.")
    if not all(0 <= level <= 1 for level in quantiles):
        raise ValueError(f"quantiles must lie in [0, 1], got {tuple(quantiles)}.")
    if labels is not None:
        _checks.labels("labels", labels, rows=len(z1), of="z1", device=z1.device)
    keys = torch.arange(len(z1), device=z1.device) if labels is None else labels.long()
    with _rows.measuring(z1.device):
        rows = _rows.unit(z1)
        if z2 is not None:
            _checks.embeddings("z2", z2)
            _checks.same_shape(z1=z1, z2=z2)
            rows, keys = torch.cat([rows, _rows.unit(z2)]), torch.cat([keys, keys])
        fine, sums, squares = _pair_counts(rows, keys, tile)
        negative, positive = (
            _summary(*of_kind, quantiles) for of_kind in zip(fine[:2], sums[:2], squares[:2], strict=True)
        )
    return ScoreStatistics(positive, negative)


def _pair_counts(rows: Tensor, keys: Tensor, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fine histogram (3, bins), sum and sum of squares (3,) of pairs: negative, positive, not counted."""
    dtype = _rows.accumulation_dtype(rows.device)
    fine = torch.zeros(3 * _FINE_BINS, dtype=torch.int64, device=rows.device)
    sums, squares = torch.zeros(2, 3, dtype=dtype, device=rows.device)
    for above in _rows.tiles(len(rows), tile):
        for left in _rows.tiles(above.stop, tile):
            scores = (rows[above] @ rows[left].T).clamp_(-1, 1)
            kind = (keys[above, None] == keys[None, left]).long()
            if left == above:  # each pair once, no row with itself
                kind += 2 * torch.ones_like(kind).triu_()
                kind.clamp_max_(2)
            kind, scores = kind.flatten(), scores.flatten()
            bins = ((scores + 1) * (_FINE_BINS / 2)).long().clamp_max_(_FINE_BINS - 1)
            fine += torch.bincount(kind * _FINE_BINS + bins, minlength=len(fine))
            scores = scores.to(dtype)
            sums.index_add_(0, kind, scores)
            squares.index_add_(0, kind, scores * scores)
    return fine.view(3, _FINE_BINS), sums, squares


def _summary(fine: Tensor, total: Tensor, squares: Tensor, levels: Sequence[float]) -> ScoreSummary:
    count = fine.sum()
    mean = total / count
    variance = (squares / count - mean * mean).clamp_min(0)
    cumulative = fine.cumsum(0)
    target = torch.tensor(tuple(levels), dtype=total.dtype, device=total.device) * count
    target = target.clamp_min(1e-6)  # level 0 is the first pair, not the first bin
    # The bin in which the count is reached, and the share of that bin below it.
    place = torch.searchsorted(cumulative.to(total.dtype), target).clamp_max(len(fine) - 1)
    below = (cumulative - fine)[place]
    share = ((target - below) / fine[place].clamp_min(1)).clamp(0, 1)
    quantiles = torch.where(count > 0, (place + share) * (2 / len(fine)) - 1, math.nan)
    return ScoreSummary(count, mean, variance, quantiles, fine.view(_BINS, -1).sum(1))


def npc_factor(
    z1: Tensor,
    z2: Tensor,
    *,
    negatives: Negatives | None = None,
    temperature: float = 0.1,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    r"""The factor q that InfoNCE's gradient is multiplied by and that the decoupled loss removes.

    With the positive logit s_i and U_i = sum over both views of all other samples of exp(similarity / T),

        q_i = U_i / (exp(s_i) + U_i) = 1 - exp(-NT-Xent_i)

    Near 0 an anchor is already told from its negatives and hardly learns; small batches and easy positives
    do that.

    Args:
        z1: embeddings of view 1, shape (N, D).
        z2: embeddings of view 2, shape (N, D).
        negatives: what U_i sums over, as in :func:`cl_core.functional.dcl_loss`: "both" views of all other samples (so
            does None), "cross", "keys" or a queue of shape (K, D).
        temperature: T > 0.
        reduction: "mean" over the 2N anchors (with "keys" or a queue N), or "none" for one value an anchor, view 1
            first.

    Returns:
        Scalar or a vector, without gradient, in [0, 1]; 0 for a batch of one without a queue.

    Raises:
        ValueError: if shapes differ, a value is not finite, or T <= 0.

    Cost: O(N^2 D) time, O(N D) memory beyond a few thousand rows.
    Reference: Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, arXiv 2110.06848.
    """
    _checks.choice("reduction", reduction, ("mean", "none"))
    _checks.embeddings("z1", z1)
    with _rows.measuring(z1.device):
        options = {"temperature": temperature, "normalize": True, "group": None, "impl": "auto"}
        positives, log_negatives, _ = compared(z1, z2, "both" if negatives is None else negatives, **options)
        factors = torch.sigmoid(log_negatives - positives).t().flatten()
        return factors.mean() if reduction == "mean" else factors


def collapse_warning(z: Tensor, *, minimum_spread: float = 0.1, minimum_rank: float = 0.05) -> str | None:
    r"""A sentence if the embeddings have collapsed, None if they look healthy.

    Two signs, both of unit rows u. Complete collapse: the spread sqrt(sum_d var(u_d)), 1 for rows even over
    the sphere and 0 for equal rows, is below ``minimum_spread``. Dimensional collapse: of the directions the
    centred rows could use, the share (effective rank - 1) / (min(N - 1, D) - 1) is below ``minimum_rank``.

    Args:
        z: embeddings, shape (N, D), N >= 2; a few hundred rows are enough.
        minimum_spread: dimensionless, >= 0.
        minimum_rank: share in [0, 1].

    Returns:
        The message, or None.

    Raises:
        ValueError: if N < 2 or a value is not finite.

    Cost: O(N D min(N, D)); reads its verdict back to the host.
    """
    _checks.embeddings("z", z, at_least=2)
    with _rows.measuring(z.device):
        u = _rows.unit(z).to(_rows.accumulation_dtype(z.device))
        rows, width = u.shape
        if bool((z == z[0]).all()):
            return f"collapsed: all {rows} embeddings are equal."
        spread = float(u.var(dim=0, correction=0).sum().sqrt())
        if spread < minimum_spread:
            return (
                f"collapsed: {rows} embeddings point almost the same way, spread {spread:.3g} of 1, "
                f"below {minimum_spread:g}."
            )
        directions = min(rows - 1, width)
        rank = float(effective_rank(u, center=True))
        if directions > 1 and (rank - 1) / (directions - 1) < minimum_rank:
            return (
                f"dimensional collapse: {rows} embeddings of width {width} have effective rank {rank:.1f} of "
                f"{directions}, below a share of {minimum_rank:g}."
            )
    return None
