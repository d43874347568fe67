"""Memories of embeddings: a queue of recent rows, a bank of one row a sample, a bank of cluster prototypes.

All of their state is in their ``state_dict``, so that a resumed run goes on exactly where it was. A state that is
refused, or lacks an entry, changes nothing.
"""

from cl_core.memory.instances import InstanceBank
from cl_core.memory.prototypes import PrototypeBank
from cl_core.memory.queue import FeatureQueue

__all__ = ["FeatureQueue", "InstanceBank", "PrototypeBank"]
