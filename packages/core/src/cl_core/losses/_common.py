"""What the losses share beyond the primitive: the terms of several views, and the reduction over a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cl_core import _checks, _ring, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard, shard


@dataclass(frozen=True)
class ViewTerms:
    """What a loss over V views of N samples is made of; a sample's views lie side by side in ``rows``."""

    rows: Tensor
    views: int
    shard: Shard
    bound: float | None
    impl: Impl

    def positives(self) -> Tensor:
        """Logits of an anchor with the other views of its sample, shape (V - 1, N, V); (1, N, 1) for two views."""
        count = self.views
        by_view = self.rows.view(-1, count, self.rows.shape[1]).unbind(1)
        if count == 2:
            return similarity.row_products(*by_view).view(1, -1, 1)
        products = {
            (v, w): similarity.row_products(by_view[v], by_view[w]) for v in range(count) for w in range(v)
        }
        others = [[products[max(v, w), min(v, w)] for w in range(count) if w != v] for v in range(count)]
        return torch.stack([torch.stack(of_view) for of_view in others], 2)

    def log_negatives(self, sharpness: float = 1.0) -> Tensor:
        """Log-sum-exp of an anchor's logits, times a factor, with all views of all other samples, shape (N, V)."""
        rows = self.rows if sharpness == 1 else self.rows * sharpness**0.5
        count, split = self.views, self.shard
        if split.group is None:
            bound = None if self.bound is None else self.bound * sharpness
            result = similarity.self_log_sum_exp(rows, group_size=count, bound=bound, impl=self.impl)
            return result.view(-1, count)
        own = torch.arange(len(rows), device=rows.device).div_(count, rounding_mode="floor") + split.offset
        return _ring.log_sum_exp(
            rows, rows, split, each=count, row_keys=own, column_keys=own, over="different", impl=self.impl
        ).view(-1, count)


def compared_views(
    views: Sequence[Tensor], *, temperature: float | Tensor, normalize: bool, group: Group, impl: Impl
) -> tuple[Tensor, Tensor, Shard]:
    """Check several views; the positives and negatives that :func:`view_terms` has of them, and how they are spread."""
    split = _checked(views, temperature=temperature, group=group, impl=impl)
    wide = [similarity.at_least_float32(view) for view in views]
    options = {"temperature": temperature, "normalize": normalize, "impl": impl, "source": views[0].dtype}
    if len(views) == 2 and split.group is None:
        kept = similarity._two_view_terms(*wide, **options)  # type: ignore[arg-type]
        if kept is not None:
            return kept[0][None], kept[1], split
    terms = _prepared(wide, split, **options)  # type: ignore[arg-type]
    return terms.positives(), terms.log_negatives(), split


def view_terms(
    views: Sequence[Tensor], *, temperature: float | Tensor, normalize: bool, group: Group, impl: Impl
) -> ViewTerms:
    """Check several views and prepare their comparison.

    Args:
        views: V >= 2 tensors of shape (N, D); row i of each is the same sample.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        group: process group whose other rows serve as negatives.
        impl: "dense", "tiled" or "auto".
    """
    split = _checked(views, temperature=temperature, group=group, impl=impl)
    wide = [similarity.at_least_float32(view) for view in views]
    source = views[0].dtype
    return _prepared(wide, split, temperature=temperature, normalize=normalize, impl=impl, source=source)


def _checked(views: Sequence[Tensor], *, temperature: float | Tensor, group: Group, impl: Impl) -> Shard:
    check_rows(group, **{f"z{i}": view for i, view in enumerate(views, 1)})
    _checks.same_shape(**{f"z{i}": view for i, view in enumerate(views, 1)})
    _checks.temperature("temperature", temperature)
    _checks.impl(impl)
    return shard(views[0], group)


def _prepared(
    views: Sequence[Tensor],
    split: Shard,
    *,
    temperature: float | Tensor,
    normalize: bool,
    impl: Impl,
    source: torch.dtype,
) -> ViewTerms:
    # Side by side, so that what an anchor must not meet is one block on the diagonal.
    rows = similarity.scaled_rows(
        torch.stack(list(views), 1).view(-1, views[0].shape[1]),
        scale=root_scale(temperature),
        normalize=normalize,
        source=source,
    )
    return ViewTerms(rows, len(views), split, similarity.logit_bound(temperature, normalize), impl)


class PairTerms(NamedTuple):
    """What a loss over N pairs is made of, seen from one side or from both."""

    positives: Tensor
    """Logit of a pair, shape (N, 1)."""
    log_negatives: Tensor
    """Log-sum-exp of an anchor's logits with its negatives, shape (N, 1), or (N, 2) from both sides."""
    shard: Shard


def pair_terms(
    x: Tensor,
    y: Tensor,
    *,
    symmetric: bool,
    temperature: float | Tensor,
    normalize: bool,
    group: Group,
    impl: Impl,
    names: tuple[str, str],
) -> PairTerms:
    """Pairs (x_i, y_i) whose negatives are the other rows of the other tower.

    Args:
        x: shape (N, D).
        y: shape (N, D).
        symmetric: take the rows of y as anchors too.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        group: process group whose other rows serve as negatives.
        impl: "dense", "tiled" or "auto".
        names: what the two towers are called in errors.
    """
    rows, columns, split = _towers(
        x, y, names, temperature=temperature, normalize=normalize, group=group, impl=impl
    )
    positives = similarity.row_products(rows, columns)[:, None]
    if split.group is None:
        if not symmetric:
            log_negatives = similarity.cross_log_sum_exp(rows, columns, over="different", impl=impl)[:, None]
            return PairTerms(positives, log_negatives, split)
        bound = similarity.logit_bound(temperature, normalize)
        both = similarity.paired_log_sum_exp(rows, columns, over="different", bound=bound, impl=impl)
        return PairTerms(positives, torch.stack(both, 1), split)
    sides = [(rows, columns), (columns, rows)] if symmetric else [(rows, columns)]
    log_negatives = torch.stack([_over_ranks(own, others, split, impl) for own, others in sides], 1)
    return PairTerms(positives, log_negatives, split)


