r"""AMCL: several projection heads, a temperature for every pair in every head, the hardest negative in place of a sum.

The heads lie side by side: an embedding of C heads is one row of C d columns. Any host of two views, or of queries,
keys and a queue, thus takes these losses with a projector of C d columns. A pair of similarity s and temperature tau
counts as

    s / tau - beta Om(tau),    Om(tau) = d/2 log tau + 1 / tau

which for beta = 1 is, up to a constant, the log-density of unit rows under a Gaussian of variance tau. For no beta is
it bounded as tau goes to 0, neither for positives (s > beta) nor, with the other sign, for negatives (s < beta): what
bounds the loss is the least temperature. :meth:`AMCLLoss.measures` tells how many temperatures sit there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_core import _checks, _rows
from cl_core._dense import product
from cl_core._types import Group, Reduction
from cl_core.losses._base import ContrastiveLoss, PredictionLoss, QueryKeyLoss, TwoViewLoss
from cl_core.losses._common import reduce, reduce_pairs
from cl_core.losses._heads import (
    Pairs,
    Temperature,
    check_options,
    lay_out,
    omega,
    predicted_pairs,
    width_of_heads,
)
from cl_core.losses.redundancy import check_views, off_diagonal, standardised
from cl_core.temperatures import PairTemperature, check_range, scaled_sigmoid

Pooling: TypeAlias = Literal["max", "lse"]
"""What stands for the negatives of an anchor: the most similar one, or the log-sum-exp over all."""

_FLOOR = 0.01  # share of the range of temperatures, from the least one on, that counts as sitting there
_ALIKE = 0.99  # mean cosine of hardest negatives, and of positives, beyond which all rows are one


def amcl_loss(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    heads: int,
    temperature: Temperature,
    beta: float = 0.1,
    pooling: Pooling = "max",
    include_positive: bool = False,
    normalize: bool = True,
    raw_input: bool = False,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Adaptive multi-head contrastive loss of two views, or of queries, keys and a queue.

    With u_i the unit row of anchor i in a head, p its other view, n* the most similar of its negatives N(i) and the
    temperatures tau of the two pairs,

        P_i = u_i . u_p  / tau_ip  - beta Om(tau_ip),    Om(tau) = d/2 log tau + 1 / tau
        Q_i = u_i . u_n* / tau_in* - beta Om(tau_in*)
        l_i = sum over heads of Q_i - P_i

    n* is the one of the raw similarities, and the choice carries no gradient. ``pooling="lse"`` takes all negatives,
    Q_i = log sum_{n in N(i)} exp(u_i . u_n / tau_in - beta Om(tau_in)), which is never less. With ``include_positive``
    the positive is among the candidates: l_i sums Q_i - P_i where some negative is more similar than the positive and
    0 elsewhere, or with "lse" log(1 + exp(Q_i - P_i)). Constant temperatures and beta = 0 make "lse" the loss
    :func:`dcl_loss` of every head, with ``include_positive`` :func:`nt_xent_loss` (with a queue :func:`info_nce_loss`).

    Values may be negative, and fall as temperatures approach their least value: choose a training's best epoch by
    another measure.

    Args:
        z1: embeddings of view 1, shape (N, C d), head by head; N >= 2 over all ranks unless there is a queue.
        z2: embeddings of view 2, shape (N, C d); row i is the same sample as row i of z1.
        negatives: a queue of shape (K, C d), the same on all ranks. Then the rows of z1 alone are anchors, and the
            batch holds no negatives.
        heads: C, which divides the number of columns.
        temperature: a function of anchors and others, such as :class:`PairTemperature`, or one T > 0 for all pairs.
        beta: weight >= 0 of the regulariser of temperatures.
        pooling: "max" for the most similar negative, "lse" for the log-sum-exp over all of them.
        include_positive: count the positive among the candidates (hosts with InfoNCE), rather than the negatives alone.
        normalize: scale each head's rows to unit length first. False takes the rows as they are.
        raw_input: show the temperature the rows as they came, as the authors' module does, rather than of unit length.
        reduction: "mean" over the 2N anchors (N with a queue), "sum", or "none" for one value an anchor, view 1 first.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.

    Returns:
        Scalar, or shape (2N,) (with a queue (N,)) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if there are no negatives (one row and no queue), shapes differ, C does not divide the columns, or a
            number is out of range.

    Cost: O(C N^2 d) time (with a queue O(C N K d)), forward only, and O(C (N + K) d) memory, with a group of all ranks'
    rows. The hardest are found tile by tile, and 2 C temperatures computed an anchor. "lse" takes one for every pair:
    O(C N^2 h) time for a hidden layer of width h, in both directions, some anchors at a time; it is eager only.
    Reference: Wang et al., "Adaptive Multi-head Contrastive Learning", ECCV 2024, arXiv 2310.05615: the equation for
    SimCLR and MoCo, with ``include_positive`` that for LGP and CAN. The released code has another loss and cannot run.
    """
    _checks.reduction(reduction)
    check_options(beta=beta, pooling=pooling, include_positive=include_positive)
    options = {"heads": heads, "temperature": temperature, "normalize": normalize, "raw_input": raw_input}
    compared = lay_out(z1, z2, negatives, group=group, **options)
    positive = compared.positive()
    of_positive = positive.value(beta)
    if pooling == "lse":
        difference = compared.log_sum_exp(beta) - of_positive
        values = F.softplus(difference, threshold=60) if include_positive else difference
    else:
        hardest = compared.hardest()
        values = hardest.value(beta) - of_positive
        if include_positive:  # where the positive is its own hardest candidate, both terms are one
            values = torch.where(hardest.similarity > positive.similarity, values, 0)
    return reduce_pairs(values.sum(0).view(-1, compared.sides), reduction, compared.split)


