"""Centroids of clusters, found anew now and then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.clustering import kmeans, nearest_centroid
from cl_core.distributed import Shard, refusing_together, shard
from cl_core.memory._base import Memory, check_range, check_rows


class PrototypeBank(Memory):
    r"""Cluster centres of a data set's embeddings, at one or more granularities.

    :meth:`refresh`, called now and then (each epoch), clusters all embeddings by spherical k-means. Each prototype c
    carries a concentration, from the distances of the Z unit embeddings v around it,

        phi = sum_v |v - c| / (Z log(Z + smoothing))

    then scaled to have mean ``temperature`` within a granularity, for use as a temperature of its own: dense clusters
    get a small one. Clusters of one row, whose phi says nothing, take the largest; then the highest and lowest
    ``clip`` shares are clipped, so that no prototype dominates.

    For samples ``index`` of a batch, ``prototype_nce_loss(z, bank.prototypes, bank.assignments[:, index].unbind(),
    concentration=bank.concentrations)``.

    Args:
        num_samples: samples in the data set.
        num_prototypes: number of prototypes of each granularity.
        dim: D, columns of a row.
        temperature: mean concentration.
        smoothing: alpha in the paper; keeps small clusters from an extreme phi.
        clip: share clipped at either end, in [0, 0.5].
        dtype: of the prototypes.

    Reference: Li et al., "Prototypical Contrastive Learning of Unsupervised Representations", ICLR 2021,
    arXiv 2005.04966. Singletons and clipping as in the authors' code.
    """

    assignments: Tensor
    """Prototype of each sample at each granularity, int64 of shape (granularities, num_samples); -1 for none yet."""

    def __init__(
        self,
        num_samples: int,
        num_prototypes: Sequence[int],
        dim: int,
        *,
        temperature: float = 0.2,
        smoothing: float = 10.0,
        clip: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _checks.count("num_samples", num_samples)
        _checks.count("dim", dim)
        _checks.positive("temperature", temperature)
        _checks.positive("smoothing", smoothing)
        if not 0 <= clip <= 0.5:
            raise ValueError(f"clip must lie in [0, 0.5], got {clip}.")
        if not num_prototypes:
            raise ValueError("num_prototypes must name at least one granularity, got none.")
        self.num_samples, self.num_prototypes, self.dim = num_samples, tuple(num_prototypes), dim
        self.temperature, self.smoothing, self.clip = temperature, smoothing, clip
        for level, count in enumerate(self.num_prototypes):
            _checks.count("num_prototypes", count)
            self.register_buffer(f"_prototypes_{level}", torch.zeros(count, dim, dtype=dtype))
            self.register_buffer(f"_concentrations_{level}", torch.full((count,), temperature, dtype=dtype))
        start = torch.full((len(self.num_prototypes), num_samples), -1, dtype=torch.int64)
        self.register_buffer("assignments", start)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the prototypes."""
        return self.prototypes[0].dtype

    @property
    def prototypes(self) -> list[Tensor]:
        """Unit rows of shape (K, D) for each granularity; zero before the first refresh."""
        return [getattr(self, f"_prototypes_{level}") for level in range(len(self.num_prototypes))]

    @property
    def concentrations(self) -> list[Tensor]:
        """Shape (K,) for each granularity; mean ``temperature``."""
        return [getattr(self, f"_concentrations_{level}") for level in range(len(self.num_prototypes))]

    @torch.no_grad()
    def refresh(
        self,
        z: Tensor,
        *,
        index: Tensor | None = None,
        warm_start: bool = True,
        restarts: int = 1,
        max_iterations: int = 100,
        generator: torch.Generator | None = None,
        group: Group = None,
    ) -> None:
        """Cluster the embeddings anew. Nothing changes if it fails.

        Args:
            z: embeddings, shape (N, D); with a group this rank's part of them.
            index: which samples they are, integers in 0 .. num_samples - 1 of shape (N,); None when z holds all samples
                in order. Samples without an embedding get assignment -1.
            warm_start: start from the prototypes of the last refresh.
            restarts: starts of k-means; the best wins.
            max_iterations: of a start.
            generator: source of the starts.
            group: cluster the rows of all ranks together; every rank gets all prototypes and assignments.

        Raises:
            ValueError: if z does not fit the bank, an index is out of range, or there are fewer rows than prototypes.

        Cost: that of :func:`cl_core.clustering.kmeans` for each granularity.
        """
        with refusing_together(group, self.assignments.device):
            check_rows(z, self.prototypes[0])
            if index is None:
                if len(z) != self.num_samples:
                    raise ValueError(
                        f"z must hold all {self.num_samples} samples when there is no index, got {len(z)}."
                    )
                index = torch.arange(self.num_samples, device=z.device)
            _checks.labels("index", index, rows=len(z), of="z", device=z.device)
            check_range("index", index, self.num_samples)
        warm = warm_start and bool((self.assignments >= 0).any())
        split = shard(z, group)
        where = split.gather(index.long())
        found = []
        for count, held in zip(self.num_prototypes, self.prototypes, strict=True):
            result = kmeans(
                z,
                count,
                metric="cosine",
                initial=held if warm else None,
                restarts=restarts,
                max_iterations=max_iterations,
                generator=generator,
                group=group,
            )
            concentration = self._concentration(z, result.centroids, split)
            found.append((result.centroids, concentration, split.gather(result.assignments)))
        self.assignments.fill_(-1)
        for level, (centroids, concentration, assigned) in enumerate(found):
            self.prototypes[level].copy_(centroids)
            self.concentrations[level].copy_(concentration)
            self.assignments[level, where] = assigned

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return (
            f"num_samples={self.num_samples}, num_prototypes={self.num_prototypes}, dim={self.dim}, "
            f"temperature={self.temperature}, smoothing={self.smoothing}, clip={self.clip}, dtype={self.dtype}"
        )

    def _concentration(self, z: Tensor, centroids: Tensor, split: Shard) -> Tensor:
        assigned, squared = nearest_centroid(z, centroids, metric="cosine")
        sums = torch.zeros(2, len(centroids), dtype=_rows.accumulation_dtype(z.device), device=z.device)
        sums[0].index_add_(0, assigned, squared.sqrt().to(sums.dtype))
        sums[1] += torch.bincount(assigned, minlength=len(centroids))
        distance, count = split.sum(sums)
        phi = distance / (count.clamp_min(1) * (count + self.smoothing).log())
        # A single row or equal rows have no spread to measure; rounding leaves them distances of a few 1e-4.
        phi = torch.where(distance > 1e-3 * count, phi, 0)
        largest = phi.max()
        if largest == 0:
            return torch.full_like(phi, self.temperature)
        phi = torch.where(phi > 0, phi, largest)
        phi = phi.clamp(phi.quantile(self.clip), phi.quantile(1 - self.clip))
        return phi * (self.temperature / phi.mean())
