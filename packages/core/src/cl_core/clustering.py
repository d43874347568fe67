"""k-means in torch: tiled distances, cosine or Euclidean, warm start, restarts, one result on all processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.distributed import Shard, refusing_together, shard

Metric: TypeAlias = Literal["cosine", "euclidean"]
Empty: TypeAlias = Literal["move", "keep"]

_CENTROID_TILE = 4096
# Seeding looks at this many rows, or this many a cluster, whichever is more.
_SEEDING_ROWS = 16384
_SEEDING_ROWS_PER_CLUSTER = 16


@dataclass(frozen=True)
class KMeansResult:
    """What :func:`kmeans` found.

    Attributes:
        centroids: shape (K, D), float32 (float64 for float64 input); unit rows for the cosine metric.
        assignments: index of the nearest centroid of each row, int64 of shape (N,).
        inertia: sum of the squared distances of all rows to their centroids (of unit rows for the cosine metric:
            2 - 2 cos).
        iterations: passes over the data of the start that won.
        converged: whether it settled before ``max_iterations``.
    """

    centroids: Tensor
    assignments: Tensor
    inertia: float
    iterations: int
    converged: bool


def kmeans(
    z: Tensor,
    num_clusters: int,
    *,
    metric: Metric = "euclidean",
    initial: Tensor | None = None,
    restarts: int = 1,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    empty: Empty = "move",
    generator: torch.Generator | None = None,
    group: Group = None,
    tile: int = 1024,
) -> KMeansResult:
    r"""Cluster rows around K centroids by Lloyd's algorithm.

        minimise sum_i min_k |x_i - c_k|^2

    with x = z, or x and c of unit length for the cosine metric (spherical k-means). Starts are drawn by greedy
    k-means++ on at most max(16384, 16 K) random rows.

    Args:
        z: rows to cluster, shape (N, D); with a group this rank's part of them, which may be empty.
        num_clusters: K, at most the number of rows.
        metric: "euclidean" or "cosine".
        initial: centroids to start from, shape (K, D); the first of the starts. With a group, the first rank's count.
        restarts: number of starts; the lowest inertia wins.
        max_iterations: Lloyd iterations of a start.
        tolerance: stop when the centroids move less: sum_k |c_k' - c_k|^2 <= tolerance * mean feature variance.
            They also stop when no assignment changes.
        empty: what becomes of a cluster that loses all its rows: "move" it to the row that is farthest from its
            centroid, or "keep" its centroid.
        generator: source of the starts; with a group, the first rank's decides.
        group: process group whose rows are clustered together; every rank gets the same centroids and inertia, and
            the assignments of its own rows.
        tile: rows at a time.

    Returns:
        :class:`KMeansResult`.

    Raises:
        ValueError: if there are fewer rows than clusters, a value is not finite, or ``initial`` does not fit; with a
            group, on all ranks.

    Cost: O(N K D) time an iteration, O(tile min(K, 4096) + K D + N) memory beside z.
    Reference: Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """
    with refusing_together(group, getattr(z, "device", torch.device("cpu"))):
        _checks.embeddings("z", z, at_least=1 if group is None else 0)
        _checks.choice("metric", metric, ("cosine", "euclidean"))
        _checks.choice("empty", empty, ("move", "keep"))
        for name, value in (("num_clusters", num_clusters), ("restarts", restarts), ("tile", tile)):
            _checks.count(name, value)
        _checks.count("max_iterations", max_iterations)
        if not (tolerance >= 0 and math.isfinite(tolerance)):
            raise ValueError(f"tolerance must be finite and >= 0, got {tolerance}.")
        if initial is not None:
            _checks.embeddings("initial", initial)
            if initial.shape != (num_clusters, z.shape[1]):
                raise ValueError(
                    f"initial must have shape {(num_clusters, z.shape[1])}, (num_clusters, D), "
                    f"got {tuple(initial.shape)}."
                )
            if initial.device != z.device:
                raise ValueError(f"initial must be on the device of z, {z.device}, got {initial.device}.")
    with _rows.measuring(z.device):
        data = _Data(z, metric, shard(z, group), tile, beside=initial)
        if data.total < num_clusters:
            raise ValueError(
                f"num_clusters must be at most the number of rows, {data.total}, got {num_clusters}."
            )
        threshold = tolerance * data.variance()
        best: KMeansResult | None = None
        for start in range(restarts):
            if start == 0 and initial is not None:
                centroids = data.of_first_rank(data.enter(initial))
            else:
                centroids = _plus_plus(*_seeding(data, num_clusters, generator))
            result = _lloyd(data, centroids, max_iterations, threshold, empty)
            if best is None or result.inertia < best.inertia:
                best = result
    assert best is not None
    return best


def nearest_centroid(
    z: Tensor, centroids: Tensor, *, metric: Metric = "euclidean", tile: int = 1024
) -> tuple[Tensor, Tensor]:
    """Nearest of K centroids for each row; the first of equally near ones.

    Args:
        z: rows, shape (N, D).
        centroids: shape (K, D), K >= 1.
        metric: "euclidean", or "cosine" for unit rows on both sides.
        tile: rows at a time.

    Returns:
        Index of the centroid, int64 of shape (N,), and the squared distance to it, shape (N,); infinite if it exceeds
        the dtype.

    Raises:
        ValueError: if widths, dtypes or devices differ or a value is not finite.

    Cost: O(N K D) time, O(tile min(K, 4096) + N) memory.
    """
    _checks.embeddings("z", z, at_least=0)
    _checks.embeddings("centroids", centroids)
    _checks.choice("metric", metric, ("cosine", "euclidean"))
    _checks.count("tile", tile)
    if centroids.shape[1] != z.shape[1]:
        raise ValueError(
            f"z and centroids must have the same number of columns, got {z.shape[1]} and {centroids.shape[1]}."
        )
    if centroids.device != z.device:
        raise ValueError(f"centroids must be on the device of z, {z.device}, got {centroids.device}.")
    with _rows.measuring(z.device):
        data = _Data(z, metric, Shard(None, (len(z),), 0), tile, beside=centroids)
        assignments, distances = data.empty_assignment()
        centroids = data.enter(centroids)
        for rows, x in data.tiles():
            assignments[rows], distances[rows] = _nearest(x, centroids)
    return assignments, distances * data.unit * data.unit


class _Pass(NamedTuple):
    """One look at all rows. ``sums``, ``counts``, ``inertia`` and ``changed`` are over all ranks."""

    assignments: Tensor
    distances: Tensor
    sums: Tensor
    counts: Tensor
    inertia: float
    changed: int


class _Data:
    """The rows in the coordinates of the metric: centred at their mean, or of unit length.

    Euclidean coordinates are in units of about the largest entry, so that no square overflows or vanishes; powers of 2,
    which round nothing.
    """

    def __init__(
        self, z: Tensor, metric: Metric, split: Shard, tile: int, *, beside: Tensor | None = None
    ) -> None:
        self.z, self.metric, self.split, self.tile = z, metric, split, tile
        self.total, self.device = split.total, z.device
        self.dtype = torch.promote_types(z.dtype, torch.float32)
        self.long_dtype = _rows.accumulation_dtype(z.device)
        self.mean = torch.zeros(z.shape[1], dtype=self.dtype, device=z.device)
        self.unit = torch.ones((), dtype=self.dtype, device=z.device)
        sums = torch.zeros(z.shape[1], dtype=self.long_dtype, device=z.device)
        if metric == "euclidean":
            self.unit = self._unit(beside)
            # Distances are differences of squares: far from the origin they would cancel.
            for _, x in self.tiles():
                sums += x.sum(0, dtype=self.long_dtype)
            self.mean = (split.sum(sums) / max(self.total, 1)).to(self.dtype)

    def _unit(self, beside: Tensor | None) -> Tensor:
        """The power of 2 below the largest entry of the rows of all ranks, and of ``beside``."""
        parts = [part for part in (self.z, beside) if part is not None and len(part)]
        own = torch.stack(
            [self.unit.new_zeros(()), *(part.abs().amax().to(self.dtype) for part in parts)]
        ).amax()
        one_each = replace(self.split, counts=(1,) * self.split.world_size)
        largest = one_each.gather(own[None]).amax().clamp_max(torch.finfo(self.dtype).max / 2)
        return torch.where(largest > 0, largest.log2().floor().exp2(), 1)

    def variance(self) -> float:
        """Mean variance of a feature."""
        moments = torch.zeros(2, self.z.shape[1], dtype=self.long_dtype, device=self.device)
        for _, x in self.tiles():
            x = x.to(self.long_dtype)
            moments += torch.stack([x.sum(0), x.square().sum(0)])
        first, second = self.split.sum(moments) / self.total
        return float((second - first.square()).clamp_min(0).mean())

    def enter(self, rows: Tensor) -> Tensor:
        """Rows of the outside world in the coordinates of the metric."""
        if self.metric == "cosine":
            return _rows.unit(rows).to(self.dtype)
        return rows.to(self.dtype) / self.unit - self.mean

    def of_first_rank(self, value: Tensor) -> Tensor:
        """The first rank's value on all ranks: a sum that only it takes part in needs no rank arithmetic."""
        return self.split.sum(value if self.split.rank == 0 else torch.zeros_like(value))

    def leave(self, centroids: Tensor) -> Tensor:
        """Centroids for the outside world."""
        return centroids if self.metric == "cosine" else (centroids + self.mean) * self.unit

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in _rows.tiles(len(self.z), self.tile):
            yield rows, self.enter(self.z[rows])

    def empty_assignment(self) -> tuple[Tensor, Tensor]:
        assignments = torch.full((len(self.z),), -1, dtype=torch.int64, device=self.device)
        return assignments, torch.empty(len(self.z), dtype=self.dtype, device=self.device)

    def assign(self, centroids: Tensor, previous: Tensor | None) -> _Pass:
        clusters, width = centroids.shape
        assignments, distances = self.empty_assignment()
        # Sums, counts, inertia and changes travel in one message.
        packed = torch.zeros(clusters * (width + 1) + 2, dtype=self.long_dtype, device=self.device)
        sums, counts = packed[: clusters * width].view(clusters, width), packed[clusters * width : -2]
        for rows, x in self.tiles():
            assignments[rows], distances[rows] = _nearest(x, centroids)
            sums.index_add_(0, assignments[rows], x.to(self.long_dtype))
        counts += torch.bincount(assignments, minlength=clusters)
        packed[-2] = distances.sum(dtype=self.long_dtype)
        packed[-1] = len(assignments) if previous is None else (assignments != previous).sum()
        packed = self.split.sum(packed)
        sums, counts = packed[: clusters * width].view(clusters, width), packed[clusters * width : -2]
        inertia, changed = packed[-2:].tolist()
        return _Pass(assignments, distances, sums, counts, inertia, int(changed))

    def update(self, step: _Pass, centroids: Tensor, empty: Empty) -> Tensor:
        """Mean row of each cluster, in unit length for the cosine metric."""
        sums, counts = step.sums, step.counts
        without = (counts == 0).nonzero()[:, 0]
        if len(without) and empty == "move":
            self._relocate(step, without)
        means = (sums / counts.clamp_min(1)[:, None]).to(self.dtype)
        # Unit rows that cancel have no mean direction, a cluster that could not be filled no mean: they stay.
        norm = means.norm(dim=1, keepdim=True)
        stay = counts[:, None] == 0
        if self.metric == "cosine":
            stay = stay | (norm <= 1e-6)
            means = means / torch.where(norm > 0, norm, 1)
        return torch.where(stay, centroids, means)

    def _relocate(self, step: _Pass, empty: Tensor) -> None:
        """Give each empty cluster one of the rows farthest from their centroids, taken out of its old cluster."""
        distances, rows = step.distances.topk(min(len(empty), len(step.distances)))
        split = shard(rows, self.split.group)
        distances, owners = split.gather(distances), split.gather(step.assignments[rows])
        points = split.gather(self.enter(self.z[rows])).to(self.long_dtype)
        order = distances.argsort(descending=True, stable=True)[: len(empty)]
        order = order[distances[order] > 0]
        empty = empty[: len(order)]
        step.sums.index_add_(0, owners[order], points[order], alpha=-1)
        step.counts.index_add_(0, owners[order], torch.ones_like(step.counts[: len(order)]), alpha=-1)
        step.sums[empty] = points[order]
        step.counts[empty] = 1


