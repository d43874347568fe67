"""Feature transformation: any loss of two views, or of queries, keys and a queue, on transformed embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks, _ring, similarity, transforms
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard, shard
from cl_core.losses._base import QueryKeyLoss, TwoViewLoss
from cl_core.losses._common import PairTerms, check_rows, inverse, reduce_pairs
from cl_core.losses.decoupled import DCLLoss, DCLWLoss, Within, hardness
from cl_core.losses.info_nce import InfoNCELoss
from cl_core.losses.nt_xent import NTXentLoss
from cl_core.scores import ScoreRecorder, _temperature_of
from cl_core.transforms import NegativeInterpolation, PositiveExtrapolation

NegativesUse: TypeAlias = Literal["transformed", "original"]
"""Which queries the negatives are compared with: those moved away from their keys, or as they were."""

Rows: TypeAlias = tuple[Tensor, Tensor]
"""Queries and keys, or two views."""

# Losses of a positive and the log-sum-exp of negatives, which can be compared here. Subclasses may mean another loss.
_OF_TERMS: tuple[type[TwoViewLoss], ...] = (InfoNCELoss, NTXentLoss, DCLLoss, DCLWLoss)
# For each view whose rows are anchors, the views whose rows are their negatives.
_VIEWS = {"keys": ((1,),), "cross": ((1,), (0,)), "both": ((0, 1), (0, 1))}


def transformed_info_nce_loss(
    query: Tensor,
    key: Tensor,
    negatives: Tensor,
    *,
    positive_lam: float | Tensor | None = None,
    negative_lam: float | Tensor | None = None,
    permutation: Tensor | None = None,
    renormalize: bool = False,
    negatives_use: NegativesUse = "transformed",
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""InfoNCE with a queue, of extrapolated positives and interpolated negatives, for given weights.

    With unit rows q_i, k_i, z_j, weights lam_i of the positives, mu_j of the negatives and a permutation pi,

        q'_i = lam_i q_i + (1 - lam_i) k_i,   k'_i = lam_i k_i + (1 - lam_i) q_i,   z'_j = mu_j z_j + (1 - mu_j) z_pi(j)
        l_i  = softplus( log sum_j exp(q'_i . z'_j / T) - q'_i . k'_i / T )

    and q_i . z'_j in the sum for ``negatives_use="original"``. The gradient reaches the encoder through both q'_i and
    k'_i. :class:`FeatureTransform` draws the weights.

    Args:
        query: shape (N, D).
        key: shape (N, D); row i is the positive of row i of query. Detach it where the method says so.
        negatives: a queue of shape (K, D), the same on all ranks; not changed.
        positive_lam: a number, or a constant tensor of shape (), (N, 1) or (N, D); None leaves the positives alone.
        negative_lam: a number, or a constant tensor of shape (), (K, 1) or (K, D); None leaves the negatives alone.
        permutation: integers of shape (K,), with ``negative_lam``.
        renormalize: scale q'_i and k'_i to unit length.
        negatives_use: "transformed" compares the negatives with q'_i, as the authors' code does, "original" with q_i.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows, those of the queue included, to unit length first.
        reduction: "mean" over the queries, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread; the weights of positives are those of this rank's rows.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes do not fit, an input is empty or not finite, or T <= 0.

    Cost: O(N K D) time, O((N + K) D) memory beyond a few thousand rows.
    Reference: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021,
    arXiv 2108.02982.
    """
    _checks.reduction(reduction)
    _checks.impl(impl)
    _checks.temperature("temperature", temperature)
    _checks.choice("negatives_use", negatives_use, get_args(NegativesUse))
    if (negative_lam is None) != (permutation is None):
        raise ValueError("negative_lam and permutation must be given together, got only one of them.")
    _checks.flag("renormalize", renormalize)
    rows = _unit_rows(query, key, normalize, group)
    memory = _unit_memory(query, negatives, normalize)
    pair = rows
    if positive_lam is not None:
        transforms._check_weights("positive_lam", positive_lam, query)
        pair = transforms._extrapolated(*rows, positive_lam, renormalize)
    if negative_lam is not None and permutation is not None:
        transforms._check_weights("negative_lam", negative_lam, negatives)
        transforms._check_permutation(permutation, negatives)
        memory = transforms._interpolated(memory, negative_lam, permutation)
    anchors = pair[0] if negatives_use == "transformed" else rows[0]
    scale = inverse(temperature)
    positives = similarity.row_products(pair[0] * scale, pair[1])
    log_negatives = similarity.cross_log_sum_exp(anchors * scale, memory, impl=impl)
    values = F.softplus(log_negatives - positives, threshold=60)
    return reduce_pairs(values[:, None], reduction, shard(query, group))


