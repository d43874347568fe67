"""Published methods on images, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_vision.methods.moco import MoCo, MoCoV3
    from cl_vision.methods.nnclr import NNCLR
    from cl_vision.methods.simclr import SimCLR
    from cl_vision.methods.swav import SwAV

_HOME = {"MoCo": "moco", "MoCoV3": "moco", "NNCLR": "nnclr", "SimCLR": "simclr", "SwAV": "swav"}
__all__ = ["NNCLR", "MoCo", "MoCoV3", "SimCLR", "SwAV"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cl_vision.methods.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_vision.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
