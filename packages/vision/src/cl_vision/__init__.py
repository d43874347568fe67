"""Contrastive learning on images: encoders, views, data sets and published methods as plug-ins.

``import cl_vision`` is lazy: a submodule is imported when it is first touched.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_vision import data, encoders, figures, methods, projectors, transforms
    from cl_vision.methods import (
        BYOL,
        NNCLR,
        BarlowTwins,
        Hydra,
        MoCo,
        MoCoV3,
        SimCLR,
        SimLAP,
        SimSiam,
        SupCon,
        SwAV,
        VICReg,
    )
    from cl_vision.probe import probe_folder

__version__ = version("cl-vision")
_MODULES = ("data", "encoders", "figures", "methods", "projectors", "transforms")
__all__ = [
    "BYOL",
    "NNCLR",
    "BarlowTwins",
    "Hydra",
    "MoCo",
    "MoCoV3",
    "SimCLR",
    "SimLAP",
    "SimSiam",
    "SupCon",
    "SwAV",
    "VICReg",
    "data",
    "encoders",
    "figures",
    "methods",
    "probe_folder",
    "projectors",
    "transforms",
]


def __getattr__(name: str) -> Any:
    if name == "probe_folder":
        return importlib.import_module("cl_vision.probe").probe_folder
    if name in _MODULES:
        return importlib.import_module(f"cl_vision.{name}")
    if name in __all__:
        return getattr(importlib.import_module("cl_vision.methods"), name)
    raise AttributeError(f"module 'cl_vision' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
