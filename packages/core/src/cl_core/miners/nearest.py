"""The nearest negatives of every row, over a batch or a queue of any length."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_core import _checks
from cl_core._comparison import Comparison, euclidean
from cl_core._rows import tiles

_TILE = 1024  # rows of either side


@torch.no_grad()
def mine_nearest_negatives(
    z: Tensor,
    labels: Tensor,
    *,
    k: int,
    ref: Tensor | None = None,
    ref_labels: Tensor | None = None,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """The k nearest negatives of every row, over the batch or a queue of any length.

    Unlike the other miners it needs no positives: with ``labels=torch.arange(N)`` all other rows are
    negatives. The result is what :class:`cl_core.samplers.HardNegativeBatchSampler` takes as
    ``neighbours``.

    Args:
        z: embeddings, shape (N, D).
        labels: integers, shape (N,).
        k: number of negatives a row.
        ref: candidates instead of the rows of z, shape (M, D).
        ref_labels: integers, shape (M,).
        ids: which sample a row of z is, integers, shape (N,); see :mod:`cl_core.miners`.
        ref_ids: which sample a row of ref is, integers, shape (M,).
        normalize: scale rows to unit length first.

    Returns:
        int64, shape (N, k), nearest first; -1 where a row has fewer negatives.

    Raises:
        ValueError: if labels do not fit z, or k < 1.

    Cost: O(N M D) time, O(N k) memory: both sides are taken in tiles.
    """
    _checks.count("k", k)
    comparison = Comparison(
        z, labels, ref=ref, ref_labels=ref_labels, ids=ids, ref_ids=ref_ids, normalize=normalize
    )
    found = torch.empty(len(z), k, dtype=torch.int64, device=z.device)
    for part in tiles(len(z), _TILE):
        rows = comparison.rows[part]
        best = rows.new_full((len(rows), k), math.inf)
        index = torch.full((len(rows), k), -1, device=z.device)
        for candidates in tiles(len(comparison.columns), max(k, _TILE)):
            distance = euclidean(rows, comparison.columns[candidates])
            same = comparison.row_labels[part, None] == comparison.column_labels[candidates]
            if comparison.row_ids is not None and comparison.column_ids is not None:
                same |= comparison.row_ids[part, None] == comparison.column_ids[candidates]
            distance.masked_fill_(same, math.inf)
            places = torch.arange(candidates.start, candidates.stop, device=z.device).expand_as(distance)
            best, order = torch.cat([best, distance], 1).topk(k, largest=False)
            index = torch.cat([index, places.masked_fill(same, -1)], 1).gather(1, order)
        found[part] = index
    return found