def amcl_simsiam_loss(
    p: Tensor,
    z: Tensor,
    *,
    heads: int,
    temperature: Temperature,
    beta: float = 0.1,
    normalize: bool = True,
    raw_input: bool = False,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Adaptive multi-head form of the loss of SimSiam: no negatives, targets are constants.

    With the cosine s_i of prediction and target in a head and the temperature tau_i of that pair,

        l_i = sum over heads of -s_i / tau_i + 2 beta Om(tau_i),    Om(tau) = d/2 log tau + 1 / tau

    The loss of two views is the mean of (p1, z2) and (p2, z1), in which Om has the weight beta of either.

    Args:
        p: predictions, shape (N, C d), head by head.
        z: targets, shape (N, C d), which receive no gradient; row i is another view of the sample of p's row i.
        heads: as in :func:`amcl_loss`.
        temperature: as in :func:`amcl_loss`, of a prediction and its target.
        beta: as in :func:`amcl_loss`.
        normalize: as in :func:`amcl_loss`.
        raw_input: as in :func:`amcl_loss`.
        reduction: "mean" over the N rows, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ, an input is empty or not finite, or a number is out of range.

    Cost: O(C N d h) for a hidden layer of width h.
    Reference: Wang et al., "Adaptive Multi-head Contrastive Learning", ECCV 2024, arXiv 2310.05615. There the targets
    have no head index; here they are of the same head.
    """
    _checks.reduction(reduction)
    check_options(beta=beta)
    options = {"heads": heads, "temperature": temperature, "normalize": normalize, "raw_input": raw_input}
    predicted, split = predicted_pairs(p, z, group=group, **options)
    return reduce(-predicted.value(2 * beta).sum(0), reduction, split=split)


def amcl_barlow_loss(
    z1: Tensor,
    z2: Tensor,
    *,
    heads: int,
    temperature: float | Tensor,
    lambd: float = 0.005,
    beta: float = 0.1,
    eps: float = 1e-5,
    group: Group = None,
) -> Tensor:
    r"""Adaptive multi-head form of Barlow Twins: a temperature for every pair of dimensions.

    With the correlation K_kl of dimension k of view 1 and l of view 2 in a head, over the batch,

        L = sum over heads of  sum_k (1 - K_kk / tau_kk)^2 + lambd sum_{k != l} K_kl^2 / tau_kl
                             + beta (sum_k Om(tau_kk) - sum_{k != l} Om(tau_kl)),   Om(tau) = d/2 log tau + 1 / tau

    Dimensions are divided by the root of their unbiased variance plus eps, their products by N.

    Args:
        z1: embeddings of view 1, shape (N, C d), head by head, N >= 2 over all ranks.
        z2: embeddings of view 2, shape (N, C d); row i is the same sample as row i of z1.
        heads: C, which divides the number of columns.
        temperature: shape (C, d, d), entries > 0; or one T > 0 for all pairs.
        lambd: weight >= 0 of the redundancy between dimensions.
        beta: weight >= 0 of the regulariser of temperatures.
        eps: added to variances, > 0.
        group: process group over which the batch is spread: statistics are those of all its rows.

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there are fewer than 2 rows, shapes differ, C does not divide the columns, a value is not finite,
            or a number is out of range.

    Cost: O(C N d^2) time, O(C d^2 + C N d) memory.
    Reference: Wang et al., "Adaptive Multi-head Contrastive Learning", ECCV 2024, arXiv 2310.05615. How the
    temperatures are made is not said there; :class:`AMCLBarlowLoss` learns them.
    """
    check_options(lambd=lambd, beta=beta, eps=eps)
    split = check_views(z1, z2, group, "amcl_barlow_loss")
    width = width_of_heads(heads, z1=z1)
    standard = standardised(z1, z2, split, eps=eps, correction=1).unflatten(2, (heads, width)).transpose(1, 2)
    correlation = split.sum(product(standard[0].mT, standard[1])) / split.total
    tau = _of_dimensions(temperature, correlation)
    same, of_same = (matrix.diagonal(dim1=1, dim2=2) for matrix in (correlation, tau))
    others, of_others = off_diagonal(correlation), off_diagonal(tau)
    regulariser = omega(of_same, width).sum() - omega(of_others, width).sum()
    redundancy = (others.square() / of_others).sum()
    return (1 - same / of_same).square().sum() + lambd * redundancy + beta * regulariser


def _of_dimensions(temperature: float | Tensor, correlation: Tensor) -> Tensor:
    """A temperature for every pair of dimensions, shape (C, d, d)."""
    if not isinstance(temperature, Tensor) or not temperature.ndim:
        _checks.temperature("temperature", temperature)
        if not isinstance(temperature, Tensor):
            temperature = correlation.new_full((), temperature)
        return temperature.to(correlation.dtype).expand(correlation.shape).contiguous()
    if temperature.shape != correlation.shape:
        wanted, came = tuple(correlation.shape), tuple(temperature.shape)
        raise ValueError(f"temperature must be 0-d or of shape {wanted}, got shape {came}.")
    _checks.temperature("temperature", temperature.flatten(), rows=temperature.numel())
    return temperature.to(correlation.dtype).contiguous()


# ---- modules ---------------------------------------------------------------------------------------------------------

_OF_TEMPERATURE = ("dim", "hidden_dim", "shared", "detach_input", "min_temperature", "max_temperature")


class _AdaptiveLoss(ContrastiveLoss):
    """What the modules have in common: a least temperature, and to tell how many temperatures sit there."""

    min_temperature: float
    max_temperature: float

    def advice(self, measures: Mapping[str, Tensor]) -> str | None:
        """A sentence if more than half of the temperatures of one kind are the least one."""
        for side in ("positive", "negative"):
            share = float(measures.get(f"tau_{side}_at_floor", 0.0))
            if share > 0.5:
                return (
                    f"{100 * share:.0f} % of the temperatures of {side} pairs are at min_temperature="
                    f"{self.min_temperature}, which alone bounds the loss there: raise min_temperature, change beta, "
                    "or let the temperatures learn more slowly."
                )
        return None

    def _described(self, side: str, tau: Tensor) -> dict[str, Tensor]:
        """Quantiles of temperatures and the share at the least one; nothing of constant ones."""
        if self.min_temperature == self.max_temperature or not tau.numel():
            return {}
        quantiles = tau.flatten().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=tau.dtype, device=tau.device))
        floor = self.min_temperature + _FLOOR * (self.max_temperature - self.min_temperature)
        values = (*quantiles, (tau < floor).to(tau.dtype).mean())
        names = ("q10", "median", "q90", "at_floor")
        return {f"tau_{side}_{name}": value for name, value in zip(names, values, strict=True)}


class _PairwiseLoss(_AdaptiveLoss):
    """A loss of pairs of rows, whose temperatures are a network's or one constant."""

    def __init__(self, **hyperparameters: Any) -> None:
        check_options(**hyperparameters)
        super().__init__(**hyperparameters)
        self.pair_temperature = _network(**hyperparameters)

    def _options(self, *without: str) -> dict[str, Any]:
        """What the function is called with beside the inputs."""
        options = {k: v for k, v in self.hyperparameters().items() if k not in (*_OF_TEMPERATURE, *without)}
        constant = self.pair_temperature is None
        return options | {"temperature": self.min_temperature if constant else self.pair_temperature}

    def _of_pairs(self, side: str, pairs: Pairs) -> dict[str, Tensor]:
        return {f"similarity_{side}": pairs.similarity.mean()} | self._described(side, pairs.temperature)


def _network(
    *,
    dim: int,
    heads: int,
    hidden_dim: int,
    shared: bool,
    detach_input: bool,
    min_temperature: float,
    max_temperature: float,
    **_: Any,
) -> PairTemperature | None:
    """The network of temperatures; None for a constant one."""
    check_range(min_temperature, max_temperature, "min_temperature", "max_temperature")
    if min_temperature == max_temperature:
        return None
    ends = {"minimum": min_temperature, "maximum": max_temperature}
    return PairTemperature(
        dim, heads=heads, hidden_dim=hidden_dim, shared=shared, detach_input=detach_input, **ends
    )


class AMCLLoss(_PairwiseLoss, QueryKeyLoss):
    """Module form of :func:`amcl_loss`, with a :class:`PairTemperature` to learn.

    It is part of what is optimised. The least temperature alone bounds the loss, so log :meth:`measures` and warn with
    what :meth:`advice` says of them.

    Args:
        dim: d, columns of a head: the projector emits ``heads * dim``.
        heads: C.
        beta: weight >= 0 of the regulariser of temperatures.
        min_temperature: least temperature > 0.
        max_temperature: largest temperature. If both are equal, all pairs have it and nothing is learnt.
        pooling: "max" for the most similar negative, "lse" for the log-sum-exp over all of them.
        include_positive: count the positive among the candidates.
        hidden_dim: width of the hidden layer of the temperature.
        shared: one network of temperatures for all heads.
        detach_input: give the embeddings no gradient through the temperature.
        raw_input: show the temperature the rows as they came, rather than of unit length.
        normalize: scale each head's rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group whose other rows serve as negatives: None, "world" or a process group.
    """

    def __init__(
        self,
        dim: int = 128,
        heads: int = 3,
        beta: float = 0.1,
        *,
        min_temperature: float = 0.05,
        max_temperature: float = 2.0,
        pooling: Pooling = "max",
        include_positive: bool = False,
        hidden_dim: int = 128,
        shared: bool = False,
        detach_input: bool = False,
        raw_input: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            beta=beta,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            pooling=pooling,
            include_positive=include_positive,
            hidden_dim=hidden_dim,
            shared=shared,
            detach_input=detach_input,
            raw_input=raw_input,
            normalize=normalize,
            reduction=reduction,
            group=group,
        )

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> Tensor:
        """Loss of two views, each of shape (N, C d); with a queue (K, C d) its rows are the negatives."""
        return amcl_loss(query, key, negatives, **self._options())

    def measures(self, query: Tensor, key: Tensor, negatives: Tensor | None = None) -> dict[str, Tensor]:
        """Mean similarity, quantiles of temperatures and their share at the least one, of positives and of n*.

        Of this process's rows alone; with a group, n* is the hardest negative among them. Nothing of rows without a
        negative.
        """
        if len(query) < (2 if negatives is None else 1):
            return {}
        with _rows.measuring(query.device):
            options = self._options("beta", "pooling", "include_positive", "reduction", "group")
            compared = lay_out(query, key, negatives, group=None, **options)
            positive = self._of_pairs("positive", compared.positive())
            return positive | self._of_pairs("negative", compared.hardest())

    def advice(self, measures: Mapping[str, Tensor]) -> str | None:
        """A sentence if all rows are one, else one if temperatures are at the least one."""
        positive, negative = (
            float(measures.get(f"similarity_{side}", 0.0)) for side in ("positive", "negative")
        )
        if self.normalize and min(positive, negative) > _ALIKE:
            # Where views differ more than samples do, the hardest negative is more similar than the positive, and
            # making all rows one lowers the loss to 0.
            remedy = "" if self.pooling == "lse" else 'pooling="lse", which parts all negatives, '
            return (
                f"positives have a mean similarity of {positive:.4f} and hardest negatives of {negative:.4f}, so all "
                f"rows are nearly one: if that lasts, take {remedy}milder views or a smaller learning rate."
            )
        return super().advice(measures)


class AMCLSimSiamLoss(_PairwiseLoss, PredictionLoss):
    """Module form of :func:`amcl_simsiam_loss`, with a :class:`PairTemperature` to learn; see :class:`AMCLLoss`.

    Args:
        dim: d, columns of a head: projector and predictor emit ``heads * dim``.
        heads: C.
        beta: weight >= 0 of the regulariser of temperatures.
        min_temperature: least temperature > 0.
        max_temperature: largest temperature. If both are equal, all pairs have it and nothing is learnt.
        hidden_dim: width of the hidden layer of the temperature.
        shared: one network of temperatures for all heads.
        detach_input: give the embeddings no gradient through the temperature.
        raw_input: show the temperature the rows as they came, rather than of unit length.
        normalize: scale each head's rows to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        dim: int = 128,
        heads: int = 3,
        beta: float = 0.1,
        *,
        min_temperature: float = 0.05,
        max_temperature: float = 2.0,
        hidden_dim: int = 128,
        shared: bool = False,
        detach_input: bool = False,
        raw_input: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            beta=beta,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            hidden_dim=hidden_dim,
            shared=shared,
            detach_input=detach_input,
            raw_input=raw_input,
            normalize=normalize,
            reduction=reduction,
            group=group,
        )

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        """Loss of predictions (N, C d) and targets (N, C d)."""
        return amcl_simsiam_loss(p, z, **self._options())

    def measures(self, p: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Mean similarity, quantiles of temperatures and their share at the least one, of this process's rows."""
        if not len(p):
            return {}
        with _rows.measuring(p.device):
            pairs, _ = predicted_pairs(p, z, group=None, **self._options("beta", "reduction", "group"))
            return self._of_pairs("positive", pairs)


class AMCLBarlowLoss(_AdaptiveLoss, TwoViewLoss):
    """Module form of :func:`amcl_barlow_loss`, with a logit to learn for every temperature.

    The parameter ``temperature_logits``, shape (C, d, d), starts at 0, the middle of the range. At d = 256 it holds
    65,536 numbers a head, at d = 2048 four million.

    Args:
        dim: d, columns of a head: the projector emits ``heads * dim``.
        heads: C.
        lambd: weight >= 0 of the redundancy between dimensions.
        beta: weight >= 0 of the regulariser of temperatures.
        min_temperature: least temperature > 0.
        max_temperature: largest temperature. If both are equal, all pairs have it and nothing is learnt.
        eps: added to variances, > 0.
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    dim: int
    heads: int

    def __init__(
        self,
        dim: int = 128,
        heads: int = 3,
        lambd: float = 0.005,
        beta: float = 0.1,
        *,
        min_temperature: float = 0.05,
        max_temperature: float = 2.0,
        eps: float = 1e-5,
        group: Group = None,
    ) -> None:
        check_options(dim=dim, heads=heads, lambd=lambd, beta=beta, eps=eps)
        check_range(min_temperature, max_temperature, "min_temperature", "max_temperature")
        super().__init__(
            dim=dim,
            heads=heads,
            lambd=lambd,
            beta=beta,
            min_temperature=min_temperature,
            max_temperature=max_temperature,
            eps=eps,
            group=group,
        )
        learnt = min_temperature < max_temperature
        self.temperature_logits = nn.Parameter(torch.zeros(heads, dim, dim), requires_grad=learnt)

    @property
    def pair_temperature(self) -> Tensor:
        """Temperatures of all pairs of dimensions, shape (C, d, d)."""
        return scaled_sigmoid(self.temperature_logits, self.min_temperature, self.max_temperature)

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Loss of two views, each of shape (N, C d)."""
        wanted = self.heads * self.dim
        if isinstance(z1, Tensor) and z1.ndim == 2 and z1.shape[1] != wanted:
            raise ValueError(
                f"z1 must have heads * dim = {self.heads} * {self.dim} = {wanted} columns, got {z1.shape[1]}."
            )
        options = {k: v for k, v in self.hyperparameters().items() if k not in _OF_TEMPERATURE}
        return amcl_barlow_loss(z1, z2, temperature=self.pair_temperature, **options)

    def measures(self, *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        """Quantiles of temperatures and their share at the least one, on the diagonal ("positive") and off it."""
        with torch.no_grad():
            tau = self.pair_temperature
            positive = self._described("positive", tau.diagonal(dim1=1, dim2=2))
            return positive | self._described("negative", off_diagonal(tau))
