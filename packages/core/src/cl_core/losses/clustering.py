"""Losses on prototypes: balanced codes (Sinkhorn), swapped prediction of codes (SwAV), and ProtoNCE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks, _rows, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard, shard
from cl_core.losses._base import PrototypeLoss, ScoresLoss
from cl_core.losses._codes import balanced_codes, cross_entropy
from cl_core.losses._common import check_rows, inverse, reduce
from cl_core.scores import Scored, evenly

_UNIFORM = 0.98  # of the largest entropy
_ONE_FOR_ALL = 0.5  # of the samples


def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3, group: Group = None) -> Tensor:
    r"""Codes of samples over prototypes that use all prototypes about equally.

    Starting from Q = exp(scores / epsilon), each iteration divides Q by the sums over samples of its columns
    (prototypes), then by the sums over prototypes of its rows (samples), so that in the end rows sum to 1 exactly and
    columns nearly to N / K. In logarithms throughout: no score that is allowed overflows. A constant for autograd.

    Args:
        scores: similarities of samples with prototypes, shape (N, K); divided by epsilon at most 4e37 in absolute
            value (in float64, 2e307).
        epsilon: >= 1.2e-38 (in float64, 2.2e-308); small values make codes hard.
        iterations: >= 1.
        group: process group over which the samples are spread.

    Returns:
        Shape (N, K), float32 for half inputs.

    Raises:
        ValueError: if scores are empty, not finite or too large, epsilon is too small or iterations < 1.

    Cost: O(iterations N K) time, O(N K) memory; with a group one message of K numbers a rank and iteration.
    Reference: Cuturi, "Sinkhorn Distances", NeurIPS 2013, arXiv 1306.0895, as used by Caron et al., NeurIPS 2020, arXiv
    2006.09882. The divisions by N and K there only change constants that the last step removes.
    """
    _check_sinkhorn(epsilon, iterations)
    check_rows(group, scores=scores)
    _check_size("scores", scores, epsilon=epsilon)
    return balanced_codes(scores, epsilon, iterations, shard(scores, group))


def swav_loss(
    *scores: Tensor,
    queue: Sequence[Tensor] | None = None,
    predictions: Sequence[Tensor] | None = None,
    assignment_crops: Sequence[int] = (0, 1),
    epsilon: float = 0.05,
    iterations: int = 3,
    hard_codes: bool = False,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    group: Group = None,
) -> Tensor:
    r"""Swapped prediction: each crop of a sample predicts the codes that other crops of it got.

    With scores s^v (N, K) of crop v = 0 ... V-1, the crops A that give codes, and q^a = :func:`sinkhorn` of s^a,

        l_i = 1/|A| sum_{a in A} 1/(V-1) sum_{v != a} -sum_k q^a_ik log softmax_k(s^v_i / T)

    Codes are constants; the gradient comes through the predictions. For two crops it is the mean of both directions.

    Args:
        scores: V >= 2 tensors of shape (N, K), a crop each: dot products of unit embeddings with unit prototypes.
        queue: for each of ``assignment_crops``, in its order, scores of earlier embeddings with the current
            prototypes, shape (Q, K), the same on all ranks; they take part in the balance of the codes and in nothing
            else.
        predictions: scores of each crop that predict in place of ``scores``, which then make codes only (of transformed
            embeddings, say); V tensors of shape (N, K).
        assignment_crops: which crops give codes; small crops usually only predict.
        epsilon: of :func:`sinkhorn`.
        iterations: of :func:`sinkhorn`.
        hard_codes: 1 for the prototype with the largest code, 0 for all others, in place of the codes.
        temperature: T >= 1.2e-38 (in float64, 2.2e-308) of the predictions; a 0-d tensor receives a gradient.
        reduction: "mean" over the N samples, "sum", or "none" for shape (N,).
        group: process group over which the batch is spread: codes are balanced over all its rows.

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes differ, an input is empty, not finite or too large (as for :func:`sinkhorn`, for epsilon
            and the temperature), or a parameter is out of range.

    Cost: O(V N K) time and memory, and that of :func:`sinkhorn` for each assignment crop.
    Reference: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS
    2020, arXiv 2006.09882.
    """
    _checks.reduction(reduction)
    _checks.positive("temperature", temperature)
    _check_sinkhorn(epsilon, iterations)
    _check_crops(assignment_crops, len(scores))
    _checks.flag("hard_codes", hard_codes)
    named = {f"scores[{i}]": crop for i, crop in enumerate(scores)}
    check_rows(group, **named)
    _checks.same_shape(**named)
    if predictions is not None:
        _check_sequence("predictions", predictions)
        if len(predictions) != len(scores):
            raise ValueError(
                f"predictions must hold one tensor for each of the {len(scores)} crops, got {len(predictions)}."
            )
        predicted = {f"predictions[{i}]": crop for i, crop in enumerate(predictions)}
        check_rows(group, **predicted)
        _checks.same_shape(**{"scores[0]": scores[0]}, **predicted)
        for name, of_crop in predicted.items():
            _check_size(name, of_crop, temperature=temperature)
    for name, of_crop in named.items():
        _check_size(name, of_crop, epsilon=epsilon, temperature=temperature)
    split = shard(scores[0], group)
    codes = _codes_of_crops([scores[crop] for crop in assignment_crops], queue, epsilon, iterations, split)
    if hard_codes:
        codes = [F.one_hot(each.argmax(1), each.shape[1]).to(each.dtype) for each in codes]
    # Of which codes each crop predicts the sum: small crops have one in common.
    wanted = [
        tuple(place for place, own in enumerate(assignment_crops) if own != crop)
        for crop in range(len(scores))
    ]
    targets = {
        places: sum((codes[place] for place in places[1:]), codes[places[0]])
        for places in dict.fromkeys(wanted)
        if places
    }
    values = []
    for crop, given in enumerate(scores if predictions is None else predictions):
        if places := wanted[crop]:
            rows = similarity.at_least_float32(given)
            # Codes beside those of a queue are a part of a larger matrix, which must not be kept for theirs.
            spent = queue is None and places not in wanted[crop + 1 :]
            values.append(cross_entropy(rows, targets[places], temperature, len(places), spent=spent))
    each = sum(values[1:], values[0]) / (len(assignment_crops) * (len(scores) - 1))
    return reduce(each, reduction, split=split)


def _codes_of_crops(
    scores: list[Tensor], queue: Sequence[Tensor] | None, epsilon: float, iterations: int, split: Shard
) -> list[Tensor]:
    """Codes of each assignment crop, balanced together with its queue."""
    if queue is None:
        return [balanced_codes(crop, epsilon, iterations, split) for crop in scores]
    _check_sequence("queue", queue)
    if len(queue) != len(scores):
        raise ValueError(
            f"queue must hold one tensor for each of the {len(scores)} assignment crops, got {len(queue)}."
        )
    # The queue is the same on all ranks: each of them brings a part of it, so that every row counts once.
    part = slice(split.rank, None, split.world_size)
    together = []
    for i, (crop, earlier) in enumerate(zip(scores, queue, strict=True)):
        _checks.embeddings(f"queue[{i}]", earlier, at_least=0)
        _checks.alongside(**{"scores[0]": scores[0], f"queue[{i}]": earlier})
        wide = similarity.at_least_float32(crop.detach())
        earlier = earlier.detach().to(wide.dtype)
        _check_size(f"queue[{i}]", earlier, epsilon=epsilon)
        together.append(torch.cat([wide, earlier[part]]))
    return [balanced_codes(rows, epsilon, iterations, split)[: len(scores[0])] for rows in together]


def prototype_nce_loss(
    z: Tensor,
    prototypes: Tensor | Sequence[Tensor],
    assignments: Tensor | Sequence[Tensor],
    *,
    concentration: Tensor | Sequence[Tensor] | None = None,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: Reduction = "mean",
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Each row must find its prototype among all: the prototype part of ProtoNCE.

    With u = z / |z|, prototypes c_k of unit length and their concentrations phi_k,

        l_i = -log( exp(u_i . c_a(i) / phi_a(i)) / sum_k exp(u_i . c_k / phi_k) )

    Several clusterings of the same rows (granularities, heads) are averaged per row. Without ``concentration`` every
    phi_k is the temperature, and the loss is the cross entropy of DeepCluster-v2.

    Args:
        z: embeddings, shape (N, D).
        prototypes: shape (K, D), the same on all ranks; or a sequence of M, one a clustering. They receive a gradient.
        assignments: index of each row's prototype, integers of shape (N,); negative for a row that has none and does
            not count; or a sequence of M, or shape (M, N).
        concentration: phi_k >= 1.2e-38 (in float64, 2.2e-308), shape (K,), in place of the temperature: small for a
            dense cluster. The paper scales them to a mean of the temperature. Or a sequence of M.
        temperature: T >= the same number; a 0-d tensor receives a gradient.
        normalize: scale rows and prototypes to unit length first.
        reduction: "mean" over the rows that have a prototype, "sum", or "none" for shape (N,), zero for the others.
        group: process group over which the batch is spread.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar, or shape (N,) for reduction="none". float32 for half inputs.

    Raises:
        ValueError: if shapes do not fit, an input is empty or not finite, an assignment is not below K, or a
            concentration or the temperature is too small.

    Cost: O(N K D) time, O((N + K) D) memory beyond a few thousand rows, for each clustering.
    Reference: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", ICLR 2021, arXiv
    2005.04966. There the sum runs over a sample of the prototypes; its other term is ``info_nce_loss``.
    """
    _checks.reduction(reduction)
    _checks.impl(impl)
    _checks.positive("temperature", temperature)
    check_rows(group, z=z)
    clusterings = _as_clusterings(prototypes, assignments, concentration)
    for number, clustering in enumerate(clusterings):
        _check_clustering(z, *clustering, at="" if isinstance(prototypes, Tensor) else f"[{number}]")
    rows = similarity.scaled_rows(z, normalize=normalize)
    _check_divisor("temperature", temperature, rows.dtype)
    total, count = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for centres, index, phi in clusterings:
        if phi is not None:
            _check_divisor("concentration", phi, rows.dtype)
        scale = inverse(temperature) if phi is None else phi.to(rows.dtype).reciprocal()
        columns = similarity.scaled_rows(centres, scale=scale, normalize=normalize, dtype=rows.dtype)
        valid = index >= 0
        own = index.long().clamp_min(0)
        log_others = similarity.cross_log_sum_exp(
            rows,
            columns,
            row_keys=own,
            column_keys=torch.arange(len(columns), device=rows.device),
            over="different",
            impl=impl,
        )
        # softplus(others - own) keeps its precision where a row is close to its prototype and far from the rest.
        margin = log_others - similarity.row_products(rows, columns.index_select(0, own))
        total = total + torch.where(valid, F.softplus(margin, threshold=60), 0)
        count = count + valid
    return reduce(total / count.clamp_min(1), reduction, split=shard(z, group), valid=count > 0)


