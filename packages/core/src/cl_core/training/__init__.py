"""Training: the engine around a :class:`~cl_core.method.Method`; needs ``pip install "cl-core[train]"``.

``import cl_core.training`` is lazy, and :class:`~cl_core.training.data.Data` needs torch only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core.training.data import Data

_HOME = {
    "Data": "data",
}
__all__ = ["Data"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cl_core.training.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_core.training' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
