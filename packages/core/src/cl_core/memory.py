"""Memories of embeddings: a queue of recent rows, a bank of one row a sample, a bank of cluster prototypes.

All of their state is in their ``state_dict``, so that a resumed run goes on exactly where it was. A state that is
refused, or lacks an entry, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.clustering import kmeans, nearest_centroid
from cl_core.distributed import Shard, refusing_together, shard


class _Memory(nn.Module):
    """A module that loads all of a state or nothing, and whose rows are written when they are next read.

    A training step reads the memory, compares with it, hands in its new rows and only then runs backward. Writing
    at once would change rows that the backward still needs; copying the memory for each step is what this avoids.
    """

    _entries: tuple[str, ...] = ()  # of the state, beside the buffers

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[Tensor, ...]] = []

    def _write(self, *rows: Tensor) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _settle(self) -> None:
        while self._pending:
            self._write(*self._pending.pop(0))

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, missing, _, errors = args
        names = (*self._buffers, *self._entries)
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        given = {name: state_dict.get(prefix + name) for name in names}
        refused = [] if absent else [prefix + sentence for sentence in self._refusals(given)]
        missing.extend(absent)
        errors.extend(refused)
        if not absent and not refused:
            self._pending.clear()
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _refusals(self, given: dict[str, Any]) -> list[str]:
        """A sentence for each entry that does not fit."""
        refused = []
        for name, held in self._buffers.items():
            assert held is not None
            entry = given[name]
            got = type(entry).__name__
            if isinstance(entry, Tensor):
                if entry.shape == held.shape and entry.is_floating_point() == held.is_floating_point():
                    continue
                got = f"{entry.dtype} of shape {tuple(entry.shape)}"
            refused.append(f"{name} must be {held.dtype} of shape {tuple(held.shape)}, got {got}.")
        return refused

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._settle()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class FeatureQueue(_Memory):
    """The most recent ``size`` rows, with their labels and ids: a ring in which new rows overwrite the oldest.

    ``embeddings``, ``labels`` and ``ids`` are views of the rows held, row i of each the same sample, in ring order: new
    rows are written from ``pointer`` on and wrap around at ``size``, so the oldest row is row 0 until the queue is full
    and row ``pointer`` from then on.

    Rows handed in by :meth:`enqueue` are written when the queue is next read. A loss on ``embeddings`` can therefore be
    differentiated after any number of ``enqueue``; after the queue has been read again, torch refuses to (it never uses
    the changed rows). Without a group, ranks hold different queues: build ``DistributedDataParallel`` with
    ``broadcast_buffers=False`` then, or it replaces their rows by those of rank 0.

    Args:
        size: rows held when full.
        dim: D, columns of a row.
        dtype: of the rows; a half type halves the memory.
        normalize: scale rows to unit length on the way in.

    Reference: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020,
    arXiv 1911.05722.
    """

    _embeddings: Tensor
    _labels: Tensor
    _ids: Tensor
    _entries = ("_extra_state",)

    def __init__(
        self, size: int, dim: int, *, dtype: torch.dtype = torch.float32, normalize: bool = True
    ) -> None:
        super().__init__()
        _checks.count("size", size)
        _checks.count("dim", dim)
        self.size, self.dim, self.normalize = size, dim, normalize
        self._pointer = self._filled = 0
        self.register_buffer("_embeddings", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("_labels", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("_ids", torch.full((size,), -1, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self, z: Tensor, *, labels: Tensor | None = None, ids: Tensor | None = None, group: Group = None
    ) -> None:
        """Take in rows; of more than ``size`` the last ``size`` stay.

        Args:
            z: rows, shape (N, D), N >= 0; detached.
            labels: integers of shape (N,); -1 is stored where there are none.
            ids: integers of shape (N,), which sample a row is; -1 is stored where there are none.
            group: take in the rows of all ranks, in rank order, so that the queues of all ranks stay equal; ranks may
                bring different numbers of rows.

        Raises:
            ValueError: if z is not a finite (N, D) matrix on the queue's device or labels or ids do not fit it.

        Cost: O(N D), whatever the size.
        """
        with refusing_together(group, self._embeddings.device):
            _check_rows(z, self._embeddings)
            keys = torch.full((len(z), 2), -1, dtype=torch.int64, device=z.device)
            for column, (name, values) in enumerate((("labels", labels), ("ids", ids))):
                if values is not None:
                    _checks.labels(name, values, rows=len(z), of="z", device=z.device)
                    keys[:, column] = values
        # A copy in any case: the caller may change z before it is written.
        rows = (_rows.unit(z) if self.normalize else z.clone()).to(self._embeddings.dtype)
        rows, keys = _gather(group, rows, keys)
        if len(rows):
            self._pending.append((rows, keys))
        self._forget(sum(len(rows) for rows, _ in self._pending) - self.size)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows held."""
        return self._embeddings.dtype

    @property
    def embeddings(self) -> Tensor:
        """The rows held, a view of shape (filled, D) in ring order."""
        self._settle()
        return self._embeddings[: self._filled]

    @property
    def labels(self) -> Tensor:
        """The labels of the rows held, a view, int64 of shape (filled,)."""
        self._settle()
        return self._labels[: self._filled]

    @property
    def ids(self) -> Tensor:
        """The ids of the rows held, a view, int64 of shape (filled,)."""
        self._settle()
        return self._ids[: self._filled]

    @property
    def filled(self) -> int:
        """Number of rows held, at most ``size``."""
        self._settle()
        return self._filled

    @property
    def pointer(self) -> int:
        """Where the next row will be written."""
        self._settle()
        return self._pointer

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue."""
        self._pending.clear()
        self._pointer = self._filled = 0
        self._embeddings.zero_()
        self._labels.fill_(-1)
        self._ids.fill_(-1)

    def get_extra_state(self) -> Tensor:
        """Pointer and fill count: numbers of the host, so that reading the queue waits for no device."""
        return torch.tensor([self._pointer, self._filled])

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        self._check_extra_state(state)
        self._pointer, self._filled = state.tolist()

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"size={self.size}, dim={self.dim}, dtype={self.dtype}, normalize={self.normalize}"

    def _check_extra_state(self, state: Any) -> None:
        if not isinstance(state, Tensor) or state.shape != (2,) or state.is_floating_point():
            raise ValueError("_extra_state must be two integers, pointer and rows held, got something else.")
        pointer, filled = state.tolist()
        if not (0 <= pointer < self.size and (filled == self.size or filled == pointer)):
            raise ValueError(
                f"_extra_state must be what a queue of size {self.size} can have, got pointer {pointer} and "
                f"{filled} rows."
            )

    def _refusals(self, given: dict[str, Any]) -> list[str]:
        refused = super()._refusals(given)
        try:
            self._check_extra_state(given["_extra_state"])
        except ValueError as error:
            refused.append(str(error))
        return refused

    def _forget(self, surplus: int) -> None:
        """Drop the oldest unread rows; those after them will have overwritten all that these would have."""
        while surplus > 0:
            dropped = min(surplus, len(self._pending[0][0]))
            rest = [rows[dropped:] for rows in self._pending.pop(0)]
            if len(rest[0]):
                self._pending.insert(0, tuple(rest))
            self._pointer = (self._pointer + dropped) % self.size
            surplus -= dropped

    def _write(self, *rows: Tensor) -> None:
        embeddings, keys = rows
        count = len(embeddings)
        before_wrap = min(count, self.size - self._pointer)
        for buffer, new in (
            (self._embeddings, embeddings),
            (self._labels, keys[:, 0]),
            (self._ids, keys[:, 1]),
        ):
            buffer[self._pointer : self._pointer + before_wrap] = new[:before_wrap]
            buffer[: count - before_wrap] = new[before_wrap:]
        self._pointer = (self._pointer + count) % self.size
        self._filled = min(self.size, self._filled + count)


class InstanceBank(_Memory):
    """One unit row a sample of the data set, which follows the sample's embeddings.

        row <- unit(momentum * row + (1 - momentum) * unit(z))

    Rows start as random directions; the first embedding of a sample replaces its row outright. Where there is no
    direction to follow, the row stays: a zero embedding, or one opposite to the row at momentum 0.5. Of several rows
    for one sample in a call the last counts. Written when next read, as :class:`FeatureQueue`.

    Args:
        num_samples: number of rows.
        dim: D, columns of a row.
        momentum: weight of the old row, in [0, 1].
        dtype: of the rows.
        generator: source of the first directions, on the CPU.

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018,
    arXiv 1805.01978.
    """

    _embeddings: Tensor
    _seen: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        momentum: float = 0.5,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _checks.count("num_samples", num_samples)
        _checks.count("dim", dim)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}.")
        self.num_samples, self.dim, self.momentum = num_samples, dim, momentum
        start = torch.randn(num_samples, dim, generator=generator)
        self.register_buffer("_embeddings", _rows.unit(start).to(dtype))
        self.register_buffer("_seen", torch.zeros(num_samples, dtype=torch.bool))

    @torch.no_grad()
    def update(self, index: Tensor, z: Tensor, *, group: Group = None) -> None:
        """Move the rows of some samples towards their embeddings.

        Args:
            index: which samples, integers in 0 .. num_samples - 1 of shape (N,).
            z: their embeddings, shape (N, D), N >= 0; detached.
            group: take in the rows of all ranks, in rank order, so that the banks of all ranks stay equal.

        Raises:
            ValueError: if z is not a finite (N, D) matrix on the bank's device or an index is out of range.

        Cost: O(N D); a copy of the bank each time that more than ``num_samples`` rows came in unread.
        """
        with refusing_together(group, self._embeddings.device):
            _check_rows(z, self._embeddings)
            _checks.labels("index", index, rows=len(z), of="z", device=z.device)
            _check_range("index", index, self.num_samples)
        z, index = _gather(group, _rows.unit(z), index.long())
        self._pending.append((index, z))
        if sum(len(index) for index, _ in self._pending) > self.num_samples:
            # Nobody reads: do not let it grow, but leave the rows that a backward may still need.
            self._embeddings, self._seen = self._embeddings.clone(), self._seen.clone()
            self._settle()

    def lookup(self, index: Tensor) -> Tensor:
        """Rows of some samples: a copy of shape (N, D) for integers of shape (N,)."""
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be an integer tensor of shape (N,), got {type(index).__name__}.")
        if index.ndim != 1:
            raise ValueError(f"index must have shape (N,), got {tuple(index.shape)}.")
        _checks.labels("index", index, rows=len(index), of="index", device=self._embeddings.device)
        _check_range("index", index, self.num_samples)
        return self.embeddings[index.long()]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the rows."""
        return self._embeddings.dtype

    @property
    def embeddings(self) -> Tensor:
        """All rows, shape (num_samples, D), not a copy."""
        self._settle()
        return self._embeddings

    @property
    def seen(self) -> Tensor:
        """Which samples have had an embedding, boolean of shape (num_samples,), not a copy."""
        self._settle()
        return self._seen

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"num_samples={self.num_samples}, dim={self.dim}, momentum={self.momentum}, dtype={self.dtype}"

    def _write(self, *rows: Tensor) -> None:
        index, z = rows
        # Every row for a sample writes the value of the last one, so that the order of writing does not matter.
        ascending, order = index.sort(stable=True)
        z = z[order[torch.searchsorted(ascending, index, right=True) - 1]]
        # What rounding leaves of rows that cancel is no direction.
        rounding = 4 * max(torch.finfo(z.dtype).eps, torch.finfo(self.dtype).eps)
        z = z.to(torch.promote_types(z.dtype, self.dtype))
        old = self._embeddings[index].to(z.dtype)
        seen = self._seen[index]
        new = torch.where(seen[:, None], torch.lerp(z, old, self.momentum), z)
        clear = new.norm(dim=1) > rounding
        self._embeddings[index] = torch.where(clear[:, None], _rows.unit(new), old).to(self.dtype)
        self._seen[index] = seen | clear


