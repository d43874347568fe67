"""Contrastive learning on images: encoders, views, data sets and published methods as plug-ins.

``import cl_vision`` is lazy: a submodule is imported when it is first touched. The methods are here by name as well.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cl_vision import methods as _methods

if TYPE_CHECKING:
    from cl_vision import data, encoders, figures, methods, transforms
    from cl_vision.methods import *  # noqa: F403 - what methods.__all__ names
    from cl_vision.probe import probe_folder

__version__ = version("cl-vision")
_MODULES = ("data", "encoders", "figures", "methods", "transforms")
__all__ = ["data", "encoders", "figures", "methods", "probe_folder", "transforms"]
__all__ += _methods.__all__


def __getattr__(name: str) -> Any:
    if name == "probe_folder":
        return importlib.import_module("cl_vision.probe").probe_folder
    if name in _MODULES:
        return importlib.import_module(f"cl_vision.{name}")
    if name in _methods.__all__:
        return getattr(_methods, name)
    raise AttributeError(f"module 'cl_vision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
