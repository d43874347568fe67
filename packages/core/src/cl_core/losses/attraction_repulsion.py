"""CACR: two expectations in place of one softmax; far positives are attracted more, near negatives repelled more.

With squared distances c(a, b) = |a - b|^2 = 2 - 2 a . b of unit rows, the weights are a softmax of +t_pos c over the
positives and of -t_neg c over the negatives: ``t_pos`` and ``t_neg`` multiply, they are inverse temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_core import _checks, _ring, similarity
from cl_core._types import Group, Impl
from cl_core.distributed import Shard, shard
from cl_core.losses._attraction import (
    Cost,
    DetachedWeights,
    Weighting,
    constant_weights,
    of_queue,
    of_views,
)
from cl_core.losses._base import PredictionLoss, QueryKeyLoss
from cl_core.losses._common import check_rows, inverse, reduce
from cl_core.losses.nt_xent import as_views


def cacr_loss(
    z1: Tensor | Sequence[Tensor],
    z2: Tensor | None = None,
    *,
    t_pos: float = 1.0,
    t_neg: float = 1.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: Cost = "euclidean",
    rbf_t: float = 2.0,
    tau_plus: float = 0.0,
    paper_code_sign: bool = False,
    symmetric: bool = False,
    detach_weights: bool = False,
    normalize: bool = True,
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Contrastive attraction and contrastive repulsion of V >= 2 views of N samples.

    With u_i^x the unit row of view x of sample i and c(a, b) = |a - b|^2, in [0, 4],

        A = mean_{i, x}   sum_{y != x}  w_iy c(u_i^x, u_i^y),   w_iy = softmax_{y != x}( t_pos c(u_i^x, u_i^y))
        R = mean_{i, x<y} sum_{j != i} -w_ij c(u_i^x, u_j^y),   w_ij = softmax_{j != i}(-t_neg c(u_i^x, u_j^y))
        L = alpha A + beta R

    It is negative at its optimum: A lies in [0, 4], R in [-4, 0]. With ``cost="rbf"``

        R = mean_{x<y} log mean_i sum_{j != i} w_ij exp(-rbf_t c(u_i^x, u_j^y))

    Two views leave one positive, whose weight is 1 whatever ``t_pos``. t_pos = 0 and t_neg = 0 make the weights uniform
    (the paper's ablations); large ones keep the farthest positive and the nearest negative alone. With constant weights
    R has the gradient of the log-sum-exp over negatives of NT-Xent, at temperature 1 / (2 t_neg) and over t_neg.

    Args:
        z1: embeddings of view 1, shape (N, D); or a sequence of V views, then without ``z2``. N >= 2 over all ranks.
        z2: embeddings of view 2, shape (N, D); row i is the same sample as row i of z1.
        t_pos: sharpness in [0, 1e12] of the weights of positives, per squared distance.
        t_neg: sharpness in [0, 1e12] of the weights of negatives.
        alpha: weight >= 0 of the attraction.
        beta: weight >= 0 of the repulsion.
        cost: "euclidean" or "rbf", of the negatives.
        rbf_t: sharpness in (0, 1e12] of the Gaussian kernel, for ``cost="rbf"``.
        tau_plus: share in [0, 1) of negatives taken to be of the anchor's own class, whose part is removed from R as
            (beta R_i + tau_plus beta c(u_i^x, u_i^y)) / (1 - tau_plus); for ``cost="euclidean"``.
        paper_code_sign: -tau_plus c in that formula, as in the authors' code, which rewards positives that lie apart.
        symmetric: compare x < y and x > y. The authors compare one way, and then the order of the views counts.
        detach_weights: treat the weights as constants; this changes gradients only.
        normalize: scale rows to unit length first. False takes the rows as they are.
        group: process group whose other rows serve as negatives; None keeps the loss local.
            Mean over ranks and averaged gradient are those of one process; see :mod:`cl_core.distributed`.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there is one row (no negatives) or one view (no positive), shapes differ, an input is not
            finite, or a number is out of range.

    Cost: O(V^2 N^2 D) time, O(V N D) memory beyond 2^24 distances of all pairs of views.
    Reference: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023,
    arXiv 2105.03746.
    """
    weighting = Weighting(t_pos, t_neg, cost, rbf_t, detach_weights)
    _check_numbers(alpha, beta, tau_plus, cost)
    _checks.flag("paper_code_sign", paper_code_sign)
    _checks.flag("symmetric", symmetric)
    views = list(as_views(z1, z2))
    split = _checked({f"z{i}": view for i, view in enumerate(views, 1)}, group, impl)
    if split.total < 2:
        raise ValueError(
            f"cacr_loss needs at least 2 rows (the other rows are the negatives), got {split.total}; pass a group, or "
            "use cacr_queue_loss."
        )
    compared = of_views(_rows(views, normalize), symmetric, normalize, split, impl)
    repulsion = beta * weighting.repulsion(compared.negatives)
    if tau_plus:
        own = reduce(torch.stack(compared.positives).mean((0, 1)), "mean", split=split)
        repulsion = (repulsion + tau_plus * (-1 if paper_code_sign else beta) * own) / (1 - tau_plus)
    return alpha * weighting.attraction(compared.positives, split) + repulsion


