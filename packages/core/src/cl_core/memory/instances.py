"""One row a sample of the data set."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.distributed import refusing_together
from cl_core.memory._base import Memory, check_range, check_rows, gather


class InstanceBank(Memory):
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
            check_rows(z, self._embeddings)
            _checks.labels("index", index, rows=len(z), of="z", device=z.device)
            check_range("index", index, self.num_samples)
        z, index = gather(group, _rows.unit(z), index.long())
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
        check_range("index", index, self.num_samples)
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
