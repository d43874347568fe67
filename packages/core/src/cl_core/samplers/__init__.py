"""Batch samplers: seeded by (seed, epoch), the same number of batches on every rank, resumable mid-epoch.

Each goes into ``torch.utils.data.DataLoader(data, batch_sampler=sampler)``. What is called ``Partners`` is no batch
sampler: it draws, for the labels of a batch, the classes that they are paired with.

Example:
    >>> from cl_core.samplers import SamplesPerClassBatchSampler
    >>> labels = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    >>> sampler = SamplesPerClassBatchSampler(labels, batch_size=4, samples_per_class=2)
    >>> sampler.set_epoch(5)
    >>> batches = iter(sampler)
    >>> [labels[row] for row in next(batches)].count(1) in (0, 2)
    True
    >>> stopped = sampler.state_dict()
    >>> resumed = SamplesPerClassBatchSampler(labels, batch_size=4, samples_per_class=2)
    >>> resumed.load_state_dict(stopped)
    >>> list(resumed) == list(batches)
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core.samplers._base import DistributedBatchSampler
    from cl_core.samplers.classes import ClassBalancedBatchSampler, SamplesPerClassBatchSampler
    from cl_core.samplers.epoch import EpochBatchSampler
    from cl_core.samplers.hard_negatives import HardNegativeBatchSampler
    from cl_core.samplers.identities import GroupAwareBatchSampler, UniqueIdBatchSampler
    from cl_core.samplers.partners import (
        ArbitraryPartners,
        DistinctPartners,
        IdenticalPartners,
        PartnerClasses,
        WeightedPartners,
    )

_HOME = {
    "ArbitraryPartners": "partners",
    "ClassBalancedBatchSampler": "classes",
    "DistinctPartners": "partners",
    "DistributedBatchSampler": "_base",
    "EpochBatchSampler": "epoch",
    "GroupAwareBatchSampler": "identities",
    "HardNegativeBatchSampler": "hard_negatives",
    "IdenticalPartners": "partners",
    "PartnerClasses": "partners",
    "SamplesPerClassBatchSampler": "classes",
    "UniqueIdBatchSampler": "identities",
    "WeightedPartners": "partners",
}
__all__ = [
    "ArbitraryPartners",
    "ClassBalancedBatchSampler",
    "DistinctPartners",
    "DistributedBatchSampler",
    "EpochBatchSampler",
    "GroupAwareBatchSampler",
    "HardNegativeBatchSampler",
    "IdenticalPartners",
    "PartnerClasses",
    "SamplesPerClassBatchSampler",
    "UniqueIdBatchSampler",
    "WeightedPartners",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cl_core.samplers.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_core.samplers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
