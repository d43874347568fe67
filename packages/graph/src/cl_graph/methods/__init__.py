"""Published methods on graphs, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_graph.methods.costa import COSTA
    from cl_graph.methods.gca import GCA
    from cl_graph.methods.grace import GRACE
    from cl_graph.methods.progcl import ProGCL

_HOME = {"COSTA": "costa", "GCA": "gca", "GRACE": "grace", "ProGCL": "progcl"}
__all__ = ["COSTA", "GCA", "GRACE", "ProGCL"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cl_graph.methods.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_graph.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