class PrototypeBank(_Memory):
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
            _check_rows(z, self.prototypes[0])
            if index is None:
                if len(z) != self.num_samples:
                    raise ValueError(
                        f"z must hold all {self.num_samples} samples when there is no index, got {len(z)}."
                    )
                index = torch.arange(self.num_samples, device=z.device)
            _checks.labels("index", index, rows=len(z), of="z", device=z.device)
            _check_range("index", index, self.num_samples)
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


def _check_rows(z: Tensor, held: Tensor) -> None:
    """Check rows that are to be stored beside ``held``; there may be none."""
    _checks.embeddings("z", z, at_least=0)
    if z.shape[1] != held.shape[1]:
        raise ValueError(f"z must have {held.shape[1]} columns, got {z.shape[1]}.")
    if z.device != held.device:
        raise ValueError(f"z must be on the device of the memory, {held.device}, got {z.device}.")


def _check_range(name: str, index: Tensor, size: int) -> None:
    message = f"{name} must lie in 0 .. {size - 1}, got a value outside."
    _checks.require(((index >= 0) & (index < size)).all(), message)


def _gather(group: Group, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all ranks in rank order, and as many keys; there may be none at all."""
    split = shard(rows, group, at_least=0)
    return (split.gather(rows), split.gather(keys)) if split.total else (rows, keys)