class FeatureTransform(QueryKeyLoss):
    r"""A loss on transformed embeddings: a drop-in for the loss itself in any host.

        MoCo(encoder, loss=FeatureTransform(InfoNCELoss(0.2), positive=PositiveExtrapolation(),
                                            negative=NegativeInterpolation()))

    In training mode rows are scaled to unit length (if the loss does so), pairs extrapolated, negatives interpolated,
    and compared as they are then; in evaluation mode the loss is called as it is. A queue is never changed, and its
    host enqueues the keys as they came.

    With a queue, each of its rows is interpolated with another. Without one (or beside it, for ``in_batch=True``)
    negatives are the batch's rows, not extrapolated. To interpolate them samples are drawn into pairs, and the two of a
    pair mixed, view by view; a sample's negatives are the mixtures of the other pairs, of which none contains a part of
    itself. Of 2N - 2 negatives two are lost by that. Fewer than 3 samples are not mixed.

    Negatives from the batch, and ``negatives_use="original"``, are for the losses that consist of a positive and a
    log-sum-exp: ``InfoNCELoss``, ``NTXentLoss``, ``DCLLoss``, ``DCLWLoss``. Any other loss is handed the transformed
    rows, and what it compares within the batch are these.

    Numbers come from torch's default generator of the rows' device. Processes draw each for themselves; given what they
    drew, a loss with a ``group`` gives the value and gradient of one process.

    Args:
        loss: a loss of two views, or of queries and keys, with an option ``normalize`` for whole rows: not one of
            several heads side by side.
        positive: how pairs are moved apart; None for not.
        negative: how negatives are mixed; None for not.
        negatives_use: "transformed" compares the negatives with the moved queries, as the authors' code does;
            "original" with the queries as they were.
        start_step: calls in training mode before the first that transforms; they are counted in the state. A host that
            compares both ways makes two calls a step.

    Attributes:
        recorder: a :class:`~cl_core.scores.ScoreRecorder` that sees the scores of every training call as the loss does,
            of the first view's anchors; None for none.

    Reference: Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021,
    arXiv 2108.02982. The authors give code for a queue alone.
    """

    loss: TwoViewLoss
    positive: PositiveExtrapolation | None
    negative: NegativeInterpolation | None
    negatives_use: NegativesUse
    start_step: int
    calls: Tensor
    """Calls in training mode so far, int64; counted if there is a ``start_step``."""

    def __init__(
        self,
        loss: TwoViewLoss,
        *,
        positive: PositiveExtrapolation | None = None,
        negative: NegativeInterpolation | None = None,
        negatives_use: NegativesUse = "transformed",
        start_step: int = 0,
    ) -> None:
        _check_parts(loss, positive, negative)
        _checks.choice("negatives_use", negatives_use, get_args(NegativesUse))
        if negatives_use == "original" and type(loss) not in _OF_TERMS:
            raise ValueError(
                f"negatives_use='original' needs a loss of {_names()}, got {type(loss).__name__}."
            )
        _checks.count("start_step", start_step, at_least=0)
        super().__init__(
            loss=loss,
            positive=positive,
            negative=negative,
            negatives_use=negatives_use,
            start_step=start_step,
        )
        self.recorder: ScoreRecorder | None = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @property
    def group(self) -> Group:
        """That of the loss, for hosts that ask."""
        return getattr(self.loss, "group", None)

    @property
    def temperature(self) -> float | Tensor:
        """That of the loss, for hosts that ask."""
        return self.loss.temperature  # type: ignore[return-value]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Loss of queries (N, D) against keys (N, D), or of two views, with optional negatives (K, D).

        Random numbers are drawn in the order: weights of the pairs, weights of the negatives, their partners.
        """
        if negatives is not None and not isinstance(self.loss, QueryKeyLoss):
            raise ValueError(f"negatives must be None for {type(self.loss).__name__}, got a queue.")
        if not self.training:
            return self._loss_of(query, key, negatives)
        if self.start_step:
            self.calls.add_(1)
        normalize = bool(self.loss.normalize)
        rows = _unit_rows(query, key, normalize, self.group)
        memory = None if negatives is None else _unit_memory(query, negatives, normalize)
        pair = rows
        if self.positive is not None:
            lam = self._from_start(self.positive.draw(rows[0], generator=generator), 1.0)
            pair = transforms._extrapolated(*rows, lam, self.positive.renormalize)
        if self.negative is not None and memory is not None:
            lam = self._from_start(self.negative.draw(memory, generator=generator), 1.0)
            partners = transforms._partners(len(memory), memory.device, generator=generator)
            memory = transforms._interpolated(memory, lam, partners)
        if type(self.loss) in _OF_TERMS:
            split = shard(rows[0], self.group)
            if not self._is_refused(memory, split):
                return self._loss_of_terms(rows, pair, memory, split, generator)
        elif self.negative is not None and memory is None:
            raise ValueError(
                f"negatives must be given with a negative transformation of {type(self.loss).__name__}, got None; of "
                f"the batch's own rows only {_names()} can be transformed."
            )
        if self.recorder is not None:
            self.recorder._record(*pair, memory, _temperature_of(self.loss))
        return self._loss_of(*pair, memory, normalize=False)

    def measures(
        self, *inputs: Any, generator: torch.Generator | None = None, **options: Any
    ) -> dict[str, Tensor]:
        """What the loss measures, of the rows as they came."""
        return self.loss.measures(*inputs, **options)

    def advice(self, measures: Mapping[str, Tensor]) -> str | None:
        """What the loss says of them."""
        return self.loss.advice(measures)

    def extra_repr(self) -> str:
        """Show what is not a part of its own."""
        return f"negatives_use={self.negatives_use!r}, start_step={self.start_step}"

    def _from_start(self, drawn: Tensor, before: float | Tensor) -> Tensor:
        """What was drawn, or what changes nothing: decided on the device, which nobody waits for."""
        return torch.where(self.calls > self.start_step, drawn, before) if self.start_step else drawn

    def _loss_of(self, query: Tensor, key: Tensor, negatives: Tensor | None, **changes: bool) -> Tensor:
        """The loss as it computes itself, with some of its options changed."""
        before = {name: getattr(self.loss, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self.loss, name, value)
            given = (query, key) if negatives is None else (query, key, negatives)
            return self.loss(*given)  # type: ignore[no-any-return]
        finally:
            for name, value in before.items():
                setattr(self.loss, name, value)

    def _is_refused(self, memory: Tensor | None, split: Shard) -> bool:
        """Whether there is nothing to compare, or options contradict each other: the loss itself says so best."""
        if memory is None:
            return split.total < 2 or getattr(self.loss, "in_batch", None) is False
        return bool(getattr(self.loss, "symmetric", False))

    def _loss_of_terms(
        self, rows: Rows, pair: Rows, memory: Tensor | None, split: Shard, generator: torch.Generator | None
    ) -> Tensor:
        """The loss of a positive and a log-sum-exp, compared here."""
        loss: Any = self.loss
        _checks.temperature("temperature", loss.temperature)
        anchors = pair if self.negatives_use == "transformed" else rows
        positives = similarity.row_products(*pair)
        compared = [] if memory is None else [_Compared(anchors[0], memory)]
        if memory is None or getattr(loss, "in_batch", False):
            mixed, keys = self._mixed_batch(rows, split, generator)
            sides = _VIEWS["keys" if memory is not None else negatives_within(loss)]
            for anchor, views in zip(anchors, sides, strict=False):
                columns = torch.cat([mixed[view] for view in views])
                compared.append(_Compared(anchor, columns, keys, len(views)))
        if self.recorder is not None:
            first = compared[0]
            scores = (positives, first.anchors, first.columns, first.keys())
            self.recorder._observe(*scores, _temperature_of(loss))
        scale = inverse(loss.temperature)
        log_negatives = [side.log_sum_exp(scale, split, loss.impl) for side in compared]
        if memory is not None and len(log_negatives) == 2:  # queue and batch, of the same anchors
            log_negatives = [torch.logaddexp(*log_negatives)]
        return _reduced(loss, PairTerms((positives * scale)[:, None], torch.stack(log_negatives, 1), split))

    def _mixed_batch(
        self, rows: Rows, split: Shard, generator: torch.Generator | None
    ) -> tuple[Rows, Tensor]:
        """Views whose samples are interpolated in pairs, and the number of its pair for each sample."""
        count, width = rows[0].shape
        own = torch.arange(count, device=rows[0].device)
        if self.negative is None or count < 3:
            return rows, own + split.offset
        lam = self.negative.draw(rows[0].new_empty(2 * count, width), generator=generator)
        lam = self._from_start(lam, 1.0)
        partners = transforms._partners(count, own.device, pairs=True, generator=generator)
        partners = self._from_start(partners, own)
        # View by view: what wants no gradient, such as keys, must want none on all ranks.
        of_views = lam.split(count) if lam.ndim else (lam, lam)
        mixed = [transforms._interpolated(z, part, partners) for z, part in zip(rows, of_views, strict=True)]
        return (mixed[0], mixed[1]), torch.minimum(own, partners) + split.offset


def _unit_rows(query: Tensor, key: Tensor, normalize: bool, group: Group) -> Rows:
    """Checked queries and keys, of unit length if asked for, in at least float32."""
    check_rows(group, query=query, key=key)
    _checks.same_shape(query=query, key=key)
    unit = [similarity.scaled_rows(z, normalize=normalize) for z in (query, key)]
    return unit[0], unit[1]


def _unit_memory(query: Tensor, negatives: Tensor, normalize: bool) -> Tensor:
    """A checked queue, likewise, to be compared with queries."""
    _checks.embeddings("negatives", negatives)
    _checks.alongside(query=query, negatives=negatives)
    dtype = torch.promote_types(query.dtype, torch.float32)
    return similarity.scaled_rows(negatives, normalize=normalize, dtype=dtype)


@dataclass(frozen=True)
class _Compared:
    """Anchors and their negatives: all columns, or with numbers of pairs of samples those of the other pairs."""

    anchors: Tensor
    columns: Tensor
    pairs: Tensor | None = None
    views: int = 1

    def keys(self) -> tuple[Tensor, Tensor] | None:
        """Numbers of anchors and of columns; equal ones do not count."""
        return None if self.pairs is None else (self.pairs, self.pairs.repeat(self.views))

    def log_sum_exp(self, scale: float | Tensor, split: Shard, impl: Impl) -> Tensor:
        """Log-sum-exp of an anchor's logits with its negatives on all ranks, shape (N,)."""
        rows, keys = self.anchors * scale, self.keys()
        if keys is None:
            return similarity.cross_log_sum_exp(rows, self.columns, impl=impl)
        options: dict[str, Any] = {"row_keys": keys[0], "column_keys": keys[1], "over": "different"}
        return _ring.log_sum_exp(rows, self.columns, split, each=self.views, impl=impl, **options)


