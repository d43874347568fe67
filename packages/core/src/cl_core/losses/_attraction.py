"""Rows drawn to some and repelled from others by weighted squared distances: what CACR's losses compute with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, permutations
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from cl_core import _checks, _ring, _tiles, similarity
from cl_core._types import Impl
from cl_core.distributed import Shard
from cl_core.losses._common import reduce

Cost: TypeAlias = Literal["euclidean", "rbf"]
"""What is averaged over negatives: the squared distance, or a Gaussian kernel of it, whose mean is then logged."""

DetachedWeights: TypeAlias = bool | Literal["queue"]
"""Which weights are constants: all, none, or as in the authors' code only those of negatives from a queue."""

_KEPT = (
    4 * 2048 * 2048
)  # distances of all blocks together that "auto" keeps for the backward: 64 MB in float32, twice
_SHARPEST = 1e12  # far beyond what float32 tells apart; exponents a million times as large are no longer safe


@dataclass(frozen=True)
class Negatives:
    """Rows and what they are repelled from: the other samples' rows of a view, the rows of a memory, or both."""

    rows: Tensor
    batch: Tensor | None
    memory: Tensor | None
    unit: bool
    split: Shard
    impl: Impl

    @property
    def count(self) -> int:
        """Negatives of an anchor."""
        of_batch = 0 if self.batch is None else self.split.total - 1
        return of_batch + (0 if self.memory is None else len(self.memory))

    def mean_distance(self) -> Tensor:
        """Mean squared distance of an anchor to its negatives, shape (N,)."""
        total, squares = self.rows.new_zeros(self.rows.shape[1]), self.rows.new_zeros(())
        if self.memory is not None:
            total, squares = self.memory.sum(0), self.memory.square().sum()
        own = self.rows.new_zeros(())
        if self.batch is not None:
            total = total + self.split.sum(self.batch.sum(0))
            squares = squares + self.split.sum(self.batch.square().sum())
            own = squared(self.rows, self.batch)
        # The sum over all, the anchor's own partner included, less that partner.
        number = self.count + (self.batch is not None)
        of_rows = number * self.rows.square().sum(1)
        return (of_rows + squares - 2 * (self.rows * total).sum(1) - own) / self.count

    def log_sum_exp(self, sharpness: float) -> Tensor:
        """Log-sum-exp of -sharpness c_ij over j, shape (N,)."""
        rows, parts = self._anchors(sharpness), []
        if self.batch is not None:
            columns = self._columns(self.batch, sharpness)
            parts.append(_ring.log_sum_exp(rows, columns, self.split, **self._others()))
        if self.memory is not None:
            columns = self._columns(self.memory, sharpness)
            parts.append(similarity.cross_log_sum_exp(rows, columns, impl=self.impl))
        log_sum = parts[0] if len(parts) == 1 else torch.logaddexp(*parts)
        return log_sum - self._constant(sharpness)

    def expected(self, sharpness: float, detach: DetachedWeights) -> Tensor:
        """Mean of the exponents -sharpness c_ij under their softmax, shape (N,)."""
        parts = self._parts(sharpness)
        log_sum, expected = self._together(parts)
        if detach == "queue" and len(parts) == 2:
            of_queue = parts[1][0]
            _, expected = _tiles.joined(parts[0], (of_queue.detach(), parts[1][1].detach()))
            share = (of_queue - log_sum).exp().detach()
            expected = expected + share * (of_queue - of_queue.detach())
        elif detach is True or (detach == "queue" and self.batch is None):
            expected = constant_weights(log_sum, expected)
        return expected - self._constant(sharpness)

    def entropy(self, sharpness: float) -> Tensor:
        """Entropy of that softmax, as a share of the largest possible, shape (N,)."""
        log_sum, expected = self._together(self._parts(sharpness))
        return (log_sum - expected) / math.log(max(self.count, 2))

    def _parts(self, sharpness: float) -> list[tuple[Tensor, Tensor]]:
        """Log-sum-exp and mean of the exponents, up to a constant an anchor, over the batch and over the memory."""
        rows, parts = self._anchors(sharpness), []
        if self.batch is not None:
            columns = self._columns(self.batch, sharpness)
            parts.append(_ring.expected_logits(rows, columns, self.split, **self._others()))
        if self.memory is not None:
            columns = self._columns(self.memory, sharpness)
            parts.append(similarity.expected_logits(rows, columns, impl=self.impl))
        return parts

    def _together(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return parts[0] if len(parts) == 1 else _tiles.joined(*parts)

    # -a |x - y|^2 = 2 a x . y - a |y|^2 - a |x|^2; for unit rows the squares are 1 and stay out of the products.

    def _anchors(self, sharpness: float) -> Tensor:
        rows = self.rows * (2 * sharpness)
        return rows if self.unit else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)

    def _columns(self, others: Tensor, sharpness: float) -> Tensor:
        if self.unit:
            return others
        return torch.cat([others, -sharpness * others.square().sum(1, keepdim=True)], 1)

    def _constant(self, sharpness: float) -> float | Tensor:
        return 2 * sharpness if self.unit else sharpness * self.rows.square().sum(1)

    def _others(self) -> dict[str, Any]:
        start = self.split.offset
        own = torch.arange(start, start + len(self.rows), device=self.rows.device)
        return {"row_keys": own, "column_keys": own, "over": "different", "impl": self.impl}


