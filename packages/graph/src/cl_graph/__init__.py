"""Contrastive learning on graphs: encoders, random views, data sets and published methods as plug-ins.

``import cl_graph`` is lazy: a submodule is imported when it is first touched. The methods are here by name as well.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cl_graph import methods as _methods

if TYPE_CHECKING:
    from cl_graph import data, encoders, methods, views
    from cl_graph.methods import *  # noqa: F403 - what methods.__all__ names

__version__ = version("cl-graph")
_MODULES = ("data", "encoders", "methods", "views")
__all__ = ["data", "encoders", "methods", "views"]
__all__ += _methods.__all__


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"cl_graph.{name}")
    if name in _methods.__all__:
        return getattr(_methods, name)
    raise AttributeError(f"module 'cl_graph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