def _lloyd(
    data: _Data, centroids: Tensor, max_iterations: int, threshold: float, empty: Empty
) -> KMeansResult:
    step = data.assign(centroids, None)
    iterations, converged = 0, False
    while not converged and iterations < max_iterations:
        iterations += 1
        updated = data.update(step, centroids, empty)
        moved = float((updated - centroids).square().sum())
        centroids, step = updated, data.assign(updated, step.assignments)
        converged = step.changed == 0 or moved <= threshold
    inertia = step.inertia * float(data.unit) * float(data.unit)
    return KMeansResult(data.leave(centroids), step.assignments, inertia, iterations, converged)


def _nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest centroid and squared distance, for one tile of rows."""
    # |x - c|^2 = |x|^2 - 2 (x . c - |c|^2 / 2): the largest bracket is the nearest.
    best = x.new_full((len(x),), -math.inf)
    index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for part in _rows.tiles(len(centroids), _CENTROID_TILE):
        c = centroids[part]
        score, place = torch.addmm(c.square().sum(1).mul_(-0.5), x, c.T).max(dim=1)
        index = torch.where(score > best, place + part.start, index)
        best = torch.maximum(best, score)
    return index, (x.square().sum(1) - 2 * best).clamp_min_(0)


def _seeding(data: _Data, clusters: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Rows to seed from and random numbers to do it with, equal on all ranks."""
    wanted = max(_SEEDING_ROWS, _SEEDING_ROWS_PER_CLUSTER * clusters)
    source = "cpu" if generator is None else generator.device
    rows = data.z
    if data.total > wanted:
        own = math.ceil(wanted * len(rows) / data.total)
        rows = rows[torch.randperm(len(rows), generator=generator, device=source)[:own].to(data.device)]
    trials = 2 + int(math.log(clusters))
    draws = torch.rand(clusters, trials, generator=generator, device=source, dtype=data.long_dtype)
    draws = draws.to(data.device)
    return shard(rows, data.split.group).gather(data.enter(rows)), data.of_first_rank(draws)


def _plus_plus(rows: Tensor, draws: Tensor) -> Tensor:
    """Greedy k-means++: of a few rows drawn by squared distance, keep the one that lowers the inertia most."""
    clusters = len(draws)
    squared = rows.square().sum(1, keepdim=True)

    def distances(candidates: Tensor) -> Tensor:
        return (squared + candidates.square().sum(1) - 2 * rows @ candidates.T).clamp_min_(0)

    chosen = rows.new_empty(clusters, rows.shape[1])
    first = (draws[0, :1] * len(rows)).long().clamp_max_(len(rows) - 1)
    chosen[0] = rows[first[0]]
    nearest = distances(rows[first])[:, 0]
    for cluster in range(1, clusters):
        mass = nearest.cumsum(0, dtype=draws.dtype)
        picks = torch.searchsorted(mass, draws[cluster] * mass[-1], right=True).clamp_max_(len(rows) - 1)
        lowered = torch.minimum(distances(rows[picks]), nearest[:, None])
        best = lowered.sum(0, dtype=draws.dtype).argmin()
        chosen[cluster] = rows[picks[best]]
        nearest = lowered[:, best]
    return chosen
