"""Batch samplers: seeded by (seed, epoch), the same number of batches on every rank, resumable mid-epoch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core.samplers._base import DistributedBatchSampler
    from cl_core.samplers.epoch import EpochBatchSampler

_HOME = {
    "DistributedBatchSampler": "_base",
    "EpochBatchSampler": "epoch",
}
__all__ = [
    "DistributedBatchSampler",
    "EpochBatchSampler",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cl_core.samplers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_core.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
