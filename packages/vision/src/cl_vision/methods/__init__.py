"""Published methods on images, one file each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_vision.methods.barlow_twins import BarlowTwins
    from cl_vision.methods.byol import BYOL
    from cl_vision.methods.classifier import Classifier
    from cl_vision.methods.deepcluster_v2 import DeepClusterV2
    from cl_vision.methods.hydra import Hydra, SimLAP
    from cl_vision.methods.moco import MoCo, MoCoV3
    from cl_vision.methods.nnclr import NNCLR
    from cl_vision.methods.simclr import SimCLR
    from cl_vision.methods.simsiam import SimSiam
    from cl_vision.methods.supcon import SupCon
    from cl_vision.methods.swav import SwAV
    from cl_vision.methods.vicreg import VICReg

_HOME = {
    "BYOL": "byol",
    "BarlowTwins": "barlow_twins",
    "Classifier": "classifier",
    "DeepClusterV2": "deepcluster_v2",
    "Hydra": "hydra",
    "MoCo": "moco",
    "MoCoV3": "moco",
    "NNCLR": "nnclr",
    "SimCLR": "simclr",
    "SimLAP": "hydra",
    "SimSiam": "simsiam",
    "SupCon": "supcon",
    "SwAV": "swav",
    "VICReg": "vicreg",
}
__all__ = [
    "BYOL",
    "NNCLR",
    "BarlowTwins",
    "Classifier",
    "DeepClusterV2",
    "Hydra",
    "MoCo",
    "MoCoV3",
    "SimCLR",
    "SimLAP",
    "SimSiam",
    "SupCon",
    "SwAV",
    "VICReg",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cl_vision.methods.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cl_vision.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
