"""Batch samplers: seeded by (seed, epoch), the same number of batches on every rank, resumable mid-epoch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core.samplers._base import DistributedBatchSampler
    from cl_core.samplers.classes import ClassBalancedBatchSampler, SamplesPerClassBatchSampler
    from cl_core.samplers.epoch import EpochBatchSampler
    from cl_core.samplers.hard_negatives import HardNegativeBatchSampler
    from cl_core.samplers.identities import GroupAwareBatchSampler, UniqueIdBatchSampler

_HOME = {
    "ClassBalancedBatchSampler": "classes",
    "DistributedBatchSampler": "_base",
    "EpochBatchSampler": "epoch",
    "GroupAwareBatchSampler": "identities",
    "HardNegativeBatchSampler": "hard_negatives",
    "SamplesPerClassBatchSampler": "classes",
    "UniqueIdBatchSampler": "identities",
}
__all__ = [
    "ClassBalancedBatchSampler",
    "DistributedBatchSampler",
    "EpochBatchSampler",
    "GroupAwareBatchSampler",
    "HardNegativeBatchSampler",
    "SamplesPerClassBatchSampler",
    "UniqueIdBatchSampler",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cl_core.samplers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_core.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