def cacr_queue_loss(
    query: Tensor | Sequence[Tensor],
    key: Tensor | Sequence[Tensor],
    negatives: Tensor,
    *,
    in_batch: bool = True,
    t_pos: float = 1.0,
    t_neg: float = 2.0,
    alpha: float = 1.0,
    beta: float = 1.0,
    cost: Cost = "euclidean",
    rbf_t: float = 2.0,
    detach_weights: DetachedWeights = True,
    normalize: bool = True,
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Contrastive attraction and repulsion of queries, to keys of a momentum encoder and from a queue of earlier keys.

    With unit queries q_i^x of V views, keys k_i^y and the queue Q,

        A = mean_{i, x} sum_{y != x}  w_iy c(q_i^x, k_i^y),  w = softmax over y of  t_pos c
        R = mean_{i, x} sum_{n}      -w_in c(q_i^x, n),      w = softmax over n of -t_neg c
        L = alpha A + beta R

    where n runs over the rows of Q and, with ``in_batch``, over the queries q_j^x of the same view, j != i.

    Args:
        query: shape (N, D); or a sequence of V >= 2 views of the batch.
        key: shape (N, D), row i the positive of row i of query; or a sequence of V views in the same order, of which a
            query is drawn to the V - 1 others. Keys carry no gradient where the method says so.
        negatives: the queue, shape (K, D), the same on all ranks.
        in_batch: whether the other queries of a view are negatives too, as in the authors' code.
        t_pos: as in :func:`cacr_loss`.
        t_neg: as in :func:`cacr_loss`.
        alpha: as in :func:`cacr_loss`.
        beta: as in :func:`cacr_loss`.
        cost: as in :func:`cacr_loss`.
        rbf_t: as in :func:`cacr_loss`.
        detach_weights: treat the weights as constants. "queue" does so for those of the queue alone, as the authors'
            code does; for ``cost="euclidean"``.
        normalize: scale rows, those of the queue included, to unit length first.
        group: process group over which the batch is spread.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if shapes or numbers of views differ, an input is empty or not finite, or a number is out of range.

    Cost: O(V N (K + N) D) time, O((V N + K) D) memory beyond 2^24 distances of all views.
    Reference: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023,
    arXiv 2105.03746. The authors' code computes the similarities with the queue for the first view and uses them for
    all; here every view has its own.
    """
    weighting = Weighting(t_pos, t_neg, cost, rbf_t, detach_weights)
    _check_numbers(alpha, beta, 0.0, cost)
    _checks.flag("in_batch", in_batch)
    queries, keys = _as_list("query", query), _as_list("key", key)
    if len(queries) != len(keys):
        raise ValueError(f"query and key must hold as many views, got {len(queries)} and {len(keys)}.")
    split = _checked(_named(query=queries, key=keys), group, impl)
    _checks.embeddings("negatives", negatives)
    _checks.alongside(query=queries[0], negatives=negatives)
    rows, targets = _rows(queries, normalize), _rows(keys, normalize)
    memory = similarity.scaled_rows(negatives, normalize=normalize, dtype=rows[0].dtype)
    compared = of_queue(rows, targets, memory, in_batch, normalize, split, impl)
    return alpha * weighting.attraction(compared.positives, split) + beta * weighting.repulsion(
        compared.negatives
    )


def cacr_momentum_loss(
    query: Tensor | Sequence[Tensor],
    key: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    cost: Cost = "rbf",
    normalize: bool = True,
    group: Group = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Contrastive attraction and repulsion as a loss of MoCo v3: several queries of a sample against one key.

    With unit queries q_i^y of P views, keys k_i, logits s_im^y = q_i^y . k_m / T and constant weights of the queries

        p_i^y = softmax over y of |q_i^y - k_i|^2 / T

    the loss is a sum over the queries of a mean over samples,

        rbf:        sum_y mean_i p_i^y ( -s_ii^y + log sum_m exp(s_im^y) )
        euclidean:  sum_y mean_i p_i^y T ( -s_ii^y + sum_{m != i} r_im^y s_im^y ),  r = softmax over m of s, a constant

    One query makes p = 1, and ``cost="rbf"`` :func:`info_nce_loss`. MoCo v3 and the authors multiply the first by 2 T.

    Args:
        query: shape (N, D), or a sequence of P views.
        key: shape (N, D), a constant; row i belongs to row i of every query. N >= 2 over all ranks.
        temperature: T > 0; it divides, unlike the sharpness of :func:`cacr_loss`. A 0-d tensor receives a gradient, but
            not through the weights, which are constants.
        cost: "rbf" or "euclidean".
        normalize: scale rows to unit length first.
        group: process group whose other keys serve as negatives.
        impl: "dense", "tiled" or "auto".

    Returns:
        Scalar. float32 for half inputs.

    Raises:
        ValueError: if there is one row, shapes differ, an input is not finite, or T <= 0.

    Cost: O(P N^2 D) time, O(P N D) memory beyond a few thousand rows.
    Reference: Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023,
    arXiv 2105.03746. The authors' euclidean form sums over the batch, so that its size grows with it; here it is the
    mean.
    """
    _checks.temperature("temperature", temperature)
    _checks.choice("cost", cost, ("euclidean", "rbf"))
    queries = _as_list("query", query)
    split = _checked(_named(query=queries, key=[key]), group, impl)
    if split.total < 2:
        raise ValueError(
            f"cacr_momentum_loss needs at least 2 rows (the other keys are the negatives), got {split.total}; pass a "
            "group."
        )
    columns = similarity.scaled_rows(key.detach(), normalize=normalize)
    scale = inverse(temperature)
    views = [similarity.scaled_rows(view, scale=scale, normalize=normalize) for view in queries]
    own = torch.arange(split.offset, split.offset + len(columns), device=columns.device)
    positives = torch.cat([similarity.row_products(rows, columns) for rows in views]).view(len(views), -1)
    rows = torch.cat(views)
    among: dict[str, Any] = {
        "row_keys": own.repeat(len(views)),
        "column_keys": own,
        "over": "different",
        "impl": impl,
    }
    if cost == "rbf":
        log_negatives = _ring.log_sum_exp(rows, columns, split, **among)
        values = F.softplus(log_negatives.view_as(positives) - positives, threshold=60)
    else:
        expected = constant_weights(*_ring.expected_logits(rows, columns, split, **among))
        values = (expected.view_as(positives) - positives) / scale
    with torch.no_grad():  # |q - k|^2 / T less |k|^2 / T, which all queries of a sample have in common
        distances = (rows.square().sum(1) / scale).view_as(positives) - 2 * positives
    return reduce((distances.softmax(0) * values).sum(0), "mean", split=split)


def _rows(views: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    """The views with rows of unit length, or as they are, in at least float32."""
    stacked = torch.stack([similarity.at_least_float32(view) for view in views])
    rows = similarity.scaled_rows(stacked.flatten(0, 1), normalize=normalize, source=views[0].dtype)
    return list(rows.view_as(stacked).unbind())


def _as_list(name: str, views: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One view or several as a list."""
    if isinstance(views, Tensor):
        return [views]
    if not isinstance(views, list | tuple) or not views:
        came = "an empty one" if isinstance(views, list | tuple) else type(views).__name__
        raise TypeError(f"{name} must be a tensor of shape (N, D) or a list of such views, got {came}.")
    return list(views)


def _named(**arguments: list[Tensor]) -> dict[str, Tensor]:
    """The views of several arguments under the names they have in errors."""
    return {
        f"{name}[{i}]" if len(views) > 1 else name: view
        for name, views in arguments.items()
        for i, view in enumerate(views)
    }


def _checked(views: dict[str, Tensor], group: Group, impl: Impl) -> Shard:
    """Refuse views that do not fit together; how the batch is spread."""
    check_rows(group, **views)
    _checks.same_shape(**views)
    _checks.impl(impl)
    return shard(next(iter(views.values())), group)


def _check_numbers(alpha: float, beta: float, tau_plus: float, cost: Cost) -> None:
    _checks.number("alpha", alpha, at_least=0)
    _checks.number("beta", beta, at_least=0)
    _checks.number("tau_plus", tau_plus, at_least=0)
    if tau_plus >= 1:
        raise ValueError(f"tau_plus must be in [0, 1), got {tau_plus}.")
    if tau_plus and cost != "euclidean":
        raise ValueError(f"tau_plus needs cost='euclidean' (a mean can be corrected), got cost={cost!r}.")


class CACRLoss(QueryKeyLoss):
    """Module form of :func:`cacr_loss`, and with a queue of :func:`cacr_queue_loss`.

    Args:
        t_pos: sharpness >= 0 of the weights of positives, per squared distance; 0 for uniform weights.
        t_neg: sharpness >= 0 of the weights of negatives.
        alpha: weight >= 0 of the attraction.
        beta: weight >= 0 of the repulsion.
        cost: "euclidean" or "rbf", of the negatives.
        rbf_t: sharpness > 0 of the Gaussian kernel.
        tau_plus: share in [0, 1) of negatives taken to be of the anchor's own class; without a queue only.
        paper_code_sign: take that share out with the sign of the authors' code.
        symmetric: compare the views of a pair both ways; with a queue every view is a query anyhow.
        in_batch: whether the batch holds negatives beside a queue.
        detach_weights: treat the weights as constants, or only those of a "queue"; None does so with a queue.
        normalize: scale rows to unit length first.
        group: process group whose other rows serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    several_views = True

    def __init__(
        self,
        t_pos: float = 1.0,
        t_neg: float = 1.0,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        cost: Cost = "euclidean",
        rbf_t: float = 2.0,
        tau_plus: float = 0.0,
        paper_code_sign: bool = False,
        symmetric: bool = False,
        in_batch: bool = True,
        detach_weights: DetachedWeights | None = None,
        normalize: bool = True,
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        Weighting(t_pos, t_neg, cost, rbf_t, False if detach_weights is None else detach_weights)
        _check_numbers(alpha, beta, tau_plus, cost)
        _checks.flag("paper_code_sign", paper_code_sign)
        _checks.flag("in_batch", in_batch)
        super().__init__(
            t_pos=t_pos,
            t_neg=t_neg,
            alpha=alpha,
            beta=beta,
            cost=cost,
            rbf_t=rbf_t,
            tau_plus=tau_plus,
            paper_code_sign=paper_code_sign,
            symmetric=symmetric,
            in_batch=in_batch,
            detach_weights=detach_weights,
            normalize=normalize,
            group=group,
            impl=impl,
        )

    def forward(
        self,
        query: Tensor | Sequence[Tensor],
        key: Tensor | Sequence[Tensor] | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Loss of two views (N, D) or a list of V; with a queue (K, D), of queries and keys or lists of V of each."""
        options = self.hyperparameters()
        in_batch, detach = options.pop("in_batch"), options.pop("detach_weights")
        if negatives is None:
            return cacr_loss(query, key, detach_weights=detach is True, **options)  # type: ignore[arg-type]
        if key is None:
            raise ValueError("key must be given with negatives, got None: queries are drawn to keys.")
        if options["tau_plus"]:
            raise ValueError(f"tau_plus must be 0 with a queue, got {options['tau_plus']}.")
        for name in ("tau_plus", "paper_code_sign", "symmetric"):
            del options[name]
        detach = True if detach is None else detach
        return cacr_queue_loss(query, key, negatives, in_batch=in_batch, detach_weights=detach, **options)

    @torch.no_grad()
    def measures(
        self,
        query: Tensor | Sequence[Tensor],
        key: Tensor | Sequence[Tensor] | None = None,
        negatives: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Attraction, repulsion, and the entropies of the weights, as shares of those of uniform weights.

        An entropy of 1 means that ``t_pos`` or ``t_neg`` is too small for the spread of the distances; one near 0 that
        a single positive, or negative, counts. Of this process's rows; nothing of rows without a negative.
        """
        queries = _as_list("query", query)
        if len(queries[0]) < (2 if negatives is None else 1):
            return {}
        given = self.hyperparameters()
        unit, impl, split = given["normalize"], given["impl"], shard(queries[0], None)
        if negatives is None:
            rows = _rows(queries if key is None else queries + _as_list("key", key), unit)
            compared = of_views(rows, given["symmetric"], unit, split, impl)
        else:
            rows, keys = _rows(queries, unit), _rows(_as_list("key", key), unit)  # type: ignore[arg-type]
            memory = similarity.scaled_rows(negatives, normalize=unit, dtype=rows[0].dtype)
            compared = of_queue(rows, keys, memory, given["in_batch"], unit, split, impl)
        weighting = Weighting(given["t_pos"], given["t_neg"], given["cost"], given["rbf_t"], False)
        found = {
            "attraction": weighting.attraction(compared.positives, split),
            "repulsion": weighting.repulsion(compared.negatives),
        }
        entropies = [block.entropy(weighting.t_neg).mean() for block in compared.negatives]
        found["negative_weight_entropy"] = torch.stack(entropies).mean()
        distances = torch.stack(compared.positives)
        if distances.shape[1] > 1:
            weights = weighting.positive_weights(distances)
            entropy = torch.special.entr(weights).sum(1).mean() / math.log(distances.shape[1])
            found["positive_weight_entropy"] = entropy
        return found


class CACRMomentumLoss(PredictionLoss):
    """Module form of :func:`cacr_momentum_loss`.

    Args:
        temperature: T > 0.
        cost: "rbf" or "euclidean".
        normalize: scale rows to unit length first.
        group: process group whose other keys serve as negatives: None, "world" or a process group.
        impl: "dense", "tiled" or "auto".
    """

    several_views = True

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        cost: Cost = "rbf",
        normalize: bool = True,
        group: Group = None,
        impl: Impl = "auto",
    ) -> None:
        _checks.choice("cost", cost, ("euclidean", "rbf"))
        super().__init__(temperature=temperature, cost=cost, normalize=normalize, group=group, impl=impl)

    def forward(self, p: Tensor | Sequence[Tensor], z: Tensor) -> Tensor:
        """Loss of queries (N, D), or of a list of P views of them, against keys (N, D)."""
        return cacr_momentum_loss(p, z, **self.hyperparameters())