def negatives_within(loss: Any) -> Within:
    """Which rows of a batch a loss without a queue takes for negatives; "both" views of one that does not say."""
    if isinstance(loss, FeatureTransform):
        return negatives_within(loss.loss)
    if isinstance(loss, InfoNCELoss):
        return "cross" if loss.symmetric else "keys"
    within: Within = getattr(loss, "negatives", "both") if isinstance(loss, DCLLoss | DCLWLoss) else "both"
    return within


def _reduced(loss: Any, terms: PairTerms) -> Tensor:
    """A loss of a positive and a log-sum-exp from the two."""
    positives, log_negatives, split = terms
    if isinstance(loss, InfoNCELoss | NTXentLoss):
        values = F.softplus(log_negatives - positives, threshold=60)
    elif isinstance(loss, DCLWLoss):
        options: dict[str, Any] = {
            "temperature": loss.temperature,
            "sigma": loss.sigma,
            "detach": loss.detach_weight,
        }
        values = log_negatives - hardness(positives, split, **options) * positives
    else:
        values = log_negatives - positives
    return reduce_pairs(values, loss.reduction, split)


def _check_parts(
    loss: TwoViewLoss, positive: PositiveExtrapolation | None, negative: NegativeInterpolation | None
) -> None:
    if not isinstance(loss, TwoViewLoss) or not hasattr(loss, "normalize"):
        raise TypeError(
            "loss must be a loss of two views, or of queries and keys, with an option normalize, got "
            f"{type(loss).__name__}."
        )
    if getattr(loss, "heads", 1) > 1 or getattr(loss, "raw_input", False):
        raise ValueError(
            "loss must scale whole rows to unit length, got one that scales each head's, or looks at rows as they came "
            f"({type(loss).__name__} of more than one head, or with raw_input)."
        )
    if positive is None and negative is None:
        raise ValueError(
            "positive or negative must be given, got neither: there would be nothing to transform."
        )
    for name, part, kind in (
        ("positive", positive, PositiveExtrapolation),
        ("negative", negative, NegativeInterpolation),
    ):
        if part is not None and not isinstance(part, kind):
            raise TypeError(f"{name} must be a {kind.__name__} or None, got {type(part).__name__}.")
    if negative is not None and type(loss) not in _OF_TERMS and not isinstance(loss, QueryKeyLoss):
        raise ValueError(
            f"negative needs a loss that takes a queue, or one of {_names()}, got {type(loss).__name__}."
        )


def _names() -> str:
    return ", ".join(known.__name__ for known in _OF_TERMS)