def _as_clusterings(
    prototypes: Tensor | Sequence[Tensor],
    assignments: Tensor | Sequence[Tensor],
    concentration: Tensor | Sequence[Tensor] | None,
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Prototypes, assignments and concentrations of each clustering."""
    given = {"prototypes": prototypes, "assignments": assignments, "concentration": concentration}
    for name, of_all in given.items():
        if of_all is not None or name != "concentration":
            _check_sequence(name, of_all)
    centres = [prototypes] if isinstance(prototypes, Tensor) else list(prototypes)
    # A matrix of assignments, a row for each of several clusterings, is a sequence too.
    one = isinstance(prototypes, Tensor) and isinstance(assignments, Tensor)
    index: list[Tensor] = [assignments] if one else list(assignments)  # type: ignore[list-item]
    phi: list[Tensor | None] = [None] * len(centres)
    if concentration is not None:
        phi = [concentration] if isinstance(concentration, Tensor) else list(concentration)
    if not len(centres) == len(index) == len(phi) or not centres:
        raise ValueError(
            "prototypes, assignments and concentration must be given for the same clusterings (at least 1), got "
            f"{len(centres)}, {len(index)} and {len(phi)}."
        )
    return list(zip(centres, index, phi, strict=True))


def _check_clustering(z: Tensor, centres: Tensor, index: Tensor, phi: Tensor | None, *, at: str) -> None:
    _checks.embeddings(f"prototypes{at}", centres)
    _checks.alongside(**{"z": z, f"prototypes{at}": centres})
    _checks.labels(f"assignments{at}", index, rows=z.shape[0], of="z", device=z.device)
    message = f"assignments{at} must be below the number of prototypes, {len(centres)}, got a larger one."
    _checks.require((index < len(centres)).all(), message)
    if phi is not None:
        if not isinstance(phi, Tensor) or tuple(phi.shape) != (len(centres),):
            got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
            raise ValueError(f"concentration{at} must be a tensor of shape ({len(centres)},), got {got}.")
        _checks.positive(f"concentration{at}", phi, rows=len(centres))


def _check_sinkhorn(epsilon: float, iterations: int) -> None:
    _checks.positive("epsilon", epsilon)
    _checks.count("iterations", iterations)


def _check_size(name: str, scores: Tensor, **divisors: float | Tensor) -> None:
    """Refuse scores that overflow, divided by what they are to be divided by, or whose differences then do."""
    for divisor, value in divisors.items():
        _check_divisor(divisor, value, torch.promote_types(scores.dtype, torch.float32))
    if not scores.numel():  # a rank may hold no row
        return
    low, high = similarity.at_least_float32(scores.detach()).aminmax()
    size = torch.maximum(-low, high)
    # Sums along rows and columns are taken off in turn: between the two a logarithm may grow fourfold.
    largest = torch.finfo(size.dtype).max / 8
    limit: float | Tensor
    for divisor, value in divisors.items():
        if isinstance(value, Tensor):
            limit = similarity.at_least_float32(value.detach()) * largest
        else:
            limit = min(value, 8) * largest
        _checks.require(
            size <= limit,
            f"{name} must be at most {largest:.1g} in absolute value once divided by {divisor}, got a larger one.",
        )


def _check_divisor(name: str, value: float | Tensor, dtype: torch.dtype) -> None:
    """Refuse what has no finite inverse, with room for differences of logits."""
    least = torch.finfo(dtype).tiny
    if isinstance(value, Tensor):
        enough = (value.detach() >= least).all()
        _checks.require(enough, f"{name} must be at least {least:.3g}, got a smaller one.")
    else:
        _checks.number(name, value, at_least=least)


def _check_sequence(name: str, given: object) -> None:
    if not (isinstance(given, Sequence) or (isinstance(given, Tensor) and given.ndim)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(given).__name__}.")


def _check_crops(assignment_crops: Sequence[int], crops: int | None = None) -> None:
    if not isinstance(assignment_crops, Sequence):
        raise TypeError(
            f"assignment_crops must be a sequence of numbers, got {type(assignment_crops).__name__}."
        )
    for crop in assignment_crops:
        _checks.count("assignment_crops", crop, at_least=0)
    if not assignment_crops or len(set(assignment_crops)) != len(assignment_crops):
        raise ValueError(f"assignment_crops must name each crop once and at least 1, got {assignment_crops}.")
    least = max(2, max(assignment_crops) + 1)
    if crops is not None and crops < least:
        raise ValueError(
            f"scores must be at least {least} tensors, one a crop (unpack a list with *), got {crops}."
        )


class SwAVLoss(ScoresLoss):
    """Module form of :func:`swav_loss`.

    Args:
        temperature: T > 0 of the predictions.
        assignment_crops: which crops give codes.
        epsilon: of :func:`sinkhorn`.
        iterations: of :func:`sinkhorn`.
        hard_codes: one prototype for each code instead of shares of all.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        assignment_crops: Sequence[int] = (0, 1),
        epsilon: float = 0.05,
        iterations: int = 3,
        hard_codes: bool = False,
        reduction: Reduction = "mean",
        group: Group = None,
    ) -> None:
        _check_sinkhorn(epsilon, iterations)
        _check_crops(assignment_crops)
        _checks.flag("hard_codes", hard_codes)
        super().__init__(
            temperature=temperature,
            assignment_crops=tuple(assignment_crops),
            epsilon=epsilon,
            iterations=iterations,
            hard_codes=hard_codes,
            reduction=reduction,
            group=group,
        )

    def forward(
        self,
        *scores: Tensor,
        queue: Sequence[Tensor] | None = None,
        predictions: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Loss of the scores (N, K) of two or more crops, with optional scores (Q, K) of a queue for each code."""
        return swav_loss(*scores, queue=queue, predictions=predictions, **self.hyperparameters())

    @torch.no_grad()
    def scored(
        self,
        *scores: Tensor,
        queue: Sequence[Tensor] | None = None,
        predictions: Sequence[Tensor] | None = None,
        rows: int | None = None,
    ) -> Scored:
        """What one crop predicts with: the score of the prototype that another crop is assigned to is the positive.

        The first of the ``assignment_crops`` gives the code, of which the largest entry counts; the first of the other
        crops predicts it, and its scores of all other prototypes are negatives.
        """
        options = self.hyperparameters()
        first = options["assignment_crops"][0]
        split, given = shard(scores[first], None), None if queue is None else queue[:1]
        (codes,) = _codes_of_crops([scores[first]], given, options["epsilon"], options["iterations"], split)
        predicting = (scores if predictions is None else predictions)[int(first == 0)]
        chosen = evenly(len(codes), rows, codes.device)
        assigned = codes[chosen].argmax(1)
        positive = assigned[:, None] == torch.arange(codes.shape[1], device=codes.device)
        return Scored(predicting.detach()[chosen], positive, ~positive, options["temperature"])

    @torch.no_grad()
    def measures(
        self,
        *scores: Tensor,
        queue: Sequence[Tensor] | None = None,
        predictions: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """How codes and predictions use the prototypes.

        ``code_entropy`` and ``prediction_entropy`` are means over samples, as shares of log K: 1 where all prototypes
        look alike, and then the loss stands still at log K. ``code_usage`` is the entropy of the mean code as a share
        of log K: 1 where all prototypes are used equally. ``largest_prototype_share`` is the share of samples with
        the most frequent best prototype of their scores. Of this process's rows.
        """
        if not len(scores[0]):
            return {}
        split, log_k = shard(scores[0], None), math.log(max(2, scores[0].shape[1]))
        given = [scores[crop] for crop in self.assignment_crops]  # type: ignore[union-attr]
        options = self.hyperparameters()
        codes = torch.cat(_codes_of_crops(given, queue, options["epsilon"], options["iterations"], split))
        predicting = scores if predictions is None else predictions
        predicted = torch.cat(
            [(similarity.at_least_float32(s) / options["temperature"]).softmax(1) for s in predicting]
        )
        best = torch.bincount(torch.cat(given).argmax(1), minlength=scores[0].shape[1])
        found = {
            "code_entropy": torch.special.entr(codes).sum(1).mean() / log_k,
            "code_usage": torch.special.entr(codes.mean(0)).sum() / log_k,
            "prediction_entropy": torch.special.entr(predicted).sum(1).mean() / log_k,
            "largest_prototype_share": best.max() / best.sum(),
        }
        return found

    def advice(self, measures: Mapping[str, Tensor]) -> str | None:
        """What to do where codes have become uniform, or one prototype is the best of most samples."""
        entropy, share = float(measures["code_entropy"]), float(measures["largest_prototype_share"])
        if entropy > _UNIFORM:
            return (
                f"SwAV's codes are uniform ({entropy:.1%} of the largest entropy), so the loss stays at log K: take a "
                "smaller epsilon (0.03), fewer prototypes, a longer freeze of the prototypes, a lower rate or milder "
                "views."
            )
        if share > _ONE_FOR_ALL:
            return (
                f"one prototype is the best of {share:.0%} of SwAV's samples, so embeddings have collapsed or nearly: "
                "check that rows have unit length, use more iterations of Sinkhorn or a lower rate."
            )
        return None


class PrototypeNCELoss(PrototypeLoss):
    """Module form of :func:`prototype_nce_loss`.

    Args:
        temperature: T > 0, for prototypes without a concentration.
        normalize: scale rows and prototypes to unit length first.
        reduction: "mean", "sum" or "none".
        group: process group over which the batch is spread: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

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

    def forward(
        self,
        z: Tensor,
        prototypes: Tensor | Sequence[Tensor],
        assignments: Tensor | Sequence[Tensor],
        concentration: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Loss of embeddings (N, D) over prototypes (K, D) with assignments (N,) and concentrations (K,)."""
        return prototype_nce_loss(
            z, prototypes, assignments, concentration=concentration, **self.hyperparameters()
        )

    def scored(
        self,
        z: Tensor,
        prototypes: Tensor | Sequence[Tensor],
        assignments: Tensor | Sequence[Tensor],
        concentration: Tensor | Sequence[Tensor] | None = None,
        *,
        rows: int | None = None,
    ) -> Scored:
        """Products of rows with the prototypes of the first clustering, of which each row's own is the positive.

        A row without one has neither positive nor negatives.
        """
        centres, index, phi = _as_clusterings(prototypes, assignments, concentration)[0]
        options = self.hyperparameters()
        unit = options["normalize"]
        with _rows.measuring(z.device):
            chosen = evenly(len(z), rows, z.device)
            products = [similarity.scaled_rows(part, normalize=unit) for part in (z[chosen], centres)]
            own = index[chosen, None]
            positive = own == torch.arange(len(centres), device=z.device)
            temperature = None if phi is not None else options["temperature"]
            return Scored(products[0] @ products[1].T, positive, ~positive & (own >= 0), temperature)
