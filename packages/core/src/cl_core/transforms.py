"""Transformations of embeddings before any loss: positives moved apart, negatives mixed with each other.

    extrapolate, interpolate = PositiveExtrapolation(2.0), NegativeInterpolation(1.6)
    query, key = extrapolate(query, key)            # rows of unit length
    loss = info_nce_loss(query, key, interpolate(queue), normalize=False)

What comes out has no unit length, hence ``normalize=False``. :class:`cl_core.losses.FeatureTransform` wraps both around
a loss, so that its host notices nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from cl_core import _checks, similarity

Granularity: TypeAlias = Literal["scalar", "sample", "dim"]
"""What has a weight of its own: one for all rows, one a row, or one an entry."""


def extrapolate_positives(
    query: Tensor, key: Tensor, lam: float | Tensor, *, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Move the two rows of each pair along the line through them.

        q'_i = lam q_i + (1 - lam) k_i,    k'_i = lam k_i + (1 - lam) q_i

    With lam > 1 they part, with lam in (0, 1) they meet. For unit rows of product s and one lam a row

        q'_i . k'_i = s - 2 lam (lam - 1) (1 - s),    |q'_i|^2 = |k'_i|^2 = 1 + 2 lam (lam - 1) (1 - s)

    so that lam in [1, 2] gives scores in [5 s - 4, s], and rows longer than 1.

    Args:
        query: shape (N, D).
        key: shape (N, D); row i is the positive of row i of query. Each result depends on both.
        lam: a number, or a constant tensor of shape (), (N, 1) or (N, D).
        renormalize: scale the results to unit length.

    Returns:
        Two tensors of shape (N, D), at least float32.

    Raises:
        ValueError: if shapes do not fit or a value is not finite.

    Cost: O(N D).
    Reference: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021,
    arXiv 2108.02982.
    """
    _checks.embeddings("query", query, at_least=0)
    _checks.embeddings("key", key, at_least=0)
    _checks.same_shape(query=query, key=key)
    _check_weights("lam", lam, query)
    _checks.flag("renormalize", renormalize)
    return _extrapolated(query, key, lam, renormalize)


def interpolate_negatives(negatives: Tensor, lam: float | Tensor, permutation: Tensor) -> Tensor:
    r"""Mix each row with another.

        z'_j = lam z_j + (1 - lam) z_pi(j)

    Scores keep their mean; their variance shrinks by lam^2 + (1 - lam)^2 where the rows are uncorrelated.

    Args:
        negatives: shape (K, D); not changed.
        lam: a number, or a constant tensor of shape (), (K, 1) or (K, D).
        permutation: integers of shape (K,), the partner pi(j) of each row; a row may be its own.

    Returns:
        Shape (K, D), at least float32.

    Raises:
        ValueError: if shapes do not fit, a value is not finite, or a partner is not there.

    Cost: O(K D). For one lam a row the scores of N queries could be mixed instead, lam s_ij + (1 - lam) s_i,pi(j); that
    is slower, for it needs them as N x K tensors where the losses need none.
    Reference: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021,
    arXiv 2108.02982.
    """
    _checks.embeddings("negatives", negatives, at_least=0)
    _check_weights("lam", lam, negatives)
    _check_permutation(permutation, negatives)
    return _interpolated(negatives, lam, permutation)


def _extrapolated(
    query: Tensor, key: Tensor, lam: float | Tensor, renormalize: bool
) -> tuple[Tensor, Tensor]:
    query, key = similarity.at_least_float32(query), similarity.at_least_float32(key)
    lam = _constant(lam, query)
    pair = torch.lerp(key, query, lam), torch.lerp(query, key, lam)
    return tuple(similarity.scaled_rows(rows) for rows in pair) if renormalize else pair  # type: ignore[return-value]


def _interpolated(negatives: Tensor, lam: float | Tensor, permutation: Tensor) -> Tensor:
    negatives = similarity.at_least_float32(negatives)
    # Into the partners' copy: for a large queue one matrix more would double the cost.
    return negatives.index_select(0, permutation.long()).lerp_(negatives, _constant(lam, negatives))


def _constant(lam: float | Tensor, rows: Tensor) -> float | Tensor:
    return lam.detach().to(rows.device, rows.dtype) if isinstance(lam, Tensor) else lam


def _check_weights(name: str, lam: float | Tensor, rows: Tensor) -> None:
    """Refuse anything but a number or a finite tensor with one entry in all, a row or an entry of ``rows``."""
    if not isinstance(lam, Tensor):
        _checks.number(name, lam)
        return
    count, width = rows.shape
    if tuple(lam.shape) not in {(), (count, 1), (count, width)} or not lam.is_floating_point():
        raise ValueError(
            f"{name} must be a number or a floating tensor of shape (), ({count}, 1) or ({count}, {width}), got "
            f"{lam.dtype} of {tuple(lam.shape)}."
        )
    _checks.finite(name, lam)


def _check_permutation(permutation: Tensor, rows: Tensor) -> None:
    _checks.labels("permutation", permutation, rows=len(rows), of="negatives", device=rows.device)
    inside = ((permutation >= 0) & (permutation < len(rows))).all()
    _checks.require(inside, f"permutation must hold row numbers, 0 to {len(rows) - 1}, got a value outside.")


