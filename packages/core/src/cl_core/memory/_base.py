"""What every memory is: it loads all of a state or nothing, and writes when it is next read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cl_core import _checks
from cl_core._types import Group
from cl_core.distributed import shard


class Memory(nn.Module):
    """A module that loads all of a state or nothing, and whose rows are written when they are next read.

    A training step reads the memory, compares with it, hands in its new rows and only then runs backward. Writing
    at once would change rows that the backward still needs; copying the memory for each step is what this avoids.
    """

    _entries: tuple[str, ...] = ()  # of the state, beside the buffers

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[Tensor, ...]] = []

    @property
    def unbroadcast(self) -> tuple[str, ...]:
        """All buffers: with a group they are equal on all ranks, without one each rank keeps its own."""
        return tuple(self._buffers)

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


def check_rows(z: Tensor, held: Tensor) -> None:
    """Check rows that are to be stored beside ``held``; there may be none."""
    _checks.embeddings("z", z, at_least=0)
    if z.shape[1] != held.shape[1]:
        raise ValueError(f"z must have {held.shape[1]} columns, got {z.shape[1]}.")
    if z.device != held.device:
        raise ValueError(f"z must be on the device of the memory, {held.device}, got {z.device}.")


def check_range(name: str, index: Tensor, size: int) -> None:
    message = f"{name} must lie in 0 .. {size - 1}, got a value outside."
    _checks.require(((index >= 0) & (index < size)).all(), message)


def gather(group: Group, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all ranks in rank order, and as many keys; there may be none at all."""
    split = shard(rows, group, at_least=0)
    return (split.gather(rows), split.gather(keys)) if split.total else (rows, keys)
