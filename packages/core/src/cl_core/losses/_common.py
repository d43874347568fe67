"""What the losses share beyond the primitive: the terms of several views, and the reduction over a global batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_core import _checks, similarity
from cl_core._types import Group, Impl, Reduction
from cl_core.distributed import Shard, shard


class ViewTerms(NamedTuple):
    """What a loss over V views of N samples is made of."""

    positives: Tensor
    """Logits of an anchor with the other views of its sample, shape (N, V, V - 1)."""
    log_negatives: Tensor
    """Log-sum-exp of an anchor's logits with all views of all other samples, shape (N, V)."""
    shard: Shard


def view_terms(
    views: Sequence[Tensor], *, temperature: float | Tensor, normalize: bool, group: Group, impl: Impl
) -> ViewTerms:
    """Positive logits and log-sum-exp over negatives of every view of every sample.

    Args:
        views: V >= 2 tensors of shape (N, D); row i of each is the same sample.
        temperature: T > 0; a 0-d tensor receives a gradient.
        normalize: scale rows to unit length first.
        group: process group whose other rows serve as negatives.
        impl: "dense", "tiled" or "auto".
    """
    check_rows(group, **{f"z{i}": view for i, view in enumerate(views, 1)})
    _checks.same_shape(**{f"z{i}": view for i, view in enumerate(views, 1)})
    _checks.positive("temperature", temperature)
    _checks.impl(impl)
    split = shard(views[0], group)
    # Views of a sample lie side by side, so that what an anchor must not meet is one block on the diagonal.
    count = len(views)
    rows = similarity.scaled_rows(torch.stack(list(views), 1).flatten(0, 1), scale=root_scale(temperature), normalize=normalize)
    if split.group is None:
        bound = similarity.logit_bound(temperature, normalize)
        log_negatives = similarity.self_log_sum_exp(rows, group_size=count, bound=bound, impl=impl)
    else:
        columns = split.gather(rows, each=count)
        row_keys = torch.arange(len(rows), device=rows.device).div(count, rounding_mode="floor") + split.offset
        column_keys = torch.arange(len(columns), device=rows.device).div(count, rounding_mode="floor")
        log_negatives = similarity.cross_log_sum_exp(
            rows, columns, row_keys=row_keys, column_keys=column_keys, over="different", impl=impl
        )
    by_view = rows.unflatten(0, (-1, count)).unbind(1)
    products = {(v, w): torch.linalg.vecdot(by_view[v], by_view[w]) for v in range(count) for w in range(v + 1, count)}
    positives = torch.stack(
        [products[min(v, w), max(v, w)] for v in range(count) for w in range(count) if v != w], 1
    ).unflatten(1, (count, count - 1))
    return ViewTerms(positives, log_negatives.unflatten(0, (-1, count)), split)


def check_rows(group: Group, **tensors: Tensor) -> None:
    """Check embeddings; with a group a rank may hold no row."""
    for name, z in tensors.items():
        _checks.embeddings(name, z, at_least=1 if group is None else 0)


def root_scale(temperature: float | Tensor) -> float | Tensor:
    """Factor for both sides of a product whose logits are to be divided by the temperature."""
    return temperature.rsqrt() if isinstance(temperature, Tensor) else temperature**-0.5


def reduce(
    values: Tensor, reduction: Reduction, *, split: Shard | None = None, valid: Tensor | None = None
) -> Tensor:
    """Reduce one value an anchor over the global batch.

    Args:
        values: this rank's values, shape (A,).
        reduction: "mean" over the anchors that count on all ranks, "sum" over all ranks, or "none".
        split: how the batch is spread over ranks; the rank's result is scaled so that the mean over ranks is the
            result of one process.
        valid: boolean (A,), false where an anchor does not count; its value becomes 0.

    Returns:
        A scalar, or the values for "none". Zero, attached to the graph, if no anchor counts.
    """
    if valid is not None:
        values = torch.where(valid, values, 0)
    if reduction == "none":
        return values
    total = values.sum()
    alone = split is None or split.group is None
    if split is not None and not alone:
        total = total * split.world_size
    if reduction == "sum":
        return total
    if valid is None and alone:
        return total / max(1, values.numel())
    count = values.new_tensor(values.numel()) if valid is None else valid.sum().to(values.dtype)
    if split is not None:
        count = split.sum(count)
    return total / count.clamp_min(1)
