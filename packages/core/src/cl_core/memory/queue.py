"""The most recent rows, as a ring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_core import _checks, _rows
from cl_core._types import Group
from cl_core.distributed import refusing_together
from cl_core.memory._base import Memory, check_rows, gather


class FeatureQueue(Memory):
    """The most recent ``size`` rows, with their labels and ids: a ring in which new rows overwrite the oldest.

    ``embeddings``, ``labels`` and ``ids`` are views of the rows held, row i of each the same sample, in ring order: new
    rows are written from ``pointer`` on and wrap around at ``size``, so the oldest row is row 0 until the queue is full
    and row ``pointer`` from then on.

    Rows handed in by :meth:`enqueue` are written when the queue is next read. A loss on ``embeddings`` can therefore be
    differentiated after any number of ``enqueue``; after the queue has been read again, torch refuses to (it never uses
    the changed rows). Without a group, ranks hold different queues, of which a checkpoint has that of rank 0; around
    ``DistributedDataParallel`` see :func:`cl_core.distributed.unbroadcast_buffers`.

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
            check_rows(z, self._embeddings)
            keys = torch.full((len(z), 2), -1, dtype=torch.int64, device=z.device)
            for column, (name, values) in enumerate((("labels", labels), ("ids", ids))):
                if values is not None:
                    _checks.labels(name, values, rows=len(z), of="z", device=z.device)
                    keys[:, column] = values
        # A copy in any case: the caller may change z before it is written.
        rows = (_rows.unit(z) if self.normalize else z.clone()).to(self._embeddings.dtype)
        rows, keys = gather(group, rows, keys)
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