class _Mixing(nn.Module):
    """What draws its weights from Beta(alpha, alpha)."""

    def __init__(self, alpha: float, granularity: Granularity) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            raise TypeError("alpha must be a number > 0, got a tensor.")
        _checks.positive("alpha", alpha)
        _checks.choice("granularity", granularity, get_args(Granularity))
        self.alpha, self.granularity = alpha, granularity

    def draw(self, rows: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Weights for rows (N, D), of shape (), (N, 1) or (N, D) as the granularity says.

        Args:
            rows: only their shape, type and device matter.
            generator: source of the numbers, on whose device they are drawn; None for the default one of the rows'
                device.
        """
        count, width = rows.shape
        shape = {"scalar": (), "sample": (count, 1), "dim": (count, width)}[self.granularity]
        dtype = torch.promote_types(rows.dtype, torch.float32)
        source = _source(rows.device, generator)
        return symmetric_beta(self.alpha, shape, dtype=dtype, **source).to(rows.device)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"alpha={self.alpha!r}, granularity={self.granularity!r}"


class PositiveExtrapolation(_Mixing):
    """Makes positives harder: :func:`extrapolate_positives` with lam - 1 drawn from Beta(alpha, alpha).

    The expected score of a positive falls from s to s - (1 + (alpha + 1) / (2 alpha + 1)) (1 - s).

    Args:
        alpha: > 0; the larger, the closer is lam to 1.5, below 1 it tends to 1 and 2.
        granularity: "scalar" draws one lam for all pairs, as the authors' published commands do; "sample" one a pair;
            "dim" one an entry, which the paper describes.
        renormalize: scale the results to unit length.

    Reference: as of :func:`extrapolate_positives`.
    """

    def __init__(
        self, alpha: float = 2.0, granularity: Granularity = "dim", renormalize: bool = False
    ) -> None:
        super().__init__(alpha, granularity)
        _checks.flag("renormalize", renormalize)
        self.renormalize = renormalize

    def draw(self, rows: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Weights in [1, 2] for rows (N, D), of shape (), (N, 1) or (N, D) as the granularity says."""
        return super().draw(rows, generator=generator) + 1

    def forward(
        self, query: Tensor, key: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pairs moved apart; of queries (N, D) and keys (N, D), best of unit length."""
        _checks.embeddings("query", query, at_least=0)
        return extrapolate_positives(
            query, key, self.draw(query, generator=generator), renormalize=self.renormalize
        )

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"{super().extra_repr()}, renormalize={self.renormalize}"


class NegativeInterpolation(_Mixing):
    """Makes negatives more diverse: :func:`interpolate_negatives` with lam drawn from Beta(alpha, alpha).

    The rows' partners are a permutation, drawn anew in each call. The variance of uncorrelated scores shrinks by
    (alpha + 1) / (2 alpha + 1).

    Args:
        alpha: > 0; the larger, the closer is lam to 0.5, below 1 it tends to 0 and 1.
        granularity: "scalar" draws one lam for all rows, as the authors' published commands do; "sample" one a row;
            "dim" one an entry, which the paper describes.

    Reference: as of :func:`interpolate_negatives`.
    """

    def __init__(self, alpha: float = 1.6, granularity: Granularity = "dim") -> None:
        super().__init__(alpha, granularity)

    def forward(self, negatives: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Mixtures of the rows of a queue (K, D), which stays as it is."""
        _checks.embeddings("negatives", negatives, at_least=0)
        lam = self.draw(negatives, generator=generator)
        return interpolate_negatives(
            negatives, lam, _partners(len(negatives), negatives.device, generator=generator)
        )


def _partners(
    count: int, device: torch.device, *, pairs: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """A random permutation of ``count`` rows, shape (count,), or one that exchanges the rows of pairs.

    Args:
        count: number of rows.
        device: of the result.
        pairs: let i be the partner of its partner; with an odd count one row is its own.
        generator: source of the numbers; None for the default one of the device.
    """
    order = torch.randperm(count, **_source(device, generator)).to(device)
    if not pairs:
        return order
    even = count - count % 2
    swapped = torch.cat([order[:even].view(-1, 2).flip(1).flatten(), order[even:]])
    return torch.empty_like(order).scatter_(0, order, swapped)


def _source(device: torch.device | None, generator: torch.Generator | None) -> dict[str, Any]:
    """Where to draw. A compiler with symbols for shapes takes no generator, not even None."""
    return {"device": device} if generator is None else {"device": generator.device, "generator": generator}


def symmetric_beta(
    alpha: float,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Independent draws from Beta(alpha, alpha), in [0, 1].

    With U uniform in (0, 1) and V in (0, pi),

        (1 + c / sqrt(c^2 + 1 / (U^(-1 / alpha) - 1))) / 2,    c = cos V

    for sqrt(2 alpha (U^(-1 / alpha) - 1)) c is distributed as Student's t with 2 alpha degrees of freedom, and Beta is
    a function of that. There is neither rejection, which would have to wait for the device, nor a table.

    Args:
        alpha: > 0.
        shape: of the result.
        dtype: float32 or float64.
        device: where to draw; None for torch's default.
        generator: source of the numbers, on whose device they are drawn instead; None for the default one.

    Returns:
        A tensor of that shape.

    Raises:
        ValueError: if alpha is not finite and > 0.

    Cost: two uniform numbers and a dozen operations an entry; on a CPU a fifth of NumPy's time.
    Reference: Bailey, "Polar generation of random variates with the t-distribution", Mathematics of Computation 62
    (1994).
    """
    _checks.positive("alpha", alpha)
    drawn = {"dtype": dtype, **_source(device, generator)}
    # Of U = 0 the logarithm is -inf and all that follows is right; expm1 keeps what a large alpha leaves of it.
    odds = torch.rand(tuple(shape), **drawn).log_().div_(-alpha).expm1_().reciprocal_()
    cosine = torch.rand(tuple(shape), **drawn).mul_(math.pi).cos_()
    return cosine.mul_(odds.addcmul_(cosine, cosine).rsqrt_()).add_(1).mul_(0.5)
