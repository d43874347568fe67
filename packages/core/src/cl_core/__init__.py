"""Contrastive losses, samplers and miners for PyTorch: exact, memory-linear, right on many processes.

``import cl_core`` is lazy: a submodule is imported when it is first touched.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_core import functional, losses, similarity

__version__ = version("cl-core")
__all__ = ["functional", "losses", "similarity"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"cl_core.{name}")
    raise AttributeError(f"module 'cl_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