@dataclass(frozen=True)
class Compared:
    """What each query is drawn to and repelled from."""

    positives: list[Tensor]
    """Squared distances of a view's rows to their K positives, shape (K, N), one for each query view."""
    negatives: list[Negatives]


def of_views(rows: list[Tensor], symmetric: bool, unit: bool, split: Shard, impl: Impl) -> Compared:
    """Every view drawn to its sample's others, and one view of a pair, or both, repelled from the other view."""
    count = len(rows)
    between = {frozenset(pair): squared(*(rows[x] for x in pair)) for pair in combinations(range(count), 2)}
    positives = [
        torch.stack([between[frozenset((x, y))] for y in range(count) if y != x]) for x in range(count)
    ]
    pairs = list((permutations if symmetric else combinations)(rows, 2))
    impl = _of_blocks(impl, len(pairs) * len(rows[0]) * split.total)
    return Compared(positives, [Negatives(x, y, None, unit, split, impl) for x, y in pairs])


def of_queue(
    rows: list[Tensor],
    keys: list[Tensor],
    memory: Tensor,
    in_batch: bool,
    unit: bool,
    split: Shard,
    impl: Impl,
) -> Compared:
    """Every query drawn to the keys of the other views, or the only key, and repelled from the memory."""
    alone = len(rows) == 1
    positives = [
        torch.stack([squared(query, key) for y, key in enumerate(keys) if alone or y != x])
        for x, query in enumerate(rows)
    ]
    impl = _of_blocks(impl, len(rows) * len(rows[0]) * (len(memory) + in_batch * split.total))
    negatives = [Negatives(query, query if in_batch else None, memory, unit, split, impl) for query in rows]
    return Compared(positives, negatives)


def _of_blocks(impl: Impl, entries: int) -> Impl:
    """How to compare, where each block may be small but all of them are kept at once."""
    return "tiled" if impl == "auto" and entries > _KEPT else impl


class Weighting:
    """How positives and negatives are weighted and averaged."""

    def __init__(self, t_pos: float, t_neg: float, cost: Cost, rbf_t: float, detach: DetachedWeights) -> None:
        for name, sharpness in (("t_pos", t_pos), ("t_neg", t_neg), ("rbf_t", rbf_t)):
            _checks.number(name, sharpness, at_least=0)
            if sharpness > _SHARPEST:
                raise ValueError(f"{name} must be at most {_SHARPEST}, got {sharpness}.")
        _checks.choice("cost", cost, ("euclidean", "rbf"))
        _checks.positive("rbf_t", rbf_t)
        _checks.choice("detach_weights", detach, (True, False, "queue"))
        if detach == "queue" and cost != "euclidean":
            raise ValueError(f"detach_weights='queue' needs cost='euclidean', got cost={cost!r}.")
        self.t_pos, self.t_neg, self.cost, self.rbf_t, self.detach = t_pos, t_neg, cost, rbf_t, detach

    def attraction(self, positives: list[Tensor], split: Shard) -> Tensor:
        """A: mean over anchors of the distances of their positives, for each query (K, N), under the weights."""
        distances = torch.stack(positives)
        if distances.shape[1] > 1:
            weights = self.positive_weights(distances)
            distances = ((weights.detach() if self.detach else weights) * distances).sum(1, keepdim=True)
        return reduce(distances.mean((0, 1)), "mean", split=split)

    def positive_weights(self, distances: Tensor) -> Tensor:
        """Weights of distances (V, K, N), which sum to 1 over the K positives."""
        return (self.t_pos * distances).softmax(1)

    def repulsion(self, blocks: list[Negatives]) -> Tensor:
        """R: mean over blocks of anchors."""
        each = [self._repulsion(negatives) for negatives in blocks]
        return torch.stack(each).mean()

    def _repulsion(self, negatives: Negatives) -> Tensor:
        if self.cost == "euclidean":
            return reduce(self._minus_distances(negatives), "mean", split=negatives.split)
        potentials = negatives.split.gather(self._log_potentials(negatives))
        return potentials.logsumexp(0) - math.log(len(potentials))

    def _minus_distances(self, negatives: Negatives) -> Tensor:
        """sum_j -w_ij c_ij."""
        if self.t_neg == 0:
            return -negatives.mean_distance()
        return negatives.expected(self.t_neg, self.detach) / self.t_neg

    def _log_potentials(self, negatives: Negatives) -> Tensor:
        """Logarithm of sum_j w_ij exp(-rbf_t c_ij): the difference of two log-sum-exps."""
        both = self.t_neg + self.rbf_t
        log_sum, log_weights = negatives.log_sum_exp(both), negatives.log_sum_exp(self.t_neg)
        if self.detach:  # then only the kernel's share of the exponent is differentiated
            log_sum = log_sum.detach() + (log_sum - log_sum.detach()) * (self.rbf_t / both)
            log_weights = log_weights.detach()
        return log_sum - log_weights


def squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distance of each row of x from the same row of y, shape (N,)."""
    return (x - y).square().sum(1)


def constant_weights(log_sum: Tensor, expected: Tensor) -> Tensor:
    """The mean of logits with the gradient it has where the weights are constants: that of the log-sum-exp."""
    return expected.detach() + (log_sum - log_sum.detach())
