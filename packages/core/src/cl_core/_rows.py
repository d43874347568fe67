"""Rows of a matrix: unit length, tiles, and the precision that measurements are made in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Neither gradients nor autocast: a measurement is not trained, nor rounded to half precision."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def wide(z: Tensor) -> Tensor:
    """``z`` in the precision to compute in: float64 stays, everything shorter becomes float32."""
    return z if z.dtype == torch.float64 else z.float()


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """Precision of long sums: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def unit(z: Tensor) -> Tensor:
    """Rows scaled to unit length, at least float32; zero rows stay zero.

    Scaling by the largest entry first keeps the squares of rows of norm 1e20 and 1e-20 inside float32.
    """
    z = wide(z)
    largest = z.abs().amax(dim=1, keepdim=True)
    z = z / torch.where(largest > 0, largest, 1)
    norm = z.norm(dim=1, keepdim=True)
    return z / torch.where(norm > 0, norm, 1)


def tiles(rows: int, tile: int) -> Iterator[slice]:
    """Consecutive slices of at most ``tile`` rows."""
    for start in range(0, rows, tile):
        yield slice(start, min(start + tile, rows))


class Collected:
    """Columns of integers of unknown number, gathered in one growing buffer.

    A list of many small results that outlive the large temporaries between them would leave the heap in holes that
    nothing fits into any more: after N rows it would be as large as an N x N matrix.

    Args:
        rows: integers a column.
        device: where they are.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._held, self._count = torch.empty(rows, 1024, dtype=torch.int64, device=device), 0

    def add(self, *columns: Tensor) -> None:
        """Add as many columns as the vectors, one for each row, are long."""
        start, self._count = self._count, self._count + len(columns[0])
        if self._count > self._held.shape[1]:
            grown = self._held.new_empty(len(self._held), max(self._count, 2 * self._held.shape[1]))
            grown[:, :start] = self._held[:, :start]
            self._held = grown
        for row, values in zip(self._held, columns, strict=True):
            row[start : self._count] = values

    def vectors(self) -> tuple[Tensor, ...]:
        """All of them, one vector a row."""
        return tuple(row[: self._count].clone() for row in self._held)