def queue_terms(
    x: Tensor,
    y: Tensor,
    queue: Tensor,
    *,
    in_batch: bool = False,
    temperature: float | Tensor,
    normalize: bool,
    group: Group,
    impl: Impl,
    names: tuple[str, str],
) -> PairTerms:
    """Pairs (x_i, y_i) with anchors x whose negatives are the rows of a queue, the same on all ranks.

    Args:
        x: shape (N, D).
        y: shape (N, D).
        queue: shape (K, D).
        in_batch: count the other rows of y as negatives too.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows, those of the queue included, to unit length first.
        group: process group over which the batch is spread.
        impl: "dense", "tiled" or "auto".
        names: what the two towers are called in errors.
    """
    _checks.embeddings("negatives", queue)
    _checks.alongside(**{names[0]: x, "negatives": queue})
    rows, columns, split = _towers(
        x, y, names, temperature=temperature, normalize=normalize, group=group, impl=impl
    )
    positives = similarity.row_products(rows, columns)[:, None]
    queue = similarity.scaled_rows(queue, normalize=normalize, dtype=rows.dtype)
    log_negatives = similarity.cross_log_sum_exp(rows, queue, impl=impl)
    if in_batch:
        log_negatives = torch.logaddexp(log_negatives, _over_ranks(rows, columns, split, impl))
    return PairTerms(positives, log_negatives[:, None], split)


def _towers(
    x: Tensor,
    y: Tensor,
    names: tuple[str, str],
    *,
    temperature: float | Tensor,
    normalize: bool,
    group: Group,
    impl: Impl,
) -> tuple[Tensor, Tensor, Shard]:
    """Check two towers and scale their rows; the temperature goes to x alone."""
    check_rows(group, **dict(zip(names, (x, y), strict=True)))
    _checks.same_shape(**dict(zip(names, (x, y), strict=True)))
    _checks.temperature("temperature", temperature)
    _checks.impl(impl)
    rows = similarity.scaled_rows(x, scale=inverse(temperature), normalize=normalize)
    return rows, similarity.scaled_rows(y, normalize=normalize), shard(x, group)


def _over_ranks(rows: Tensor, columns: Tensor, split: Shard, impl: Impl) -> Tensor:
    """Log-sum-exp of rows against the columns of all ranks, less the row's own partner."""
    own = torch.arange(split.offset, split.offset + len(rows), device=rows.device)
    return _ring.log_sum_exp(rows, columns, split, row_keys=own, column_keys=own, over="different", impl=impl)


def check_rows(group: Group, **tensors: Tensor) -> None:
    """Check embeddings; with a group a rank may hold no row."""
    for name, z in tensors.items():
        _checks.embeddings(name, z, at_least=1 if group is None else 0)


def root_scale(temperature: float | Tensor) -> float | Tensor:
    """Factor for both sides of a product whose logits are to be divided by the temperature."""
    if isinstance(temperature, Tensor):
        return similarity.at_least_float32(temperature).rsqrt()
    return float(temperature**-0.5)


def inverse(temperature: float | Tensor) -> float | Tensor:
    """Factor for one side of a product whose logits are to be divided by the temperature."""
    if isinstance(temperature, Tensor):
        return similarity.at_least_float32(temperature).reciprocal()
    return 1 / temperature


def reduce_pairs(values: Tensor, reduction: Reduction, split: Shard) -> Tensor:
    """Reduce values of shape (N, sides), as :func:`reduce`; "none" gives shape (sides N,), the first side first."""
    return reduce(values.t().flatten() if reduction == "none" else values, reduction, split=split)


def reduce_views(values: Tensor, reduction: Reduction, split: Shard) -> Tensor:
    """Reduce values of shape (P, N, V), one a positive of an anchor: mean over the positives, then as :func:`reduce`.

    Returns:
        A scalar, or shape (V N,), view 1 first, for "none".
    """
    if reduction == "none":
        return values.mean(0).t().flatten()
    return reduce(values if len(values) == 1 else values.mean(0), reduction, split=split)


def reduce(
    values: Tensor,
    reduction: Reduction,
    *,
    split: Shard | None = None,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Reduce one value an anchor over the global batch.

    Args:
        values: this rank's values, one an anchor.
        reduction: "mean" over the anchors that count on all ranks, "sum" over all ranks, or "none".
        split: how the batch is spread over ranks; the rank's result is scaled so that the mean over ranks is the
            result of one process.
        valid: boolean, false where an anchor does not count; its value becomes 0.
        weight: how many terms an anchor's value sums, what "mean" divides by; None counts every valid anchor once.

    Returns:
        A scalar, or the values for "none". Zero, attached to the graph, if no anchor counts.
    """
    if valid is not None:
        values = torch.where(valid, values, 0)
        weight = valid if weight is None else weight
    if reduction == "none":
        return values
    alone = split is None or split.group is None
    if alone and weight is None and reduction == "mean" and values.numel():
        return values.mean()
    total = values.sum()
    if split is not None and not alone:
        total = total * split.world_size
    if reduction == "sum":
        return total
    count = values.new_tensor(values.numel()) if weight is None else weight.sum().to(values.dtype)
    if split is not None:
        count = split.sum(count)
    return total / count.clamp_min(1)
